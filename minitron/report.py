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

from minitron import __version__, figures
from minitron.config import STAGES, EvaluateConfig
from minitron.figures import MODELS, tasks_of
from minitron.formats import FORMS, count, decimal, loss, megabytes, number, share, signed
from minitron.storage import read_record

REPORT = "report.html"

_ROWS: tuple[tuple[str, str, str, str, str | None, int], ...] = (
    # key, label, note, how it is written, how its difference to the teacher is written, the better direction
    ("parameters", "Parameters", "", "count", "relative", -1),
    ("weights_mb", "Weights", "", "megabytes", "relative", -1),
    ("generation_tokens_per_second", "Generation speed", "tokens per second", "decimal", "relative", 1),
    ("validation_loss", "Validation loss", "nats per token", "loss", "loss", -1),
    ("test_loss", "Test loss", "nats per token", "loss", "loss", -1),
    ("perplexity", "Perplexity", "", "decimal", "decimal", -1),
    ("kl", "Divergence from the teacher", "forward KL, nats per token", "loss", None, -1),
    ("top1_agreement", "Agreement with the teacher", "same most likely next token", "share", None, 1),
)

_TEACHER = list(MODELS).index("teacher")

_SIZES = {
    "num_hidden_layers": "Layers",
    "hidden_size": "Hidden channels",
    "intermediate_size": "MLP channels per layer",
    "num_attention_heads": "Query heads per layer",
    "num_key_value_heads": "Key-value groups per layer",
    "parameters": "Parameters",
}

_GLOSSARY = {
    "Validation loss": "How surprised a model is, on average, by the next token of text it has not seen; in nats, "
    "lower is better. The test loss is the same on a second part of the corpus that decided nothing.",
    "Perplexity": "The loss as a number of equally likely choices per token: e to the power of the loss.",
    "Gap closed": "Pruning raises the validation loss; this is the share of the rise that distillation took back: "
    "(pruned - student) / (pruned - teacher).",
    "Forward KL": "How far a model's next-token distribution is from the teacher's, in nats per token; 0 is identical.",
    "Block influence": "How much a layer changes what passes through it; those that change least go first.",
    "Accuracy": "Share of multiple-choice questions for which the right answer is the most likely; length-normalised "
    "when answers are compared per character.",
}


def write_report(directory: Path, config: EvaluateConfig, evaluation: dict[str, Any]) -> None:
    """Write `report.html` into a directory.

    Args:
        directory: gets the file.
        config: names the four models and the dataset; the records in their directories are shown.
        evaluation: the content of evaluation.json.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= FORMS
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    (directory / REPORT).write_text(template.render(_content(config, evaluation)), encoding="utf-8")


def _content(config: EvaluateConfig, evaluation: dict[str, Any]) -> dict[str, Any]:
    records, pruning = _records(config), _pruning(config.pruned)
    return {
        "models": MODELS,
        "evaluation": evaluation,
        "verdict": _verdict(evaluation),
        "rows": _rows(evaluation),
        "comparison": figures.comparison(evaluation),
        "training": figures.training(records),
        "pruning": pruning,
        "cuts": _cuts(pruning) if pruning else [],
        "importance": figures.importance(pruning) if pruning else [],
        "samples": _samples(evaluation),
        "stages": _costs(records),
        "records": records,
        "settings": config.model_dump(mode="json", exclude={"tracking_uri"}),  # it may hold a password
        "glossary": _GLOSSARY,
        "version": __version__,
        "written": datetime.now(UTC).timestamp(),
    }


def _records(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Return the records of the stages that wrote the inputs, in the order of the flow."""
    directories = (config.dataset, config.teacher, config.pruned, config.student)
    found = {record["stage"]: record for directory in directories if (record := read_record(directory))}
    return {stage: found[stage] for stage in STAGES if stage in found}


def _pruning(pruned: Path) -> dict[str, Any] | None:
    path = pruned / "pruning.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _verdict(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the headline's numbers, the sentence under it, and the figures on cards."""
    teacher, student, gap = evaluation["teacher"], evaluation["student"], evaluation["gap_closed"]
    if gap is None:
        words = "Pruning alone cost no validation loss, so there was no gap to close."
    elif gap < 0:
        words = f"Distillation did harm: the gap in validation loss that pruning opened grew by {share(-gap)}."
    else:
        words = f"Distillation closed {share(gap)} of the gap in validation loss that pruning had opened."
    cost = student["validation_loss"] - teacher["validation_loss"]
    words += (
        f" What remains: a validation loss {loss(abs(cost))} nats per token {'above' if cost > 0 else 'below'} the "
        f"teacher's, a perplexity of {decimal(student['perplexity'])} against {decimal(teacher['perplexity'])}."
    )
    return {"ratio": student["parameters"] / teacher["parameters"], "gap": gap, "words": words} | {
        "facts": [fact for fact in _facts(evaluation) if fact]
    }


