"""manifests/: each overlay renders, every object is valid and keeps the rules, and MLflow starts as it says.

The rendered objects are left in build/manifests/.
"""

import copy
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import requests
import typer
import yaml
from kubernetes.utils import parse_quantity

from minitron.cli.app import app
from minitron.config.settings import ClusterConfig
from tests.constants import REPOSITORY
from tests.servers.deploy_guide import created_secrets
from tests.servers.manifest_policy import (
    Manifest,
    find_faults,
    find_references,
    find_unresolved,
    list_containers,
    pod_spec,
)

RENDERED = REPOSITORY / "build/manifests"
OVERLAYS = ("kind", "gke")
KUBERNETES = "1.32"
WITHOUT_SCHEMA: set[str] = set()
"""Kinds of custom resources that are deployed: none. One would need its schema checked here."""


@functools.cache
def render_overlay(overlay: str) -> str:
    kubectl = shutil.which("kubectl")
    assert kubectl, "kubectl is missing: install it (Debian: apt-get install kubectl), the manifests are rendered by it"
    command = [kubectl, "kustomize", str(REPOSITORY / "manifests/overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    RENDERED.mkdir(parents=True, exist_ok=True)
    (RENDERED / f"{overlay}.yaml").write_text(done.stdout)
    return done.stdout


def list_objects(overlay: str) -> list[Manifest]:
    return list(yaml.safe_load_all(render_overlay(overlay)))


def find_object(overlay: str, kind: str, name: str) -> Manifest:
    return next(o for o in list_objects(overlay) if (o["kind"], o["metadata"]["name"]) == (kind, name))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_fits_the_schema_of_its_kind(overlay: str) -> None:
    for manifest in list_objects(overlay):
        assert manifest["kind"] not in WITHOUT_SCHEMA
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_the_patch_of_argo_tries_a_task_again_whatever_ended_it() -> None:
    """As often as its pipeline says: Argo 3.7.3 and 4.0.5 merge this below a template's own retry strategy.

    workflow/controller/operator.go: mergedTemplateDefaultsInto, processNodeRetries.
    """
    patch = yaml.safe_load((REPOSITORY / "manifests/kubeflow/workflow-defaults.yaml").read_text())
    kubernetes_validate.validate(patch, KUBERNETES, strict=True)
    assert patch["data"].keys() == {"workflowDefaults"}
    defaults = yaml.safe_load(patch["data"]["workflowDefaults"])["spec"]
    assert defaults["templateDefaults"] == {"retryStrategy": {"limit": "0", "retryPolicy": "Always"}}
    week = ClusterConfig().ttl_hours * 3600
    assert defaults["ttlStrategy"] == dict.fromkeys(
        ("secondsAfterCompletion", "secondsAfterSuccess", "secondsAfterFailure"), week
    )


def test_the_clean_up_keeps_the_rules_and_is_what_minitron_takes() -> None:
    """With the image that the guide puts in."""
    text = (REPOSITORY / "manifests/cleanup/cronjob.yaml").read_text()
    manifest = yaml.safe_load(text.replace("IMAGE", "registry.example/minitron/tools:1.0"))
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    assert find_faults(manifest) == []
    assert find_unresolved([*list_objects("gke"), manifest], created_secrets()) == set()
    (container,) = list_containers(manifest)
    program, name, *arguments = container["command"] + container["args"]
    assert program == "minitron"
    context = typer.main.get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
    assert context.params["delete"] and context.params["place"] == "/workspace"
    labels = manifest["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
    (rule,) = find_object("gke", "NetworkPolicy", "mlflow")["spec"]["ingress"]
    assert {"podSelector": {"matchLabels": labels}} in rule["from"]


def test_an_unknown_field_is_found() -> None:
    broken = find_object("kind", "Deployment", "mlflow")
    broken["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_keeps_the_rules(overlay: str) -> None:
    assert [fault for manifest in list_objects(overlay) for fault in find_faults(manifest)] == []


BREACHES = [
    ("no_root", "spec.template.spec.securityContext.runAsNonRoot", False),
    ("no_root", "spec.template.spec.securityContext.runAsUser", 0),
    ("no_root", "spec.template.spec.containers.0.securityContext.runAsUser", 0),
    ("no_escalation", "spec.template.spec.containers.0.securityContext.allowPrivilegeEscalation", True),
    ("no_escalation", "spec.template.spec.containers.0.securityContext.privileged", True),
    ("no_escalation", "spec.template.spec.containers.0.securityContext.capabilities", {"drop": ["NET_RAW"]}),
    ("no_escalation", "spec.template.spec.containers.0.securityContext.readOnlyRootFilesystem", False),
    ("no_escalation", "spec.template.spec.securityContext.seccompProfile.type", "Unconfined"),
    ("no_way_to_the_node", "spec.template.spec.hostNetwork", True),
    ("no_way_to_the_node", "spec.template.spec.volumes.0", {"name": "node", "hostPath": {"path": "/"}}),
    ("pinned_image", "spec.template.spec.containers.0.image", "mlflow"),
    ("pinned_image", "spec.template.spec.containers.0.image", "mlflow:latest"),
    ("pinned_image", "spec.template.spec.containers.0.image", "registry.example:5000/mlflow"),
    ("requests_and_limits", "spec.template.spec.containers.0.resources", {"requests": {"cpu": 1, "memory": "1Gi"}}),
    ("requests_and_limits", "spec.template.spec.containers.0.resources.limits", {"memory": "1Gi"}),
    ("probes", "spec.template.spec.containers.0", {"name": "bare", "image": "a:1", "readinessProbe": {}}),
    ("no_token_without_need", "spec.template.spec.automountServiceAccountToken", True),
    ("no_secret_data", "spec.template.spec.containers.0.env.0", {"name": "PGPASSWORD", "value": "hunter2"}),
    ("no_secret_data", "spec.template.spec.containers.0.env.0", {"name": "A", "value": "postgresql://u:p@h/d"}),
    ("no_secret_data", "kind", "Secret"),
    ("our_namespace", "metadata.namespace", "default"),
    ("our_namespace", "kind", "ClusterRoleBinding"),
]  # fmt: skip
ROLE_BREACHES = [
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["*"]},
    {"apiGroups": ["*"], "resources": ["pods"], "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["a"], "verbs": ["get", "list"]},
]


def change_value(manifest: Any, path: str, value: Any) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        manifest = manifest[part]
    manifest[last] = value


@pytest.mark.parametrize(("rule", "path", "value"), BREACHES)
def test_each_rule_finds_what_breaks_it(rule: str, path: str, value: Any) -> None:
    broken = copy.deepcopy(find_object("kind", "Deployment", "mlflow"))
    change_value(broken, path, value)
    assert rule in {fault.split(": ")[1] for fault in find_faults(broken)}


@pytest.mark.parametrize("rule", ROLE_BREACHES)
def test_a_role_that_may_too_much_is_found(rule: dict[str, list[str]]) -> None:
    role = find_object("kind", "Role", "minitron") | {"rules": [rule]}
    assert [fault.split(": ")[1] for fault in find_faults(role)] == ["no_wildcards"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_that_is_named_is_there(overlay: str) -> None:
    assert find_unresolved(list_objects(overlay), created_secrets()) == set()


def test_a_name_that_leads_nowhere_is_found() -> None:
    named = set().union(*map(find_references, list_objects("kind")))
    assert {kind for kind, _ in named} == {"ServiceAccount", "PersistentVolumeClaim", "Secret", "Role"}
    assert find_unresolved([o for o in list_objects("kind") if not find_references(o)][:1], set()) == set()
    assert find_unresolved([find_object("kind", "Deployment", "mlflow")], set()) == {
        ("ServiceAccount", "mlflow"),
        ("PersistentVolumeClaim", "mlflow-artifacts"),
        ("Secret", "minitron-postgres/password"),
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_network_policies_and_services_select_pods_that_exist(overlay: str) -> None:
    labels = [o["spec"]["template"]["metadata"]["labels"] for o in list_objects(overlay) if pod_spec(o)]
    selectors = [o["spec"]["selector"] for o in list_objects(overlay) if o["kind"] == "Service"]
    selectors += [
        find_object(overlay, "NetworkPolicy", name)["spec"]["podSelector"]["matchLabels"]
        for name in ("mlflow", "postgres")
    ]
    assert all(any(selector.items() <= of_pod.items() for of_pod in labels) for selector in selectors)
    assert find_object(overlay, "NetworkPolicy", "nothing-gets-in")["spec"] == {
        "podSelector": {},
        "policyTypes": ["Ingress"],
    }


def sum_resources(overlay: str, table: str, resource: str) -> Decimal:
    """Sum what all containers of an overlay ask for, each with one pod."""
    each = [c["resources"][table][resource] for o in list_objects(overlay) for c in list_containers(o)]
    return sum(map(parse_quantity, each), Decimal(0))


def list_claims(overlay: str) -> list[Manifest]:
    templates = [o["spec"].get("volumeClaimTemplates", []) for o in list_objects(overlay) if o["kind"] == "StatefulSet"]
    return [o for o in list_objects(overlay) if o["kind"] == "PersistentVolumeClaim"] + list(chain(*templates))


@pytest.mark.parametrize(("overlay", "cpu", "memory", "gpus"), [("kind", 2, "8Gi", 0), ("gke", 96, "1200Gi", 8)])
def test_the_quota_admits_what_is_deployed_and_a_task(overlay: str, cpu: int, memory: str, gpus: int) -> None:
    hard = {
        key: parse_quantity(value)
        for key, value in find_object(overlay, "ResourceQuota", "minitron")["spec"]["hard"].items()
    }
    assert sum_resources(overlay, "requests", "cpu") + cpu <= hard["requests.cpu"]
    for table in ("requests", "limits"):
        assert sum_resources(overlay, table, "memory") + parse_quantity(memory) <= hard[f"{table}.memory"]
    assert gpus <= hard["requests.nvidia.com/gpu"] and (gpus > 0) == (hard["requests.nvidia.com/gpu"] > 0)
    asked = [parse_quantity(claim["spec"]["resources"]["requests"]["storage"]) for claim in list_claims(overlay)]
    assert sum(asked) <= hard["requests.storage"] and len(asked) <= hard["persistentvolumeclaims"]


def test_containers_without_requests_are_admitted_and_tasks_keep_their_cpu() -> None:
    """Tasks set no CPU limit: a default one would be below their request, and the API server refuses that."""
    limits = find_object("gke", "LimitRange", "minitron")["spec"]["limits"][0]
    hard = find_object("gke", "ResourceQuota", "minitron")["spec"]["hard"]
    given = {f"requests.{name}" for name in limits["defaultRequest"]} | {f"limits.{name}" for name in limits["default"]}
    assert {key for key in hard if re.fullmatch(r"(requests|limits)\.(cpu|memory)", key)} <= given
    assert "cpu" not in limits["default"] and "limits.cpu" not in hard


def test_the_settings_reach_the_objects() -> None:
    settings = REPOSITORY / "manifests/overlays/gke/settings.env"
    pairs = [line.split("=", 1) for line in settings.read_text().splitlines() if not line.startswith("#")]
    for key, value in pairs:
        assert value in render_overlay("gke"), f"{key} of settings.env is used nowhere"
    assert "minitron-pipelines/" not in render_overlay("gke"), "an image without the registry of settings.env"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow, started by the command of the deployment: only the database and the directories are others."""
    container = find_object("gke", "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"][0]
    directory = tmp_path_factory.mktemp("mlflow")
    values = {variable["name"]: variable.get("value", "") for variable in container["env"]}
    values |= {"BACKEND_STORE": f"sqlite:///{directory}/db", "ARTIFACTS": str(directory), "HOME": str(directory)}
    arguments = [re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], argument) for argument in container["args"]]
    arguments = [argument.replace("--port=5000", "--port=5117") for argument in arguments]
    command = [str(Path(sys.executable).with_name("mlflow")), "server", *arguments]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(command, env=os.environ | values | {"PATH": path}, cwd=directory)
    try:
        wait_until_healthy("http://127.0.0.1:5117", container["startupProbe"]["httpGet"]["path"], process)
        yield "http://127.0.0.1:5117"
    finally:
        process.terminate()
        process.wait(30)


def wait_until_healthy(address: str, path: str, process: subprocess.Popen[bytes]) -> None:
    """Ask as the kubelet does: its Host header is the pod's address, which no list of hosts can know."""
    for _ in range(240):
        assert process.poll() is None, "the server ended"
        try:
            if requests.get(address + path, headers={"Host": "10.4.0.7:5000"}, timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.5)
    pytest.fail("MLflow did not become healthy in two minutes")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("mlflow.minitron:5000", 200),
        ("mlflow:5000", 200),
        ("localhost:5000", 200),
        ("DOMAIN", 200),
        ("evil.example", 403),
    ],
)
def test_mlflow_answers_to_its_names_only(server: str, host: str, status: int) -> None:
    address = f"{server}/api/2.0/mlflow/experiments/search?max_results=1"
    assert requests.get(address, headers={"Host": host}, timeout=30).status_code == status


@pytest.mark.parametrize(("origin", "status"), [("https://DOMAIN", 200), ("https://evil.example", 403)])
def test_only_its_own_page_may_change_something(server: str, origin: str, status: int) -> None:
    headers = {"Host": "DOMAIN", "Origin": origin}
    address = f"{server}/api/2.0/mlflow/experiments/create"
    assert requests.post(address, json={"name": origin}, headers=headers, timeout=30).status_code == status
