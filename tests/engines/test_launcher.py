"""Workers started by torchrun: they work together, explain their failures, and end with their parent."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minitron.engines.launcher import launch
from minitron.errors import ConfigError, RunError
from tests.constants import REPOSITORY

WORKER = "tests.servers.launcher_worker"


@pytest.fixture(autouse=True)
def worker_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def test_the_workers_are_one_group_and_are_followed(tmp_path: Path) -> None:
    calls = []
    launch(WORKER, {"job": "add"}, tmp_path, 2, lambda: calls.append(len(list(tmp_path.glob("rank*")))))
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["3", "3"]
    assert calls[0] == 0 and calls[-1] == 2, "followed while they work, and once after their end"


@pytest.mark.parametrize(
    ("job", "kind", "message"),
    [
        ("fail", RunError, r"^fail: ValueError: no such layer; see the log .*fail.log$"),
        ("refuse", ConfigError, r"^size 3: too odd; choose 4$"),
        ("memory", RunError, r"out of memory; lower micro_batch_size, set gradient_checkpointing"),
        ("die", RunError, r"^die: a worker was killed from outside; see the log .*die.log; if .* out of memory"),
    ],
)
def test_a_failure_is_one_line(tmp_path: Path, job: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        launch(WORKER, {"job": job}, tmp_path, 2)
    assert (tmp_path / f"{job}.log").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_workers_end_with_their_parent(tmp_path: Path, number: int) -> None:
    program = (
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from minitron.engines.launcher import launch\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"launch('{WORKER}', {{'job': 'wait'}}, Path({str(tmp_path)!r}), 2)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    _wait(lambda: len(list(tmp_path.glob("waiting-*"))) == 2)
    workers = [int(path.name.removeprefix("waiting-")) for path in tmp_path.glob("waiting-*")]
    parent.send_signal(number)
    parent.wait()
    _wait(lambda: not any(_is_running(worker) for worker in workers))


def _is_running(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().split(")")[1]
    except OSError:
        return False


def _wait(condition: object) -> None:
    for _ in range(600):
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.1)
    raise TimeoutError(condition)
