"""The run of any stage: input hashes, reuse, resume, and a record that is written last.

A stage is a function `work(config, directory, tracker) -> dict` that fills `directory`. `run` gives it a directory that
survives a kill, publishes the finished directory in one rename, and writes `stage.json`: inputs' content hashes,
configuration, versions, image, runs, seconds, peak memory, metrics.
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitron import COMPENSATION_VERSION, METHOD_VERSION
from minitron.config.fields import EXECUTION
from minitron.config.metrics import find_not_finite
from minitron.config.parse import find_marked_fields, list_decisive_settings
from minitron.config.stages import STAGES, StageConfig
from minitron.engines import gpus
from minitron.errors import RunError
from minitron.runtime import inputs, outputs
from minitron.runtime.record import list_nemo_releases, run_facts
from minitron.storage.cache import persistent_directory
from minitron.storage.files import disk_errors, format_json, write_atomically
from minitron.storage.hashing import content_hash, keep_notes
from minitron.storage.layout import RECORD, partial_path, result_address
from minitron.storage.staging import new_result, publish_directory, sync_files
from minitron.tracking import stage_run

LATE = ("prepare", "finetune", "prune", "distill", "evaluate")
"""Stages whose modules import torch and transformers; a stage is imported only if it has work to do."""

__all__ = ["LATE", "run", "stage_name"]

Work = Callable[[Any, Path, stage_run.Tracker], dict[str, Any]]


def run(config: StageConfig, work: Work, check: Callable[[Any], None] = lambda config: None) -> dict[str, Any]:
    """Run a stage once: return the record of an existing result at once, and resume a killed stage.

    Args:
        config: the stage's configuration; `config.output` is the directory that appears when the stage is complete.
        work: fills the given directory, and returns entries of the record: `metrics`, and others.
        check: checks the inputs before a run is opened in MLflow. The inputs of `work` and `check` are local paths.

    Returns:
        The content of `<output>/stage.json`.

    Raises:
        ConfigError: an input is missing or does not fit, or `output` exists and is not a stage's result.
        RunError: the run failed: too few GPUs, disk full, damaged input, unreachable server.
    """
    with keep_notes(persistent_directory(config.workspace)):
        return _find_or_make(config, work, check)


def _find_or_make(config: StageConfig, work: Work, check: Callable[[Any], None]) -> dict[str, Any]:
    stage = stage_name(config)
    gpus.check_gpus(config.gpus)
    outputs.refuse_foreign(stage, config)
    with disk_errors(config.output):  # an input may be unreadable
        stage_inputs = inputs.find_inputs(config)
    key = _compute_key(stage, config, stage_inputs)
    location = outputs.result_location(stage, config, key)
    with disk_errors(location.directory):
        record = outputs.find_result(location, key) if config.caching else None
        is_new = False
        if record is None:
            identity = {
                "stage": stage,
                "key": key,
                "inputs": {name: entry.record() for name, entry in stage_inputs.items()},
            }
            local = inputs.with_local_paths(config, stage_inputs)
            check(local)
            with outputs.lock_result(location, key, reuse=config.caching) as record:
                is_new = record is None
                if record is None:
                    record = _make_result(local, config, work, location.directory, identity)
                    if location.remote:
                        record = outputs.commit_result(location, replace=not config.caching)
        if not is_new:
            address = result_address(location.remote or str(location.directory), record)
            _check_finite(stage, record, f"{address}: ")
            print(f"{stage}: result {key[:12]} is already in {address}", flush=True)
            stage_run.deliver_unsent(config)
    with disk_errors(config.output):
        outputs.publish_output(stage, config, location, record)
    return record


def stage_name(config: StageConfig) -> str:
    """Return the stage that a configuration belongs to."""
    return next(name for name, model in STAGES.items() if type(config) is model)


def _make_result(
    local: StageConfig, config: StageConfig, work: Work, result: Path, identity: dict[str, Any]
) -> dict[str, Any]:
    """Do the work with `local`, whose inputs are local paths; the record keeps the addresses of `config`."""
    started = time.time()
    with new_result(partial_path(result), identity["key"]) as directory:
        with stage_run.track_stage(config, identity) as tracker, disk_errors(result):
            results = work(local, directory, tracker)
            _check_finite(identity["stage"], results)
            record = identity | run_facts(config, tracker, started) | results
            record["output_sha256"] = content_hash(directory)
            sync_files(directory)
            record = json.loads(format_json(record, directory / RECORD))
            tracker.finish(record)  # before the record is written, so that a kill loses no message
            write_atomically(directory / RECORD, record)
        publish_directory(directory, result)
    return record


def _check_finite(stage: str, results: dict[str, Any], where: str = "") -> None:
    """Refuse a result with a number that is infinite or NaN: later stages would build on it.

    Raises:
        RunError: a number is not finite; the message names it.
    """
    if reason := find_not_finite({name: results.get(name) for name in ("metrics", "history")}):
        raise RunError(f"{where}no result of {stage}, because {reason}; change its settings, or an earlier stage's")


def _compute_key(stage: str, config: StageConfig, stage_inputs: dict[str, inputs.Input]) -> str:
    """Return the key of a result: a hash of everything that affects it, and of nothing else."""
    values = config.model_dump(mode="json")
    settings = {name: values[name] for name in list_decisive_settings(type(config), values)}
    no_effect = find_marked_fields(type(config), EXECUTION)
    hashes = {name: entry.sha256 for name, entry in stage_inputs.items() if name not in no_effect}
    parts = [stage, METHOD_VERSION, settings, hashes]
    if values.get("engine") == "nemo":
        parts.append(list_nemo_releases())
    if values.get("method") == "compensated":
        parts.append(COMPENSATION_VERSION)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
