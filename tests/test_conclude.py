"""A run's end is told, whatever happened: by a page, also where MLflow does not answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from minitron import conclude, pipeline_run
from minitron.config import ConcludeConfig, parse
from minitron.mlflow_client import connect, experiment_id


def ended(uri: str, tmp_path: Path, **values: Any) -> dict[str, Any]:
    common = {"output": tmp_path / "concluded", "tracking_uri": uri, "experiment": tmp_path.name}
    config = parse("conclude", common | {"pipeline_run_id": "run-1", "state": "FAILED"} | values)
    assert isinstance(config, ConcludeConfig)
    return conclude.run(config)


def test_a_failed_stage_is_quoted(mlflow_file: str, tmp_path: Path) -> None:
    client = connect(mlflow_file)
    experiment = experiment_id(client, tmp_path.name)
    parent = client.create_run(experiment, tags={pipeline_run.RUN_TAG: "run-1"})
    tags = {pipeline_run.PARENT_TAG: parent.info.run_id, pipeline_run.ERROR_TAG: "RunError: <disk> full"}
    client.create_run(experiment, tags=tags, run_name="distill")
    found = ended(mlflow_file, tmp_path, state="RUNNING")
    assert (found["outcome"], found["reason"]) == ("failed", "distill: RunError: <disk> full")
    assert "distill: RunError: &lt;disk&gt; full" in (tmp_path / "concluded" / conclude.PAGE).read_text()
    assert conclude.PAGE in {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_without_mlflow_there_is_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    found = ended("http://127.0.0.1:9", tmp_path, message="node lost")
    assert found["outcome"] == "failed" and found["reason"].startswith("node lost; MLflow at http://127.0.0.1:9")
    assert "node lost" in (tmp_path / "concluded" / conclude.PAGE).read_text()
    assert json.loads((tmp_path / "concluded" / "conclusion.json").read_text())["run_id"] is None
