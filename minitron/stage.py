"""What all stages share: input hashes, reuse, resume, and a record that is written last.

A stage is a function `work(config, directory, tracker) -> dict` that fills `directory`. `run` gives it a place that
survives a kill, publishes the finished directory in one rename, and writes `stage.json`: inputs' content hashes,
configuration, versions, image, runs, seconds, peak memory, metrics. `main` makes it
`python -m minitron.STAGE --config FILE`.
"""

import argparse
import hashlib
import importlib
import json
import os
import platform
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from minitron import METHOD_VERSION, __version__, delivery, inputs
from minitron.config.fields import EXECUTION
from minitron.config.parse import fields_marked, parse, read_yaml
from minitron.config.stages import STAGES, StageConfig
from minitron.engines import gpus
from minitron.errors import ConfigError, MinitronError
from minitron.fast_imports import many_imports
from minitron.storage.cache import lasting_directory
from minitron.storage.files import disk_errors, write_atomically
from minitron.storage.hashing import content_hash
from minitron.storage.layout import RECORD, read_record
from minitron.storage.staging import CHECKPOINTS, KEY, partial_directory, publish
from minitron.tracking import stage_run

FAILURE = "failure.json"
"""What `launch` leaves in the workspace when a stage fails."""

LATE = ("prepare", "finetune", "prune", "distill", "evaluate")
"""Stages whose modules import torch and transformers: that waits until it is known that there is something to do."""

__all__ = ["LATE", "circumstances", "failure_note", "launch", "main", "noted_failure", "run", "stage_name"]

Work = Callable[[Any, Path, stage_run.Tracker], dict[str, Any]]


def run(config: StageConfig, work: Work, check: Callable[[Any], None] = lambda config: None) -> dict[str, Any]:
    """Run a stage once: return the record at once when its result is there, resume it when it was killed.

    Args:
        config: what to do; `config.output` is the directory that appears when the stage is complete.
        work: fills the given directory and returns what it adds to the record: `metrics`, and anything else it found.
        check: looks at the inputs before a run is opened in MLflow. Both get the configuration with local paths.

    Returns:
        The content of `<output>/stage.json`.

    Raises:
        ConfigError: an input is missing or does not fit, or `output` holds something that is not a stage's result.
        RunError: the run failed: fewer GPUs than asked for, disk full, damaged input, unreachable server.
    """
    stage = stage_name(config)
    gpus.check(config.gpus)
    delivery.refuse_foreign(stage, config)
    with disk_errors(config.output):  # an input may not be readable
        found = inputs.find(config)
    key = _key(stage, config, found)
    place = delivery.place_of(stage, config, key)
    with disk_errors(place.home):
        record = delivery.found(place, key) if config.caching else None
        if record is None:
            identity = {"stage": stage, "key": key, "inputs": {name: entry.record() for name, entry in found.items()}}
            local = inputs.located(config, found)
            check(local)
            record = _produce(local, config, work, place.home, identity)
            if place.remote:
                record = delivery.commit(place, replace=not config.caching)
        else:
            print(f"{stage}: result {key[:12]} is already in {place.remote or place.home}", flush=True)
    with disk_errors(config.output):
        delivery.deliver(stage, config, place, record)
    return record


