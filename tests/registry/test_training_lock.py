"""Two pipeline runs that overlap do not make the same: claims on a real MLflow server and on a SQLite file."""

import time
from pathlib import Path
from typing import Any

import pytest

from minitron.registry import training_lock
from minitron.tracking import pipeline_run
from minitron.tracking.client import connect, find_or_create_experiment
from tests.servers import forks

ORIGIN = {"corpus": "c", "teacher": "t", "settings": "s", "minitron": "1"}


@pytest.fixture
def client(uri: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(training_lock, "_SETTLING_SECONDS", 0)
    return connect(uri)


@pytest.fixture
def start(client: Any, tmp_path: Path) -> Any:
    """Return a function that opens the MLflow run of a pipeline run, in this test's own experiment."""
    experiment = find_or_create_experiment(client, tmp_path.name)
    return lambda name: client.create_run(experiment, run_name=name, tags={pipeline_run.RUN_TAG: name})


def test_what_one_run_makes_another_does_not(client: Any, start: Any) -> None:
    first, second = start("first"), start("second")
    assert training_lock.claim_training(client, first, ORIGIN) is None
    assert training_lock.claim_training(client, second, ORIGIN) == "run first, last sign of life 0 minutes ago,"
    assert training_lock.claim_training(client, second, ORIGIN | {"corpus": "another"}) is None
    assert training_lock.claim_training(client, first, ORIGIN) is None, "its own attempt after a failure"


def test_a_claim_ends_with_the_outcome_of_its_run(client: Any, start: Any) -> None:
    first, second, third = start("first"), start("second"), start("third")
    assert training_lock.claim_training(client, first, ORIGIN) is None
    pipeline_run.record_outcome(client, first.info.run_id, "failed", "out of memory")
    assert training_lock.claim_training(client, second, ORIGIN) is None
    assert training_lock.claim_training(client, client.get_run(first.info.run_id), ORIGIN).startswith("run second")
    assert training_lock.claim_training(client, third, ORIGIN).startswith("run second")


def test_a_run_that_is_tried_again_is_at_work_again(client: Any, start: Any) -> None:
    first, second = start("first"), start("second")
    assert training_lock.claim_training(client, first, ORIGIN) is None
    pipeline_run.record_outcome(client, first.info.run_id, "failed", "out of memory")
    assert training_lock.claim_training(client, client.get_run(first.info.run_id), ORIGIN) is None
    assert training_lock.claim_training(client, second, ORIGIN).startswith("run first")


def _read_claim(client: Any, run: Any) -> str:
    return client.get_run(run.info.run_id).data.tags[training_lock._CLAIM_TAG]


def test_a_run_that_is_not_heard_of_has_no_claim(client: Any, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage at work is heard of each minute; one that waits for a node may be overtaken."""
    lost, slow, third = start("lost"), start("slow"), start("third")
    long_ago = time.time() - 2 * training_lock.SILENCE_SECONDS
    with monkeypatch.context() as patch:
        patch.setattr(training_lock.time, "time", lambda: long_ago)
        assert training_lock.claim_training(client, slow, ORIGIN) is None
        client.set_tag(lost.info.run_id, training_lock._CLAIM_TAG, _read_claim(client, slow))
    sign = {pipeline_run.PARENT_TAG: slow.info.run_id, pipeline_run.ALIVE_TAG: str(time.time() - 300)}
    client.create_run(slow.info.experiment_id, tags=sign, start_time=int(long_ago * 1000))
    assert training_lock.claim_training(client, third, ORIGIN) == "run slow, last sign of life 5 minutes ago,"
    client.delete_run(slow.info.run_id)
    assert training_lock.claim_training(client, third, ORIGIN) is None


def test_a_run_that_comes_back_from_silence_yields_to_the_one_that_overtook_it(
    client: Any, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = start("first"), start("second")
    with monkeypatch.context() as patch:
        long_ago = time.time() - 2 * training_lock.SILENCE_SECONDS
        patch.setattr(training_lock.time, "time", lambda: long_ago)
        assert training_lock.claim_training(client, first, ORIGIN) is None
    assert training_lock.claim_training(client, second, ORIGIN) is None
    assert training_lock.claim_training(client, first, ORIGIN).startswith("run second")


CLAIMANT = """
import sys, time
from pathlib import Path
from minitron.registry import training_lock
from minitron.tracking.client import connect
uri, run_id, directory, me, rounds = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
client = connect(uri)
run = client.get_run(run_id)
training_lock._SETTLING_SECONDS = 0.5
for number in range(rounds):
    (directory / f"{number}-{me}").touch()
    while not (directory / f"{number}-{1 - me}").exists():
        time.sleep(0.001)
    print(int(training_lock.claim_training(client, run, {"corpus": str(number)}) is None), flush=True)
"""


def test_of_two_processes_at_once_one_has_the_claim(uri: str, start: Any, tmp_path: Path) -> None:
    """Twelve rounds, in which both wait for each other and then ask within the same milliseconds."""
    command = ["-c", CLAIMANT, uri]
    runs = [start("a").info.run_id, start("b").info.run_id]
    ended = forks.run_together(*([*command, run, str(tmp_path), str(me), "12"] for me, run in enumerate(runs)))
    answers = [done.stdout.split() for done in ended]
    assert [len(answer) for answer in answers] == [12, 12]
    assert all(sorted(pair) == ["0", "1"] for pair in zip(*answers, strict=True)), answers
