"""Scheduled retraining on real small models: what is new is trained and judged, the same is not, a failure is told."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from minitron.engines.samples import make_sample, tiny_sentences
from minitron.registry import fingerprint, lineage, training_lock
from minitron.storage.hashing import content_hash
from minitron.tracking import pipeline_run
from minitron.tracking.client import connect, find_or_create_experiment
from tests.flows.commands import BIN, RETRAIN
from tests.flows.test_flow import execute, forked
from tests.servers import forks

NAME = "tiny"
WORSE = ("finetune.enabled=false", "distill.learning_rate=1e-9", "distill.min_learning_rate=0", "distill.max_steps=1")
"""Settings by which neither teacher nor student is trained."""


class Run(NamedTuple):
    """What one run left: how long it took, what it printed, its summary, the aliases after it."""

    seconds: float
    output: str
    status: int
    summary: dict[str, Any]
    aliases: dict[str, int]


def uri(directory: Path) -> str:
    return f"sqlite:///{directory}/mlflow.db"


def aliases(directory: Path) -> dict[str, int]:
    models = connect(uri(directory)).search_registered_models(f"name = '{NAME}'")
    return {name: int(number) for model in models for name, number in model.aliases.items()}


def tags(directory: Path, version: int) -> dict[str, str]:
    return connect(uri(directory)).get_model_version(NAME, str(version)).tags


def retrain(directory: Path, *settings: str, start: Callable[..., Any] = forked) -> Run:
    (directory / "summary.json").unlink(missing_ok=True)  # an earlier run's
    started = time.monotonic()
    done = start(" ".join([RETRAIN, *(f"--set {setting}" for setting in settings)]), directory.parents[1])
    seconds, output = time.monotonic() - started, done.stdout + done.stderr
    written = directory / "summary.json"
    summary = json.loads(written.read_text()) if written.exists() else {}
    return Run(seconds, output, done.returncode, summary, aliases(directory))


def write_sentences(path: Path, count: int, seed: int) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_sentences(count, seed)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the README's command."""
    root = tmp_path_factory.mktemp("retrain")
    (root / ".venv").symlink_to(BIN.parent)
    return root / "runs" / "nightly"


@pytest.fixture(scope="module")
def first(directory: Path) -> Run:
    return retrain(directory)


@pytest.fixture(scope="module")
def second(first: Run, directory: Path) -> Run:
    """As a user starts it: processes of its own, which import what they need."""
    return retrain(directory, start=execute)


@pytest.fixture(scope="module")
def worse(second: Run, directory: Path) -> Run:
    """A run with more data, whose student is not trained."""
    more = directory / "more"
    make_sample("sample://tiny/corpus", more)
    write_sentences(more / "more.jsonl", 20, seed=1)
    return retrain(directory, f"corpus={more}", *WORSE)


@pytest.fixture(scope="module")
def better(worse: Run, directory: Path) -> Run:
    """A run on another language, which only its student has learned."""
    (directory / "other").mkdir()
    write_sentences(directory / "other" / "other.jsonl", 600, seed=2)
    return retrain(directory, f"corpus={directory / 'other'}")


def test_the_first_is_trained_judged_and_promoted(first: Run, directory: Path) -> None:
    assert first.status == 0, first.output[-3000:]
    assert "resolve: there is no champion yet" in first.output
    assert first.aliases == {"challenger": 1, "champion": 1} and tags(directory, 1)["verdict"] == "gates met"
    assert tags(directory, 1)["base_model"] == "sample://tiny/teacher"
    assert first.summary["outcome"] == "promoted" and first.summary["registered"]["version"] == 1
    assert "gate: Validation loss, difference from the champion's: no champion (at most 0.020)" in first.output
    assert "<title>Compression report" in (directory / "report.html").read_text()


def test_the_same_again_ends_at_once_and_says_why(first: Run, second: Run, directory: Path) -> None:
    assert second.status == 0, second.output[-3000:]
    assert second.seconds < first.seconds, f"{second.seconds:.1f} s against {first.seconds:.1f} s"
    assert second.summary["outcome"] == "unchanged"
    assert "version 1, challenger and champion, was made from the same data, teacher" in second.summary["reason"]
    assert "training:" not in second.output and second.aliases == {"challenger": 1, "champion": 1}
    assert f"Retraining of {NAME}: unchanged" in (directory / "report.html").read_text()


