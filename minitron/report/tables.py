"""The measurements of the models as rows of a table, for the report, the model card and the command line.

This module imports neither torch nor matplotlib: the tools image, where register writes the card, has neither.
"""

from collections.abc import Iterable
from typing import Any

from minitron.config.metrics import (
    CHAMPION,
    FORMS,
    MEASURES,
    MODELS,
    SPEED,
    TASK_METRICS,
    Interval,
    contains,
    format_loss,
    format_signed,
    parse_number,
    parse_percent,
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


def build_model_rows(evaluation: dict[str, Any], names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Return the rows of the table of models, without empty rows.

    Args:
        evaluation: the content of evaluation.json.
        names: the models; None: all of `label_models`.

    Returns:
        Dicts with `key`, `label`, `note`, and `cells` in the order of the models: `value`, `text`, `interval`,
        `difference` from the corrected teacher's value, and `trend` (better, worse, or empty: equal, or within the
        error).
    """
    models = {model: evaluation[model] for model in names or label_models(evaluation)}
    rows: list[dict[str, Any]] = []
    for key, label, note, form, difference, better in MEASURES:
        values = {model: parse_number(numbers.get(key)) for model, numbers in models.items()}
        cells = _build_cells(models, values, key, form, difference, better)
        rows.append({"key": key, "label": label, "note": note, "cells": cells})
    for task in list_tasks(evaluation):
        for metric, note in TASK_METRICS.items():
            values = {model: parse_number(_read_scores(numbers, task).get(metric)) for model, numbers in models.items()}
            cells = _build_cells(models, values, f"{task}_{metric}", "share", "points", 1)
            rows.append({"key": metric, "label": task, "note": note, "cells": cells})
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


def summarize_result(evaluation: dict[str, Any]) -> str:
    """Say what the compression gained and what it lost, for readers who read only this sentence."""
    teacher, student = evaluation["teacher"], evaluation["student"]
    parts = [f"{teacher['parameters'] / student['parameters']:.1f}× smaller"]
    if speed := divide_numbers(student, teacher, SPEED):
        parts.append(f"{speed:.1f}× {'faster' if speed > 1 else 'as fast'}")
    return f"{', '.join(parts)}; {_describe_loss(evaluation)}"


def _describe_loss(evaluation: dict[str, Any]) -> str:
    """Say what the student lost against the corrected teacher: accuracy if the change is significant, else loss."""
    teacher, student = evaluation["teacher"], evaluation["student"]
    changes = {}
    for task in list_tasks(evaluation):
        before, after = (parse_percent(model["tasks"].get(task, {}).get("acc")) for model in (teacher, student))
        if before is not None and after is not None:
            changes[task] = after - before
    if all(contains(read_interval(student, f"{task}_acc", "differences"), 0) for task in changes):
        change = student["validation_loss"] - teacher["validation_loss"]
        text = f"validation loss {format_loss(abs(change))} nats {'higher' if change > 0 else 'lower'}"
        return f"{text}, accuracy the same within the error" if changes else text
    named = next(iter(changes)) if len(changes) == 1 else f"accuracy, the mean of {len(changes)} tasks"
    change = sum(changes.values()) / len(changes)
    return f"{'loses' if change < 0 else 'gains'} {abs(change):.1f} points of {named}"


def divide_numbers(over: dict[str, Any], under: dict[str, Any], key: str) -> float | None:
    """Return the ratio of two models' numbers; None if one of them is missing or 0."""
    return over[key] / under[key] if parse_number(over.get(key)) and parse_number(under.get(key)) else None


def list_student_metrics(evaluation: dict[str, Any]) -> dict[str, float]:
    """Return the student's numbers in the table of models, by their names in MLflow, and what it lost.

    Returns:
        `student_METRIC`, `student_TASK_METRIC`, `gap_closed`; `parameters_ratio` and `speed_ratio`, the student's over
        the corrected teacher's; `validation_loss_above_teacher` and `TASK_acc_below_teacher`, the distances from it.
    """
    student, teacher = evaluation["student"], evaluation.get("teacher", {})
    metrics = {f"student_{key}": student.get(key) for key, *_ in MEASURES}
    metrics["gap_closed"] = evaluation.get("gap_closed")
    metrics["parameters_ratio"] = divide_numbers(student, teacher, "parameters")
    metrics["speed_ratio"] = divide_numbers(student, teacher, SPEED)
    metrics["validation_loss_above_teacher"] = _subtract_numbers(student, teacher, "validation_loss")
    for task in list_tasks(evaluation):
        scores = _read_scores(student, task)
        metrics |= {f"student_{task}_{name}": scores.get(name) for name in TASK_METRICS}
        metrics[f"{task}_acc_below_teacher"] = _subtract_numbers(_read_scores(teacher, task), scores, "acc")
    return {name: number for name, value in metrics.items() if (number := parse_number(value)) is not None}


def _subtract_numbers(model: dict[str, Any], other: dict[str, Any], key: str) -> float | None:
    value, subtrahend = parse_number(model.get(key)), parse_number(other.get(key))
    return None if value is None or subtrahend is None else value - subtrahend
