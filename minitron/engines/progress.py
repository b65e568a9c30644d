"""The progress of a training: the files that its workers leave in the work in progress, and what follows them.

A later attempt trusts only directories with a marker (engines/checkpoints.py): checkpoints, best states and FINISHED.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from minitron.config.resources.gpus import find_peak_speed
from minitron.config.resources.sizes import read_model_sizes
from minitron.config.resources.work import count_learning_operations
from minitron.config.stages import TrainingConfig
from minitron.engines.checkpoints import BEST, Checkpoint, find_best, find_resume_point, mark_complete, read_checkpoint
from minitron.engines.divergence import Diverged, name_last_good
from minitron.errors import RunError
from minitron.models.checkpoint import copy_model
from minitron.models.checks import read_config
from minitron.storage.staging import checkpoints_path, last_good_path, replace_directory
from minitron.tracking.stage_run import Tracker

HISTORY, FINISHED = "history.jsonl", "finished"
"""Among the checkpoints: the history (a row per step and validation), and the end of the training."""


class Start(NamedTuple):
    """The start of a training: after `step`, with the best state and the seconds of training so far.

    If the validation after the step was broken off, `is_validated` is False, and the validation comes first.
    """

    step: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    seconds: float = 0.0
    is_validated: bool = True


class Cost(NamedTuple):
    """What a training's matrix products take: operations per token, and the peak of all its GPUs, if it is known."""

    operations: float
    peak: float | None

    def describe_speed(self, tokens_per_second: float) -> dict[str, float]:
        """Return the metrics of a speed: tokens and TFLOP per second, and the share of the GPUs' peak (MFU)."""
        speed = tokens_per_second * self.operations
        found = {"tokens_per_second": round(tokens_per_second, 1), "tflops_per_second": round(speed / 1e12, 4)}
        return found | ({"mfu": round(speed / self.peak, 4)} if self.peak else {})


