"""What was measured of the models, written as rows of a table: for the report, and for the model card.

Light: register's image, which writes the card, has neither torch nor matplotlib.
"""

import math
from typing import Any

from minitron.config.metrics import CHAMPION, MEASURES, MODELS, TASK_METRICS
from minitron.registry.gates import DEVIATIONS
from minitron.report.formatting import DASH, FORMS, MINUS, number, share, signed


def models_of(evaluation: dict[str, Any]) -> dict[str, str]:
    """Return the models that were measured, by key: the champion too, if there is one."""
    champion = evaluation.get(CHAMPION)
    measured = {model: label for model, label in MODELS.items() if model in evaluation}
    return measured | ({CHAMPION: f"Champion, {champion['address'].removeprefix('models:/')}"} if champion else {})


def tasks_of(evaluation: dict[str, Any]) -> list[str]:
    """Return the downstream tasks that were run."""
    return list(evaluation.get("teacher", {}).get("tasks", {}))


def half_width(standard_error: Any) -> float | None:
    """Return half of a 95 % interval, or None: lm-eval writes 'N/A' where there is no standard error."""
    return None if (error := number(standard_error)) is None else DEVIATIONS * error


def rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the table of models; a row without any value is left out.

    Returns:
        Dicts with `label`, `note`, and `cells` in the order of `models_of`: `value`, `text`, and how it compares with
        the teacher's, `difference` and `trend` (better, worse, or empty: equal, or within the error).
    """
    models = models_of(evaluation)
    found: list[dict[str, Any]] = []
    for key, label, note, form, difference, better in MEASURES:
        values = {model: number(evaluation[model].get(key)) for model in models}
        found.append({"label": label, "note": note, "cells": _cells(values, form, difference, better)})
    for task in tasks_of(evaluation):
        for metric, note in TASK_METRICS.items():
            cells = _scores({model: evaluation[model].get("tasks", {}).get(task, {}) for model in models}, metric)
            found.append({"label": task, "note": f"{note}, 95 % interval", "cells": cells})
    return [row for row in found if any(cell["value"] is not None for cell in row["cells"])]


def _scores(scores: dict[str, dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Write a task's scores with their intervals; a difference within those of the two is not marked."""
    cells = _cells({model: number(found.get(metric)) for model, found in scores.items()}, "share", "points", 1)
    errors = {model: half_width(found.get(f"{metric}_stderr")) for model, found in scores.items()}
    teacher = number(scores.get("teacher", {}).get(metric))
    for cell, error in zip(cells, errors.values(), strict=True):
        if error is None or cell["value"] is None:
            continue
        cell["text"] = f"{100 * cell['value']:.1f} ± {share(error)}"
        if teacher is not None and abs(cell["value"] - teacher) <= math.hypot(error, errors.get("teacher") or 0):
            cell["trend"] = ""
    return cells


def _cells(values: dict[str, float | None], form: str, difference: str | None, better: int) -> list[dict[str, Any]]:
    """Write the values of the models, and their differences to the teacher's."""
    teacher = values.get("teacher")
    cells: list[dict[str, Any]] = []
    for model, value in values.items():
        cell = {"value": value, "text": FORMS[form](value), "difference": "", "trend": ""}
        if difference and value is not None and teacher and model != "teacher":
            cell["difference"] = _difference(value, teacher, difference)
            gain = (value - teacher) * better
            cell["trend"] = "better" if gain > 0 else "worse" if gain < 0 else ""
        cells.append(cell)
    return cells


def _difference(value: float, teacher: float, form: str) -> str:
    match form:
        case "relative":
            return f"{signed(100 * (value / teacher - 1), 1)} %"
        case "points":
            return f"{signed(100 * (value - teacher), 1)} points"
        case "loss":
            return signed(value - teacher, 3)
        case _:
            return signed(value - teacher, 1)


PASSED, FAILED = "\N{CHECK MARK}", "\N{MULTIPLICATION X}"

_OUTCOMES = {"passed": PASSED, "within error": "\N{ALMOST EQUAL TO}", "failed": FAILED}


def gates(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the gates as rows in words; none, if none were set.

    Returns:
        Dicts of text: `words`, `student`, `reference`, `found`, `threshold`, `margin`, `outcome`, and a `mark` for it.
    """
    return [_gate(gate) for gate in evaluation.get("gates") or []]


def _gate(gate: dict[str, Any]) -> dict[str, Any]:
    metric, by, against = gate["metric"], gate["by"], gate["against"]
    bound = gate["bound"].replace("_", " ")
    compared = f", {'difference from' if by == 'difference' else 'ratio to'} the {against}'s" if against else ""
    error = gate["error"]
    return {
        "words": f"{_label(metric)}{compared}",
        "student": _written(metric, None, gate["student"]),
        "reference": f"{against}: {_written(metric, None, gate['reference'])}" if against else DASH,
        "found": _written(metric, by, gate["found"]) + (f" ± {_written(metric, by, error)}" if error else ""),
        "threshold": f"{bound} {_written(metric, by, gate['threshold'])}",
        "margin": DASH if gate["margin"] is None else signed(_scale(metric, by) * gate["margin"], _digits(metric, by)),
        "outcome": gate["outcome"],
        "mark": _OUTCOMES.get(gate["outcome"], DASH),
    }


def _label(metric: str) -> str:
    """Return a metric's name in words: arc_easy_acc_norm is a task's."""
    known = {key: label for key, label, *_ in MEASURES}
    for name, words in sorted(TASK_METRICS.items(), reverse=True):
        if metric.endswith(f"_{name}"):
            return f"{metric.removesuffix(f'_{name}')}, {words}"
    return known.get(metric, metric)


def _form(metric: str) -> str:
    forms = {key: form for key, _, _, form, *_ in MEASURES}
    return "share" if metric.endswith(tuple(f"_{name}" for name in TASK_METRICS)) else forms.get(metric, "loss")


def _scale(metric: str, by: str | None) -> int:
    return 100 if _form(metric) == "share" and by != "ratio" else 1


def _digits(metric: str, by: str | None) -> int:
    return 3 if by == "ratio" or _form(metric) == "loss" else 1


def _written(metric: str, by: str | None, value: float | None) -> str:
    """Write a metric, or what a gate compares: a share's difference is in points, a ratio is a bare number."""
    if value is None:
        return DASH
    if by == "ratio":
        return FORMS["loss"](value)
    if by == "difference" and _form(metric) == "share":
        return f"{100 * value:.1f} points".replace("-", MINUS)
    return FORMS[_form(metric)](value)
