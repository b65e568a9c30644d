"""The figures of the report: data, title and caption of each.

Used by minitron/report/page.py, which `python -m minitron.evaluate --config FILE` calls. A figure is
`{"title", "chart", "caption", "wide"}`.
"""

from typing import Any

from markupsafe import Markup

from minitron.config.metrics import (
    Interval,
    format_count,
    format_loss,
    format_share,
    parse_number,
    parse_percent,
)
from minitron.report import charts
from minitron.report.tables import label_models, list_tasks, read_interval


def draw_comparison(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the bar charts of loss and of accuracy."""
    tasks = list_tasks(evaluation)
    return [_draw_losses(evaluation), *([_draw_accuracy(evaluation, tasks)] if tasks else [])]


def _draw_losses(evaluation: dict[str, Any]) -> dict[str, Any]:
    splits = ["validation"] + ["test"] * (evaluation["teacher"]["test_loss"] is not None)
    losses = {
        name: [parse_number(evaluation[model].get(f"{split}_loss")) for split in splits]
        for model, name in label_models(evaluation).items()
    }
    errors = _list_intervals(evaluation, [f"{split}_loss" for split in splits])
    chart = charts.draw_grouped_bars(
        _describe_series("Loss in nats per token", losses, splits), "nats per token", splits, losses, errors
    )
    counts = ", ".join(f"{format_count(evaluation['sequences'][split])} {split}" for split in splits)
    caption = f"Mean next-token cross-entropy on held-out text ({counts} sequences). {_ERROR_BARS}"
    return _build_figure("Loss, lower is better", chart, caption)


_ERROR_BARS = (
    "Error bars are 95 % intervals of each model alone. Two models are compared on the same text and questions, "
    "so their difference is more precise than either value: the table shows which differences are significant."
)


def _draw_accuracy(evaluation: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    accuracy = {
        name: [parse_percent(evaluation[model]["tasks"].get(task, {}).get("acc")) for task in tasks]
        for model, name in label_models(evaluation).items()
    }
    errors = _list_intervals(evaluation, [f"{task}_acc" for task in tasks], 100)
    label = _describe_series("Accuracy in percent", accuracy, tasks)
    chart = charts.draw_grouped_bars(label, "accuracy (%)", tasks, accuracy, errors, digits=1)
    return _build_figure("Accuracy on downstream tasks, higher is better", chart, _ERROR_BARS)


def _list_intervals(evaluation: dict[str, Any], metrics: list[str], scale: int = 1) -> dict[str, list[Interval | None]]:
    def read(model: str, metric: str) -> Interval | None:
        interval = read_interval(evaluation[model], metric)
        return (scale * interval[0], scale * interval[1]) if interval else None

    models = label_models(evaluation)
    return {name: [read(model, metric) for metric in metrics] for model, name in models.items()}


def _describe_series(title: str, series: dict[str, list[float | None]], groups: list[str]) -> str:
    parts = [f"{name} {', '.join(format_loss(value) for value in values)}" for name, values in series.items()]
    return f"{title} ({', '.join(groups)}): {'; '.join(parts)}"


_STAGES = {"finetune": "Correcting the teacher", "distill": "Teaching the student"}

_TEACHERS_TERMS = (
    (
        "kl",
        "divergence from the corrected teacher, lower is better",
        "forward KL (nats per token)",
        "Divergence of the student's next-token distribution from the teacher's. Distillation minimizes it by default.",
    ),
    (
        "top1_agreement",
        "agreement with the corrected teacher, higher is better",
        "share of tokens",
        "Share of positions where student and teacher have the same most likely next token.",
    ),
)


def draw_training(records: dict[str, dict[str, Any]], sequences: int, limit: int) -> list[dict[str, Any]]:
    """Return the curves of the training stages that ran: the loss and, for distill, the terms against the teacher.

    Args:
        records: records of the stages, by name.
        sequences: number of validation sequences that the evaluation read; a training may have read fewer or more.
        limit: the setting evaluation_sequences; if the evaluation read fewer, the split has no more.
    """
    figures = []
    for stage, title in _STAGES.items():
        if history := records.get(stage, {}).get("history"):
            figures += [_draw_loss(stage, title, records[stage], sequences, limit)]
            figures += [
                _draw_loss_term(title, history, *term)
                for term in _TEACHERS_TERMS
                if _select_points(history, term[0])[0]
            ]
    return figures


def _draw_loss(stage: str, title: str, record: dict[str, Any], sequences: int, limit: int) -> dict[str, Any]:
    metrics, history = record["metrics"], record["history"]
    steps, validation = _select_points(history, "cross_entropy"), _select_points(history, "validation_loss")
    floor, kept = metrics.get("teacher_validation_loss"), metrics["best_step"]
    label = f"{stage}: validation loss {format_loss(metrics['validation_loss_before'])} at step 0, "
    label += f"{format_loss(metrics['validation_loss'])} at step {kept}, which was kept"
    label += f"; corrected teacher {format_loss(floor)}" if floor is not None else ""
    chart = charts.draw_curves(label, "cross-entropy (nats per token)", steps, validation, floor, kept)
    return _build_figure(
        f"{title}: next-token loss, lower is better",
        chart,
        _write_loss_caption(record, len(steps[0]), sequences, limit),
    )


def _write_loss_caption(record: dict[str, Any], points: int, sequences: int, limit: int) -> str:
    metrics, own = record["metrics"], record["config"]["validation_sequences"]
    own = min(own, sequences) if sequences < limit else own
    before, after = format_loss(metrics["validation_loss_before"]), format_loss(metrics["validation_loss"])
    text = f"{record['config']['max_steps']:,} optimizer steps over {format_count(metrics['tokens'])} tokens. The "
    text += f"validation loss, always on the same held-out sequences, went from {before} before training to {after} at "
    text += f"step {metrics['best_step']:,}, which was kept."
    if own != sequences:
        text += f" This training validates on {own:,} sequences, but the evaluation above on {sequences:,}, so the two "
        text += "validation losses differ."
    if "teacher_validation_loss" in metrics:
        text += " Dashed: the loss of the corrected teacher, which the student learns from."
    if points > charts.MOST_POINTS:
        text += f" Each point of the training curve is the mean of about {round(points / charts.MOST_POINTS)} steps."
    return text


def _draw_loss_term(
    title: str, history: list[dict[str, Any]], key: str, measure: str, axis: str, caption: str
) -> dict[str, Any]:
    points = _select_points(history, key)
    label = f"{title}: {axis} on training batches, from {format_loss(points[1][0])} to {format_loss(points[1][-1])}"
    return _build_figure(f"{title}: {measure}", charts.draw_curves(label, axis, points), caption)


def _select_points(history: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    rows = [row for row in history if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def draw_importance(pruning: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the charts of the scores that decided the cut; none if it needed no scores."""
    if not pruning["scores"]:
        return []
    scores, kept = pruning["scores"], pruning["kept"]
    return [
        _draw_layers(scores["layers"], kept["layers"], pruning["dropped_layers"]),
        *([] if kept["hidden"] is None else [_draw_hidden_channels(scores["hidden"], kept["hidden"])]),
        _draw_mlp_channels(scores["intermediate"], kept["layers"], kept["intermediate"]),
        _draw_heads("Query heads", "query head", scores["heads"], kept["layers"], kept["heads"]),
        _draw_heads("Key-value groups", "key-value group", scores["key_value"], kept["layers"], kept["key_value"]),
    ]


def _draw_layers(scores: list[float], kept: list[int], dropped: list[int]) -> dict[str, Any]:
    text = f"dropped: {', '.join(map(str, dropped))}" if dropped else "none dropped"
    chart = charts.draw_layers(f"Block influence of {len(scores)} layers; {text}", scores, set(kept))
    caption = (
        "Block influence: how much a layer changes its input, as 1 minus the cosine similarity of its "
        f"input and output, averaged over the calibration. Layers {text}."
    )
    return _build_figure(f"Layers: {len(kept)} of {len(scores)} kept", chart, caption) | {"wide": True}


def _draw_hidden_channels(scores: list[float], kept: list[int]) -> dict[str, Any]:
    sizes, kept_score = f"{len(kept)} of {len(scores)} kept", _describe_kept_score([scores], [kept])
    chart = charts.draw_ranking(f"Importance of the hidden channels, sorted; {sizes}, {kept_score}", scores, kept)
    caption = f"One ranking for the whole model, read from the outputs of its norms; {kept_score}."
    return _build_figure(f"Hidden channels: {sizes}", chart, caption)


def _draw_mlp_channels(scores: list[list[float]], layers: list[int], kept: list[list[int]]) -> dict[str, Any]:
    sizes = f"{len(kept[0])} of {len(scores[0])} kept per layer"
    kept_score = _describe_kept_score([scores[layer] for layer in layers], kept)
    label = f"Importance of the MLP channels of {len(scores)} layers, sorted; {sizes}, {kept_score}"
    chart = charts.draw_layer_rankings(label, scores, layers, len(kept[0]))
    caption = "One row per layer, its channels sorted; brighter is more important, pale is cut. In the kept layers, "
    caption += f"{kept_score}."
    return _build_figure(f"MLP channels: {sizes}", chart, caption)


def _draw_heads(
    title: str, axis: str, scores: list[list[float]], layers: list[int], kept: list[list[int]]
) -> dict[str, Any]:
    sizes = f"{len(kept[0])} of {len(scores[0])} kept per layer"
    kept_score = _describe_kept_score([scores[layer] for layer in layers], kept)
    label = f"Importance of the {title.lower()} of {len(scores)} layers; {sizes}, {kept_score}"
    chart = charts.draw_heads(label, axis, scores, layers, kept)
    caption = (
        f"One row per layer; brighter is more important, a cross marks a cut head. In the kept layers, {kept_score}."
    )
    return _build_figure(f"{title}: {sizes}", chart, caption)


def _describe_kept_score(scores: list[list[float]], kept: list[list[int]]) -> str:
    total = sum(map(sum, scores))
    part = sum(row[index] for row, indices in zip(scores, kept, strict=True) for index in indices)
    return f"the kept part holds {format_share(part / total if total else 1.0)} of the score"


def _build_figure(title: str, chart: Markup, caption: str) -> dict[str, Any]:
    return {"title": title, "chart": chart, "caption": caption, "wide": False}
