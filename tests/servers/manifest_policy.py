"""The rules for every object that manifests/ deploys: one function per rule takes an object and yields its faults."""

import re
from collections.abc import Callable, Iterator
from typing import Any

Manifest = dict[str, Any]

NAMESPACE = "minitron"
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob")
CLUSTER_SCOPED = ("Namespace", "ClusterRole", "ClusterRoleBinding")
PROBES = ("readinessProbe", "livenessProbe")
TAG = re.compile(r"[^:@]+(:\d+)?[^:@]*(:(?!latest$)[\w.-]*\d[\w.-]*|@sha256:[0-9a-f]{64})")
"""A version, or a digest; `latest` and names without a digit move."""


def pod_spec(manifest: Manifest) -> Manifest:
    if manifest["kind"] not in WORKLOADS:
        return {}
    return manifest["spec"].get("jobTemplate", manifest)["spec"]["template"]["spec"]


def list_containers(manifest: Manifest) -> list[Manifest]:
    return [*pod_spec(manifest).get("initContainers", []), *pod_spec(manifest).get("containers", [])]


def get_setting(manifest: Manifest, container: Manifest, name: str) -> Any:
    """Return the security setting of a container: its own, or else the pod's."""
    of_pod = pod_spec(manifest).get("securityContext", {})
    return container.get("securityContext", {}).get(name, of_pod.get(name))


def no_root(manifest: Manifest) -> Iterator[str]:
    for container in list_containers(manifest):
        if get_setting(manifest, container, "runAsNonRoot") is not True:
            yield f"container {container['name']}: runAsNonRoot is not true"
        for name in ("runAsUser", "runAsGroup"):
            if not get_setting(manifest, container, name):
                yield f"container {container['name']}: {name} is root or left to the image"


def no_escalation(manifest: Manifest) -> Iterator[str]:
    for container in list_containers(manifest):
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield f"container {container['name']}: may gain privileges"
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"container {container['name']}: keeps capabilities"
        if not context.get("readOnlyRootFilesystem"):
            yield f"container {container['name']}: may write to its image"
        if (get_setting(manifest, container, "seccompProfile") or {}).get("type") != "RuntimeDefault":
            yield f"container {container['name']}: no seccomp profile"


def no_way_to_the_node(manifest: Manifest) -> Iterator[str]:
    yield from (f"{name} is set" for name in ("hostNetwork", "hostPID", "hostIPC") if pod_spec(manifest).get(name))
    yield from (f"volume {v['name']}: hostPath" for v in pod_spec(manifest).get("volumes", []) if "hostPath" in v)


def pinned_image(manifest: Manifest) -> Iterator[str]:
    for container in list_containers(manifest):
        if not TAG.fullmatch(container["image"]):
            yield f"container {container['name']}: image {container['image']} has no version"


def requests_and_limits(manifest: Manifest) -> Iterator[str]:
    for container in list_containers(manifest):
        resources = container.get("resources", {})
        for name in ("requests", "limits"):
            if missing := {"cpu", "memory"} - set(resources.get(name, {})):
                yield f"container {container['name']}: no {name} for {sorted(missing)}"


def probes(manifest: Manifest) -> Iterator[str]:
    if manifest["kind"] not in ("Job", "CronJob"):
        for container in pod_spec(manifest).get("containers", []):
            yield from (f"container {container['name']}: no {name}" for name in PROBES if name not in container)


def no_token_without_need(manifest: Manifest) -> Iterator[str]:
    if pod_spec(manifest) and pod_spec(manifest).get("automountServiceAccountToken") is not False:
        yield "its pods get a token for the API server, which nothing deployed here calls"


def no_wildcards(manifest: Manifest) -> Iterator[str]:
    if manifest["kind"] in ("Role", "ClusterRole"):
        for rule in manifest["rules"]:
            if any("*" in value for values in rule.values() for value in values):
                yield f"a rule with a wildcard: {rule}"
            if "secrets" in rule["resources"] and ("resourceNames" not in rule or rule["verbs"] != ["get"]):
                yield f"secrets beyond getting one by its name: {rule}"


def no_secret_data(manifest: Manifest) -> Iterator[str]:
    if manifest["kind"] == "Secret":
        yield "a secret belongs in the cluster, not in the repository"
    for container in list_containers(manifest):
        for variable in container.get("env", []):
            if re.search("PASSWORD|TOKEN|SECRET|_KEY", variable["name"]) and "value" in variable:
                yield f"container {container['name']}: the value of {variable['name']} is in the repository"
            if re.search(r"://[^/@]*:[^/@]*@", variable.get("value", "")):
                yield f"container {container['name']}: the address in {variable['name']} carries a password"


def our_namespace(manifest: Manifest) -> Iterator[str]:
    found = manifest["metadata"].get("namespace")
    if manifest["kind"] in CLUSTER_SCOPED:
        if (manifest["kind"], manifest["metadata"]["name"]) != ("Namespace", NAMESPACE):
            yield "reaches beyond the namespace"
    elif found != NAMESPACE:
        yield f"namespace {found} is not {NAMESPACE}"


RULES: list[Callable[[Manifest], Iterator[str]]] = [
    no_root, no_escalation, no_way_to_the_node, pinned_image, requests_and_limits, probes, no_token_without_need,
    no_wildcards, no_secret_data, our_namespace,
]  # fmt: skip


def find_faults(manifest: Manifest) -> list[str]:
    """Return the rules that an object breaks, with the fault."""
    name = f"{manifest['kind']} {manifest['metadata']['name']}"
    return [f"{name}: {rule.__name__}: {fault}" for rule in RULES for fault in rule(manifest)]


def find_references(manifest: Manifest) -> set[tuple[str, str]]:
    """Return what the pods of a workload, or a role binding, need to find: kind and name (a secret's with its key)."""
    found = (
        {("ServiceAccount", pod_spec(manifest)["serviceAccountName"])}
        if "serviceAccountName" in pod_spec(manifest)
        else set()
    )
    for volume in pod_spec(manifest).get("volumes", []):
        if "persistentVolumeClaim" in volume:
            found.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        if "configMap" in volume:
            found.add(("ConfigMap", volume["configMap"]["name"]))
    for container in list_containers(manifest):
        for variable in container.get("env", []):
            if secret := variable.get("valueFrom", {}).get("secretKeyRef"):
                found.add(("Secret", f"{secret['name']}/{secret['key']}"))
    if manifest["kind"] == "RoleBinding":
        found.add((manifest["roleRef"]["kind"], manifest["roleRef"]["name"]))
        found |= {(subject["kind"], subject["name"]) for subject in manifest["subjects"]}
    return found


def find_unresolved(manifests: list[Manifest], given: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the references that neither an object nor what is `given` answers."""
    there = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests} | given
    return {reference for manifest in manifests for reference in find_references(manifest)} - there
