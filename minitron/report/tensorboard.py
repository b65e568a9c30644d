"""The stages' histories in TensorBoard's format.

tensorboard --logdir results/compress-…/evaluate/evaluation/tensorboard

`python -m minitron.evaluate --config FILE` writes them, and register logs them to MLflow.
"""

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from minitron.config.metrics import parse_number
from minitron.storage.layout import EVENTS


def write_events(directory: Path, records: dict[str, dict[str, Any]]) -> None:
    """Write every number of every stage's history to `tensorboard/STAGE`, at its step and at the stage's start.

    Args:
        directory: directory for the folder; a stage without a history is left out.
        records: records of the stages, by name.
    """
    for stage, record in records.items():
        if not record.get("history"):
            continue
        with SummaryWriter(directory / EVENTS / stage) as writer:
            for row in record["history"]:
                for name, value in row.items():
                    if name != "step" and parse_number(value) is not None:
                        writer.add_scalar(name, value, row["step"], record["started"])
