"""The end of a run: summary.json, and the tables or, if no model was trained, the reason."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from minitron.cli.tables import gates_table, make_console, models_table, stages_table
from minitron.config import metrics
from minitron.config.stages import STAGES
from minitron.errors import without_password
from minitron.storage.layout import (
    CONCLUSION,
    CONCLUSION_PAGE,
    EVALUATION,
    PROMOTED,
    RECORD,
    REGISTERED,
    REPORT,
    SEARCH,
    SEARCH_PAGE,
    SUMMARY,
    WINNER,
)


def write_summary(pipeline: str, results: Path, work_dir: Path, tracking_uri: str) -> None:
    """Write `<work_dir>/summary.json` and `report.html`, and print the tables.

    Args:
        pipeline: the pipeline's name.
        results: directory of the tasks' outputs; each stage's directory has its stage.json.
        work_dir: the run's directory.
        tracking_uri: MLflow server of the run.
    """
    summary: dict[str, Any] = {"pipeline": pipeline}
    console = make_console(120)
    pages = []
    if (outputs := _find_outputs(results)).keys() == STAGES.keys():
        evaluation = _read_json(outputs["evaluate"] / EVALUATION)
        summary |= summarize_compression(outputs, evaluation)
        _print_compression(console, summary, evaluation, outputs["distill"])
        pages.append(outputs["evaluate"] / REPORT)
    pages += _collect_search(console, summary, results, work_dir)
    decisions = [*results.glob(f"promote/*/{PROMOTED}"), *results.glob(f"conclude/*/{CONCLUSION}")]
    for path in decisions:
        summary |= {name: value for name, value in _read_json(path).items() if name in ("outcome", "reason")}
        pages += [page for page in [path.with_name(CONCLUSION_PAGE)] if page.is_file()]
    if decisions:
        console.print(f"{summary['outcome']}: {summary['reason']}", soft_wrap=True)
    (work_dir / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    for page in pages[:1]:
        shutil.copyfile(page, work_dir / REPORT)
        console.print(f"report:     {work_dir / REPORT}", soft_wrap=True)
    console.print(f"MLflow:     {_tracking_page(tracking_uri)}", soft_wrap=True)


def _collect_search(console: Console, summary: dict[str, Any], results: Path, work_dir: Path) -> list[Path]:
    """Copy the files of a search into the run's directory, and print its winner; return its page, if there is one."""
    if not (pages := sorted(results.glob(f"select*/*/{SEARCH_PAGE}"))):
        return []
    search = _read_json(pages[-1].with_name(SEARCH))
    summary["search"] = {name: search[name] for name in ("budget", "winner", "settings")}
    for name in (SEARCH, SEARCH_PAGE, WINNER):
        shutil.copyfile(pages[-1].with_name(name), work_dir / name)
    failed = [f"{row['name']} ({row['error']})" for row in search["candidates"] if row["error"]]
    if failed:
        console.print(f"failed:     {'; '.join(failed)}", soft_wrap=True)
    console.print(f"winner:     {search['winner']}, of {len(search['candidates'])} candidates", soft_wrap=True)
    console.print(f"race:       {work_dir / SEARCH_PAGE}", soft_wrap=True)
    console.print(f"as preset:  {work_dir / WINNER}", soft_wrap=True)
    return pages[-1:]


def _find_outputs(results: Path) -> dict[str, Path]:
    """Return the output directories of the stages that ran."""
    records = {stage: next(results.glob(f"{stage}/*/{RECORD}"), None) for stage in STAGES}
    return {stage: path.parent for stage, path in records.items() if path}


def _print_compression(console: Console, summary: dict[str, Any], evaluation: dict[str, Any], student: Path) -> None:
    registered = summary["registered"]
    console.print(models_table(evaluation))
    if evaluation["gates"]:
        console.print(gates_table(evaluation["gates"]))
    console.print(stages_table(summary["stages"]))
    console.print(f"gap closed: {_format_gap(evaluation['gap_closed'])}")
    console.print(f"registered: {registered['name']} version {registered['version']}, alias {registered['alias']}")
    console.print(f"student:    {student}", soft_wrap=True)


def summarize_compression(outputs: dict[str, Path], evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of summary.json for a compression, from the stages' output directories and the evaluation."""
    records = {stage: _read_json(directory / RECORD) for stage, directory in outputs.items()}
    registered = _read_json(outputs["register"] / REGISTERED)
    keys = ("parameters", "validation_loss", "perplexity", "tasks")
    return {
        "stages": {
            stage: {key: record[key] for key in ("seconds", "peak_rss_mb")} for stage, record in records.items()
        },
        **{model: {key: evaluation[model][key] for key in keys} for model in metrics.MODELS},
        "distill": {key: records["distill"]["metrics"][key] for key in ("tokens", "tokens_per_second")},
        "registered": {key: registered[key] for key in ("name", "version", "alias")},
    }


def _tracking_page(tracking_uri: str) -> str:
    """Return the URL of the MLflow page, or the command that opens it on this machine."""
    if tracking_uri.startswith("http"):
        return without_password(tracking_uri)
    program = "mlflow" if shutil.which("mlflow") else Path(sys.executable).with_name("mlflow")
    return shlex.join([str(program), "ui", "--backend-store-uri", without_password(tracking_uri)])


def _format_gap(gap: float | None) -> str:
    return "none to close" if gap is None else f"{gap:.0%} of the validation loss between pruned and teacher"


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
