"""Every setting: its type, its default, its check.

Stages, tasks and clusters have a frozen model each; presets and the parameters that Kubeflow knows are read into them.
The names below are for pipelines of your own: `from minitron.config import PruneSettings`. This room imports no other
room, so that compiling a pipeline stays light.
"""

from minitron.config.settings import (
    DistillSettings,
    EvaluateSettings,
    FinetuneSettings,
    PrepareSettings,
    PruneSettings,
    RegisterSettings,
)

__all__ = [  # noqa: RUF022  (order of the flow)
    "PrepareSettings",
    "FinetuneSettings",
    "PruneSettings",
    "DistillSettings",
    "EvaluateSettings",
    "RegisterSettings",
]
