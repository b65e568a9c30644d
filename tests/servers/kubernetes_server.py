"""A stateful Kubernetes API server over HTTP, as far as `minitron` uses it, with Kubeflow Trainer's controller.

TrainJobs are validated with the models of kubeflow-trainer-api: what those do not know is refused. The controller makes
pods of a job, or runs it: `run_jobs` starts the nodes' commands here, with the variables that the Trainer sets.

Kueue v0.19.2 suspends a job with a queue when it is created (pkg/controller/jobs/trainjob/trainjob_webhook.go), and
lets it go or stops it (RunWithPodSetsInfo and Stop of trainjob_controller.go) when a test calls `admit` or `preempt`.
"""

import copy
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from minitron.config.settings import QUEUE_LABEL
from minitron.engines import trainjob
from tests.servers.http_server import Refused, State, free_port, http_server

Entry = dict[str, Any]


TASK: dict[str, Any] = {
    "metadata": {
        "labels": {},
        "ownerReferences": [
            {
                "apiVersion": "argoproj.io/v1alpha1",
                "kind": "Workflow",
                "name": "compress-x",
                "uid": "w1",
                "controller": True,
            }
        ],
    },
    "status": {"phase": "Running"},
    "spec": {
        "serviceAccountName": "minitron",
        "imagePullSecrets": [{"name": "pull"}],
        "nodeSelector": {"cloud.google.com/gke-spot": "true"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "volumes": [
            {"name": "kfp-launcher", "emptyDir": {}},
            {"name": "minitron-workspace", "persistentVolumeClaim": {"claimName": "minitron-workspace"}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
        ],
        "containers": [
            {"name": "wait", "image": "argoexec"},
            {
                "name": "main",
                "image": "registry/trainer:0.1.0",
                "env": [
                    {"name": "KFP_POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
                    {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "minitron", "key": "HF_TOKEN"}}},
                    {"name": "MINITRON_CACHE", "value": "/workspace/cache"},
                    {"name": "SOMETHING", "value": "else"},
                ],
                "resources": {"limits": {"cpu": "8", "memory": "64Gi"}},
                "volumeMounts": [
                    {"name": "kfp-launcher", "mountPath": "/kfp-launcher"},
                    {"name": "minitron-workspace", "mountPath": "/workspace"},
                    {"name": "shared-memory", "mountPath": "/dev/shm"},
                ],
            },
        ],
    },
}
"""What Kubeflow makes of a task, as far as it matters: the content of its pod."""


class KubernetesServer(State):
    """The state, and what a test does to it."""

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, dict[str, Entry]] = {
            kind: {} for kind in ("pods", "nodes", "namespaces", "persistentvolumeclaims", "secrets", "trainjobs")
        } | {"events": {}, "configmaps": {}, "clustertrainingruntimes": {}}
        self.logs: dict[str, list[str]] = {}
        self.forbidden: set[str] = set()
        """Kinds, or verbs and kinds ("POST trainjobs"), that are answered by 403."""
        self.run_jobs = False
        self.create_pods = True
        self.lingering = False
        """Deleted TrainJobs stay, marked, until the next look."""
        self.processes: list[subprocess.Popen] = []
        self.runner: Thread | None = None
        self.variables: dict[str, str] = {}
        """What Trainer sets in the nodes' containers besides torchrun's: those of its status server."""

    def job(self) -> Entry:
        """Return the one TrainJob."""
        (job,) = self.objects["trainjobs"].values()
        return job

    def say(self, pod: str, *lines: str) -> None:
        """Add lines to a pod's log."""
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}000Z"
        self.logs.setdefault(pod, []).extend(f"{now[:-1]}{number:02}Z {line}" for number, line in enumerate(lines))

    def end(self, kind: str, message: str = "", reason: str = "JobsFailed") -> None:
        """Give the TrainJob a condition: Complete or Failed."""
        _set_condition(self.job(), kind, "True", reason, message)

    def admit(self) -> None:
        """Let the TrainJob go: Kueue clears spec.suspend, Trainer the condition, and pods are made."""
        job = self.job()
        job["spec"]["suspend"] = False
        # Trainer v2.3.0: setSuspendedCondition of pkg/controller/trainjob_controller.go, texts of pkg/constants
        _set_condition(job, "Suspended", "False", "Resumed", "TrainJob is resumed")
        self._start_nodes(job)

    def preempt(self) -> None:
        """Stop the TrainJob: Kueue sets spec.suspend, and JobSet deletes the pods."""
        job = self.job()
        self._suspend(job)
        for process in self.processes:
            process.terminate()
        if self.runner:
            self.runner.join()  # as Stop, which waits until no job is active
        self._remove_nodes(job["metadata"]["name"])

    def _suspend(self, job: Entry) -> None:
        job["spec"]["suspend"] = True
        _set_condition(job, "Suspended", "True", "Suspended", "TrainJob is suspended")

    def add(self, kind: str, name: str, **content: Any) -> Entry:
        metadata = {"name": name, "namespace": "team", "uid": f"uid-{name}", "creationTimestamp": _timestamp_now()}
        metadata |= content.pop("metadata", {})
        entry = {"metadata": metadata} | content
        self.objects[kind][name] = entry
        return entry

    def error(self, status: int, message: str) -> Entry:
        return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": status}

    def answer(self, method: str, path: str, query: dict[str, str], data: bytes, headers: Any) -> Any:
        match = re.fullmatch(
            r"/(?:api/v1|apis/[^/]+/v1alpha1)(?:/namespaces/(?:team|kubeflow))?/(\w+)(?:/([^/]+))?(?:/(log))?", path
        )
        if not match:
            raise Refused(404, f"no such path {path}")
        kind, name, log = match.groups()
        if {kind, f"{method} {kind}"} & self.forbidden:
            raise Refused(403, f'{kind} is forbidden: User "system:serviceaccount:team:default" cannot {method} {kind}')
        match (method, name, log):
            case ("GET", _, "log"):
                return self._log(name, query)
            case ("GET", None, _):
                return {"items": self._selected(kind, query)}
            case ("GET", _, _):
                return self._found(kind, name)
            case ("POST", None, _):
                return self._create(kind, json.loads(data))
            case ("DELETE", _, _):
                return self._delete(kind, name)
        raise Refused(405, f"{method} {path}")

    def _found(self, kind: str, name: str) -> Entry:
        if name not in self.objects[kind]:
            raise Refused(404, f'{kind} "{name}" not found')
        entry = self.objects[kind][name]
        if "deletionTimestamp" in entry["metadata"]:
            self._remove(kind, name)
        return entry

    def _selected(self, kind: str, query: dict[str, str]) -> list[Entry]:
        found = list(self.objects[kind].values())
        for term in filter(None, query.get("labelSelector", "").split(",")):
            key, value = term.split("=")
            found = [entry for entry in found if entry["metadata"].get("labels", {}).get(key) == value]
        if field := query.get("fieldSelector"):
            key, value = field.split("=")
            found = [entry for entry in found if entry.get(key) == value]
        return found

    def _log(self, name: str, query: dict[str, str]) -> str:
        pod = self._found("pods", name)
        if pod["status"]["phase"] == "Pending":
            raise Refused(400, f'container "node" in pod "{name}" is waiting to start')
        lines = self.logs.get(name, [])[-int(query.get("tailLines", 10**6)) :]
        if query.get("timestamps", "").lower() != "true":
            lines = [line.partition(" ")[2] for line in lines]
        return "".join(f"{line}\n" for line in lines)

    def _create(self, kind: str, body: Entry) -> Entry:
        assert kind == "trainjobs"
        parsed = TrainerV1alpha1TrainJob.from_dict(body).to_dict()
        if _without_nulls(parsed) != _without_nulls(body):
            raise Refused(400, "strict decoding error: unknown field")
        name = body["metadata"]["name"]
        if name in self.objects[kind]:
            raise Refused(409, f'{kind} "{name}" already exists')
        body["metadata"]["creationTimestamp"] = _timestamp_now()
        self.objects[kind][name] = job = body | {"status": {}}
        if QUEUE_LABEL in body["metadata"].get("labels", {}):
            patch = {"manager": "kueue.x-k8s.io/manager", "trainingRuntimeSpec": {"template": {"spec": {}}}}
            body["spec"]["runtimePatches"].append(patch)
            self._suspend(job)
        else:
            self._start_nodes(job)
        return body

    def _start_nodes(self, job: Entry) -> None:
        if self.create_pods:
            for rank in range(job["spec"]["trainer"]["numNodes"]):
                self._add_node(job["metadata"]["name"], rank)
        if self.run_jobs:
            self.runner = Thread(target=self._run, args=(job,), daemon=True)
            self.runner.start()

    def _add_node(self, job: str, rank: int) -> None:
        labels = {
            "jobset.sigs.k8s.io/jobset-name": job,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(rank),
        }
        self.add("pods", f"{job}-node-0-{rank}-abcde", metadata={"labels": labels}, status={"phase": "Running"})

    def _delete(self, kind: str, name: str) -> Entry:
        entry = self._found(kind, name)
        for process in self.processes:
            process.terminate()
        if self.lingering:
            entry["metadata"]["deletionTimestamp"] = _timestamp_now()
        else:
            self._remove(kind, name)
        return {"kind": "Status", "status": "Success"}

    def _remove(self, kind: str, name: str) -> None:
        del self.objects[kind][name]
        self._remove_nodes(name)

    def _remove_nodes(self, job: str) -> None:
        for pod in [pod for pod in self.objects["pods"] if pod.startswith(f"{job}-node")]:
            del self.objects["pods"][pod]

    def _run(self, job: Entry) -> None:
        """Run the nodes of a job as processes of this machine, as Trainer's torch plugin would let them run."""
        trainer, name = job["spec"]["trainer"], job["metadata"]["name"]
        port = free_port()
        logs = []
        for rank in range(trainer["numNodes"]):
            variables = {
                "PET_NNODES": trainer["numNodes"], "PET_NPROC_PER_NODE": trainer["numProcPerNode"],
                "PET_NODE_RANK": rank, "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port,
            }  # fmt: skip
            given = {entry["name"]: entry["value"] for entry in trainer.get("env", []) if "value" in entry}
            environment = os.environ | given | {key: str(value) for key, value in variables.items()} | self.variables
            command = [sys.executable, *trainer["command"][1:]]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
            self.processes.append(process)
            logs.append(Thread(target=self._read, args=(f"{name}-node-0-{rank}-abcde", process), daemon=True))
            logs[-1].start()
        nodes = self.processes[-trainer["numNodes"] :]
        while any(process.poll() is None for process in nodes) and not any(process.poll() for process in nodes):
            time.sleep(0.05)
        for process in nodes:  # JobSet ends all when one failed
            process.terminate()
        statuses = [process.wait() for process in nodes]
        for log in logs:
            log.join()
        if name in self.objects["trainjobs"] and not job["spec"].get("suspend"):
            self.end("Failed" if any(statuses) else "Complete", f"exit statuses {statuses}")

    def _read(self, pod: str, process: subprocess.Popen) -> None:
        assert process.stdout
        for line in process.stdout:
            self.say(pod, line.rstrip("\n"))


