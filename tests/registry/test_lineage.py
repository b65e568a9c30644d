"""A registered version tells where it comes from, from MLflow alone, and makes the preset that runs it again."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from minitron import METHOD_VERSION
from minitron.cli import lineage_tree
from minitron.cli.app import app
from minitron.config.document import SAMPLES, make_plan, merge, read_preset
from minitron.config.parse import parse
from minitron.config.stages import SETTINGS, STAGES, EvaluateConfig, StageConfig
from minitron.errors import ConfigError, RunError
from minitron.registry import fingerprint, lineage, reproduce
from minitron.stages import evaluate, register
from minitron.storage.hashing import content_hash
from minitron.storage.layout import LINEAGE
from minitron.tracking.client import connect

CARD = "---\nlicense: other\nlicense_name: llama3.1\nlicense_link: LICENSE\ntags: [x]\n---\n# Llama\n"


@pytest.fixture(scope="module")
def base(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with a model card."""
    directory = shutil.copytree(teacher, tmp_path_factory.mktemp("base") / "base")
    (directory / "README.md").write_text(CARD)
    return directory


@pytest.fixture(scope="module")
def evaluation(base: Path, teacher: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What evaluate writes of models that no stage of ours made."""
    output = tmp_path_factory.mktemp("evaluation") / "evaluation"
    values: dict[str, Any] = {"teacher": teacher, "pruned": teacher, "student": teacher, "dataset": dataset}
    values |= {"sequence_length": 32, "evaluation_sequences": 2, "prompts": ["a"], "generation_tokens": 2}
    evaluate.run(EvaluateConfig(output=output, teacher_before=str(base), **values))
    return output


@pytest.fixture
def make(evaluation: Path, teacher: Path, dataset: Path, tmp_path: Path) -> Callable[[str], StageConfig]:
    """Return a function that makes register's configuration for an MLflow."""

    def configuration(uri: str) -> StageConfig:
        values = {"output": tmp_path / "out", "student": teacher, "dataset": dataset, "evaluation": evaluation}
        names = {"name": tmp_path.name, "experiment": tmp_path.name, "pipeline_run_id": f"run of {tmp_path.name}"}
        return parse("register", values | names | {"tracking_uri": uri})

    return configuration


def test_evaluate_writes_the_licenses_of_the_base_model_and_of_the_data(evaluation: Path) -> None:
    found = json.loads((evaluation / LINEAGE).read_text())
    teacher = {"license": "other", "license_name": "llama3.1", "license_link": "LICENSE"}
    assert found == {"stages": {}, "licences": {"data": "none", "teacher": teacher}}
    assert lineage.format_license(teacher) == "llama3.1"


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {"license": "mit, apache-2.0"}),
        ("---\nlicense:\n---\n", {"license": "unknown"}),
        ("---\n: broken: [\n---\n", {"license": "unknown"}),
        ("---\n- a list\n---\n", {"license": "unknown"}),
        ("---\nnever closed", {"license": "unknown"}),
        ("# No front matter, license: mit\n", {"license": "unknown"}),
    ],
)
def test_a_model_card_is_read_as_it_comes(tmp_path: Path, text: str, licence: dict[str, str]) -> None:
    (tmp_path / "README.md").write_text(text)
    assert lineage.read_model_license(tmp_path) == licence


def test_a_record_without_a_later_setting_has_another_fingerprint() -> None:
    """A dataset of an earlier version may hold other documents; its record is no traceback."""
    config = {stage: SETTINGS[stage]().model_dump(mode="json") for stage in fingerprint.MADE_BY}
    inputs = {name: {"sha256": name} for name in ("corpus", "teacher")}
    records = {
        stage: {"config": values, "inputs": inputs, "versions": {"minitron": "0.2.0", "method": "0.1.0"}}
        for stage, values in config.items()
    }
    present = fingerprint.fingerprint_records(records)
    del config["prepare"]["document_separator"]
    earlier = fingerprint.fingerprint_records(records)
    assert present and earlier and present | {"settings": earlier["settings"]} == earlier != present


