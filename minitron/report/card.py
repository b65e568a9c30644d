"""The model card of a registered student: README.md as Hugging Face's hub reads it.

`python -m minitron.register --config FILE` writes it and uploads it with the weights. Its numbers are evaluate's, its
provenance is the lineage's; the licences of base model and data are carried over as they were found.
"""

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from minitron.config.metrics import TASK_METRICS
from minitron.config.stages import RegisterConfig
from minitron.registry import lineage
from minitron.registry.versions import CARD_BEGINS
from minitron.report import tables
from minitron.report.formatting import FORMS, TEMPLATES, number

_HUB = "hf://"
_TAGS = ["minitron", "pruning", "distillation", "compression"]
_RESULTS = {"validation_loss": "loss", "perplexity": "perplexity"}


def write_card(path: Path, config: RegisterConfig, evaluation: dict[str, Any], origin: dict[str, Any]) -> None:
    """Write the card.

    Args:
        path: the file.
        config: names the registered model.
        evaluation: the content of evaluation.json.
        origin: the lineage.
    """
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= FORMS | {"cell": _cell}
    template = environment.from_string((TEMPLATES / "card.md.j2").read_text(encoding="utf-8"))
    front = yaml.safe_dump(_front_matter(config.name, evaluation, origin), sort_keys=False, allow_unicode=True)
    body = template.render(_content(config, evaluation, origin))
    path.write_text(f"{CARD_BEGINS}{front}---\n{body}", encoding="utf-8")


def _front_matter(name: str, evaluation: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    """Return what Hugging Face's hub indexes; base model and dataset only where they have a name there."""
    inputs = _inputs(origin)
    front: dict[str, Any] = dict(origin["licences"]["teacher"])
    if base := _on_hub(inputs.get("teacher")):
        front["base_model"] = base
    if corpus := _on_hub(inputs.get("corpus")):
        front["datasets"] = [corpus]
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": _TAGS}
    return front | {"model-index": [{"name": name, "results": _results(evaluation)}]}


def _results(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    student = evaluation["student"]
    found = [
        {"type": kind, "name": metric.replace("_", " "), "value": value}
        for metric, kind in _RESULTS.items()
        if (value := number(student.get(metric))) is not None
    ]
    results = [_result("corpus", "held-out text of the corpus", found)] if found else []
    for task, scores in student.get("tasks", {}).items():
        found = [
            {"type": "accuracy", "name": metric, "value": value}
            for metric in TASK_METRICS
            if (value := number(scores.get(metric))) is not None
        ]
        results += [_result(task, task, found)] if found else []
    return results


def _result(kind: str, name: str, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    return {"task": {"type": "text-generation"}, "dataset": {"type": kind, "name": name}, "metrics": metrics}


def _content(config: RegisterConfig, evaluation: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": config.name,
        "alias": config.alias,
        "evaluation": evaluation,
        "models": tables.models_of(evaluation),
        "rows": tables.rows(evaluation),
        "gates": tables.gates(evaluation),
        "stages": origin["stages"],
        "inputs": _inputs(origin),
        "licence": lineage.format_license(origin["licences"]["teacher"]),
        "licences": origin["licences"],
        "unknown": lineage.UNKNOWN,
        "tokens": {stage: lineage.count_tokens(record) for stage, record in origin["stages"].items()},
    }


def _inputs(origin: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return what the first stage read, corpus and base model; the student's training set may have no record."""
    return origin["stages"].get("prepare", {}).get("inputs", {})


def _on_hub(entry: dict[str, str] | None) -> str | None:
    """Return the name that an input has on Hugging Face's hub: org/name of hf://org/name@revision/config."""
    if entry is None or not entry["address"].startswith(_HUB):
        return None
    return "/".join(entry["address"].removeprefix(_HUB).split("/")[:2]).partition("@")[0]


def _cell(text: Any) -> str:
    """Return text that does not end a cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")
