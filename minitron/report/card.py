"""The model card of a registered student: README.md as Hugging Face's hub reads it.

`python -m minitron.register --config FILE` writes it and uploads it with the weights. Its numbers come from evaluate.
Its provenance and the licenses of teacher and corpus come from the lineage.
"""

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from minitron.config.metrics import FORMS, SPEED, TASK_METRICS, format_share, parse_number
from minitron.config.stages import RegisterConfig
from minitron.registry import gates, lineage
from minitron.registry.versions import CARD_BEGINS
from minitron.report import TEMPLATES, tables

_HUB = "hf://"
_TAGS = ["minitron", "pruning", "distillation", "compression"]
_MAIN = ("parameters", SPEED, "validation_loss", "acc")
_DESCRIPTION_LENGTH = 5000
"""MLflow's limit in a database."""
_RESULTS = {"validation_loss": "loss", "perplexity": "perplexity"}


def write_card(path: Path, config: RegisterConfig, evaluation: dict[str, Any], origin: dict[str, Any]) -> None:
    """Write the card.

    Args:
        path: the file.
        config: the configuration of register, which names the registered model.
        evaluation: the content of evaluation.json.
        origin: the lineage.
    """
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= FORMS | {"cell": _escape_cell}
    template = environment.from_string((TEMPLATES / "card.md.j2").read_text(encoding="utf-8"))
    front = yaml.safe_dump(_build_front_matter(config.name, evaluation, origin), sort_keys=False, allow_unicode=True)
    body = template.render(_build_content(config, evaluation, origin))
    # Without the empty line, Markdown that knows no front matter takes all of it for a heading.
    path.write_text(f"{CARD_BEGINS}{front}\n---\n{body}", encoding="utf-8")


def describe_student(verdict: str, evaluation: dict[str, Any], origin: dict[str, Any]) -> str:
    """Return a student's description in MLflow, in Markdown: verdict, what was won and lost, sizes, losses, origin.

    Args:
        verdict: on its gates.
        evaluation: the content of evaluation.json.
        origin: the lineage.
    """
    parts = [f"{verdict.capitalize()}."]  # plain: the list of versions shows the beginning as it is
    if "teacher" in evaluation:
        parts[0] += f" {tables.summarize_result(evaluation)}."
        models = tables.label_models({name: evaluation[name] for name in ("teacher", "student")})
        rows = tables.build_model_rows(evaluation, models)
        table = [["", *models.values()], ["---", *["---:"] * len(models)]]
        for row in rows:
            if row["key"] in _MAIN:
                note = f" ({row['note']})" if row["note"] else ""
                table.append([row["label"] + note, *(cell["text"] for cell in row["cells"])])
        parts.append("\n".join(f"| {' | '.join(map(_escape_cell, row))} |" for row in table))
    parts.append("\n".join(f"- {gates.describe_gate(gate)}" for gate in evaluation.get("gates") or []))
    for name, entry in lineage.read_given(origin).items():
        addresses = [f"`{part['address']}`" for part in entry.get("parts", [entry])]
        parts.append(f"{name.capitalize()}: {', '.join(addresses)}")
    return "\n\n".join(filter(None, parts))[:_DESCRIPTION_LENGTH]


def _build_front_matter(name: str, evaluation: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata that Hugging Face's hub indexes; `base_model` and `datasets` are for inputs from the hub."""
    inputs = lineage.read_given(origin)
    front: dict[str, Any] = dict(origin["licences"]["teacher"])
    if base := _find_hub_name(inputs.get("teacher")):
        front["base_model"] = base
    if datasets := list(filter(None, map(_find_hub_name, lineage.read_corpora(origin)))):
        front["datasets"] = datasets
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": _TAGS}
    return front | {"model-index": [{"name": name, "results": _list_results(evaluation)}]}


def _list_results(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    student = evaluation["student"]
    metrics = [
        {"type": kind, "name": metric.replace("_", " "), "value": value}
        for metric, kind in _RESULTS.items()
        if (value := parse_number(student.get(metric))) is not None
    ]
    results = [_build_result("corpus", "held-out text of the corpus", metrics)] if metrics else []
    for task, scores in student.get("tasks", {}).items():
        metrics = [
            {"type": "accuracy", "name": metric, "value": value}
            for metric in TASK_METRICS
            if (value := parse_number(scores.get(metric))) is not None
        ]
        results += [_build_result(task, task, metrics)] if metrics else []
    return results


def _build_result(kind: str, name: str, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    return {"task": {"type": "text-generation"}, "dataset": {"type": kind, "name": name}, "metrics": metrics}


def _build_content(config: RegisterConfig, evaluation: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": config.name,
        "alias": config.alias,
        "evaluation": evaluation,
        "models": tables.label_models(evaluation),
        "rows": tables.build_model_rows(evaluation),
        "gates": [gates.render_gate(gate) for gate in evaluation.get("gates") or []],
        "stages": origin["stages"],
        "inputs": _list_inputs(origin),
        "license": lineage.format_license(origin["licences"]["teacher"]),
        "licenses": origin["licences"],
        "corpora": lineage.read_corpora(origin),
        "unknown": {
            "teacher": lineage.is_license_unknown(lineage.format_license(origin["licences"]["teacher"])),
            "corpus": lineage.is_license_unknown(origin["licences"]["data"]),
        },
        "tokens": {stage: lineage.count_tokens(record) for stage, record in origin["stages"].items()},
    }


def _list_inputs(origin: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the teacher and the corpora, each with its label and its entry in prepare's record."""
    inputs = [("Teacher", entry) for name, entry in lineage.read_given(origin).items() if name == "teacher"]
    for number, entry in enumerate(lineage.read_corpora(origin), 1):
        label = f"Corpus {number}, {format_share(entry['share'])} of the tokens" if "share" in entry else "Corpus"
        inputs.append((label, entry))
    return inputs


def _find_hub_name(entry: dict[str, str] | None) -> str | None:
    """Return the name that an input has on Hugging Face's hub: org/name of hf://org/name@revision/config."""
    if entry is None or not entry["address"].startswith(_HUB):
        return None
    return "/".join(entry["address"].removeprefix(_HUB).split("/")[:2]).partition("@")[0]


def _escape_cell(text: Any) -> str:
    """Escape text for a cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")
