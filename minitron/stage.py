"""What all stages share: input hashes, reuse, resume, and a record that is written last.

A stage is a function `work(config, directory, tracker) -> dict` that fills `directory`. `run` gives it a place that
survives a kill, publishes the finished directory in one rename, and writes `stage.json`: inputs' content hashes,
configuration, versions, seconds, peak memory, metrics. `main` makes it `python -m minitron.STAGE --config FILE`.
"""

import argparse
import gc
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

import yaml

from minitron import __version__, gpus, sources, tracking
from minitron.config import EXECUTION, HUB_DATASET, INPUT, MODEL, STAGES, StageConfig, fields_marked, parse
from minitron.errors import ConfigError, MinitronError
from minitron.results import (
    CHECKPOINTS,
    KEY,
    disk_errors,
    finished,
    partial_directory,
    publish,
    publish_copy,
    write_atomically,
)
from minitron.storage import RECORD, content_hash, hub_dataset, local_path, read_record, verified_hash

FAILURE = "failure.json"
"""What `launch` leaves in the workspace when a stage fails: stage, exit status and message."""

__all__ = ["FAILURE", "launch", "main", "read_yaml", "run", "stage_name"]

Work = Callable[[Any, Path, tracking.Tracker], dict[str, Any]]


def run(config: StageConfig, work: Work) -> dict[str, Any]:
    """Run a stage once: return the record at once when its result is there, resume it when it was killed.

    Args:
        config: what to do; `config.output` is the directory that appears when the stage is complete.
        work: fills the given directory and returns what it adds to the record: `metrics`, and anything else it found.

    Returns:
        The content of `<output>/stage.json`.

    Raises:
        ConfigError: an input is missing or does not fit, or `output` holds something that is not a stage's result.
        RunError: the run failed: fewer GPUs than asked for, disk full, damaged input, unreachable server.
    """
    stage = stage_name(config)
    gpus.check(config.gpus)
    _refuse_foreign(stage, config)
    inputs = _hash_inputs(config)
    key = _key(stage, config, inputs)
    home = config.workspace / stage / key[:16] if config.workspace else config.output
    with disk_errors(home):
        record = finished(home, key) if config.caching else None
        if record is None:
            record = _produce(config, work, home, {"stage": stage, "key": key, "inputs": inputs})
        else:
            print(f"{stage}: result {key[:12]} is already in {home}", flush=True)
    if home != config.output:
        with disk_errors(config.output):
            publish_copy(home, config.output, key)
    return record


def launch(stage: str, metrics: Any = None, **values: Any) -> dict[str, Any]:
    """Run a stage inside a Kubeflow task; a failure is one line and an exit status.

    Args:
        stage: the stage's name.
        metrics: a KFP Metrics artifact that gets the stage's numbers.
        **values: the stage's configuration; None and empty values mean the default.
    """
    _terminate_by_exception()
    workspace = os.environ.get("MINITRON_WORKSPACE") or values.pop("workspace", None)
    values = {key: value for key, value in (values | {"workspace": workspace}).items() if value not in (None, "")}
    try:
        record = _module(stage).run(parse(stage, values))
    except MinitronError as error:
        if workspace:
            with suppress(OSError):  # the failure may be that the disk is full
                write_atomically(Path(workspace) / FAILURE, _failure(stage, error))
        sys.exit(_complain(error))
    for name, value in record["metrics"].items():
        if metrics is not None and isinstance(value, int | float):
            metrics.log_metric(name, value)
    return record


def main(stage: str) -> None:
    """Run a stage from the command line: `python -m minitron.STAGE --config FILE [--debug]`."""
    parser = argparse.ArgumentParser(prog=f"python -m minitron.{stage}", description=STAGES[stage].__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the stage's configuration")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    _terminate_by_exception()
    try:
        values = read_yaml(arguments.config)
        _module(stage).run(parse(stage, values))
    except MinitronError as error:
        if arguments.debug:
            traceback.print_exc()
        sys.exit(_complain(error))


def _module(stage: str) -> Any:
    """Import a stage; the garbage collector, which would look through all that torch brings, waits: a third faster."""
    gc.disable()
    module = importlib.import_module(f"minitron.{stage}")
    gc.freeze()
    gc.enable()
    return module


def stage_name(config: StageConfig) -> str:
    """Return the stage that a configuration belongs to."""
    return next(name for name, model in STAGES.items() if type(config) is model)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is missing or is not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give an existing YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text ({error.reason}); give a YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: found {type(values).__name__}, not 'key: value' lines; correct it")
    return values


def _produce(config: StageConfig, work: Work, home: Path, identity: dict[str, Any]) -> dict[str, Any]:
    started = time.time()
    with (
        partial_directory(home, identity["key"]) as directory,
        tracking.stage_run(config, identity) as tracker,
        disk_errors(home),
    ):
        found = work(config, directory, tracker)
        record = identity | _circumstances(config, started) | found
        record["output_sha256"] = content_hash(directory, leave_out=(KEY, CHECKPOINTS))
        write_atomically(directory / RECORD, record)
        publish(directory, home)
        record = read_record(home) or record
        tracker.finish(record)
    return record


def _hash_inputs(config: StageConfig) -> dict[str, Any]:
    inputs = {}
    for name in fields_marked(type(config), INPUT):
        if (address := getattr(config, name)) is not None:
            inputs[name] = {"address": str(address), "sha256": _hash_input(config, name, address)}
    return inputs


def _hash_input(config: StageConfig, name: str, address: str | Path) -> str:
    if name in fields_marked(type(config), HUB_DATASET) and (dataset := hub_dataset(str(address))):
        return dataset.identity
    is_model = name in fields_marked(type(config), MODEL)
    path = sources.resolve(address, config) if is_model else local_path(address)
    if config.output.absolute().is_relative_to(path.absolute()):
        raise ConfigError(f"output {config.output}: lies inside {name} {address} and would change it; move it out")
    found = verified_hash(path)
    if is_model:
        sources.check(path, found)
    return found


def _key(stage: str, config: StageConfig, inputs: dict[str, Any]) -> str:
    settings = config.model_dump(mode="json", exclude=set(fields_marked(type(config), EXECUTION)) | set(inputs))
    hashes = {name: entry["sha256"] for name, entry in inputs.items()}
    return hashlib.sha256(json.dumps([stage, __version__, settings, hashes], sort_keys=True).encode()).hexdigest()


def _refuse_foreign(stage: str, config: StageConfig) -> None:
    """Refuse an output that holds anything but an earlier result of the same stage: it would be deleted."""
    output = config.output
    if not output.exists():
        return
    record = read_record(output) if output.is_dir() else None
    if record and record["stage"] != stage:
        raise ConfigError(
            f"output {output}: holds a result of {record['stage']}, not of {stage}; give another directory"
        )
    if not record and (output.is_file() or any(output.iterdir())):
        raise ConfigError(f"output {output}: exists and is not a stage's result; give a new directory or delete it")


def _circumstances(config: StageConfig, started: float) -> dict[str, Any]:
    return {
        "config": config.model_dump(mode="json", exclude={"tracking_uri"}),  # it may hold a password
        "seed": config.seed,
        "versions": _versions(),
        "started": started,
        "seconds": round(time.time() - started, 3),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "peak_gpu_mb": _peak_gpu_mb(),
    }


def _versions() -> dict[str, str]:
    versions = {"minitron": __version__, "python": platform.python_version()}
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


def _failure(stage: str, error: MinitronError) -> dict[str, Any]:
    return {"stage": stage, "exit_status": error.exit_status, "message": str(error)}


def _complain(error: MinitronError) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_status
