"""How long a run takes on this machine: the tokens that its settings name, at the first speed that a stage shows.

Work is counted in tokens that the teacher reads. To learn from a token takes three times as long as to read it, and a
model of half the size reads twice as fast.
"""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minitron.config.document import Plan
from minitron.config.parse import apply_kept
from minitron.config.resources import Models, count_models
from minitron.config.settings import DistillSettings, EvaluateSettings, FinetuneSettings, TrainingSettings
from minitron.config.shapes import PruneSettings
from minitron.config.stages import STAGES
from minitron.storage.layout import MANIFEST

_LEARNING = 3
_QUESTION = 100
"""Tokens of a question and its answers."""

_GENERATING = 25
"""Tokens that a CPU reads in the time in which it writes one: all weights pass through it in both cases."""

_TIMINGS = 14
"""Texts per model whose generation is timed; a text in a batch is cheaper."""

_REFITTING = 2
"""A compensated cut reads the calibration with both models again, and solves the systems."""

_TRIED = 12
"""Layers that are measured for each one that is dropped by loss, after all of them for the first one."""

_MEASURING = 0.75
"""A layer is measured in half of the model on average, on held-out calibration; a seam takes half as long again."""

_STAGE = re.compile(rf"({'|'.join(STAGES)}): ")
_BAR = re.compile(r"(teacher validation|validation|training|importance): .* ([\d.]+)([kM]?)tok/s")


class StageWork(NamedTuple):
    """The work of a stage, and that of one token in each of its progress bars."""

    total: float
    per_token: Mapping[str, float]


class DurationEstimate:
    """Reads what the stages of a run print, and says how long the run takes as soon as one shows its speed."""

    def __init__(self, plan: Plan, architecture: Mapping[str, Any] | None, results: Path) -> None:
        """Start the clock.

        Args:
            plan: the settings.
            architecture: the teacher's config.json; None: it is not known yet, and models of one size are assumed.
            results: gets a directory for the run, where prepare leaves the number of tokens.
        """
        prune = plan.stages["prune"]
        assert isinstance(prune, PruneSettings)
        self._models = count_models(architecture, prune) if architecture else Models()
        self._layers = architecture["num_hidden_layers"] if architecture else 0
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
        work = count_work(self._plan, self._models, tokens, self._layers)
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


def count_work(plan: Plan, models: Models, tokens: Mapping[str, int], layers: int) -> dict[str, StageWork]:
    """Count the work of the stages that read tokens with a model, in their order.

    Args:
        plan: the settings.
        models: the sizes of teacher and student.
        tokens: those of each split; settings may ask for more than there are.
        layers: the teacher's; 0: not known.
    """
    length, student = plan.pipeline.sequence_length, models.student / models.teacher
    work: dict[str, StageWork] = {}
    for stage, settings in plan.stages.items():
        match settings:
            case FinetuneSettings(enabled=True):
                work[stage] = _count_training(settings, length, tokens["validation"], 1.0, 0.0)
            case PruneSettings():
                read = min(settings.calibration_sequences * length, tokens["train"])
                refit = _REFITTING if settings.method == "compensated" else 0
                total = read * (1 + refit) + _count_layer_search(settings, read, layers)
                work[stage] = StageWork(total, {"importance": 1.0})
            case DistillSettings():
                work[stage] = _count_training(settings, length, tokens["validation"], student, 1.0)
            case EvaluateSettings():
                all_models = 2 + 2 * student
                read = sum(min(settings.evaluation_sequences * length, tokens[name]) for name in ("validation", "test"))
                read += len(settings.tasks) * (settings.task_limit or 0) * _QUESTION
                read += settings.generation_tokens * (len(settings.prompts) + _TIMINGS) * _GENERATING
                work[stage] = StageWork(read * all_models, {"validation": all_models})
    return work


def _count_layer_search(settings: PruneSettings, calibration_tokens: int, layers: int) -> float:
    """Count the work of dropping layers by loss; without the teacher's number of layers it is not known."""
    left = apply_kept(settings).num_hidden_layers
    if settings.layers_by != "loss" or not left or not layers:
        return 0.0
    return (layers + _TRIED * (layers - left)) * min(calibration_tokens / 8, 4096) * _MEASURING


def _count_training(
    settings: TrainingSettings, length: int, validation_tokens: int, learner: float, teacher: float
) -> StageWork:
    """Count the work of a training, by the sizes of the model that learns and of the one that only reads."""
    step = _LEARNING * learner + teacher
    validated = min(settings.validation_sequences * length, validation_tokens)
    validations = 1 + -(-settings.max_steps // settings.validation_interval)
    total = settings.max_steps * settings.global_batch_size * length * step
    total += validated * (learner * validations + teacher)
    return StageWork(total, {"teacher validation": 1.0, "validation": learner, "training": step})
