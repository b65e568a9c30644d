"""Checks before engine nemo starts: refuse models, sizes and parallelism that NeMo does not support."""

import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minitron.config.fields import Fault
from minitron.config.parse import SectionError
from minitron.config.settings import TrainingSettings
from minitron.config.shapes import PruneSettings
from minitron.config.stages import TrainingConfig
from minitron.errors import ConfigError
from minitron.storage.layout import MASK

WIDTH_MULTIPLE = 64
"""Model-Optimizer cuts hidden and intermediate sizes to multiples of this."""

SUPPORTED = ("LlamaForCausalLM",)
"""Architectures whose conversion is tested in both directions, to the last bit."""


def find_cut_faults(settings: PruneSettings, sizes: Mapping[str, int]) -> Iterator[Fault]:
    """Find sizes that Model-Optimizer cannot cut to; `sizes` are those that change."""
    for name in ("hidden_size", "intermediate_size"):
        if (size := sizes.get(name, 0)) % WIDTH_MULTIPLE:
            yield Fault(
                f"prune.{name}",
                f"{size} is not a multiple of {WIDTH_MULTIPLE}, the step of Model-Optimizer; choose "
                f"{size // WIDTH_MULTIPLE * WIDTH_MULTIPLE or WIDTH_MULTIPLE} or another multiple, or use engine hf",
            )
    if settings.drop_layers and set(sizes) != {"num_hidden_layers"}:
        yield Fault("prune.drop_layers", "engine nemo cannot combine it with another cut; choose one, or use engine hf")


def check_sizes(settings: PruneSettings, sizes: Mapping[str, int]) -> None:
    """Refuse sizes that Model-Optimizer cannot cut to.

    Raises:
        ConfigError: a size is not a multiple of WIDTH_MULTIPLE, or `drop_layers` is combined with another cut.
    """
    if faults := list(find_cut_faults(settings, sizes)):
        raise SectionError(faults)


def check_installed() -> None:
    """Refuse to start without the version of NeMo that has the language models.

    Raises:
        ConfigError: nemo_toolkit 2 is not installed.
    """
    try:
        version = importlib.metadata.version("nemo_toolkit")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if not version.startswith("2."):
        raise ConfigError(
            f"engine nemo: needs nemo_toolkit 2, found {version}; run it in the package's image, which also finds "
            "its finished results, or use engine hf"
        )


def check_unmasked(dataset: Path) -> None:
    """Refuse a dataset of conversations: NeMo would train on the prompts, too.

    Raises:
        ConfigError: the dataset has masks.
    """
    if (dataset / "train").with_suffix(MASK).exists():
        raise ConfigError(
            f"engine nemo: {dataset} has masks of conversations, which it does not support; use engine hf"
        )


def find_conversion_faults(key: str, architecture: Mapping[str, Any], model: Path | str) -> Iterator[Fault]:
    """Find a model whose conversion to NeMo and back is not tested."""
    if (name := architecture["architectures"][0]) not in SUPPORTED:
        yield Fault(key, f"engine nemo supports {', '.join(SUPPORTED)}, but {model} is a {name}; use engine hf")


def check_convertible(architecture: Mapping[str, Any], model: Path) -> None:
    """Refuse a model whose conversion to NeMo and back is not tested.

    Raises:
        ConfigError: the architecture is not SUPPORTED.
    """
    if faults := list(find_conversion_faults("engine", architecture, model)):
        raise SectionError(faults)


def find_parallel_faults(
    settings: TrainingSettings, architecture: Mapping[str, Any] | None, model: Path | str, gpus: int
) -> Iterator[Fault]:
    """Find parallel sizes that do not divide the size that they split.

    Args:
        settings: the parallel and batch sizes.
        architecture: the model's config.json; None if unknown.
        model: the model's address, for the message.
        gpus: number of workers.
    """
    tensor, copy = settings.tensor_parallel_size, settings.model_parallel_size
    if architecture:
        yield from find_conversion_faults("engine", architecture, model)
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
            yield from _find_remainder("tensor_parallel_size", tensor, f"{name} of {model}", architecture[name])
        layers = architecture["num_hidden_layers"]
        pipeline = settings.pipeline_parallel_size
        yield from _find_remainder("pipeline_parallel_size", pipeline, f"num_hidden_layers of {model}", layers)
    if (size := settings.context_parallel_size) > 1:
        length = settings.sequence_length
        yield from _find_remainder("context_parallel_size", 2 * size, "sequence_length", length, f"2 x {size} = ")
    if settings.sequence_parallel:
        yield from _find_remainder("tensor_parallel_size", tensor, "sequence_length", settings.sequence_length)
    split = "tensor x pipeline x context parallel size "
    faults = list(_find_remainder("tensor_parallel_size", copy, "number of GPUs", gpus, split))
    if not faults:
        micro_batches = settings.global_batch_size // settings.micro_batch_size
        what = "number of micro-batches (global_batch_size / micro_batch_size)"
        faults += _find_remainder("global_batch_size", gpus // copy, what, micro_batches, "number of model copies ")
    yield from faults


def check_parallelism(config: TrainingConfig, architecture: dict[str, Any], model: Path, gpus: int) -> None:
    """Refuse parallel sizes that do not divide the size that they split, before anything is loaded.

    Raises:
        ConfigError: a size does not divide; the message names the valid sizes.
    """
    if faults := list(find_parallel_faults(config, architecture, model, gpus)):
        raise SectionError(faults)


def _find_remainder(key: str, size: int, what: str, total: int, name: str = "") -> Iterator[Fault]:
    if total % size:
        valid = ", ".join(str(number) for number in range(1, min(total, 1024) + 1) if total % number == 0)
        yield Fault(key, f"{name}{size} does not divide the {what}, {total}; choose one of {valid}")
