"""A registered version is rendered for KServe: by its schema, and with an address where the real files lie."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from minitron.cli.app import app
from minitron.config.parse import parse
from minitron.registry import serving
from minitron.registry.promotion import promote, rollback
from minitron.stages import distill, register
from minitron.storage.hashing import content_hash
from minitron.storage.layout import EVALUATION, LINEAGE, REPORT, read_record
from minitron.tracking.client import connect
from tests.constants import REPOSITORY, SEQUENCE
from tests.registry.promotions import make_evaluation, register_versions
from tests.servers.gcs import World
from tests.servers.http_server import State, http_server
from tests.servers.mlflow_server import register_version
from tests.servers.processes import wait_until

SCHEMA = yaml.safe_load((Path(__file__).parent / "inference_service.yaml").read_text())
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
"""IsvcNameFmt of pkg/apis/serving/v1beta1/inference_service_validation.go."""
PARAMETERS = 213568


def render(uri: str, address: str, *options: str) -> dict[str, Any]:
    """Run the command, and check the manifest as KServe does."""
    done = CliRunner().invoke(app, ["serve-manifest", address, "--tracking-uri", uri, *options])
    assert done.exit_code == 0, done.stderr
    manifest = yaml.safe_load(done.stdout)
    jsonschema.validate(manifest, SCHEMA)
    assert NAME.fullmatch(manifest["metadata"]["name"])
    return manifest


def read_storage(manifest: dict[str, Any]) -> str:
    return manifest["spec"]["predictor"]["model"]["storageUri"]


def fail(uri: str, address: str) -> str:
    """Return the one line of a command that fails."""
    done = CliRunner().invoke(app, ["serve-manifest", address, "--tracking-uri", uri])
    assert done.exit_code and not done.stdout
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture
def make(tmp_path: Path, teacher: Path, dataset: Path) -> Callable[..., Path]:
    """Return a function that distils a student into a workspace, registers it, and returns its directory."""

    def register_student(uri: str, workspace: str | None, number: int = 1) -> Path:
        student, evaluation = tmp_path / f"student-{number}", tmp_path / f"evaluation-{number}"
        values = {"output": student, "dataset": dataset, "teacher": teacher, "student": teacher, "max_steps": number}
        values |= {"sequence_length": SEQUENCE, "micro_batch_size": 2, "global_batch_size": 2}
        distill.run(parse("distill", values | {"validation_sequences": 2, "workspace": workspace}))
        evaluation.mkdir()
        content = make_evaluation(1.5)
        for model in ("student", "teacher"):
            content[model]["parameters"] = PARAMETERS
        (evaluation / EVALUATION).write_text(json.dumps(content))
        (evaluation / REPORT).write_text("<p>report</p>")
        licenses = {"data": "none", "teacher": {"license": "unknown"}}
        origin = {"stages": {"distill": read_record(student)}, "licences": licenses}
        (evaluation / LINEAGE).write_text(json.dumps(origin))
        values = {"output": tmp_path / f"out-{number}", "student": student, "dataset": dataset}
        names = {"name": tmp_path.name, "experiment": tmp_path.name, "pipeline_run_id": f"{tmp_path.name}-{number}"}
        register.run(parse("register", values | names | {"evaluation": evaluation, "tracking_uri": uri}))  # type: ignore[arg-type]
        return student

    return register_student


def assert_is_in_bucket(world: World, address: str, student: Path) -> None:
    """The objects below an address are the student's: what _download_gcs of kserve_storage.py fetches."""
    prefix = f"{address.removeprefix('gs://bucket/')}/"
    found = set(world.names(prefix))
    for path in student.rglob("*"):
        if path.is_file() and path.name not in ("reference.json", "stage.json"):
            name = f"{prefix}{path.relative_to(student)}"
            assert name in found
            assert world.storage.get_file("bucket", name) == path.read_bytes()


def test_mlflow_in_a_bucket_is_served_from_there_and_a_new_champion_is_another_manifest(
    mlflow_server: str, make: Callable[..., Path], world: World, tmp_path: Path
) -> None:
    connect(mlflow_server).create_experiment(tmp_path.name, artifact_location="gs://bucket/mlflow")
    champion, manifests, students = f"models:/{tmp_path.name}@champion", [], []
    for number in (1, 2):
        students.append(make(mlflow_server, None, number))
        promote(mlflow_server, tmp_path.name, number)
        manifests.append(render(mlflow_server, champion))
        assert read_storage(manifests[-1]).startswith("gs://bucket/mlflow/models/m-")
        assert_is_in_bucket(world, read_storage(manifests[-1]), students[-1])
    first, second = manifests
    assert first["metadata"]["name"] == second["metadata"]["name"] and first != second
    assert second["metadata"]["labels"]["app.kubernetes.io/version"] == "2"
    annotations = {
        "minitron.io/model": f"models:/{tmp_path.name}/2",
        "minitron.io/student-sha256": content_hash(students[1]),
    }
    assert second["metadata"]["annotations"] == annotations
    rollback(mlflow_server, tmp_path.name)
    assert render(mlflow_server, champion) == first, "the same version is the same manifest"


