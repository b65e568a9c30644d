"""`minitron doctor` on clusters that have everything, little, and nothing."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from minitron.cli import doctor
from minitron.cli.app import app
from minitron.config.pipelines import TRAINER
from tests.constants import REPOSITORY
from tests.servers.gcs import World
from tests.servers.http_server import Page, free_port, http_server
from tests.servers.kubeflow_server import kubeflow_server
from tests.servers.kubernetes_server import KubernetesServer, kubernetes_server


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    with kubernetes_server(tmp_path, monkeypatch) as state:
        for name in ("KF_PIPELINES_ENDPOINT", "MINITRON_NAMESPACE", "MINITRON_TOKEN", "MLFLOW_TRACKING_URI"):
            monkeypatch.delenv(name, raising=False)
        state.add("namespaces", "team", status={"phase": "Active"})
        state.add("nodes", "cpu", status={"allocatable": {"cpu": "8"}})
        images = [{"names": [f"docker.io/{TRAINER}@sha256:1", f"docker.io/{TRAINER}"], "sizeBytes": 1}]
        state.add("nodes", "gpu", status={"allocatable": {"cpu": "96", "nvidia.com/gpu": "8"}, "images": images})
        claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Ti"}}}
        state.add("persistentvolumeclaims", "minitron-workspace", spec=claim, status={"phase": "Bound"})
        state.add("secrets", "minitron", data={"HF_TOKEN": "eA=="})
        state.add("clustertrainingruntimes", "torch-distributed")
        patch = yaml.safe_load((REPOSITORY / "manifests/kubeflow/workflow-defaults.yaml").read_text())
        state.add("configmaps", patch["metadata"]["name"], data=patch["data"])
        yield state


def run_doctor(*arguments: str) -> tuple[int, dict[str, str]]:
    """Return the exit status, and the lines of the table by their check."""
    done = CliRunner().invoke(app, ["doctor", "--namespace", "team", *arguments])
    lines = [line for line in done.stdout.splitlines() if line[:1] in "✓✗–" and line.strip()]
    return done.exit_code, {line[1:].strip().split("  ")[0]: line for line in lines}


def test_a_cluster_that_has_everything(cluster: KubernetesServer, mlflow_server: str) -> None:
    with kubeflow_server() as kubeflow:
        status, lines = run_doctor("--host", kubeflow.url, "--tracking-uri", mlflow_server)
    assert status == 0 and all(line.startswith("✓") for line in lines.values())
    assert "version 2.15.0, one user" in lines["Kubeflow Pipelines"]
    assert "8 allocatable on 1 of 2 nodes" in lines["GPUs"]
    assert "Bound, ReadWriteMany, 1Ti" in lines["claim minitron-workspace"]
    assert "HF_TOKEN" in lines["secret minitron"] and "eA==" not in str(lines)
    assert lines.keys() == {
        "Kubeflow Pipelines", "namespace team", "GPUs", "images", "claim minitron-workspace",
        "secret minitron", "retries", "training runtime torch-distributed", "MLflow",
    }  # fmt: skip


def test_an_old_server_is_refused_and_one_without_a_version_is_noted(cluster: KubernetesServer) -> None:
    with kubeflow_server(version="2.14.3") as kubeflow:
        status, lines = run_doctor("--host", kubeflow.url)
    assert status == 1 and lines["Kubeflow Pipelines"].startswith("✗")
    assert "2.14.3, but minitron needs 2.15.0 or newer" in lines["Kubeflow Pipelines"]
    for version in ("unknown", "master", "4244448d8f"):
        with kubeflow_server(version=version) as kubeflow:
            status, lines = run_doctor("--host", kubeflow.url)
        assert status == 0 and lines["Kubeflow Pipelines"].startswith("✓")
        assert f"version {version}, one user; it names no release: it must have" in lines["Kubeflow Pipelines"]


def test_what_is_missing_has_a_remedy(cluster: KubernetesServer) -> None:
    for kind in ("namespaces", "persistentvolumeclaims", "secrets", "clustertrainingruntimes", "configmaps"):
        cluster.objects[kind].clear()
    del cluster.objects["nodes"]["gpu"]
    status, lines = run_doctor("--host", f"http://127.0.0.1:{free_port()}")
    assert status == 1
    marks = {check: line[0] for check, line in lines.items()}
    assert marks == {
        "Kubeflow Pipelines": "✗", "namespace team": "✗", "claim minitron-workspace": "✗", "retries": "–",
        "images": "✗",
        "GPUs": "–", "secret minitron": "–", "training runtime torch-distributed": "–",
    }  # fmt: skip
    assert (
        "no answer (Connection refused)" in lines["Kubeflow Pipelines"]
        and "check --host" in lines["Kubeflow Pipelines"]
    )
    assert "missing" in lines["claim minitron-workspace"] and "kubectl apply -k" in lines["claim minitron-workspace"]
    assert "install Kubeflow Trainer 2.3" in lines["training runtime torch-distributed"]


def test_images_in_a_registry_are_named_by_it(cluster: KubernetesServer, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for registry in ("", "registry.example/llm/"):
        monkeypatch.setenv("MINITRON_REGISTRY", registry)
        with kubeflow_server() as kubeflow:
            found.append(run_doctor("--host", kubeflow.url)[1]["images"])
    assert f"{TRAINER} is loaded on 1 of 2 nodes" in found[0] and "from registry.example/llm" in found[1]


ARGO_3_7_3 = None
"""Kubeflow 2.15.0 and 2.16.1 set no defaults: manifests/kustomize/third-party/argo/base/ there."""
KUBEFLOW_2_17_0 = "{spec: {templateDefaults: {retryStrategy: {limit: '2', retryPolicy: OnError}}}}"
"""manifests/kustomize/third-party/argo/base/workflow-controller-configmap-patch.yaml of 2.17.0, its retries."""


@pytest.mark.parametrize(
    ("defaults", "found"),
    [
        (ARGO_3_7_3, "policy OnFailure: a task whose pod is deleted"),
        (KUBEFLOW_2_17_0, "policy OnError: a task that fails"),
        (KUBEFLOW_2_17_0.replace("OnError", "Always"), "limit 2 for every step, so the attempts at a task multiply"),
        ("{spec: {templateDefaults: {retryStrategy: {retryPolicy: Always}}}}", "limit none for every step"),
    ],
)
def test_attempts_that_argo_would_not_make_have_a_patch(
    cluster: KubernetesServer, defaults: str | None, found: str
) -> None:
    cluster.objects["configmaps"]["workflow-controller-configmap"]["data"] = {"workflowDefaults": defaults}
    with kubeflow_server() as kubeflow:
        status, lines = run_doctor("--host", kubeflow.url)
    assert status == 1 and lines["retries"].startswith("✗") and found in lines["retries"]
    assert "manifests/kubeflow/workflow-defaults.yaml" in lines["retries"]


def test_what_one_may_not_see_is_no_failure(cluster: KubernetesServer) -> None:
    cluster.forbidden |= {"nodes", "secrets", "clustertrainingruntimes"}
    with kubeflow_server() as kubeflow:
        status, lines = run_doctor("--host", kubeflow.url)
    assert status == 0 and "not visible to you" in lines["GPUs"] and lines["GPUs"].startswith("–")


def test_a_lost_volume_and_a_cluster_that_is_away(cluster: KubernetesServer, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.objects["persistentvolumeclaims"]["minitron-workspace"]["status"] = {"phase": "Lost"}
    with kubeflow_server() as kubeflow:
        assert "✗" in run_doctor("--host", kubeflow.url)[1]["claim minitron-workspace"]
        monkeypatch.setenv("KUBECONFIG", "/nowhere")
        status, lines = run_doctor("--host", kubeflow.url)
    assert status == 0 and "no access" in lines["Kubernetes"] and lines.keys() == {"Kubeflow Pipelines", "Kubernetes"}


@pytest.mark.parametrize(
    ("status", "text", "remedy"), [(200, "<html>", "check tracking_uri"), (403, "no", "start it with --allowed-hosts")]
)
def test_what_is_no_mlflow(cluster: KubernetesServer, status: int, text: str, remedy: str) -> None:
    with http_server(Page(status, text)) as page, kubeflow_server() as kubeflow:
        code, lines = run_doctor("--host", kubeflow.url, "--tracking-uri", page.url)
    assert code == 1 and remedy in lines["MLflow"] and str(status) in lines["MLflow"]


def test_an_mlflow_that_is_away(cluster: KubernetesServer) -> None:
    uri = f"127.0.0.1:{free_port()}"
    with kubeflow_server() as kubeflow:
        status, lines = run_doctor("--host", kubeflow.url, "--tracking-uri", f"http://user:secret@{uri}")
    assert status == 1 and f"http://{uri}: ConnectionError" in lines["MLflow"] and "secret" not in lines["MLflow"]


def test_apis_that_never_answer_take_seconds(
    cluster: KubernetesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They accept a connection and say nothing, as a host behind a firewall does."""
    monkeypatch.setattr(doctor, "SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = yaml.safe_load((tmp_path / "kubeconfig").read_text())
        settings["clusters"][0]["cluster"]["server"] = address
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(settings))
        started = time.monotonic()
        with kubeflow_server() as kubeflow:
            status, lines = run_doctor("--host", kubeflow.url, "--tracking-uri", address)
    assert status == 1 and time.monotonic() - started < 10
    assert lines.keys() == {"Kubeflow Pipelines", "Kubernetes", "MLflow"}
    assert "no answer (ReadTimeoutError)" in lines["Kubernetes"] and "ReadTimeout" in lines["MLflow"]


def test_a_bucket_is_written_to(cluster: KubernetesServer, world: World) -> None:
    with kubeflow_server() as kubeflow:
        status, lines = run_doctor("--host", kubeflow.url, "--bucket", "gs://bucket/results")
        assert status == 0 and "gs://bucket/results: writable" in lines["bucket"] and not world.names()
        world.fault = lambda request: 403 if request.uploaded or request.method == "POST" else None
        status, lines = run_doctor("--host", kubeflow.url, "--bucket", "gs://bucket/results")
    assert status == 1 and "give this account the role Storage Object User" in lines["bucket"]
