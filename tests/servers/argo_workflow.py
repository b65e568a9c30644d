"""The Argo workflow that Kubeflow makes of a pipeline: its nodes, and the task details that GetRun makes of them.

Task details are no tasks: Kubeflow Pipelines stores one entry per Argo node, without an error, without the node's own
name or id, and with ids of nodes as children. Where each shape comes from:

- which nodes a task has: kubeflow/pipelines 2.15.0 and 2.17.0, backend/src/v2/compiler/argocompiler/dag.go
  (`NAME-driver`, `NAME`, `root`, exit hooks, and a loop's `iteration-driver`, `iteration-iterations`, `iteration-item`)
  and container.go (`executor` inside of `NAME`);
- names, display names and ids: argo-workflows 3.7.3 and 4.0.5, workflow/controller/operator.go (initializeNode,
  `RETRY(n)`), workflow/common/util.go (`.onExit`), pkg/apis/workflow/v1alpha1/workflow_types.go (NodeID);
- children: argo-workflows 3.7.3, workflow/controller/dag.go (a task is the child of its dependencies' outbound nodes;
  the iterations `NAME(n:n)` of a loop, which expandTask names, are children of the task group `NAME`) and operator.go
  (getOutboundNodes);
- task details: kubeflow/pipelines 2.15.0 (2.17.0 has the same), backend/src/apiserver/server/api_converter.go
  (toModelTask, toApiPipelineTaskDetail), backend/src/common/util/workflow.go (NodeStatuses) and
  backend/src/apiserver/model/run.go (RuntimeState.ToV2).
"""

import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

_STATES = {
    "Pending": "PENDING", "Running": "RUNNING", "Succeeded": "SUCCEEDED", "Skipped": "SKIPPED", "Failed": "FAILED",
    "Error": "FAILED",
}  # fmt: skip
"""Argo's phases as ToV2 has them. Omitted is none of them: it becomes RUNTIME_STATE_UNSPECIFIED, and is left out."""

_NEVER = "0001-01-01T00:00:00Z"
"""A node that has not ended: Go's zero time, by way of its Unix seconds."""

Task = dict[str, Any]


@dataclass
class Node:
    """A node of the workflow's status."""

    name: str
    display_name: str
    kind: str
    phase: str
    started: datetime
    ended: datetime | None = None
    children: list[str] = field(default_factory=list)


