"""Intervals: known values, their coverage, their edges, and what pairing is worth."""

import json
from typing import Any

import numpy as np
import pytest

from minitron.config.metrics import SPEED
from minitron.registry.intervals import compare_items, estimate_gap, estimate_interval, pack_items, unpack_items


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 4, 0.0, 0.4899), (4, 4, 0.5101, 1.0), (2, 4, 0.1500, 0.8500), (15, 200, 0.0460, 0.1200)],
)
def test_a_share_has_the_interval_of_wilson(right: int, count: int, low: float, high: float) -> None:
    items = [1.0] * right + [0.0] * (count - right)
    assert estimate_interval("arc_acc", items) == pytest.approx((low, high), abs=1e-4)


def test_answers_are_compared_question_by_question() -> None:
    """15 questions that only one model knows, 5 that only the other knows: Agresti and Min, by hand."""
    items = [1.0] * 60 + [1.0] * 15 + [0.0] * 5 + [0.0] * 20
    others = [1.0] * 60 + [0.0] * 15 + [1.0] * 5 + [0.0] * 20
    low, high = compare_items("arc_acc", items, others, "difference") or (0, 0)
    center, half = 10 / 102, 1.959964 * (((15.5 + 5.5) / 102 - (10 / 102) ** 2) / 102) ** 0.5
    assert (low, high) == pytest.approx((center - half, center + half))
    assert low > 0, "the two intervals of Wilson overlap"
    ends = [estimate_interval("arc_acc", answers) or (0, 0) for answers in (items, others)]
    assert ends[0][0] < ends[1][1]


def test_equal_answers_leave_a_doubt() -> None:
    low, high = compare_items("arc_acc", [0.0] * 4, [0.0] * 4, "difference") or (0, 0)
    assert low == -high and 0.2 < high < 0.5
    low, high = compare_items("arc_acc", [1.0] * 1000, [1.0] * 1000, "ratio") or (0, 0)
    assert 0.99 < low < 1 < high < 1.01


def draw_losses(rng: np.random.Generator, count: int, gain: float = 0.0) -> tuple[list[float], list[float]]:
    """Return losses of two models on the same sequences: some are hard for both."""
    hard = rng.normal(3, 0.5, count)
    return (hard + rng.normal(0, 0.05, count) - gain).tolist(), (hard + rng.normal(0, 0.05, count)).tolist()


@pytest.mark.parametrize("count", [8, 64])
def test_nineteen_of_twenty_intervals_hold_the_truth(count: int) -> None:
    rng = np.random.default_rng(1)
    trials, single, paired, shares = 400, 0, 0, 0
    for _ in range(trials):
        items, others = draw_losses(rng, count)
        low, high = estimate_interval("validation_loss", items) or (0, 0)
        single += low <= 3 <= high
        low, high = compare_items("validation_loss", items, others, "difference") or (0, 0)
        paired += low <= 0 <= high
        answers = rng.random((2, count)) < np.where(rng.random(count) < 0.7, 0.9, 0.1)
        low, high = compare_items("arc_acc", *answers.astype(float).tolist(), "difference") or (0, 0)
        shares += low <= 0 <= high
    assert all(0.925 <= held / trials <= 0.99 for held in (single, paired)), (single, paired)
    assert shares / trials >= 0.94, "with few questions it is wider than it need be"


def test_what_is_hard_for_both_models_does_not_count() -> None:
    items, others = draw_losses(np.random.default_rng(2), 64, gain=0.05)
    low, high = compare_items("validation_loss", items, others, "difference") or (0, 0)
    assert low < -0.05 < high < 0, "a gain of 0.05 is certain"
    alone = estimate_interval("validation_loss", items) or (0, 0)
    assert alone[1] - alone[0] > 5 * (high - low)
    assert compare_items("validation_loss", items, others, "difference") == (low, high), "the same again"


def test_the_perplexity_has_the_interval_of_its_loss() -> None:
    items, _ = draw_losses(np.random.default_rng(3), 32)
    low, high = estimate_interval("validation_loss", items) or (0, 0)
    assert estimate_interval("perplexity", items) == pytest.approx((np.exp(low), np.exp(high)), rel=1e-3)
    assert compare_items("perplexity", items, items, "ratio") == (1.0, 1.0)
    assert estimate_interval("perplexity", [800.0, 900.0]) is None


def test_speeds_are_compared_round_by_round() -> None:
    items, others = [10.0, 20.0, 10.0], [5.0, 10.0, 4.0]
    assert estimate_interval(SPEED, items) == (10.0, 20.0)
    assert compare_items(SPEED, items, others, "ratio") == (2.0, 2.5)


def test_the_gap_that_was_closed_has_an_interval() -> None:
    rng = np.random.default_rng(4)
    teacher = rng.normal(3, 0.5, 32)
    student, pruned = (teacher + rng.normal(shift, 0.1, 32) for shift in (1.0, 4.0))
    low, high = estimate_gap(pruned.tolist(), student.tolist(), teacher.tolist()) or (0, 0)
    assert low < 0.75 < high and high - low < 0.3
    assert estimate_gap([1.0, 2.0], [1.0, 2.0], [1.0, 2.0]) is None


@pytest.mark.parametrize(("items", "others"), [([1.0], [0.0]), ([], []), ([1.0, 0.0], [1.0]), ([2.0, 3.0], [2.0])])
def test_too_few_or_other_items_have_no_interval(items: list[float], others: list[float]) -> None:
    assert compare_items("arc_acc", items, others, "difference") is None
    assert len(items) > 1 or estimate_interval("arc_acc", items) is None


def test_items_are_packed_in_bits_and_digits() -> None:
    rng = np.random.default_rng(5)
    answers = (rng.random(14_042) < 0.6).astype(float).tolist()
    items: dict[str, Any] = {"student": {"mmlu_acc": answers, "validation_loss": [2.123456789, 3.0], "arc_acc": [1.0]}}
    text = json.dumps(pack_items(items))
    assert len(text) < 3_800, "a quarter of a character per question"
    again = unpack_items(json.loads(text))
    assert again["student"]["mmlu_acc"] == answers and again["student"]["arc_acc"] == [1.0]
    assert again["student"]["validation_loss"] == [2.12346, 3.0]
