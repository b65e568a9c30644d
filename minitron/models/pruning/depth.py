"""Choose the layers of a student one at a time: the next to go is the one whose absence costs the least loss.

Block influence scores each layer once, in the whole model. Here a layer is measured in what is left of the model. For a
compensated cut the seam is refitted before the measurement: `down_proj` ahead of the gap, to the teacher's state behind
the gap. Several processes, which all have the teacher, share the text that seams are fitted on, and take turns with the
layers: each solves and measures one of as many.

S = sequence, H = hidden size, C = input channels of down_proj, O = output channels, V = vocabulary, N = tokens.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from minitron.errors import RunError
from minitron.models.checks import EMBEDDING, HEAD
from minitron.models.losses import LossWeights, linear_loss
from minitron.models.processes import count_processes, get_rank, list_values, send_to_all, split_share
from minitron.models.pruning.layers import LayerReader, read_channels, read_heads
from minitron.models.pruning.least_squares import Moments, complain_of_condition, compute_token_weights, solve
from minitron.models.pruning.surgery import Drop, LayerOrder

SEAM_RIDGE = 0.5
"""The ridge of a seam while layers are chosen: about what held-out tokens choose in the cut itself."""

FITTED, MEASURED = 5, 4096
"""Tokens that seams are fitted on, per input channel, and tokens that losses are measured on, at most."""

RETRIED = 6
"""Layers that are measured again, at least, after each one that goes: those whose last losses were the lowest."""


@torch.no_grad()
def drop_layers_by_loss(
    teacher: LayerReader,
    count: int,
    fitted: Tensor,
    held_out: Tensor,
    micro_batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    refit: bool,
    begun: LayerOrder | None = None,
) -> Iterator[LayerOrder]:
    """Choose the layers to drop, and yield their order after each; the first layer stays.

    The whole teacher is on the device. The layers do not depend on the number of processes, but for rounding.

    Args:
        teacher: the model to cut.
        count: layers to drop, fewer than there are.
        fitted: sequences [sequences, S] that seams are fitted on; the first of them are enough.
        held_out: sequences that the losses are measured on; the same holds for them.
        micro_batch_size: sequences that are computed at once.
        dtype: dtype of the computation; seams are solved in float64.
        device: where to compute. The states of a process's share of `fitted` after each layer are kept on the CPU.
        refit: refit the seams, as the compensated cut does.
        begun: an order that was yielded before; the result is what it would be without.

    Raises:
        RunError: activations are not finite.
    """
    length = held_out.shape[1]
    needed = math.ceil(FITTED * teacher.config.intermediate_size / length)
    fit_batches = split_share(fitted[: needed if refit else 0], micro_batch_size)
    loss_batches = held_out[: max(MEASURED // length, 1)].split(micro_batch_size)
    search = _LayerSearch(teacher, _Split(fit_batches, {}), _Split(loss_batches, {}), dtype, device, refit)
    if begun:
        search.repeat(begun)
    done = len(search.order.drops)
    for _ in tqdm(range(done, count), desc="layers", unit="layer", initial=done, total=count):
        search.drop_one()
        yield search.order


class _Split(NamedTuple):
    """Sequences as batches of token ids, and the student's states [B, S, H] ahead of each kept layer, on the CPU."""

    batches: tuple[Tensor, ...]
    states: dict[int, list[Tensor]]


class _Trial(NamedTuple):
    """The student without one more layer; the process that tried it has the matrix ahead of the gap."""

    drop: Drop
    process: int
    seam_OC: Tensor | None


