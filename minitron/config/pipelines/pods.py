"""What the tasks of a compiled pipeline are as pods of a cluster: requests, queues, deadlines, labels."""

import re
from collections.abc import Mapping
from typing import Any

from minitron.config.document import (
    Plan,
)
from minitron.config.pipelines.arguments import read_run_plan
from minitron.config.pipelines.compiled import get_parameters, list_dags, list_stages, name_stage
from minitron.config.resources import Models, PodRequest, request_pod, request_trial
from minitron.config.settings import QUEUE_LABEL, RETRIES, TRAIN_JOB_QUEUE_LABEL, ClusterConfig, TrainingSettings
from minitron.config.stages import STAGES

_FLOW = ("resolve", "plan", "select", "prepare", "finetune", "trial", *STAGES, "promote", "conclude")
"""All tasks of the pipelines, in the order in which they run."""


_TTL_SINCE = (2, 17)
"""The first Kubeflow Pipelines that knows _TTLS; an older one would drop the whole platform document."""


_TTLS = ("resourceTtlOnCompletion", "resourceTtlOnSuccess", "resourceTtlOnFailure")


def apply_cluster_config(
    documents: list[dict[str, Any]], cluster: ClusterConfig, release: tuple[int, ...] | None
) -> list[dict[str, Any]]:
    """Write settings for which Kubeflow has no parameters into a compiled pipeline, in place.

    Args:
        documents: the two documents of the compiled YAML, specification and platform.
        cluster: the settings.
        release: the server's version; None: unknown; only settings that every supported version knows are written.

    Returns:
        The documents.
    """
    specification, platform = documents
    kubernetes = platform["platforms"]["kubernetes"]
    if release and release >= _TTL_SINCE:
        kubernetes.setdefault("pipelineConfig", {}).update(dict.fromkeys(_TTLS, cluster.ttl_hours * 3600))
    for executor in kubernetes["deploymentSpec"]["executors"].values():
        executor["activeDeadlineSeconds"] = str(cluster.timeout_hours * 3600)
        for mount in executor.get("emptyDirMounts", []):
            mount["sizeLimit"] = cluster.shared_memory
        executor["podMetadata"]["labels"] |= cluster.labels
    for dag in list_dags(specification):
        for task in dag["dag"]["tasks"].values():
            if "retryPolicy" in task:
                task["retryPolicy"]["maxRetryCount"] = cluster.retries
    for executor in specification["deploymentSpec"]["executors"].values():
        for entry in executor["container"].get("env", []):
            if entry["name"] == RETRIES:
                entry["value"] = str(cluster.retries)
    return documents


def queue_pods(documents: list[dict[str, Any]], queue: str, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Let everything that holds GPUs wait in a queue of Kueue, in place: a task's own pod, or its TrainJob.

    A pod without GPUs does not queue. A pod that waits for its TrainJob would hold quota that the TrainJob needs:
    with enough such pods, no TrainJob would ever start.

    Args:
        documents: the two documents of the compiled YAML, specification and platform.
        queue: name of the LocalQueue.
        arguments: the run's arguments, as `check_arguments` returns them; they say which tasks have GPUs.

    Returns:
        The documents.
    """
    if not (plan := read_run_plan(arguments)):  # no task of this pipeline uses GPUs
        return documents
    for executor in documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        labels = executor["podMetadata"]["labels"]
        if label := _find_queue_label(plan, labels["app.kubernetes.io/component"]):
            labels[label] = queue
    return documents


def _find_queue_label(plan: Plan, task: str) -> str | None:
    """Return the label that names the queue of a task's GPUs; None if the task uses none."""
    if task == "trial":
        return QUEUE_LABEL if plan.trial_gpus else None
    settings = plan.stages.get(task)
    if settings and settings.gpus:
        return QUEUE_LABEL
    return TRAIN_JOB_QUEUE_LABEL if isinstance(settings, TrainingSettings) and settings.num_nodes > 1 else None


def list_pod_requests(
    documents: list[dict[str, Any]], arguments: Mapping[str, Any], plan: Plan | None, models: Models
) -> list[PodRequest]:
    """List what the tasks of a run ask a cluster for, in the order of the flow.

    Args:
        documents: the two documents of the compiled YAML, specification and platform.
        arguments: the pipeline's arguments, as `check_arguments` returns them.
        plan: the checked settings of the run; None if the pipeline has none.
        models: the sizes of its models.
    """
    specification, parameters = documents[0], get_parameters(documents)
    requests = []
    for task in sorted({name_stage(name) for name in list_stages(specification)}, key=_FLOW.index):
        label = specification["components"][f"comp-{task}"]["executorLabel"]
        container = specification["deploymentSpec"]["executors"][label]["container"]
        name = re.sub(r".*pipelinechannel--(\w+)'.*", r"\1", container["image"])
        image = str(arguments.get(name, parameters[name]["defaultValue"]))
        if plan and task in plan.stages:
            requests.append(request_pod(task, image, plan, models))
        elif plan and task == "trial":
            requests.append(request_trial(image, plan, models))
        else:
            limits = container["resources"]
            requests.append(PodRequest(task, image, 1, 0, limits["resourceCpuLimit"], limits["resourceMemoryLimit"]))
    return requests
