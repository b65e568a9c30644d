"""The record of a run: settings, versions, image, cost; and the note of a failure, which conclude reads."""

import json
import os
import platform
import resource
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from minitron import METHOD_VERSION, __version__
from minitron.config.stages import StageConfig
from minitron.engines import gpus
from minitron.errors import MinitronError
from minitron.storage.cache import persistent_directory
from minitron.storage.layout import FAILURE
from minitron.tracking import stage_run

NEMO = ("nemo_toolkit", "megatron-core", "nvidia-modelopt")
"""The packages of engine nemo that affect weights."""


def failure_note_path(workspace: str | Path | None) -> Path:
    """Return the path of the note of the last failure: in the workspace, or in this machine's cache for a bucket."""
    return persistent_directory(workspace) / FAILURE


def read_failure_note(workspace: str | Path | None) -> dict[str, Any]:
    """Return the note of the last failure: stage, exit_status, message, pipeline_run_id; empty if there is none."""
    try:
        return json.loads(failure_note_path(workspace).read_text())
    except (OSError, ValueError):
        return {}


def run_facts(config: StageConfig, tracker: stage_run.Tracker, started: float) -> dict[str, Any]:
    """Return a record's entries on how, where and at what cost its stage has run so far."""
    return {
        "config": config.model_dump(mode="json", exclude={"tracking_uri"}),  # its URI may have a password
        "seed": config.seed,
        "versions": _list_versions(),
        "image": os.environ.get("MINITRON_IMAGE"),
        "pipeline_run_id": config.pipeline_run_id,
        "mlflow_run_id": tracker.run_id,
        "gpus": gpus.count_gpus(config),
        "started": started,
        "seconds": round(time.time() - started, 3),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "peak_gpu_mb": _read_peak_gpu_mb(),
    }


def list_nemo_releases() -> dict[str, str]:
    """Return the releases, such as 2.6, of engine nemo's packages; empty if they are not installed."""
    return {name: ".".join(number.split(".")[:2]) for name, number in _find_versions(*NEMO).items()}


def _find_versions(*packages: str) -> dict[str, str]:
    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _list_versions() -> dict[str, str]:
    versions = {"minitron": __version__, "method": METHOD_VERSION, "python": platform.python_version()}
    return versions | _find_versions("torch", "transformers", "tokenizers", "numpy", "mlflow-skinny", *NEMO)


def _read_peak_gpu_mb() -> float | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**20, 1)


def make_failure_note(stage: str, error: MinitronError, run_id: str | None) -> dict[str, Any]:
    """Return the content of the note of a failure."""
    return {"stage": stage, "exit_status": error.exit_status, "message": str(error), "pipeline_run_id": run_id}