class _LayerSearch:
    """The student while layers go: the teacher's layers, with the seams refitted so far, if they are."""

    def __init__(
        self,
        teacher: LayerReader,
        fitted: _Split,
        measured: _Split,
        dtype: torch.dtype,
        device: torch.device,
        refits: bool,
    ) -> None:
        self._device, self._fitted, self._measured, self._refits = device, fitted, measured, refits
        self._layers = list(teacher.load_layers(dtype, device))
        self._calls = teacher.record_calls(measured.batches[0].shape[1], dtype, device)
        self._norm = teacher.load_norm(device)
        head = EMBEDDING if teacher.config.tie_word_embeddings else HEAD
        self._head = teacher.read_tensor(head).to(device, dtype)
        for split in (fitted, measured):
            split.states[0] = [teacher.read_embeddings(ids, dtype, device).cpu() for ids in split.batches]
        self._kept = list(range(len(self._layers)))
        self.order = LayerOrder([], {})
        self._run_from(0)
        self._targets = {index - 1: states for index, states in self._fitted.states.items()}

    def repeat(self, begun: LayerOrder) -> None:
        """Drop the layers of an order that was found before."""
        for drop in begun.drops:
            self._drop(_Trial(drop, 0, self._fit_seams_without([drop.layer])))
        self.order.losses.update(begun.losses)

    def drop_one(self) -> None:
        """Drop the layer whose absence costs the least loss, and refit its seam."""
        trials, losses, turns = list[_Trial](), self.order.losses, count_processes()
        candidates = sorted(self._kept[1:], key=lambda layer: losses.get(layer, 0.0))
        while candidates and not self._is_settled(trials, candidates[0]):
            for trial in self._try_without(candidates[:turns]):
                if not self._is_settled(trials, trial.drop.layer):  # else one process would not have tried it
                    trials.append(trial)
                    losses[trial.drop.layer] = trial.drop.loss
            candidates = candidates[turns:]
        self._drop(min(trials, key=lambda trial: trial.drop.loss))

    def _is_settled(self, trials: list[_Trial], following: int) -> bool:
        """Say whether a layer that comes after those tried cannot be the one to go.

        Losses rise as layers go, so that the last loss is about a lower bound of the next one.
        """
        bound = self.order.losses.get(following, 0.0)
        return len(trials) >= RETRIED and min(trial.drop.loss for trial in trials) <= bound

    def _drop(self, trial: _Trial) -> None:
        place = self._kept.index(trial.drop.layer)
        matrix = self._layers[self._kept[place - 1]].mlp.down_proj.weight
        if self._refits:
            seam = torch.empty_like(matrix) if trial.seam_OC is None else trial.seam_OC
            send_to_all(seam, trial.process)
            matrix.data = seam
        del self._kept[place]
        self._run_from(place - 1)
        self.order.drops.append(trial.drop)
        self.order.losses.pop(trial.drop.layer, None)

    def _run_from(self, place: int) -> None:
        """Compute the student's states ahead of each layer behind a place."""
        end = len(self._layers)
        for layer, following in pairwise([*self._kept[place:], end]):
            for split in (self._fitted, self._measured):
                split.states[following] = [self._run_layer(layer, state) for state in split.states[layer]]

    def _try_without(self, layers: list[int]) -> list[_Trial]:
        """Measure the student without each of these layers, each in a process."""
        seam, rank = self._fit_seams_without(layers), get_rank()
        own = self._measure_without(layers[rank], seam) if rank < len(layers) else math.nan
        losses = list_values(own)[: len(layers)]
        for layer, loss in zip(layers, losses, strict=True):
            if not math.isfinite(loss):
                raise RunError(
                    f"without layer {layer + 1} the loss is {loss}: the model overflows, check its validation loss"
                )
        return [
            _Trial(Drop(layer, loss), process, seam if process == rank else None)
            for process, (layer, loss) in enumerate(zip(layers, losses, strict=True))
        ]

    def _measure_without(self, layer: int, seam: Tensor | None) -> float:
        """Return the loss without a layer, with another matrix ahead of the gap if it was refitted."""
        place = self._kept.index(layer)
        ahead, behind = self._kept[place - 1], self._kept[place + 1 :]
        matrix = self._layers[ahead].mlp.down_proj.weight
        present, states = matrix.data, self._measured.states[ahead]
        matrix.data = present if seam is None else seam
        for index in [ahead, *behind]:
            states = [self._run_layer(index, state) for state in states]
        matrix.data = present
        return self._measure_loss(states)

    def _fit_seams_without(self, layers: list[int]) -> Tensor | None:
        """Fit the seams around each of these layers, each in a process; return this process's, if it has one.

        It is the matrix [O, C] ahead of the gap, fitted to the teacher's state behind it.
        """
        if not self._refits:
            return None
        own = None
        for process, layer in enumerate(layers):
            moments = self._sum_seam(layer)
            moments.collect(process)
            if process == get_rank():
                own = layer, moments
        return self._solve_seam(*own) if own else None

    def _sum_seam(self, dropped: int) -> Moments:
        """Return the sums over this process's share of the text for the seam around a layer."""
        place = self._kept.index(dropped)
        ahead, following = self._kept[place - 1], [*self._kept, len(self._layers)][place + 1]
        layer, down_proj = self._layers[ahead], self._layers[ahead].mlp.down_proj
        moments = Moments(down_proj.in_features, down_proj.out_features, self._device)
        for state, target in zip(self._fitted.states[ahead], self._targets[following - 1], strict=True):
            middle = self._run_attention(ahead, state.to(self._device))
            target = target.to(self._device).float()
            weight = compute_token_weights(target)
            change = target - (middle if down_proj.bias is None else middle + down_proj.bias)
            moments.add((read_channels(layer, middle) * weight).flatten(0, 1).float(), (change * weight).flatten(0, 1))
        return moments

    def _solve_seam(self, dropped: int, moments: Moments) -> Tensor:
        """Return the matrix [O, C] ahead of the gap that a layer leaves."""
        down_proj = self._layers[self._kept[self._kept.index(dropped) - 1]].mlp.down_proj
        columns = torch.arange(down_proj.in_features, device=self._device)
        seam = solve(down_proj.weight.data, columns, moments, SEAM_RIDGE)
        if seam is None:
            raise complain_of_condition(moments)
        return seam

    def _run_attention(self, index: int, state: Tensor) -> Tensor:
        layer = self._layers[index]
        return state + layer.self_attn.o_proj(read_heads(layer, state, self._calls[index]))

    def _run_layer(self, index: int, state: Tensor) -> Tensor:
        return self._layers[index](state.to(self._device), **self._calls[index]).cpu()

    def _measure_loss(self, states: list[Tensor]) -> float:
        """Return the mean cross-entropy of the next token, in nats."""
        loss, tokens = 0.0, 0
        for ids, state in zip(self._measured.batches, states, strict=True):
            hidden = self._norm(state.to(self._device)[:, :-1]).flatten(0, 1).to(self._head.dtype)
            labels = ids[:, 1:].flatten().to(self._device)
            loss += float(linear_loss(hidden, self._head, labels, LossWeights()).cross_entropy)
            tokens += len(labels)
        return loss / tokens
