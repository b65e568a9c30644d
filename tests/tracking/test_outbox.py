"""What MLflow missed while it was away arrives later, in order and once: real servers, killed and started again."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import requests

from minitron.config.parse import parse
from minitron.config.stages import StageConfig
from minitron.runtime import stage
from minitron.tracking import stage_run
from minitron.tracking.client import connect
from minitron.tracking.outbox import Message, Outbox, deliver_messages
from minitron.tracking.pipeline_run import RUN_TAG
from tests.servers.http_server import free_port
from tests.servers.mlflow_server import mlflow_serving
from tests.servers.processes import wait_until


class Server:
    """A real MLflow server that can be killed, and started again on the same database."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._port, self._running = directory, free_port(), ExitStack()
        self.uri, self.up = f"http://127.0.0.1:{self._port}", False

    def start(self) -> None:
        self._running.enter_context(mlflow_serving(self._directory, self._port))
        self.up = True

    def kill(self) -> None:
        self.up = False
        self._running.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("minitron.tracking.outbox._PAUSE_SECONDS", 1)
    if not running.up:  # the first test, or one that comes after a failure
        running.start()
    return running


@pytest.fixture
def make(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., StageConfig]:
    """Return a function that makes the configuration of a prepare with this test's own experiment and cache."""
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))

    def configuration(uri: str, name: str = "one", **values: Any) -> StageConfig:
        (tmp_path / f"{name}.txt").write_text(f"some text of {name}\n")
        common = {"output": tmp_path / name, "corpus": str(tmp_path / f"{name}.txt"), "teacher": str(teacher)}
        return parse("prepare", common | {"tracking_uri": uri, "experiment": tmp_path.name} | values)

    return configuration


def _runs(uri: str, experiment: str) -> dict[str, Any]:
    """Return the runs by their corpus, the parent by its name."""
    client = connect(uri)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return {Path(run.data.params.get("corpus", run.data.tags.get(RUN_TAG, ""))).stem: run for run in runs}


def _points(uri: str, run: Any) -> list[tuple[int, float, int]]:
    """Return the points of `loss` as they were stored."""
    points = connect(uri).get_metric_history(run.info.run_id, "loss")
    return [(point.step, point.value, point.timestamp) for point in points]


def _left(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("unsent/*/*") if path.is_file()]


