"""The `minitron` command.

Run a compiled pipeline on this machine: `minitron run compress --preset demo --work-dir runs/demo`.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from minitron import __version__, samples, summary
from minitron.errors import MinitronError, RunError
from minitron.presets import SAMPLES, check_arguments, compiled_pipeline, read_arguments
from minitron.stage import FAILURE

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command; the entry point `minitron`."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Compress a large language model: prepare → finetune → prune → distill → evaluate → register."""


@app.command()
def run(
    pipeline: Annotated[str, typer.Argument(help="Pipeline to run: compress.")],
    preset: Annotated[str, typer.Option(help="Name of a preset that ships with the package, or a YAML file.")],
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value over the preset; repeatable.")] = None,
    work_dir: Annotated[Path, typer.Option(help="Inputs, results, tracking and summary of the run.")] = Path("runs"),
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run a pipeline on this machine; run it again to resume it and to reuse what is finished."""
    try:
        _run(pipeline, preset, settings or [], work_dir.absolute())
    except MinitronError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_status) from None


def _run(pipeline: str, preset: str, settings: list[str], work_dir: Path) -> None:
    documents = compiled_pipeline(pipeline)
    parameters = documents[0]["root"]["inputDefinitions"]["parameters"]
    arguments = read_arguments(preset, settings, list(parameters))
    sample = arguments.pop(SAMPLES, None)
    if sample:
        inputs = samples.paths(sample, work_dir / "inputs")
        arguments = {name: str(path) for name, path in inputs.items()} | arguments
    required = [name for name, entry in parameters.items() if not entry.get("isOptional")]
    check_arguments(arguments, required)
    if sample:
        samples.build(sample, work_dir / "inputs")
        os.environ["HF_HUB_OFFLINE"] = "1"
    arguments.setdefault("tracking_uri", os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{work_dir}/mlflow.db")
    results = _run_locally(documents, arguments, work_dir)
    summary.write(pipeline, results, work_dir, arguments["tracking_uri"])


def _run_locally(documents: list[dict[str, Any]], arguments: dict[str, Any], work_dir: Path) -> Path:
    """Run the compiled pipeline in subprocesses of this Python; return the directory of the tasks' outputs.

    Raises:
        MinitronError: a stage failed, with the stage's own message and exit status.
    """
    from kfp import components, local

    for task in documents[0]["root"]["dag"]["tasks"].values():
        task.pop("retryPolicy", None)  # for lost nodes: here the same failure would come again after each wait
    workspace, results = work_dir / "workspace", work_dir / "results"
    failure = workspace / FAILURE
    failure.unlink(missing_ok=True)
    earlier = set(results.glob("*"))
    os.environ |= {"MINITRON_WORKSPACE": str(workspace), "PYTHONUNBUFFERED": "1"}
    os.environ.setdefault("TQDM_MININTERVAL", "10")
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(results))
    run_pipeline = components.load_component_from_text(yaml.safe_dump_all(documents))
    try:
        with _quiet():
            run_pipeline(**arguments)
    except RuntimeError as error:
        raise _explain(failure) from error
    return next(path for path in results.glob("*") if path not in earlier)


def _explain(failure: Path) -> MinitronError:
    if not failure.is_file():
        return RunError("a stage ended without a message; see its output above, then run the command again to resume")
    found = json.loads(failure.read_text())
    error = RunError(f"{found['stage']}: {found['message']}")
    error.exit_status = found["exit_status"]
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the KFP executor says of itself: it would bury the progress bars."""
    stdout = sys.stdout

    class Filter:
        def write(self, text: str) -> int:
            return len(text) if "[KFP Executor" in text else stdout.write(text)

        def __getattr__(self, name: str) -> Any:
            return getattr(stdout, name)

    with contextlib.redirect_stdout(Filter()):  # type: ignore[type-var]
        yield
