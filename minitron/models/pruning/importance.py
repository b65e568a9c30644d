"""Minitron importance: the contribution of each layer, channel and head, read from one forward pass.

Used by `python -m minitron.prune --config FILE`. The statistics are those of NVIDIA Model-Optimizer
(`modelopt/torch/prune/plugins/mcore_minitron.py`), after arXiv 2407.14679, section 2.2, and arXiv 2403.03853 (layers).

B = batch, S = sequence, C = channels, L = layers, H = hidden, I = intermediate, A = query heads,
G = key-value groups, D = head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from minitron.data.packed import PackedDataset
from minitron.errors import RunError
from minitron.models.processes import add_shares, take_share
from minitron.models.pruning.layers import LayerReader, get_head_dim

STATES_ON_CPU = 10**9
"""Bytes of states in memory. At 8 billion parameters that is hours of computing per pass over the shards."""

SHARE_OF_GPU = 0.5
"""Share of a GPU's free memory for states; the rest is for two layers and their activations."""


@dataclass(frozen=True)
class Importance:
    """The scores of every axis, fp32 on the CPU; the lowest are cut first.

    Attributes:
        layers: block influence [L]: the mean over tokens of 1 - the cosine similarity of a layer's input and output.
        hidden: residual channels [H], one ranking for the whole model.
        intermediate: MLP channels [L, I].
        heads: query heads [L, A].
        key_value: key-value groups [L, G], each scored with the query heads it serves.
    """

    layers: Tensor
    hidden: Tensor
    intermediate: Tensor
    heads: Tensor
    key_value: Tensor

    @classmethod
    def zeros(cls, config: Any) -> "Importance":
        """Return equal scores, for a cut that does not choose by scores."""
        layers = config.num_hidden_layers
        return cls(
            layers=torch.zeros(layers),
            hidden=torch.zeros(config.hidden_size),
            intermediate=torch.zeros(layers, config.intermediate_size),
            heads=torch.zeros(layers, config.num_attention_heads),
            key_value=torch.zeros(layers, config.num_key_value_heads),
        )

    @classmethod
    def from_squares(
        cls, config: Any, influence: Tensor, norms: Tensor, intermediate: Tensor, attention: Tensor
    ) -> "Importance":
        """Turn sums of squares over the calibration into scores.

        Args:
            config: the model's sizes.
            influence: block influence [L], a score already.
            norms: outputs of the layers' two norms [2 L, H].
            intermediate: inputs of the MLPs' last matrix [L, I].
            attention: inputs of the attentions' last matrix [L, A D].
        """
        channels = attention.sqrt()
        heads = channels.unflatten(1, (config.num_attention_heads, -1))
        groups = channels.unflatten(1, (config.num_key_value_heads, -1))  # a group's heads are neighbors
        return cls(
            layers=influence.cpu(),
            hidden=norms.sqrt().sum(dim=0).cpu(),
            intermediate=intermediate.sqrt().cpu(),
            heads=torch.linalg.vector_norm(heads, dim=2).cpu(),
            key_value=torch.linalg.vector_norm(groups, dim=2).cpu(),
        )

    def check_finite(self) -> "Importance":
        """Return the scores.

        Raises:
            RunError: a score is infinite or not a number.
        """
        for axis, scores in vars(self).items():
            if not scores.isfinite().all():
                raise RunError(
                    f"importance of {axis}: {int((~scores.isfinite()).sum())} scores are not finite; "
                    "the model overflows or its weights are damaged: check its validation loss"
                )
        return self


