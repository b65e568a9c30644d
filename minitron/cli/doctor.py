"""Check a cluster before you pay for a run: requirement, finding, remedy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import requests
import yaml

from minitron.cluster import kubernetes_api
from minitron.cluster.pipelines_api import Kubeflow
from minitron.config.pipelines import REGISTRY_VARIABLE, default_argument, names_registry
from minitron.engines import trainjob
from minitron.errors import MinitronError, without_password
from minitron.storage import bucket

KUBEFLOW, ARGO_SETTINGS = "kubeflow", "workflow-controller-configmap"
"""Namespace of Kubeflow Pipelines, and the settings of its Argo in that namespace."""

SECONDS = 10
"""Time limit for an answer of an API or a server."""

ELSEWHERE = "run minitron doctor where kubectl works to check the rest"

UNTRIED = {
    "OnFailure": "a task whose pod is deleted, for example with its node, is not tried again",
    "OnError": "a task that fails (crash, out of memory, eviction) is not tried again",
    "OnTransientError": "only a task with a transient error is tried again",
}
"""The cases that Argo's retry policies ignore, except for Always."""


class Check(NamedTuple):
    """One line of the table; `ok` is None if something optional is missing or not visible."""

    ok: bool | None
    name: str
    found: str
    remedy: str = ""

    @property
    def mark(self) -> str:
        """The mark in front of the line."""
        return {True: "✓", False: "✗", None: "–"}[self.ok]


def run_checks(
    connect: Callable[[], Kubeflow], namespace: str, tracking_uri: str | None, address: str | None
) -> list[Check]:
    """Run all checks and return their results.

    Args:
        connect: connects to Kubeflow Pipelines.
        namespace: namespace of the tasks.
        tracking_uri: MLflow server to check, if any.
        address: gs://bucket/path to check, if any.
    """
    checks = [_check_pipelines(connect)]
    try:
        core = kubernetes_api.core_api(kubernetes_api.ONE_RETRY, SECONDS)
    except MinitronError as error:
        checks.append(Check(None, "Kubernetes", str(error), ELSEWHERE))
    else:
        checks += _check_kubernetes(core, namespace)
    if tracking_uri:
        checks.append(_check_mlflow(tracking_uri))
    if address:
        checks.append(_check_bucket(address))
    return checks


def _check_pipelines(connect: Callable[[], Kubeflow]) -> Check:
    try:
        kubeflow = connect()
        kubeflow.check_version()
    except MinitronError as error:
        fault, _, remedy = str(error).partition("; ")
        return Check(False, "Kubeflow Pipelines", fault, remedy)
    users = "several users" if kubeflow.multi_user else "one user"
    if not kubeflow.release:
        users += "; it names no release: it must have what 2.15.0 has"
    return Check(True, "Kubeflow Pipelines", f"version {kubeflow.version}, {users}")


def _check_kubernetes(core: Any, namespace: str) -> list[Check]:
    """Check the objects in the cluster; if the API does not answer the first question, ask no other."""
    first = _check_namespace(core, namespace)
    if first.found.startswith(kubernetes_api.NO_ANSWER):
        return [Check(False, "Kubernetes", first.found, f"check that its API is running, or {ELSEWHERE}")]
    others = [check(core, namespace) for check in (_check_gpus, _check_images, _check_claim, _check_secret)]
    return [first, *others, _check_retries(core), _check_runtime()]


def _check_namespace(core: Any, namespace: str) -> Check:
    name = f"namespace {namespace}"
    answer, problem = kubernetes_api.try_get(lambda: core.read_namespace(namespace))
    if answer:
        return Check(True, name, answer.status.phase or "there")
    return _explain_missing(name, problem, "kubectl apply -k manifests/overlays/gke, or give --namespace")


def _check_gpus(core: Any, namespace: str) -> Check:
    nodes, problem = kubernetes_api.try_get(lambda: core.list_node().items)
    if nodes is None:
        return _explain_missing("GPUs", problem, "")
    counts = [int((node.status.allocatable or {}).get(trainjob.GPU, 0)) for node in nodes]
    with_gpus = [count for count in counts if count]
    if with_gpus:
        return Check(True, "GPUs", f"{sum(counts)} allocatable on {len(with_gpus)} of {len(counts)} nodes")
    return Check(
        None, "GPUs", f"none on {len(counts)} nodes",
        "fine if the node pool starts nodes on demand; otherwise add GPU nodes with NVIDIA's device plugin",
    )  # fmt: skip


