"""Train on several nodes with a Kubeflow TrainJob, which the task starts and follows.

The job's pods have the image, volumes, credentials, tolerations and account of the task's own pod. A job is named after
its stage's key, so that a restarted task finds the running job. The job ends with the task that waits for it.

Kueue suspends a job until its queue has room, and again when another job needs the room. The task keeps waiting, and
the workers resume from their last checkpoint.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from minitron.cluster import kubernetes_api
from minitron.config.settings import QUEUE_LABEL, TRAIN_JOB_QUEUE_LABEL
from minitron.engines.launcher import explain_failure
from minitron.errors import ConfigError, MinitronError, RunError

RUNTIME, GPU = "torch-distributed", "nvidia.com/gpu"
"""The runtime that Kubeflow Trainer installs, and the name of the resource GPU."""

POLL_SECONDS = 5

STUCK_SECONDS = 120
"""Seconds that a pod may wait for an image or a secret before the job fails."""

_STUCK = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "CreateContainerConfigError")
_API = {"group": "trainer.kubeflow.org", "version": "v1alpha1"}
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_TAIL = 20
_COPIED = ("MINITRON_", "HF_", "NCCL_", "TORCH_", "CUDA_", "OMP_")
"""Prefixes of the task's variables that the job gets, besides those from secrets."""


def launch(
    worker: str,
    job: dict[str, Any],
    directory: Path,
    nodes: int,
    gpus: int,
    key: str,
    follow: Callable[[], None] = lambda: None,
) -> None:
    """Run a job's workers on several nodes and wait for their end: `engines.launcher.launch`, on a cluster.

    Args:
        worker: module that torchrun runs in every process; its argument is the job's file.
        job: the job; the first node's output goes to `<directory>/<job>.log`.
        directory: a directory of the volume that this task and the nodes share, under the same path.
        nodes: number of nodes.
        gpus: GPUs of each node, with one process per GPU.
        key: identifies the work; a running TrainJob with the same job and key is continued.
        follow: function that is called while the workers run, and once after their end.

    Raises:
        MinitronError: a worker failed (the message is the worker's own), the job could not start, or it was deleted.
    """
    name = job["job"]
    path, log, failure = (directory / f"{name}.{suffix}" for suffix in ("json", "log", "failure"))
    pod = _read_own_pod()
    train_job = _TrainJob(f"minitron-{name}-{key[:12]}", pod.metadata.namespace, log)

    def make_manifest() -> dict[str, Any]:
        for leftover in (failure, log):
            leftover.unlink(missing_ok=True)
        path.write_text(json.dumps(job))
        command = ["python", "-m", "torch.distributed.run", "-m", worker, str(path)]
        return _make_manifest(train_job.name, pod, command, nodes, gpus)

    try:
        train_job.start(make_manifest)
        # A failed worker has written why: waiting for the others, or for restarts of the pod, would cost GPU time. This
        # is looked up before the state: if it failed because Kueue ended the others, the job is suspended by then.
        has_failed = failure.is_file()
        while (state := train_job.get_state(failure)) is None and not (has_failed and failure.is_file()):
            follow()
            train_job.forward_log()
            train_job.check_pods()
            time.sleep(POLL_SECONDS)
            has_failed = failure.is_file()
        train_job.forward_log()
        follow()
        if failure.is_file():
            raise explain_failure(name, log, failure)
        if state != "Complete":
            raise train_job.make_error(name, str(state))
    finally:
        train_job.delete()


def get_runtime() -> Any:
    """Return Kubeflow Trainer's runtime for torchrun, as the cluster has it."""
    return kubernetes_api.custom_api(kubernetes_api.LAST_RETRY).get_cluster_custom_object(
        **_API, plural="clustertrainingruntimes", name=RUNTIME
    )


