"""The measurements of the models as rows of a table, for the report, the model card and the command line.

This module imports neither torch nor matplotlib: the tools image, where register writes the card, has neither.
"""

from typing import Any

from minitron.config.metrics import (
    CHAMPION,
    FORMS,
    MEASURES,
    MODELS,
    TASK_METRICS,
    Interval,
    contains,
    format_signed,
    parse_number,
)
from minitron.registry.gates import format_range


def label_models(evaluation: dict[str, Any]) -> dict[str, str]:
    """Return the label of each measured model by its key, including the champion if there is one."""
    champion = evaluation.get(CHAMPION)
    measured = {model: label for model, label in MODELS.items() if model in evaluation}
    return measured | ({CHAMPION: f"Champion, {champion['address'].removeprefix('models:/')}"} if champion else {})


def list_tasks(evaluation: dict[str, Any]) -> list[str]:
    """Return the names of the downstream tasks that were run."""
    return list(evaluation.get("teacher", {}).get("tasks", {}))


def read_interval(model: dict[str, Any], metric: str, of: str = "intervals") -> Interval | None:
    """Return the 95 % interval of a metric, or of its difference from the corrected teacher; None if there is none."""
    return (model.get(of) or {}).get(metric)


def build_model_rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the table of models, without empty rows.

    Returns:
        Dicts with `label`, `note`, and `cells` in the order of `label_models`: `value`, `text`, `interval`,
        `difference` from the corrected teacher's value, and `trend` (better, worse, or empty: equal, or within the
        error).
    """
    models = {model: evaluation[model] for model in label_models(evaluation)}
    rows: list[dict[str, Any]] = []
    for key, label, note, form, difference, better in MEASURES:
        values = {model: parse_number(numbers.get(key)) for model, numbers in models.items()}
        cells = _build_cells(models, values, key, form, difference, better)
        rows.append({"label": label, "note": note, "cells": cells})
    for task in list_tasks(evaluation):
        for metric, note in TASK_METRICS.items():
            values = {model: parse_number(_read_scores(numbers, task).get(metric)) for model, numbers in models.items()}
            cells = _build_cells(models, values, f"{task}_{metric}", "share", "points", 1)
            rows.append({"label": task, "note": note, "cells": cells})
    return [row for row in rows if any(cell["value"] is not None for cell in row["cells"])]


def _read_scores(model: dict[str, Any], task: str) -> dict[str, Any]:
    return model.get("tasks", {}).get(task, {})


def _build_cells(
    models: dict[str, dict[str, Any]],
    values: dict[str, float | None],
    metric: str,
    form: str,
    difference: str | None,
    better: int,
) -> list[dict[str, Any]]:
    """Write the values of the models, their intervals, and their differences from the corrected teacher's."""
    teacher = values.get("teacher")
    cells: list[dict[str, Any]] = []
    for model, value in values.items():
        interval = read_interval(models[model], metric)
        ends = format_range(*map(FORMS[form], interval)) if interval else ""
        cell = {"value": value, "text": FORMS[form](value), "interval": ends, "difference": "", "trend": ""}
        if difference and value is not None and teacher and model != "teacher":
            cell["difference"] = _format_difference(value, teacher, difference)
            gain = (value - teacher) * better
            if not contains(read_interval(models[model], metric, "differences"), 0):
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