def _check_images(core: Any, namespace: str) -> Check:
    """Check that nodes can get the trainer's image; a registry is not asked: nodes have an account of their own."""
    image = default_argument("trainer_image")
    if names_registry(image):
        return Check(True, "images", f"from {image.rpartition('/')[0]}")
    nodes, problem = kubernetes_api.try_get(lambda: core.list_node().items)
    if nodes is None:
        return _explain_missing("images", problem, "")
    named = [[name for entry in node.status.images or () for name in entry.names or ()] for node in nodes]
    loaded = sum(any(name.removeprefix("docker.io/") == image for name in names) for names in named)
    if loaded:
        return Check(True, "images", f"{image} is loaded on {loaded} of {len(nodes)} nodes")
    return Check(
        False, "images", f"{image} names no registry, and no node has it loaded",
        f"push it and set {REGISTRY_VARIABLE}; on kind: kind load docker-image",
    )  # fmt: skip


def _check_claim(core: Any, namespace: str) -> Check:
    default = default_argument("workspace_claim")
    name = f"claim {default}"
    claim, problem = kubernetes_api.try_get(lambda: core.read_namespaced_persistent_volume_claim(default, namespace))
    if claim is None:
        return _explain_missing(name, problem, "kubectl apply -k manifests/overlays/gke, or set workspace_claim")
    state = f"{claim.status.phase}, {', '.join(claim.spec.access_modes)}, {claim.spec.resources.requests['storage']}"
    if claim.status.phase == "Lost":
        return Check(False, name, state, "its volume is gone; delete the claim and apply the manifests again")
    return Check(True, name, state)


def _check_secret(core: Any, namespace: str) -> Check:
    default = default_argument("credentials_secret")
    name = f"secret {default}"
    secret, problem = kubernetes_api.try_get(lambda: core.read_namespaced_secret(default, namespace))
    if secret is None:
        check = _explain_missing(name, problem, "only needed for gated models (HF_TOKEN) and an MLflow with a password")
        return check._replace(ok=None)
    return Check(True, name, ", ".join(sorted(secret.data or {})) or "empty")


def _check_retries(core: Any) -> Check:
    """Check when Argo tries a task again; a pipeline only sets how often."""
    name = "retries"
    settings, problem = kubernetes_api.try_get(lambda: core.read_namespaced_config_map(ARGO_SETTINGS, KUBEFLOW))
    if settings is None:
        check = _explain_missing(name, problem, f"find the settings of Argo, which are not in namespace {KUBEFLOW}")
        return check._replace(ok=None)
    strategy = _read_retry_strategy((settings.data or {}).get("workflowDefaults"))
    policy, limit = strategy.get("retryPolicy") or "OnFailure", strategy.get("limit")
    if policy != "Always":
        found = f"policy {policy}: {UNTRIED.get(policy, 'not one of Argo')}"
    elif str(limit) != "0":
        found = f"limit {'none' if limit is None else limit} for every step, so the attempts at a task multiply"
    else:
        return Check(True, name, "after failures and after deletions")
    return Check(
        False,
        name,
        found,
        "patch Argo's settings with manifests/kubeflow/workflow-defaults.yaml (docs/how-to/deploy.md)",
    )


def _read_retry_strategy(defaults: str | None) -> dict[str, Any]:
    """Return the retry strategy that Argo merges into every template."""
    value = yaml.safe_load(defaults or "")
    for key in ("spec", "templateDefaults", "retryStrategy"):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _check_runtime() -> Check:
    name = f"training runtime {trainjob.RUNTIME}"
    runtime, problem = kubernetes_api.try_get(trainjob.get_runtime)
    if runtime:
        return Check(True, name, "there")
    check = _explain_missing(name, problem, "only needed for num_nodes above 1: install Kubeflow Trainer 2.3")
    return check._replace(ok=None)


def _check_mlflow(uri: str) -> Check:
    shown = without_password(uri)
    try:
        answer = requests.get(f"{uri.rstrip('/')}/health", timeout=SECONDS)
    except requests.RequestException as error:
        return Check(
            False, "MLflow", f"{shown}: {type(error).__name__}", "check tracking_uri, and that the server is running"
        )
    if answer.ok and answer.text == "OK":
        return Check(True, "MLflow", shown)
    remedy = "start it with --allowed-hosts, or log in" if answer.status_code == 403 else "check tracking_uri"
    return Check(False, "MLflow", f"{shown}: {answer.status_code} {answer.reason}", remedy)


def _check_bucket(address: str) -> Check:
    try:
        bucket.check_writable(address)
    except MinitronError as error:
        fault, _, remedy = str(error).partition("; ")
        return Check(False, "bucket", fault, remedy)
    return Check(True, "bucket", f"{address}: writable")


def _explain_missing(name: str, problem: str, remedy: str) -> Check:
    """Return the check of an object that is missing, or that you may not see."""
    if problem == "forbidden":
        return Check(None, name, "not visible to you", "ask an administrator")
    return Check(False, name, problem, remedy)
