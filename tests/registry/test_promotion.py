"""A champion is chosen by one process at a time, on a real server and on a SQLite file, and can be taken back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from minitron.cli.app import app
from minitron.cli.lineage_tree import make_tree
from minitron.config.parse import parse
from minitron.config.stages import PromoteConfig
from minitron.errors import ConfigError, RunError
from minitron.registry import promotion_log
from minitron.registry.promotion import GatesFailed, NoQualityGate, NotJudged, promote, rollback
from minitron.registry.promotion_log import PromotionLog
from minitron.stages import promote as promotion
from minitron.stages import register
from minitron.tracking import pipeline_run
from minitron.tracking.client import connect, find_or_create_experiment
from tests.registry.promotions import make_evaluation, race_promotions, read_aliases, register_versions
from tests.servers import forks
from tests.servers.mlflow_server import register_version
from tests.servers.processes import wait_until


@pytest.fixture
def name(tmp_path: Path) -> str:
    return tmp_path.name


def _read_moves(uri: str, name: str) -> list[tuple[int | None, int]]:
    return [(move.source, move.to) for move in PromotionLog(connect(uri), name).read_moves()]


def test_the_challenger_becomes_the_champion_and_is_taken_back(uri: str, name: str) -> None:
    register_versions(uri, name, make_evaluation(1.5), make_evaluation(1.4))
    first = promote(uri, name, 1)
    assert first.version == 1 and first.move is not None and first.move.source is None
    assert read_aliases(uri, name) == {"challenger": 2, "champion": 1}
    second = promote(uri, name, why="better", pipeline_run_id="run-7")
    assert second.move and (second.move.source, second.move.to) == (1, 2) and second.gates[0]["student"] == 1.4
    assert read_aliases(uri, name) == {"challenger": 2, "champion": 2, "previous": 1}
    tags = connect(uri).get_model_version(name, "2").tags
    assert tags["promoted_by"] == second.move.who == "pipeline run run-7" and tags["promoted_why"] == "better"
    assert tags["promoted_at"] == second.move.when

    again = promote(uri, name, 2)
    assert again.move is None and _read_moves(uri, name) == [(None, 1), (1, 2)]
    taken_back = rollback(uri, name, "too slow")
    assert taken_back.version == 1 and read_aliases(uri, name) == {"challenger": 2, "champion": 1, "previous": 2}
    assert rollback(uri, name).version == 2 and _read_moves(uri, name)[2:] == [(2, 1), (1, 2)]
    client = connect(uri)
    (run,) = client.search_runs(
        [find_or_create_experiment(client, promotion_log.EXPERIMENT)], f"tags.`minitron.promotions` = '{name}'"
    )
    assert run.info.run_name == f"promotions of {name}" and run.info.status == "FINISHED"
    assert json.loads(run.data.params["move.0003"])["why"] == "too slow" and run.data.params["done.0004"] == "applied"


def test_of_two_processes_one_wins_each_move(uri: str, name: str, tmp_path: Path) -> None:
    race_promotions(uri, name, tmp_path, rounds=15)


KILLED = """
import os, sys
from minitron.registry.promotion_log import PromotionLog
from minitron.registry.promotion import promote
PromotionLog._set_aliases = lambda *arguments: os.kill(os.getpid(), 9)
promote(sys.argv[1], sys.argv[2], 2)
"""


def _kill_between_entry_and_aliases(uri: str, name: str) -> None:
    """Let a process die between the entry and the aliases."""
    done = forks.run_python("-c", KILLED, uri, name)
    assert done.returncode == -9, done.stderr


def test_a_move_whose_author_died_is_completed_by_the_next_reader(uri: str, name: str) -> None:
    register_versions(uri, name, *[make_evaluation(1.0)] * 3)
    promote(uri, name, 1)
    _kill_between_entry_and_aliases(uri, name)
    assert read_aliases(uri, name)["champion"] == 1 and _read_moves(uri, name) == [(None, 1), (1, 2)]
    assert promote(uri, name, 2).move is None
    assert read_aliases(uri, name) == {"challenger": 3, "champion": 2, "previous": 1}
    assert connect(uri).get_model_version(name, "2").tags["promoted_by"]
    promote(uri, name, 3)
    assert _read_moves(uri, name) == [(None, 1), (1, 2), (2, 3)]


SLOW = """
import sys, time
from pathlib import Path
from minitron.registry.promotion_log import PromotionLog
from minitron.registry.promotion import promote
set_aliases, directory = PromotionLog._set_aliases, Path(sys.argv[3])
def slowly(log, move):
    (directory / "about to").touch()
    while not (directory / "go").exists():
        time.sleep(0.01)
    set_aliases(log, move)