def test_a_server_killed_in_mid_run_and_started_again_has_every_point(
    server: Server, make: Callable[..., StageConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longest = 0.0

    def work(config: StageConfig, directory: Path, tracker: stage_run.Tracker) -> dict[str, Any]:
        nonlocal longest
        for step in range(150):
            if step == 25:
                server.kill()
            if step == 100:
                assert len(wait_until(lambda: _left(tmp_path))) == 1, "what waits outlives a kill"
                server.start()
            before = time.monotonic()
            tracker.log({"loss": 150.0 - step}, step)
            longest = max(longest, time.monotonic() - before)
            time.sleep(0.03)
        return {"metrics": {}}

    stage.run(make(server.uri), work)
    run = _runs(server.uri, tmp_path.name)["one"]
    points = _points(server.uri, run)
    assert [(step, value) for step, value, _ in points] == [(step, 150.0 - step) for step in range(150)]
    times = [timestamp for _, _, timestamp in points]
    assert times == sorted(times) and times[99] - times[50] > 1000, "each has the time at which it was measured"
    assert run.info.status == "FINISHED" and not _left(tmp_path) and longest < 1
    assert capsys.readouterr().err.count("missing data is sent when it answers again") == 1


def test_what_a_server_missed_at_the_end_is_sent_by_the_next_stage(
    server: Server, make: Callable[..., StageConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parent run has the status of the latest stage."""

    def work(config: Any, directory: Path, tracker: stage_run.Tracker) -> dict[str, Any]:
        tracker.log({"loss": 2.0}, 1)
        if "one" in config.corpus:
            wait_until(lambda: connect(server.uri).get_metric_history(tracker.run_id, "loss"))
            server.kill()
        tracker.log({"loss": 1.0}, 2)
        return {"metrics": {"best": 1.0}}

    record = stage.run(make(server.uri, pipeline_run_id="p"), work)
    (left,) = _left(tmp_path)
    assert f"not all arrived; the next stage that reaches MLflow sends the rest of {left}" in capsys.readouterr().err
    server.start()
    runs = _runs(server.uri, tmp_path.name)
    assert [run.info.status for run in runs.values()] == ["RUNNING", "RUNNING"]
    assert [point[:2] for point in _points(server.uri, runs["one"])] == [(1, 2.0)]
    stage.run(make(server.uri, "two", pipeline_run_id="p"), work)
    runs = _runs(server.uri, tmp_path.name)
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(["one", "two", "p"], "FINISHED")
    assert [point[:2] for point in _points(server.uri, runs["one"])] == [(1, 2.0), (2, 1.0)]
    assert runs["one"].info.end_time < runs["two"].info.start_time and runs["one"].data.metrics["best"] == 1.0
    path = connect(server.uri).download_artifacts(runs["one"].info.run_id, "stage.json", str(tmp_path))
    assert json.loads(Path(path).read_text()) == record and not _left(tmp_path)


def test_what_a_killed_process_kept_is_sent_and_its_last_line_may_be_cut_off(tmp_path: Path) -> None:
    """A process without a server keeps what it puts, and nobody takes the file of one that lives."""
    path = tmp_path / "1-run.jsonl"
    code = f"""
import sys, time
from pathlib import Path
from minitron.tracking import outbox
outbox._INTERVAL_SECONDS = 0.1
def send(message):
    raise ConnectionError("away")
box = outbox.Outbox(Path({str(path)!r}), send, print, dict)
with box._sending:  # so that all go together
    for step in range(2500):
        box.put({{"run": "r", "points": [["loss", 1.0, step, step]]}})
box.put({{"run": "r", "tag": ["a", "b"]}})
while "tag" not in (Path({str(path)!r}).read_text() if Path({str(path)!r}).exists() else ""):
    time.sleep(0.1)
print("kept", flush=True)
time.sleep(60)
"""
    got: list[Message] = []
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and [process.stdout.readline() for _ in range(2)] == ["away\n", "kept\n"]
            deliver_messages(tmp_path, got.append)
            assert not got and path.exists()
        finally:
            process.kill()
    with path.open("a") as stream:
        stream.write('{"run": "r", "po')
    deliver_messages(tmp_path, got.append)
    assert [len(message["points"]) for message in got[:-1]] == [1000, 1000, 500] and "tag" in got[-1]
    assert [point[3] for message in got[:-1] for point in message["points"]] == list(range(2500))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_costs_nothing_as_long_as_the_process_lives(tmp_path: Path) -> None:
    got: list[Message] = []
    complaints: list[str] = []
    away = True

    def send(message: Message) -> None:
        if away:
            raise ConnectionError("away")
        got.append(message)

    (tmp_path / "file").write_text("")  # no directory can be made here
    box = Outbox(tmp_path / "file" / "1.jsonl", send, lambda error: complaints.append(type(error).__name__), dict)
    box.put({"run": "r", "points": [["loss", 1.0, 1, 1]]})
    assert not box.flush() and complaints == ["ConnectionError", "FileExistsError"]
    away = False
    assert box.close([]) and [message["points"] for message in got] == [[["loss", 1.0, 1, 1]]]


class _Forwarder(BaseHTTPRequestHandler):
    """Passes requests on to a server, and cuts the connection before the first two answers to a batch of losses."""

    uri, lost = "", 0

    def _forward(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {"Content-Type": self.headers.get("Content-Type", "")}
        answer = requests.request(self.command, self.uri + self.path, data=data, headers=headers, timeout=10)
        if b"loss" in data and type(self).lost < 2:
            type(self).lost += 1
            return
        self.send_response(answer.status_code)
        self.end_headers()
        self.wfile.write(answer.content)

    do_GET = do_POST = do_PUT = _forward

    def log_message(self, *arguments: Any) -> None:
        pass


def test_a_batch_whose_answer_was_lost_arrives_once(
    server: Server, make: Callable[..., StageConfig], tmp_path: Path
) -> None:
    def work(config: StageConfig, directory: Path, tracker: stage_run.Tracker) -> dict[str, Any]:
        for step in range(10):
            tracker.log({"loss": 1.0, "large": 1e308}, step)
        wait_until(lambda: handler.lost == 2)
        return {"metrics": {}}

    handler = type("Handler", (_Forwarder,), {"uri": server.uri})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as forwarder:
        Thread(target=forwarder.serve_forever, args=(0.02,), daemon=True).start()
        stage.run(make(f"http://127.0.0.1:{forwarder.server_port}"), work)
        forwarder.shutdown()
    run = _runs(server.uri, tmp_path.name)["one"]
    assert [step for step, _, _ in _points(server.uri, run)] == list(range(10)) and handler.lost == 2
    assert len(connect(server.uri).get_metric_history(run.info.run_id, "large")) == 10
    assert run.info.status == "FINISHED" and not _left(tmp_path)


def test_what_mlflow_refuses_is_dropped_and_the_rest_arrives(
    server: Server,
    make: Callable[..., StageConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name that MLflow refuses comes with others in one request; only its own points are lost."""
    monkeypatch.setattr(stage_run, "make_metric_name", lambda name: name)

    def work(config: StageConfig, directory: Path, tracker: Any) -> dict[str, Any]:
        tracker.log({"other": 3.0, "pass@1": 1.0, "loss": 1.0}, 2)
        return {"metrics": {}}

    stage.run(make(server.uri), work)
    run = _runs(server.uri, tmp_path.name)["one"]
    assert run.info.status == "FINISHED" and [step for step, _, _ in _points(server.uri, run)] == [2]
    assert run.data.metrics == {"other": 3.0, "loss": 1.0}
    said = capsys.readouterr().err
    assert (
        f"run {run.info.run_id}: metric pass@1 dropped: INVALID_PARAMETER_VALUE" in said and said.count("dropped") == 1
    )


def test_every_name_reaches_mlflow(server: Server, make: Callable[..., StageConfig], tmp_path: Path) -> None:
    names = {
        "loss": "loss", "a/b-c.d e:f": "a/b-c.d e:f", "pass@1": "pass_at_1", "f1 (ä,+)": "f1 _ä___", "../up": "_up",
        "/rooted": "_rooted", "a//b": "a__b", "x" * 300: "x" * 250,
    }  # fmt: skip

    def work(config: StageConfig, directory: Path, tracker: Any) -> dict[str, Any]:
        tracker.log(dict.fromkeys(names, 1.0), 0)
        return {"metrics": {}}

    stage.run(make(server.uri), work)
    assert _runs(server.uri, tmp_path.name)["one"].data.metrics.keys() == set(names.values())


def test_a_late_status_of_an_earlier_attempt_says_nothing_of_the_latest(
    server: Server, make: Callable[..., StageConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task is killed without a server, tried again on another machine, and the first machine sends what it kept."""

    def killed(config: StageConfig, directory: Path, tracker: stage_run.Tracker) -> dict[str, Any]:
        server.kill()
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        stage.run(make(server.uri), killed)
    server.start()
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "elsewhere"))
    stage.run(make(server.uri), lambda *_: {"metrics": {}})
    assert len(_left(tmp_path)) == 1
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    stage.run(make(server.uri, "two"), lambda *_: {"metrics": {}})
    runs = _runs(server.uri, tmp_path.name)
    assert {name: run.info.status for name, run in runs.items()} == {"one": "FINISHED", "two": "FINISHED"}
    assert runs["one"].data.tags["minitron.error"] == "SystemExit: 143" and not _left(tmp_path)


def test_a_file_that_another_process_has_sent_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    sent, away = [], [True]

    def send(message: dict[str, Any]) -> None:
        if away[0]:
            raise OSError("away")
        sent.append(message["step"])

    box = Outbox(tmp_path / "kept.jsonl", send, lambda error: None, dict)
    box.put({"run": "r", "step": 1})
    assert not box.flush() and (tmp_path / "kept.jsonl").exists()
    (tmp_path / "kept.jsonl").unlink()
    away[0] = False
    box.put({"run": "r", "step": 2})
    assert box.flush() and box.close([{"run": "r", "step": 3}])
    assert sent == [1, 2, 3]
