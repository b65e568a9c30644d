"""MLflow sees every stage while it runs, on a real server and on a SQLite file, and cannot hurt it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron.config.metrics import format_moment
from minitron.config.parse import parse
from minitron.config.stages import StageConfig
from minitron.errors import ConfigError, RunError
from minitron.runtime import stage
from minitron.stages import finetune
from minitron.tracking import pipeline_run, stage_run
from minitron.tracking.client import connect
from tests.constants import SEQUENCE
from tests.servers import forks
from tests.servers.http_server import free_port
from tests.servers.processes import wait_until


@pytest.fixture
def make(tmp_path: Path, teacher: Path) -> Callable[..., StageConfig]:
    """Return a function that makes the configuration of a prepare or finetune with this test's own experiment."""
    (tmp_path / "corpus.txt").write_text("some text\n")

    def configuration(name: str, uri: str | None, **values: Any) -> StageConfig:
        inputs = {"corpus": tmp_path / "corpus.txt"} if name == "prepare" else {"dataset": tmp_path / "corpus.txt"}
        common = {"output": tmp_path / name, "tracking_uri": uri, "experiment": tmp_path.name, "teacher": str(teacher)}
        return parse(name, common | {key: str(path) for key, path in inputs.items()} | values)

    return configuration


def _work(config: Any, directory: Path, tracker: stage_run.Tracker) -> dict[str, Any]:
    (directory / "result.txt").write_text("result")
    for step in range(3):
        tracker.log({"loss": 3.0 - step, "learning_rate": 0.1}, step)
    return {"metrics": {"best_loss": 1.0, "corrected": 1, "note": "no number"}}


def _runs(uri: str, experiment: str) -> list[Any]:
    client = connect(uri)
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def _runs_by_stage(uri: str, experiment: str) -> dict[str, Any]:
    """Return the runs by their stages; the pipeline run's is `pipeline`."""
    return {run.data.tags.get(pipeline_run.STAGE_TAG, "pipeline"): run for run in _runs(uri, experiment)}


