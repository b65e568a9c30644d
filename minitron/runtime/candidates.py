"""The shapes that a search may race: every cut of a teacher that meets a budget, from its config.json alone.

`propose_candidates` enumerates depth × hidden × MLP × heads × groups in steps that hardware likes, keeps the shapes
that use the budget, and picks a few that differ as much as possible. Costs are linear in the number of layers, so that
each width is counted, or measured, once.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from minitron.config.fields import Fault
from minitron.config.parse import SectionError
from minitron.config.resources import count_models, count_parameters
from minitron.config.shapes import PRUNED_SIZES, PruneSettings, SearchSettings
from minitron.engines.nemo.checks import WIDTH_MULTIPLE
from minitron.engines.plan_checks import find_size_faults, read_sizes

LEAST = 1 / 4
"""Smallest share of the teacher's layers and widths."""

_STEPS = (256, 128, 64, 32, 16, 8)
_FINEST = 16
"""Widths of an axis, if multiples of 8 leave as many: enough to come near a budget."""

_MOST_MEASURED = 4
"""Widths of an axis that latency is measured for."""

_USE = 8
"""Power of the used share of the budget in the choice of candidates: 10 % unused more than halve a distance."""

Sizes = dict[str, int]
Measure = Callable[[Mapping[str, Any]], tuple[float, float]]
"""Returns the cost of a config.json without layers, and of each layer."""

_FORMS = {"parameters": "{:,.0f}", "memory_gb": "{:.4g}", "latency_ms": "{:.4g}"}


class Candidate(NamedTuple):
    """A shape, and what it costs in the budget's unit."""

    sizes: Sizes
    cost: float

    @property
    def name(self) -> str:
        """LAYERSxHIDDEN-MLP-HEADS/GROUPS."""
        return name_shape(self.sizes)


def name_shape(sizes: Mapping[str, int]) -> str:
    """Return a shape's name: LAYERSxHIDDEN-MLP-HEADS/GROUPS."""
    hidden, intermediate, heads, groups, layers = (sizes[name] for name in PRUNED_SIZES)
    return f"{layers}x{hidden}-{intermediate}-{heads}/{groups}"


def propose_candidates(
    search: SearchSettings, architecture: Mapping[str, Any], prune: PruneSettings, measure: Measure | None = None
) -> list[Candidate]:
    """Return the candidates of a search, `search.candidates` at most.

    Args:
        search: the budget, and how many candidates to return.
        architecture: the teacher's config.json.
        prune: its sizes, if they meet the budget, are the first candidate; its engine decides about steps.
        measure: measures latency, for a budget latency_ms.

    Raises:
        SectionError: no shape meets the budget, or the teacher itself does; the message names the nearest shape.
    """
    assert search.budget is not None
    name, budget = search.budget
    teacher = read_sizes(architecture)
    if name in _COUNTERS:
        measure = _COUNTERS[name](search)
    assert measure is not None
    costs: dict[tuple[int, ...], tuple[float, float]] = {}

    def find_cost(sizes: Sizes) -> float:
        widths = tuple(sizes[axis] for axis in PRUNED_SIZES[:-1])
        if widths not in costs:
            costs[widths] = measure(describe_student(architecture, sizes))
        return costs[widths][0] + costs[widths][1] * sizes["num_hidden_layers"]

    whole = find_cost(teacher)
    if whole <= budget:
        text = f"{_format(name, budget)} is met by the teacher, which has {_format(name, whole)}; give less"
        raise SectionError([Fault(f"search.{name}", text)])
    shapes = list(_list_shapes(architecture, prune, few=name == "latency_ms"))
    meeting = _select_largest(shapes, find_cost, budget)
    kept = [shape for shape in meeting if shape.cost >= (1 - search.tolerance) * budget]
    if not kept:
        raise SectionError([_describe_miss(name, budget, search.tolerance, shapes, meeting, find_cost)])
    own = prune.compute_student_sizes(teacher)
    is_given = own != teacher and not list(find_size_faults(prune, architecture))
    first = [Candidate(own, find_cost(own))] if is_given else []
    first = [shape for shape in first if (1 - search.tolerance) * budget <= shape.cost <= budget]
    return _spread(first, kept, teacher, search.candidates, budget)


def find_budget_faults(
    search: SearchSettings, architecture: Mapping[str, Any], prune: PruneSettings
) -> Iterator[Fault]:
    """Find a budget that no shape meets. Latency is known only where it is measured."""
    if search.budget and search.budget[0] in _COUNTERS:
        try:
            propose_candidates(search, architecture, prune)
        except SectionError as error:
            yield from error.faults