class _TrainJob:
    """One TrainJob, by its name."""

    def __init__(self, name: str, namespace: str, log: Path) -> None:
        self.name, self._namespace, self._log = name, namespace, log
        self._resource: dict[str, Any] = {**_API, "namespace": namespace, "plural": "trainjobs"}
        self._jobs = kubernetes_api.custom_api(kubernetes_api.RETRY)
        self._core = kubernetes_api.core_api(kubernetes_api.RETRY)
        self._created = datetime.min.replace(tzinfo=UTC)
        self._last_line = ""
        self._stuck_since, self._refused, self._suspended = 0.0, False, False
        self._tail: list[str] = []

    def start(self, make_manifest: Callable[[], dict[str, Any]]) -> None:
        """Create the job that `make_manifest` returns, or continue the job that a lost task left."""
        while True:
            train_job = self._find_job()
            if train_job is None:
                if self._create_job(make_manifest()):
                    return
            elif "deletionTimestamp" in train_job["metadata"]:
                time.sleep(POLL_SECONDS)
            elif _read_end_state(train_job) in (None, "Complete"):
                print(f"TrainJob {self.name}: exists, following it", flush=True)
                return
            else:  # the job of an earlier attempt failed
                self.delete()

    def _create_job(self, manifest: dict[str, Any]) -> bool:
        """Create the job; return False if another task was faster."""
        try:
            with self._translate_errors(f"TrainJob {self.name}"):
                self._jobs.create_namespaced_custom_object(body=manifest, **self._resource)
        except kubernetes_api.ConflictError:
            return False
        except kubernetes_api.RefusedError:
            self._refused = True
            raise
        spec = manifest["spec"]["trainer"]
        print(f"TrainJob {self.name}: {spec['numNodes']} x {spec['numProcPerNode']} GPUs", flush=True)
        return True

    def _find_job(self) -> dict[str, Any] | None:
        try:
            with self._translate_errors(f"TrainJob {self.name}"):
                return self._jobs.get_namespaced_custom_object(name=self.name, **self._resource)
        except kubernetes_api.MissingError:
            return None

    def get_state(self, failure: Path) -> str | None:
        """Return how the job ended: Complete, or why it failed; None while it runs or waits in a queue.

        The `failure` of a suspended job's worker is deleted: it lost the other workers when Kueue ended them.

        Raises:
            RunError: the job was deleted.
        """
        if (train_job := self._find_job()) is None:
            raise RunError(f"TrainJob {self.name}: it was deleted; run the stage again to resume it")
        self._created = datetime.fromisoformat(train_job["metadata"]["creationTimestamp"])
        self._report_queue(train_job)
        if self._suspended:
            failure.unlink(missing_ok=True)
        return _read_end_state(train_job)

    def _report_queue(self, train_job: dict[str, Any]) -> None:
        """Print when the job begins to wait, and when it starts."""
        was_suspended, self._suspended = self._suspended, bool(train_job["spec"].get("suspend"))
        if self._suspended and not was_suspended:
            queue = (train_job["metadata"].get("labels") or {}).get(QUEUE_LABEL)
            state = f"waiting in queue {queue}" if queue else "suspended, without a queue"
            remedy = f"'kubectl get workloads -n {self._namespace}' shows the reason"
            print(f"TrainJob {self.name}: {state}; {remedy}", flush=True)
        elif was_suspended and not self._suspended:
            print(f"TrainJob {self.name}: starting", flush=True)

    def make_error(self, job: str, reason: str) -> RunError:
        """Return the error of a job whose workers left no explanation."""
        lines = " | ".join(self._tail) or "none"
        return RunError(f"{job}: TrainJob {self.name} failed ({reason}); its last lines: {lines}; see {self._log}")

    def forward_log(self) -> None:
        """Print the first node's new lines, and append them to the log."""
        firsts = [pod for pod in self._list_pods() if _is_first(pod)]
        pod = max(
            firsts, key=lambda pod: str(pod.metadata.creation_timestamp), default=None
        )  # the last of its restarts
        if pod is None or pod.status.phase == "Pending":
            return
        since = {"since_seconds": _compute_age(self._last_line)} if self._last_line else {}
        with (
            contextlib.suppress(kubernetes_api.MissingError, kubernetes_api.NotReadyError),
            self._translate_errors(f"pod {pod.metadata.name}"),
        ):
            text = self._core.read_namespaced_pod_log(pod.metadata.name, self._namespace, timestamps=True, **since)
            self._forward_lines(
                [line for line in (text or "").splitlines() if line.partition(" ")[0] > self._last_line]
            )

    def _forward_lines(self, lines: list[str]) -> None:
        texts = [line.partition(" ")[2] for line in lines]
        if not texts:
            return
        self._last_line = lines[-1].partition(" ")[0]
        self._tail = [*self._tail, *filter(str.strip, texts)][-_TAIL:]
        with self._log.open("a") as stream:
            stream.writelines(f"{text}\n" for text in texts)
        print("\n".join(texts), flush=True)

    def check_pods(self) -> None:
        """Fail if the job cannot start.

        Raises:
            RunError: an image cannot be pulled, a secret is missing, or a quota is exceeded.
        """
        pods = self._list_pods()
        if not pods and (refusal := self._find_quota_refusal()):
            raise RunError(f"TrainJob {self.name}: its pods are refused: {refusal}; ask for less, or raise the quota")
        waiting = [reason for pod in pods for reason in _find_stuck_reasons(pod)]
        self._stuck_since = (self._stuck_since or time.monotonic()) if waiting else 0.0
        if waiting and time.monotonic() - self._stuck_since >= STUCK_SECONDS:
            raise RunError(
                f"TrainJob {self.name}: {waiting[0]}; correct the parameter image, or give image_pull_secret"
            )

    def _list_pods(self) -> list[Any]:
        with self._translate_errors(f"pods of TrainJob {self.name}"):
            return self._core.list_namespaced_pod(
                self._namespace, label_selector=f"jobset.sigs.k8s.io/jobset-name={self.name}"
            ).items

    def _find_quota_refusal(self) -> str | None:
        """Return the message if a quota forbids the pods; events of an earlier job do not count."""
        with self._translate_errors(f"events of TrainJob {self.name}"):
            events = self._core.list_namespaced_event(self._namespace, field_selector="reason=FailedCreate").items
        own = [event for event in events if event.involved_object.name.startswith(self.name)]
        messages = [event.message for event in own if _get_last_time(event) >= self._created]
        return next((message for message in messages if "exceeded quota" in message), None)

    def delete(self) -> None:
        """Delete the job and its pods; warn if that fails."""
        if self._refused:
            return
        api = kubernetes_api.custom_api(kubernetes_api.LAST_RETRY)
        try:
            with self._translate_errors(f"TrainJob {self.name}"):
                api.delete_namespaced_custom_object(name=self.name, propagation_policy="Background", **self._resource)
        except kubernetes_api.MissingError:
            pass
        except MinitronError as error:
            remedy = f"kubectl delete trainjob {self.name} -n {self._namespace}"
            print(f"warning: it may still be running: {error}; delete it with '{remedy}'", file=sys.stderr, flush=True)

    def _translate_errors(self, what: str) -> contextlib.AbstractContextManager[None]:
        return kubernetes_api.one_line_errors(what, self._namespace)


