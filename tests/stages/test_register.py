"""The student becomes a version that generates text, on a real server and on a SQLite file, or leaves nothing."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron.config.parse import parse
from minitron.config.stages import RegisterConfig
from minitron.errors import ConfigError, RunError
from minitron.models.checkpoint import count_model_parameters, count_stored_parameters
from minitron.registry import versions
from minitron.stages import distill, register
from minitron.storage.hashing import content_hash
from minitron.tracking.client import connect
from tests.constants import SEQUENCE
from tests.report.evaluations import make_gated_evaluation
from tests.servers.http_server import free_port
from tests.servers.mlflow_server import mlflow_serving

TEXTS = ["hello there", "abc"]
WEIGHTS, OLD_COMMENT = "model.safetensors", "# Written by minitron-pipelines"


@pytest.fixture(scope="module")
def student(teacher: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What distill writes."""
    output = tmp_path_factory.mktemp("student") / "student"
    values = {"output": output, "dataset": dataset, "teacher": teacher, "student": teacher, "max_steps": 2}
    values |= {"sequence_length": SEQUENCE, "micro_batch_size": 2, "global_batch_size": 2, "validation_sequences": 2}
    distill.run(parse("distill", values))
    return output


@pytest.fixture
def make(tmp_path: Path, student: Path, dataset: Path) -> Callable[..., RegisterConfig]:
    """Return a function that makes a configuration with this test's own experiment and registered model."""
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    (evaluation / "report.html").write_text("<p>report</p>")
    (evaluation / "evaluation.json").write_text(json.dumps({"student": {"parameters": 213568}}))
    common = {"output": tmp_path / "out", "student": student, "dataset": dataset, "evaluation": evaluation}
    common |= {"name": tmp_path.name, "experiment": tmp_path.name}

    def configuration(uri: str | None, **values: Any) -> RegisterConfig:
        return parse("register", common | {"tracking_uri": uri} | values)  # type: ignore[return-value]

    return configuration


