"""The GPUs of this task, and the workers that use them: one process per GPU, on one node or on several."""

from pathlib import Path

from minitron.config.stages import StageConfig, TrainingConfig
from minitron.errors import ConfigError, RunError
from minitron.storage.bucket import is_bucket
from minitron.storage.cache import cache_directory


def check_gpus(wanted: int) -> None:
    """Refuse to start on fewer GPUs than the settings ask for: the work would crawl while you pay for the GPUs.

    Raises:
        RunError: this process sees fewer GPUs.
    """
    if not wanted:
        return
    import torch

    if (found := torch.cuda.device_count()) < wanted:
        raise RunError(
            f"gpus: {wanted}, but this task sees {found}; check its pod's limit nvidia.com/gpu, the driver on its node "
            "and CUDA_VISIBLE_DEVICES (gpus=0 runs it on whatever it sees)"
        )


def count_gpus(config: StageConfig) -> int:
    """Count the GPUs that a stage holds while it runs: its own, or those of its nodes."""
    if isinstance(config, TrainingConfig) and config.num_nodes > 1:
        return config.num_nodes * config.gpus_per_node
    return config.gpus


def count_workers(config: TrainingConfig) -> int:
    """Count the workers: one per GPU; without a GPU, as many as one copy of the model needs."""
    if config.num_nodes > 1:
        return config.num_nodes * config.gpus_per_node
    import torch  # plan's image has none

    asked = config.gpus if config.engine == "hf" else 0  # a machine may show more than the task may use
    return asked or torch.cuda.device_count() or config.model_parallel_size


def check_shared(config: TrainingConfig, paths: list[Path]) -> None:
    """Refuse inputs that the other nodes cannot see.

    Raises:
        ConfigError: a path lies outside the workspace.
    """
    volume = (cache_directory() if is_bucket(config.workspace) else Path(config.workspace or "")).resolve()
    for path in paths:
        if not path.resolve().is_relative_to(volume):
            raise ConfigError(
                f"{path}: outside the workspace {volume}, which is all that the nodes share; move it there"
            )