def test_a_worse_model_stays_challenger(worse: Run, directory: Path) -> None:
    assert worse.status == 0, worse.output[-3000:]
    assert "changed since the champion (version 1): corpus, settings" in worse.output
    assert worse.aliases == {"challenger": 2, "champion": 1} and tags(directory, 2)["verdict"] == "gates not met"
    assert worse.summary["outcome"] == "challenger" and "Validation loss" in worse.summary["reason"]


def test_a_better_one_is_promoted_against_the_champion(better: Run) -> None:
    assert better.status == 0, better.output[-3000:]
    assert better.aliases == {"challenger": 3, "champion": 3, "previous": 1}
    assert "difference from the champion's" in better.output


def test_a_version_that_failed_its_gates_is_not_made_again(better: Run, directory: Path) -> None:
    again = retrain(directory, f"corpus={directory / 'more'}", *WORSE)
    assert again.summary["outcome"] == "unchanged" and "version 2 was made from the same" in again.summary["reason"]
    assert "Validation loss" in again.summary["reason"], "why it did not become the champion"


def test_a_rollback_brings_the_previous_champion_back(better: Run, directory: Path) -> None:
    done = forks.run_minitron("rollback", NAME, "--why", "answers are worse", "--tracking-uri", uri(directory))
    assert done.returncode == 0, done.stderr
    assert aliases(directory) == {"challenger": 3, "champion": 1, "previous": 3}
    again = forked(f"minitron run promote --set model_name={NAME} --set version=3 --work-dir {directory}", directory)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"promoted: version 3 of {NAME} is the champion" in again.stdout
    assert aliases(directory) == {"challenger": 3, "champion": 3, "previous": 1}


def test_other_gates_judge_the_same_student_anew_without_training(better: Run, directory: Path) -> None:
    gates = "evaluate.gates=[{metric: validation_loss, at_most: 100}]"
    again = retrain(directory, f"corpus={directory / 'more'}", *WORSE, f"'{gates}'")
    assert again.status == 0, again.output[-3000:]
    assert "version 2 was made from the same, but other gates judged it; it is evaluated again" in again.output
    assert "training:" not in again.output and again.summary["outcome"] == "promoted"
    assert again.aliases == {"challenger": 4, "champion": 4, "previous": 3}
    assert tags(directory, 4)[lineage.STUDENT_TAG] == tags(directory, 2)[lineage.STUDENT_TAG]


def test_what_another_run_makes_is_not_made_twice(better: Run, directory: Path) -> None:
    third = directory / "third"
    third.mkdir()
    write_sentences(third / "third.jsonl", 600, seed=3)
    client = connect(uri(directory))
    other = client.create_run(find_or_create_experiment(client, "minitron"), run_name="the nightly run")
    made_from = json.loads(tags(directory, 1)[fingerprint.TAG]) | {"corpus": content_hash(third), "name": NAME}
    assert training_lock.claim_training(client, other, made_from) is None
    run = retrain(directory, f"corpus={third}")
    assert run.status == 0 and run.summary["outcome"] == "made elsewhere"
    assert re.search(
        r"run the nightly run, last sign of life \d+ minutes ago, is already making the same version", run.output
    )


def test_a_failure_leaves_a_page_and_frees_what_it_claimed(better: Run, directory: Path) -> None:
    run = retrain(directory, "prepare.validation_fraction=1e-6")
    assert run.status == 2 and "raise validation_fraction" in run.output
    page = (directory / "report.html").read_text()
    assert f"Retraining of {NAME}: failed" in page and "raise validation_fraction" in page
    client = connect(uri(directory))
    ended = [
        entry for entry in client.search_runs([find_or_create_experiment(client, "minitron")])
        if entry.data.tags.get(pipeline_run.OUTCOME_TAG) == "failed"
    ]  # fmt: skip
    assert len(ended) == 1 and ended[0].info.status == "FAILED"
    decision = max(directory.rglob("decision.json"), key=lambda path: path.stat().st_mtime)
    made_from = json.loads(decision.read_text())["made_from"] | {"name": NAME}
    another = client.create_run(ended[0].info.experiment_id, run_name="another")
    assert training_lock.claim_training(client, another, made_from) is None


def test_a_training_that_diverges_is_told_and_does_not_stand_in_the_way(first: Run, directory: Path) -> None:
    """Not even of the same training in the next night."""
    before = aliases(directory)
    for _ in range(2):
        run = retrain(directory, "finetune.learning_rate=1e38")
        assert run.status == 1 and "error: finetune: the training diverged at step 2: loss is nan; " in run.output
        assert "is already making the same version" not in run.output and run.aliases == before
        page = (directory / "report.html").read_text()
        assert f"Retraining of {NAME}: failed" in page and "lower learning_rate (1e+38)" in page
