"""What several processes agree on through MLflow: a run that they share, a value that only one of them can write."""

from typing import TYPE_CHECKING

from minitron.tracking.client import is_refusal, search

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT_TAG = "mlflow.parentRunId"


def find_or_create_run(client: "MlflowClient", experiment_id: str, tag: str, value: str, name: str) -> "Run":
    """Return the run with this tag that is nobody's child, made if it is not there: the earliest, by its maker's clock.

    Processes that ask within the same moment can differ; what must be exclusive needs `write_once`.
    """
    if found := _earliest(client, experiment_id, tag, value):
        return found
    created = client.create_run(experiment_id, tags={tag: value}, run_name=name)
    first = _earliest(client, experiment_id, tag, value) or created
    if first.info.run_id != created.info.run_id:
        client.delete_run(created.info.run_id)  # another process was faster
    return first


def write_once(client: "MlflowClient", run_id: str, name: str, value: str) -> str:
    """Write a parameter of a run, which no store of MLflow ever changes; return what it holds: another may be first."""
    try:
        client.log_param(run_id, name, value)
    except Exception as error:
        if not is_refusal(error) or (written := client.get_run(run_id).data.params.get(name)) is None:
            raise
        return written
    return value


def _earliest(client: "MlflowClient", experiment_id: str, tag: str, value: str) -> "Run | None":
    runs = [run for run in search(client, experiment_id, tag, value) if PARENT_TAG not in run.data.tags]
    return min(runs, key=lambda run: (run.info.start_time, run.info.run_id), default=None)
