"""The report of a compression: one HTML page that opens offline, for whoever decides and for whoever debugs.

`python -m minitron.evaluate --config FILE` writes it. What the other stages did is read from the records they left in
their directories; a section appears only when its data is there.
"""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from minitron import __version__, charts
from minitron.config import STAGES, EvaluateConfig
from minitron.storage import read_record

REPORT = "report.html"

MODELS = {
    "teacher_before": "Base model",
    "teacher": "Teacher",
    "pruned": "Pruned student",
    "student": "Distilled student",
}
"""The four models in the order of the flow, as evaluation.json and the page name them."""

_ROWS = (
    # key, label, note, how it is written, how its difference to the teacher is written, the better direction
    ("parameters", "Parameters", "", "count", "percent", -1),
    ("weights_mb", "Weights", "size on disk", "megabytes", "percent", -1),
    ("generation_tokens_per_second", "Generation speed", "tokens per second", "decimal", "percent", 1),
    ("validation_loss", "Validation loss", "nats per token", "loss", "loss", -1),
    ("test_loss", "Test loss", "nats per token", "loss", "loss", -1),
    ("perplexity", "Perplexity", "validation", "decimal", "decimal", -1),
    ("kl", "Divergence from the teacher", "forward KL, nats per token", "loss", "", -1),
    ("top1_agreement", "Agreement with the teacher", "same most likely next token", "share", "", 1),
)


def write_report(directory: Path, config: EvaluateConfig, evaluation: dict[str, Any]) -> None:
    """Write `report.html` into a directory.

    Args:
        directory: gets the file.
        config: names the four models and the dataset, whose records are shown.
        evaluation: the content of evaluation.json.
    """
    records = _records(config)
    pruning = _pruning(config.pruned)
    page = _environment().from_string(Path(__file__).with_name("report.html.j2").read_text())
    text = page.render(
        models=MODELS,
        evaluation=evaluation,
        verdict=_verdict(evaluation),
        rows=_rows(evaluation),
        comparison=_comparison(evaluation),
        training=_training(records),
        pruning=pruning,
        cuts=_cuts(pruning),
        importance=_importance(pruning),
        stages=_costs(records),
        records=records,
        settings=config.model_dump(mode="json", exclude={"tracking_uri"}),
        names=_names(config),
        version=__version__,
        written=datetime.now(UTC),
    )
    (directory / REPORT).write_text(text, encoding="utf-8")


def _environment() -> Environment:
    """Return a template environment that escapes everything: generated text is not to be trusted."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= FORMS | {"moment": lambda seconds: f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"}
    return environment


def _records(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Return the records of the stages that wrote the inputs, in the order of the flow."""
    directories = (config.dataset, config.teacher, config.pruned, config.student)
    found = {record["stage"]: record for directory in directories if (record := read_record(directory))}
    return {stage: found[stage] for stage in STAGES if stage in found}


def _pruning(pruned: Path) -> dict[str, Any] | None:
    path = pruned / "pruning.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _names(config: EvaluateConfig) -> dict[str, str]:
    return {model: str(getattr(config, model)) for model in MODELS}


