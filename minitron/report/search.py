"""The page of a search: every candidate of the race, on a Pareto plot and in a table.

Used by minitron/stages/select.py, which writes it before the first round and after each.
"""

from pathlib import Path
from typing import Any

import yaml

from minitron import __version__
from minitron.config.metrics import format_loss
from minitron.report import charts, render_page
from minitron.storage.layout import SEARCH_PAGE

_UNITS = {
    "parameters": ("parameters (millions)", 1e6, "{:,.0f} parameters"),
    "memory_gb": ("GB of weights and key-value cache", 1.0, "{:.4g} GB"),
    "latency_ms": ("milliseconds of a forward pass", 1.0, "{:.4g} ms"),
}
_STATES = {"won": 0, "racing": 1, "eliminated": 2, "failed": 3}


def write_search_page(directory: Path, content: dict[str, Any]) -> None:
    """Write `search.html` into a directory.

    Args:
        directory: directory for the file.
        content: the content of search.json.
    """
    name, budget = next((name, value) for name, value in content["budget"].items() if name in _UNITS)
    axis, unit, form = _UNITS[name]
    rows = [{"number": number} | row for number, row in enumerate(sort_candidates(content["candidates"]), 1)]
    rounds = ["of the cut", *(f"at {steps} steps" for steps in content["steps"][1:])]
    points = [
        charts.RacedPoint(row["cost"] / unit, row["losses"], row["number"], row["name"], row["state"] == "won")
        for row in rows
        if row["losses"]
    ]
    chart = None
    if points:
        losses = "; ".join(f"{point.name} {', '.join(map(format_loss, point.losses))}" for point in points)
        label = f"Validation losses of the candidates over their {axis}: {losses}"
        chart = charts.draw_race(label, axis, points, rounds, budget / unit, content["teacher"]["loss"])
    page = {
        **content,
        "name": name,
        "cost_label": "Latency" if name == "latency_ms" else "Parameters",
        "budget_text": form.format(budget),
        "form": form.format,
        "rows": rows,
        "rounds": rounds,
        "chart": chart,
        "document": content["settings"] and yaml.safe_dump(content["settings"], sort_keys=False),
        "version": __version__,
    }
    (directory / SEARCH_PAGE).write_text(render_page("search.html.j2", page), encoding="utf-8")


def sort_candidates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the candidates by their success: the rounds that they lasted, then the loss of the last one."""
    return sorted(
        rows, key=lambda row: (_STATES[row["state"]], -len(row["losses"]), row["losses"][-1] if row["losses"] else 0)
    )
