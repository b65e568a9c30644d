"""The files that engine nemo's workers write to the work in progress, and the leftovers of a killed one."""

import json
import shutil
from pathlib import Path

HISTORY, BEST, FINISHED, SCORES, TEACHER = "history.jsonl", "best", "finished.json", "scores.pt", "teacher.json"
"""Among the checkpoints: a row per step and validation, best state, end, importance, the teacher's scores."""


def find_last_checkpoint(work: Path) -> Path | None:
    """Return the newest complete checkpoint to resume from; half-written ones have another name."""
    return max(work.glob("step-*[0-9]"), key=parse_step, default=None)


def parse_step(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.partition("-")[2])


def forget_lost_steps(work: Path) -> None:
    """Drop half-written checkpoints, and the history after the last whole one: those steps are done again."""
    for path in work.glob("*.saving"):
        shutil.rmtree(path)
    last, history = find_last_checkpoint(work), work / HISTORY
    if last and history.is_file():
        rows = [row for row in history.read_text().splitlines(keepends=True) if row.endswith("\n")]
        history.write_text("".join(row for row in rows if json.loads(row)["step"] <= parse_step(last)))
    else:
        history.unlink(missing_ok=True)
