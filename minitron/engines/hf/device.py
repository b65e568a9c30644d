"""Where the transformers engine computes, and in which precision."""

from typing import Any

import torch

from minitron.models.losses import can_compile


def get_device() -> torch.device:
    """Return the GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def get_compute_dtype() -> torch.dtype:
    """Return bfloat16 on a GPU, float32 on a CPU (where bfloat16 is slower)."""
    return torch.bfloat16 if get_device().type == "cuda" else torch.float32


def say_what_stands_idle(processes: int) -> None:
    """Say that pruning leaves visible GPUs idle: the settings ask for fewer."""
    if (visible := torch.cuda.device_count()) > processes:
        print(f"prune: uses {processes} of {visible} visible GPUs", flush=True)


def autocast_on_gpu() -> torch.autocast:
    """Return the context of mixed precision: bf16 on a GPU, nothing on a CPU."""
    return torch.autocast(get_device().type, get_compute_dtype(), enabled=get_device().type == "cuda")


def compile_layers(model: Any) -> None:
    """Fuse what lies between a layer's matrix products (norms, rotary embedding, activation) on a GPU.

    The layers share their code: it is compiled once, in seconds, and not once per layer.
    """
    if get_device().type == "cuda" and can_compile():
        for layer in model.model.layers:
            layer.compile()
