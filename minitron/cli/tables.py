"""The tables that the commands print."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from minitron.config.metrics import format_count
from minitron.config.resources import Models
from minitron.config.resources.estimate import Advice, StageEstimate
from minitron.config.resources.gpus import Gpu
from minitron.registry.gates import render_gate
from minitron.report import tables
from minitron.report.plan import PLAN_COLUMNS, format_gb, list_plan_notes, list_plan_rows


def print_table(columns: list[str], rows: list[list[Any]]) -> None:
    """Print rows under their columns, at most as wide as the terminal."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    make_console().print(table)


def make_console(width: int = 200) -> Console:
    """Return the console for tables, which prints brackets and colons of names and paths unchanged.

    Args:
        width: columns, if the output is not a terminal.
    """
    return Console(width=None if sys.stdout.isatty() else width, markup=False, emoji=False)


def models_table(evaluation: dict[str, Any]) -> Table:
    """Return the models' metrics from evaluation.json as a table."""
    tasks = list(evaluation["student"]["tasks"])
    columns = ["parameters", "validation loss", "perplexity", *tasks, "generation tokens/s"]
    table = Table("model", title="Models")
    for column in columns:
        table.add_column(column, justify="right")
    for model, label in tables.label_models(evaluation).items():
        found = evaluation[model]
        if "parameters" not in found:
            continue  # a champion that cannot read this data
        table.add_row(
            label,
            f"{found['parameters'] / 1e6:.1f} M",
            f"{found['validation_loss']:.3f}",
            f"{found['perplexity']:.1f}",
            *(f"{found['tasks'][task]['acc']:.1%}" for task in tasks),
            f"{found['generation_tokens_per_second']:.1f}",
        )
    return table


def gates_table(gates: list[dict[str, Any]]) -> Table:
    """Return judged gates from evaluation.json as a table."""
    table = Table("gate", "found", "threshold", "margin", "outcome", title="Gates")
    for gate in map(render_gate, gates):
        table.add_row(
            gate["label"],
            f"{gate['found']} {gate['interval']}".strip(),
            gate["threshold"],
            gate["margin"],
            f"{gate['mark']} {gate['outcome']}",
        )
    return table


def stages_table(stages: dict[str, Any]) -> Table:
    """Return the cost of the stages as a table."""
    table = Table("", *stages, title="Stages")
    table.add_row("seconds", *(f"{entry['seconds']:.0f}" for entry in stages.values()))
    table.add_row("peak memory, MB", *(f"{entry['peak_rss_mb']:.0f}" for entry in stages.values()))
    return table


def print_plan(models: Models, gpu: Gpu | None, estimates: Mapping[str, StageEstimate], advice: Advice | None) -> None:
    """Print what every stage needs, what its GPUs hold, where the figures come from, and the recommended settings."""
    device = "no GPU"
    if gpu:
        device = f"{gpu.name}: {gpu.memory / 1e9:.0f} GB, {gpu.peak / 1e12:.0f} TFLOP/s (data sheet: {gpu.sheet}, bf16)"
    print(f"teacher {format_count(models.teacher)}, student {format_count(models.student)} parameters; {device}\n")
    columns, rows = ["stage", *PLAN_COLUMNS], list_plan_rows(estimates)
    for part in (slice(1, 7), slice(7, None)):  # side by side they would not fit a terminal of 80 columns
        print_table(["stage", *columns[part]], [[row[0], *row[part]] for row in rows])
        print()
    terms = [
        [stage, phase.name, format_gb(phase.total), _join_terms(phase.terms)]
        for stage, entry in estimates.items()
        for phase in entry.phases
    ]
    if terms:
        print_table(["stage", "while", "on a GPU", "which is, in GB"], terms)
        print()
    for note in list_plan_notes(estimates):
        print(note)
    if advice:
        hours = f"{advice.seconds / 3600:.2f} hours of training"
        print(f"recommended, as a preset: at most {format_gb(advice.peak)} on a GPU, {hours}\n")
        print(advice.as_preset(), end="")


def _join_terms(terms: list[Any]) -> str:
    return " + ".join(f"{term.size / 1e9:.1f} {term.meaning}" for term in terms)
