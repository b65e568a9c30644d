"""Models whose parameters are divided among the processes of a training (PyTorch's FSDP2), or whole in one process.

Every decoder layer is a unit; embedding, last norm and head are another. Each of n processes keeps 1/n of a unit, and
gathers it while it computes. The head stays gathered until the loss is computed, so logits are never exchanged.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

from minitron.data.packed import PackedDataset
from minitron.engines.hf.device import autocast_on_gpu, get_compute_dtype, get_device
from minitron.models.checkpoint import load_model
from minitron.models.checks import EMBEDDING, HEAD
from minitron.models.processes import count_processes, get_rank
from minitron.models.pruning.layers import NORM, LayerReader
from minitron.models.scoring import average_scores, list_scores, sum_scores


@functools.cache
def make_mesh(device: str) -> DeviceMesh:
    """Return all processes in a row, for tensors on devices of this kind."""
    return init_device_mesh(device, (count_processes(),))


def open_model(directory: Path, dtype: torch.dtype) -> Any:
    """Load a model in eval mode, on this process's device: the whole model, or this process's share of it.

    Args:
        directory: a Hugging Face directory.
        dtype: dtype of the parameters; a GPU computes in bfloat16, and sums gradients in float32.

    Raises:
        ConfigError: not a model directory, not a SUPPORTED architecture, or weights that do not match config.json.
        RunError: a weight file is damaged or missing.
    """
    if count_processes() == 1:
        model: Any = load_model(directory, dtype)
        return model.to(get_device())
    reader = LayerReader(directory)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(reader.config).eval()
    for index, layer in enumerate(model.model.layers):  # one at a time: no process ever holds the whole model
        _fill(layer, reader.read_layer(index), dtype)
        _shard(layer)
    is_tied = model.config.tie_word_embeddings
    _fill(model, {name: reader.read_tensor(name) for name in (EMBEDDING, NORM, *([] if is_tied else [HEAD]))}, dtype)
    if is_tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.model.rotary_emb.to(get_device())
    model.forward = lambda **inputs: model.model(**inputs)  # gathers head and embedding, and computes no logits
    return _shard(model, reshard_after_forward=False)


def release_head(model: Any) -> None:
    """Keep only this process's share of a model's head, embedding and last norm, until its next forward pass."""
    if isinstance(model, FSDPModule):
        model.reshard()


@torch.no_grad()
def gather_weights(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return whole copies of the parameters, on the CPU of process 0; the other processes get an empty dict."""
    weights = {}
    for name, parameter in parameters.items():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if get_rank() == 0:
            weights[name] = whole.detach().to("cpu", copy=True)
    return weights


def score_model(
    model: Any,
    dataset: PackedDataset,
    sequences: int,
    micro_batch_size: int,
    description: str,
    watch: Callable[[], None],
) -> dict[str, Any]:
    """Return the loss and perplexity of a model on the first sequences of a split: see `score_shares`."""
    with autocast_on_gpu():
        scores = score_shares({"model": model}, dataset, sequences, micro_batch_size, description, watch)
    release_head(model)
    return average_scores(scores["model"])


def score_shares(
    models: dict[str, Any],
    dataset: PackedDataset,
    sequences: int,
    micro_batch_size: int,
    description: str,
    watch: Callable[[], None] = lambda: None,
    reference: Any = None,
) -> dict[str, dict[str, list[float]]]:
    """Score models on the first sequences of a split, each in one process: see `scoring.list_scores`.

    `watch` is called before every sequence; its exception breaks the scoring off.
    """
    count = min(sequences, len(dataset))
    share: Any = _Share(dataset, count, get_rank(), count_processes(), watch)
    sums, counts = sum_scores(models, share, len(share), micro_batch_size, reference, description)
    sums = {name: _gather_shares(values)[:count] for name, values in sums.items()}
    return list_scores(sums, _gather_shares(counts)[:count], reference is not None)


def _gather_shares(own: Tensor) -> Tensor:
    """Return the values of all processes, [N, …] on the CPU, in the order of their sequences."""
    if count_processes() == 1:
        return own
    shares = [torch.empty_like(own) for _ in range(count_processes())]
    dist.all_gather(shares, own.contiguous())
    return torch.stack(shares, dim=1).flatten(0, 1)


class _Share(Dataset):
    """Every n-th sequence of a split; all shares are equally long, so the last sequence may be in several."""

    def __init__(
        self, dataset: PackedDataset, count: int, rank: int, processes: int, watch: Callable[[], None]
    ) -> None:
        self._dataset, self._count, self._rank, self._processes = dataset, count, rank, processes
        self._watch = watch
        self.sequence_length = dataset.sequence_length

    def __len__(self) -> int:
        return -(-self._count // self._processes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self._watch()
        return self._dataset[min(index * self._processes + self._rank, self._count - 1)]


def _shard(module: Any, **options: Any) -> Any:
    """Divide a unit's parameters. Gradients are added up, as in one process; gloo has no mean in every release."""
    policy = MixedPrecisionPolicy(get_compute_dtype(), torch.float32)
    fully_shard(module, mesh=make_mesh(get_device().type), mp_policy=policy, **options)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    return module


def _fill(module: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Give a module without weights those that are its own."""
    module.load_state_dict(
        {name: weight.to(get_device(), dtype) for name, weight in weights.items()}, strict=False, assign=True
    )