def _verdict(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of the headline and the words for the gap."""
    teacher, pruned, student = (evaluation[model] for model in ("teacher", "pruned", "student"))
    gap = evaluation["gap_closed"]
    if gap is None:
        words = "pruning alone cost no validation loss, so there was no gap to close"
    elif gap < 0:
        words = f"distillation made it worse: the gap that pruning opened grew by {share(-gap)}"
    else:
        words = f"distillation closed {share(gap)} of the gap in validation loss that pruning had opened"
    return {
        "ratio": student["parameters"] / teacher["parameters"],
        "gap": gap,
        "words": words,
        "loss_cost": student["validation_loss"] - teacher["validation_loss"],
        "speed": _ratio(student, teacher, "generation_tokens_per_second"),
        "pruned_cost": pruned["validation_loss"] - teacher["validation_loss"],
    }


def _ratio(over: dict[str, Any], under: dict[str, Any], key: str) -> float | None:
    return over[key] / under[key] if over.get(key) and under.get(key) else None


def _rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the table of models; a row without a value in any model is left out."""
    rows = [_row(evaluation, *row) for row in _ROWS]
    rows += [_task_row(evaluation, task, metric) for task in _tasks(evaluation) for metric in ("acc", "acc_norm")]
    return [row for row in rows if any(cell["value"] is not None for cell in row["cells"])]


def _row(evaluation: dict[str, Any], key: str, label: str, note: str, form: str, delta: str, better: int) -> dict[str, Any]:
    values = [_number(evaluation[model].get(key)) for model in MODELS]
    return {"label": label, "note": note, "better": better, "cells": _cells(values, form, delta, better)}


def _task_row(evaluation: dict[str, Any], task: str, metric: str) -> dict[str, Any]:
    found = [evaluation[model].get("tasks", {}).get(task, {}) for model in MODELS]
    values = [_number(scores.get(metric)) for scores in found]
    cells = _cells(values, "share", "points", 1)
    for cell, scores in zip(cells, found, strict=True):
        cell["error"] = _number(scores.get(f"{metric}_stderr"))
    note = {"acc": "accuracy ± standard error", "acc_norm": "accuracy, length-normalised"}[metric]
    return {"label": task, "note": note, "better": 1, "cells": cells}


def _cells(values: list[float | None], form: str, delta: str, better: int) -> list[dict[str, Any]]:
    """Write values and their differences to the teacher's, which is the second."""
    teacher = values[1]
    return [_cell(value, None if place == 1 else teacher, form, delta, better) for place, value in enumerate(values)]


def _cell(value: float | None, teacher: float | None, form: str, delta: str, better: int) -> dict[str, Any]:
    cell: dict[str, Any] = {"value": value, "text": FORMS[form](value), "delta": "", "trend": "", "error": None}
    if value is None or teacher is None or not delta:
        return cell
    difference = value - teacher
    match delta:
        case "percent":
            cell["delta"] = f"{difference / teacher:+.1%}".replace("%", " %") if teacher else ""
        case "points":
            cell["delta"] = f"{100 * difference:+.1f} points"
        case "loss":
            cell["delta"] = f"{difference:+.3f}"
        case _:
            cell["delta"] = f"{difference:+.1f}"
    cell["delta"] = cell["delta"].replace("-", "\N{MINUS SIGN}")
    cell["trend"] = "" if not difference else "better" if difference * better > 0 else "worse"
    return cell


def _tasks(evaluation: dict[str, Any]) -> list[str]:
    return list(evaluation["teacher"].get("tasks", {}))


def _comparison(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the bar charts of loss and of accuracy."""
    splits = {"validation": "validation_loss", "test": "test_loss"}
    losses = {name: [_number(evaluation[model].get(key)) for key in splits.values()] for model, name in MODELS.items()}
    figures = [
        {
            "title": "Loss, lower is better",
            "chart": charts.grouped_bars(_spoken("Loss in nats per token", losses, splits), "nats per token", list(splits), losses),
            "caption": "Mean next-token cross-entropy on text that no model was trained or pruned on.",
        }
    ]
    if tasks := _tasks(evaluation):
        figures.append(_accuracy(evaluation, tasks))
    return figures


def _accuracy(evaluation: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    def read(metric: str) -> dict[str, list[float | None]]:
        return {
            name: [_percent(evaluation[model].get("tasks", {}).get(task, {}).get(metric)) for task in tasks]
            for model, name in MODELS.items()
        }

    accuracy, errors = read("acc"), read("acc_stderr")
    label = _spoken("Accuracy in percent", accuracy, tasks)
    return {
        "title": "Accuracy on downstream tasks, higher is better",
        "chart": charts.grouped_bars(label, "accuracy (%)", tasks, accuracy, errors, "{:.1f}"),
        "caption": "Error bars are one standard error either way: differences within them may be chance.",
    }


def _spoken(title: str, series: dict[str, list[float | None]], groups: Any) -> str:
    parts = [f"{name} {', '.join(FORMS['loss'](value) for value in values)}" for name, values in series.items()]
    return f"{title} ({', '.join(groups)}): {'; '.join(parts)}"


def _training(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the curves of the training stages that ran."""
    titles = {"finetune": "Correcting the teacher (finetune)", "distill": "Teaching the student (distill)"}
    return [
        {"title": title, "metrics": records[stage]["metrics"], "figures": _curves(stage, records[stage])}
        for stage, title in titles.items()
        if records.get(stage, {}).get("history")
    ]


def _curves(stage: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    history, metrics = record["history"], record["metrics"]
    validation, floor = _points(history, "validation_loss"), metrics.get("teacher_validation_loss")
    label = f"{stage}: validation loss {validation[1][0]:.3f} at step 0, {metrics['validation_loss']:.3f} when kept"
    label += f"; the teacher's is {floor:.3f}" if floor is not None else ""
    loss = charts.curves(
        label, "cross-entropy (nats per token)", _points(history, "cross_entropy"), validation, floor, metrics["best_step"]
    )
    figures = [{"title": "Next-token loss, lower is better", "chart": loss, "caption": _loss_caption(history, floor)}]
    for key, title, axis in (
        ("kl", "Divergence from the teacher, lower is better", "forward KL (nats per token)"),
        ("top1_agreement", "Agreement with the teacher, higher is better", "share of tokens"),
    ):
        if (points := _points(history, key))[0]:
            label = f"{stage}: {axis} on training batches, from {points[1][0]:.3f} to {points[1][-1]:.3f}"
            figures.append({"title": title, "chart": charts.curves(label, axis, points), "caption": _KL_CAPTIONS[key]})
    return figures


_KL_CAPTIONS = {
    "kl": "What distillation minimises: how far the student's next-token distribution is from the teacher's.",
    "top1_agreement": "How often student and teacher hold the same next token for the most likely.",
}


def _loss_caption(history: list[dict[str, Any]], floor: float | None) -> str:
    words = "Training: each batch as it comes. Validation: always the same held-out sequences, step 0 before training."
    if floor is not None:
        words += " The dashed line is the teacher's own validation loss: the floor the student is pulled towards."
    steps = len(_points(history, "cross_entropy")[0])
    if steps > charts.MOST_POINTS:
        words += f" Each point is the mean of about {round(steps / charts.MOST_POINTS)} steps."
    return words


def _points(history: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    rows = [row for row in history if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def _cuts(pruning: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return what was cut: the sizes of teacher and student."""
    if pruning is None:
        return []
    labels = {
        "num_hidden_layers": "Layers",
        "hidden_size": "Hidden channels",
        "intermediate_size": "MLP channels per layer",
        "num_attention_heads": "Query heads per layer",
        "num_key_value_heads": "Key-value groups per layer",
        "parameters": "Parameters",
    }
    pairs = [(key, label, pruning["teacher"][key], pruning["student"][key]) for key, label in labels.items()]
    return [
        {"key": key, "label": label, "before": before, "after": after, "ratio": after / before}
        for key, label, before, after in pairs
    ]


def _importance(pruning: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the charts of the scores that the cut was decided by."""
    if pruning is None or not pruning["scores"]:
        return []
    scores, kept = pruning["scores"], pruning["kept"]
    return [
        _layers(scores["layers"], kept["layers"], pruning["dropped_layers"]),
        _hidden(scores["hidden"], kept["hidden"]),
        _intermediate(scores["intermediate"], kept["layers"], kept["intermediate"]),
        _heads("Query heads", "query head", scores["heads"], kept["layers"], kept["heads"]),
        _heads("Key-value groups", "key-value group", scores["key_value"], kept["layers"], kept["key_value"]),
    ]


def _layers(scores: list[float], kept: list[int], dropped: list[int]) -> dict[str, Any]:
    words = f"dropped: {', '.join(map(str, dropped))}" if dropped else "none was dropped"
    return {
        "title": f"Layers: {len(kept)} of {len(scores)} kept",
        "chart": charts.layers(f"Block influence of {len(scores)} layers; {words}", scores, set(kept)),
        "caption": "Block influence: how much a layer changes what passes through it (1 − cosine similarity of its "
        f"input and output, summed over calibration batches). Layers {words}."
    }


def _hidden(scores: list[float], kept: list[int]) -> dict[str, Any]:
    words = f"{len(kept)} of {len(scores)} kept"
    held = _held([scores], [kept])
    return {
        "title": f"Hidden channels: {words}",
        "chart": charts.ranked(f"Importance of the hidden channels, sorted; {words}, {held}", scores, kept),
        "caption": f"One ranking for the whole model, read from the outputs of its norms; {held}.",
    }


def _intermediate(scores: list[list[float]], layers: list[int], kept: list[list[int]]) -> dict[str, Any]:
    words = f"{len(kept[0])} of {len(scores[0])} kept per layer"
    held = _held([scores[layer] for layer in layers], kept)
    label = f"Importance of the MLP channels of {len(scores)} layers, sorted; {words}, {held}"
    return {
        "title": f"MLP channels: {words}",
        "chart": charts.ranked_by_layer(label, scores, layers, len(kept[0])),
        "caption": f"One row per layer, its channels sorted; brighter is more important. In the layers kept, {held}.",
    }


def _heads(title: str, axis: str, scores: list[list[float]], layers: list[int], kept: list[list[int]]) -> dict[str, Any]:
    words = f"{len(kept[0])} of {len(scores[0])} kept per layer"
    held = _held([scores[layer] for layer in layers], kept)
    label = f"Importance of the {title.lower()} of {len(scores)} layers; {words}, {held}"
    return {
        "title": f"{title}: {words}",
        "chart": charts.cells(label, axis, scores, layers, kept),
        "caption": f"One row per layer; brighter is more important, a cross marks what was cut. In the layers kept, {held}.",
    }


def _held(scores: list[list[float]], kept: list[list[int]]) -> str:
    total = sum(map(sum, scores))
    part = sum(row[index] for row, indices in zip(scores, kept, strict=True) for index in indices)
    return f"what is kept holds {share(part / total if total else 1.0)} of the score"


def _costs(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    longest = max((record["seconds"] for record in records.values()), default=0) or 1
    return [
        {
            "stage": stage,
            "seconds": record["seconds"],
            "width": record["seconds"] / longest,
            "memory": record["peak_rss_mb"],
            "gpu": record["peak_gpu_mb"],
            "tokens": record["metrics"].get("tokens") or record["metrics"].get("calibration_tokens"),
            "speed": record["metrics"].get("tokens_per_second"),
        }
        for stage, record in records.items()
    ]


def _number(value: Any) -> float | None:
    """Return a finite number, or None: lm-eval writes 'N/A' where there is no standard error."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _percent(value: Any) -> float | None:
    return None if (number := _number(value)) is None else 100 * number


def count(value: float | None) -> str:
    """Write a count with its magnitude: 134.5 M."""
    if value is None:
        return "–"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.4g} {suffix}"
    return f"{value:,.0f}"


def share(value: float | None) -> str:
    """Write a fraction as a percentage."""
    return "–" if value is None else f"{value:.1%}".replace("%", " %").replace("-", "\N{MINUS SIGN}")


def duration(seconds: float | None) -> str:
    """Write seconds as people say them: 1 min 40 s."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def megabytes(value: float | None) -> str:
    """Write megabytes as MB or GB."""
    if value is None:
        return "–"
    return f"{value / 1000:.2f} GB" if value >= 1000 else f"{value:.1f} MB"


FORMS = {
    "count": count,
    "share": share,
    "duration": duration,
    "megabytes": megabytes,
    "loss": lambda value: "–" if value is None else f"{value:.3f}",
    "decimal": lambda value: "–" if value is None else f"{value:,.1f}",
}
"""How a figure is written, by name: what the template's filters are."""
