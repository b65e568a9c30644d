"""The report of a compression: one HTML page that opens offline, for decisions and for debugging.

`python -m minitron.evaluate --config FILE` writes it. The report reads the records that
the other stages left in their directories. A section appears only if its data is there.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from minitron import __version__
from minitron.config.metrics import (
    DASH,
    MODELS,
    contains,
    format_count,
    format_decimal,
    format_loss,
    format_megabytes,
    format_share,
)
from minitron.config.stages import EvaluateConfig
from minitron.errors import without_password
from minitron.registry import gates, lineage
from minitron.report import figures, render_page, tables
from minitron.storage.layout import CONTAMINATION, IMPORTANCE, PRUNING, REPORT

_SIZES = {
    "num_hidden_layers": "Layers",
    "hidden_size": "Hidden channels",
    "intermediate_size": "MLP channels per layer",
    "num_attention_heads": "Query heads per layer",
    "num_key_value_heads": "Key-value groups per layer",
    "parameters": "Parameters",
}

_GLOSSARY = {
    "Validation loss": "Mean cross-entropy of the next token on text that the model was not trained on, in nats; "
    "lower is better. The test loss is the same on a second held-out split, which has no influence on the weights.",
    "Perplexity": "The loss as a number of equally likely choices per token: e to the power of the loss.",
    "Gap closed": "Pruning raises the validation loss. The gap closed is the share of this rise that distillation "
    "removes: (pruned - student) / (pruned - corrected teacher).",
    "Forward KL": "Divergence of a model's next-token distribution from the corrected teacher's, in nats per token; 0 "
    "means identical.",
    "Block influence": "How much a layer changes its input. The layers with the lowest block influence are dropped "
    "first.",
    "Gate": "A bound that the student must meet before it replaces the champion, the model in use. The margin is the "
    "distance to the bound, positive if the gate is met. Within error means that the 95 % interval reaches the good "
    "side.",
    "95 % interval": "The values that another sample of text and questions would probably give. For accuracies it is "
    "Wilson's interval, for losses a bootstrap over the sequences, for speeds the slowest and the fastest round. "
    "Two models are compared on the same sequences, questions and rounds, so their difference can be significant even "
    "if the two intervals overlap.",
    "TFLOP per second, MFU": "Operations of the matrix products of a training, in 10^12 per second: six per weight and "
    "token of the model that learns, two of the teacher, and the attention. Model FLOP utilization is their share of "
    "the peak of the GPUs; what is computed twice to save memory counts once.",
    "Accuracy": "Share of multiple-choice questions for which the model gives the right answer the highest likelihood. "
    "Length-normalized means that likelihoods are compared per character.",
}


def write_report(directory: Path, config: EvaluateConfig, evaluation: dict[str, Any]) -> None:
    """Write `report.html` into a directory.

    Args:
        directory: directory for the file.
        config: names the four models and the dataset; the page shows the records in their directories.
        evaluation: the content of evaluation.json.
    """
    (directory / REPORT).write_text(render_page("report.html.j2", _build_content(config, evaluation)), encoding="utf-8")


def _build_content(config: EvaluateConfig, evaluation: dict[str, Any]) -> dict[str, Any]:
    origin, pruning = lineage.collect_lineage(config), _read_pruning(config.pruned)
    records, teacher_license = origin["stages"], lineage.format_license(origin["licences"]["teacher"])
    return {
        "models": tables.label_models(evaluation),
        "evaluation": evaluation,
        "headline": _build_headline(evaluation),
        "verdict": _build_verdict(evaluation),
        "idle": explain_idle_distillation(records),
        "gates": [gates.render_gate(gate) for gate in evaluation.get("gates") or []],
        "rows": tables.build_model_rows(evaluation),
        "comparison": figures.draw_comparison(evaluation),
        "training": figures.draw_training(records, evaluation["sequences"]["validation"], config.evaluation_sequences),
        "pruning": pruning,
        "cuts": _list_cuts(pruning) if pruning else [],
        "importance": figures.draw_importance(pruning) if pruning else [],
        "samples": _list_samples(evaluation),
        "stages": _list_costs(records),
        "records": records,
        "runs": {stage: _list_run_facts(record) for stage, record in records.items()},
        "mlflow": _find_tracking_page(config.tracking_uri),
        "licenses": {
            "teacher": teacher_license,
            "corpus": origin["licences"]["data"],
            "unknown": any(map(lineage.is_license_unknown, (teacher_license, origin["licences"]["data"]))),
        },
        "contamination": evaluation.get(CONTAMINATION),
        "corpora": lineage.read_corpora(origin),
        "settings": config.model_dump(mode="json", exclude={"tracking_uri"}),  # it may have a password
        "glossary": _GLOSSARY,
        "version": __version__,
        "written": datetime.now(UTC).timestamp(),
    }


def _read_pruning(pruned: Path) -> dict[str, Any] | None:
    """Return the content of pruning.json, with the scores; None if there is none."""
    if not (pruned / PRUNING).is_file():
        return None
    scores = None
    if (pruned / IMPORTANCE).is_file():
        scores = {axis: values.tolist() for axis, values in load_file(pruned / IMPORTANCE).items()}
    return {"scores": scores} | json.loads((pruned / PRUNING).read_text())  # until 0.5 it had the scores itself


def _build_headline(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the headline's numbers, the sentence under it, and the figures on cards."""
    teacher, student, gap = evaluation["teacher"], evaluation["student"], evaluation["gap_closed"]
    interval = evaluation.get("gap_closed_interval")
    if gap is None:
        text = "Pruning alone cost no validation loss, so there was no gap to close."
    elif contains(interval, 0):
        text = "Distillation closed no measurable part of the gap in validation loss after pruning: "
        text += f"{_write_gap(evaluation)}."
    elif gap < 0:
        text = f"Distillation made it worse: the gap in validation loss after pruning grew by {format_share(-gap)}."
    else:
        text = f"Distillation closed {_write_gap(evaluation)} of the gap in validation loss after pruning."
    cost = student["validation_loss"] - teacher["validation_loss"]
    difference = tables.read_interval(student, "validation_loss", "differences")
    differs = not contains(difference, 0)
    ends = sorted(map(abs, difference)) if difference and differs else None
    text += (
        f" The student's validation loss is {format_loss(abs(cost))}{_write_interval(ends, format_loss)} nats per "
        f"token {'above' if cost > 0 else 'below'} "
        f"the corrected teacher's{'' if differs else ', which is within the error'}; its perplexity is "
        f"{format_decimal(student['perplexity'])} against {format_decimal(teacher['perplexity'])}."
    )
    return {
        "summary": tables.summarize_result(evaluation),
        "ratio": student["parameters"] / teacher["parameters"],
        "gap": gap,
        "text": text,
        "facts": _list_facts(evaluation),
    }


