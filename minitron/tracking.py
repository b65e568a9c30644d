"""Metrics on their way to MLflow, while a stage runs (the only user of mlflow).

Without a tracking URI nothing is logged and mlflow is not imported.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minitron.config import StageConfig


class Tracker:
    """Where a stage reports: this one, used without a tracking URI, keeps nothing."""

    def log(self, metrics: dict[str, float], step: int = 0) -> None:
        """Log metrics at a step, now."""

    def finish(self, record: dict[str, Any]) -> None:
        """Log the finished stage's record: its parameters, metrics and stage.json."""


@contextmanager
def stage_run(config: StageConfig, stage: str) -> Iterator[Tracker]:
    """Open the tracker of one stage."""
    yield Tracker()
