"""The measurements of benchmarks/ run, and what they claim holds, with room for a busy machine."""

import json
import subprocess
import sys
from typing import Any

from tests.constants import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"


def measured(name: str, *options: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(BENCHMARKS / name), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_prepare_is_measured_against_the_bare_tokenizer() -> None:
    """On the tiny corpus, once: that it runs, and that both sides come to the same tokens."""
    found = measured("prepare.py", "--sample", "tiny", "--runs", "1")
    assert found["claim"] == "prepare_over_tokenizer" and found["value"] > 0, found


def test_transfers_are_nearly_as_fast_as_the_bare_library() -> None:
    """At full size the ratio is 0.9; here, of a small model and the medians of five turns, no less than half."""
    found = measured("storage.py", "--megabytes", "24", "--runs", "5")
    assert found["claim"] == "storage_over_transfer_manager" and found["value"] > 0.5, found


def test_ten_thousand_points_are_in_mlflow_within_seconds() -> None:
    found = measured("tracking.py")
    assert found["arrived"] == found["points"] == 10_000
    assert found["value"] < max(5, found["seconds_one_by_one"] / 10), found
    assert found["seconds_the_training_waited"] < 1, found