def test_the_fingerprint_of_a_record_has_the_content_of_the_lists_of_what_to_keep() -> None:
    plan = make_plan({"teacher": "teacher", "corpus": "corpus", "prune.keep": "keep.json"})
    inputs = {name: {"sha256": name} for name in ("corpus", "teacher", "keep")}
    records = {
        stage: {"config": plan.stages[stage].model_dump(mode="json"), "inputs": inputs, "versions": versions}
        for versions in [{"minitron": "0.6.0", "method": METHOD_VERSION}]
        for stage in fingerprint.MADE_BY
    }
    present = fingerprint.fingerprint_records(records)
    assert present == fingerprint.fingerprint_plan(plan, "corpus", "teacher", "keep")
    assert present != fingerprint.fingerprint_plan(plan, "corpus", "teacher")


def test_a_version_of_0_3_is_known_again_although_fewer_settings_count_now() -> None:
    """The digest is the one that 0.3.0 gave the preset tiny on a cluster; another setting makes another model."""
    tag = {"corpus": "c", "teacher": "t", "minitron": METHOD_VERSION}
    tag |= {"settings": "60e436f2516597f9509e59e45b2792714e039a1e372f7ed2d7513eebbd0ff4f6"}
    flat = {key: value for key, value in merge(read_preset("tiny")).items() if key != SAMPLES}
    flat["engine"] = "nemo"  # the default until 0.4
    plan = make_plan(flat | {"teacher": "teacher", "corpus": "corpus"})
    present, tags = fingerprint.fingerprint_plan(plan, "c", "t"), {fingerprint.TAG: json.dumps(tag)}
    assert fingerprint.read_fingerprint(tags, plan) == present != tag
    other = make_plan(flat | {"teacher": "teacher", "corpus": "corpus", "distill.max_steps": 41})
    assert fingerprint.read_fingerprint(tags, other) == tag != fingerprint.fingerprint_plan(other, "c", "t")


