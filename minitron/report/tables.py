"""The measurements of the models as rows of a table, for the report, the model card and the command line.

This module imports neither torch nor matplotlib: the tools image, where register writes the card, has neither.
"""

import math
from typing import Any

from minitron.config.metrics import (
    CHAMPION,
    FORMS,
    MEASURES,
    MODELS,
    TASK_METRICS,
    format_share,
    format_signed,
    parse_number,
)
from minitron.registry.gates import DEVIATIONS


def label_models(evaluation: dict[str, Any]) -> dict[str, str]:
    """Return the label of each measured model by its key; the champion is one of them if there is one."""
    champion = evaluation.get(CHAMPION)
    measured = {model: label for model, label in MODELS.items() if model in evaluation}
    return measured | ({CHAMPION: f"Champion, {champion['address'].removeprefix('models:/')}"} if champion else {})


def list_tasks(evaluation: dict[str, Any]) -> list[str]:
    """Return the names of the downstream tasks that were run."""
    return list(evaluation.get("teacher", {}).get("tasks", {}))


def compute_half_width(standard_error: Any) -> float | None:
    """Return half of a 95 % interval, or None; lm-eval writes 'N/A' for a missing standard error."""
    return None if (error := parse_number(standard_error)) is None else DEVIATIONS * error


def build_model_rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the table of models, without those that have no value.

    Returns:
        Dicts with `label`, `note`, and `cells` in the order of `models_of`: `value`, `text`, `difference` from
        the corrected teacher's value, and `trend` (better, worse, or empty: equal, or within the error).
    """
    models = label_models(evaluation)
    rows: list[dict[str, Any]] = []
    for key, label, note, form, difference, better in MEASURES:
        values = {model: parse_number(evaluation[model].get(key)) for model in models}
        rows.append({"label": label, "note": note, "cells": _build_cells(values, form, difference, better)})
    for task in list_tasks(evaluation):
        for metric, note in TASK_METRICS.items():
            cells = _build_score_cells(
                {model: evaluation[model].get("tasks", {}).get(task, {}) for model in models}, metric
            )
            rows.append({"label": task, "note": f"{note}, 95 % interval", "cells": cells})
    return [row for row in rows if any(cell["value"] is not None for cell in row["cells"])]


def _build_score_cells(scores: dict[str, dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Write a task's scores with their intervals; a difference within the joint interval of the two has no trend."""
    cells = _build_cells(
        {model: parse_number(metrics.get(metric)) for model, metrics in scores.items()}, "share", "points", 1
    )
    errors = {model: compute_half_width(metrics.get(f"{metric}_stderr")) for model, metrics in scores.items()}
    teacher = parse_number(scores.get("teacher", {}).get(metric))
    for cell, error in zip(cells, errors.values(), strict=True):
        if error is None or cell["value"] is None:
            continue
        cell["text"] = f"{100 * cell['value']:.1f} ± {format_share(error)}"
        if teacher is not None and abs(cell["value"] - teacher) <= math.hypot(error, errors.get("teacher") or 0):
            cell["trend"] = ""
    return cells


def _build_cells(
    values: dict[str, float | None], form: str, difference: str | None, better: int
) -> list[dict[str, Any]]:
    """Write the values of the models, and their differences from the corrected teacher's."""
    teacher = values.get("teacher")
    cells: list[dict[str, Any]] = []
    for model, value in values.items():
        cell = {"value": value, "text": FORMS[form](value), "difference": "", "trend": ""}
        if difference and value is not None and teacher and model != "teacher":
            cell["difference"] = _format_difference(value, teacher, difference)
            gain = (value - teacher) * better
            cell["trend"] = "better" if gain > 0 else "worse" if gain < 0 else ""
        cells.append(cell)
    return cells


def _format_difference(value: float, teacher: float, form: str) -> str:
    match form:
        case "relative":
            return f"{format_signed(100 * (value / teacher - 1), 1)} %"
        case "points":
            return f"{format_signed(100 * (value - teacher), 1)} points"
        case "loss":
            return format_signed(value - teacher, 3)
        case _:
            return format_signed(value - teacher, 1)
