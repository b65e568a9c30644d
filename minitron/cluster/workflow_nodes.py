"""Tell which task of a pipeline an entry of a run's task details belongs to.

Kubeflow lists the nodes of the Argo workflow by display name. It leaves out their ids, but gives those of their
children. An id is a hash of the node's full name (argo-workflows, pkg/apis/workflow/v1alpha1/workflow_types.go,
NodeID), and the pipeline tells the full names (kubeflow/pipelines, backend/src/v2/compiler/argocompiler/dag.go;
argo-workflows, workflow/controller/dag.go, expandTask). So a node is recognized by its children: without them, the
iterations of a loop and their attempts look alike.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

Path = tuple[str, ...]
"""The names of the nodes that lead from the pipeline to a task; in a loop `#` stands for the iteration."""

_ITERATIONS = re.compile(r"iteration-iterations\((\d+):")


class Task(NamedTuple):
    """A task of a run: the full name of its node, which no other task has, and its name for people."""

    node: str
    label: str


def list_paths(
    specification: dict[str, Any], component: dict[str, Any] | None = None, path: Path = ()
) -> Iterator[Path]:
    """Yield the path of each task that runs a container.

    Args:
        specification: of the compiled pipeline.
        component: a component of tasks; None: the pipeline itself.
        path: the path to the component.
    """
    for name, task in (component or specification["root"])["dag"]["tasks"].items():
        inside = specification["components"][task["componentRef"]["name"]]
        is_exit = task.get("triggerPolicy", {}).get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED"
        own = (*path, f"{task['dependentTasks'][0]}.onExit", name) if is_exit else (*path, name)
        loop = ("iteration-iterations(#:#)", "iteration-item") if "parameterIterator" in task else ()
        if "dag" in inside:
            yield from list_paths(specification, inside, (*own, *loop))
        else:
            yield own


def find_tasks(nodes: list[Any], paths: list[Path]) -> dict[str, Task]:
    """Return the task of each child that the nodes of a task have, by the child's id.

    Args:
        nodes: the run's task details.
        paths: those of the pipeline.
    """
    ids = [child.pod_name for node in nodes for child in node.child_tasks or []]
    workflow = ids[0].rpartition("-")[0] if ids else ""
    found = (_ITERATIONS.match(node.display_name) for node in nodes)
    iterations = max((int(match[1]) + 1 for match in found if match), default=0)
    tasks: dict[str, Task] = {}
    for path in paths:
        for item in range(iterations if is_in_loop(path) else 1):
            for attempt in ("", "(0)"):  # Kubeflow 2.17 lets Argo try every node again, of which there is one attempt
                names = (part.replace("#", str(item)) for part in ("root", *path))
                node = "".join([workflow, *(f"{attempt}.{name}" for name in names)])
                task = Task(node, _name_task(path, item))
                inside = f"{node}{attempt}.executor"
                children = (node, f"{node}-driver(0)", f"{node}(0)", inside, f"{inside}(0)")
                tasks |= dict.fromkeys((_compute_id(workflow, child) for child in children), task)
    return tasks


def is_in_loop(path: Path) -> bool:
    """Say whether a task runs once for each item of a loop."""
    return any("#" in part for part in path)


def _name_task(path: Path, item: int) -> str:
    rounds = [part.removeprefix("for-loop-") for part in path if part.startswith("for-loop-")]
    return f"{path[-1]} {item + 1} of round {rounds[-1]}" if rounds else path[-1]


def _compute_id(workflow: str, node: str) -> str:
    """Return the id of a node: the workflow's name, and the 32-bit FNV-1a hash of the node's full name."""
    value = 0x811C9DC5
    for byte in node.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return f"{workflow}-{value}"
