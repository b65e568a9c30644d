"""How long a run takes on this machine: the work that its settings name, at the first speed that a stage shows."""

import json
import re
import time
from pathlib import Path
from typing import Any

from minitron.config.document import Plan
from minitron.config.resources.work import count_work
from minitron.config.stages import STAGES
from minitron.runtime.preflight import count_plan_models
from minitron.storage.layout import MANIFEST

_STAGE = re.compile(rf"({'|'.join(STAGES)}): ")
_BAR = re.compile(r"(teacher validation|validation|training|importance): .* ([\d.]+)([kM]?)tok/s")


class DurationEstimate:
    """Reads what the stages of a run print, and says how long the run takes as soon as one shows its speed."""

    def __init__(self, plan: Plan, architecture: dict[str, Any] | None, results: Path) -> None:
        """Start the clock.

        Args:
            plan: the settings.
            architecture: the teacher's config.json; None: it is not known yet, and models of one size are assumed.
            results: gets a directory for the run, where prepare leaves the number of tokens.
        """
        self._models = count_plan_models(plan, architecture)
        self._plan, self._results = plan, results
        self._started = self._last_line = time.monotonic()
        self._stage, self._start_up, self._is_done = "", 0.0, False

    def read_line(self, line: str) -> str | None:
        """Take the next line of the stages' output; return the estimate when this line makes it possible, once."""
        now = time.monotonic()
        if (match := _STAGE.match(line)) and match[1] != self._stage:
            self._stage, self._start_up = match[1], now - self._last_line
        self._last_line = now
        if self._is_done or not (bar := _BAR.match(line)) or not (tokens := self._read_tokens()):
            return None
        work = count_work(self._plan, self._models, tokens)
        if self._stage not in work or not float(bar[2]):
            return None
        self._is_done = True
        speed = float(bar[2]) * {"": 1, "k": 1e3, "M": 1e6}[bar[3]] * work[self._stage].per_token[bar[1]]
        stages = list(work)[list(work).index(self._stage) :]
        seconds = now - self._started + sum(work[stage].total / speed + self._start_up for stage in stages)
        return f"The run takes about {_format_minutes(seconds)} on this machine, unless stages are reused."

    def _read_tokens(self) -> dict[str, int] | None:
        """Return the tokens of each split of the dataset of the latest run."""
        manifests = self._results.glob(f"*/prepare/*/{MANIFEST}")
        latest = max(manifests, key=lambda path: path.parents[2].stat().st_mtime, default=None)
        return json.loads(latest.read_text())["tokens"] if latest else None


def _format_minutes(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} minute{'s' if minutes > 1 else ''}" if minutes < 120 else f"{seconds / 3600:.1f} hours"
