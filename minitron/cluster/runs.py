"""Follow a run to its end, with a line per stage, and find in its pods why it failed."""

import re
import time
from datetime import datetime
from typing import Any

from urllib3 import Retry

from minitron.cluster import kubernetes_api, pipelines_api
from minitron.cluster.workflow_nodes import Path, Task, find_tasks, is_in_loop, list_paths
from minitron.errors import MinitronError

DONE = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
COMPONENT_LABEL, RUN_LABEL = "app.kubernetes.io/component", "pipeline/runid"
"""Labels of a stage's pod: the stage, which the pipeline sets, and the run, which Kubeflow sets."""

_ERROR = re.compile(r"^(?:\s*error: |F\d{4} [^\]]*\] )(.+)$", re.MULTILINE)
"""The last line of a failed stage, and of Kubeflow's driver (glog's severity F)."""

_ONCE = Retry(1, backoff_factor=0.5)
_TIMEOUT = 10


def follow_run(kubeflow: pipelines_api.Kubeflow, run_id: str, specification: dict[str, Any]) -> Any:
    """Print a line when a stage of a run starts, is tried again, or ends; return the run at its end."""
    printed: dict[str, str] = {}
    paths = list(list_paths(specification))
    while True:
        run = kubeflow.wait_for_run(run_id)
        for stage, state in describe_stages(run, paths).items():
            if printed.get(stage) != state:
                printed[stage] = state
                print(f"{datetime.now():%H:%M:%S} {stage}: {state}", flush=True)
        if run.state in DONE:
            return run
        time.sleep(pipelines_api.POLL_SECONDS)


def describe_stages(run: Any, paths: list[Path]) -> dict[str, str]:
    """Return the state of each stage of a run, in the order in which they started.

    A stage has three kinds of nodes: `NAME-driver`, `NAME`, and an `executor` with a child per attempt. A node without
    children is recognized by its name, unless it is in a loop.
    """
    nodes = sorted((run.run_details and run.run_details.task_details) or [], key=lambda node: node.start_time)
    known = {path[-1]: Task(path[-1], path[-1]) for path in paths if not is_in_loop(path)}
    stages, tasks = {path[-1] for path in paths}, find_tasks(nodes, paths)
    attempts: dict[Task, int] = {}
    states: dict[Task, str] = {}
    for node in nodes:
        name, state = node.display_name, node.state or ""
        children = [child.pod_name for child in node.child_tasks or []]
        stage = name.removesuffix("-driver")
        task = next((tasks[child] for child in children if child in tasks), known.get(stage))
        if task is None:
            continue
        if name == "executor":
            attempts[task] = len(children)
        elif name in stages and state in ("RUNNING", "SUCCEEDED", "FAILED", "SKIPPED"):
            states[task] = state.lower()
        elif name != stage and stage in stages and state == "FAILED":
            states[task] = "failed before it started, in Kubeflow's driver"
    again = {task: f"attempt {count}" for task, count in attempts.items() if count > 1}
    return {task.label: again.get(task, state) if state == "running" else state for task, state in states.items()}


def find_pod_failure(namespace: str, run_id: str) -> str | None:
    """Return the reason for a failed run from its last failed pod: the error line, or why Kubernetes ended it.

    None: the pod is gone, or the Kubernetes API is not available or not allowed.
    """
    try:
        core = kubernetes_api.core_api(_ONCE)
    except MinitronError:
        return None
    options = {"label_selector": f"{RUN_LABEL}={run_id}", "_request_timeout": _TIMEOUT}
    pods, _ = kubernetes_api.try_get(lambda: core.list_namespaced_pod(namespace, **options).items)
    failed = [pod for pod in pods or [] if pod.status.phase == "Failed"]
    if not failed:
        return None
    pod = max(failed, key=lambda pod: pod.metadata.creation_timestamp)
    reason = _read_error_line(core, pod) or _describe_end(pod)
    return f"{pod.metadata.labels.get(COMPONENT_LABEL, pod.metadata.name)}: {reason}"


def _read_error_line(core: Any, pod: Any) -> str | None:
    """Return the last error message in a pod's log; a stage that fails prints one, unless it is killed."""
    place = (pod.metadata.name, pod.metadata.namespace)
    options = {"container": "main", "tail_lines": 100, "_request_timeout": _TIMEOUT}
    log, _ = kubernetes_api.try_get(lambda: core.read_namespaced_pod_log(*place, **options))
    messages = _ERROR.findall(log or "")
    return messages[-1].strip() if messages else None


def _describe_end(pod: Any) -> str:
    """Return Kubernetes' reason for the end of a pod: evicted, out of memory, deadline, or the exit status."""
    if pod.status.reason or pod.status.message:
        return ": ".join(filter(None, (pod.status.reason, pod.status.message)))
    containers = [entry.state.terminated for entry in pod.status.container_statuses or [] if entry.name == "main"]
    if containers and (end := containers[0]):
        return ": ".join(filter(None, (end.reason, end.message, f"exit status {end.exit_code}")))
    return f"its pod {pod.metadata.name} failed"
