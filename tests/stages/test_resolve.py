"""Is there anything to train? Asked of a real registry, with a real teacher and corpus."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron.config.parse import parse
from minitron.config.tasks import ResolveConfig
from minitron.errors import ConfigError, RunError
from minitron.registry import fingerprint, training_lock
from minitron.registry.promotion import promote, rollback
from minitron.registry.versions import GATE_OUTCOME_TAG
from minitron.stages import resolve
from minitron.tracking import pipeline_run
from minitron.tracking.client import connect, find_or_create_experiment, search_runs
from tests.servers.mlflow_server import register_version

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(mlflow_file: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Return a function that resolves for another pipeline run each time."""
    monkeypatch.setattr(training_lock, "_SETTLING_SECONDS", 0)
    (tmp_path / "corpus.txt").write_text("some text\n")
    count = iter(range(100))

    def asked(settings: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
        common = {"tracking_uri": mlflow_file, "experiment": tmp_path.name, "model_name": tmp_path.name}
        common |= {"corpus": str(tmp_path / "corpus.txt"), "teacher": str(teacher)}
        common |= {"output": tmp_path / "resolved", "pipeline_run_id": f"run-{next(count)}"}
        config = parse("resolve", common | {"document": settings or {}} | values)
        assert isinstance(config, ResolveConfig)
        return resolve.run(config)

    return asked


def version(uri: str, name: str, made_from: dict[str, str], alias: str) -> None:
    register_version(uri, name, alias, {fingerprint.TAG: json.dumps(made_from)})


def test_without_a_champion_there_is_something_to_train(ask: Ask, tmp_path: Path) -> None:
    found = ask()
    assert (found["train"], found["champion"], found["reason"]) == (True, None, "there is no champion yet")
    assert json.loads((tmp_path / "resolved" / "decision.json").read_text())["train"] is True


def test_a_champion_promoted_by_hand_is_not_made_again(ask: Ask, mlflow_file: str, tmp_path: Path) -> None:
    version(mlflow_file, tmp_path.name, ask()["made_from"], "champion")
    found = ask()
    assert not found["train"] and found["champion"] == f"models:/{tmp_path.name}/1"
    assert found["reason"].endswith("made from the same data, teacher and settings; it is the champion")


def test_a_challenger_whose_gates_nobody_asked_about_is_made(ask: Ask, mlflow_file: str, tmp_path: Path) -> None:
    """Its run was killed before promote: the same run again, or another that takes its claim over, goes on."""
    version(mlflow_file, tmp_path.name, ask(pipeline_run_id="killed")["made_from"], "challenger")
    assert not ask(pipeline_run_id="another")["train"]
    assert ask(pipeline_run_id="killed")["train"]
    client = connect(mlflow_file)
    (run,) = search_runs(client, find_or_create_experiment(client, tmp_path.name), pipeline_run.RUN_TAG, "killed")
    pipeline_run.record_outcome(client, run.info.run_id, "failed", "killed")
    assert ask(pipeline_run_id="another")["train"]


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("corpus", "corpus"),
        ("setting", "settings"),
        ("unset", ""),
        ("gpu", ""),
    ],
)
def test_what_has_changed_is_said(ask: Ask, mlflow_file: str, tmp_path: Path, what: str, changed: str) -> None:
    version(mlflow_file, tmp_path.name, ask()["made_from"], "champion")
    if what == "corpus":
        (tmp_path / "corpus.txt").write_text("other text\n")
    settings = {"setting": {"distill.max_steps": 31}, "unset": {"prune.hidden_size": None}, "gpu": {"distill.gpus": 8}}
    found = ask(settings.get(what))
    assert found["train"] == bool(changed)
    if changed:
        assert found["reason"] == f"changed since the champion (version 1): {changed}"


def test_of_a_champion_from_elsewhere_nothing_is_known(ask: Ask, mlflow_file: str, tmp_path: Path) -> None:
    register_version(mlflow_file, tmp_path.name, "champion", {})
    assert ask()["reason"] == "the champion (version 1) has no record of its inputs"


def test_what_cannot_be_resolved_is_one_line(ask: Ask, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing"):
        ask(corpus=str(tmp_path / "nothing"))
    with pytest.raises(RunError, match="check tracking_uri and that the server runs") as caught:
        ask(tracking_uri="http://127.0.0.1:9")
    assert "\n" not in str(caught.value) and not (tmp_path / "resolved").exists()


def test_what_was_promoted_and_taken_back_by_hand_is_not_made_again(ask: Ask, mlflow_file: str, tmp_path: Path) -> None:
    made_from = ask()["made_from"]
    register_version(mlflow_file, tmp_path.name, None, {}, evaluation='{"gates": []}')
    register_version(
        mlflow_file, tmp_path.name, None, {fingerprint.TAG: json.dumps(made_from)}, evaluation='{"gates": []}'
    )
    promote(mlflow_file, tmp_path.name, 1)
    promote(mlflow_file, tmp_path.name, 2)
    rollback(mlflow_file, tmp_path.name)
    found = ask()
    assert not found["train"] and "it was the champion" in found["reason"]


def test_what_a_rival_has_just_made_is_not_made_again(
    ask: Ask, mlflow_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_from, claim = ask(model_name="other")["made_from"], training_lock.claim_training

    def after_the_rival(*arguments: Any) -> str | None:
        tags = {fingerprint.TAG: json.dumps(made_from), GATE_OUTCOME_TAG: "it met its gates"}
        register_version(mlflow_file, tmp_path.name, None, tags)
        return claim(*arguments)

    monkeypatch.setattr(training_lock, "claim_training", after_the_rival)
    assert ask()["reason"].endswith("is made from the same data, teacher and settings; it met its gates")


def test_two_models_may_be_made_from_the_same(ask: Ask) -> None:
    assert ask()["train"] and ask(model_name="another")["train"]


@pytest.mark.parametrize("tag", ["my laptop", '["x"]'])
def test_a_tag_of_another_tool_is_no_origin(ask: Ask, mlflow_file: str, tmp_path: Path, tag: str) -> None:
    register_version(mlflow_file, tmp_path.name, "champion", {fingerprint.TAG: tag})
    assert ask()["reason"] == "the champion (version 1) has no record of its inputs"


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_version_with_a_loss_that_is_not_finite_is_made_again(
    ask: Ask, mlflow_file: str, tmp_path: Path, loss: str
) -> None:
    tags = {fingerprint.TAG: json.dumps(ask(model_name="other")["made_from"]), "validation_loss": loss}
    register_version(mlflow_file, tmp_path.name, "champion", tags | {GATE_OUTCOME_TAG: "no gates were declared"})
    found = ask()
    assert found["train"] and found["reason"] == f"the champion (version 1) has a validation loss of {loss}"