def launch(stage: str, metrics: Any = None, settings: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    """Run a stage inside a Kubeflow task; a failure is one line and an exit status.

    Args:
        stage: the stage's name.
        metrics: a KFP Metrics artifact that gets the stage's numbers.
        settings: the stage's section of a settings document, as Kubeflow has it.
        **values: the rest of its configuration: inputs, output, where it reports and keeps results.
    """
    _terminate_by_exception()
    values["workspace"] = workspace = os.environ.get("MINITRON_WORKSPACE") or values.get("workspace")
    if noted_failure(workspace).get("stage") == stage:
        with suppress(OSError):  # of an earlier attempt
            failure_note(workspace).unlink()
    try:
        record = _start(stage, parse(stage, _joined(stage, settings or {}, values)))
    except MinitronError as error:
        if workspace:
            with suppress(OSError):  # the failure may be that the disk is full
                write_atomically(failure_note(workspace), _failure(stage, error, values.get("pipeline_run_id")))
        sys.exit(_complain(error))
    for name, value in record["metrics"].items():
        if metrics is not None and isinstance(value, int | float):
            metrics.log_metric(name, value)
    return record


def _joined(stage: str, settings: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Join a stage's settings and the rest of its configuration, which are apart in a component's parameters."""
    if both := settings.keys() & values.keys():
        raise ConfigError(
            f"{stage}: {', '.join(sorted(both))} are no settings; give them as the component's parameters"
        )
    return settings | values


def failure_note(workspace: str | Path | None) -> Path:
    """Return the file that says why the last task failed: in the workspace, or this machine's cache for a bucket."""
    return lasting_directory(workspace) / FAILURE


def noted_failure(workspace: str | Path | None) -> dict[str, Any]:
    """Return what that file says: stage, exit_status, message, pipeline_run_id; nothing if it is not there."""
    try:
        return json.loads(failure_note(workspace).read_text())
    except (OSError, ValueError):
        return {}


def main(stage: str) -> None:
    """Run a stage from the command line: `python -m minitron.STAGE --config FILE [--debug]`."""
    parser = argparse.ArgumentParser(prog=f"python -m minitron.{stage}", description=STAGES[stage].__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the stage's configuration")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    _terminate_by_exception()
    try:
        values = read_yaml(arguments.config)
        _start(stage, parse(stage, values))
    except MinitronError as error:
        if arguments.debug:
            traceback.print_exc()
        sys.exit(_complain(error))


def _start(stage: str, config: StageConfig) -> dict[str, Any]:
    if stage in LATE:
        return run(config, lambda *arguments: _module(stage).work(*arguments))
    return _module(stage).run(config)


def _module(stage: str) -> Any:
    with many_imports():
        return importlib.import_module(f"minitron.{stage}")


def stage_name(config: StageConfig) -> str:
    """Return the stage that a configuration belongs to."""
    return next(name for name, model in STAGES.items() if type(config) is model)


def _produce(
    local: StageConfig, config: StageConfig, work: Work, home: Path, identity: dict[str, Any]
) -> dict[str, Any]:
    """Do the work: with `local`, whose inputs are here; the record says what was asked for, `config`."""
    started = time.time()
    with (
        partial_directory(home, identity["key"]) as directory,
        stage_run.stage_run(config, identity) as tracker,
        disk_errors(home),
    ):
        found = work(local, directory, tracker)
        record = identity | circumstances(config, tracker, started) | found
        record["output_sha256"] = content_hash(directory, leave_out=(KEY, CHECKPOINTS))
        write_atomically(directory / RECORD, record)
        publish(directory, home)
        record = read_record(home) or record
        tracker.finish(record)
    return record


def _key(stage: str, config: StageConfig, found: dict[str, inputs.Input]) -> str:
    settings = config.model_dump(mode="json", exclude=set(fields_marked(type(config), EXECUTION)) | set(found))
    hashes = {name: entry.sha256 for name, entry in found.items()}
    return hashlib.sha256(json.dumps([stage, METHOD_VERSION, settings, hashes], sort_keys=True).encode()).hexdigest()


def circumstances(config: StageConfig, tracker: stage_run.Tracker, started: float) -> dict[str, Any]:
    """Return what a record says of how, where and at what cost its stage ran, up to now."""
    return {
        "config": config.model_dump(mode="json", exclude={"tracking_uri"}),  # it may hold a password
        "seed": config.seed,
        "versions": _versions(),
        "image": os.environ.get("MINITRON_IMAGE"),
        "pipeline_run_id": config.pipeline_run_id,
        "mlflow_run_id": tracker.run_id,
        "gpus": gpus.paid(config),
        "started": started,
        "seconds": round(time.time() - started, 3),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "peak_gpu_mb": _peak_gpu_mb(),
    }


def _versions() -> dict[str, str]:
    versions = {"minitron": __version__, "method": METHOD_VERSION, "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "numpy", "mlflow-skinny", "nemo_toolkit", "megatron-core"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _peak_gpu_mb() -> float | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**20, 1)


def _terminate_by_exception() -> None:
    """Let SIGTERM, by which Kubernetes ends a task, unwind the stage, so that MLflow learns that it was killed."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _failure(stage: str, error: MinitronError, run_id: str | None) -> dict[str, Any]:
    return {"stage": stage, "exit_status": error.exit_status, "message": str(error), "pipeline_run_id": run_id}


def _complain(error: MinitronError) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_status