@pytest.fixture
def mlflow(uri: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The fluent API, as a user of the registry has it."""
    connect(uri)
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return mlflow


def _expected(student: Path, length: int) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(student)
    model = AutoModelForCausalLM.from_pretrained(student)
    answers = []
    for text in TEXTS:
        tokens = torch.tensor([tokenizer(text)["input_ids"]])
        for _ in range(length):
            following = model(tokens).logits[:, -1:].argmax(-1)
            if following.item() == tokenizer.eos_token_id:
                break
            tokens = torch.cat([tokens, following], 1)
        start = len(tokenizer(text)["input_ids"])
        answers.append(tokenizer.decode(tokens[0, start:], skip_special_tokens=True))
    return answers


def test_the_version_generates_and_its_directory_loads(
    uri: str, mlflow: Any, make: Callable[..., RegisterConfig], student: Path, tmp_path: Path
) -> None:
    config = make(uri, pipeline_run_id="pipeline-7")
    record = register.run(config)
    registered = json.loads((config.output / "registered.json").read_text())
    assert registered["version"] == record["metrics"]["version"] == 1
    assert registered["model_uri"] == f"models:/{config.name}@challenger" and registered["alias"] == "challenger"

    model = mlflow.pyfunc.load_model(registered["model_uri"])
    assert model.predict(TEXTS, params={"max_new_tokens": 8}) == _expected(student, 8)
    assert model.predict(TEXTS[0]) == _expected(student, 64)[:1]

    downloaded = Path(mlflow.artifacts.download_artifacts(registered["model_uri"], dst_path=str(tmp_path)))
    tokens = torch.arange(10).reshape(1, 10)
    logits = [AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (student, downloaded)]
    assert torch.equal(*logits)
    for path in student.iterdir():
        assert content_hash(downloaded / path.name) == content_hash(path)

    _check_tags(config, registered, student)


def _check_tags(config: RegisterConfig, registered: dict[str, Any], student: Path) -> None:
    """The version says what it comes from, and the parent run has what belongs to the whole pipeline."""
    client = connect(str(config.tracking_uri))
    version = client.get_model_version(config.name, "1")
    distilled = json.loads((student / "stage.json").read_text())
    assert version.tags == {
        "minitron.pipeline_run_id": "pipeline-7",
        "verdict": "no gates",
        "parameters": "213568",  # 2 · 512 · 64 embeddings, 4 · (2 · 64² + 2 · 64 · 32 + 3 · 64 · 128 + 2 · 64), 64
        "validation_loss": f"{distilled['metrics']['validation_loss']:.4f}",
        "minitron.teacher_sha256": content_hash(Path(distilled["config"]["teacher"])),
        "minitron.student_sha256": content_hash(student),
        "minitron.dataset_sha256": content_hash(config.dataset),
        "license": "none",
        "teacher_license": "unknown",
        "minitron.lineage": f"runs:/{registered['run_id']}/lineage.json",
        "minitron.key": json.loads((config.output / "stage.json").read_text())["key"],
    }
    parent = client.get_run(version.run_id)
    assert parent.data.tags["kfp.run_id"] == "pipeline-7" and parent.info.run_id == registered["run_id"]
    assert {file.path for file in client.list_artifacts(version.run_id)} == {
        "report.html",
        "evaluation.json",
        "lineage.json",
        "dataset",
    }
    assert [file.path for file in client.list_artifacts(version.run_id, "dataset")] == ["dataset/manifest.json"]
    (output,) = parent.outputs.model_outputs
    assert version.source == f"models:/{output.model_id}"
    links = client.get_logged_model(output.model_id).tags["mlflow.modelVersions"]
    assert json.loads(links) == [{"name": config.name, "version": "1"}]


def test_the_version_loads_without_minitron(
    mlflow_file: str, make: Callable[..., RegisterConfig], student: Path, tmp_path: Path
) -> None:
    """In a process of its own, which has imported nothing of this package."""
    config = make(mlflow_file)
    register.run(config)
    code = f"""
import sys
sys.modules["minitron"] = None
import json, mlflow
mlflow.set_tracking_uri({mlflow_file!r})
model = mlflow.pyfunc.load_model("models:/{config.name}@challenger")
print(json.dumps(model.predict({TEXTS!r}, params={{"max_new_tokens": 8}})))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == _expected(student, 8)


@pytest.mark.parametrize(("own", "until_0_4"), [(False, False), (True, False), (False, True)])
def test_a_model_card_goes_with_the_weights_and_is_taken_away_again(
    mlflow_file: str, make: Callable[..., RegisterConfig], student: Path, tmp_path: Path, own: bool, until_0_4: bool
) -> None:
    copy = shutil.copytree(student, tmp_path / "copy")
    if own:
        (copy / "stage.json").unlink()
        (copy / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    config = make(mlflow_file, student=copy)
    register.run(config)
    client = connect(mlflow_file)
    model_id = client.get_model_version(config.name, "1").source.removeprefix("models:/")
    assert "README.md" in {file.path for file in client.list_logged_model_artifacts(model_id)}
    assert (config.output / "README.md").read_text().startswith(versions.CARD_BEGINS)
    if until_0_4:
        text = (config.output / "README.md").read_text().replace("written_by: minitron-pipelines", OLD_COMMENT)
        (tmp_path / "README.md").write_text(text)
        client.log_model_artifact(model_id, str(tmp_path / "README.md"))
    versions.download_version(mlflow_file, f"models:/{config.name}/1", tmp_path / "downloaded")
    assert content_hash(tmp_path / "downloaded") == content_hash(copy)
    assert (tmp_path / "downloaded" / "README.md").exists() == own


def test_the_alias_moves_and_the_same_student_is_not_registered_twice(
    mlflow_file: str, make: Callable[..., RegisterConfig], teacher: Path, tmp_path: Path
) -> None:
    client = connect(mlflow_file)
    first = register.run(make(mlflow_file))
    assert register.run(make(mlflow_file)) == first
    other = shutil.copytree(teacher, tmp_path / "other")
    weights = load_file(other / WEIGHTS)
    save_file(weights | {"lm_head.weight": -weights["lm_head.weight"]}, other / WEIGHTS, {"format": "pt"})
    second = register.run(make(mlflow_file, student=other, output=tmp_path / "second"))
    assert (first["metrics"], second["metrics"]) == ({"version": 1}, {"version": 2})
    assert int(client.get_model_version_by_alias(tmp_path.name, "challenger").version) == 2
    assert len(client.search_model_versions(f"name = '{tmp_path.name}'")) == 2


def test_a_version_of_the_same_registration_is_taken_over_from_any_workspace(
    uri: str, make: Callable[..., RegisterConfig], tmp_path: Path
) -> None:
    client, again = connect(uri), tmp_path / "again"
    first = register.run(make(uri, pipeline_run_id="first"))["registered"]
    client.delete_registered_model_alias(first["name"], "challenger")
    second = register.run(make(uri, pipeline_run_id="second", output=again, workspace=tmp_path / "other"))["registered"]
    assert second == first and len(client.search_model_versions(f"name = '{first['name']}'")) == 1
    assert int(client.get_model_version_by_alias(first["name"], "challenger").version) == 1
    assert len(client.search_logged_models([client.get_experiment_by_name(tmp_path.name).experiment_id])) == 1
    assert _parents(uri, tmp_path.name)["second"].data.metrics == {"student_parameters": 213568}


def _parents(uri: str, experiment: str) -> dict[str, Any]:
    """Return the runs of the pipeline runs by Kubeflow's id."""
    client = connect(uri)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return {run.data.tags["kfp.run_id"]: run for run in runs if "kfp.run_id" in run.data.tags}


def test_the_pipeline_s_run_says_what_came_of_it_and_is_sorted_by_it(
    uri: str, make: Callable[..., RegisterConfig], tmp_path: Path
) -> None:
    evaluation = make_gated_evaluation()
    evaluation["student"]["parameters"] = 213568
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation | {"passed": False}))
    register.run(make(uri, pipeline_run_id="first"))
    run = _parents(uri, tmp_path.name)["first"]
    assert (run.data.tags["model"], run.data.tags["verdict"]) == (tmp_path.name, "gates not met")
    expected = {"student_validation_loss": 3.0, "validation_loss_above_teacher": 1.0, "speed_ratio": 1.5}
    expected |= {"student_parameters": 213568, "gap_closed": 0.75, "student_arc_acc": 0.5}
    assert {name: run.data.metrics.get(name) for name in expected} == expected
    assert run.data.metrics["arc_acc_below_teacher"] == pytest.approx(0.1)
    client = connect(uri)
    version = client.get_model_version(tmp_path.name, "1")
    assert version.description == run.data.tags["mlflow.note.content"]
    assert "Gates not met. 629.8× smaller, 1.5× faster; loses 10.0 points of arc." in version.description
    assert "| Validation loss (nats per token) | 2.000 | 3.000 |" in version.description
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert {metric.key: metric.value for metric in model.metrics} == run.data.metrics


