"""The report of a compression: one HTML page that opens offline, for whoever decides and for whoever debugs.

`python -m minitron.evaluate --config FILE` writes it. What the other stages did is read from the records they left in
their directories; a section appears only when its data is there.
"""

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from minitron import __version__
from minitron.config.metrics import MODELS
from minitron.config.stages import EvaluateConfig
from minitron.registry import lineage
from minitron.report import figures, tables
from minitron.report.formatting import DASH, FORMS, TEMPLATES, count, decimal, loss, megabytes, number, share
from minitron.storage.layout import PRUNING, REPORT

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
    "Gate": "A bound that the student must keep before it replaces the champion, the model in use. The margin is the "
    "distance to the bound, positive on the good side; within error means that the 95 % interval holds the bound.",
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
    template = environment.from_string((TEMPLATES / "report.html.j2").read_text(encoding="utf-8"))
    (directory / REPORT).write_text(template.render(_content(config, evaluation)), encoding="utf-8")


def _content(config: EvaluateConfig, evaluation: dict[str, Any]) -> dict[str, Any]:
    origin, pruning = lineage.collect_lineage(config), _pruning(config.pruned)
    records = origin["stages"]
    return {
        "models": tables.models_of(evaluation),
        "evaluation": evaluation,
        "verdict": _verdict(evaluation),
        "decision": _decision(evaluation),
        "gates": tables.gates(evaluation),
        "rows": tables.rows(evaluation),
        "comparison": figures.comparison(evaluation),
        "training": figures.training(records),
        "pruning": pruning,
        "cuts": _cuts(pruning) if pruning else [],
        "importance": figures.importance(pruning) if pruning else [],
        "samples": _samples(evaluation),
        "stages": _costs(records),
        "records": records,
        "runs": {stage: _circumstances(record) for stage, record in records.items()},
        "licences": {
            "base model": lineage.format_license(origin["licences"]["teacher"]),
            "corpus": origin["licences"]["data"],
        },
        "settings": config.model_dump(mode="json", exclude={"tracking_uri"}),  # it may hold a password
        "glossary": _GLOSSARY,
        "version": __version__,
        "written": datetime.now(UTC).timestamp(),
    }


def _pruning(pruned: Path) -> dict[str, Any] | None:
    path = pruned / PRUNING
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


def _decision(evaluation: dict[str, Any]) -> dict[str, str]:
    """Return what the gates say together: a word, its sign and its style."""
    passed = evaluation.get("passed")
    if passed is None:
        return {"mark": DASH, "style": "", "words": "No verdict: no gates were set"}
    outcomes = Counter(gate["outcome"] for gate in tables.gates(evaluation))
    words = f"of {outcomes.total()} gates {', '.join(f'{number} {outcome}' for outcome, number in outcomes.items())}"
    if passed:
        return {"mark": tables.PASSED, "style": "better", "words": f"Passed: {words}"}
    return {"mark": tables.FAILED, "style": "worse", "words": f"Not passed: {words}"}


def _circumstances(record: dict[str, Any]) -> dict[str, Any]:
    """Return where a stage ran, as the record of whichever version says."""
    given = {
        "image": record.get("image"),
        "Kubeflow run": record.get("pipeline_run_id"),
        "MLflow run": record.get("mlflow_run_id"),
        "seed": record["config"].get("seed"),
    }
    return {name: DASH if value is None else value for name, value in given.items()}


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
            "tokens": lineage.count_tokens(record),
            "speed": record["metrics"].get("tokens_per_second"),
            "gpu_hours": lineage.compute_gpu_hours(record),
        }
        for stage, record in records.items()
    ]
