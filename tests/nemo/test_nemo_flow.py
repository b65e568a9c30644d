"""The whole flow with engine nemo, from the compiled pipeline; tests/flows/test_gpu.py runs it on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

RUN = ["run", "compress", "--preset", "tiny", "--set", "engine=nemo"]
SHORT = ["--set", "finetune.max_steps=12", "--set", "distill.max_steps=12"]


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("flow")
    command = [str(Path(sys.executable).with_name("minitron")), *RUN, *SHORT, "--work-dir", str(directory)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return {"directory": directory, "summary": json.loads((directory / "summary.json").read_text())}


def records(flow: dict[str, Any]) -> dict[str, dict[str, Any]]:
    stage_records = [json.loads(path.read_text()) for path in flow["directory"].glob("results/*/*/*/stage.json")]
    return {record["stage"]: record for record in stage_records}


def test_it_ends_in_a_student_that_loads_and_was_evaluated(flow: dict[str, Any]) -> None:
    summary = flow["summary"]
    assert summary["student"]["validation_loss"] < summary["pruned"]["validation_loss"]
    assert summary["registered"]["alias"] == "challenger"
    (student,) = flow["directory"].glob("results/*/distill/distilled")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    assert model.config.num_hidden_layers == 3 and model.config.intermediate_size == 64
    assert model(**tokenizer("a b", return_tensors="pt")).logits.shape[-1] == 512


def test_every_stage_was_nemos_and_says_so(flow: dict[str, Any]) -> None:
    stage_records = records(flow)
    for stage in ("finetune", "prune", "distill"):
        assert stage_records[stage]["config"]["engine"] == "nemo"
        assert stage_records[stage]["versions"]["nemo_toolkit"].startswith("2.")
    validations = [row["step"] for row in stage_records["distill"]["history"] if "validation_loss" in row]
    assert validations == [0, 12] and len(stage_records["distill"]["history"]) == 14
    assert stage_records["distill"]["metrics"]["validation_loss"] == pytest.approx(
        flow["summary"]["student"]["validation_loss"], rel=1e-4
    )


def test_its_curves_are_in_mlflow(flow: dict[str, Any]) -> None:
    from minitron.tracking.client import connect

    client = connect(f"sqlite:///{flow['directory']}/mlflow.db")
    experiment = client.get_experiment_by_name("minitron")
    (run,) = [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name.startswith("distill")]
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "kl")] == list(range(1, 13))
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "validation_loss")] == [0, 12]