def _history(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    points = connect(uri).get_metric_history(run_id, metric)
    return sorted((point.step, point.value) for point in points)


def _run_with_points(uri: str, experiment: str, metric: str, count: int) -> Any:
    """Return the run of which so many points have arrived, or None."""
    runs = _runs(uri, experiment) if connect(uri).get_experiment_by_name(experiment) else []
    return next((run for run in runs if len(_history(uri, run.info.run_id, metric)) >= count), None)


def test_without_a_uri_mlflow_is_not_imported(tmp_path: Path, teacher: Path) -> None:
    """In a process of its own: this one has imported it."""
    (tmp_path / "corpus.txt").write_text("some text\n")
    code = f"""
import sys
from minitron.runtime import stage
from minitron.tracking import pipeline_run, stage_run
from minitron.config.parse import parse
config = parse("prepare", {{"output": "{tmp_path}/out", "corpus": "{tmp_path}/corpus.txt", "teacher": "{teacher}"}})
stage.run(config, lambda config, directory, tracker: tracker.log({{"loss": 1.0}}) or {{"metrics": {{}}}})
sys.exit("mlflow" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert (tmp_path / "out" / "stage.json").is_file()


def test_stages_are_nested_under_one_parent(uri: str, make: Callable[..., StageConfig], tmp_path: Path) -> None:
    records = {}
    for name in ("prepare", "finetune"):
        records[name] = stage.run(make(name, uri, pipeline_run_id="pipeline-7"), _work)
    runs = _runs_by_stage(uri, tmp_path.name)
    parent = runs.pop("pipeline")
    assert parent.data.tags["kfp.run_id"] == "pipeline-7" and parent.info.status == "FINISHED"
    started = format_moment(parent.info.start_time / 1000).removesuffix(" UTC")
    assert parent.info.run_name == f"{started} pipeline"
    assert runs.keys() == {"prepare", "finetune"}
    for name, run in runs.items():
        assert run.info.run_name == f"{name} · {parent.info.run_name}"
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["minitron.key"] == records[name]["key"]
        assert run.data.tags["input.teacher"] == records[name]["inputs"]["teacher"]["sha256"]
        read = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
        assert {name: dataset.digest for name, dataset in read.items()} == {
            input_name: entry["sha256"][:36] for input_name, entry in records[name]["inputs"].items()
        }
        assert json.loads(read["teacher"].source) == {"uri": records[name]["inputs"]["teacher"]["address"]}
        assert {k: v for k, v in run.data.metrics.items() if k != "loss"} == {
            "learning_rate": 0.1,
            "best_loss": 1.0,
            "corrected": 1.0,
        }
        assert _history(uri, run.info.run_id, "loss") == [(0, 3.0), (1, 2.0), (2, 1.0)]
        assert _history(uri, run.info.run_id, "best_loss") == [(2, 1.0)]
        path = connect(uri).download_artifacts(run.info.run_id, "stage.json", str(tmp_path))
        assert json.loads(Path(path).read_text()) == records[name]
    assert runs["finetune"].data.params["max_steps"] == "30"
    assert runs["finetune"].data.params["learning_rate"] == "0.0001"
    assert runs["finetune"].data.params["enabled"] == "true" and "tracking_uri" not in runs["finetune"].data.params


def test_a_validation_curve_has_each_step_once_with_its_own_value(
    uri: str, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    values = {"teacher": str(teacher), "dataset": dataset, "output": tmp_path / "out", "tracking_uri": uri}
    values |= {"sequence_length": SEQUENCE, "micro_batch_size": 2, "global_batch_size": 2, "max_steps": 6}
    values |= {"validation_interval": 2, "validation_sequences": 4, "experiment": tmp_path.name, "learning_rate": 0.2}
    record = finetune.run(parse("finetune", values))
    (run,) = _runs(uri, tmp_path.name)
    curve = [(row["step"], row["validation_loss"]) for row in record["history"] if "validation_loss" in row]
    assert [step for step, _ in curve] == [0, 2, 4, 6] and min(loss for _, loss in curve) != curve[-1][1]
    assert _history(uri, run.info.run_id, "validation_loss") == curve
    for name, value in record["metrics"].items():
        logged = "best_validation_loss" if name == "validation_loss" else name
        assert _history(uri, run.info.run_id, logged) == [(6, value)], name


def test_a_number_that_is_not_finite_is_not_logged(
    mlflow_file: str, make: Callable[..., StageConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(config: Any, directory: Path, tracker: stage_run.Tracker) -> dict[str, Any]:
        tracker.log({"loss": 3.0, "speed": float("inf")}, 1)
        return {"metrics": {}}

    stage.run(make("prepare", mlflow_file), work)
    (run,) = _runs(mlflow_file, tmp_path.name)
    assert run.data.metrics == {"loss": 3.0}
    assert "prepare: MLflow: speed is inf at step 1: not logged" in capsys.readouterr().err


def test_mlflow_run_id_is_joined(
    uri: str, make: Callable[..., StageConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(uri)
    experiment = client.create_experiment(f"{tmp_path.name}-given", artifact_location=str(tmp_path / "artifacts"))
    given = client.create_run(experiment, run_name="opened by someone else").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    stage.run(make("prepare", uri, pipeline_run_id="ignored"), _work)
    runs = _runs_by_stage(uri, f"{tmp_path.name}-given")
    assert runs["prepare"].data.tags["mlflow.parentRunId"] == given
    assert runs["prepare"].info.run_name == "prepare · opened by someone else"
    assert runs["pipeline"].info.status == "RUNNING" and len(runs) == 2
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(RunError, match=f"{'0' * 32}.* not found"):
        stage.run(make("finetune", uri), _work)


def test_every_stage_joins_the_earliest_parent(uri: str, make: Callable[..., StageConfig], tmp_path: Path) -> None:
    """Two stages that started at once may each have made a parent."""
    client = connect(uri)
    experiment = client.create_experiment(tmp_path.name, artifact_location=str(tmp_path / "artifacts"))
    late, early = (
        client.create_run(experiment, start_time=start, tags={"kfp.run_id": "p"}).info.run_id for start in (2000, 1000)
    )
    stage.run(make("prepare", uri, pipeline_run_id="p"), _work)
    runs = _runs(uri, tmp_path.name)
    assert [tags["mlflow.parentRunId"] for run in runs if pipeline_run.STAGE_TAG in (tags := run.data.tags)] == [early]
    assert len(runs) == 3 and late in {run.info.run_id for run in runs}


def test_a_parent_made_too_late_is_taken_back(
    mlflow_file: str, make: Callable[..., StageConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another stage makes the parent between this one's search and its own."""
    client = connect(mlflow_file)
    create_run, rivals = client.create_run, []

    def slowly(experiment_id: str, start_time: int | None = None, **values: Any) -> Any:
        if "kfp.run_id" in values["tags"]:
            rivals.append(create_run(experiment_id, 1000, **values | {"run_name": "rival"}).info.run_id)
        return create_run(experiment_id, start_time, **values)

    monkeypatch.setattr(client, "create_run", slowly)
    monkeypatch.setattr(stage_run, "connect", lambda uri, create: client)
    stage.run(make("prepare", mlflow_file, pipeline_run_id="p"), _work)
    runs = _runs_by_stage(mlflow_file, tmp_path.name)
    assert runs.keys() == {"pipeline", "prepare"} and runs["pipeline"].info.run_name == "rival"
    assert [runs["prepare"].data.tags["mlflow.parentRunId"]] == rivals == [runs["pipeline"].info.run_id]


def _assert_the_environment_rests(seconds: float) -> None:
    """A library that goes through the environment, as accelerate does, fails if another thread adds to it."""
    before, deadline = dict(os.environ), time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert dict(os.environ) == before
        time.sleep(0.0002)


def test_metrics_are_visible_in_mid_run(
    uri: str, make: Callable[..., StageConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron.tracking.outbox._INTERVAL_SECONDS", 0.5)
    seen = []

    def work(config: StageConfig, directory: Path, tracker: stage_run.Tracker) -> dict[str, Any]:
        for step in range(2):
            tracker.log({"loss": 5.0 - step}, step)
            _assert_the_environment_rests(1)  # points take up to half a second, and a request
            run = wait_until(partial(_run_with_points, uri, tmp_path.name, "loss", step + 1))
            seen.append((run.info.status, _history(uri, run.info.run_id, "loss")))
        return {"metrics": {}}

    stage.run(make("prepare", uri), work)
    assert seen == [("RUNNING", [(0, 5.0)]), ("RUNNING", [(0, 5.0), (1, 4.0)])]
    assert "mlflow.parentRunId" not in _runs(uri, tmp_path.name)[0].data.tags


def test_a_stage_that_logs_nothing_gives_a_sign_of_life(
    mlflow_file: str, make: Callable[..., StageConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another run would take it for dead, and train the same."""
    monkeypatch.setattr("minitron.tracking.outbox._SILENCE_SECONDS", 1)
    signs: set[float] = set()

    def work(config: Any, directory: Path, tracker: stage_run.Tracker) -> dict[str, Any]:
        def gave_two() -> bool:
            tags = [run.data.tags for run in _runs(mlflow_file, tmp_path.name) if run.info.run_id == tracker.run_id]
            signs.update(float(tag[pipeline_run.ALIVE_TAG]) for tag in tags if pipeline_run.ALIVE_TAG in tag)
            return len(signs) == 2

        wait_until(gave_two)
        return {"metrics": {}}

    before = time.time()
    stage.run(make("prepare", mlflow_file), work)
    assert all(before <= sign <= time.time() for sign in signs)


@pytest.mark.parametrize(
    ("error", "status"), [(RunError("disk full"), "FAILED"), (ValueError("bug"), "FAILED"), (SystemExit(143), "KILLED")]
)
def test_failure_is_told_and_continued(
    uri: str, make: Callable[..., StageConfig], tmp_path: Path, error: BaseException, status: str
) -> None:
    def work(config: StageConfig, directory: Path, tracker: stage_run.Tracker) -> dict[str, Any]:
        tracker.log({"loss": 5.0}, 1)
        raise error

    config = make("prepare", uri, pipeline_run_id="p")
    with pytest.raises(type(error)):
        stage.run(config, work)
    runs = _runs_by_stage(uri, tmp_path.name)
    assert [run.info.status for run in runs.values()] == [status, status]
    assert runs["prepare"].data.tags["minitron.error"] == f"{type(error).__name__}: {error}"
    stage.run(config, _work)
    again = _runs_by_stage(uri, tmp_path.name)
    assert [run.info.status for run in again.values()] == ["FINISHED", "FINISHED"]
    assert {name: run.info.run_id for name, run in again.items()} == {n: r.info.run_id for n, r in runs.items()}


def test_a_resumed_stage_has_every_point_once(
    mlflow_file: str, make: Callable[..., StageConfig], tmp_path: Path
) -> None:
    """A killed attempt took the points of steps 1 and 2 with it, which the resumed one does not repeat."""

    def killed(config: StageConfig, directory: Path, tracker: stage_run.Tracker) -> dict[str, Any]:
        tracker.log({"pass@1": 0.5}, 3)
        raise SystemExit(143)

    def resumed(config: StageConfig, directory: Path, tracker: stage_run.Tracker) -> dict[str, Any]:
        tracker.log({"pass@1": 0.5, "loss": 1.0}, 3)
        return {"metrics": {}, "history": [{"step": step, "loss": 4.0 - step} for step in (1, 2, 3)]}

    with pytest.raises(SystemExit):
        stage.run(make("prepare", mlflow_file), killed)
    stage.run(make("prepare", mlflow_file), resumed)
    (run,) = _runs(mlflow_file, tmp_path.name)
    assert _history(mlflow_file, run.info.run_id, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert _history(mlflow_file, run.info.run_id, "pass_at_1") == [(3, 0.5)]


def test_a_finished_run_is_not_continued(mlflow_file: str, make: Callable[..., StageConfig], tmp_path: Path) -> None:
    for name in ("one", "two"):
        stage.run(make("prepare", mlflow_file, output=str(tmp_path / name)), _work)
    assert [run.info.status for run in _runs(mlflow_file, tmp_path.name)] == ["FINISHED", "FINISHED"]


def test_a_real_training_is_watched_terminated_and_resumed(
    mlflow_file: str, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    uri, name = mlflow_file, tmp_path.name
    connect(uri).search_experiments()  # two processes must not make the tables at once
    values = {"output": f"{tmp_path}/out", "teacher": f"{teacher}", "dataset": f"{dataset}", "tracking_uri": uri}
    values |= {"sequence_length": SEQUENCE, "micro_batch_size": 2, "global_batch_size": 2, "max_steps": 200}
    values |= {"checkpoint_interval": 10, "validation_interval": 200, "validation_sequences": 2, "experiment": name}
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(values))
    at_once = (
        "from minitron.tracking import outbox; from minitron.runtime import entry; "
        "outbox._INTERVAL_SECONDS = 0.05; entry.main('finetune')"
    )
    command = ["-c", at_once, "--config", str(tmp_path / "finetune.yaml")]
    (tmp_path / "cwd").mkdir()
    process = forks.start_python(command, tmp_path / "log", tmp_path / "log", directory=tmp_path / "cwd")
    run = wait_until(lambda: _run_with_points(uri, name, "cross_entropy", 12) or process.exitcode, 120)
    assert process.exitcode is None, (tmp_path / "log").read_text()
    assert run.info.status == "RUNNING"
    process.terminate()
    process.join(120)
    assert process.exitcode == 128 + signal.SIGTERM
    assert [run.info.status for run in _runs(uri, name)] == ["KILLED"]
    assert forks.run_python(*command, directory=tmp_path / "cwd").returncode == 0
    runs = _runs(uri, name)
    assert [(r.info.run_id, r.info.status) for r in runs] == [(run.info.run_id, "FINISHED")]
    assert [step for step, _ in _history(uri, run.info.run_id, "cross_entropy")] == list(range(1, 201))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "finetune.yaml", "cwd", "log"}
    assert not list((tmp_path / "cwd").iterdir())


def test_sigterm_waits_for_the_end_of_a_call(
    uri: str, make: Callable[..., StageConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off in a commit, SQLite stays locked. The work is done: the next attempt finds the result."""
    sent = []

    def work(config: Any, directory: Path, tracker: Any) -> dict[str, Any]:
        def log_batch(*arguments: Any, **values: Any) -> None:
            signal.raise_signal(signal.SIGTERM)
            sent.append(send(*arguments, **values))

        send = tracker.client.log_batch
        monkeypatch.setattr(tracker.client, "log_batch", log_batch)
        return {"metrics": {"loss": 1.0}}

    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with pytest.raises(SystemExit, match="143"):
            stage.run(make("prepare", uri), work)
    finally:
        signal.signal(signal.SIGTERM, before)
    stage.run(make("prepare", uri), lambda *_: pytest.fail("making it again"))
    (run,) = _runs(uri, tmp_path.name)
    assert run.info.status == "FINISHED"
    assert _history(uri, run.info.run_id, "loss") == [(0, 1.0)] and len(sent) == 1


@pytest.mark.parametrize("listening", [False, True], ids=["refused", "silent"])
def test_an_unreachable_server_is_one_line(
    make: Callable[..., StageConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listening: bool
) -> None:
    port, called = free_port(), []
    with socket.socket() as silent:
        if listening:
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
            silent.bind(("127.0.0.1", port))
            silent.listen()
        started = time.monotonic()
        with pytest.raises(RunError) as caught:
            stage.run(make("prepare", f"http://user:secret@127.0.0.1:{port}"), lambda *_: called.append(1) or {})
    message, cause = str(caught.value), "timed out" if listening else "Connection refused"
    assert message.startswith(f"MLflow at http://127.0.0.1:{port}: ") and cause in message and "\n" not in message
    assert "secret" not in message and "check tracking_uri" in message
    assert time.monotonic() - started < 8
    assert not called and {path.name for path in tmp_path.iterdir()} == {"corpus.txt"}


def test_a_place_that_mlflow_cannot_write_to_is_refused(make: Callable[..., StageConfig], tmp_path: Path) -> None:
    for uri in ("./mlruns", "htp://server"):
        with pytest.raises(ConfigError, match=r"tracking_uri .*; give http\(s\)://HOST or sqlite:///FILE"):
            stage.run(make("prepare", uri), _work)
    with pytest.raises(RunError, match=r"MLflow at sqlite:////proc/nothing/mlflow.db: .*check tracking_uri"):
        stage.run(make("prepare", "sqlite:////proc/nothing/mlflow.db"), _work)
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.txt"}


def test_a_server_that_goes_away_costs_nothing(
    mlflow_process: tuple[str, int],
    make: Callable[..., StageConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri, server = mlflow_process
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))

    def work(config: StageConfig, directory: Path, tracker: stage_run.Tracker) -> dict[str, Any]:
        tracker.log({"loss": 9.0}, 0)
        os.kill(server, signal.SIGSTOP)
        try:
            started = time.monotonic()
            for step in range(1, 200):
                tracker.log({"loss": 9.0 - step}, step)
            assert time.monotonic() - started < 1
            time.sleep(6)
        finally:
            os.kill(server, signal.SIGCONT)
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        return {"metrics": {}}

    started = time.monotonic()
    stage.run(make("prepare", uri), work)
    assert time.monotonic() - started < 40
    assert capsys.readouterr().err.count("warning: prepare: MLflow: ") == 1
    (run,) = _runs(uri, tmp_path.name)
    assert run.info.status == "FINISHED"
    assert _history(uri, run.info.run_id, "loss") == [(step, 9.0 - step) for step in range(200)]


def test_a_server_that_never_comes_back_does_not_lose_the_result(
    mlflow_process: tuple[str, int],
    make: Callable[..., StageConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri, server = mlflow_process
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))

    def work(config: StageConfig, directory: Path, tracker: stage_run.Tracker) -> dict[str, Any]:
        os.kill(server, signal.SIGSTOP)
        return {"metrics": {"loss": 1.0}}

    try:
        record = stage.run(make("prepare", uri), work)
    finally:
        os.kill(server, signal.SIGCONT)
    assert json.loads((tmp_path / "prepare" / "stage.json").read_text()) == record


def test_long_values_are_cut_at_mlflows_limit(uri: str, make: Callable[..., StageConfig], tmp_path: Path) -> None:
    stage.run(make("prepare", uri, licence="x" * 9000), _work)
    assert _runs(uri, tmp_path.name)[0].data.params["licence"] == "x" * 6000


def test_sqlite_is_quiet_and_leaves_nothing_in_the_working_directory(inputs: dict[str, Path], tmp_path: Path) -> None:
    """In a process of its own, as every stage runs: mlflow takes its log level when it is imported."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    settings = {name: str(inputs[name]) for name in ("teacher", "corpus")} | {"output": str(tmp_path / "dataset")}
    settings |= {"validation_fraction": 0.1, "test_fraction": 0.1, "tracking_uri": f"sqlite:///{tmp_path}/db/mlflow.db"}
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "minitron.prepare", "--config", str(tmp_path / "prepare.yaml")]
    done = subprocess.run(command, check=True, cwd=elsewhere, capture_output=True, text=True)
    assert not list(elsewhere.iterdir())
    assert {path.name for path in (tmp_path / "db").iterdir()} == {"mlflow.db", "mlartifacts"}
    assert "INFO" not in done.stderr
