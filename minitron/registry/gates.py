"""Gates: the bounds that a student must meet to be promoted. A preset declares them; this module judges them.

    evaluate:
      gates:
        - {metric: validation_loss, at_most: 3.9}
        - {metric: validation_loss, against: champion, at_most: 0.0}
        - {metric: parameters, against: teacher, by: ratio, at_most: 0.7}
        - {metric: arc_easy_acc, against: teacher_before, at_least: -0.05}

With only a gate against the champion, every promotion can lose a little. A gate against a teacher bounds the total.

Used by `python -m minitron.evaluate --config FILE` and `minitron promote NAME`.
"""

from typing import TYPE_CHECKING, Any

from minitron.config.metrics import (
    CHAMPION,
    COSTS,
    DASH,
    FORMS,
    ITEMS_OF,
    MEASURES,
    MINUS,
    MODELS,
    NUMBERS,
    TASK_METRICS,
    Interval,
    format_signed,
)

if TYPE_CHECKING:
    from minitron.config.settings import EvaluateSettings

_DECLARED = ("metric", "against", "by", "bound", "threshold")

MET = ("passed", "within error", "no champion")
"""The outcomes of a gate that allow a promotion."""


def read_gates(config: "EvaluateSettings") -> list[dict[str, Any]]:
    """Return the gates of a configuration as dicts: metric, against, by, bound, threshold."""
    return [
        {"metric": gate.metric, "against": gate.against, "by": gate.by, "bound": gate.bound}
        | {"threshold": getattr(gate, gate.bound)}
        for gate in config.gates
    ]


def list_declared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return judged gates in the form of `read_gates`, without the results."""
    return [{name: row[name] for name in _DECLARED} for row in rows]


def judge_student(
    gates: list[dict[str, Any]], evaluation: dict[str, Any], champion: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Judge a student by its gates.

    A gate fails only if the whole 95 % interval of the measured value misses the threshold. Two models are compared on
    the same questions and sequences, item by item.

    Args:
        gates: gates from `read_gates`, or judged gates of an earlier call.
        evaluation: evaluation.json: its `student` is judged, its two teachers are references. A model's `items` are the
            values of its questions and sequences; without them there is no interval.
        champion: the champion's metrics on the same test set; None if there is no champion.

    Returns:
        The gates with these keys added: `student` and `reference`, the two values; `found`, the number that is
        compared with the threshold; `margin`, its distance to the threshold, positive if the gate is met;
        `interval`, its 95 % interval or None;
        `outcome`: passed, within error, failed, no champion, or not measured.
    """
    models = {name: evaluation.get(name) or {} for name in MODELS} | {CHAMPION: champion}
    return [_judge_gate(gate, evaluation["student"], models) for gate in gates]


def are_gates_met(rows: list[dict[str, Any]]) -> bool | None:
    """Say whether all gates are met; None if there are no gates."""
    return all(row["outcome"] in MET for row in rows) if rows else None


def is_quality_judged(rows: list[dict[str, Any]]) -> bool:
    """Say whether a gate on a loss, a divergence, an agreement or a task was judged, not only on size or speed."""
    return any(row["metric"] not in COSTS and row["found"] is not None for row in rows)


def _judge_gate(
    gate: dict[str, Any], student: dict[str, Any], models: dict[str, dict[str, Any] | None]
) -> dict[str, Any]:
    from minitron.registry.intervals import compare_items, estimate_interval  # numpy, which is not needed to show gates

    metric, against, by = gate["metric"], gate["against"], gate["by"]
    value, items = _read_metric(student, metric)
    row = {name: gate[name] for name in _DECLARED} | {
        "student": value, "reference": None, "found": None, "margin": None, "interval": None,
    }  # fmt: skip
    interval: Interval | None
    if against and models[against] is None:
        return row | {"outcome": "no champion"}
    if against:
        other, other_items = _read_metric(models[against] or {}, metric)
        row["reference"] = other
        found, interval = _compare_values(value, other, by), compare_items(metric, items, other_items, by)
    else:
        found, interval = value, estimate_interval(metric, items)
    if found is None:
        return row | {"outcome": "not measured"}
    at_most, threshold = gate["bound"] == "at_most", gate["threshold"]
    margin = threshold - found if at_most else found - threshold
    within = interval is not None and (interval[0] <= threshold if at_most else interval[1] >= threshold)
    outcome = "passed" if margin >= 0 else "within error" if within else "failed"
    return row | {"found": found, "margin": margin, "interval": interval, "outcome": outcome}


