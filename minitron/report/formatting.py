"""How the report writes figures: in plain words, with their unit, and a dash where there is none.

Used by minitron/report/page.py, which `python -m minitron.evaluate --config FILE` calls.
"""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).with_name("templates")
"""The directory of the templates of what people read."""

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def number(value: Any) -> float | None:
    """Return a finite number, or None: lm-eval writes 'N/A' where there is no standard error."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def percent(value: Any) -> float | None:
    """Return a fraction in percent, or None."""
    return None if (fraction := number(value)) is None else 100 * fraction


def count(value: float | None) -> str:
    """Write a count with its magnitude: 134.5 M."""
    if value is None:
        return DASH
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.4g} {suffix}"
    return f"{value:,.0f}"


def share(value: float | None) -> str:
    """Write a fraction as a percentage."""
    return DASH if value is None else f"{value:.1%}".replace("%", " %").replace("-", MINUS)


def duration(seconds: float | None) -> str:
    """Write seconds as people say them: 1 min 40 s."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def megabytes(value: float | None) -> str:
    """Write megabytes as MB or GB."""
    if value is None:
        return DASH
    return f"{value / 1024:.2f} GB" if value >= 1024 else f"{value:.1f} MB"


def loss(value: float | None) -> str:
    """Write a loss, a divergence or a score: three digits after the point."""
    return DASH if value is None else f"{value:.3f}".replace("-", MINUS)


def decimal(value: float | None) -> str:
    """Write a rate or a perplexity: one digit after the point."""
    return DASH if value is None else f"{value:,.1f}"


def signed(value: float, digits: int) -> str:
    """Write a difference with its sign."""
    return f"{value:+,.{digits}f}".replace("-", MINUS)


def moment(seconds: float) -> str:
    """Write a Unix time."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


FORMS: dict[str, Callable[[Any], str]] = {
    form.__name__: form for form in (count, share, duration, megabytes, loss, decimal, moment)
}
"""The ways to write a figure, by name: the filters of the page's template."""
