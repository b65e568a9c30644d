"""The role of the tasks' account allows what the package asks of Kubernetes, and the guide's nodes take the tasks."""

import ast
import re

import pytest
import yaml

from minitron.config.resources import GIB, Models, request_cpu, sum_memory, total
from minitron.config.settings import RESOURCES, GpuResources
from minitron.config.stages import SETTINGS
from tests.constants import REPOSITORY
from tests.servers.deploy_guide import follow_guide

KINDS = {"pod": "pods", "pod_log": "pods/log", "event": "events", "custom_object": "trainjobs"}
CALL = re.compile(r"(read|get|list|create|delete|patch|replace)_namespaced_(\w+)")
VERBS = {"read": "get", "replace": "update"}


def list_calls(source: str) -> set[tuple[str, str]]:
    """Return resource and verb of every call of the Kubernetes client that reaches into a namespace."""
    names = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    calls = [match for name in names if (match := CALL.fullmatch(name))]
    return {(KINDS[match[2]], VERBS.get(match[1], match[1])) for match in calls}


def list_allowed() -> set[tuple[str, str]]:
    role = next(o for o in yaml.safe_load_all(read_runner()) if o["kind"] == "Role")
    return {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}


def read_runner() -> str:
    return (REPOSITORY / "manifests/base/runner.yaml").read_text()


def test_a_stage_on_many_nodes_may_do_what_it_does() -> None:
    wanted = list_calls((REPOSITORY / "minitron/engines/trainjob.py").read_text())
    assert {("trainjobs", "create"), ("trainjobs", "delete"), ("pods", "list"), ("pods/log", "get")} <= wanted
    assert wanted <= list_allowed()


def test_a_call_beyond_the_role_is_found() -> None:
    assert list_calls("api.delete_namespaced_pod(name, namespace)") == {("pods", "delete")}
    assert not list_calls("api.delete_namespaced_pod(name, namespace)") <= list_allowed()


def read_option(command: list[str], name: str) -> str:
    call = next(call for call in follow_guide().calls if call[: len(command)] == command)
    return call[call.index(name) + 1]


def test_the_nodes_without_gpus_take_the_tasks_without_gpus() -> None:
    """A node of N CPUs has some less to give: a task that asks for N waits for ever."""
    match = re.fullmatch(
        r"e2-standard-(\d+)", read_option(["gcloud", "container", "clusters", "create"], "--machine-type")
    )
    assert match
    for stage in ("prepare", "register"):
        assert not isinstance(RESOURCES[stage], GpuResources)
        assert int(match[1]) > int(request_cpu(stage, SETTINGS[stage]()))
        assert int(match[1]) * 4 * 0.85 > total(sum_memory(SETTINGS[stage](), Models())) / GIB


@pytest.mark.parametrize("name", ["gke-gpu"])
def test_the_gpu_nodes_are_those_of_the_preset(name: str) -> None:
    placed = yaml.safe_load((REPOSITORY / f"pipelines/presets/{name}.yaml").read_text())
    create = ["gcloud", "container", "node-pools", "create"]
    kind = placed["gpu_node_selector"]["cloud.google.com/gke-accelerator"]
    assert f"type={kind}" in read_option(create, "--accelerator").split(",")
    assert read_option(create, "--node-taints").split("=")[0] in {entry["key"] for entry in placed["gpu_tolerations"]}
