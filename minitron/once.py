"""What several processes agree on through MLflow: a run that they share, a value that only one of them can write."""

from contextlib import suppress
from typing import TYPE_CHECKING

from minitron.mlflow_client import search

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT_TAG = "mlflow.parentRunId"


def shared_run(client: "MlflowClient", experiment_id: str, tag: str, value: str, name: str) -> "Run":
    """Return the run with this tag that is nobody's child, made if it is not there; all who ask get the same one."""
    if found := _earliest(client, experiment_id, tag, value):
        return found
    created = client.create_run(experiment_id, tags={tag: value}, run_name=name)
    first = _earliest(client, experiment_id, tag, value) or created
    if first.info.run_id != created.info.run_id:
        client.delete_run(created.info.run_id)  # another process was faster
    return first


def write_once(client: "MlflowClient", run_id: str, name: str, value: str) -> bool:
    """Write a parameter of a run, unless it is written; say whether it now has this value, which nobody else writes.

    That a parameter cannot change is kept by every store of MLflow, whoever writes at the same time.
    """
    with suppress(Exception):  # that it has another value, or that the answer was lost: what is there tells
        client.log_param(run_id, name, value)
    return client.get_run(run_id).data.params.get(name) == value


def _earliest(client: "MlflowClient", experiment_id: str, tag: str, value: str) -> "Run | None":
    runs = [run for run in search(client, experiment_id, tag, value) if PARENT_TAG not in run.data.tags]
    return min(runs, key=lambda run: (run.info.start_time, run.info.run_id), default=None)
