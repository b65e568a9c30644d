"""The MLflow run that the stages of a pipeline run share: found or made, asked for them, ended with an outcome."""

import os
from typing import TYPE_CHECKING

from minitron.config.stages import StageConfig
from minitron.tracking.client import experiment_id, search
from minitron.tracking.write_once import PARENT_TAG, find_or_create_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = [
    "ALIVE_TAG",
    "ERROR_TAG",
    "OUTCOME_TAG",
    "REASON_TAG",
    "RUN_TAG",
    "failure",
    "pipeline_run",
    "record_outcome",
    "stage_runs",
]

RUN_TAG = "kfp.run_id"

ERROR_TAG, ALIVE_TAG = "minitron.error", "minitron.alive"
"""Tags of a stage's run: what it failed with, and when it last logged, in seconds since 1970."""

OUTCOME_TAG, REASON_TAG = "minitron.outcome", "minitron.reason"
"""Tags of a pipeline run: what came of it, and why, in words."""


def pipeline_run(client: "MlflowClient", config: StageConfig) -> "Run | None":
    """Join the run in MLFLOW_RUN_ID, or find or create the one with this pipeline run's tag."""
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        return client.get_run(run_id)
    if config.pipeline_run_id is None:
        return None
    experiment = experiment_id(client, config.experiment)
    return find_or_create_run(client, experiment, RUN_TAG, config.pipeline_run_id, config.pipeline_run_id)


def stage_runs(client: "MlflowClient", run: "Run") -> list["Run"]:
    """Return the runs of the stages of a pipeline run."""
    return search(client, run.info.experiment_id, PARENT_TAG, run.info.run_id)


def failure(client: "MlflowClient", run: "Run") -> str | None:
    """Return what the latest of the stages that failed says of it; None if none did, or they ended well later."""
    runs = stage_runs(client, run)
    failed = [entry for entry in runs if ERROR_TAG in entry.data.tags and entry.info.status != "FINISHED"]
    latest = max(failed, key=lambda entry: entry.info.end_time or 0, default=None)
    return f"{latest.info.run_name}: {latest.data.tags[ERROR_TAG]}" if latest else None


def record_outcome(client: "MlflowClient", run_id: str, outcome: str, reason: str) -> None:
    """Record what came of a pipeline run, and end it; what it has claimed is free then."""
    client.set_tag(run_id, REASON_TAG, reason)
    client.set_tag(run_id, OUTCOME_TAG, outcome)
    if "MLFLOW_RUN_ID" not in os.environ:  # else Kubeflow opened it and ends it
        client.set_terminated(run_id, "FAILED" if outcome == "failed" else "FINISHED")
