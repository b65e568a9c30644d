"""A run's end is told, whatever happened: by a page, also where MLflow does not answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from minitron.config.parse import parse
from minitron.config.stages import ConcludeConfig
from minitron.errors import ConfigError
from minitron.runtime import entry, record
from minitron.stages import conclude
from minitron.storage import layout
from minitron.storage.files import write_atomically
from minitron.tracking import pipeline_run
from minitron.tracking.client import connect, find_or_create_experiment


def run_conclude(uri: str, tmp_path: Path, **values: Any) -> dict[str, Any]:
    common = {"output": tmp_path / "concluded", "tracking_uri": uri, "experiment": tmp_path.name}
    config = parse("conclude", common | {"pipeline_run_id": "run-1", "state": "FAILED"} | values)
    assert isinstance(config, ConcludeConfig)
    return conclude.run(config)


def test_a_failed_stage_is_quoted(mlflow_file: str, tmp_path: Path) -> None:
    client = connect(mlflow_file)
    experiment = find_or_create_experiment(client, tmp_path.name)
    parent = client.create_run(experiment, tags={pipeline_run.RUN_TAG: "run-1", pipeline_run.MODEL_TAG: "minitron"})
    tags = {pipeline_run.PARENT_TAG: parent.info.run_id, pipeline_run.ERROR_TAG: "RunError: <disk> full"}
    client.create_run(experiment, tags=tags, run_name="distill")
    found = run_conclude(mlflow_file, tmp_path, state="RUNNING")
    assert (found["outcome"], found["reason"]) == ("failed", "distill: RunError: <disk> full")
    page = (tmp_path / "concluded" / layout.CONCLUSION_PAGE).read_text()
    assert "distill: RunError: &lt;disk&gt; full" in page and "<h1>Retraining of minitron: failed</h1>" in page
    assert layout.CONCLUSION_PAGE in {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_without_mlflow_there_is_a_page_and_the_next_attempt_writes_the_outcome(
    mlflow_file: str, tmp_path: Path
) -> None:
    note = {"stage": "resolve", "message": "MLflow is away", "exit_status": 1, "pipeline_run_id": "run-1"}
    write_atomically(record.failure_note_path(tmp_path), note)
    values = {"output": tmp_path / "concluded", "experiment": tmp_path.name, "pipeline_run_id": "run-1"}
    values |= {"state": "FAILED", "message": "node lost", "workspace": str(tmp_path)}
    with pytest.raises(SystemExit) as caught:
        entry.launch("conclude", tracking_uri="http://127.0.0.1:9", **values)
    assert caught.value.code == 1, "else Kubeflow would not try again"
    found = json.loads((tmp_path / "concluded" / "conclusion.json").read_text())
    assert found["outcome"] == "failed" and found["reason"].startswith("node lost; MLflow at http://127.0.0.1:9")
    assert "node lost" in (tmp_path / "concluded" / layout.CONCLUSION_PAGE).read_text() and found["run_id"] is None

    assert entry.launch("conclude", tracking_uri=mlflow_file, **values)["reason"] == "resolve: MLflow is away"
    client = connect(mlflow_file)
    (run,) = client.search_runs([find_or_create_experiment(client, tmp_path.name)])
    assert (run.data.tags[pipeline_run.OUTCOME_TAG], run.info.status) == ("failed", "FAILED")


def test_where_mlflow_cannot_store_the_page_it_is_there_all_the_same(
    mlflow_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = connect(mlflow_file)
    (tmp_path / "file").write_text("")  # no directory can be made here
    client.create_experiment(tmp_path.name, artifact_location=str(tmp_path / "file" / "artifacts"))
    assert run_conclude(mlflow_file, tmp_path, message="node lost")["reason"] == "node lost"
    (warning,) = capsys.readouterr().err.splitlines()
    assert "Not a directory" in warning
    assert "node lost" in (tmp_path / "concluded" / layout.CONCLUSION_PAGE).read_text()
    (run,) = client.search_runs([find_or_create_experiment(client, tmp_path.name)])
    assert (run.data.tags[pipeline_run.OUTCOME_TAG], run.info.status) == ("failed", "FAILED")


def test_where_mlflow_cannot_even_be_asked_there_is_a_page(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking_uri mlflow\.minitron:5000: MLflow cannot write there"):
        run_conclude("mlflow.minitron:5000", tmp_path, message="node lost")
    assert "node lost; tracking_uri mlflow" in (tmp_path / "concluded" / layout.CONCLUSION_PAGE).read_text()


def test_a_failure_that_was_overcome_is_not_quoted(mlflow_file: str, tmp_path: Path) -> None:
    client = connect(mlflow_file)
    parent = client.create_run(find_or_create_experiment(client, tmp_path.name), tags={pipeline_run.RUN_TAG: "run-1"})
    tags = {pipeline_run.PARENT_TAG: parent.info.run_id, pipeline_run.ERROR_TAG: "SystemExit: 143"}
    child = client.create_run(parent.info.experiment_id, tags=tags, run_name="distill")
    client.set_terminated(child.info.run_id)
    assert run_conclude(mlflow_file, tmp_path, message="node lost")["reason"] == "node lost"


@pytest.mark.parametrize(("run_id", "reason"), [("run-1", "promote: no version 1"), ("run-2", "node lost")])
def test_a_task_without_a_run_is_quoted_from_the_workspace(
    mlflow_file: str, tmp_path: Path, run_id: str, reason: str
) -> None:
    note = {"stage": "promote", "message": "no version 1", "exit_status": 1, "pipeline_run_id": run_id}
    write_atomically(record.failure_note_path(tmp_path), note)
    assert run_conclude(mlflow_file, tmp_path, message="node lost", workspace=tmp_path)["reason"] == reason