def test_a_run_that_made_nothing_new_says_so(uri: str, make: Callable[..., RegisterConfig], tmp_path: Path) -> None:
    for name in ("first", "first", "second"):
        register.run(make(uri, pipeline_run_id=name, workspace=tmp_path / "workspace"))
    first, second = (_parents(uri, tmp_path.name)[name] for name in ("first", "second"))
    assert (first.data.tags["verdict"], second.data.tags["verdict"]) == ("no gates", "unchanged")
    assert second.info.run_name.endswith(f" {tmp_path.name}") and second.info.status == "FINISHED"
    assert second.data.tags["mlflow.note.content"].startswith(f"Nothing new: version 1 of {tmp_path.name} ")
    assert second.data.metrics == {}


def test_another_registry_gets_its_own_version(
    mlflow_server: str, mlflow_file: str, make: Callable[..., RegisterConfig], tmp_path: Path
) -> None:
    for uri in (mlflow_file, mlflow_server):
        register.run(make(uri, workspace=tmp_path / "workspace"))
        assert int(connect(uri).get_model_version_by_alias(tmp_path.name, "challenger").version) == 1


def _assert_nothing_is_registered(uri: str, name: str, status: str = "FAILED") -> None:
    client = connect(uri)
    experiment = client.get_experiment_by_name(name).experiment_id
    assert not client.search_registered_models(f"name = '{name}'")
    assert not client.search_logged_models([experiment])
    assert [run.info.status for run in client.search_runs([experiment])] == [status]


