"""The charts of the report, as inline SVG that follows the page's light or dark colours.

Used by minitron/report.py, which `python -m minitron.evaluate --config FILE` calls.
"""

import io
import itertools
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, GREY, BLUE, ORANGE, GREEN = "#010203", "#888888", "#0072b2", "#d55e00", "#009e73"
"""Text and lines, then colours of Okabe and Ito that the colour-blind tell apart."""

_PAGE_COLOURS = {
    INK: "currentColor",
    GREY: "var(--grey)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
}
KEPT, CUT = GREEN, ORANGE
MODEL_COLOURS = (GREY, BLUE, ORANGE, GREEN)

MOST_POINTS = 400
"""A chart is about as many pixels wide: more points would only make the page larger."""

_LOG_RATIO = 20
_REWRITES = (
    (r' width="[\d.]+pt" height="[\d.]+pt"', ""),
    (r"<style.*?</style>", ""),  # it would hold for the whole page
    (r"font-family: [^;\"]*; ?", ""),
    (r'<g id="tip:([^"]*)">', r"<g><title>\1</title>"),
    (r'<g id="[\w.]+_\d+">', "<g>"),
    (r'<g id="([\w-]+)">', r'<g class="\1">'),
    *((colour, name) for colour, name in _PAGE_COLOURS.items()),
)
"""What makes matplotlib's SVG part of a page; a gid becomes a class, or a tooltip when it is 'tip:TEXT'."""

_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
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
    "grid.color": GREY,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}
Points = tuple[Sequence[float], Sequence[float]]


def curves(
    label: str,
    axis: str,
    training: Points | None = None,
    validation: Points | None = None,
    floor: float | None = None,
    kept: int | None = None,
) -> Markup:
    """Draw a quantity over optimizer steps.

    Args:
        label: what the chart shows, for those who cannot see it.
        axis: quantity and unit.
        training: steps and values on training batches; long ones are averaged to MOST_POINTS.
        validation: steps and values on the validation split, drawn with markers.
        floor: the teacher's value, drawn as a line.
        kept: the step whose weights the stage kept.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _figure()
        if training and len(training[0]):
            steps, values = (thin(numbers) for numbers in training)
            axes.plot(steps, values, color=BLUE, linewidth=1, alpha=0.75, label="training", gid="training")
        if validation and len(validation[0]):
            axes.plot(*validation, color=ORANGE, marker="o", markersize=4, label="validation", gid="validation")
            if kept in validation[0]:
                at = kept, validation[1][list(validation[0]).index(kept)]
                ring = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "linestyle": "none"}
                axes.plot(*[[value] for value in at], color=INK, label=f"kept: step {kept}", gid="kept", **ring)
        if floor is not None:
            axes.axhline(floor, color=GREEN, linestyle="--", linewidth=1.4, label=f"teacher: {floor:.3f}", gid="floor")
        axes.set(xlabel="optimizer step", ylabel=axis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        _legend(figure, axes)
        return _svg(figure, label)


def layers(label: str, scores: Sequence[float], kept: set[int]) -> Markup:
    """Draw the block influence of every layer, the dropped ones hatched; layers are counted from 0 here, 1 on the axis."""
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _figure()
        numbers = range(1, len(scores) + 1)
        for number, score in zip(numbers, scores, strict=True):
            style = _mark(number - 1 in kept)
            [bar] = axes.bar(number, score, 0.8, **style)
            bar.set_gid(f"tip:Layer {number}: {score:.4g}, {'kept' if number - 1 in kept else 'dropped'}")
        axes.set(xlabel="layer", ylabel=_scale(axes, scores, "block influence"))
        axes.set_xlim(0.3, len(scores) + 0.7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(axis="y")
        _legend(figure, axes, _kept_and("dropped" if len(kept) < len(scores) else None))
        return _svg(figure, label)


def ranked(label: str, scores: Sequence[float], kept: Sequence[int]) -> Markup:
    """Draw the scores of channels from the highest to the lowest, the kept ones and the cut ones apart."""
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _figure()
        is_kept = np.isin(np.arange(len(scores)), kept)
        start = 1
        for part, state in ((is_kept, True), (~is_kept, False)):
            values = np.sort(np.asarray(scores)[part])[::-1]
            if not len(values):
                continue
            places = np.arange(start, start + len(values))
            drawn = axes.fill_between(thin(places), thin(values), step="mid", **_mark(state))
            drawn.set_gid(f"tip:{len(values)} channels {'kept' if state else 'cut'}, {values[0]:.4g} to {values[-1]:.4g}")
            start += len(values)
        axes.set(xlabel="channels, most important first", ylabel=_scale(axes, scores, "importance"))
        axes.set_xlim(0.5, len(scores) + 0.5)
        axes.grid(axis="y")
        _legend(figure, axes, _kept_and("cut" if len(kept) < len(scores) else None))
        return _svg(figure, label)


def ranked_by_layer(label: str, scores: Sequence[Sequence[float]], kept_layers: Sequence[int], count: int) -> Markup:
    """Draw the scores of every layer's channels, sorted, as one row of colours; what is cut is hatched.

    Args:
        label: what the chart shows, for those who cannot see it.
        scores: of the channels of each layer.
        kept_layers: counted from 0.
        count: channels kept in each of them.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _figure()
        ordered = -np.sort(-np.asarray(scores, dtype=float), axis=1)
        total, width = ordered.shape
        drawn = np.stack([thin(row) for row in _logarithm(ordered)])
        _image(figure, axes, drawn, (0, width, total + 0.5, 0.5), "importance (log10)")
        for layer in range(total):
            left = count if layer in kept_layers else 0
            state = f"{count} of {width} channels kept" if left else "dropped with its layer"
            axes.barh(layer + 1, width - left, 1, left, **_CUT_CELLS, gid=None)[0].set_gid(
                f"tip:Layer {layer + 1}: {state}"
            )
        if count < width:
            axes.axvline(count, color="white", linewidth=1.6)
        axes.set(xlabel="channels, most important first", ylabel="layer", xlim=(0, width), ylim=(total + 0.5, 0.5))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _legend(figure, axes, [Patch(**_CUT_CELLS, label="cut")] if count < width or len(kept_layers) < total else [])
        return _svg(figure, label)


