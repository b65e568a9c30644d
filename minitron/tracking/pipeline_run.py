"""The MLflow run that the stages of a pipeline run share: join it, list its stages, record its outcome."""

import json
import os
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from minitron.config.stages import StageConfig
from minitron.tracking.client import (
    annotate_run,
    connect,
    error_reason,
    fail_fast,
    find_or_create_experiment,
    search_runs,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = [
    "ALIVE_TAG",
    "ERROR_TAG",
    "MODEL_TAG",
    "NOTE_TAG",
    "NO_REASON",
    "OUTCOME_TAG",
    "PARENT_TAG",
    "REASON_TAG",
    "RUN_TAG",
    "STAGE_TAG",
    "VERDICT_TAG",
    "find_failure",
    "find_reason",
    "join_pipeline_run",
    "list_stage_runs",
    "log_pages",
    "record_outcome",
]

RUN_TAG, PARENT_TAG = "kfp.run_id", "mlflow.parentRunId"
"""Tags of a pipeline run: Kubeflow's id of it. Of a stage's run: the pipeline run's."""

STAGE_TAG, ERROR_TAG, ALIVE_TAG = "minitron.runtime.stage", "minitron.error", "minitron.alive"
"""Tags of a stage's run: the stage, its error, and its last sign of life, in seconds since 1970."""

OUTCOME_TAG, REASON_TAG = "minitron.outcome", "minitron.reason"
"""Tags of a pipeline run: its outcome, and the reason in words. An outcome releases the training lock."""

MODEL_TAG, VERDICT_TAG, NOTE_TAG = "model", "verdict", "mlflow.note.content"
"""Tags of a pipeline run that people read in MLflow's list: the registered model, the verdict in a few words, and the
description, which is Markdown."""

_VIEW = {
    "mlflow.sharedViewState.best": json.dumps(
        {
            "name": "Best runs",
            "createdAt": 0,
            "updatedAt": 0,
            "state": json.dumps(
                {
                    "searchFilter": f"tags.{VERDICT_TAG} LIKE '%'",
                    "orderByKey": "metrics.`student_validation_loss`",
                    "orderByAsc": True,
                    "selectedColumns": [
                        "attributes.`Models`",
                        "metrics.`student_validation_loss`",
                        "metrics.`validation_loss_above_teacher`",
                        "metrics.`parameters_ratio`",
                        "metrics.`speed_ratio`",
                        f"tags.`{VERDICT_TAG}`",
                    ],
                }
            ),
        }
    )
}
"""Tag of an experiment: a saved view of MLflow's page (3.17), which lists the pipeline runs that have a verdict, the
lowest loss first. Sorted by a metric, the page's own list has the stages' runs among them."""

NO_REASON = "see the log of its tasks"
"""The reason of a failed pipeline run when neither a stage nor Kubeflow gives one."""


def join_pipeline_run(client: "MlflowClient", config: StageConfig, model: str | None = None) -> "Run | None":
    """Return the run in MLFLOW_RUN_ID, or find or create the run with this pipeline run's tag; None without either.

    Args:
        client: MLflow's.
        config: `experiment` and `pipeline_run_id`.
        model: registered model that the pipeline run makes, if the caller knows it.
    """
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        run = client.get_run(run_id)
    elif config.pipeline_run_id is None:
        return None
    else:
        experiment = find_or_create_experiment(client, config.experiment, _VIEW)
        run = _find_earliest_run(client, experiment, config.pipeline_run_id) or _create_run(
            client, experiment, config.pipeline_run_id, model
        )
    if model and MODEL_TAG not in run.data.tags:
        client.set_tag(run.info.run_id, MODEL_TAG, model)
    return run


def log_pages(task: str, config: StageConfig, *names: str) -> None:
    """Log files of a task's output to the run; an error is only a warning, because Kubeflow also shows the page."""
    if config.tracking_uri is None:
        return
    try:
        with fail_fast():
            client = connect(config.tracking_uri, create=True)
            if run := join_pipeline_run(client, config):
                for name in names:
                    client.log_artifact(run.info.run_id, str(config.output / name))
    except Exception as error:
        print(f"warning: {task}: {names[-1]} is not in MLflow: {error_reason(error)}", file=sys.stderr, flush=True)


def _create_run(client: "MlflowClient", experiment_id: str, pipeline_run_id: str, model: str | None) -> "Run":
    """Create a run with its start and model as name; a tag has Kubeflow's id."""
    now = time.time()
    created = client.create_run(
        experiment_id,
        start_time=int(now * 1000),
        tags={RUN_TAG: pipeline_run_id} | ({MODEL_TAG: model} if model else {}),
        run_name=f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M} {model or 'pipeline'}",  # MLflow's list cuts it
    )
    first = _find_earliest_run(client, experiment_id, pipeline_run_id) or created
    if first.info.run_id != created.info.run_id:
        client.delete_run(created.info.run_id)  # another process was faster
    return first


def _find_earliest_run(client: "MlflowClient", experiment_id: str, pipeline_run_id: str) -> "Run | None":
    """Return the earliest run of a pipeline run, by its creator's clock; None if there is none."""
    runs = search_runs(client, experiment_id, RUN_TAG, pipeline_run_id)
    parents = [run for run in runs if PARENT_TAG not in run.data.tags]
    return min(parents, key=lambda run: (run.info.start_time, run.info.run_id), default=None)


def list_stage_runs(client: "MlflowClient", run: "Run") -> list["Run"]:
    """Return the runs of the stages of a pipeline run."""
    return search_runs(client, run.info.experiment_id, PARENT_TAG, run.info.run_id)


def find_failure(client: "MlflowClient", run: "Run") -> str | None:
    """Return the name and error of the stage that failed last; None if no stage failed, or all succeeded later."""
    runs = list_stage_runs(client, run)
    failed = [entry for entry in runs if ERROR_TAG in entry.data.tags and entry.info.status != "FINISHED"]
    latest = max(failed, key=lambda entry: entry.info.end_time or 0, default=None)
    if latest is None:
        return None
    return f"{latest.data.tags.get(STAGE_TAG, latest.info.run_name)}: {latest.data.tags[ERROR_TAG]}"


def find_reason(client: "MlflowClient", experiment: str, pipeline_run_id: str) -> str | None:
    """Return why a pipeline run failed: a stage's error, or the reason from `conclude`; None if MLflow has neither."""
    found = client.get_experiment_by_name(experiment)
    run = found and _find_earliest_run(client, found.experiment_id, pipeline_run_id)
    if not run:
        return None
    tags = run.data.tags
    recorded = tags.get(REASON_TAG) if tags.get(OUTCOME_TAG) == "failed" else None
    return find_failure(client, run) or (None if recorded == NO_REASON else recorded)


def record_outcome(client: "MlflowClient", run_id: str, outcome: str, reason: str, verdict: str | None = None) -> None:
    """Tag a pipeline run with its outcome and the reason, and end it: this releases its training lock.

    Args:
        client: MLflow's.
        run_id: the pipeline run's.
        outcome: promoted, challenger, unchanged, made elsewhere or failed.
        reason: the reason, for people.
        verdict: the verdict on the student; None: there is none, so outcome and reason describe the run.
    """
    described = {VERDICT_TAG: verdict} if verdict else {VERDICT_TAG: outcome, NOTE_TAG: reason}
    annotate_run(client, run_id, {REASON_TAG: reason, OUTCOME_TAG: outcome} | described)
    if "MLFLOW_RUN_ID" not in os.environ:  # else Kubeflow opened the run, and ends it
        client.set_terminated(run_id, "FAILED" if outcome == "failed" else "FINISHED")
