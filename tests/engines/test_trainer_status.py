"""A TrainJob's progress reaches Kubeflow Trainer, and a status server that is away costs the training nothing."""

import socket
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from minitron.config.stages import FinetuneConfig
from minitron.engines import trainer_status
from minitron.engines.trainer_status import TrainerStatus
from minitron.stages import finetune
from tests.servers.trainer_server import TrainerServer, trainer_server


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrainerServer]:
    with trainer_server(tmp_path, monkeypatch) as state:
        yield state


def report_steps(count: int, seconds: float = 0.01) -> float:
    """Report the steps of a training; return the longest time that one report took."""
    status, longest = TrainerStatus(0, count), 0.0
    for step in range(1, count + 1):
        time.sleep(seconds)
        began = time.perf_counter()
        status.report(step, {"loss": 2.0 / step})
        longest = max(longest, time.perf_counter() - began)
    status.close()
    return longest


def test_the_newest_progress_is_posted_at_intervals_and_the_end_at_once(
    server: TrainerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_status, "INTERVAL_SECONDS", 0.3)
    report_steps(100)
    first, *_, last = server.statuses
    assert first["progressPercentage"] < 5 and first["estimatedRemainingSeconds"] in range(1, 5)
    assert last["progressPercentage"] == 100 and last["estimatedRemainingSeconds"] == 0
    metrics = {metric["name"]: metric["value"] for metric in last["metrics"]}
    assert metrics == {"total_steps": "100", "current_step": "100", "loss": "0.02"}
    assert all(later - earlier >= 0.29 for earlier, later in pairwise(server.times[:-1])) and len(server.times) < 8


def test_the_token_is_read_anew_since_it_rotates(server: TrainerServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_status, "INTERVAL_SECONDS", 0.05)
    status = TrainerStatus(4, 8)  # a training that goes on after step 4
    for step, token in ((5, "first"), (6, "second")):
        server.token.write_text(token)
        status.report(step, {})
        time.sleep(0.3)
    status.close()
    assert [entry["progressPercentage"] for entry in server.statuses] == [62, 75]


@pytest.mark.parametrize("fault", ["down", "hangs", "refuses", "another certificate", "no token"])
def test_a_server_that_is_away_costs_nothing(
    server: TrainerServer, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(trainer_status, "INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(trainer_status, "TIMEOUT_SECONDS", 0.5)
    match fault:
        case "down":
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                monkeypatch.setenv(trainer_status.URL, f"https://127.0.0.1:{probe.getsockname()[1]}/status")
        case "hangs":
            server.seconds = 2.0
        case "refuses":
            server.faults = [403, 422, 500, 503] * 50
        case "another certificate":
            (tmp_path / "other").mkdir()
            with trainer_server(tmp_path / "other", monkeypatch) as other:
                monkeypatch.setenv(trainer_status.URL, server.variables[trainer_status.URL])
                assert other.statuses == []
        case "no token":
            monkeypatch.delenv(trainer_status.TOKEN)
    began = time.monotonic()
    assert report_steps(50) < 0.4  # a step that waited for the server would take the whole TIMEOUT_SECONDS
    assert time.monotonic() - began < 50 * 0.01 + 3
    assert capsys.readouterr().err.count("warning: Kubeflow Trainer rejected the progress: ") == 1
    assert fault in ("hangs",) or server.statuses == []


def test_engine_hf_reports(server: TrainerServer, teacher: Path, dataset: Path, tmp_path: Path) -> None:
    sizes = {"sequence_length": 32, "micro_batch_size": 4, "global_batch_size": 4, "validation_sequences": 4}
    finetune.run(FinetuneConfig(output=tmp_path / "out", teacher=str(teacher), dataset=dataset, max_steps=3, **sizes))
    last = server.statuses[-1]
    assert last["progressPercentage"] == 100
    assert {"loss", "learning_rate", "validation_loss"} <= {metric["name"] for metric in last["metrics"]}


def test_outside_a_trainjob_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(trainer_status.URL, raising=False)
    status = TrainerStatus(0, 2)
    status.report(1, {"loss": 1.0})
    status.close()
    assert status._thread is None