def _read_own_pod() -> Any:
    """Return the pod of this task.

    Raises:
        ConfigError: this process is not in a pod.
    """
    name = os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", "")
    namespace = os.environ.get("MINITRON_NAMESPACE") or (_NAMESPACE.is_file() and _NAMESPACE.read_text().strip())
    if not namespace:
        raise ConfigError(
            "num_nodes: several nodes need a cluster, but this process is not in a pod; run it on Kubeflow, or set "
            "num_nodes to 1"
        )
    with kubernetes_api.one_line_errors(f"pod {name}", namespace):
        return kubernetes_api.core_api(kubernetes_api.RETRY).read_namespaced_pod(name, namespace)


def _make_manifest(name: str, pod: Any, command: list[str], nodes: int, gpus: int) -> dict[str, Any]:
    """Return the TrainJob; each of its nodes is like the pod's main container, with GPUs."""
    main = next(container for container in pod.spec.containers if container.name == "main")
    volumes = [volume for volume in pod.spec.volumes or [] if _is_shared(volume)]
    names = {volume.name for volume in volumes}
    resources = {**((main.resources and main.resources.limits) or {}), GPU: str(gpus)}
    node = {
        "name": "node",
        "volumeMounts": kubernetes_api.to_manifest(
            [mount for mount in main.volume_mounts or [] if mount.name in names]
        ),
    }
    patch = {
        "serviceAccountName": pod.spec.service_account_name,
        "imagePullSecrets": kubernetes_api.to_manifest(pod.spec.image_pull_secrets),
        "nodeSelector": pod.spec.node_selector,
        "tolerations": kubernetes_api.to_manifest(pod.spec.tolerations),
        "volumes": kubernetes_api.to_manifest(volumes),
        "containers": [node],
    }
    own = pod.metadata.labels or {}
    queue = own.get(TRAIN_JOB_QUEUE_LABEL) or own.get(QUEUE_LABEL)  # Kueue reads the job's label, not its pods'
    labels = {"app.kubernetes.io/part-of": "minitron"} | ({QUEUE_LABEL: queue} if queue else {})
    metadata = {"name": name, "labels": labels}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        # The workflow owns the job, so that the job is deleted with it even if this task is killed.
        "metadata": metadata
        | {"ownerReferences": [_make_owner_reference(owner) for owner in pod.metadata.owner_references or []]},
        "spec": {
            "runtimeRef": {"name": RUNTIME, "kind": "ClusterTrainingRuntime", "apiGroup": _API["group"]},
            "trainer": {
                "image": main.image,
                "command": command,
                "env": kubernetes_api.to_manifest([variable for variable in main.env or [] if _is_copied(variable)]),
                "numNodes": nodes,
                "numProcPerNode": gpus,
                "resourcesPerNode": {"requests": resources, "limits": resources},
            },
            "runtimePatches": [{"manager": "minitron.io/task", "trainingRuntimeSpec": _patch_nodes(patch)}],
        },
    }


