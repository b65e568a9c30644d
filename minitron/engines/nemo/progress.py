"""The progress of engine nemo's workers: read from their history, sent to the tracker."""

import json
from pathlib import Path

from tqdm import tqdm

from minitron.config.stages import TrainingConfig
from minitron.engines.nemo.files import HISTORY
from minitron.tracking.stage_run import Tracker


class Progress:
    """Follows the history that the workers write: sends rows to the tracker, and shows tokens in a progress bar."""

    def __init__(self, config: TrainingConfig, work: Path, tracker: Tracker) -> None:
        """Follow the history in `work`."""
        self._path, self._tracker = work / HISTORY, tracker
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
        """Send the new rows."""
        size = self._path.stat().st_size if self._path.is_file() else 0
        if size == self._size:
            return
        self._size = size
        rows = [json.loads(line) for line in self._path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        new, self._seen = rows[self._seen :], max(self._seen, len(rows))  # workers that resume drop the lost steps
        for row in new:
            self._tracker.log({name: value for name, value in row.items() if name != "step"}, row["step"])
            if self._bar is None:  # not earlier: the start of NeMo must not count in the training's speed
                done, total = row["step"] * self._step_tokens, self._max_steps * self._step_tokens
                self._bar = tqdm(total=total, initial=done, desc="training", unit="tok", unit_scale=True)
            if "loss" in row:
                self._bar.set_postfix({"step": f"{row['step']}/{self._max_steps}", "loss": f"{row['loss']:.3f}"}, False)
                self._bar.update(row["step"] * self._step_tokens - self._bar.n)
