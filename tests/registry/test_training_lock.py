"""Two pipeline runs that overlap do not make the same: claims on a real MLflow server and on a SQLite file."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from minitron.registry import training_lock
from minitron.tracking import pipeline_run, write_once
from minitron.tracking.client import connect, find_or_create_experiment
from tests.servers import forks

ORIGIN = {"corpus": "c", "teacher": "t", "settings": "s", "minitron": "1"}


@pytest.fixture
def client(uri: str) -> Any:
    return connect(uri)


@pytest.fixture
def start(client: Any, tmp_path: Path) -> Any:
    """Return a function that opens the MLflow run of a pipeline run, in this test's own experiment."""
    experiment = find_or_create_experiment(client, tmp_path.name)
    return lambda name: client.create_run(experiment, run_name=name, tags={pipeline_run.RUN_TAG: name})


def test_what_one_run_makes_another_does_not(client: Any, start: Any) -> None:
    first, second = start("first"), start("second")
    assert training_lock.claim_training(client, first, ORIGIN) is None
    assert training_lock.claim_training(client, second, ORIGIN) == "run first, last heard of 0 minutes ago,"
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


def test_a_run_that_is_not_heard_of_has_no_claim(client: Any, tmp_path: Path) -> None:
    experiment, long_ago = (
        find_or_create_experiment(client, tmp_path.name),
        int((time.time() - 2 * training_lock.SILENCE_SECONDS) * 1000),
    )
    lost = client.create_run(experiment, run_name="lost", start_time=long_ago)
    slow = client.create_run(experiment, run_name="slow", start_time=long_ago)
    sign = {write_once.PARENT_TAG: slow.info.run_id, pipeline_run.ALIVE_TAG: str(time.time() - 600)}
    client.create_run(experiment, tags=sign, start_time=long_ago)
    third = client.create_run(experiment, run_name="third")
    assert (
        training_lock.claim_training(client, lost, ORIGIN) is None
        and training_lock.claim_training(client, slow, ORIGIN) is None
    )
    assert training_lock.claim_training(client, third, ORIGIN) == "run slow, last heard of 10 minutes ago,"
    client.delete_run(slow.info.run_id)
    assert training_lock.claim_training(client, third, ORIGIN) is None


def test_a_run_that_is_gone_for_good_has_no_claim(mlflow_file: str, tmp_path: Path) -> None:
    client = connect(mlflow_file)
    first, second = (client.create_run(find_or_create_experiment(client, tmp_path.name)) for _ in range(2))
    assert training_lock.claim_training(client, first, ORIGIN) is None
    client.delete_run(first.info.run_id)
    command = ["-m", "mlflow", "gc", "--backend-store-uri", mlflow_file, "--run-ids", first.info.run_id]
    done = forks.run_python(*command, environment=os.environ | {"MLFLOW_TRACKING_URI": mlflow_file})
    assert done.returncode == 0, done.stderr
    assert training_lock.claim_training(client, second, ORIGIN) is None


CLAIMANT = """
import sys, time
from pathlib import Path
from minitron.registry import training_lock
from minitron.tracking.client import connect
uri, run_id, directory, me, rounds = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
client = connect(uri)
run = client.get_run(run_id)
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


CLAIMS_RUN = """
import sys, time
from pathlib import Path
from minitron.registry import training_lock
from minitron.tracking.client import connect
uri, directory, me, *experiments = sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]
client = connect(uri)
client.search_experiments()
for number, experiment in enumerate(experiments):
    (directory / f"{number}-{me}").touch()
    while len(list(directory.glob(f"{number}-*"))) < 3:
        time.sleep(0.001)
    print(training_lock._find_or_create_claims_run(client, experiment), flush=True)
"""


def test_processes_that_ask_at_once_agree_where_claims_are_kept(uri: str, client: Any, tmp_path: Path) -> None:
    experiments = [find_or_create_experiment(client, f"{tmp_path.name}-{number}") for number in range(4)]
    command = ["-c", CLAIMS_RUN, uri, str(tmp_path)]
    ended = forks.run_together(*([*command, str(me), *experiments] for me in range(3)))
    answers = [done.stdout.split() for done in ended]
    assert answers[0] == answers[1] == answers[2] and len(set(answers[0])) == 4


def test_a_claims_run_whose_maker_died_is_replaced(client: Any, tmp_path: Path) -> None:
    experiment, long_ago = find_or_create_experiment(client, tmp_path.name), int((time.time() - 600) * 1000)
    left = client.create_run(experiment, tags={training_lock._CANDIDATE: "yes"}, start_time=long_ago).info.run_id
    made = training_lock._find_or_create_claims_run(client, experiment)
    assert made != left and training_lock._find_or_create_claims_run(client, experiment) == made
    assert client.get_run(left).info.lifecycle_stage == "deleted"
