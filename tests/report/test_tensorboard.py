"""TensorBoard reads back every number that the stages' histories hold."""

from pathlib import Path
from typing import Any

import pytest

from minitron.report.tensorboard import write_events
from tests.report.event_files import read_events

RECORDS: dict[str, dict[str, Any]] = {
    "prepare": {"started": 5.0},
    "finetune": {"started": 6.0, "history": []},
    "distill": {
        "started": 7.0,
        "history": [
            {"step": 0, "validation_loss": 6.5, "validation_kl": 3.0},
            {"step": 1, "cross_entropy": 6.25, "learning_rate": 1e-3, "note": "text"},
            {"step": 2, "cross_entropy": float("nan"), "validation_loss": 5.5},
        ],
    },
}


def test_every_number_is_at_its_step(tmp_path: Path) -> None:
    write_events(tmp_path, RECORDS)
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == ["distill"]
    assert read_events(tmp_path / "tensorboard" / "distill") == {
        "validation_loss": [(0, 6.5), (2, 5.5)],
        "validation_kl": [(0, 3.0)],
        "cross_entropy": [(1, 6.25)],
        "learning_rate": [(1, pytest.approx(1e-3))],
    }


def test_nothing_is_written_without_a_history(tmp_path: Path) -> None:
    write_events(tmp_path, {"prepare": RECORDS["prepare"]})
    assert not list(tmp_path.iterdir())
