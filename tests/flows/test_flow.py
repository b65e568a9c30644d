"""The whole flow, as a user starts it: `minitron run` on the checked-in compiled pipeline."""

import json
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from minitron.cli.app import app
from minitron.storage.hashing import content_hash
from minitron.tracking.pipeline_run import STAGE_TAG
from tests.constants import REPOSITORY
from tests.flows.commands import BIN, ENVIRONMENT, RETRAIN, read_shell_lines
from tests.report.event_files import read_events
from tests.servers import forks
from tests.servers.http_server import free_port
from tests.servers.kubeflow_server import kubeflow_server
from tests.servers.processes import run_server

STAGES = ["prepare", "finetune", "prune", "distill", "evaluate", "register"]
MAKE_DEMO, MAKE_TEST = "make demo", "make test"
ACTIVATE = ". .venv/bin/activate"
RUN = "minitron run compress --preset tiny --work-dir runs/tiny"
RUN_LONGER = "minitron run compress --preset tiny --work-dir runs/tiny --set distill.max_steps=80"
HELP = "minitron run --help"
MLFLOW = "mlflow ui --backend-store-uri sqlite:///runs/tiny/mlflow.db"
URI = "export MLFLOW_TRACKING_URI=sqlite:///$PWD/runs/tiny/mlflow.db"
LINEAGE = "minitron lineage models:/tiny@challenger"
REPRODUCE = "minitron reproduce models:/tiny@challenger --output again.yaml"
GARBAGE = "minitron gc runs/tiny --older-than 30d"
RUN_AGAIN = "minitron run compress --preset again.yaml --work-dir runs/tiny"