def _facts(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    teacher, pruned, student = (evaluation[model] for model in ("teacher", "pruned", "student"))
    gap = evaluation["gap_closed"]
    losses = f"loss {loss(pruned['validation_loss'])} → {loss(student['validation_loss'])}"
    facts = [
        _fact("Parameters", count(student["parameters"]), f"the teacher has {count(teacher['parameters'])}"),
        _fact("Gap closed", share(gap), f"{losses}, teacher {loss(teacher['validation_loss'])}", gap),
    ]
    if speed := _ratio(student, teacher, "generation_tokens_per_second"):
        rates = [decimal(model["generation_tokens_per_second"]) for model in (student, teacher)]
        facts.append(
            _fact("Generation speed", f"{speed:.2f}\N{MULTIPLICATION SIGN}", f"{rates[0]} tokens/s, teacher {rates[1]}")
        )
    if _ratio(student, teacher, "weights_mb"):
        weights = f"the teacher's take {megabytes(teacher['weights_mb'])}"
        facts.append(_fact("Weights", megabytes(student["weights_mb"]), weights))
    return facts


def _fact(label: str, value: str, note: str, fill: float | None = None) -> dict[str, Any]:
    return {"label": label, "value": value, "note": note, "fill": None if fill is None else min(max(fill, 0), 1)}


def _ratio(over: dict[str, Any], under: dict[str, Any], key: str) -> float | None:
    return over[key] / under[key] if number(over.get(key)) and number(under.get(key)) else None


def _rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the table of models; a row without any value is left out."""
    rows: list[dict[str, Any]] = []
    for key, label, note, form, difference, better in _ROWS:
        values = [number(evaluation[model].get(key)) for model in MODELS]
        rows.append({"label": label, "note": note, "cells": _cells(values, form, difference, better)})
    for task in tasks_of(evaluation):
        for metric, note in (("acc", "accuracy"), ("acc_norm", "accuracy, length-normalised")):
            cells = _scores(evaluation, task, metric)
            rows.append({"label": task, "note": f"{note} ± standard error", "cells": cells})
    return [row for row in rows if any(cell["value"] is not None for cell in row["cells"])]


def _scores(evaluation: dict[str, Any], task: str, metric: str) -> list[dict[str, Any]]:
    """Write a task's scores with their standard errors; a difference within that of the two is not marked."""
    found = [evaluation[model]["tasks"].get(task, {}) for model in MODELS]
    cells = _cells([number(scores.get(metric)) for scores in found], "share", "points", 1)
    errors = [number(scores.get(f"{metric}_stderr")) for scores in found]
    teacher = cells[_TEACHER]["value"]
    for cell, error in zip(cells, errors, strict=True):
        if error is None or cell["value"] is None:
            continue
        cell["text"] = f"{100 * cell['value']:.1f} ± {share(error)}"
        if teacher is not None and abs(cell["value"] - teacher) <= math.hypot(error, errors[_TEACHER] or 0):
            cell["trend"] = ""
    return cells


def _cells(values: list[float | None], form: str, difference: str | None, better: int) -> list[dict[str, Any]]:
    """Write the values of the four models, and their differences to the teacher's."""
    teacher = values[_TEACHER]
    cells: list[dict[str, Any]] = []
    for model, value in zip(MODELS, values, strict=True):
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


def _cuts(pruning: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the sizes of teacher and student."""
    pairs = [(label, pruning["teacher"][key], pruning["student"][key]) for key, label in _SIZES.items()]
    return [
        {"label": label, "before": before, "after": after, "ratio": after / before} for label, before, after in pairs
    ]


def _samples(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "texts": {model: evaluation[model]["samples"][place].strip() for model in MODELS}}
        for place, prompt in enumerate(evaluation["prompts"])
    ]


def _costs(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    longest = max((record["seconds"] for record in records.values()), default=0) or 1
    return [
        {
            "stage": stage,
            "seconds": record["seconds"],
            "width": record["seconds"] / longest,
            "memory": record["peak_rss_mb"],
            "gpu": record["peak_gpu_mb"],
            "speed": record["metrics"].get("tokens_per_second"),
        }
        for stage, record in records.items()
    ]
