"""Gates: what a student must meet to be promoted. They are declared in the preset and judged here only.

    evaluate:
      gates:
        - {metric: validation_loss, at_most: 3.9}
        - {metric: validation_loss, against: champion, at_most: 0.0}
        - {metric: parameters, against: teacher, by: ratio, at_most: 0.7}
        - {metric: arc_easy_acc, against: teacher, at_least: -0.05}

Used by `python -m minitron.evaluate --config FILE` and `minitron promote NAME`.
"""

import math
from typing import TYPE_CHECKING, Any

from minitron.config.metrics import NUMBERS

if TYPE_CHECKING:
    from minitron.config.settings import EvaluateSettings

DEVIATIONS = 1.96
"""Half the width of a normal distribution's 95 % interval, in standard errors."""

MET = ("passed", "within error", "no champion")
"""The outcomes that do not keep a model from being promoted."""


def read_gates(config: "EvaluateSettings") -> list[dict[str, Any]]:
    """Return the gates of a configuration as `judge` takes them: metric, against, by, bound, threshold."""
    return [
        {"metric": gate.metric, "against": gate.against, "by": gate.by, "bound": gate.bound}
        | {"threshold": getattr(gate, gate.bound)}
        for gate in config.gates
    ]


def judge_student(
    gates: list[dict[str, Any]], evaluation: dict[str, Any], champion: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Judge a student by its gates.

    A gate on a task's accuracy is missed only if the whole 95 % interval of what was found misses it.

    Args:
        gates: what `declared` returns, or what this returned before.
        evaluation: evaluation.json: its `student` is judged, its `teacher` compared with.
        champion: the same numbers of the model in production, measured on the same test set; None: there is none.

    Returns:
        Per gate, beside itself: `student` and `reference`, the two values; `found`, what is compared with the
        threshold; `margin`, how far it is on the good side; `error`, half the width of its 95 % interval or None;
        `outcome`: passed, within error, failed, no champion, or not measured.
    """
    models = {"teacher": evaluation["teacher"], "champion": champion}
    return [_judge_gate(gate, evaluation["student"], models) for gate in gates]


def are_gates_met(rows: list[dict[str, Any]]) -> bool | None:
    """Say whether all gates are met; None if there are none."""
    return all(row["outcome"] in MET for row in rows) if rows else None


def describe_gate(row: dict[str, Any]) -> str:
    """Return a judged gate in one line."""
    metric, limit = row["metric"], f"{row['bound'].replace('_', ' ')} {row['threshold']:g}"
    if row["found"] is None:
        return f"{metric}: {row['outcome']} ({limit})"
    against = f", {row['by']} to the {row['against']}'s {row['reference']:.4g}" if row["against"] else ""
    error = f" ± {row['error']:.2g}" if row["error"] else ""
    return f"{metric} {row['student']:.4g}{against}: {row['found']:.4g}{error}, {limit}: {row['outcome']}"


def _judge_gate(
    gate: dict[str, Any], student: dict[str, Any], models: dict[str, dict[str, Any] | None]
) -> dict[str, Any]:
    metric, against = gate["metric"], gate["against"]
    row = {name: gate[name] for name in ("metric", "against", "by", "bound", "threshold")} | {
        "student": _read_value(student, metric)[0], "reference": None, "found": None, "margin": None, "error": None,
    }  # fmt: skip
    if against and models[against] is None:
        return row | {"outcome": "no champion"}
    reference = _read_value(models[against] or {}, metric) if against else (None, None)
    found, error = _compare_values(gate["by"], _read_value(student, metric), reference)
    if found is None:
        return row | {"reference": reference[0], "outcome": "not measured"}
    margin = gate["threshold"] - found if gate["bound"] == "at_most" else found - gate["threshold"]
    outcome = "passed" if margin >= 0 else "within error" if margin + (error or 0) >= 0 else "failed"
    return row | {
        "reference": reference[0], "found": found, "margin": margin, "error": error, "outcome": outcome,
    }  # fmt: skip


def _compare_values(
    by: str | None, student: tuple[float | None, float | None], reference: tuple[float | None, float | None]
) -> tuple[float | None, float | None]:
    """Return what is compared with the threshold, and half the width of its 95 % interval."""
    (value, error), (other, other_error) = student, reference
    if value is None or (by and other is None) or (by == "ratio" and not other):
        return None, None
    deviation = None if error is None else math.hypot(error, other_error or 0)
    if by == "difference":
        value -= other or 0
    elif by == "ratio":
        assert other is not None
        ratio = value / other
        deviation = None if error is None else math.hypot(error, ratio * (other_error or 0)) / abs(other)
        value = ratio
    return value, None if deviation is None else DEVIATIONS * deviation


def _read_value(model: dict[str, Any], metric: str) -> tuple[float | None, float | None]:
    """Return what was measured of a model, with its standard error where it has one."""
    if metric in NUMBERS:
        return model.get(metric), None
    for task, numbers in model.get("tasks", {}).items():
        name = metric.removeprefix(f"{task}_")
        if name != metric and name in numbers:
            error = numbers.get(f"{name}_stderr")
            return numbers[name], error if isinstance(error, int | float) else None  # lm-eval may say "N/A"
    return None, None