def cells(
    label: str, axis: str, scores: Sequence[Sequence[float]], kept_layers: Sequence[int], kept: list[list[int]]
) -> Markup:
    """Draw the score of every head of every layer, relative to its layer's highest; what is cut is crossed out.

    Args:
        label: what the chart shows, for those who cannot see it.
        axis: what a column is.
        scores: of the heads of each layer.
        kept_layers: counted from 0.
        kept: heads kept in each of them.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _figure()
        values = np.asarray(scores, dtype=float)
        total, width = values.shape
        relative = values / np.maximum(values.max(axis=1, keepdims=True), np.finfo(float).tiny)
        _image(figure, axes, relative, (0.5, width + 0.5, total + 0.5, 0.5), "share of the layer's highest")
        stays = set(itertools.chain.from_iterable(((layer, head) for head in heads) for layer, heads in zip(kept_layers, kept, strict=True)))
        cut = [(layer, head) for layer in range(total) for head in range(width) if (layer, head) not in stays]
        if cut:
            rows, columns = (np.array(part) + 1 for part in zip(*cut, strict=True))
            size = 200 / max(total, width) ** 1.0
            for colour, stroke in (("black", 2.4), ("white", 1.1)):
                axes.scatter(columns, rows, size, colour, "x", linewidths=stroke, gid=f"cut-{colour}", label="cut")
        axes.set(xlabel=axis, ylabel="layer", ylim=(total + 0.5, 0.5))
        for direction in (axes.xaxis, axes.yaxis):
            direction.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return _svg(figure, label)


def grouped_bars(
    label: str,
    axis: str,
    groups: list[str],
    series: dict[str, list[float | None]],
    errors: dict[str, list[float | None]] | None = None,
    form: str = "{:.3f}",
) -> Markup:
    """Draw one bar per series in each group.

    Args:
        label: what the chart shows, for those who cannot see it.
        axis: quantity and unit.
        groups: names under the axis.
        series: values by name, one per group, in the order of MODEL_COLOURS; None leaves a gap.
        errors: half the length of each error bar.
        form: how a value is written.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _figure(width=max(5.6, 1.6 * len(groups)))
        step = 0.84 / len(series)
        for place, (name, values) in enumerate(series.items()):
            for group, value in enumerate(values):
                if value is None:
                    continue
                error = errors[name][group] if errors else None
                left = group - 0.42 + (place + 0.5) * step
                [bar] = axes.bar(left, value, step * 0.9, color=MODEL_COLOURS[place])
                written = form.format(value) + (f" ± {form.format(error)}" if error else "")
                bar.set_gid(f"tip:{name}, {groups[group]}: {written}")
                if error:
                    axes.errorbar(left, value, error, color=INK, linewidth=1, capsize=2.5)
                axes.annotate(
                    form.format(value), (left, value + (error or 0)), (0, 2), textcoords="offset points",
                    ha="center", fontsize=7.5,
                )
        axes.set_xticks(range(len(groups)), groups)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel(axis)
        axes.margins(y=0.12)
        axes.grid(axis="y")
        _legend(figure, axes, [Patch(color=MODEL_COLOURS[place], label=name) for place, name in enumerate(series)])
        return _svg(figure, label)