@torch.no_grad()
def measure_importance(
    teacher: LayerReader,
    dataset: PackedDataset,
    sequences: int,
    micro_batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Importance:
    """Measure the importance of every axis in one forward pass, layer by layer; logits are never computed.

    Memory has one layer and the states of as many sequences as fit; each group of sequences reads all layers once.
    Several processes share the sequences, and all get the scores.

    Args:
        teacher: the model; it is read from its files.
        dataset: packed calibration sequences.
        sequences: number of sequences to read, from the first; all of them if there are fewer.
        micro_batch_size: sequences that are computed at once; the scores do not depend on it.
        dtype: dtype of weights and states.
        device: where to compute.

    Raises:
        RunError: an activation is infinite or not a number.
    """
    config, count, length = teacher.config, min(sequences, len(dataset)), len(dataset[0]["input_ids"])
    own = take_share(range(count))
    sums, calls = _Sums(config, device), teacher.record_calls(length, dtype, device)
    size = _count_fitting(length * config.hidden_size * dtype.itemsize, micro_batch_size, device)
    with tqdm(total=len(own) * length, desc="importance", unit="tok", unit_scale=True) as bar:
        for start in range(0, len(own), size):
            group = [dataset[index]["input_ids"] for index in own[start : start + size]]
            batches = torch.stack(group).split(micro_batch_size)
            states = [teacher.read_embeddings(input_ids, dtype, device) for input_ids in batches]
            for index, layer in enumerate(teacher.load_layers(dtype, device)):
                sums.add_hooks(index, layer)
                for place, state in enumerate(states):
                    states[place] = layer(state, **calls[index])
                    bar.update(state[..., 0].numel() / len(calls))
    return sums.to_importance(config, count).check_finite()


def _count_fitting(sequence_bytes: int, micro_batch_size: int, device: torch.device) -> int:
    """Return how many sequences are kept as states at once, whole micro-batches of them."""
    room = STATES_ON_CPU if device.type == "cpu" else int(torch.cuda.mem_get_info(device)[0] * SHARE_OF_GPU)
    return max(room // (sequence_bytes * micro_batch_size), 1) * micro_batch_size


class _Sums:
    """The sums that hooks collect over the batches, in fp32 on the device."""

    def __init__(self, config: Any, device: torch.device) -> None:
        layers = config.num_hidden_layers
        with device:
            self._influence = torch.zeros(layers)
            self._norms = torch.zeros(layers, 2, config.hidden_size)
            self._intermediate = torch.zeros(layers, config.intermediate_size)
            self._attention = torch.zeros(layers, config.num_attention_heads * get_head_dim(config))

    def add_hooks(self, index: int, layer: Any) -> None:
        """Hook one layer."""
        layer.register_forward_hook(_add_influence(self._influence[index]))
        layer.input_layernorm.register_forward_hook(_add_output(self._norms[index, 0]))
        layer.post_attention_layernorm.register_forward_hook(_add_output(self._norms[index, 1]))
        layer.mlp.down_proj.register_forward_pre_hook(_add_input(self._intermediate[index]))
        layer.self_attn.o_proj.register_forward_pre_hook(_add_input(self._attention[index]))

    def to_importance(self, config: Any, sequences: int) -> Importance:
        """Turn the sums over the sequences of all processes into scores."""
        add_shares(vars(self).values())
        return Importance.from_squares(
            config, self._influence / sequences, self._norms.flatten(0, 1), self._intermediate, self._attention
        )


def _squared_mean(activations: Tensor) -> Tensor:
    """Return [C] for [B, S, C]: the mean over the sequence of the absolute value, squared, summed over the batch."""
    return activations.abs().mean(dim=1, dtype=torch.float32).square().sum(dim=0)


def _add_output(total: Tensor) -> Callable[..., None]:
    def hook(_module: Any, _arguments: Any, output: Tensor) -> None:
        total.add_(_squared_mean(output))

    return hook


def _add_input(total: Tensor) -> Callable[..., None]:
    def hook(_module: Any, arguments: tuple[Tensor]) -> None:
        total.add_(_squared_mean(arguments[0]))

    return hook


def _add_influence(total: Tensor) -> Callable[..., None]:
    def hook(_module: Any, arguments: tuple[Tensor], output: Tensor) -> None:
        total.add_((1 - cosine_similarity(arguments[0].float(), output.float(), dim=2)).mean(dim=1).sum())

    return hook
