"""The charts of the report, as inline SVG that follows the page's light or dark colors.

Used by minitron/report/page.py, which `python -m minitron.evaluate --config FILE` calls.
"""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, GRAY, BLUE, ORANGE, GREEN, PURPLE = "#010203", "#888888", "#0072b2", "#d55e00", "#009e73", "#cc79a7"
"""Text and lines, then colors of Okabe and Ito, which color-blind people can tell apart."""

_PAGE_COLORS = {
    INK: "currentColor",
    GRAY: "var(--gray)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
    PURPLE: "var(--purple)",
}
MODEL_COLORS = (GRAY, BLUE, ORANGE, GREEN, PURPLE)

MOST_POINTS = 400
"""Most points of a curve. A chart is about as many pixels wide, so more points would only make the page larger."""

WIDTH, WIDE = 5.6, 11.6
"""Sizes in inches of a chart over half of the page and over the full width, with text of the same size."""

_LOG_RATIO = 20
_REWRITES = (
    (r' width="[\d.]+pt" height="[\d.]+pt"', ""),
    (r"<style.*?</style>", ""),  # it would apply to the whole page
    (r"font-family: [^;\"]*; ?", ""),
    (r'<g id="tip:([^"]*)">', r"<g><title>\1</title>"),
    (r' id="[\w.]+_\d{1,4}"', ""),
    (r'<g id="([\w-]+)">', r'<g class="\1">'),
    *((color, name) for color, name in _PAGE_COLORS.items()),
)
"""Rewrites of matplotlib's SVG for the page: a gid becomes a class, or a tooltip if it is 'tip:TEXT'."""

_SETTINGS: Any = {
    "svg.fonttype": "none",
    "path.simplify": False,  # curves are downsampled already
    "text.parse_math": False,
    "text.color": INK,
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRAY,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}
_PALE = "#ffffff70"
Points = tuple[list[Any], list[Any]]


