"""A trial whose process is killed from outside: the candidate fails, the task does not.

The child process reads the plan from a pipe that nobody writes to, and so stays alive until it is killed.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from minitron.config.settings import RETRIES
from tests.servers.processes import wait_until

PLAN = "planned/plan.json"
TASK = "import json, sys\nfrom minitron.runtime.entry import launch\nlaunch('trial', **json.loads(sys.argv[1]))"
CANDIDATE = json.dumps({"name": "a", "sizes": {}, "losses": [3.0], "seconds": 1.0, "error": None})


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """The configuration of a trial."""
    for name in ("planned", "workspace"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / PLAN)
    inputs = {name: str(tmp_path / name) for name in ("dataset", "teacher", "planned", "workspace")}
    return inputs | {"candidate": CANDIDATE, "output": str(tmp_path / "tried"), "pipeline_run_id": "run-1"}


def wait_for_child(plan: Path, process: int) -> int | None:
    """Return the child of a process that reads the plan; None if nothing reads it within ten seconds."""
    with suppress(TimeoutError):
        wait_until(lambda: is_read(plan), 10)
        paths = Path("/proc").glob("[0-9]*/stat")
        return next((int(path.parent.name) for path in paths if read_parent(path) == process), None)
    return None


def is_read(pipe: Path) -> bool:
    with suppress(OSError):
        os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)  # it stays open, so that the reader waits
        return True
    return False


def read_parent(stat: Path) -> int | None:
    with suppress(OSError):  # the process ended
        return int(stat.read_text().rpartition(")")[2].split()[1])
    return None


def start_trial(values: dict[str, Any], **environment: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", TASK, json.dumps(values)], env=os.environ | environment)


def test_a_candidate_whose_process_is_killed_fails_and_the_task_does_not(
    values: dict[str, Any], tmp_path: Path
) -> None:
    process = start_trial(values)
    os.kill(wait_for_child(tmp_path / PLAN, process.pid) or process.pid, signal.SIGKILL)
    assert process.wait(30) == 0
    tried = json.loads((tmp_path / "tried" / "trial.json").read_text())
    assert tried["error"].startswith("its process was killed (signal 9), probably for want of memory; give prune.")
    assert (tried["name"], tried["losses"]) == ("a", [3.0])
    assert not list(tmp_path.glob("*.partial"))


def test_a_trial_that_is_ended_ends_its_process(values: dict[str, Any], tmp_path: Path) -> None:
    process = start_trial(values)
    child = wait_for_child(tmp_path / PLAN, process.pid)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert child and not Path(f"/proc/{child}").exists() and not (tmp_path / "tried").exists()


def test_after_attempts_whose_pods_were_killed_the_last_one_notes_it(values: dict[str, Any], tmp_path: Path) -> None:
    """Kubernetes lets the kernel kill all processes of a container, and a node may be lost."""
    process = start_trial(values, **{RETRIES: "1"})
    child = wait_for_child(tmp_path / PLAN, process.pid)
    process.kill()
    process.wait()
    wait_until(lambda: child and not Path(f"/proc/{child}").exists())
    assert start_trial(values, **{RETRIES: "1"}).wait(30) == 0
    tried = json.loads((tmp_path / "tried" / "trial.json").read_text())
    assert "its pod was ended before the work was done (attempts: 1)" in tried["error"] and tried["losses"] == [3.0]
    assert not list(tmp_path.glob("workspace/measurements/*"))