def test_behind_mlflows_proxy_it_is_served_from_the_workspaces_claim(
    mlflow_server: str, make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = tmp_path / "workspace"
    student = make(mlflow_server, str(mount / "team"))
    message = rf"neither MLflow's files at mlflow-artifacts:/.* nor its result \({mount}/team/distill/.*\); run the"
    assert re.search(message, fail(mlflow_server, f"models:/{tmp_path.name}/1")), "this is no claim"
    monkeypatch.setattr(serving, "default_argument", {"workspace": str(mount)}.get)  # the claim is mounted there
    manifest = render(mlflow_server, f"models:/{tmp_path.name}@challenger")
    scheme, _, path = read_storage(manifest).partition("://minitron-workspace/")
    assert scheme == "pvc" and content_hash(mount / path) == content_hash(student)
    other = read_storage(render(mlflow_server, f"models:/{tmp_path.name}/1", "--claim", "mine"))
    assert other == f"pvc://mine/{path}"


def test_behind_mlflows_proxy_it_is_served_from_the_workspace_in_a_bucket(
    mlflow_server: str, make: Callable[..., Path], world: World, tmp_path: Path
) -> None:
    make(mlflow_server, "gs://bucket/workspace")
    address = f"models:/{tmp_path.name}/1"
    storage = read_storage(render(mlflow_server, address))
    assert storage.startswith("gs://bucket/workspace/distill/")
    (result,) = (tmp_path / "cache/results").iterdir()
    assert_is_in_bucket(world, storage, result)
    for name in world.names("workspace/distill/"):
        world.storage.delete_file("bucket", name)
    assert "the result is gone; run the pipeline again, and register its student" in fail(mlflow_server, address)


def test_what_cannot_be_served_is_one_line(mlflow_server: str, make: Callable[..., Path], tmp_path: Path) -> None:
    make(mlflow_server, None)
    assert "nor its result (no workspace); run the pipeline with a workspace in /workspace or a bucket" in fail(
        mlflow_server, f"models:/{tmp_path.name}/1"
    )
    line = fail(mlflow_server, f"models:/{tmp_path.name}@champion")
    name = tmp_path.name
    assert line.endswith(f"model {name} has no alias champion, only: challenger; minitron promote {name} makes one")
    assert "no model none is registered at http://127" in fail(mlflow_server, "models:/none@champion")
    register_version(mlflow_server, tmp_path.name, None, {"made_by": "hand"})
    assert "/2: no tags parameters and minitron.student_sha256; give a version that register made" in fail(
        mlflow_server, f"models:/{tmp_path.name}/2"
    )


@pytest.mark.parametrize(
    ("parameters", "gpus", "memory"), [(135e6, 1, "9Gi"), (4.5e9, 1, "17Gi"), (24e9, 1, "53Gi"), (70e9, 4, "139Gi")]
)
def test_the_resources_are_sums_of_the_models_size(parameters: float, gpus: int, memory: str) -> None:
    model = serving._make_predictor("gs://b/m", int(parameters))["model"]
    assert model["resources"]["limits"] == {"cpu": str(4 * gpus), "memory": memory, "nvidia.com/gpu": str(gpus)}
    assert model.get("args") == ([f"--tensor-parallel-size={gpus}"] if gpus > 1 else None)


@pytest.mark.parametrize("name", ["llama-3.1-minitron_4B", "3b", "Ärger!", "x" * 90, "-a-"])
def test_every_model_gets_a_name_that_kserve_takes(name: str) -> None:
    assert NAME.fullmatch(serving._make_name(name)) and len(serving._make_name(name)) <= 50


@pytest.mark.parametrize("fault", [("spec", "replicas", 1), ("spec", "predictor", [])])
def test_what_kserve_does_not_know_is_found(fault: tuple[str, str, Any]) -> None:
    manifest = {"spec": {"predictor": serving._make_predictor("gs://b/m", 1)}}
    jsonschema.validate(manifest, SCHEMA)
    section, key, value = fault
    manifest[section][key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)


class Receiver(State):
    """What MLflow's webhook calls."""

    def __init__(self) -> None:
        super().__init__()
        self.payloads: list[dict[str, Any]] = []

    def answer(self, method: str, path: str, query: dict[str, str], data: bytes, headers: Any) -> Any:
        self.payloads.append(json.loads(data))
        return {}


def test_the_webhook_of_the_guide_tells_of_a_new_champion(mlflow_server: str, tmp_path: Path) -> None:
    """The guide's block makes it, a promotion calls it."""
    guide = (REPOSITORY / "docs/how-to/deploy.md").read_text()
    (block,) = (text for text in re.findall(r"^```python\n(.*?)^```$", guide, re.M | re.S) if "create_webhook" in text)
    with http_server(Receiver()) as receiver:
        block = block.replace("http://localhost:5000", mlflow_server)
        exec(block.replace("https://ci.example.com/redeploy", receiver.url), {})
        client = connect(mlflow_server)
        try:
            register_versions(mlflow_server, tmp_path.name, make_evaluation(1.5))
            promote(mlflow_server, tmp_path.name)
            called = wait_until(lambda: [call for call in receiver.payloads if call["data"]["alias"] == "champion"], 20)
        finally:
            for webhook in client.list_webhooks():
                client.delete_webhook(webhook.webhook_id)
    assert called[0]["entity"] == "model_version_alias" and called[0]["action"] == "created"
    assert called[0]["data"] == {"name": tmp_path.name, "alias": "champion", "version": "1"}
