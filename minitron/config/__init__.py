"""Every setting with its type, default and check.

Each stage, each task and the cluster has a frozen model, into which presets and Kubeflow's parameters are read. The
names below are for pipelines of your own: `from minitron.config import PruneSettings`. This room imports no other room,
so that compiling a pipeline stays fast.
"""

from minitron.config.settings import (
    DistillSettings,
    EvaluateSettings,
    FinetuneSettings,
    PrepareSettings,
    RegisterSettings,
)
from minitron.config.shapes import PruneSettings

__all__ = [  # noqa: RUF022  (order of the flow)
    "PrepareSettings",
    "FinetuneSettings",
    "PruneSettings",
    "DistillSettings",
    "EvaluateSettings",
    "RegisterSettings",
]