@pytest.mark.parametrize("fault", ["weights", "upload", "version", "alias"])
def test_a_failure_leaves_no_orphan(
    mlflow_file: str, make: Callable[..., RegisterConfig], student: Path, dataset: Path, tmp_path: Path, fault: str
) -> None:
    values: dict[str, Any] = {}
    connect(mlflow_file).create_experiment(tmp_path.name, artifact_location=str(tmp_path / "artifacts"))
    match fault:
        case "weights":  # the student does not load
            values["student"] = shutil.copytree(student, tmp_path / "damaged")
            (tmp_path / "damaged" / "stage.json").unlink()
            (tmp_path / "damaged" / WEIGHTS).write_bytes((student / WEIGHTS).read_bytes()[:-1000])
        case "upload":  # logged models would lie in a directory where a file is
            (tmp_path / "artifacts").mkdir()
            (tmp_path / "artifacts" / "models").write_text("in the way")
        case "version":  # a tag above MLflow's limit: refused after the registered model was made
            values["dataset"] = shutil.copytree(dataset, tmp_path / "dataset")
            manifest = json.loads((dataset / "manifest.json").read_text()) | {"licence": "x" * 100_001}
            (tmp_path / "dataset" / "manifest.json").write_text(json.dumps(manifest))
        case "alias":  # one above MLflow's limit: refused after the version was made
            values["alias"] = "x" * 300
    config = make(mlflow_file, **values)
    with pytest.raises(RunError) as caught:
        register.run(config)
    assert "\n" not in str(caught.value)
    _assert_nothing_is_registered(mlflow_file, tmp_path.name)
    assert not list((tmp_path / "artifacts").rglob(WEIGHTS)), "MLflow itself deletes no files before `mlflow gc`"
    assert not config.output.exists() and not config.output.with_name("out.partial").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_the_parameters_are_counted_in_every_shard_without_loading_them(
    teacher: Path, tmp_path: Path, tied: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert count_stored_parameters(tmp_path) == count_model_parameters(AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
def test_a_student_that_lacks_weights_is_refused(teacher: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(teacher / "config.json", tmp_path)
    weights = load_file(teacher / WEIGHTS)
    del weights[name]
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(RunError, match=f"1 weights are missing \\({name} …\\); get the model again"):
        count_stored_parameters(tmp_path)


def test_the_student_s_environment_is_the_one_that_trained_it(
    mlflow_file: str, make: Callable[..., RegisterConfig], student: Path, tmp_path: Path
) -> None:
    """The image that registers has no torch: its own packages say nothing."""
    record = json.loads((student / "stage.json").read_text())
    record["versions"] |= {"torch": "2.9.0+cu130", "transformers": "4.57.1"}
    copy = shutil.copytree(student, tmp_path / "copy")
    (copy / "stage.json").write_text(json.dumps(record))
    config = make(mlflow_file, student=copy)
    uri = register.run(config)["registered"]["model_uri"]
    connect(mlflow_file)
    import mlflow

    mlflow.set_tracking_uri(mlflow_file)
    directory = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "downloaded")))
    needed = (directory / "requirements.txt").read_text().split()[1:]  # mlflow comes first
    assert needed == ["torch==2.9.0", "transformers==4.57.1"]