def _patch_nodes(patch: dict[str, Any]) -> dict[str, Any]:
    """Return the patch for the pods of the replicated job `node`, without empty values."""
    spec = {name: value for name, value in patch.items() if value}
    node = {"name": "node", "template": {"spec": {"template": {"spec": spec}}}}
    return {"template": {"spec": {"replicatedJobs": [node]}}}


def _make_owner_reference(owner: Any) -> dict[str, Any]:
    return {"apiVersion": owner.api_version, "kind": owner.kind, "name": owner.name, "uid": owner.uid}


def _is_shared(volume: Any) -> bool:
    """Say whether the nodes need a volume: claims, /dev/shm and secrets, but not Kubeflow's and Argo's volumes."""
    in_memory = volume.empty_dir is not None and volume.empty_dir.medium == "Memory"
    return volume.persistent_volume_claim is not None or volume.secret is not None or in_memory


def _is_copied(variable: Any) -> bool:
    source = variable.value_from
    return (source is not None and source.secret_key_ref is not None) or variable.name.startswith(_COPIED)


def _read_end_state(train_job: dict[str, Any]) -> str | None:
    for condition in (train_job.get("status") or {}).get("conditions") or []:
        if condition["status"] == "True" and condition["type"] == "Complete":
            return "Complete"
        if condition["status"] == "True" and condition["type"] == "Failed":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}"
    return None


def _get_last_time(event: Any) -> datetime:
    return event.last_timestamp or event.event_time or event.metadata.creation_timestamp


def _is_first(pod: Any) -> bool:
    return (pod.metadata.labels or {}).get("batch.kubernetes.io/job-completion-index") == "0"


def _find_stuck_reasons(pod: Any) -> Iterator[str]:
    for status in pod.status.container_statuses or []:
        waiting = status.state and status.state.waiting
        if waiting and waiting.reason in _STUCK:
            yield f"{waiting.reason} in pod {pod.metadata.name}: {waiting.message or status.image}"


def _compute_age(timestamp: str) -> int:
    """Return the seconds since a line's timestamp, plus 30 because clocks differ."""
    age = datetime.now(UTC) - datetime.fromisoformat(timestamp[:19]).replace(tzinfo=UTC)
    return max(1, int(age.total_seconds()) + 30)