def _write_gap(evaluation: dict[str, Any]) -> str:
    """Write the gap closed and its 95 % interval."""
    interval = _write_interval(evaluation.get("gap_closed_interval"), format_share)
    return f"{format_share(evaluation['gap_closed'])}{interval}"


def _write_interval(interval: Sequence[float] | None, form: Callable[[float], str]) -> str:
    """Write a 95 % interval in parentheses; nothing without one."""
    return f" (95 % interval: {gates.format_range(*map(form, interval))})" if interval else ""


def explain_idle_distillation(records: dict[str, dict[str, Any]]) -> str | None:
    """Return a warning if no step of distillation was better than the pruned student, so that this was kept."""
    if records.get("distill", {}).get("metrics", {}).get("best_step") != 0:
        return None
    steps = records["distill"]["config"]["max_steps"]
    return (
        f"Distillation did nothing: none of its {steps:,} steps had a lower validation loss than the pruned student, "
        "which was kept. Train longer, or change the learning rate."
    )


def _build_verdict(evaluation: dict[str, Any]) -> dict[str, str]:
    """Return the combined outcome of all gates: its mark, its style and its text."""
    passed = evaluation.get("passed")
    if passed is None:
        return {
            "mark": DASH,
            "style": "",
            "text": "No verdict: no gates were set, so no pipeline promotes this version",
        }
    outcomes = Counter(gate["outcome"] for gate in evaluation["gates"])
    text = f"of {outcomes.total()} gates {', '.join(f'{number} {outcome}' for outcome, number in outcomes.items())}"
    if not gates.is_quality_judged(evaluation["gates"]):
        text += "; no gate judged the quality, so no pipeline promotes this version"
    if passed:
        return {"mark": gates.PASSED, "style": "better", "text": f"Passed: {text}"}
    return {"mark": gates.FAILED, "style": "worse", "text": f"Not passed: {text}"}


