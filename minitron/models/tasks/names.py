"""The names of lm-eval's tasks, groups and tags, for checks without lm-eval, as in plan's image.

Update the list when constraints.txt gets another lm-eval: `python -m minitron.models.tasks.names`.
"""

import difflib
import gzip
import importlib.metadata
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron.config.fields import Fault
from minitron.config.settings import EvaluateSettings

LIST = Path(__file__).with_suffix(".json.gz")


def read_task_names() -> dict[str, Any]:
    """Return the `version` of lm-eval, its `tasks`, and the `unsafe` ones, which run code that models write."""
    return json.loads(gzip.decompress(LIST.read_bytes()))


def find_task_faults(evaluate: EvaluateSettings) -> Iterator[Fault]:
    """Find tasks that do not exist, or that evaluate will refuse because they run code.

    Only lm-eval can parse the files of a local directory; a name that is nowhere in them is already a fault.
    """
    directory = evaluate.task_directory
    if directory is not None:
        if evaluate.tasks and directory.is_dir():
            text = "\n".join(path.read_text(errors="replace") for path in sorted(directory.rglob("*.yaml")))
            for name in evaluate.tasks:
                if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text):
                    yield Fault(
                        "evaluate.tasks", f"{name} is not in any .yaml file of {directory}; correct or remove it"
                    )
        return
    catalog = read_task_names() if evaluate.tasks else {"tasks": [], "unsafe": []}
    for name in evaluate.tasks:
        if name not in catalog["tasks"]:
            close = " or ".join(difflib.get_close_matches(name, catalog["tasks"], n=3)) or "another name"
            yield Fault(
                "evaluate.tasks",
                f"{name} is not a task of lm-eval {catalog['version']}; give {close}, or its files in task_directory",
            )
        if name in catalog["unsafe"] and name not in evaluate.unsafe_tasks:
            yield Fault(
                "evaluate.tasks",
                f"{name} runs code that the models write; remove it, or add it to evaluate.unsafe_tasks if that code "
                "can do no harm",
            )


def _write_list() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    unsafe = []
    for name in manager.all_tasks:
        entry = manager.task_index[name]
        parts = [entry, *(manager.task_index[part] for part in entry.tags if part in manager.task_index)]
        if any((part.cfg or {}).get("unsafe_code") for part in parts):
            unsafe.append(name)
    content = {"version": importlib.metadata.version("lm_eval"), "tasks": sorted(manager.all_tasks), "unsafe": unsafe}
    LIST.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))


if __name__ == "__main__":
    _write_list()
