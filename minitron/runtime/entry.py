"""The entry points of a stage: `launch` in a Kubeflow task, `main` for `python -m minitron.STAGE --config FILE`."""

import argparse
import importlib
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from minitron.config.parse import parse, read_yaml
from minitron.config.reference import stage_help_text
from minitron.config.stages import STAGES, StageConfig
from minitron.errors import ConfigError, MinitronError
from minitron.fast_imports import many_imports
from minitron.runtime.lifeline import follow_run, is_guided
from minitron.runtime.record import failure_note_path, make_failure_note, read_failure_note
from minitron.runtime.stage import LATE, run
from minitron.storage.files import write_atomically

LAST = "conclude"
"""The task that reports how a pipeline ended; it does not end with the pipeline."""


def launch(stage: str, metrics: Any = None, settings: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    """Run a stage inside a Kubeflow task; a failure is one line and an exit status.

    Args:
        stage: the stage's name.
        metrics: a KFP Metrics artifact for the stage's numbers, if any.
        settings: the stage's section of a settings document.
        **values: the rest of its configuration: inputs, output, workspace, tracking.
    """
    _exit_on_signals()
    if stage != LAST:
        follow_run()
    values["workspace"] = workspace = os.environ.get("MINITRON_WORKSPACE") or values.get("workspace")
    if read_failure_note(workspace).get("stage") == stage:
        with suppress(OSError):  # the note of an earlier attempt
            failure_note_path(workspace).unlink()
    try:
        record = run_stage(stage, parse(stage, _join_settings(stage, settings or {}, values)))
    except MinitronError as error:
        noted = _note_failure(workspace, make_failure_note(stage, error, values.get("pipeline_run_id")))
        if not (noted and is_guided()):  # `minitron run` prints the note
            _print_error(error)
        sys.exit(error.exit_status)
    for name, value in record["metrics"].items():
        if metrics is not None and isinstance(value, int | float):
            metrics.log_metric(name, value)
    return record


def _note_failure(workspace: str | None, note: dict[str, Any]) -> bool:
    """Write the note of a failure to the workspace, if there is a workspace; say whether it was written.

    conclude reads the note of the task before it, and does not replace it.
    """
    earlier = read_failure_note(workspace).get("pipeline_run_id")
    if workspace and not (note["stage"] == "conclude" and note["pipeline_run_id"] == earlier):
        with suppress(OSError):  # the failure may be that the disk is full
            write_atomically(failure_note_path(workspace), note)
            return True
    return False


def _join_settings(stage: str, settings: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Join a stage's settings with the rest of its configuration, which a component gets separately.

    Raises:
        ConfigError: a key is in both.
    """
    if both := settings.keys() & values.keys():
        raise ConfigError(
            f"{stage}: {', '.join(sorted(both))} cannot be in settings; give them as the component's parameters"
        )
    return settings | values


def main(stage: str) -> None:
    """Run a stage from the command line: `python -m minitron.STAGE --config FILE [--debug]`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m minitron.{stage}",
        description=STAGES[stage].__doc__,
        epilog=stage_help_text(stage),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the stage's configuration")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    _exit_on_signals()
    try:
        values = read_yaml(arguments.config)
        run_stage(stage, parse(stage, values))
    except MinitronError as error:
        if arguments.debug:
            traceback.print_exc()
        _print_error(error)
        sys.exit(error.exit_status)


def run_stage(stage: str, config: StageConfig) -> dict[str, Any]:
    """Run a stage, which is imported if it has work to do; return its record."""
    if stage in LATE:
        return run(config, lambda *arguments: _import_stage(stage).work(*arguments))
    return _import_stage(stage).run(config)


def _import_stage(stage: str) -> Any:
    with many_imports():
        return importlib.import_module(f"minitron.stages.{stage}")


def _exit_on_signals() -> None:
    """Let SIGTERM, with which Kubernetes ends a task, raise SystemExit, so that MLflow learns that the run was killed.

    SIGHUP, which a closing terminal sends to its processes, does the same, unless `nohup` ignores it.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, lambda number, frame: signal.raise_signal(signal.SIGTERM))
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _print_error(error: MinitronError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
