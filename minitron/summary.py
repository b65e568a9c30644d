"""What a run ends with: summary.json, and its tables or, where nothing was trained, why not."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minitron.config import metrics
from minitron.config.stages import STAGES
from minitron.report import tables
from minitron.storage.layout import CONCLUSION, PAGE, RECORD, REPORT
from minitron.tracking.client import shown


def write(pipeline: str, results: Path, work_dir: Path, tracking_uri: str) -> None:
    """Write `<work_dir>/summary.json` and `report.html`, and print the tables.

    Args:
        pipeline: the pipeline's name.
        results: directory of the tasks' outputs; each stage's holds its stage.json.
        work_dir: the run's directory.
        tracking_uri: where the run was logged.
    """
    found: dict[str, Any] = {"pipeline": pipeline}
    console = make_console(120)
    pages = []
    if (outputs := _outputs(results)).keys() == STAGES.keys():
        evaluation = _read(outputs["evaluate"] / "evaluation.json")
        found |= summarise(outputs, evaluation)
        _print_compression(console, found, evaluation)
        pages.append(outputs["evaluate"] / REPORT)
    decisions = [*results.glob("promote/*/promoted.json"), *results.glob(f"conclude/*/{CONCLUSION}")]
    for path in decisions:
        found |= {name: value for name, value in _read(path).items() if name in ("outcome", "reason")}
        pages += [page for page in [path.with_name(PAGE)] if page.is_file()]
    if decisions:
        console.print(f"{found['outcome']}: {found['reason']}", soft_wrap=True)
    (work_dir / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    for page in pages[:1]:
        shutil.copyfile(page, work_dir / REPORT)
        console.print(f"report:     {work_dir / REPORT}", soft_wrap=True)
    console.print(f"MLflow:     {_page(tracking_uri)}", soft_wrap=True)


def make_console(width: int) -> Console:
    """Return what tables are printed on; brackets and colons of names and paths stay as they are.

    Args:
        width: columns, where the output is no terminal.
    """
    return Console(width=None if sys.stdout.isatty() else width, markup=False, emoji=False)


def _outputs(results: Path) -> dict[str, Path]:
    """Return the output directories of the stages that ran."""
    found = {stage: next(results.glob(f"{stage}/*/{RECORD}"), None) for stage in STAGES}
    return {stage: path.parent for stage, path in found.items() if path}


def _print_compression(console: Console, found: dict[str, Any], evaluation: dict[str, Any]) -> None:
    registered = found["registered"]
    console.print(_models_table(evaluation))
    if evaluation["gates"]:
        console.print(gates_table(evaluation["gates"]))
    console.print(_stages_table(found["stages"]))
    console.print(f"gap closed: {_closed(evaluation['gap_closed'])}")
    console.print(f"registered: {registered['name']} version {registered['version']}, alias {registered['alias']}")


def summarise(outputs: dict[str, Path], evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return what summary.json says of a compression, from the stages' output directories and the evaluation."""
    records = {stage: _read(directory / RECORD) for stage, directory in outputs.items()}
    registered = _read(outputs["register"] / "registered.json")
    keys = ("parameters", "validation_loss", "perplexity", "tasks")
    return {
        "stages": {
            stage: {key: record[key] for key in ("seconds", "peak_rss_mb")} for stage, record in records.items()
        },
        **{model: {key: evaluation[model][key] for key in keys} for model in metrics.MODELS},
        "distill": {key: records["distill"]["metrics"][key] for key in ("tokens", "tokens_per_second")},
        "registered": {key: registered[key] for key in ("name", "version", "alias")},
    }


def _page(tracking_uri: str) -> str:
    """Return the address of the MLflow page, or the command that opens it, as it can be typed here."""
    if tracking_uri.startswith("http"):
        return shown(tracking_uri)
    program = "mlflow" if shutil.which("mlflow") else Path(sys.executable).with_name("mlflow")
    return f"{program} ui --backend-store-uri {shown(tracking_uri)}"


def _models_table(evaluation: dict[str, Any]) -> Table:
    tasks = list(evaluation["student"]["tasks"])
    columns = ["parameters", "validation loss", "perplexity", *tasks, "generation tokens/s"]
    table = Table("model", title="Models")
    for column in columns:
        table.add_column(column, justify="right")
    for model, label in tables.models_of(evaluation).items():
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
    """Return judged gates, as evaluation.json has them, as a table."""
    table = Table("gate", "found", "threshold", "margin", "outcome", title="Gates")
    for row in tables.gates({"gates": gates}):
        table.add_row(row["words"], row["found"], row["threshold"], row["margin"], f"{row['mark']} {row['outcome']}")
    return table


def _stages_table(stages: dict[str, Any]) -> Table:
    table = Table("", *stages, title="Stages")
    table.add_row("seconds", *(f"{entry['seconds']:.0f}" for entry in stages.values()))
    table.add_row("peak memory, MB", *(f"{entry['peak_rss_mb']:.0f}" for entry in stages.values()))
    return table


def _closed(gap: float | None) -> str:
    return "none to close" if gap is None else f"{gap:.0%} of the validation loss between pruned and teacher"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
