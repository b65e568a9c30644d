"""The files that engine nemo's workers leave in the work in progress, for other processes and a later attempt.

A later attempt trusts only directories with a marker (engines/checkpoints.py): models, checkpoints, best states, and
the notes TEACHER and FINISHED.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

from minitron.engines.checkpoints import BEST, Checkpoint, find_resume_point, read_checkpoint

HISTORY, FINISHED, SCORES, TEACHER = "history.jsonl", "finished", "scores.pt", "teacher-scores"
"""Among the checkpoints: the history (a row per step and validation), the end, the importance, the teacher's scores."""


class Start(NamedTuple):
    """The start of a training: after `step`, with the best state and the seconds of training so far."""

    step: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    seconds: float = 0.0


def find_start(work: Path) -> Start:
    """Find the last intact checkpoint; restore the history as it was then, and delete everything later."""
    shutil.rmtree(work / FINISHED, ignore_errors=True)
    point, history = find_resume_point(work), work / HISTORY
    rows = (point.checkpoint.path / HISTORY).read_text() if point else ""
    temporary = work / f"{HISTORY}.tmp"
    temporary.write_text(rows)
    temporary.replace(history)  # the stage's process follows it, and must never see a partial file
    if point is None:
        return Start()
    return Start(point.checkpoint.step, point.best.step, point.best.note["loss"], point.checkpoint.note["seconds"])


def find_end(work: Path) -> tuple[Checkpoint, Checkpoint] | None:
    """Return the end of the training and its best state; None before the end."""
    end = read_checkpoint(work / FINISHED)
    best = read_checkpoint(work / f"{BEST}-{end.note['best']}") if end else None
    return (end, best) if end and best else None
