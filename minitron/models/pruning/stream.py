"""The residual stream of a student with fewer channels: what of the teacher's states it holds.

A teacher's state x is x E in the student, whose state x' tells x' Dᵀ of the teacher's. Either E picks channels, or the
student's channels are principal components of the teacher's states: of all bases, that one loses least of them.
The root mean square of a state does not depend on its basis, but a norm's weights do. So they are folded into the
matrices that read the stream, as in SliceGPT (arXiv 2401.15024). That has a basis per layer, and matrices between them;
here one serves all layers, and the student stays a plain model of its architecture.

A tied output head is the embedding W, so E has to serve both. The teacher's logits are W (g ⊙ x / ‖x‖), where g are the
weights of the last norm. With S = diag(√|g|), and components Q of the states x S, E is S Q: the student's embedding W E
is then its head, too, since W S Q Qᵀ S is about W S² = W diag(|g|). The signs of g are left to the student's last norm:
no component mixes channels of both. (In SmolLM2 g is negative twice, once for the channel with the largest states.)

B = batch, S = sequence, H = hidden size of the teacher, K = of the student, V = vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import eigh

from minitron.models.processes import add_shares, ask_first, send_to_all
from minitron.models.pruning.layers import NORM, LayerReader
from minitron.models.pruning.least_squares import check_finite, compute_token_weights
from minitron.models.pruning.surgery import DIMENSIONS

ROWS = 8192
"""Rows of an embedding that are computed at once."""


@dataclass(frozen=True)
class Stream:
    """The maps between the teacher's states [B, S, H] and the student's [B, S, K].

    Attributes:
        encode_HK: E.
        decode_HK: D.
        explained: the share of the states' energy that the student's channels hold, if they are components.
    """

    encode_HK: Tensor
    decode_HK: Tensor
    explained: float | None = None

    def encode(self, state: Tensor) -> Tensor:
        """Return what a student holds of the teacher's state [B, S, H]."""
        return state @ self.encode_HK

    def encode_layer(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a layer, by their names in it, on the student's stream.

        Those of matrices that read the stream are the teacher's: they are fitted later.
        """
        return {name: self._encode_weight(DIMENSIONS[name.split(".")[-2]], weight) for name, weight in weights.items()}

    def make_ones(self, norm: Tensor) -> Tensor:
        """Return the weights of a student's norm: the teacher's are folded into the matrices that read it."""
        return norm.new_ones(self.encode_HK.shape[1])

    def _encode_weight(self, axes: tuple[str | None, ...], weight: Tensor) -> Tensor:
        if axes == ("hidden",):
            return self.make_ones(weight)
        return self.encode_HK.T @ weight if axes[0] == "hidden" else weight

    def decode_weighted(self, norm_H: Tensor) -> Tensor:
        """Return the map [H, K] from the student's normed state to the teacher's, which has a norm's weights."""
        teacher, student = self.decode_HK.shape
        return norm_H[:, None] * self.decode_HK * (teacher / student) ** 0.5


def keep_channels(channels: list[int], hidden_size: int, device: torch.device) -> Stream:
    """Return the stream of a student that keeps channels of the teacher's."""
    picked_HK = torch.eye(hidden_size, device=device)[:, channels]
    return Stream(picked_HK, picked_HK)


def map_rows(rows_VH: Tensor, map_HK: Tensor) -> Tensor:
    """Return the rows of an embedding or an output head for the student, [V, K], in their dtype and on the CPU."""
    return torch.cat([(part.to(map_HK) @ map_HK).to(part.dtype).cpu() for part in rows_VH.split(ROWS)])


class StateEnergy:
    """The sum over a teacher's states of what its principal components are found by, in float64."""

    def __init__(self, teacher: LayerReader, device: torch.device) -> None:
        """Begin without states."""
        size = teacher.config.hidden_size
        self._gram_HH = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._is_tied, norm_H = teacher.config.tie_word_embeddings, torch.ones(size, device=device)
        if self._is_tied:
            norm_H = teacher.read_tensor(NORM).to(device, torch.float32)
        self._is_negative_H = norm_H < 0
        self._scale_H = (norm_H.abs() / norm_H.abs().mean()).sqrt().clamp(min=1e-3)

    def add(self, states: Iterable[Tensor]) -> None:
        """Add states [B, S, H]: every token counts alike, however large its state is, as behind a norm.

        Raises:
            RunError: one of them is not finite.
        """
        for state in states:
            scaled = (state * self._scale_H * compute_token_weights(state)).flatten(0, 1)
            if scaled.device.type == "cpu":  # a GPU is slow at float64
                scaled = scaled.double()
            self._gram_HH += scaled.T @ scaled
        check_finite(self._gram_HH.diagonal())

    def find_components(self, count: int) -> Stream:
        """Return the stream of a student with so many channels; all processes call this, and process 0 decides."""
        add_shares([self._gram_HH])
        belong_together = self._is_negative_H[:, None] == self._is_negative_H
        energies, vectors = eigh(self._gram_HH * belong_together)  # ascending
        components_HK = vectors[:, -count:].flip(1).float().contiguous()
        send_to_all(components_HK, 0)
        explained = ask_first(lambda: float(energies[-count:].sum() / energies.sum()))
        if not self._is_tied:
            return Stream(components_HK, components_HK, explained)
        scale_H1 = self._scale_H[:, None]
        return Stream(scale_H1 * components_HK, components_HK / scale_H1, explained)