def describe_student(architecture: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Return the config.json of a teacher with other sizes; heads keep their size."""
    head = architecture.get("head_dim") or architecture["hidden_size"] // architecture["num_attention_heads"]
    return {**architecture, **sizes, "head_dim": head}


def count_memory_gb(student: Mapping[str, Any], search: SearchSettings) -> float:
    """Return the GB of a student's weights and of its key-value cache, both in the dtype of its config.json."""
    weight = count_models(student, PruneSettings()).weight
    cache = 2 * student["num_hidden_layers"] * student["num_key_value_heads"] * student["head_dim"]
    return weight * (count_parameters(student) + cache * search.batch * search.context) / 1e9


def _without_and_per_layer(count: Callable[[Mapping[str, Any]], float]) -> Measure:
    def measure(student: Mapping[str, Any]) -> tuple[float, float]:
        none, one = (count({**student, "num_hidden_layers": layers}) for layers in (0, 1))
        return none, one - none

    return measure


_COUNTERS: dict[str, Callable[[SearchSettings], Measure]] = {
    "parameters": lambda search: _without_and_per_layer(count_parameters),
    "memory_gb": lambda search: _without_and_per_layer(lambda student: count_memory_gb(student, search)),
}


def _list_shapes(architecture: Mapping[str, Any], prune: PruneSettings, few: bool) -> Iterator[Sizes]:
    """Yield all shapes, ascending in depth and in the width of the MLP."""
    teacher = read_sizes(architecture)
    total = teacher["num_hidden_layers"]
    least = WIDTH_MULTIPLE if prune.engine == "nemo" else _STEPS[-1]
    intermediates = _list_widths(teacher["intermediate_size"], least, few)
    for heads, groups in _list_heads(teacher):
        divisor = heads if architecture["model_type"] == "llama" else 1
        for hidden in _list_widths(teacher["hidden_size"], least, few, divisor):
            widths = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": groups}
            if list(find_size_faults(PruneSettings.model_validate(widths), architecture)):
                continue
            for intermediate in intermediates:
                for layers in range(math.ceil(LEAST * total), total + 1):
                    yield {**widths, "intermediate_size": intermediate, "num_hidden_layers": layers}


def _list_widths(size: int, least: int, few: bool, divisor: int = 1) -> list[int]:
    """Return the teacher's width and smaller multiples of a step, ascending.

    The step is a multiple of `least` and `divisor`: as large as leaves `_FINEST` widths, and not beyond 256.
    """
    steps = [math.lcm(step, divisor) for step in _STEPS if step >= least]
    step = next((step for step in steps if size // step >= _FINEST), steps[-1])
    widths = [*range(math.ceil(LEAST * size / step) * step, size, step), size]
    return widths[-1 :: -math.ceil(len(widths) / _MOST_MEASURED)][::-1] if few else widths


def _list_heads(teacher: Sizes) -> list[tuple[int, int]]:
    """Return query heads and groups: at least half of them, an even number or a divisor of all."""

    def list_counts(count: int) -> list[int]:
        return [kept for kept in range(math.ceil(count / 2), count + 1) if kept % 2 == 0 or count % kept == 0]

    groups = teacher["num_key_value_heads"]
    return [
        (kept * each, kept)
        for kept in list_counts(groups)
        for each in list_counts(teacher["num_attention_heads"] // groups)
    ]


def _select_largest(shapes: list[Sizes], find_cost: Callable[[Sizes], float], budget: float) -> list[Candidate]:
    """Return the shapes that meet a budget: for each depth, hidden size and heads the one with the widest MLP."""
    largest: dict[tuple[int, ...], Candidate] = {}
    for sizes in shapes:
        if (cost := find_cost(sizes)) <= budget:
            key = tuple(sizes[axis] for axis in PRUNED_SIZES if axis != "intermediate_size")
            largest[key] = Candidate(sizes, cost)  # the MLP ascends
    return list(largest.values())


def _describe_miss(
    name: str, budget: float, tolerance: float, shapes: list[Sizes], meeting: list[Candidate], find_cost: Any
) -> Fault:
    """Return the fault of a budget that no shape uses; it names the nearest shape."""
    if meeting:
        nearest = max(meeting, key=lambda shape: shape.cost)
        text = (
            f"no shape has between {_format(name, (1 - tolerance) * budget)} and {_format(name, budget)}; the nearest, "
            f"{nearest.name}, has {_format(name, nearest.cost)}: give that, or raise search.tolerance"
        )
        return Fault(f"search.{name}", text)
    nearest = min((Candidate(sizes, find_cost(sizes)) for sizes in shapes), key=lambda shape: shape.cost)
    return Fault(
        f"search.{name}",
        f"{_format(name, budget)} is less than any shape has; the nearest, {nearest.name}, has "
        f"{_format(name, nearest.cost)}: give at least that",
    )


def _format(name: str, value: float) -> str:
    return _FORMS[name].format(value)


def _spread(
    first: list[Candidate], kept: list[Candidate], teacher: Sizes, count: int, budget: float
) -> list[Candidate]:
    """Pick shapes that differ: the most even cut, then each time the one farthest from those picked, by its ratios.

    A shape that leaves budget unused is farther from the others because it is smaller; its distance counts less.
    """
    places = {shape.name: _locate(shape.sizes, teacher) for shape in (*first, *kept)}
    picked = first or [min(kept, key=lambda shape: (max(map(abs, places[shape.name])), shape.name))]

    def measure_distance(shape: Candidate) -> float:
        nearest = min(math.dist(places[shape.name], places[other.name]) for other in picked)
        return nearest * (shape.cost / budget) ** _USE

    while len(picked) < min(count, len(places)):
        picked = [*picked, max(kept, key=measure_distance)]
    return picked


def _locate(sizes: Sizes, teacher: Sizes) -> tuple[float, ...]:
    """Return a shape's logarithmic ratios to the teacher: depth, hidden size, MLP, heads and groups (half each)."""
    weights = {"num_attention_heads": 0.5, "num_key_value_heads": 0.5}
    return tuple(weights.get(axis, 1) * math.log(sizes[axis] / teacher[axis]) for axis in PRUNED_SIZES)
