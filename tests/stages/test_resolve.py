"""Is there anything to train? Asked of a real registry, with a real teacher and corpus."""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from minitron.config.parse import parse
from minitron.config.stages import ResolveConfig
from minitron.errors import ConfigError, RunError
from minitron.registry import fingerprint, training_lock
from minitron.registry.promotion import promote, rollback
from minitron.registry.versions import GATE_OUTCOME_TAG
from minitron.stages import resolve
from minitron.tracking import pipeline_run
from minitron.tracking.client import connect, find_or_create_experiment, search_runs
from tests.servers.gcs import World
from tests.servers.http_server import State, http_server
from tests.servers.mlflow_server import register_version

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(mlflow_file: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Return a function that resolves for another pipeline run each time."""
    monkeypatch.setattr(training_lock, "_SETTLING_SECONDS", 0)
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
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


def version(uri: str, name: str, made_from: dict[str, str], alias: str, tag: str = fingerprint.TAG) -> None:
    register_version(uri, name, alias, {tag: json.dumps(made_from)})


def test_without_a_champion_there_is_something_to_train(ask: Ask, tmp_path: Path) -> None:
    found = ask()
    assert (found["train"], found["champion"], found["reason"]) == (True, None, "there is no champion yet")
    assert json.loads((tmp_path / "resolved" / "decision.json").read_text())["train"] is True


@pytest.mark.parametrize("tag", [fingerprint.TAG, "made_from"], ids=["now", "until 0.4"])
def test_a_champion_promoted_by_hand_is_not_made_again(ask: Ask, mlflow_file: str, tmp_path: Path, tag: str) -> None:
    version(mlflow_file, tmp_path.name, ask()["made_from"], "champion", tag)
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
    settings = {"setting": {"distill.max_steps": 31}, "unset": {"prune.hidden_size": None}, "gpu": {"distill.gpus": 0}}
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
    assert ask()["reason"].endswith("was made from the same data, teacher and settings; it met its gates")


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


GATE = {"metric": "validation_loss", "at_most": 3.0}


def _register_judged(uri: str, name: str, made_from: dict[str, str], alias: str | None = None) -> None:
    row = {"metric": "validation_loss", "against": None, "by": None, "bound": "at_most", "threshold": 3.0}
    tags = {fingerprint.TAG: json.dumps(made_from), GATE_OUTCOME_TAG: "it met its gates"}
    register_version(uri, name, alias, tags, evaluation=json.dumps({"gates": [row | {"outcome": "passed"}]}))


def test_other_gates_judge_a_version_anew(ask: Ask, mlflow_file: str, tmp_path: Path) -> None:
    """Its stages are reused. What was promoted stays decided: a person may have taken it back."""
    gates = [GATE, {"metric": "parameters", "against": "teacher", "by": "ratio", "at_most": 0.7}]
    _register_judged(mlflow_file, tmp_path.name, ask(model_name="other")["made_from"])
    assert ask({"evaluate.gates": [GATE]})["reason"].endswith(
        "from the same data, teacher and settings; it met its gates"
    )
    found = ask({"evaluate.gates": gates})
    assert found["train"]
    assert found["reason"] == "version 1 was made from the same, but other gates judged it; it is evaluated again"
    connect(mlflow_file).set_registered_model_alias(tmp_path.name, "champion", "1")
    assert not ask({"evaluate.gates": gates})["train"]


def test_a_thousand_versions_cost_no_time(
    ask: Ask, mlflow_process: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in the database of the real server, whose working directory has it."""
    uri, process = mlflow_process
    made_from = ask(tracking_uri=uri, model_name="other")["made_from"]
    _register_judged(uri, tmp_path.name, made_from)
    register_version(uri, tmp_path.name, "champion", {fingerprint.TAG: json.dumps(made_from | {"corpus": "older"})})
    _copy_version(Path(f"/proc/{process}/cwd/mlflow.db").resolve(), tmp_path.name, 2, range(3, 1001))
    assert connect(uri).search_model_versions(f"name = '{tmp_path.name}'", 1)[0].version == "1000"
    began = time.monotonic()
    found = ask({"evaluate.gates": [GATE]}, tracking_uri=uri)
    assert time.monotonic() - began <= 2
    assert found["reason"].startswith("version 1 was made from the same data") and not found["train"]
    assert found["champion"] == f"models:/{tmp_path.name}/2"


def _copy_version(database: Path, name: str, version: int, numbers: range) -> None:
    with closing(sqlite3.connect(database)) as connection:
        for table in ("model_versions", "model_version_tags"):
            columns = [column for _, column, *_ in connection.execute(f"pragma table_info({table})")]
            values = ", ".join(":number" if column == "version" else f'"{column}"' for column in columns)
            for number in numbers:
                command = f"insert into {table} select {values} from {table} where name = :name and version = :version"
                connection.execute(command, {"number": number, "name": name, "version": version})
        connection.commit()


class Hub(State):
    """Hugging Face's hub, which has one commit of one model, and no file of it."""

    commit = "c" * 40

    def answer(self, method: str, path: str, query: dict[str, str], data: bytes, headers: Any) -> Any:
        assert path == "/api/models/org/name"
        return {"id": "org/name", "sha": self.commit}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with http_server(Hub()) as hub:
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield hub


@pytest.mark.parametrize("recorded", ["tag", "lineage"])
def test_a_teacher_on_the_hub_is_known_by_its_commit_and_not_fetched(
    ask: Ask, hub: Hub, mlflow_file: str, tmp_path: Path, recorded: str
) -> None:
    """0.3 and earlier recorded the commit in the lineage alone."""
    pinned, name = f"hf://org/name@{hub.commit}", tmp_path.name
    new = ask(teacher="hf://org/name")
    assert new["train"] and new["made_from"]["teacher"] == pinned
    tags = {fingerprint.TAG: json.dumps(new["made_from"] | {"teacher": "hash"})}
    tags |= {"base_model": pinned, "base_model_sha256": "hash"} if recorded == "tag" else {}
    inputs = {"teacher": {"address": "hf://org/name", "pinned": pinned, "sha256": "hash"}}
    register_version(
        mlflow_file, name, "champion", tags, lineage=json.dumps({"stages": {"prepare": {"inputs": inputs}}})
    )
    if recorded == "lineage":
        client = connect(mlflow_file)
        run_id = client.get_model_version(name, "1").run_id
        client.set_model_version_tag(name, "1", "lineage", f"runs:/{run_id}/lineage.json")
    same = ask(teacher="hf://org/name")
    assert not same["train"] and same["made_from"]["teacher"] == "hash"
    hub.commit = "d" * 40
    other = ask(teacher="hf://org/name")
    assert other["reason"] == "changed since the champion (version 1): teacher"
    assert hub.requests == ["GET /api/models/org/name"] * 3, "a question each, and no file"


def test_a_teacher_of_the_registry_is_known_by_its_version(ask: Ask, mlflow_file: str, tmp_path: Path) -> None:
    register_version(mlflow_file, f"{tmp_path.name}-teacher", "champion", {"student_sha256": "hash"})
    found = ask(teacher=f"models:/{tmp_path.name}-teacher@champion")
    assert found["train"] and found["made_from"]["teacher"] == "hash", "there is no file to fetch"


def test_other_lists_of_what_to_keep_make_another_version(
    ask: Ask, mlflow_file: str, tmp_path: Path, world: World
) -> None:
    (tmp_path / "keep.json").write_text('{"layers": [0]}')
    world.put("keep.json", b'{"layers": [0]}')
    without, local, remote = (
        ask({"prune": {"keep": keep}})["made_from"]
        for keep in (None, str(tmp_path / "keep.json"), "gs://bucket/keep.json")
    )
    assert without["settings"] != local["settings"] == remote["settings"]
    version(mlflow_file, tmp_path.name, local, "champion")
    assert not ask({"prune": {"keep": "gs://bucket/keep.json"}})["train"]
    (tmp_path / "keep.json").write_text('{"layers": [1]}')
    found = ask({"prune": {"keep": str(tmp_path / "keep.json")}})
    assert found["train"] and found["reason"] == "changed since the champion (version 1): settings"


def test_a_teacher_in_a_bucket_is_known_by_its_snapshot(
    ask: Ask, mlflow_file: str, tmp_path: Path, world: World
) -> None:
    world.put("teacher/config.json", b"{}")
    made_from = ask(teacher="gs://bucket/teacher")["made_from"]
    assert made_from["teacher"].startswith("gs://bucket/teacher#")
    tags = {"base_model": made_from["teacher"], "base_model_sha256": "hash"}
    register_version(mlflow_file, tmp_path.name, "champion", tags)
    assert ask(teacher="gs://bucket/teacher")["made_from"]["teacher"] == "hash" and not world.fetched()
