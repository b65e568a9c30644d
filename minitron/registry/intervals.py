"""95 % intervals of the metrics of evaluate, and of the difference or ratio of two models.

Every model answers the same questions, reads the same sequences, and is timed in the same rounds. So two models are
compared item by item, and the difficulty of an item cancels out. An item is a question (right or wrong, or a score), a
sequence (nats per token), or a round of timing (tokens per second). Used by `python -m minitron.evaluate`, the gates,
and `minitron promote`.
"""

import math
import statistics
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from minitron.config.metrics import NUMBERS, SPEEDS, Interval

__all__ = [
    "Comparison",
    "compare_items",
    "estimate_gap",
    "estimate_interval",
    "pack_items",
    "unpack_items",
]

Comparison = Literal["difference", "ratio"]

RESAMPLES, SEED = 1000, 0
Z = 1.959964
"""Half the width of a normal distribution's 95 % interval, in standard errors."""


def estimate_interval(metric: str, items: list[float]) -> Interval | None:
    """Return the interval of a metric; None if it has fewer than two items.

    For a share of right answers it is Wilson's interval (1927), whose width is above 0 even at 0 and 1. For a timing it
    goes from the slowest to the fastest round: six rounds enclose the median with a probability of 97 %. For all others
    it is a bootstrap over the items.
    """
    if len(items) < 2:
        return None
    if metric in SPEEDS:
        return min(items), max(items)
    if _are_answers(metric, items):
        return _estimate_share(float(np.mean(items)), len(items))
    return _take_quantiles(_resample(metric, items), len(items))


def compare_items(metric: str, items: list[float], others: list[float], by: Comparison) -> Interval | None:
    """Return the interval of the difference or ratio of two models, measured on the same items.

    Returns:
        None if the numbers of items differ or are below two, or if a ratio divides by zero.
    """
    if len(items) != len(others) or len(items) < 2:
        return None
    if _are_answers(metric, [*items, *others]):
        return _compare_answers(items, others, by)
    if metric in SPEEDS:
        pairs = _relate(np.asarray(items), np.asarray(others), by)
        return float(pairs.min()), float(pairs.max())
    other_values = _resample(metric, others)
    if by == "ratio" and not other_values.all():
        return None
    return _take_quantiles(_relate(_resample(metric, items), other_values, by), len(items))


def estimate_gap(pruned: list[float], student: list[float], teacher: list[float]) -> Interval | None:
    """Return the interval of the gap closed, (pruned - student) / (pruned - teacher), from losses per sequence."""
    if len(pruned) < 2:
        return None
    losses = [_resample("validation_loss", items) for items in (pruned, student, teacher)]
    gaps = losses[0] - losses[2]
    return _take_quantiles((losses[0] - losses[1]) / gaps, len(pruned)) if gaps.all() else None


def _are_answers(metric: str, items: list[float]) -> bool:
    """Tell whether items are right or wrong; a loss of exactly 0, such as a model's KL to itself, is neither."""
    return (metric not in NUMBERS or metric == "top1_agreement") and set(items) <= {0, 1}


def _apply(metric: str, means: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(means) if metric == "perplexity" else means


def _relate(values: np.ndarray, others: np.ndarray, by: Comparison) -> np.ndarray:
    return values - others if by == "difference" else values / others


def _estimate_share(share: float, count: int) -> Interval:
    """Return Wilson's score interval."""
    square = Z**2 / count
    center = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(0.0, center - half), min(1.0, center + half)


def _compare_answers(items: list[float], others: list[float], by: Comparison) -> Interval:
    """Return the interval of two shares of right answers to the same questions.

    It rests on McNemar's table: both right, only one of them, none. Half a question is added to each of its four cells
    (Agresti and Min 2005), so that two models without a different answer differ by 0 within a few points, not exactly.
    """
    first, second = np.asarray(items), np.asarray(others)
    total = len(items) + 2
    both = (float(first @ second) + 0.5) / total
    share, other = ((float(answers.sum()) + 1) / total for answers in (first, second))
    weight = 1.0 if by == "difference" else share / other
    variance = share * (1 - share) + weight**2 * other * (1 - other) - 2 * weight * (both - share * other)
    half = Z * math.sqrt(max(variance, 0.0) / total)
    if by == "difference":
        return share - other - half, share - other + half
    return weight - half / other, weight + half / other


def _resample(metric: str, items: list[float]) -> np.ndarray:
    """Return the metric of every resample; the resamples are the same for all models."""
    return _apply(metric, _draw_weights(len(items)) @ np.asarray(items))


@lru_cache(maxsize=2)  # one per split
def _draw_weights(count: int) -> np.ndarray:
    """Return how often each item is in each resample, as a share of `count`: [RESAMPLES, count]."""
    return np.random.default_rng(SEED).multinomial(count, [1 / count] * count, RESAMPLES) / count


def _take_quantiles(values: np.ndarray, count: int) -> Interval | None:
    """Return the expanded percentile interval (Hesterberg 2015, arXiv 1411.5279, section 4.1.1).

    Plain percentiles are too narrow for few items, because they ignore Student's t and the bias of a variance.
    """
    if not np.isfinite(values).all():
        return None  # the perplexity of a loss above 709 nats
    freedom = count - 1
    student_t = Z + (Z**3 + Z) / (4 * freedom) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)
    tail = statistics.NormalDist().cdf(-math.sqrt(count / freedom) * student_t)
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def pack_items(models: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return the items of every model in the form of items.json: answers as hexadecimal bits, others in six digits."""
    return {model: {metric: _pack(values) for metric, values in items.items()} for model, items in models.items()}


def unpack_items(packed: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Return the items of every model from the content of items.json."""
    return {model: {metric: _unpack(entry) for metric, entry in items.items()} for model, items in packed.items()}


def _pack(values: list[float]) -> Any:
    if not set(values) <= {0, 1}:
        return [float(f"{value:.6g}") for value in values]
    bits = np.packbits(np.asarray(values, dtype=bool)).tobytes().hex()
    return {"count": len(values), "bits": bits}


def _unpack(entry: Any) -> list[float]:
    if isinstance(entry, list):
        return entry
    bits = np.frombuffer(bytes.fromhex(entry["bits"]), dtype=np.uint8)
    return np.unpackbits(bits, count=entry["count"]).astype(float).tolist()
