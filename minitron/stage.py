"""What all stages share: input hashes, reuse, resume, and a record that is written last.

A stage is a function `work(config, directory, tracker) -> dict` that fills `directory`. `run` gives it a place that
survives a kill, publishes the finished directory in one rename, and writes `stage.json`: inputs' content hashes,
configuration, versions, seconds, peak memory, metrics. `main` makes it `python -m minitron.STAGE --config FILE`.
"""

import argparse
import errno
import hashlib
import importlib
import json
import os
import platform
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from minitron import __version__, tracking
from minitron.config import EXECUTION, INPUT, STAGES, StageConfig, fields_marked, parse
from minitron.errors import ConfigError, MinitronError, RunError
from minitron.storage import RECORD, content_hash, local_path, verified_hash

CHECKPOINTS = "checkpoints"
"""Subdirectory of work in progress that a killed stage resumes from; it is not part of the result."""

FAILURE = "failure.json"
"""What `launch` leaves in the workspace when a stage fails: stage, exit status and message."""

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
        RunError: the run failed: disk full, damaged input, unreachable server.
    """
    stage = stage_name(config)
    _refuse_foreign(config.output)
    inputs = _hash_inputs(config)
    key = _key(stage, config, inputs)
    home = config.workspace / stage / key[:16] if config.workspace else config.output
    record = _read_record(home)
    if record is None or record["key"] != key:
        record = _produce(config, work, home, {"stage": stage, "key": key, "inputs": inputs})
    else:
        print(f"{stage}: result {key[:12]} is already in {home}", flush=True)
    if home != config.output:
        _publish_copy(home, config.output)
    return record


def launch(stage: str, metrics: Any = None, **values: Any) -> dict[str, Any]:
    """Run a stage inside a Kubeflow task; a failure is one line and an exit status.

    Args:
        stage: the stage's name.
        metrics: a KFP Metrics artifact that gets the stage's numbers.
        **values: the stage's configuration; None and empty values mean the default.
    """
    workspace = os.environ.get("MINITRON_WORKSPACE") or values.pop("workspace", None)
    values = {key: value for key, value in (values | {"workspace": workspace}).items() if value not in (None, "")}
    try:
        record = importlib.import_module(f"minitron.{stage}").run(parse(stage, values))
    except MinitronError as error:
        if workspace:
            _write_atomically(Path(workspace) / FAILURE, _failure(stage, error))
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
    try:
        values = read_yaml(arguments.config)
        importlib.import_module(f"minitron.{stage}").run(parse(stage, values))
    except MinitronError as error:
        if arguments.debug:
            traceback.print_exc()
        sys.exit(_complain(error))


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
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: found {type(values).__name__}, not 'key: value' lines; correct it")
    return values


def _produce(config: StageConfig, work: Work, home: Path, identity: dict[str, Any]) -> dict[str, Any]:
    directory = _partial_directory(home, identity["key"])
    started = time.time()
    try:
        with tracking.stage_run(config, identity["stage"]) as tracker:
            found = work(config, directory, tracker)
            record = identity | _circumstances(config, started) | found
            shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
            (directory / "key").unlink()
            record["output_sha256"] = content_hash(directory)
            _write_atomically(directory / RECORD, record)
            tracker.finish(record)
    except BaseException as error:
        if isinstance(error, ConfigError) or not (directory / CHECKPOINTS).exists():
            shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise RunError(_disk_full(config.output)) from error
        raise
    shutil.rmtree(home, ignore_errors=True)
    directory.rename(home)
    return record


def _partial_directory(home: Path, key: str) -> Path:
    """Return the directory of work in progress; what another key left there is deleted."""
    directory = home.with_name(home.name + ".partial")
    if directory.exists() and not ((directory / "key").exists() and (directory / "key").read_text() == key):
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "key").write_text(key)
    return directory


def _publish_copy(home: Path, output: Path) -> None:
    """Make `output` equal to `home`: by hard links where the file system allows, else by copies."""
    staging = output.with_name(output.name + ".partial")
    for directory in (staging, output):
        shutil.rmtree(directory, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(home, staging, copy_function=link_or_copy)
    staging.rename(output)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Hard-link a file, or copy it where the file system does not allow that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _hash_inputs(config: StageConfig) -> dict[str, Any]:
    inputs = {}
    for name in fields_marked(type(config), INPUT):
        if (address := getattr(config, name)) is not None:
            inputs[name] = {"address": str(address), "sha256": verified_hash(local_path(address))}
    return inputs


def _key(stage: str, config: StageConfig, inputs: dict[str, Any]) -> str:
    settings = config.model_dump(mode="json", exclude=set(fields_marked(type(config), EXECUTION)) | set(inputs))
    hashes = {name: entry["sha256"] for name, entry in inputs.items()}
    return hashlib.sha256(json.dumps([stage, __version__, settings, hashes], sort_keys=True).encode()).hexdigest()


def _read_record(directory: Path) -> dict[str, Any] | None:
    path = directory / RECORD
    return json.loads(path.read_text()) if path.is_file() else None


def _refuse_foreign(output: Path) -> None:
    if output.exists() and not (output / RECORD).exists() and (output.is_file() or any(output.iterdir())):
        raise ConfigError(f"output {output}: exists and is not a stage's result; give a new directory or delete it")


def _circumstances(config: StageConfig, started: float) -> dict[str, Any]:
    return {
        "config": config.model_dump(mode="json"),
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


def _disk_full(path: Path) -> str:
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return f"{path}: disk full ({shutil.disk_usage(existing).free / 2**20:.0f} MB free); free space and run it again"


def _write_atomically(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, default=str))
    temporary.replace(path)


def _failure(stage: str, error: MinitronError) -> dict[str, Any]:
    return {"stage": stage, "exit_status": error.exit_status, "message": str(error)}


def _complain(error: MinitronError) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_status
