"""The names and labels of metrics, and the format of their values: with a unit, or a dash if there is none."""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

SPEED, BATCH_SPEED = "generation_tokens_per_second", "batch_generation_tokens_per_second"
SPEEDS = (SPEED, BATCH_SPEED)
SPEED_BATCH = 8
"""Number of texts that a model continues at a time for BATCH_SPEED."""

COSTS = ("parameters", "weights_mb", *SPEEDS)
"""Metrics of a model's cost; all others, including those of tasks, measure its quality."""

NUMBERS = (*COSTS, "validation_loss", "test_loss", "out_of_domain_loss", "perplexity", "kl", "top1_agreement")
"""Metrics of every model; downstream tasks add others, such as `arc_easy_acc`."""

MODELS = {
    "teacher_before": "Teacher",
    "teacher": "Corrected teacher",
    "pruned": "Pruned student",
    "student": "Distilled student",
}
"""The four models in the order of the flow: key in evaluation.json, label for people.

People read "Teacher" for the model that you give, and "Corrected teacher" for what finetune makes of it. The keys are
older than the labels. They stay, because earlier workspaces and registered versions have them.
"""

CHAMPION = "champion"

MEASURES: tuple[tuple[str, str, str, str, str | None, int], ...] = (
    # key, label, note, number format, format of the difference from the corrected teacher,
    # better direction (-1: less is better)
    ("parameters", "Parameters", "", "count", "relative", -1),
    ("weights_mb", "Weights", "", "megabytes", "relative", -1),
    (SPEED, "Generation speed", "tokens per second, one text at a time", "decimal", "relative", 1),
    (
        BATCH_SPEED,
        "Generation speed in batches",
        f"tokens per second, {SPEED_BATCH} texts at a time",
        "decimal",
        "relative",
        1,
    ),
    ("validation_loss", "Validation loss", "nats per token", "loss", "loss", -1),
    ("test_loss", "Test loss", "nats per token", "loss", "loss", -1),
    ("out_of_domain_loss", "Out-of-domain loss", "nats per token, on other text", "loss", "loss", -1),
    ("perplexity", "Perplexity", "", "decimal", "decimal", -1),
    ("kl", "Divergence from the corrected teacher", "forward KL, nats per token", "loss", None, -1),
    ("top1_agreement", "Agreement with the corrected teacher", "same most likely next token", "share", None, 1),
)

TASK_METRICS = {"acc": "accuracy", "acc_norm": "accuracy, length-normalized"}

ITEMS_OF = {"perplexity": "validation_loss"}
"""Metrics that are computed from another metric's sequences: perplexity is exp(mean loss)."""

Interval = tuple[float, float]

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def parse_number(value: Any) -> float | None:
    """Return a finite number, or None. lm-eval writes 'N/A' if there is no standard error."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def find_not_finite(content: Any, name: str = "") -> str | None:
    """Find the first infinite or NaN number in nested dicts and lists.

    Args:
        content: the content of a JSON file.
        name: name of the content, to which the keys below it are added.

    Returns:
        The number's name and value, such as "student.kl is nan"; None if all numbers are finite.
    """
    if isinstance(content, float):
        return None if math.isfinite(content) else f"{name} is {content}"
    if isinstance(content, dict):
        entries = [(f"{name}.{key}".lstrip("."), value) for key, value in content.items()]
    elif isinstance(content, list | tuple):
        entries = [(f"{name}[{number}]", value) for number, value in enumerate(content)]
    else:
        return None
    return next(filter(None, (find_not_finite(value, key) for key, value in entries)), None)


def compute_perplexity(loss: float) -> float | None:
    """Return exp(loss); None if that is not finite, which happens above a loss of 709 nats."""
    try:
        return parse_number(math.exp(loss))
    except OverflowError:
        return None


def contains(interval: Interval | None, value: float) -> bool:
    """Say whether an interval contains a value; False without an interval."""
    return interval is not None and interval[0] <= value <= interval[1]


def parse_percent(value: Any) -> float | None:
    """Return a fraction in percent, or None."""
    return None if (fraction := parse_number(value)) is None else 100 * fraction


def format_count(value: float | None) -> str:
    """Write a count with its magnitude, such as 134.5 M."""
    if value is None:
        return DASH
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.4g} {suffix}"
    return f"{value:,.0f}"


def format_share(value: float | None) -> str:
    """Write a fraction as a percentage."""
    return DASH if value is None else f"{value:.1%}".replace("%", " %").replace("-", MINUS)


def format_duration(seconds: float | None) -> str:
    """Write seconds in the usual units, such as 1 min 40 s."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def format_megabytes(value: float | None) -> str:
    """Write megabytes as MB or GB."""
    if value is None:
        return DASH
    return f"{value / 1024:.2f} GB" if value >= 1024 else f"{value:.1f} MB"


def format_loss(value: float | None) -> str:
    """Write a loss, a divergence or a score: three decimal places."""
    return DASH if value is None else f"{value:.3f}".replace("-", MINUS)


def format_decimal(value: float | None) -> str:
    """Write a rate or a perplexity: one decimal place."""
    return DASH if value is None else f"{value:,.1f}"


def format_signed(value: float, digits: int) -> str:
    """Write a difference with its sign."""
    return f"{value:+,.{digits}f}".replace("-", MINUS)


def format_moment(seconds: float) -> str:
    """Write a Unix time."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


FORMS: dict[str, Callable[[Any], str]] = {
    form.__name__.removeprefix("format_"): form
    for form in (
        format_count, format_share, format_duration, format_megabytes, format_loss, format_decimal, format_moment
    )
}  # fmt: skip
"""The formats of a number, by the names that MEASURES and the templates use."""