def measure_cost(config: TrainingConfig, learner: Path, teacher: Path | None, workers: int) -> Cost:
    """Count what a training of the model in `learner` computes; the peak is that of as many GPUs as this machine has.

    Args:
        config: of the stage.
        learner: the model that learns.
        teacher: the model that reads every token, too; None: there is none, or its distributions are kept.
        workers: the GPUs of the training.
    """
    import torch

    models = [read_model_sizes(read_config(path).to_dict()) for path in (learner, teacher) if path]
    peak = find_peak_speed(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    operations = count_learning_operations(models[0], config.sequence_length, *models[1:])
    return Cost(operations, peak and workers * peak)


def find_start(work: Path) -> Start:
    """Find the last intact checkpoint; restore the history as it was then, and delete everything later."""
    shutil.rmtree(work / FINISHED, ignore_errors=True)
    point, history = find_resume_point(work), work / HISTORY
    if point and not (point.checkpoint.path / HISTORY).is_file():
        print(f"warning: {point.checkpoint.path}: of an earlier version; the training begins anew", flush=True)
        shutil.rmtree(point.checkpoint.path)
        return find_start(work)
    rows = (point.checkpoint.path / HISTORY).read_text() if point else ""
    temporary = work / f"{HISTORY}.tmp"
    temporary.write_text(rows)
    temporary.replace(history)  # the stage's process follows it, and must never see a partial file
    if point is None:
        return Start()
    checkpoint, best = point
    is_validated = checkpoint.note.get("is_validated", True)
    return Start(checkpoint.step, best.step, best.note["loss"], checkpoint.note["seconds"], is_validated)


def append_row(work: Path, row: dict[str, Any]) -> None:
    """Append a row to the history."""
    with (work / HISTORY).open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def read_history(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of a history; one that is being written does not count."""
    lines = (directory / HISTORY).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_end(work: Path, note: dict[str, Any]) -> None:
    """Mark the end of a training, with its history; `note` has `best`, the step of the best state, and `seconds`."""
    (work / FINISHED).mkdir()
    shutil.copyfile(work / HISTORY, work / FINISHED / HISTORY)
    mark_complete(work / FINISHED, note)


def find_end(work: Path) -> tuple[Checkpoint, Checkpoint] | None:
    """Return the end of the training and its best state; None before the end."""
    end = read_checkpoint(work / FINISHED)
    best = read_checkpoint(work / f"{BEST}-{end.note['best']}") if end else None
    return (end, best) if end and best else None


def read_result(config: TrainingConfig, end: Checkpoint, best: Checkpoint, cost: Cost) -> dict[str, Any]:
    """Return metrics and history for the stage's record, from the files that the workers left at the end."""
    history = read_history(end.path)
    tokens = config.max_steps * config.global_batch_size * config.sequence_length
    metrics = {
        "tokens": tokens,
        **cost.describe_speed(tokens / end.note["seconds"]),
        "validation_loss_before": history[0]["validation_loss"],
        "validation_loss": best.note["loss"],
        "best_step": best.step,
    }
    return {"metrics": metrics, "history": history}


def follow_training(
    config: TrainingConfig,
    initial: Path,
    directory: Path,
    tracker: Tracker,
    cost: Cost,
    run: Callable[["Progress"], None],
    write: Callable[[Path, Path], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a training unless an earlier attempt ended it, and write its best state to `directory`.

    Args:
        config: of the stage.
        initial: the model that is trained.
        directory: where the result grows.
        tracker: gets every row.
        cost: what the training computes.
        run: trains until there is an end in the work in progress.
        write: writes a best state (its first argument) as a model.

    Returns:
        Metrics and history for the stage's record, and the note of the end.

    Raises:
        Diverged: the training diverged; its best state is kept beside the result.
        RunError: the best state is damaged.
    """
    work = checkpoints_path(directory)
    if not find_end(work):  # else an earlier attempt was killed while it wrote the model
        try:
            with Progress(config, work, tracker, cost) as progress:
                run(progress)
        except Diverged as error:
            raise _keep_last_good(error, config, initial, directory, write) from error
    if not (found := find_end(work)):
        raise RunError(f"{work}: training has ended, but its best state is damaged; check the disk, then run it again")
    end, best = found
    if best.step:
        write(best.path, directory)
    else:
        copy_model(initial, directory)
    return read_result(config, end, best, cost), end.note


def _keep_last_good(
    error: Diverged, config: TrainingConfig, initial: Path, directory: Path, write: Callable[[Path, Path], None]
) -> Diverged:
    """Keep the best state of a training that diverged as a model; return an error that names it."""
    best = find_best(checkpoints_path(directory))
    if best is None or not best.step:
        return name_last_good(error, config, initial, 0, best.note["loss"] if best else math.nan)
    path = last_good_path(directory)
    with replace_directory(path) as target:
        write(best.path, target)
    return name_last_good(error, config, path, best.step, best.note["loss"])


class Progress:
    """Follows the history that the workers write: sends rows to the tracker, and shows tokens in a progress bar.

    The bar's unit gives tokens/s, and the time that is left.
    """

    def __init__(self, config: TrainingConfig, work: Path, tracker: Tracker, cost: Cost) -> None:
        """Follow the history in `work`."""
        self._work, self._tracker, self._cost = work, tracker, cost
        self._last_step, self._last_time = 0, 0.0
        self._step_tokens, self._max_steps = config.global_batch_size * config.sequence_length, config.max_steps
        self._seen = self._size = 0
        self._bar: tqdm | None = None

    def __enter__(self) -> "Progress":
        """Open the progress bar."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the progress bar."""
        if self._bar:
            self._bar.close()

    def __call__(self) -> None:
        """Send the new rows of the file."""
        path = self._work / HISTORY
        size = path.stat().st_size if path.is_file() else 0
        if size == self._size:
            return
        self._size = size
        rows = read_history(self._work)
        new, self._seen = rows[self._seen :], max(self._seen, len(rows))  # workers that resume drop the lost steps
        if new and self._bar is None:  # not earlier: the start of the workers must not count in the training's speed
            self._open_bar(new[-1]["step"])
        for row in new:
            self._send(row)
        if len(new) < len(rows):  # the first ones may be of an earlier attempt, or have waited for the start
            self._log_speed(new)

    def report(self, row: dict[str, Any]) -> None:
        """Send a row as soon as it is there."""
        self._send(row)
        self._log_speed([row])

    def _log_speed(self, rows: list[dict[str, Any]]) -> None:
        """Log the speed since the last rows, unless there was a validation between."""
        if not rows:
            return
        now, step = time.perf_counter(), rows[-1]["step"]
        if 0 < self._last_step < step and all("loss" in row for row in rows):
            tokens = (step - self._last_step) * self._step_tokens
            speed = self._cost.describe_speed(tokens / (now - self._last_time))
            self._tracker.log({f"step_{name}": value for name, value in speed.items()}, step)
        self._last_step, self._last_time = step, now

    def _send(self, row: dict[str, Any]) -> None:
        self._tracker.log({name: value for name, value in row.items() if name != "step"}, row["step"])
        bar = self._bar or self._open_bar(row["step"])
        if "loss" in row:
            bar.set_postfix({"step": f"{row['step']}/{self._max_steps}", "loss": f"{row['loss']:.3f}"}, False)
            bar.update(max(0, row["step"] * self._step_tokens - bar.n))

    def _open_bar(self, step: int) -> tqdm:
        done, total = step * self._step_tokens, self._max_steps * self._step_tokens
        self._bar = tqdm(total=total, initial=done, desc="training", unit="tok", unit_scale=True)
        return self._bar