@matplotlib.rc_context(_SETTINGS)
def draw_curves(
    label: str,
    axis: str,
    training: Points,
    validation: Points | None = None,
    floor: float | None = None,
    kept: int | None = None,
) -> Markup:
    """Draw a quantity over optimizer steps.

    Args:
        label: text for screen readers.
        axis: quantity and unit.
        training: steps and values on training batches; a long series is averaged to MOST_POINTS.
        validation: steps and values on the validation split, drawn with markers.
        floor: the corrected teacher's value, drawn as a line.
        kept: the step whose weights were kept.
    """
    figure, axes = _create_figure()
    axes.plot(*map(downsample, training), color=BLUE, linewidth=1, alpha=0.75, label="training", gid="training")
    if validation:
        axes.plot(*validation, color=ORANGE, marker="o", markersize=4, label="validation", gid="validation")
        if kept is not None and kept in validation[0]:
            best = [kept], [validation[1][validation[0].index(kept)]]
            axes.scatter(*best, 70, "none", edgecolors=INK, zorder=3, label=f"kept: step {kept}", gid="kept")
    if floor is not None:
        axes.axhline(
            floor, color=GREEN, linestyle="--", linewidth=1.4, label=f"corrected teacher: {floor:.3f}", gid="floor"
        )
    axes.set(xlabel="optimizer step", ylabel=axis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y")
    _add_legend(figure, axes.get_legend_handles_labels()[0] if validation else [])
    return _render_svg(figure, label)


class RacedPoint(NamedTuple):
    """A candidate of a search in a chart: what it costs, its losses round by round, and how it is called."""

    cost: float
    losses: list[float]
    number: int
    name: str
    won: bool


@matplotlib.rc_context(_SETTINGS)
def draw_race(
    title: str, axis: str, points: Sequence[RacedPoint], rounds: Sequence[str], budget: float, floor: float | None
) -> Markup:
    """Draw the losses of candidates over their costs, one color per round, with the Pareto front of the first round.

    Args:
        title: text for screen readers.
        axis: cost and unit.
        points: the candidates that have a loss.
        rounds: names of the rounds.
        budget: the most that a candidate may cost, drawn as a line.
        floor: the corrected teacher's loss, drawn as a line.
    """
    figure, axes = _create_figure(width=WIDE, height=4.2)
    for place, (name, color) in enumerate(zip(rounds, (GRAY, BLUE, GREEN), strict=True)):
        for point in points:
            if len(point.losses) > place:
                loss = point.losses[place]
                [mark] = axes.plot(point.cost, loss, color=color, marker="o", markersize=6, linestyle="")
                mark.set_gid(f"tip:{point.name}, {name}: {loss:.4f}")
        if any(len(point.losses) > place for point in points):
            axes.plot([], [], color=color, marker="o", linestyle="", label=name)
    for point in points:
        axes.plot([point.cost] * len(point.losses), point.losses, color=GRAY, linewidth=0.8, zorder=1)
        text = axes.annotate(str(point.number), (point.cost, point.losses[-1]), (6, -3), textcoords="offset points")
        text.set_fontweight("bold" if point.won else "normal")
        if point.won:
            label = f"winner: {point.name}"
            axes.scatter(point.cost, point.losses[-1], 110, "none", edgecolors=INK, zorder=3, label=label, gid="winner")
    front = _find_front([(point.cost, point.losses[0]) for point in points])
    axes.plot(*zip(*front, strict=True), color=GRAY, linestyle=":", label="Pareto front of the cuts", gid="front")
    axes.axvline(budget, color=PURPLE, linestyle="--", linewidth=1.2, label="budget", gid="budget")
    if floor is not None:
        axes.axhline(
            floor, color=ORANGE, linestyle="--", linewidth=1.2, label=f"corrected teacher: {floor:.3f}", gid="floor"
        )
    axes.set(xlabel=axis, ylabel="validation loss (nats per token)")
    axes.grid(axis="y")
    _add_legend(figure, axes.get_legend_handles_labels()[0])
    return _render_svg(figure, title)


def _find_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point beats in cost and loss, by cost."""
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


@matplotlib.rc_context(_SETTINGS)
def draw_layers(label: str, scores: Sequence[float], kept: set[int]) -> Markup:
    """Draw the block influence of every layer, with dropped layers hatched; `kept` counts from 0, the axis from 1."""
    figure, axes = _create_figure(width=WIDE)
    for layer, score in enumerate(scores):
        [bar] = axes.bar(layer + 1, score, 0.8, **_choose_fill(layer in kept))
        bar.set_gid(f"tip:Layer {layer + 1}: {score:.4g}, {'kept' if layer in kept else 'dropped'}")
    axes.set(xlabel="layer", ylabel=_scale_axis(axes, scores, "block influence"), xlim=(0.3, len(scores) + 0.7))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y")
    _add_legend(figure, _list_legend_patches("dropped" if len(kept) < len(scores) else None))
    return _render_svg(figure, label)


@matplotlib.rc_context(_SETTINGS)
def draw_ranking(label: str, scores: Sequence[float], kept: Sequence[int]) -> Markup:
    """Draw the scores of channels from the highest to the lowest; kept and cut channels are separate areas."""
    figure, axes = _create_figure()
    is_kept, start = np.isin(np.arange(len(scores)), kept), 1
    for part, state in ((is_kept, "kept"), (~is_kept, "cut")):
        values = np.sort(np.asarray(scores)[part])[::-1]
        if len(values):
            positions = downsample(np.arange(start, start + len(values)))
            area = axes.fill_between(positions, downsample(values), step="mid", **_choose_fill(state == "kept"))
            area.set_gid(f"tip:{len(values)} channels {state}: {values[0]:.4g} to {values[-1]:.4g}")
            start += len(values)
    ylabel = _scale_axis(axes, scores, "importance")
    axes.set(xlabel="channels, most important first", ylabel=ylabel, xlim=(0.5, len(scores) + 0.5))
    axes.grid(axis="y")
    _add_legend(figure, _list_legend_patches("cut" if len(kept) < len(scores) else None))
    return _render_svg(figure, label)


@matplotlib.rc_context(_SETTINGS)
def draw_layer_rankings(
    label: str, scores: Sequence[Sequence[float]], kept_layers: Sequence[int], count: int
) -> Markup:
    """Draw the scores of every layer's channels, sorted, as one row of colors; cut channels are pale.

    Args:
        label: text for screen readers.
        scores: scores of the channels of each layer.
        kept_layers: kept layers, counted from 0.
        count: number of kept channels in each of them.
    """
    figure, axes = _create_figure()
    ordered = -np.sort(-np.asarray(scores, dtype=float), axis=1)
    total, width = ordered.shape
    relative = ordered / np.maximum(np.median(ordered, axis=1, keepdims=True), np.finfo(float).tiny)
    drawn = np.log10(np.maximum(np.stack([downsample(row) for row in relative]), 1e-3))
    _draw_image(figure, axes, drawn, (0, width, total + 0.5, 0.5), "times the layer's median (log10)")
    for layer in range(total):
        left = count if layer in kept_layers else 0
        state = f"{count} of {width} channels kept" if left else "dropped with its channels"
        [bar] = axes.barh(layer + 1, width - left, 1, left, color=_PALE, linewidth=0)
        bar.set_gid(f"tip:Layer {layer + 1}: {state}")
    axes.set(xlabel="channels, most important first", ylabel="layer", xlim=(0, width), ylim=(total + 0.5, 0.5))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return _render_svg(figure, label)


@matplotlib.rc_context(_SETTINGS)
def draw_heads(
    label: str, axis: str, scores: Sequence[Sequence[float]], kept_layers: Sequence[int], kept: Sequence[Sequence[int]]
) -> Markup:
    """Draw the score of every head of every layer, relative to its layer's highest; cut heads are crossed out.

    Args:
        label: text for screen readers.
        axis: meaning of a column.
        scores: scores of the heads of each layer.
        kept_layers: kept layers, counted from 0.
        kept: kept heads in each of them.
    """
    figure, axes = _create_figure()
    values = np.asarray(scores, dtype=float)
    total, width = values.shape
    relative = values / np.maximum(values.max(axis=1, keepdims=True), np.finfo(float).tiny)
    _draw_image(figure, axes, relative, (0.5, width + 0.5, total + 0.5, 0.5), "share of the layer's highest")
    cut = np.ones_like(values, dtype=bool)
    for layer, heads in zip(kept_layers, kept, strict=True):
        cut[layer, list(heads)] = False
    rows, columns = np.nonzero(cut)
    for color, stroke in (("black", 2.2), ("white", 1.0)):
        size, name = 250 / max(total, 6), f"cut-{color}"
        axes.scatter(columns + 1, rows + 1, s=size, c=color, marker="x", linewidths=stroke, gid=name)
    axes.set(xlabel=axis, ylabel="layer", ylim=(total + 0.5, 0.5))
    for direction in (axes.xaxis, axes.yaxis):
        direction.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return _render_svg(figure, label)


@matplotlib.rc_context(_SETTINGS)
def draw_grouped_bars(
    label: str,
    axis: str,
    groups: list[str],
    series: dict[str, list[float | None]],
    errors: dict[str, list[tuple[float, float] | None]] | None = None,
    digits: int = 3,
) -> Markup:
    """Draw one bar per series in each group.

    Args:
        label: text for screen readers.
        axis: quantity and unit.
        groups: names under the axis.
        series: values by name, one per group, in the order of MODEL_COLORS; None leaves a gap.
        errors: the ends of each error bar.
        digits: decimal places of a value.
    """
    figure, axes = _create_figure(width=max(WIDTH, 1.6 * len(groups)))
    width = 0.84 / len(series)
    for index, (name, values) in enumerate(series.items()):
        for group, value in enumerate(values):
            if value is not None:
                center = group + (index + 0.5) * width - 0.42
                bar = axes.bar(center, value, 0.9 * width, color=MODEL_COLORS[index])[0]
                error = errors[name][group] if errors else None
                text = _annotate_bar(axes, center, value, error, digits)
                bar.set_gid(f"tip:{name}, {groups[group]}: {text}")
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(axis)
    axes.margins(y=0.12)
    axes.grid(axis="y")
    _add_legend(figure, [Patch(color=color, label=name) for name, color in zip(series, MODEL_COLORS, strict=False)])
    return _render_svg(figure, label)


def _annotate_bar(axes: Axes, center: float, value: float, error: tuple[float, float] | None, digits: int) -> str:
    """Draw a bar's error bar and value; return the two as text."""
    text = f"{value:.{digits}f}"
    top = max(value, error[1]) if error else value
    axes.annotate(text, (center, top), (0, 2), textcoords="offset points", ha="center", fontsize=7.5)
    if error is None:
        return text
    low, high = error
    lengths = [[max(value - low, 0)], [max(high - value, 0)]]
    axes.errorbar(center, value, lengths, color=INK, linewidth=1, capsize=2.5)
    return f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def downsample(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return at most MOST_POINTS values, each the mean of equally many neighbors."""
    numbers = np.asarray(values, dtype=float)
    if len(numbers) <= MOST_POINTS:
        return numbers
    return np.array([part.mean() for part in np.array_split(numbers, MOST_POINTS)])


def _choose_fill(kept: bool) -> dict[str, Any]:
    """Return the fill of a kept or a cut part; a hatch distinguishes them without color."""
    if kept:
        return {"facecolor": GREEN, "edgecolor": GREEN}
    return {"facecolor": "none", "edgecolor": ORANGE, "hatch": "////"}


def _list_legend_patches(cut: str | None) -> list[Patch]:
    return [Patch(**_choose_fill(True), label="kept"), *([Patch(**_choose_fill(False), label=cut)] if cut else [])]


def _scale_axis(axes: Axes, scores: Sequence[float], label: str) -> str:
    """Make the axis logarithmic if scores differ by orders of magnitude; return the axis label."""
    lowest, highest = min(scores), max(scores)
    if lowest <= 0 or highest / lowest < _LOG_RATIO:
        axes.set_ylim(bottom=0)
        return label
    axes.set_yscale("log")
    axes.set_ylim(bottom=lowest / 2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    return f"{label} (log scale)"


def _draw_image(
    figure: Figure, axes: Axes, values: np.ndarray, extent: tuple[float, float, float, float], label: str
) -> None:
    lowest, highest = np.percentile(values, (1, 99))  # else a few outliers would leave one color for all others
    limits: dict[str, Any] = {"vmin": lowest, "vmax": highest, "extent": extent}
    drawn = axes.imshow(values, "cividis", aspect="auto", interpolation="none", **limits)
    bar = figure.colorbar(drawn, ax=axes, label=label, fraction=0.05, pad=0.02, extend="both")
    bar.solids.set_rasterized(True)  # type: ignore[union-attr]  # otherwise 256 shapes
    bar.outline.set_visible(False)


def _create_figure(width: float = WIDTH, height: float = 3.1) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _add_legend(figure: Figure, handles: list[Any]) -> None:
    if handles:
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=4 if len(handles) < 5 else 3,
            fontsize=8.5,
            handlelength=1.4,
        )


def _render_svg(figure: Figure, label: str) -> Markup:
    """Return the figure as an SVG element that scales, takes its colors from the page and shares no id with it."""
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": label}):  # ids are hashes of this and of what they name
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))