def execute(command: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the tutorial, word for word, in a directory with .venv."""
    return subprocess.run(_shell(command), capture_output=True, text=True, env=ENVIRONMENT, cwd=directory)


def forked(command: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the tutorial without the start of its processes."""
    program, *arguments = shlex.split(command)
    assert program == "minitron"
    return forks.run_minitron(*arguments, environment=ENVIRONMENT | environment, directory=directory)


def asked(*arguments: str) -> Result:
    """Ask for something that no task is started for."""
    return CliRunner().invoke(app, arguments)


def _shell(command: str) -> list[str]:
    return ["bash", "-ec", f"{ACTIVATE}\n{command}"]


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tutorial's run of the preset tiny, in processes as a user has them: its directory, output and summary."""
    root = tmp_path_factory.mktemp("flow")
    directory = root / "runs" / "tiny"
    (root / ".venv").symlink_to(BIN.parent)
    done = execute(RUN, root)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    summary = json.loads((directory / "summary.json").read_text())
    return {"root": root, "directory": directory, "stdout": done.stdout, "summary": summary}


def test_the_summary_is_complete(flow: dict[str, Any]) -> None:
    summary = flow["summary"]
    assert summary["pipeline"] == "compress"
    assert list(summary["stages"]) == STAGES
    assert all(entry["seconds"] > 0 and entry["peak_rss_mb"] > 50 for entry in summary["stages"].values())
    for model in ("teacher_before", "teacher", "pruned", "student"):
        assert summary[model].keys() == {"parameters", "validation_loss", "perplexity", "tasks"}
        assert "acc" in summary[model]["tasks"]["tiny_continuation"]
    assert summary["student"]["parameters"] < summary["teacher"]["parameters"]
    assert summary["teacher"]["validation_loss"] < summary["teacher_before"]["validation_loss"]
    assert summary["student"]["validation_loss"] < summary["pruned"]["validation_loss"]
    assert summary["distill"]["tokens"] == 40 * 8 * 64 and summary["distill"]["tokens_per_second"] > 0
    assert summary["registered"] == {"name": "tiny", "version": summary["registered"]["version"], "alias": "challenger"}


def test_it_prints_the_table_the_version_and_the_next_command(flow: dict[str, Any]) -> None:
    for text in (
        "The run takes about ",
        "Corrected teacher",
        "registered: tiny version",
        f"student:    {flow['directory']}/results/",
        "report.html",
        "mlflow ui --backend-store-uri",
    ):
        assert text in flow["stdout"]


def test_the_student_loads_with_plain_transformers(flow: dict[str, Any]) -> None:
    (student,) = flow["directory"].glob("results/*/distill/distilled")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    assert model.config.num_hidden_layers == 3 and model.config.intermediate_size == 64
    assert model(**tokenizer("a b", return_tensors="pt")).logits.shape[-1] == 512


def test_mlflow_has_a_parent_run_a_run_per_stage_and_the_version(flow: dict[str, Any]) -> None:
    client = MlflowClient(f"sqlite:///{flow['directory']}/mlflow.db")
    experiment = client.get_experiment_by_name("minitron")
    runs = client.search_runs([experiment.experiment_id])
    nested = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert sorted(run.data.tags[STAGE_TAG] for run in nested) == sorted(STAGES)
    assert len(runs) == 7 and len({run.data.tags["mlflow.parentRunId"] for run in nested}) == 1
    assert all(run.info.status == "FINISHED" for run in runs)
    version = client.get_model_version_by_alias("tiny", "challenger")
    assert str(version.version) == str(flow["summary"]["registered"]["version"])


def test_run_again_it_reuses_every_stage(flow: dict[str, Any]) -> None:
    """An exported address does not move the run away from its work directory, whose database has the registry."""
    done = forked(RUN, flow["root"], MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stderr.startswith(f"MLflow: sqlite:///{flow['directory']}/mlflow.db, in the work directory; ")
    assert [stage for stage in STAGES if f"{stage}: result" in done.stdout] == STAGES
    again = json.loads((flow["directory"] / "summary.json").read_text())
    assert again == flow["summary"]


def test_the_lineage_shows_every_stage_and_makes_the_preset_that_reuses_them_all(flow: dict[str, Any]) -> None:
    uri = {"MLFLOW_TRACKING_URI": f"sqlite:///{flow['directory']}/mlflow.db"}
    shown = execute(f"{URI}\n{LINEAGE}\n{REPRODUCE}", flow["root"])
    assert (shown.returncode, shown.stderr) == (0, "")
    results = list(flow["directory"].glob("results/*/*/*/stage.json"))
    assert len(results) >= len(STAGES)
    for result in results:
        record = json.loads(result.read_text())
        assert record["stage"] == "register" or record["output_sha256"] in shown.stdout
        assert record["mlflow_run_id"] in shown.stdout and record["pipeline_run_id"] in shown.stdout
    done = forked(RUN_AGAIN, flow["root"], **uri)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert [stage for stage in STAGES if f"{stage}: result" in done.stdout] == STAGES[:-1]
    registered = json.loads((flow["directory"] / "summary.json").read_text())["registered"]
    aliases = MlflowClient(uri["MLFLOW_TRACKING_URI"]).get_registered_model("tiny").aliases
    assert registered["alias"] == "reproduced" and {alias: int(version) for alias, version in aliases.items()} == {
        "challenger": int(flow["summary"]["registered"]["version"]),
        "reproduced": int(registered["version"]),
    }


RUN_UPLOADED = """
import json, sys
from pathlib import Path
from minitron.cli.local import run_pipeline
if __name__ == "__main__":
    run_pipeline(*json.load(sys.stdin), Path(sys.argv[1]))
"""


def test_what_submit_starts_on_a_cluster_is_what_ran_here(flow: dict[str, Any]) -> None:
    """The uploaded pipeline with the arguments of its run, where the volume is the workspace of the tutorial's run."""
    address, database = "http://mlflow.minitron:5000", f"sqlite:///{flow['directory']}/mlflow.db"
    with kubeflow_server() as server:
        settings = ["--preset", "tiny", "--set", f"tracking_uri={address}", "--host", server.url]
        done = asked("submit", "compress", *settings)
        assert done.exit_code == 0 and "at most 0 GPUs at a time" in done.stdout, done.output
        (run,) = server.runs.values()
        uploaded = server.versions[run["pipeline_version_reference"]["pipeline_version_id"]]["pipeline_spec"]
    arguments = run["runtime_config"]["parameters"] | {"tracking_uri": database}
    assert arguments["teacher"] == "sample://tiny/teacher"
    started = subprocess.run(
        [sys.executable, "-c", RUN_UPLOADED, str(flow["directory"])],
        input=json.dumps([[uploaded["pipeline_spec"], uploaded["platform_spec"]], arguments]),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert started.returncode == 0, started.stdout[-3000:] + started.stderr[-2000:]
    assert [stage for stage in STAGES if f"{stage}: result" in started.stdout] == STAGES


def test_tensorboard_reads_the_curves_of_the_run_from_mlflow(flow: dict[str, Any], tmp_path: Path) -> None:
    client = MlflowClient(f"sqlite:///{flow['directory']}/mlflow.db")
    version = client.get_model_version("tiny", str(flow["summary"]["registered"]["version"]))
    client.download_artifacts(version.run_id, "tensorboard", str(tmp_path))
    (record,) = flow["directory"].glob("workspace/distill/*/stage.json")
    history = json.loads(record.read_text())["history"]
    curves = read_events(tmp_path / "tensorboard" / "distill")
    for name in ("cross_entropy", "kl", "validation_loss"):
        points = [(row["step"], row[name]) for row in history if name in row]
        assert len(points) > 2 and curves[name] == [(step, pytest.approx(value)) for step, value in points]
    assert (tmp_path / "tensorboard" / "finetune").is_dir()


def test_a_misspelled_key_is_refused_before_anything_starts(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    done = asked("run", "compress", "--preset", "tiny", "--work-dir", str(directory), "--set", "distill.max_step=3")
    assert done.exit_code == 2
    assert done.stderr.strip() == "error: distill.max_step: unknown key; did you mean 'distill.max_steps'?"
    assert not directory.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compres", "--preset", "tiny"], "pipeline compres: unknown; did you mean 'compress'?"),
        (["compress", "--preset", "tinny"], "preset tinny: no such file or preset; did you mean 'tiny'?"),
        (["compress", "--preset", "tiny", "--set", "seed"], "--set seed: no '='; write key=value"),
        (
            ["compress", "--preset", "tiny", "--set", "distill.max_steps=many"],
            "distill.max_steps: Input should be a valid integer, unable to parse string as an integer (found 'many')",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = asked("run", *arguments, "--work-dir", str(tmp_path / "run"))
    assert (done.exit_code, done.stderr.strip()) == (2, f"error: {message}")
    assert not (tmp_path / "run").exists()


def test_the_version_is_shown() -> None:
    from minitron import __version__

    assert asked("--version").stdout.strip() == __version__


def test_these_are_the_commands_of_the_tutorial() -> None:
    assert read_shell_lines("docs/tutorial.md") == [
        *(MAKE_DEMO, ACTIVATE, RUN, RUN_LONGER, HELP, MLFLOW),
        *(URI, LINEAGE, REPRODUCE, RUN_AGAIN, RETRAIN, RETRAIN),
        GARBAGE,
    ]


def test_the_make_commands_start_the_demo_and_the_tests() -> None:
    """Only what they would run: the demo takes ten minutes, and these are the tests."""
    for command, started in (
        (MAKE_DEMO, ".venv/bin/minitron run compress --preset demo --work-dir runs/demo"),
        (MAKE_TEST, ".venv/bin/pytest -n 2 --dist worksteal tests"),
    ):
        done = subprocess.run([*shlex.split(command), "-n"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert started in done.stdout


def test_a_changed_setting_runs_only_what_depends_on_it(flow: dict[str, Any]) -> None:
    client = MlflowClient(f"sqlite:///{flow['directory']}/mlflow.db")
    before = [int(version.version) for version in client.search_model_versions("name = 'tiny'")]
    done = forked(RUN_LONGER, flow["root"])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    reused = [stage for stage in STAGES if f"{stage}: result" in done.stdout]
    assert reused == ["prepare", "finetune", "prune"]
    summary = json.loads((flow["directory"] / "summary.json").read_text())
    assert summary["distill"]["tokens"] == 2 * flow["summary"]["distill"]["tokens"]
    assert int(summary["registered"]["version"]) == max(before) + 1


def test_nothing_that_the_version_was_made_from_is_garbage(flow: dict[str, Any]) -> None:
    done = forked(GARBAGE, flow["root"])
    lines = [line for line in done.stdout.splitlines() if " workspace/" in line]
    kept = [line.partition(" workspace/")[2].partition("/")[0] for line in lines if "was made from it" in line]
    assert set(kept) == {*STAGES, "models"} and not [line for line in lines if line.startswith("goes")], done.stdout


def test_the_help_names_every_option(flow: dict[str, Any]) -> None:
    done = execute(HELP, flow["root"])
    assert done.returncode == 0
    assert all(option in done.stdout for option in ("--preset", "--set", "--work-dir", "--debug"))


def test_the_mlflow_page_opens(flow: dict[str, Any]) -> None:
    """At a free port: something may use the default one."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    with (
        run_server(_shell(f"{MLFLOW} --port {port}"), flow["root"], uri, ENVIRONMENT),
        urllib.request.urlopen(uri) as page,
    ):
        assert "<title>MLflow" in page.read().decode()


def test_the_results_are_those_of_version_0_1_0(flow: dict[str, Any]) -> None:
    """Bit for bit where torch, its vector instructions and threads are those that made the golden; else nearly.

    tests/runtime/test_golden.py holds the keys of all stages, on any machine. Here those of prune and distill differ:
    their inputs' config.json keeps the teacher's use_cache, which 0.1.0 set to false. The weights of distill are those
    of 0.7.0, whose loss adds up in another order.
    """
    golden = json.loads((REPOSITORY / "tests" / "runtime" / "golden.json").read_text())
    same_machine = (torch.__version__, torch.backends.cpu.get_cpu_capability()) == (golden["torch"], golden["cpu"])
    for stage in ("prepare", "finetune", "prune", "distill"):
        expected = golden["stages"][stage]
        results = flow["directory"].glob(f"workspace/{stage}/*/stage.json")
        path = min(results, key=lambda path: path.stat().st_mtime)  # other tests run it again
        record = json.loads(path.read_text())
        if stage in ("prepare", "finetune"):
            assert record["key"] == expected["key"], stage
        if stage == "prepare":
            assert record["output_sha256"] == expected["output_sha256"]
        elif same_machine:
            assert content_hash(path.with_name("model.safetensors")) == expected["weights_sha256"], stage
        losses = [row["validation_loss"] for row in record.get("history", []) if "validation_loss" in row]
        assert losses == pytest.approx(expected.get("validation_loss", []), abs=1e-3), stage
