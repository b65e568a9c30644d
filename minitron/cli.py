"""The `minitron` command.

Run a compiled pipeline on this machine: `minitron run compress --preset demo --work-dir runs/demo`.
"""

import contextlib
import io
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
import yaml

from minitron import __version__, samples, summary
from minitron.errors import MinitronError, RunError
from minitron.presets import SAMPLES, check_arguments, compiled_pipeline, read_arguments
from minitron.stage import failure_note

_INDENTATION = " " * 4
_CURSOR_UP = "\x1b[A"
"""With it tqdm ends a nested bar, which would overwrite the line above."""

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
    arguments = {"engine": "hf"} | read_arguments(preset, settings, list(parameters))  # a laptop has no NeMo
    sample = arguments.pop(SAMPLES, None)
    if sample:
        inputs = samples.paths(sample, work_dir / "inputs")
        arguments = {name: str(path) for name, path in inputs.items()} | arguments
    arguments = check_arguments(arguments, parameters)
    if sample:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        samples.build(sample, work_dir / "inputs")
    arguments.setdefault("tracking_uri", os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{work_dir}/mlflow.db")
    results = _run_locally(documents, arguments, work_dir)
    summary.write(pipeline, results, work_dir, arguments["tracking_uri"])


def _run_locally(documents: list[dict[str, Any]], arguments: dict[str, Any], work_dir: Path) -> Path:
    """Run the compiled pipeline in subprocesses of this Python; return the directory of the tasks' outputs.

    Raises:
        MinitronError: a stage failed, with the stage's own message and exit status.
    """
    from kfp import components, local

    _adapt(documents[0], arguments)
    workspace, results = os.environ.get("MINITRON_WORKSPACE") or str(work_dir / "workspace"), work_dir / "results"
    failure = failure_note(workspace)
    failure.unlink(missing_ok=True)
    earlier = set(results.glob("*"))
    os.environ |= {"MINITRON_WORKSPACE": workspace, "PYTHONUNBUFFERED": "1"}
    os.environ.setdefault("TQDM_MININTERVAL", "10")
    # Threads that spin while they wait make training several times slower as soon as anything else uses a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(results))
    run_pipeline = components.load_component_from_text(yaml.safe_dump_all(documents))
    try:
        with _only_the_stages_output():
            run_pipeline(**arguments)
    except RuntimeError as error:
        raise _explain(failure) from error
    return next(path for path in results.glob("*") if path not in earlier)


def _adapt(specification: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Take out of the compiled pipeline what kfp.local does otherwise than a cluster."""
    unset = _drop_unset(specification["root"], arguments)
    for task in specification["root"]["dag"]["tasks"].values():
        inputs = task["inputs"]["parameters"]
        for name in [name for name, source in inputs.items() if source.get("componentInputParameter") in unset]:
            del inputs[name]
        _drop_unset(specification["components"][task["componentRef"]["name"]], inputs)
        task.pop("retryPolicy", None)  # for lost nodes: here the same failure would come again after each wait


def _drop_unset(component: dict[str, Any], given: dict[str, Any]) -> set[str]:
    """Drop optional parameters without a value: a cluster leaves them to the function, kfp.local fails on them."""
    parameters = component["inputDefinitions"]["parameters"]
    unset = {name for name, entry in parameters.items() if "defaultValue" not in entry and name not in given}
    for name in unset:
        del parameters[name]
    return unset


def _explain(failure: Path) -> MinitronError:
    if not failure.is_file():
        return RunError("a stage ended without a message; see its output above, then run the command again to resume")
    found = json.loads(failure.read_text())
    error = RunError(f"{found['stage']}: {found['message']}")
    error.exit_status = found["exit_status"]
    return error


@contextlib.contextmanager
def _only_the_stages_output() -> Iterator[None]:
    """Leave out what kfp.local and the KFP executor say of themselves: it would bury the progress bars."""
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(_StagesOutput(sys.stdout)):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


class _StagesOutput(io.TextIOBase):
    """The lines that the stages print, from kfp.local's output: those it indents, the executor's own left out."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._line, self._skipping = stream, "", False

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._pass_on(line)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def _pass_on(self, line: str) -> None:
        text = line.removeprefix(_INDENTATION)
        if "[KFP Executor" in line:
            self._skipping = line.endswith("Got executor_input:")  # JSON follows, over many lines
        elif self._skipping:
            self._skipping = text != "}"
        elif text != line and text.strip():
            self._stream.write(text.replace(_CURSOR_UP, "") + "\n")
            self._stream.flush()
