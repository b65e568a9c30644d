"""Kinds of GPUs: memory and peak by NVIDIA's data sheets, and the share of the peak that stages reach."""

from collections.abc import Mapping
from typing import NamedTuple

from minitron.config.resources.device import count_gpus
from minitron.config.settings import StageSettings, TrainingSettings
from minitron.errors import ConfigError

LARGEST_NODE = 8
"""GPUs of the largest node that a plan recommends: an HGX or DGX board has 8."""


class Gpu(NamedTuple):
    """A kind of GPU.

    Attributes:
        name: its name in `minitron plan --gpu`.
        memory: bytes. GPUs report up to 7 % more than the data sheet's GB of 1e9 bytes; CUDA's context takes some.
        peak: dense operations per second in bf16 (data sheets of newer GPUs also give twice as many, with sparsity).
        sheet: the data sheet.
        labels: what nodes with this GPU are labeled with on GKE, or by NVIDIA's GPU feature discovery.
    """

    name: str
    memory: float
    peak: float
    sheet: str
    labels: tuple[str, ...] = ()


_KINDS = (
    Gpu("l4-24gb", 24e9, 121e12, "NVIDIA L4 Tensor Core GPU", ("nvidia-l4", "NVIDIA-L4")),
    Gpu("a100-40gb", 40e9, 312e12, "NVIDIA A100 Tensor Core GPU", ("nvidia-tesla-a100", "NVIDIA-A100-SXM4-40GB")),
    Gpu("l40s-48gb", 48e9, 362e12, "NVIDIA L40S GPU", ("NVIDIA-L40S",)),
    Gpu("a100-80gb", 80e9, 312e12, "NVIDIA A100 Tensor Core GPU", ("nvidia-a100-80gb", "NVIDIA-A100-SXM4-80GB")),
    Gpu(
        "h100-80gb", 80e9, 989e12, "NVIDIA H100 Tensor Core GPU, SXM",
        ("nvidia-h100-80gb", "nvidia-h100-mega-80gb", "NVIDIA-H100-80GB-HBM3"),
    ),
    Gpu("h200-141gb", 141e9, 989e12, "NVIDIA H200 Tensor Core GPU, SXM", ("nvidia-h200-141gb", "NVIDIA-H200")),
)  # fmt: skip

GPUS = {gpu.name: gpu for gpu in _KINDS}
"""Kinds of GPUs, the one with the least memory first."""

DEFAULT_GPU = GPUS["h100-80gb"]
"""The GPU of the presets, and of a plan that names none."""

CPU = "cpu"
"""The device of a plan without GPUs."""

CPU_SPEED = 0.1e12
"""Operations per second in fp32 that two CPU cores reach in the tutorial's run of SmolLM2-135M (docs/tutorial.md)."""

_MEASURED = "measured on one H100 and one H200: docs/explanation/engines.md"
_PUBLISHED = "the best published for distillation with NVIDIA's tools: Model-Optimizer, pull request 861"
_ASSUMED = "assumed for a model that only reads, not measured"


class Utilization(NamedTuple):
    """The share of a GPU's peak that a stage's matrix products reach; what is computed twice counts once."""

    share: float
    source: str


def find_gpu(name: str) -> Gpu | None:
    """Return a kind of GPU by its name; None for the CPU.

    Raises:
        ConfigError: there is no such kind.
    """
    if name == CPU:
        return None
    if name not in GPUS:
        raise ConfigError(f"GPU {name}: unknown; give one of {', '.join([*GPUS, CPU])}")
    return GPUS[name]


def find_labeled_gpu(selector: Mapping[str, str]) -> Gpu | None:
    """Return the kind of GPU that a node selector asks for; None if it does not say."""
    return next((gpu for gpu in _KINDS if set(gpu.labels) & set(selector.values())), None)


def find_peak_speed(device_name: str) -> float | None:
    """Return the operations per second of a GPU by the name that its driver gives it; None if the kind is not known."""
    label = device_name.replace(" ", "-")
    return next((gpu.peak for gpu in _KINDS if label in gpu.labels), None)


def find_utilization(settings: StageSettings) -> Utilization:
    """Return the share of a GPU's peak that a stage reaches."""
    if not isinstance(settings, TrainingSettings):
        return Utilization(0.25, _ASSUMED)
    if settings.engine == "nemo":
        return Utilization(0.25, _PUBLISHED)
    source = f"{_MEASURED}; without the exchange between GPUs" if count_gpus(settings) > 1 else _MEASURED
    return Utilization(0.46 if settings.gradient_checkpointing else 0.55, source)
