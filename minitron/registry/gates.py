"""Gates: the bounds that a student must meet to be promoted. A preset declares them; they are judged only here.

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

from minitron.config.metrics import DASH, FORMS, MEASURES, MINUS, MODELS, NUMBERS, TASK_METRICS, format_signed

if TYPE_CHECKING:
    from minitron.config.settings import EvaluateSettings

DEVIATIONS = 1.96
"""Half the width of a normal distribution's 95 % interval, in standard errors."""

MET = ("passed", "within error", "no champion")
"""The outcomes that allow a promotion."""


def read_gates(config: "EvaluateSettings") -> list[dict[str, Any]]:
    """Return the gates of a configuration as dicts: metric, against, by, bound, threshold."""
    return [
        {"metric": gate.metric, "against": gate.against, "by": gate.by, "bound": gate.bound}
        | {"threshold": getattr(gate, gate.bound)}
        for gate in config.gates
    ]


def judge_student(
    gates: list[dict[str, Any]], evaluation: dict[str, Any], champion: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Judge a student by its gates.

    A gate on a task's accuracy fails only if the whole 95 % interval of the measured value misses the threshold.

    Args:
        gates: from `read_gates`, or judged gates of an earlier call.
        evaluation: evaluation.json: its `student` is judged, its `teacher` is a reference.
        champion: the numbers of the champion on the same test set; None if there is no champion.

    Returns:
        The gates with these keys added: `student` and `reference`, the two values; `found`, the number that is
        compared with the threshold; `margin`, its distance to the threshold, positive on the good side;
        `error`, half the width of its 95 % interval or None;
        `outcome`: passed, within error, failed, no champion, or not measured.
    """
    models = {"teacher": evaluation["teacher"], "champion": champion}
    return [_judge_gate(gate, evaluation["student"], models) for gate in gates]


def are_gates_met(rows: list[dict[str, Any]]) -> bool | None:
    """Say whether all gates are met; None if there are no gates."""
    return all(row["outcome"] in MET for row in rows) if rows else None


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
    """Return the number to compare with the threshold, and half the width of its 95 % interval."""
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
    """Return a metric of a model and its standard error; None for a missing one."""
    if metric in NUMBERS:
        return model.get(metric), None
    for task, numbers in model.get("tasks", {}).items():
        name = metric.removeprefix(f"{task}_")
        if name != metric and name in numbers:
            error = numbers.get(f"{name}_stderr")
            return numbers[name], error if isinstance(error, int | float) else None  # lm-eval may say "N/A"
    return None, None


PASSED, FAILED = "\N{CHECK MARK}", "\N{MULTIPLICATION X}"

_MARKS = {"passed": PASSED, "within error": "\N{ALMOST EQUAL TO}", "failed": FAILED}


def render_gate(gate: dict[str, Any]) -> dict[str, str]:
    """Return a judged gate as people read it, with labels and units.

    Args:
        gate: a judged gate, as `judge_student` returns it and evaluation.json holds it.

    Returns:
        `label`, `student`, `reference`, `found`, `threshold`, `margin`, `outcome`, and the `mark` of the outcome.
    """
    metric, by, bound = gate["metric"], gate["by"], gate["bound"].replace("_", " ")
    against = MODELS.get(gate["against"], gate["against"] or "").lower()
    compared = f", {'difference from' if by == 'difference' else 'ratio to'} the {against}'s" if against else ""
    error = f" ± {_format_value(metric, by, gate['error'])}" if gate["error"] else ""
    return {
        "label": f"{_get_label(metric)}{compared}",
        "student": _format_value(metric, None, gate["student"]),
        "reference": f"{against}: {_format_value(metric, None, gate['reference'])}" if against else DASH,
        "found": _format_value(metric, by, gate["found"]) + error,
        "threshold": f"{bound} {_format_value(metric, by, gate['threshold'])}",
        "margin": _format_margin(metric, by, gate["margin"]),
        "outcome": gate["outcome"],
        "mark": _MARKS.get(gate["outcome"], DASH),
    }


def describe_gate(gate: dict[str, Any]) -> str:
    """Return a judged gate in one line, for a log or a message."""
    text = render_gate(gate)
    if gate["found"] is None:
        return f"{text['label']}: {text['outcome']} ({text['threshold']})"
    values = f" (student: {text['student']}, {text['reference']})" if gate["against"] else ""
    return f"{text['label']}: {text['found']}{values}, {text['threshold']}: {text['outcome']}"


def _get_label(metric: str) -> str:
    """Return a metric's label; that of a task, such as arc_easy_acc_norm, names the task first."""
    labels = {key: label for key, label, *_ in MEASURES}
    for name, label in sorted(TASK_METRICS.items(), reverse=True):
        if metric.endswith(f"_{name}"):
            return f"{metric.removesuffix(f'_{name}')}, {label}"
    return labels.get(metric, metric)


def _get_form(metric: str) -> str:
    forms = {key: form for key, _, _, form, *_ in MEASURES}
    return "share" if metric.endswith(tuple(f"_{name}" for name in TASK_METRICS)) else forms.get(metric, "loss")


def _format_margin(metric: str, by: str | None, margin: float | None) -> str:
    """Write a margin with its sign; a share's is in percent or points."""
    if margin is None:
        return DASH
    form = _get_form(metric)
    scale = 100 if form == "share" and by != "ratio" else 1
    return format_signed(scale * margin, 3 if by == "ratio" or form == "loss" else 1)


def _format_value(metric: str, by: str | None, value: float | None) -> str:
    """Write a metric, or what a gate compares: a share's difference is in points, a ratio is a bare number."""
    if value is None:
        return DASH
    if by == "ratio":
        return FORMS["loss"](value)
    if by == "difference" and _get_form(metric) == "share":
        return f"{100 * value:.1f} points".replace("-", MINUS)
    return FORMS[_get_form(metric)](value)