def test_a_version_has_its_lineage(
    uri: str, make: Callable[[str], StageConfig], teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRON_IMAGE", "registry/tools:1")
    config = make(uri)
    record = register.run(config)  # type: ignore[arg-type]
    name = record["registered"]["name"]
    found = lineage.read_lineage(uri, f"models:/{name}@challenger")
    assert found["version"] == f"models:/{name}/1"
    assert list(found["stages"]) == ["evaluate", "register"]
    own = found["stages"]["register"]
    assert own["inputs"]["student"] == {"address": str(teacher), "sha256": content_hash(teacher)}
    assert own["image"] == "registry/tools:1" and own["pipeline_run_id"] == config.pipeline_run_id
    assert own["mlflow_run_id"] != record["registered"]["run_id"]
    tags = connect(uri).get_model_version(name, "1").tags
    assert tags[lineage.TAG] == f"runs:/{record['registered']['run_id']}/lineage.json"
    assert tags["teacher_license"] == "llama3.1"


def test_what_has_no_lineage_is_explained(mlflow_file: str, make: Callable[[str], StageConfig]) -> None:
    register.run(make(mlflow_file))  # type: ignore[arg-type]
    name = make(mlflow_file).name  # type: ignore[attr-defined]
    with pytest.raises(RunError, match=r"/9: model .* has no such version; the newest is 1"):
        lineage.read_lineage(mlflow_file, f"models:/{name}/9")
    client = connect(mlflow_file)
    client.create_model_version(name, "gs://bucket/made-by-hand")
    with pytest.raises(ConfigError, match=f"models:/{name}/2: no tag {lineage.TAG}; give a version"):
        lineage.read_lineage(mlflow_file, f"models:/{name}/2")
    client.set_model_version_tag(name, "1", lineage.STUDENT_TAG, "another")
    with pytest.raises(RunError, match=r"lineage\.json belongs to another student, because it was overwritten"):
        lineage.read_lineage(mlflow_file, f"models:/{name}/1")


@pytest.mark.parametrize("command", ["lineage", "reproduce", "serve-manifest"])
def test_a_server_that_is_away_is_one_line(command: str) -> None:
    done = CliRunner().invoke(app, [command, "models:/x/1", "--tracking-uri", "http://127.0.0.1:9"])
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: MLflow at http://127.0.0.1:9: ")


ENTRY = {"address": "hf://org/base", "sha256": "a1", "pinned": "hf://org/base@c0ffee"}


def make_record(stage: str, output: str, inputs: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A record as a stage of the pipeline leaves it, with the defaults."""
    values = {name: entry["address"] for name, entry in inputs.items()} | settings
    places = {name: "/results/x" for name in ("dataset", "student", "pruned", "evaluation", "teacher")}
    needed = {name for name, field in STAGES[stage].model_fields.items() if field.is_required()}
    values = {name: place for name, place in places.items() if name in needed} | values | {"output": "/results/y"}
    config = parse(stage, values | ({"tracking_uri": "sqlite:///x"} if stage == "register" else {}))
    return {
        "stage": stage,
        "inputs": inputs,
        "output_sha256": output,
        "config": config.model_dump(mode="json", exclude={"tracking_uri"}),
        "versions": {"minitron": "0.1.0"},
        "image": "registry/trainer:1",
        "started": 0.0,
        "seconds": 1800.0,
        "peak_rss_mb": 10.0,
        "gpus": 8,
        "metrics": {"tokens": 1000},
    }


@pytest.fixture
def found() -> dict[str, Any]:
    """The lineage of a run whose corpus is a bucket's and whose teacher is a branch of the hub."""
    corpus = {"address": "gs://bucket/text", "sha256": "d1"}
    dataset = {"dataset": {"address": "/results/x", "sha256": "r1"}}
    records = [
        make_record("prepare", "r1", {"corpus": corpus, "teacher": ENTRY}, licence="CC0: [all]"),
        make_record("finetune", "r2", dataset | {"teacher": ENTRY}),
        make_record("prune", "r3", dataset, drop_layers=[1, 2]),
        make_record("distill", "r4", dataset, max_steps=7),
        make_record("evaluate", "r5", dataset | {"teacher_before": ENTRY}),
        make_record("register", "r6", dataset, name="small"),
    ]
    licences = {"data": "CC0", "teacher": {"license": "unknown"}}
    return {"stages": lineage.sort_records(records), "licences": licences, "version": "models:/small/3"}


def test_the_preset_has_settings_and_what_addresses_meant(found: dict[str, Any]) -> None:
    text = reproduce.write_preset(found)
    values = yaml.safe_load(text)
    assert values["teacher"] == "hf://org/base@c0ffee" and values["corpus"] == "gs://bucket/text"
    assert values["prepare"]["licence"] == "CC0: [all]" and values["prune"]["drop_layers"] == [1, 2]
    assert values["distill"]["max_steps"] == 7 and values["register"] == {
        "name": "small",
        "alias": "reproduced",
    }
    assert values["prepare"]["expected_sha256"] == {"corpus": "d1"}  # the teacher's commit is in its address
    assert values["finetune"]["expected_sha256"] == {"dataset": "r1"} and "expected_sha256" not in values["distill"]
    assert not {"workspace", "caching", "output", "pipeline_run_id"} & (values.keys() | values["distill"].keys())
    comments = [line for line in text.splitlines() if line.startswith("#")]
    for line in ("# corpus: gs://bucket/text", "#   sha256 d1", "# image registry/trainer:1", "# result sha256 r4"):
        assert line in comments


def test_of_a_stage_that_was_reused_the_places_may_differ_but_not_the_settings(found: dict[str, Any]) -> None:
    found["stages"]["prepare"]["config"]["experiment"] = "earlier"
    found["stages"]["finetune"]["config"]["teacher"] = "/elsewhere"
    assert yaml.safe_load(reproduce.write_preset(found))["teacher"] == "hf://org/base@c0ffee"
    found["stages"]["distill"]["config"]["sequence_length"] = 5
    with pytest.raises(ConfigError, match="models:/small/3: sequence_length is 8192 in one stage and 5 in distill"):
        reproduce.write_preset(found)


def test_what_other_tools_made_cannot_be_made_again(found: dict[str, Any]) -> None:
    del found["stages"]["finetune"], found["stages"]["prune"]
    with pytest.raises(ConfigError, match="models:/small/3: no record of finetune, prune, so not all settings"):
        reproduce.write_preset(found)


def test_the_tree_tells_cost_and_origin(found: dict[str, Any]) -> None:
    found["stages"]["distill"]["history"] = [{"step": step, "validation_loss": 5.0 - step} for step in (0, 1)]
    stream = io.StringIO()
    Console(width=300, file=stream).print(lineage_tree.make_tree(found))
    text = stream.getvalue()
    assert "licenses: corpus CC0, teacher unknown" in text
    assert "1,000 tokens, 4.00 GPU-hours on 8 GPUs" in text
    assert "teacher: hf://org/base@c0ffee sha256 a1" in text
    assert "validation loss: 5.000 → 4.000" in text and "image: registry/trainer:1" in text
    assert 'licence="CC0: [all]"' in text