def test_terminated_between_version_and_alias_it_leaves_nothing_and_registers_when_run_again(
    mlflow_file: str, make: Callable[..., RegisterConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = type(connect(mlflow_file))
    set_alias = client.set_registered_model_alias

    def terminated(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        set_alias(*arguments)

    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
            patch.setattr(client, "set_registered_model_alias", terminated)
            register.run(make(mlflow_file))
    finally:
        signal.signal(signal.SIGTERM, before)
    _assert_nothing_is_registered(mlflow_file, tmp_path.name, "KILLED")
    version = register.run(make(mlflow_file))["registered"]["version"]
    found = connect(mlflow_file).get_model_version_by_alias(tmp_path.name, "challenger")
    assert int(found.version) == version


def test_a_failure_leaves_the_earlier_version(
    uri: str, make: Callable[..., RegisterConfig], teacher: Path, tmp_path: Path
) -> None:
    register.run(make(uri))
    with pytest.raises(RunError):
        register.run(make(uri, student=teacher, alias="x" * 300, output=tmp_path / "second"))
    client = connect(uri)
    assert [int(version.version) for version in client.search_model_versions(f"name = '{tmp_path.name}'")] == [1]
    assert len(client.search_logged_models([client.get_experiment_by_name(tmp_path.name).experiment_id])) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tracking_uri": None}, "register.tracking_uri: missing; "),
        ({"alias": "champion"}, "register: alias champion is reserved for promote, which judges the gates; choose"),
        ({"alias": "Previous"}, "alias Previous is reserved for promote"),
        ({"alias": "v3"}, "alias v3 is reserved by MLflow; choose another"),
        ({"name": "a/b"}, "register.name: .*found 'a/b'"),
    ],
)
def test_what_cannot_be_registered_is_refused(
    make: Callable[..., RegisterConfig], values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        register.run(make(**({"uri": f"sqlite:///{tmp_path}/mlflow.db"} | values)))
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation"}


def test_the_evaluation_of_another_student_is_refused(
    mlflow_file: str, make: Callable[..., RegisterConfig], tmp_path: Path
) -> None:
    config = make(mlflow_file)
    (config.evaluation / "evaluation.json").write_text(json.dumps({"student": {"parameters": 5}}))
    with pytest.raises(ConfigError, match=r"213568 parameters, but .* evaluates a student with 5; give the"):
        register.run(config)
    assert not config.output.exists()


def test_an_evaluation_without_report_is_refused(make: Callable[..., RegisterConfig], tmp_path: Path) -> None:
    config = make(f"sqlite:///{tmp_path}/mlflow.db")
    (config.evaluation / "report.html").unlink()
    with pytest.raises(ConfigError, match=r"report\.html: no such file; give a directory that evaluate wrote"):
        register.run(config)
    assert not (tmp_path / "mlflow.db").exists()


def test_a_linked_directory_is_refused_since_mlflow_leaves_it_out(
    make: Callable[..., RegisterConfig], student: Path, tmp_path: Path
) -> None:
    linked = Path(shutil.copytree(student, tmp_path / "student", ignore=shutil.ignore_patterns("stage.json")))
    (tmp_path / "elsewhere").mkdir()
    (linked / "original").symlink_to("../elsewhere")
    with pytest.raises(ConfigError, match=r"student/original: a linked directory, which MLflow does not upload; copy"):
        register.run(make(f"sqlite:///{tmp_path}/mlflow.db", student=linked))
    assert not (tmp_path / "mlflow.db").exists()


def test_a_version_that_was_deleted_is_made_anew(mlflow_file: str, make: Any, tmp_path: Path) -> None:
    first = register.run(make(mlflow_file))["registered"]
    client = connect(mlflow_file)
    assert register.run(make(mlflow_file))["registered"] == first
    client.delete_model_version(first["name"], str(first["version"]))
    again = register.run(make(mlflow_file))["registered"]
    assert client.get_model_version_by_alias(first["name"], "challenger").version == again["version"]


@pytest.fixture(scope="module")
def server_with_a_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A real server that serves no artifacts: its URI, and its directory, in which its artifact root lies.

    The root is a path which leads each process to its own working directory, as one path leads two machines to their
    own disks.
    """
    port, directory = free_port(), tmp_path_factory.mktemp("server")
    options = ("--no-serve-artifacts", "--default-artifact-root", "/proc/self/cwd/artifacts")
    with mlflow_serving(directory, port, *options):
        yield f"http://127.0.0.1:{port}", directory


def test_weights_that_only_this_disk_has_are_refused(
    server_with_a_disk: tuple[str, Path],
    make: Callable[..., RegisterConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri, _ = server_with_a_disk
    (tmp_path / "client").mkdir()
    monkeypatch.chdir(tmp_path / "client")
    with pytest.raises(
        RunError, match=r"README.md was uploaded to /proc/self/cwd/artifacts/.*, but cannot be read"
    ) as caught:
        register.run(make(uri))
    assert "start the server with --serve-artifacts and --artifacts-destination, and give a new" in str(caught.value)
    assert caught.value.exit_status == 1 and "\n" not in str(caught.value)
    _assert_nothing_is_registered(uri, tmp_path.name)
    assert not list((tmp_path / "client").rglob(WEIGHTS)), "gigabytes went where nobody finds them"


def test_a_disk_that_the_server_shares_is_as_good_as_another(
    server_with_a_disk: tuple[str, Path],
    make: Callable[..., RegisterConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """But other machines may lack it: a warning says so."""
    uri, directory = server_with_a_disk
    monkeypatch.chdir(directory)
    assert register.run(make(uri))["registered"]["version"] == 1
    assert list(directory.rglob(WEIGHTS))
    assert "only machines that have this disk can load it" in capsys.readouterr().err


def test_an_upload_that_arrived_in_part_is_no_version(
    uri: str, make: Callable[..., RegisterConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = type(connect(uri))
    upload = client.log_model_artifact
    (tmp_path / "half").mkdir()

    def upload_half(self: Any, model_id: str, path: str, *folder: Any) -> None:
        half = Path(shutil.copy(path, tmp_path / "half"))
        if half.suffix == ".safetensors":
            half.write_bytes(half.read_bytes()[:1000])
        upload(self, model_id, str(half), *folder)

    monkeypatch.setattr(client, "log_model_artifact", upload_half)
    with pytest.raises(RunError, match=r"model.safetensors was uploaded to .*, but cannot be read back; check the"):
        register.run(make(uri))
    _assert_nothing_is_registered(uri, tmp_path.name)


@pytest.mark.parametrize("place", ["evaluation", "student"])
def test_a_model_whose_loss_is_not_a_number_is_not_registered(
    make: Callable[..., RegisterConfig], student: Path, tmp_path: Path, place: str
) -> None:
    config = make(f"sqlite:///{tmp_path}/mlflow.db", student=shutil.copytree(student, tmp_path / "copy"))
    if place == "evaluation":
        evaluation = {"student": {"parameters": 213568, "validation_loss": float("nan")}}
        (config.evaluation / "evaluation.json").write_text(json.dumps(evaluation))
    else:
        record = json.loads((student / "stage.json").read_text()) | {"metrics": {"validation_loss": float("nan")}}
        (config.student / "stage.json").write_text(json.dumps(record))
    with pytest.raises(
        ConfigError, match=r"validation_loss is nan; such a model is not registered; train it again"
    ) as caught:
        register.run(config)
    assert caught.value.exit_status == 2 and not (tmp_path / "mlflow.db").exists()
