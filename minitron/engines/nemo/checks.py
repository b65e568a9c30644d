"""Checks before engine nemo starts: models, sizes and parallelism that NeMo cannot do are refused."""

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from minitron.config.stages import PruneConfig, TrainingConfig
from minitron.errors import ConfigError
from minitron.storage.bucket import is_bucket
from minitron.storage.cache import cache_directory

WIDTH_MULTIPLE = 64
"""Model-Optimizer's step of the hidden and intermediate sizes."""

SUPPORTED = ("LlamaForCausalLM",)
"""Architectures whose conversion is tested in both directions, to the last bit."""


def check_sizes(config: PruneConfig, sizes: dict[str, int]) -> None:
    """Refuse sizes that Model-Optimizer cannot cut to.

    Raises:
        ConfigError: a size is not a multiple of WIDTH_MULTIPLE, or layers are dropped by hand beside another cut.
    """
    for name in ("hidden_size", "intermediate_size"):
        if (size := sizes.get(name, 0)) % WIDTH_MULTIPLE:
            raise ConfigError(
                f"prune.{name}: {size} is not a multiple of {WIDTH_MULTIPLE}, the step of Model-Optimizer; choose "
                f"{size // WIDTH_MULTIPLE * WIDTH_MULTIPLE or WIDTH_MULTIPLE} or another multiple, or use engine hf"
            )
    if config.drop_layers and set(sizes) != {"num_hidden_layers"}:
        raise ConfigError(
            "prune.drop_layers: engine nemo drops layers by hand or cuts the width: choose one, or use hf"
        )


def check_installed() -> None:
    """Refuse to start without the NeMo that has the language models.

    Raises:
        ConfigError: nemo_toolkit 2 is not installed.
    """
    try:
        version = importlib.metadata.version("nemo_toolkit")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if not version.startswith("2."):
        raise ConfigError(
            f"engine nemo: it needs nemo_toolkit 2, found {version}; run it in the package's image, which "
            "finds its finished results, too, or use engine hf"
        )


def count_workers(config: TrainingConfig) -> int:
    """Count the workers: one per GPU, or on a CPU as many as one copy of the model takes."""
    if config.num_nodes > 1:
        return config.num_nodes * config.gpus_per_node
    return torch.cuda.device_count() or config.model_parallel_size


def check_convertible(architecture: dict[str, Any], model: Path) -> None:
    """Refuse a model whose conversion and back is not tested.

    Raises:
        ConfigError: the architecture is not SUPPORTED.
    """
    if (name := architecture["architectures"][0]) not in SUPPORTED:
        raise ConfigError(f"{model}: engine nemo converts {', '.join(SUPPORTED)}, found {name}; use engine hf")


def check_parallelism(config: TrainingConfig, architecture: dict[str, Any], model: Path, gpus: int) -> None:
    """Refuse parallel sizes that do not divide what they split, before anything is loaded.

    Args:
        config: the parallel and batch sizes.
        architecture: the model's config.json.
        model: its directory, for the message.
        gpus: number of workers.

    Raises:
        ConfigError: a size does not divide; the message names the sizes that do.
    """
    check_convertible(architecture, model)
    for name, key in (
        ("tensor_parallel_size", "num_attention_heads"),
        ("tensor_parallel_size", "num_key_value_heads"),
        ("tensor_parallel_size", "intermediate_size"),
        ("tensor_parallel_size", "vocab_size"),
        ("pipeline_parallel_size", "num_hidden_layers"),
    ):
        _check_divides(name, getattr(config, name), f"{key} of {model}", architecture[key])
    length = config.sequence_length
    if config.context_parallel_size > 1:
        _check_divides("2 x context_parallel_size", 2 * config.context_parallel_size, "sequence_length", length)
    if config.sequence_parallel:
        _check_divides("tensor_parallel_size", config.tensor_parallel_size, "sequence_length", length)
    _check_divides("tensor x pipeline x context parallel size", config.model_parallel_size, "number of GPUs", gpus)
    copies = gpus // config.model_parallel_size
    micro_batches = config.global_batch_size // config.micro_batch_size
    _check_divides(
        "number of model copies",
        copies,
        "number of micro-batches (global_batch_size / micro_batch_size)",
        micro_batches,
    )


def _check_divides(name: str, size: int, what: str, total: int) -> None:
    if total % size:
        valid = ", ".join(str(number) for number in range(1, min(total, 1024) + 1) if total % number == 0)
        raise ConfigError(f"{name}: {size} does not divide the {what}, {total}; choose one of {valid}")


def check_shared(config: TrainingConfig, paths: list[Path]) -> None:
    """Refuse inputs that the other nodes would not see.

    Raises:
        ConfigError: a path lies outside the workspace.
    """
    volume = (cache_directory() if is_bucket(config.workspace) else Path(config.workspace or "")).resolve()
    for path in paths:
        if not path.resolve().is_relative_to(volume):
            raise ConfigError(f"{path}: lies outside the workspace {volume}, which is all that the nodes share")