class Workflow:
    """A run's workflow, and what a test lets happen in it. A minute passes between two steps.

    A task is named as in the pipeline, or LOOP/NAME/ITERATION in a loop.
    """

    def __init__(self, specification: dict[str, Any], retry_templates: bool = False) -> None:
        """Begin with no node.

        Args:
            specification: of the compiled pipeline.
            retry_templates: merge a retry strategy into every template, as Argo does with the `templateDefaults` of
                Kubeflow Pipelines 2.17.0 (third-party/argo/base/workflow-controller-configmap-patch.yaml).
        """
        self.name, self.phase, self.nodes = "compress-x7k2p", "Pending", dict[str, Node]()
        self._retry_templates, self._specification = retry_templates, specification
        self._created = self._now = datetime(2026, 11, 24, 2, tzinfo=UTC)
        self._paths: dict[str, tuple[str, ...]] = {}
        self._tasks: dict[str, Task] = {}
        self._list_tasks(specification["root"], ())

    def start(self, task: str) -> None:
        """Let a task's driver end and its executor start."""
        self._now += timedelta(minutes=1)
        path, name = self._locate(task)
        boundary = self._open(path)
        driver = self._add(boundary, f"{name}-driver", "Pod", self._dependencies(name, boundary), "Succeeded")
        inner = self._add(boundary, name, "DAG", [driver], "Running")
        self._add(inner, "executor", "Pod", [inner], "Running", retried=True)

    def retry(self, task: str, phase: str = "Failed") -> None:
        """Let an attempt end and the next one start."""
        self._now += timedelta(minutes=1)
        executor = self._find(task, "executor")
        self._end(self._node(executor.children[-1]), phase)
        attempt = f"{executor.name}({len(executor.children)})"
        self._add_node(attempt, f"executor({len(executor.children)})", "Pod", [executor.name], "Running")

    def finish(self, task: str, phase: str = "Succeeded") -> None:
        """Let a task end."""
        self._now += timedelta(minutes=1)
        outer = self._find(task)
        for node in self.nodes.values():
            if node.name.startswith(outer.name) and node.ended is None:
                self._end(node, phase)

    def fail_driver(self, task: str) -> None:
        """Let a task's driver fail: the task itself is omitted."""
        self._now += timedelta(minutes=1)
        path, name = self._locate(task)
        boundary = self._open(path)
        driver = self._add(boundary, f"{name}-driver", "Pod", self._dependencies(name, boundary), "Failed")
        self._add(boundary, name, "Skipped", [driver], "Omitted")

    def skip(self, dag: str) -> None:
        """Let a condition be false."""
        boundary = self._open(self._paths[dag])
        driver = self._add(boundary, f"{dag}-driver", "Pod", self._dependencies(dag, boundary), "Succeeded")
        self._add(boundary, dag, "Skipped", [driver], "Skipped")

    def end(self, phase: str = "Succeeded") -> None:
        """Let the workflow end; what depends on a failure is omitted."""
        self._now += timedelta(minutes=1)
        for task, path in self._paths.items():
            boundary = self._inner(path)
            if "/" not in task and boundary in self.nodes and f"{boundary}.{task}-driver" not in self.nodes:
                for name in (f"{task}-driver", task):
                    self._add(boundary, name, "Skipped", [boundary], "Omitted")
        for node in self.nodes.values():
            if node.ended is None:
                self._end(node, phase)
        self.phase = phase

    def state(self) -> str:
        """Return the run's state."""
        return _STATES[self.phase]

    def task_details(self, run_id: str) -> list[dict[str, Any]]:
        """Return one entry per node, in no order that means anything; unset fields are left out."""
        return [
            {
                "run_id": run_id,
                "task_id": str(uuid.uuid5(uuid.NAMESPACE_URL, node.name)),
                "display_name": node.display_name,
                "create_time": _timestamp(self._created),
                "start_time": _timestamp(node.started),
                "end_time": _timestamp(node.ended) if node.ended else _NEVER,
            }
            | ({"state": _STATES[node.phase]} if node.phase in _STATES else {})
            | ({"child_tasks": [{"pod_name": child} for child in node.children]} if node.children else {})
            for node in sorted(self.nodes.values(), key=lambda node: self._node_id(node.name))
        ]

    def _list_tasks(self, component: Task, path: tuple[str, ...]) -> None:
        for name, task in component["dag"]["tasks"].items():
            is_exit = task.get("triggerPolicy", {}).get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED"
            self._tasks[name] = task
            self._paths[name] = (*path, f"{task['dependentTasks'][0]}.onExit") if is_exit else path
            self._paths |= {f"{part}/{name}": path for part in path if part.startswith("for-loop-")}
            inside = self._specification["components"][task["componentRef"]["name"]]
            loop = ("iteration-iterations(#:#)", "iteration-item") if "parameterIterator" in task else ()
            if "dag" in inside:
                self._list_tasks(inside, (*path, name, *loop))

    def _locate(self, task: str) -> tuple[tuple[str, ...], str]:
        """Return the path to a task, and its name."""
        loop, _, name = task.rpartition("/")
        if not loop:
            return self._paths[task], task
        return tuple(part.replace("#", name) for part in self._paths[loop]), loop.rpartition("/")[2]

    def _open(self, path: tuple[str, ...]) -> str:
        """Start the DAGs that a task is in; return the name of the innermost."""
        self.phase = "Running"
        boundary = self._inner(path)
        if boundary in self.nodes:
            return boundary
        if not path:
            entry = self._add("", self.name, "DAG", [], "Running")
            driver = self._add(entry, "root-driver", "Pod", [entry], "Succeeded")
            return self._add(entry, "root", "DAG", [driver], "Running")
        outer, dag = self._open(path[:-1]), path[-1]
        if dag.startswith("for-loop-"):
            return self._add(outer, dag, "DAG", self._dependencies(dag, outer), "Running")
        if dag.startswith("iteration-iterations"):
            group = f"{outer}.iteration-iterations"
            if group not in self.nodes:
                driver = self._add(outer, "iteration-driver", "Pod", [outer], "Succeeded")
                self._add_node(group, "iteration-iterations", "TaskGroup", [driver], "Running")
            return self._add(outer, dag, "DAG", [group], "Running")
        if dag.endswith(".onExit"):
            return self._add(outer, dag, "DAG", [f"{outer}.{dag.removesuffix('.onExit')}"], "Running")
        driver = self._add(outer, f"{dag}-driver", "Pod", self._dependencies(dag, outer), "Succeeded")
        return self._add(outer, dag, "DAG", [driver], "Running")

    def _inner(self, path: tuple[str, ...]) -> str:
        """Return the name of a DAG's node in which its tasks are: with a retry strategy its first attempt."""
        attempt = "(0)" if self._retry_templates else ""
        return "".join([self.name, *(f"{attempt}.{part}" for part in ("root", *path)), attempt])

    def _dependencies(self, task: str, boundary: str) -> list[str]:
        names = [f"{boundary}.{name}" for name in self._tasks.get(task, {}).get("dependentTasks", [])]
        outbound = [name for dependency in names for name in self._outbound(dependency)]
        return outbound or [boundary]

    def _outbound(self, name: str) -> list[str]:
        inside = [
            node for node in self.nodes.values() if node.name.startswith(name) and node.kind in ("Pod", "Skipped")
        ]
        return [max(inside, key=lambda node: node.started).name] if inside else []

    def _add(self, boundary: str, task: str, kind: str, parents: list[str], phase: str, retried: bool = False) -> str:
        """Add the node of a template, and its first attempt if it has a retry strategy; return the inner one's name."""
        name = f"{boundary}.{task}" if boundary else task
        if kind == "Skipped" or not (retried or self._retry_templates):
            return self._add_node(name, task, kind, parents, phase)
        self._add_node(name, task, "Retry", parents, phase)
        return self._add_node(f"{name}(0)", f"{task}(0)", kind, [name], phase)

    def _add_node(self, name: str, display_name: str, kind: str, parents: list[str], phase: str) -> str:
        self.nodes[name] = Node(name, display_name, kind, phase, self._now)
        if phase != "Running":
            self.nodes[name].ended = self._now
        for parent in parents:
            self.nodes[parent].children.append(self._node_id(name))
        return name

    def _end(self, node: Node, phase: str) -> None:
        node.phase, node.ended = phase, self._now

    def _find(self, task: str, inside: str = "") -> Node:
        path, name = self._locate(task)
        return self.nodes[f"{self._inner((*path, name))}.{inside}" if inside else f"{self._inner(path)}.{name}"]

    def _node(self, identifier: str) -> Node:
        return next(node for node in self.nodes.values() if self._node_id(node.name) == identifier)

    def _node_id(self, name: str) -> str:
        """Return Argo's id of a node: the workflow's name and the 32-bit FNV-1a hash of the node's."""
        if name == self.name:
            return name
        value = 2166136261
        for byte in name.encode():
            value = (value ^ byte) * 16777619 % 2**32
        return f"{self.name}-{value}"


def _timestamp(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"