PromotionLog._set_aliases = slowly
promote(sys.argv[1], sys.argv[2], 2)
"""


def test_an_author_who_was_taken_for_dead_does_not_undo_a_later_move(uri: str, name: str, tmp_path: Path) -> None:
    register_versions(uri, name, *[make_evaluation(1.0)] * 3)
    promote(uri, name, 1)
    slow = forks.start_python(["-c", SLOW, uri, name, str(tmp_path)], tmp_path / "log", tmp_path / "log")
    try:
        wait_until(lambda: (tmp_path / "about to").exists() or slow.exitcode is not None)
        assert slow.exitcode is None, (tmp_path / "log").read_text()
        promote(uri, name, 3)
        (tmp_path / "go").touch()
        slow.join(60)
        assert slow.exitcode == 0
    finally:
        slow.kill()
    assert _read_moves(uri, name) == [(None, 1), (1, 2), (2, 3)]
    assert read_aliases(uri, name) == {"challenger": 3, "champion": 3, "previous": 2}


@pytest.mark.parametrize("fate", ["moved by hand", "deleted"])
def test_a_move_that_cannot_be_completed_is_given_up(mlflow_file: str, name: str, fate: str) -> None:
    register_versions(mlflow_file, name, *[make_evaluation(1.0)] * 4)
    promote(mlflow_file, name, 1)
    _kill_between_entry_and_aliases(mlflow_file, name)
    client = connect(mlflow_file)
    if fate == "deleted":
        client.delete_model_version(name, "2")
    else:
        client.set_registered_model_alias(name, "champion", "3")
    source = 1 if fate == "deleted" else 3
    promote(mlflow_file, name, 4)
    assert _read_moves(mlflow_file, name) == [(None, 1), (1, 2), (source, 4)]
    assert read_aliases(mlflow_file, name) == {"challenger": 4, "champion": 4, "previous": source}


def test_an_alias_moved_by_hand_is_where_the_next_move_starts(uri: str, name: str) -> None:
    register_versions(uri, name, *[make_evaluation(1.0)] * 3)
    promote(uri, name, 1)
    connect(uri).set_registered_model_alias(name, "champion", "2")
    assert promote(uri, name, 2).move is None, "what the alias says is so"
    promote(uri, name, 3)
    assert _read_moves(uri, name) == [(None, 1), (2, 3)] and read_aliases(uri, name)["previous"] == 2
    connect(uri).delete_registered_model_alias(name, "champion")
    promote(uri, name, 1)
    assert _read_moves(uri, name)[-1] == (None, 1) and read_aliases(uri, name)["champion"] == 1


def test_gates_decide(mlflow_file: str, name: str) -> None:
    register_versions(mlflow_file, name, make_evaluation(3.5))
    with pytest.raises(GatesFailed, match=r"version 1: Validation loss: 3\.500, at most 2\.000: failed; train it"):
        promote(mlflow_file, name)
    assert read_aliases(mlflow_file, name) == {"challenger": 1} and _read_moves(mlflow_file, name) == []
    register_versions(mlflow_file, name, {"student": {}}, None)
    with pytest.raises(NoQualityGate) as caught:
        promote(mlflow_file, name, 2, pipeline_run_id="run")
    assert str(caught.value) == (
        f"{name} version 2: no gate judged its quality (a loss, kl, top1_agreement or a task), so no pipeline promotes "
        "it; declare a gate in evaluate.gates, such as {metric: validation_loss, against: teacher, at_most: 1}, or "
        f"promote it yourself: minitron promote {name} --version 2"
    )
    assert promote(mlflow_file, name, 2).gates == [], "it declares none, but a person asks for it by name"
    with pytest.raises(GatesFailed, match=r"version 3: its MLflow run has no evaluation\.json; run the pipe"):
        promote(mlflow_file, name)


def test_a_person_overrules_gates_and_says_why(mlflow_file: str, name: str) -> None:
    """The log, the version and its lineage say so; no pipeline overrules, and no gate that is met is overruled."""
    register_versions(mlflow_file, name, make_evaluation(1.5), make_evaluation(3.5), None)
    for values in ({}, {"why": " "}, {"why": "better", "pipeline_run_id": "run-7"}):
        with pytest.raises(ConfigError, match="--force: only a person can overrule gates, and the log says why; give"):
            promote(mlflow_file, name, 2, force=True, **values)
    forced = "Validation loss: 3.500, at most 2.000: failed"
    move = promote(mlflow_file, name, 2, "its license", force=True).move
    assert move is not None and move.forced == forced
    assert PromotionLog(connect(mlflow_file), name).read_moves()[-1] == move
    tags = connect(mlflow_file).get_model_version(name, "2").tags
    assert tags["promoted_forced"] == forced and tags["promoted_why"] == "its license"
    tree = {"version": "v", "licences": {"data": "mit", "teacher": {"license": "mit"}}, "stages": {}, "promotion": tags}
    assert f"by {move.who}, overruling its gates ({forced}): its license" in str(make_tree(tree).children[1].label)
    move = promote(mlflow_file, name, 3, "not measured", force=True).move
    assert move is not None and move.forced == "its MLflow run has no evaluation.json"
    move = promote(mlflow_file, name, 1, "back", force=True).move
    assert move is not None and move.forced is None
    assert connect(mlflow_file).get_model_version(name, "1").tags["promoted_forced"] == ""


def test_a_log_that_version_0_3_wrote_goes_on(mlflow_file: str, name: str) -> None:
    register_versions(mlflow_file, name, *[make_evaluation(1.0)] * 3)
    client = connect(mlflow_file)
    run = client.create_run(find_or_create_experiment(client, promotion_log.EXPERIMENT)).info.run_id
    client.set_registered_model_tag(name, "minitron.promotions", run)
    entry = {"from": None, "to": 1, "who": "me", "when": "2026-11-20T10:00:00+00:00", "why": None, "id": "a" * 32}
    client.log_param(run, "move.0001", json.dumps(entry))
    client.log_param(run, "done.0001", "given up")
    promote(mlflow_file, name, 2)
    client.log_param(run, "move.0003", json.dumps(entry | {"from": 2, "to": 3}))
    assert promote(mlflow_file, name, 1).move is not None, "its third move was not completed, nor given up"
    assert _read_moves(mlflow_file, name) == [(None, 1), (None, 2), (2, 3), (3, 1)]
    assert client.get_registered_model(name).tags["minitron.promotions"] == run


def test_gates_against_another_champion_are_judged_again(mlflow_file: str, name: str) -> None:
    """Where both were measured on the same test set; else the version has to be evaluated anew."""
    against = {"address": f"models:/{name}/9", "validation_loss": 2.0}
    register_versions(
        mlflow_file,
        name,
        make_evaluation(1.5),
        make_evaluation(1.4, "champion", champion=against),
        make_evaluation(1.6, "champion", champion=against),
        make_evaluation(1.0, "champion", test_set="b", champion=against),
        make_evaluation(1.0, "champion", test_set="b", champion={"address": f"models:/{name}/2"}),
    )
    with pytest.raises(NoQualityGate, match="its gates on quality need a champion, but there is none, so no"):
        promote(mlflow_file, name, 3, pipeline_run_id="run")
    assert promote(mlflow_file, name, 3, "the first", "run").gates[0]["outcome"] == "no champion"
    promote(mlflow_file, name, 1)
    rows = promote(mlflow_file, name, 2).gates
    assert rows[0]["reference"] == 1.5 and rows[0]["outcome"] == "passed"
    with pytest.raises(GatesFailed, match=r"version 3: .* champion's: 0\.200 \(student: 1\.600, champion: 1\.400\)"):
        promote(mlflow_file, name, 3)
    with pytest.raises(GatesFailed, match=r"against models:/.*/9, and .* cannot be compared .*, version 2; run the"):
        promote(mlflow_file, name, 4)
    assert promote(mlflow_file, name, 5).version == 5, "it was compared with today's champion"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "nobody"}, r"nobody: no such model is registered at sqlite:.*; known: .*"),
        ({"version": 7}, r": no version 7; known: 1, 2"),
        ({"version": None}, r": no version has the alias challenger; give a version, or register one"),
        ({"uri": None}, r"tracking_uri: missing; give MLflow's address"),
        ({"uri": "./mlruns"}, r"tracking_uri \./mlruns: MLflow cannot write there"),
        ({"uri": "http://127.0.0.1:9"}, r"MLflow at http://127\.0\.0\.1:9: .*check tracking_uri and that"),
        ({"why": "x" * 1001}, r"why: 1001 characters in JSON; give at most 1000"),
        ({"why": '"' * 501}, r"why: 1002 characters in JSON; give at most 1000"),
    ],
)
def test_what_cannot_be_promoted_is_refused(mlflow_file: str, name: str, values: dict[str, Any], message: str) -> None:
    register_versions(mlflow_file, name, *[make_evaluation(1.0)] * 2)
    connect(mlflow_file).delete_registered_model_alias(name, "challenger")
    with pytest.raises((ConfigError, RunError), match=message) as caught:
        promote(**({"uri": mlflow_file, "name": name, "version": 1} | values))
    assert "\n" not in str(caught.value)


def test_without_a_previous_version_nothing_is_taken_back(mlflow_file: str, name: str) -> None:
    register_versions(mlflow_file, name, make_evaluation(1.0))
    promote(mlflow_file, name)
    with pytest.raises(RunError, match="no version has the alias previous; give the one you want to minitron promote"):
        rollback(mlflow_file, name)


def test_the_commands_say_what_moved_and_why(mlflow_file: str, name: str) -> None:
    register_versions(mlflow_file, name, make_evaluation(1.5), make_evaluation(3.5))

    def said(status: int, *words: str) -> str:
        done = CliRunner().invoke(app, [*words, "--tracking-uri", mlflow_file])
        assert done.exit_code == status, done.output
        return " ".join(done.output.split())

    answer = said(0, "promote", name, "--version", "1", "--why", "the first")
    assert "champion none 1 previous none" in answer and "1.500 │ at most 2.000 │ +0.500 │ ✓ passed" in answer
    assert f"unchanged: version 1 of {name} already is the champion" in said(0, "promote", name, "--version", "1")
    answer = said(1, "promote", name)
    assert "error:" in answer and "at most 2.000: failed; train it longer, give retrain other evaluate.gates" in answer
    assert f"or overrule them yourself: minitron promote {name} --version 2 --force --why REASON" in answer
    answer = said(0, "promote", name, "--force", "--why", "smaller")
    assert answer.endswith(": smaller overruled gates: Validation loss: 3.500, at most 2.000: failed")
    said(0, "rollback", name)
    connect(mlflow_file).delete_registered_model_alias(name, "previous")
    assert "no version has the alias previous" in said(1, "rollback", name)
    connect(mlflow_file).set_registered_model_alias(name, "previous", "2")
    answer = said(0, "rollback", name, "--why", "too slow")
    assert "champion 1 2 previous 1" in answer and answer.endswith(": too slow")


@pytest.mark.parametrize("why", ["ж" * 1000, '"' * 500, "line\n" * 160])
def test_whatever_the_reason_the_log_can_be_read(mlflow_file: str, name: str, why: str) -> None:
    register_versions(mlflow_file, name, *[make_evaluation(1.0)] * 2)
    done = promote(mlflow_file, name, 1, why)
    assert done.move is not None and done.move.why == why
    promote(mlflow_file, name, 2)
    assert _read_moves(mlflow_file, name) == [(None, 1), (1, 2)]


def test_a_first_version_whose_run_was_deleted_keeps_nobody(mlflow_file: str, name: str) -> None:
    register_versions(mlflow_file, name, *[make_evaluation(1.0)] * 2)
    client = connect(mlflow_file)
    client.delete_run(client.get_model_version(name, "1").run_id)
    assert promote(mlflow_file, name, 2).version == 2


@pytest.mark.parametrize("text", ["[]", "oops", '{"gates": [{"metric": "x"}]}', '{"gates": 3}'])
def test_an_evaluation_of_another_tool_is_refused(mlflow_file: str, name: str, text: str) -> None:
    register_version(mlflow_file, name, "challenger", {}, evaluation=text)
    with pytest.raises(
        RunError, match=r"not what minitron writes|minitron did not write the evaluation.json"
    ) as caught:
        promote(mlflow_file, name)
    assert "\n" not in str(caught.value)


def test_the_speed_of_another_evaluation_is_not_compared(mlflow_file: str, name: str) -> None:
    by_loss = make_evaluation(1.0, "champion")
    by_speed = by_loss | {"gates": [by_loss["gates"][0] | {"metric": "generation_tokens_per_second"}]}
    register_versions(mlflow_file, name, make_evaluation(1.5), by_loss, by_speed)
    promote(mlflow_file, name, 1)
    with pytest.raises(
        NotJudged, match="cannot be compared with those of the present champion, version 1; run the pipe"
    ):
        promote(mlflow_file, name, 3)
    assert promote(mlflow_file, name, 2).version == 2


def run_promote(uri: str, name: str, version: int, tmp_path: Path) -> dict[str, Any]:
    """Return what the task of the pipeline says of a version."""
    values = {"output": tmp_path / f"promoted-{version}", "tracking_uri": uri, "model_name": name, "version": version}
    config = parse("promote", values | {"experiment": name, "pipeline_run_id": f"run-{version}"})
    assert isinstance(config, PromoteConfig)
    return promotion.run(config)


def test_what_could_not_be_judged_is_not_decided(mlflow_file: str, name: str, tmp_path: Path) -> None:
    against = make_evaluation(1.0, "champion", test_set="b")
    register_versions(mlflow_file, name, make_evaluation(1.5), against, None, make_evaluation(3.5))
    outcomes = [run_promote(mlflow_file, name, version, tmp_path)["outcome"] for version in (1, 2, 3, 4)]
    assert outcomes == ["promoted", "challenger", "challenger", "challenger"]
    client = connect(mlflow_file)
    tags = [client.get_model_version(name, str(version)).tags.get("decision", "") for version in (1, 2, 3, 4)]
    assert tags[:3] == ["it met its gates", "", ""] and "Validation loss" in tags[3]
    runs = client.search_runs([find_or_create_experiment(client, name)], f"tags.`{pipeline_run.RUN_TAG}` LIKE 'run-%'")
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
    verdicts = {run.data.tags["kfp.run_id"]: run.data.tags["verdict"] for run in runs}
    assert verdicts == {"run-1": "promoted", "run-2": "not judged", "run-3": "not judged", "run-4": "gates not met"}


GENERATE = """
import json, sys
sys.modules["minitron"] = None
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(f"models:/{sys.argv[2]}@champion")
print(json.dumps(model.predict(["hello there"], params={"max_new_tokens": 8})))
"""


def test_the_champion_generates_wherever_its_alias_is_loaded(
    mlflow_file: str, name: str, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(teacher, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"lm_head.weight": -weights["lm_head.weight"]}, other / "model.safetensors", {"format": "pt"})
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "report.html").write_text("<p>report</p>")
    for student in (teacher, other):
        found = make_evaluation(1.0) | {"student": {"parameters": 213568, "validation_loss": 1.0}}
        del found["teacher"]
        (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps(found))
        values = {"output": tmp_path / f"out-{student.name}", "student": student, "dataset": dataset, "name": name}
        values |= {"evaluation": tmp_path / "evaluation", "tracking_uri": mlflow_file, "experiment": name}
        register.run(parse("register", values))
        promote(mlflow_file, name)
        assert _generated(mlflow_file, name, tmp_path) == _expected(student)
    rollback(mlflow_file, name)
    assert _generated(mlflow_file, name, tmp_path) == _expected(teacher) != _expected(other)


def _generated(uri: str, name: str, directory: Path) -> list[str]:
    done = forks.run_python("-c", GENERATE, uri, name, directory=directory)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _expected(directory: Path) -> list[str]:
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    tokens = tokenizer("hello there", return_tensors="pt", return_token_type_ids=False)
    found = model.generate(**tokens, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return [tokenizer.decode(found[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)]


def test_a_version_whose_loss_is_not_a_number_is_not_promoted(mlflow_file: str, name: str) -> None:
    """And the pipeline retrain may make it again: it was not judged."""
    register_versions(mlflow_file, name, make_evaluation(float("nan")))
    with pytest.raises(
        NotJudged, match=r"version 1: student.validation_loss is nan in its evaluation.json, so it is not"
    ):
        promote(mlflow_file, name)
    assert "champion" not in read_aliases(mlflow_file, name)


def test_a_champion_whose_loss_is_not_a_number_is_named(mlflow_file: str, name: str) -> None:
    """An earlier version of this package made it the champion."""
    nan = make_evaluation(float("nan"))
    register_versions(mlflow_file, name, nan, make_evaluation(1.0, against="champion"))
    connect(mlflow_file).set_registered_model_alias(name, "champion", "1")
    with pytest.raises(NotJudged, match=r"is nan in evaluation.json of the champion, version 1: nothing .* rollback"):
        promote(mlflow_file, name)
