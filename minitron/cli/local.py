"""Run a compiled pipeline on this machine, each task in a subprocess of this Python, for `minitron run`."""

import contextlib
import io
import logging
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import yaml

from minitron.config.pipelines import list_dags
from minitron.errors import MinitronError, RunError
from minitron.fast_imports import many_imports
from minitron.runtime.lifeline import guide_stages
from minitron.runtime.record import failure_note_path, read_failure_note
from minitron.storage.layout import CONCLUSION_PAGE, REPORT

RUN_DATABASE = "mlflow.db"
"""MLflow's file in the directory of a run."""

RESULTS = "results"
"""The directory of the tasks' outputs in the directory of a run."""

_INDENTATION = " " * 4
_CURSOR_UP = "\x1b[A"
"""tqdm's end of a nested bar, which would overwrite the line above."""


def run_pipeline(
    documents: list[dict[str, Any]],
    arguments: dict[str, Any],
    work_dir: Path,
    comment: Callable[[str], str | None] | None = None,
) -> Path:
    """Run the compiled pipeline in subprocesses of this Python; return the directory of the tasks' outputs.

    Args:
        documents: the compiled pipeline.
        arguments: those of its parameters.
        work_dir: gets `RESULTS`, the workspace and the cache.
        comment: returns what to print after a line of the stages, or None.

    Raises:
        MinitronError: a stage failed; message and exit status are the stage's. If the pipeline has the task `conclude`,
            its page becomes the report.
    """
    import_kfp()
    from kfp import components, local

    adapt_to_local(documents[0])
    workspace, results = arguments.get("workspace") or str(work_dir / "workspace"), work_dir / RESULTS
    os.environ.setdefault("MINITRON_CACHE", str(work_dir / "cache"))
    failure_note_path(workspace).unlink(missing_ok=True)
    earlier = set(results.glob("*"))
    os.environ |= {"MINITRON_WORKSPACE": workspace, "PYTHONUNBUFFERED": "1"}
    os.environ.setdefault("TQDM_MININTERVAL", "10")
    # Threads that spin while they wait make training several times slower as soon as anything else uses a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    unused = str(work_dir / "kfp")  # kfp deletes it at the end; otherwise kfp makes a directory in /tmp
    local.init(local.SubprocessRunner(use_venv=False), str(results), workspace_root=unused)
    pipeline = components.load_component_from_text(yaml.dump_all(documents, Dumper=yaml.CSafeDumper))
    try:
        with guide_stages() as signals, _filter_output(comment):
            pipeline(**arguments)
    except RuntimeError as error:
        for page in results.glob(f"*/conclude/*/{CONCLUSION_PAGE}"):
            if page.parents[2] not in earlier:
                shutil.copyfile(page, work_dir / REPORT)
        raise _read_failure(workspace, signals) from error
    return next(path for path in results.glob("*") if path not in earlier)


def import_kfp() -> None:
    """Import kfp, which takes a second."""
    with many_imports():
        import kfp.components
        import kfp.local  # noqa: F401


def adapt_to_local(specification: dict[str, Any]) -> None:
    """Remove the parts of a compiled pipeline that work only on a cluster, in place."""
    for dag in list_dags(specification):
        for task in dag["dag"]["tasks"].values():
            task.pop("retryPolicy", None)  # for lost nodes; here the same failure would return after each wait
            if "iteratorPolicy" in task:
                task["iteratorPolicy"]["parallelismLimit"] = 1  # all tasks share the cores and the GPU of this machine
    for executor in specification["deploymentSpec"]["executors"].values():
        executor["container"].pop("env", None)  # cache directories in a volume of the cluster


def _read_failure(workspace: str, signals: list[signal.Signals]) -> MinitronError:
    """Return the reason for the pipeline's end: a signal to this process, else the error of a stage."""
    if signals:
        error = RunError(f"ended by {signals[0].name}; finished stages and checkpoints are kept")
        error.exit_status = 128 + signals[0]
    elif note := read_failure_note(workspace):
        error = RunError(f"{note['stage']}: {note['message']}")
        error.exit_status = note["exit_status"]
    else:
        error = RunError("a stage ended without a message; see its output above")
    return error


@contextlib.contextmanager
def _filter_output(comment: Callable[[str], str | None] | None) -> Iterator[None]:
    """Hide the log of kfp.local and of the KFP executor, which would bury the progress bars; add the comments."""
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(_StagesOutput(sys.stdout, comment)):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


class _StagesOutput(io.TextIOBase):
    """The stages' lines of kfp.local's output: kfp.local indents them; the executor's own lines are left out."""

    def __init__(self, stream: TextIO, comment: Callable[[str], str | None] | None = None) -> None:
        self._stream, self._comment, self._line, self._skipping = stream, comment, "", False

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._write_line(line)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def _write_line(self, line: str) -> None:
        text = line.removeprefix(_INDENTATION)
        if "[KFP Executor" in line:
            self._skipping = line.endswith("Got executor_input:")  # JSON follows, over many lines
        elif self._skipping:
            self._skipping = text != "}"
        elif text != line and text.strip():
            with contextlib.suppress(OSError):  # nobody reads any more: the terminal or a pipe is closed; work goes on
                self._stream.write(text.replace(_CURSOR_UP, "") + "\n")
                if self._comment and (comment := self._comment(text)):
                    self._stream.write(comment + "\n")
                self._stream.flush()
