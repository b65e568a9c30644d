"""Let several processes agree through MLflow: on a run that they share, on a value that only one of them writes."""

from typing import TYPE_CHECKING

from minitron.tracking.client import is_refusal, search_runs

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT_TAG = "mlflow.parentRunId"


def find_or_create_run(client: "MlflowClient", experiment_id: str, tag: str, value: str, name: str) -> "Run":
    """Return the earliest run with this tag that has no parent, by its creator's clock; create one if there is none.

    Processes that call this at the same moment can get different runs; use `write_once` for anything exclusive.
    """
    if existing := find_earliest_run(client, experiment_id, tag, value):
        return existing
    created = client.create_run(experiment_id, tags={tag: value}, run_name=name)
    first = find_earliest_run(client, experiment_id, tag, value) or created
    if first.info.run_id != created.info.run_id:
        client.delete_run(created.info.run_id)  # another process was faster
    return first


def find_earliest_run(client: "MlflowClient", experiment_id: str, tag: str, value: str) -> "Run | None":
    """Return the earliest run with this tag that has no parent, by its creator's clock; None without one."""
    runs = [run for run in search_runs(client, experiment_id, tag, value) if PARENT_TAG not in run.data.tags]
    return min(runs, key=lambda run: (run.info.start_time, run.info.run_id), default=None)


def write_once(client: "MlflowClient", run_id: str, name: str, value: str) -> str:
    """Write a parameter of a run, and return its value: MLflow never changes one, so another process's may stand."""
    try:
        client.log_param(run_id, name, value)
    except Exception as error:
        if not is_refusal(error) or (written := client.get_run(run_id).data.params.get(name)) is None:
            raise
        return written
    return value
