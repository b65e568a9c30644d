"""The figures of the report: which data each one shows, its title and what it means.

Used by minitron/report/page.py, which `python -m minitron.evaluate --config FILE` calls. A figure is
`{"title", "chart", "caption", "wide"}`.
"""

from typing import Any

from markupsafe import Markup

from minitron.config.metrics import MODELS
from minitron.report import charts
from minitron.report.formatting import count, loss, number, percent, share
from minitron.report.tables import half_width, tasks_of


def comparison(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the bar charts of loss and of accuracy."""
    tasks = tasks_of(evaluation)
    return [_losses(evaluation), *([_accuracy(evaluation, tasks)] if tasks else [])]


def _losses(evaluation: dict[str, Any]) -> dict[str, Any]:
    splits = ["validation"] + ["test"] * (evaluation["teacher"]["test_loss"] is not None)
    losses = {name: [number(evaluation[model][f"{split}_loss"]) for split in splits] for model, name in MODELS.items()}
    chart = charts.grouped_bars(_spoken("Loss in nats per token", losses, splits), "nats per token", splits, losses)
    return _figure("Loss, lower is better", chart, "Mean next-token cross-entropy on held-out text.")


def _accuracy(evaluation: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    def read(metric: str) -> dict[str, list[float | None]]:
        return {
            name: [percent(evaluation[model]["tasks"].get(task, {}).get(metric)) for task in tasks]
            for model, name in MODELS.items()
        }

    accuracy = read("acc")
    errors = {name: [half_width(error) for error in values] for name, values in read("acc_stderr").items()}
    label = _spoken("Accuracy in percent", accuracy, tasks)
    chart = charts.grouped_bars(label, "accuracy (%)", tasks, accuracy, errors, digits=1)
    caption = "Error bars are 95 % intervals: differences within them may be chance."
    return _figure("Accuracy on downstream tasks, higher is better", chart, caption)


def _spoken(title: str, series: dict[str, list[float | None]], groups: list[str]) -> str:
    parts = [f"{name} {', '.join(loss(value) for value in values)}" for name, values in series.items()]
    return f"{title} ({', '.join(groups)}): {'; '.join(parts)}"


_STAGES = {"finetune": "Correcting the teacher", "distill": "Teaching the student"}

_TEACHERS_TERMS = (
    (
        "kl",
        "divergence from the teacher, lower is better",
        "forward KL (nats per token)",
        "What distillation minimises: how far the student's next-token distribution is from the teacher's.",
    ),
    (
        "top1_agreement",
        "agreement with the teacher, higher is better",
        "share of tokens",
        "How often student and teacher hold the same next token for the most likely.",
    ),
)


def training(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the curves of the training stages that ran: the loss, and for distill what the teacher adds to it."""
    figures = []
    for stage, title in _STAGES.items():
        if history := records.get(stage, {}).get("history"):
            figures += [_loss_curve(stage, title, records[stage])]
            figures += [_term_curve(title, history, *term) for term in _TEACHERS_TERMS if _points(history, term[0])[0]]
    return figures


def _loss_curve(stage: str, title: str, record: dict[str, Any]) -> dict[str, Any]:
    metrics, history = record["metrics"], record["history"]
    steps, validation = _points(history, "cross_entropy"), _points(history, "validation_loss")
    floor, kept = metrics.get("teacher_validation_loss"), metrics["best_step"]
    label = f"{stage}: validation loss {loss(metrics['validation_loss_before'])} at step 0, "
    label += f"{loss(metrics['validation_loss'])} at step {kept}, which was kept; teacher {loss(floor)}"
    chart = charts.curves(label, "cross-entropy (nats per token)", steps, validation, floor, kept)
    return _figure(f"{title}: next-token loss, lower is better", chart, _loss_caption(record, len(steps[0])))


def _loss_caption(record: dict[str, Any], points: int) -> str:
    metrics = record["metrics"]
    words = (
        f"{record['config']['max_steps']:,} optimizer steps over {count(metrics['tokens'])} tokens. Validation, always "
    )
    words += f"on the same held-out sequences, went from {loss(metrics['validation_loss_before'])} before training to "
    words += f"{loss(metrics['validation_loss'])} at step {metrics['best_step']:,}, which was kept."
    if "teacher_validation_loss" in metrics:
        words += " Dashed: the teacher's own, which the student is pulled towards."
    if points > charts.MOST_POINTS:
        words += f" Each point of the training curve is the mean of about {round(points / charts.MOST_POINTS)} steps."
    return words


def _term_curve(
    title: str, history: list[dict[str, Any]], key: str, measure: str, axis: str, caption: str
) -> dict[str, Any]:
    points = _points(history, key)
    label = f"{title}: {axis} on training batches, from {loss(points[1][0])} to {loss(points[1][-1])}"
    return _figure(f"{title}: {measure}", charts.curves(label, axis, points), caption)


def _points(history: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    rows = [row for row in history if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def importance(pruning: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the charts of the scores that the cut was decided by; none when it needed no scores."""
    if not pruning["scores"]:
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
    chart = charts.layers(f"Block influence of {len(scores)} layers; {words}", scores, set(kept))
    caption = (
        "Block influence: how much a layer changes what passes through it, as 1 less the cosine similarity of its "
        f"input and output, summed over calibration batches. Layers {words}."
    )
    return _figure(f"Layers: {len(kept)} of {len(scores)} kept", chart, caption) | {"wide": True}


def _hidden(scores: list[float], kept: list[int]) -> dict[str, Any]:
    words, held = f"{len(kept)} of {len(scores)} kept", _held([scores], [kept])
    chart = charts.ranked(f"Importance of the hidden channels, sorted; {words}, {held}", scores, kept)
    caption = f"One ranking for the whole model, read from the outputs of its norms; {held}."
    return _figure(f"Hidden channels: {words}", chart, caption)


def _intermediate(scores: list[list[float]], layers: list[int], kept: list[list[int]]) -> dict[str, Any]:
    words, held = f"{len(kept[0])} of {len(scores[0])} kept per layer", _held([scores[layer] for layer in layers], kept)
    label = f"Importance of the MLP channels of {len(scores)} layers, sorted; {words}, {held}"
    chart = charts.ranked_by_layer(label, scores, layers, len(kept[0]))
    caption = (
        f"One row per layer, its channels sorted; brighter is more important, pale is cut. In the layers kept, {held}."
    )
    return _figure(f"MLP channels: {words}", chart, caption)


def _heads(
    title: str, axis: str, scores: list[list[float]], layers: list[int], kept: list[list[int]]
) -> dict[str, Any]:
    words, held = f"{len(kept[0])} of {len(scores[0])} kept per layer", _held([scores[layer] for layer in layers], kept)
    label = f"Importance of the {title.lower()} of {len(scores)} layers; {words}, {held}"
    chart = charts.cells(label, axis, scores, layers, kept)
    caption = f"One row per layer; brighter is more important, a cross marks what was cut. In the layers kept, {held}."
    return _figure(f"{title}: {words}", chart, caption)


def _held(scores: list[list[float]], kept: list[list[int]]) -> str:
    total = sum(map(sum, scores))
    part = sum(row[index] for row, indices in zip(scores, kept, strict=True) for index in indices)
    return f"what is kept holds {share(part / total if total else 1.0)} of the score"


def _figure(title: str, chart: Markup, caption: str) -> dict[str, Any]:
    return {"title": title, "chart": chart, "caption": caption, "wide": False}
