"""Is there anything to train? Asked of a real registry, with a real teacher and corpus."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron import components, origin, resolve
from minitron.config import ResolveConfig, parse
from minitron.errors import ConfigError, RunError
from minitron.mlflow_client import connect, experiment_id

DEFAULTS = {name: components.resolve.component_spec.inputs[name].default for name in origin.parameters()}

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(mlflow_file: str, teacher: Path, tmp_path: Path) -> Ask:
    """Return a function that resolves for another pipeline run each time."""
    (tmp_path / "corpus.txt").write_text("some text\n")
    count = iter(range(100))

    def asked(settings: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
        common = {"tracking_uri": mlflow_file, "experiment": tmp_path.name, "name": tmp_path.name}
        common |= {"corpus": str(tmp_path / "corpus.txt"), "teacher": str(teacher)}
        common |= {"output": tmp_path / "resolved", "pipeline_run_id": f"run-{next(count)}"}
        config = parse("resolve", common | {"settings": DEFAULTS | (settings or {})} | values)
        assert isinstance(config, ResolveConfig)
        return resolve.run(config)

    return asked


def version(uri: str, name: str, made_from: dict[str, str] | None, alias: str | None = None) -> None:
    client = connect(uri)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    run = client.create_run(experiment_id(client, name))
    tags = {origin.TAG: json.dumps(made_from)} if made_from else {}
    number = client.create_model_version(name, "gs://bucket/model", run.info.run_id, tags=tags).version
    if alias:
        client.set_registered_model_alias(name, alias, str(number))


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
    assert ask(pipeline_run_id="killed")["train"]


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
    settings = {"setting": {"distill_max_steps": 31}, "unset": {"prune_hidden_size": 0}, "gpu": {"distill_gpus": 8}}
    found = ask(settings.get(what))
    assert found["train"] == bool(changed)
    if changed:
        assert found["reason"] == f"other than for the champion, version 1: {changed}"


def test_of_a_champion_from_elsewhere_nothing_is_known(ask: Ask, mlflow_file: str, tmp_path: Path) -> None:
    version(mlflow_file, tmp_path.name, None, "champion")
    assert ask()["reason"] == "of the champion, version 1, it is not known what it is made from"


def test_what_cannot_be_resolved_is_one_line(ask: Ask, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing"):
        ask(corpus=str(tmp_path / "nothing"))
    with pytest.raises(RunError, match="check tracking_uri and that the server runs"):
        ask(tracking_uri="http://127.0.0.1:9")
    assert not (tmp_path / "resolved").exists()
