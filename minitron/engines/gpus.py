"""The GPUs of this task."""

from minitron.config.stages import StageConfig, TrainingConfig
from minitron.errors import RunError


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