def _compare_values(value: float | None, other: float | None, by: str) -> float | None:
    if value is None or other is None or (by == "ratio" and not other):
        return None
    return value - other if by == "difference" else value / other


def _read_metric(model: dict[str, Any], metric: str) -> tuple[float | None, list[float]]:
    """Return a metric of a model, None for a missing one, and its items."""
    items = model.get("items", {}).get(ITEMS_OF.get(metric, metric), [])
    if metric in NUMBERS:
        return model.get(metric), items
    for task, numbers in model.get("tasks", {}).items():
        name = metric.removeprefix(f"{task}_")
        if name != metric and name in numbers:
            return numbers[name], items
    return None, []


PASSED, FAILED = "\N{CHECK MARK}", "\N{MULTIPLICATION X}"

_MARKS = {"passed": PASSED, "within error": "\N{ALMOST EQUAL TO}", "failed": FAILED}


def render_gate(gate: dict[str, Any]) -> dict[str, str]:
    """Return a judged gate for people, with labels and units.

    Args:
        gate: a judged gate, from `judge_student` or evaluation.json.

    Returns:
        `label`, `student`, `reference`, `found` and its `interval` (empty without one), `threshold`, `margin`,
        `outcome`, and the `mark` of the outcome.
    """
    metric, by, bound = gate["metric"], gate["by"], gate["bound"].replace("_", " ")
    against = MODELS.get(gate["against"], gate["against"] or "").lower()
    compared = f", {'difference from' if by == 'difference' else 'ratio to'} the {against}'s" if against else ""
    interval = gate.get("interval")  # gates that an earlier version judged have no interval
    ends = [_format_value(metric, by, end) for end in interval or ()]
    return {
        "label": f"{_get_label(metric)}{compared}",
        "student": _format_value(metric, None, gate["student"]),
        "reference": f"{against}: {_format_value(metric, None, gate['reference'])}" if against else DASH,
        "found": _format_value(metric, by, gate["found"]),
        "interval": f"({format_range(*ends)})" if ends else "",
        "threshold": f"{bound} {_format_value(metric, by, gate['threshold'])}",
        "margin": _format_margin(metric, by, gate["margin"]),
        "outcome": gate["outcome"],
        "mark": _MARKS.get(gate["outcome"], DASH),
    }


def format_range(low: str, high: str) -> str:
    """Write the ends of an interval; a common unit is written once."""
    unit = next((unit for unit in (" %", " points") if low.endswith(unit) and high.endswith(unit)), "")
    return f"{low.removesuffix(unit)} to {high}"


def describe_gate(gate: dict[str, Any]) -> str:
    """Return a judged gate in one line, for a log or a message."""
    text = render_gate(gate)
    if gate["found"] is None:
        return f"{text['label']}: {text['outcome']} ({text['threshold']})"
    found = " ".join(filter(None, (text["found"], text["interval"])))
    values = f" (student: {text['student']}, {text['reference']})" if gate["against"] else ""
    return f"{text['label']}: {found}{values}, {text['threshold']}: {text['outcome']}"


def _get_label(metric: str) -> str:
    """Return a metric's label; for a metric of a task, such as arc_easy_acc_norm, the task comes first."""
    labels = {key: label for key, label, *_ in MEASURES}
    for name, label in sorted(TASK_METRICS.items(), reverse=True):
        if metric.endswith(f"_{name}"):
            return f"{metric.removesuffix(f'_{name}')}, {label}"
    return labels.get(metric, metric)


def _get_form(metric: str) -> str:
    forms = {key: form for key, _, _, form, *_ in MEASURES}
    return "share" if metric.endswith(tuple(f"_{name}" for name in TASK_METRICS)) else forms.get(metric, "loss")


def _format_margin(metric: str, by: str | None, margin: float | None) -> str:
    """Write a margin with its sign; the margin of a share is in percent or points."""
    if margin is None:
        return DASH
    form = _get_form(metric)
    scale = 100 if form == "share" and by != "ratio" else 1
    return format_signed(scale * margin, 3 if by == "ratio" or form == "loss" else 1)


def _format_value(metric: str, by: str | None, value: float | None) -> str:
    """Write a metric, or the value that a gate compares: a share's difference in points, a ratio without a unit."""
    if value is None:
        return DASH
    if by == "ratio":
        return FORMS["loss"](value)
    if by == "difference" and _get_form(metric) == "share":
        return f"{100 * value:.1f} points".replace("-", MINUS)
    return FORMS[_get_form(metric)](value)