def _set_condition(job: Entry, kind: str, status: str, reason: str, message: str) -> None:
    """Set one condition, and leave the others, as meta.SetStatusCondition of Kubernetes."""
    condition = {"type": kind, "status": status, "reason": reason, "message": message}
    others = [entry for entry in job["status"].get("conditions", []) if entry["type"] != kind]
    job["status"] = {"conditions": [*others, condition | {"lastTransitionTime": _timestamp_now()}]}


def _timestamp_now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _without_nulls(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
        case list():
            return [_without_nulls(entry) for entry in value]
    return value


@contextmanager
def kubernetes_server(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    """Serve until the block ends, to this process and those that it starts."""
    with http_server(KubernetesServer()) as state:
        config = directory / "kubeconfig"
        content = {
            "apiVersion": "v1", "kind": "Config", "current-context": "test", "users": [{"name": "ann", "user": {}}],
            "clusters": [{"name": "fake", "cluster": {"server": state.url}}],
            "contexts": [{"name": "test", "context": {"cluster": "fake", "user": "ann", "namespace": "team"}}],
        }  # fmt: skip
        config.write_text(yaml.safe_dump(content))
        monkeypatch.setenv("KUBECONFIG", str(config))
        try:
            yield state
        finally:
            for process in state.processes:
                process.kill()
                process.wait()


@contextmanager
def cluster_of_a_task(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    """Serve, with this process as the task whose pod is TASK; it looks at its TrainJob more often than a task does."""
    monkeypatch.setenv("KFP_POD_NAME", "distill-task")
    monkeypatch.setenv("MINITRON_NAMESPACE", "team")
    monkeypatch.setattr(trainjob, "POLL_SECONDS", 0.05)
    with kubernetes_server(directory, monkeypatch) as state:
        state.add("pods", "distill-task", **copy.deepcopy(TASK))
        yield state
