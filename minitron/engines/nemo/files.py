"""The files that engine nemo's workers leave in the work in progress for its other processes and for a later attempt.

A later attempt trusts what has a marker (engines/checkpoints.py), and nothing else: models, checkpoints, best states,
and the directories of notes TEACHER and FINISHED.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

from minitron.engines.checkpoints import BEST, Checkpoint, find_resume_point, read_checkpoint

HISTORY, FINISHED, SCORES, TEACHER = "history.jsonl", "finished", "scores.pt", "teacher-scores"
"""Among the checkpoints: a row per step and validation, the end, the importance, the teacher's scores."""


class Start(NamedTuple):
    """Where a training begins: after `step`, with the best state so far and the seconds that it took so far."""

    step: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    seconds: float = 0.0


def find_start(work: Path) -> Start:
    """Find the last whole checkpoint; put the history back as it was then, and delete what came later."""
    shutil.rmtree(work / FINISHED, ignore_errors=True)
    point, history = find_resume_point(work), work / HISTORY
    rows = (point.checkpoint.path / HISTORY).read_text() if point else ""
    temporary = work / f"{HISTORY}.tmp"
    temporary.write_text(rows)
    temporary.replace(history)  # the stage's process, which follows it, finds a whole file at any time
    if point is None:
        return Start()
    return Start(point.checkpoint.step, point.best.step, point.best.note["loss"], point.checkpoint.note["seconds"])


def find_end(work: Path) -> tuple[Checkpoint, Checkpoint] | None:
    """Return what the workers left at the end of the training, and its best state; None before the end."""
    end = read_checkpoint(work / FINISHED)
    best = read_checkpoint(work / f"{BEST}-{end.note['best']}") if end else None
    return (end, best) if end and best else None