def _list_run_facts(record: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of a stage's run. A fact that the record of an earlier version lacks is a dash."""
    facts = {
        "image": record.get("image"),
        "pipeline run": record.get("pipeline_run_id"),
        "MLflow run": record.get("mlflow_run_id"),
        "seed": record["config"].get("seed"),
    }
    return {name: DASH if value is None else value for name, value in facts.items()}


def _find_tracking_page(tracking_uri: str | None) -> str | None:
    """Return the address of MLflow's page, or None: a database on this machine has no page."""
    if tracking_uri is None or not tracking_uri.startswith("http"):
        return None
    return without_password(tracking_uri).rstrip("/")


def _list_facts(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    teacher, pruned, student = (evaluation[model] for model in ("teacher", "pruned", "student"))
    gap = evaluation["gap_closed"]
    losses = f"loss {format_loss(pruned['validation_loss'])} → {format_loss(student['validation_loss'])}"
    facts = [
        _build_fact(
            "Parameters",
            format_count(student["parameters"]),
            f"corrected teacher {format_count(teacher['parameters'])}",
        ),
        _build_fact(
            "Gap closed",
            format_share(gap),
            f"{losses}, corrected teacher {format_loss(teacher['validation_loss'])}",
            gap,
        ),
    ]
    if speed := tables.divide_numbers(student, teacher, "generation_tokens_per_second"):
        rates = [format_decimal(model["generation_tokens_per_second"]) for model in (student, teacher)]
        facts.append(
            _build_fact(
                "Generation speed",
                f"{speed:.2f}\N{MULTIPLICATION SIGN}",
                f"{rates[0]} tokens/s, corrected teacher {rates[1]}",
            )
        )
    if tables.divide_numbers(student, teacher, "weights_mb"):
        weights = f"corrected teacher {format_megabytes(teacher['weights_mb'])}"
        facts.append(_build_fact("Weights", format_megabytes(student["weights_mb"]), weights))
    return facts


def _build_fact(label: str, value: str, note: str, fill: float | None = None) -> dict[str, Any]:
    return {"label": label, "value": value, "note": note, "fill": None if fill is None else min(max(fill, 0), 1)}


def _list_cuts(pruning: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the sizes of the corrected teacher and of the student."""
    pairs = [(label, pruning["teacher"][key], pruning["student"][key]) for key, label in _SIZES.items()]
    return [
        {"label": label, "before": before, "after": after, "ratio": after / before} for label, before, after in pairs
    ]


def _list_samples(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "texts": {model: evaluation[model]["samples"][index].strip() for model in MODELS}}
        for index, prompt in enumerate(evaluation["prompts"])
    ]


def _list_costs(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
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
            "tflops": record["metrics"].get("tflops_per_second"),
            "mfu": record["metrics"].get("mfu"),
            "gpu_hours": lineage.compute_gpu_hours(record),
        }
        for stage, record in records.items()
    ]