def thin(values: Sequence[float]) -> np.ndarray:
    """Return at most MOST_POINTS values, each the mean of as many neighbours as need be."""
    numbers = np.asarray(values, dtype=float)
    if len(numbers) <= MOST_POINTS:
        return numbers
    return np.array([part.mean() for part in np.array_split(numbers, MOST_POINTS)])


_CUT_CELLS: dict[str, Any] = {"facecolor": "#ffffff55", "edgecolor": "#ffffff", "hatch": "////", "linewidth": 0}


def _mark(kept: bool) -> dict[str, Any]:
    """Return the look of what is kept or cut: they differ in more than their colour."""
    return {"facecolor": KEPT if kept else "none", "edgecolor": KEPT if kept else CUT, "hatch": None if kept else "////"}


def _kept_and(cut: str | None) -> list[Patch]:
    return [Patch(**_mark(True), label="kept"), *([Patch(**_mark(False), label=cut)] if cut else [])]


def _scale(axes: Axes, scores: Sequence[float], label: str) -> str:
    """Make the axis logarithmic when scores differ by orders of magnitude; return the axis label."""
    lowest, highest = min(scores), max(scores)
    if lowest <= 0 or highest / lowest < _LOG_RATIO:
        axes.set_ylim(bottom=0)
        return label
    axes.set_yscale("log")
    axes.set_ylim(bottom=lowest / 2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    return f"{label} (log scale)"


def _logarithm(values: np.ndarray) -> np.ndarray:
    positive = values[values > 0]
    return np.log10(np.maximum(values, positive.min() if len(positive) else 1.0))


def _image(figure: Figure, axes: Axes, values: np.ndarray, extent: tuple[float, ...], label: str) -> None:
    drawn = axes.imshow(values, "cividis", aspect="auto", interpolation="none", extent=extent)
    bar = figure.colorbar(drawn, ax=axes, label=label, fraction=0.05, pad=0.02)
    bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)


def _figure(width: float = 5.6, height: float = 3.1) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Figure, axes: Axes, handles: list[Any] | None = None) -> None:
    found = axes.get_legend_handles_labels()[0] if handles is None else handles
    if found:
        figure.legend(handles=found, loc="outside upper left", ncols=4, fontsize=8.5, handlelength=1.4)


def _svg(figure: Figure, label: str) -> Markup:
    """Return the figure as an SVG element that scales, takes its colours from the page and shares no id with it."""
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": label}):  # ids are hashes of this and of what they name
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))
