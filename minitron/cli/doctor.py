"""Check a cluster before a run is paid for: what the pipelines need, what was found, what to do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import requests

from minitron.cluster import kubernetes_api
from minitron.cluster.pipelines_api import Kubeflow
from minitron.config.pipelines import compiled_pipeline
from minitron.engines import trainjob
from minitron.errors import MinitronError
from minitron.storage import bucket


class Check(NamedTuple):
    """One line of the table; `ok` is None where something optional is missing or could not be seen."""

    ok: bool | None
    name: str
    found: str
    remedy: str = ""

    @property
    def mark(self) -> str:
        """Return the sign in front of the line."""
        return {True: "✓", False: "✗", None: "–"}[self.ok]


def examine(
    connect: Callable[[], Kubeflow], namespace: str, tracking_uri: str | None, address: str | None
) -> list[Check]:
    """Return all checks.

    Args:
        connect: connects to Kubeflow Pipelines.
        namespace: where the tasks run.
        tracking_uri: MLflow server to look at, if any.
        address: gs://bucket/path to write to, if any.
    """
    checks = [_pipelines(connect)]
    try:
        core = kubernetes_api.core_api()
    except MinitronError as error:
        checks.append(Check(None, "Kubernetes", str(error), "run it where kubectl works, to check the rest"))
    else:
        checks += [check(core, namespace) for check in (_namespace, _gpus, _claim, _secret)] + [_runtime()]
    if tracking_uri:
        checks.append(_mlflow(tracking_uri))
    if address:
        checks.append(_bucket(address))
    return checks


def _pipelines(connect: Callable[[], Kubeflow]) -> Check:
    try:
        kubeflow = connect()
    except MinitronError as error:
        what, _, remedy = str(error).partition("; ")
        return Check(False, "Kubeflow Pipelines", what, remedy)
    users = "several users" if kubeflow.multi_user else "one user"
    return Check(True, "Kubeflow Pipelines", f"version {kubeflow.version}, {users}")


def _namespace(core: Any, namespace: str) -> Check:
    name = f"namespace {namespace}"
    found, problem = kubernetes_api.try_get(lambda: core.read_namespace(namespace))
    if found:
        return Check(True, name, found.status.phase or "there")
    return _missing(name, problem, "kubectl apply -k manifests/overlays/gke, or give --namespace")


def _gpus(core: Any, namespace: str) -> Check:
    nodes, problem = kubernetes_api.try_get(lambda: core.list_node().items)
    if nodes is None:
        return _missing("GPUs", problem, "")
    counts = [int((node.status.allocatable or {}).get(trainjob.GPU, 0)) for node in nodes]
    with_gpus = [count for count in counts if count]
    if with_gpus:
        return Check(True, "GPUs", f"{sum(counts)} allocatable on {len(with_gpus)} of {len(counts)} nodes")
    return Check(
        None, "GPUs", f"none on {len(counts)} nodes",
        "fine if the node pool starts nodes on demand; else add one, with NVIDIA's device plugin",
    )  # fmt: skip


def _claim(core: Any, namespace: str) -> Check:
    wanted = _default("workspace_claim")
    name = f"claim {wanted}"
    claim, problem = kubernetes_api.try_get(lambda: core.read_namespaced_persistent_volume_claim(wanted, namespace))
    if claim is None:
        return _missing(name, problem, "kubectl apply -k manifests/overlays/gke, or set workspace_claim")
    found = f"{claim.status.phase}, {', '.join(claim.spec.access_modes)}, {claim.spec.resources.requests['storage']}"
    if claim.status.phase == "Lost":
        return Check(False, name, found, "its volume is gone: delete the claim and apply the manifests again")
    return Check(True, name, found)


def _secret(core: Any, namespace: str) -> Check:
    wanted = _default("credentials_secret")
    name = f"secret {wanted}"
    secret, problem = kubernetes_api.try_get(lambda: core.read_namespaced_secret(wanted, namespace))
    if secret is None:
        check = _missing(name, problem, "only needed for gated models (HF_TOKEN) and an MLflow with a password")
        return check._replace(ok=None)
    return Check(True, name, ", ".join(sorted(secret.data or {})) or "empty")


def _default(parameter: str) -> str:
    """Return what the pipeline takes where nothing else is said."""
    return compiled_pipeline("compress")[0]["root"]["inputDefinitions"]["parameters"][parameter]["defaultValue"]


def _runtime() -> Check:
    name = f"training runtime {trainjob.RUNTIME}"
    found, problem = kubernetes_api.try_get(trainjob.get_runtime)
    if found:
        return Check(True, name, "there")
    check = _missing(name, problem, "only needed for num_nodes above 1: install Kubeflow Trainer 2.3")
    return check._replace(ok=None)


def _mlflow(uri: str) -> Check:
    try:
        answer = requests.get(f"{uri.rstrip('/')}/health", timeout=10)
    except requests.RequestException as error:
        return Check(False, "MLflow", f"{uri}: {type(error).__name__}", "check tracking_uri, and that it runs")
    if answer.ok and answer.text == "OK":
        return Check(True, "MLflow", uri)
    remedy = "start it with --allowed-hosts, or log in" if answer.status_code == 403 else "check tracking_uri"
    return Check(False, "MLflow", f"{uri}: {answer.status_code} {answer.reason}", remedy)


def _bucket(address: str) -> Check:
    try:
        bucket.check_writable(address)
    except MinitronError as error:
        what, _, remedy = str(error).partition("; ")
        return Check(False, "bucket", what, remedy)
    return Check(True, "bucket", f"{address}: writable")


def _missing(name: str, problem: str, remedy: str) -> Check:
    """Return what is said of a thing that is not there, or that this user may not see."""
    if problem == "forbidden":
        return Check(None, name, "not visible to you", "ask somebody who may see it")
    return Check(False, name, problem, remedy)
