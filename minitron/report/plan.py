"""What a run needs as rows of a table, for `minitron plan` and for the page of the task plan."""

from collections.abc import Mapping

from minitron.config.metrics import DASH, format_count, format_share
from minitron.config.resources import find_peak, total
from minitron.config.resources.estimate import StageEstimate

PLAN_COLUMNS = (
    "engine", "GPUs", "GPU memory", "host memory", "cpu", "disk", "tokens", "FLOP", "MFU", "hours", "GPU-hours",
)  # fmt: skip
"""The columns beside the stage."""


def list_plan_rows(estimates: Mapping[str, StageEstimate]) -> list[list[str]]:
    """Return a row per stage, and one for all of them: the stage, then PLAN_COLUMNS."""
    rows = [[stage, *_make_cells(entry)] for stage, entry in estimates.items()]
    disk = sum(total(entry.disk) for entry in estimates.values())
    hours = sum(entry.seconds or 0.0 for entry in estimates.values()) / 3600
    gpu_hours = sum(entry.gpu_hours for entry in estimates.values())
    return [*rows, ["together", *[""] * 5, format_gb(disk), *[""] * 3, f"{hours:.2f}", f"{gpu_hours:.2f}"]]


def _make_cells(entry: StageEstimate) -> list[str]:
    return [
        entry.engine or DASH,
        f"{entry.nodes} x {entry.gpus // entry.nodes}" if entry.nodes > 1 else str(entry.gpus or DASH),
        format_gb(find_peak(entry.phases).total) if entry.phases else DASH,
        entry.memory,
        entry.cpu,
        format_gb(total(entry.disk)) if entry.disk else DASH,
        format_count(entry.tokens) if entry.tokens else DASH,
        f"{entry.operations:.1e}" if entry.operations else DASH,
        format_share(entry.utilization.share).replace(".0", "") if entry.utilization else DASH,
        DASH if entry.seconds is None else f"{entry.seconds / 3600:.2f}",
        f"{entry.gpu_hours:.2f}" if entry.utilization else DASH,
    ]


def list_plan_notes(estimates: Mapping[str, StageEstimate]) -> list[str]:
    """Return where the figures for the time come from, and what they leave out."""
    stages: dict[str, list[str]] = {}
    for stage, entry in estimates.items():
        if entry.utilization:
            text = f"MFU {entry.utilization.share:.0%}: {entry.utilization.source}"
            stages.setdefault(text, []).append(stage)
        elif entry.seconds is not None:
            stages.setdefault("hours at 0.1 TFLOP/s, as two CPU cores reach in docs/tutorial.md", []).append(stage)
    notes = [f"{', '.join(names)}: {text}" for text, names in stages.items()]
    return [*notes, "not in it: prepare, tasks without a task_limit, start-up, downloads, uploads"]


def format_gb(size: float) -> str:
    """Write bytes as GB of 1e9 bytes."""
    return f"{size / 1e9:,.1f} GB"
