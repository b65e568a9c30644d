"""Signals to a run whose stage does not end by itself, with real processes of two lines."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.servers.processes import wait_until

STAGE = """
import signal, sys, time
from pathlib import Path
from minitron.runtime import lifeline
directory = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (directory / "asked").touch())
lifeline.follow_run()
(directory / "stage").touch()
while not (directory / "end").exists():
    time.sleep(0.02)
"""
RUN = f"""
import subprocess, sys
from minitron.runtime import lifeline
with lifeline.guide_stages() as signals:
    subprocess.run([sys.executable, "-c", {STAGE!r}, sys.argv[1]])
print(*signals)
"""


@contextmanager
def running(directory: Path, *, nohup: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Run both processes, in a session of their own, as a terminal has them, even if the tests run without one."""

    def set_signals() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(directory)],
        stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=set_signals,
    )  # fmt: skip
    try:
        wait_until(lambda: (directory / "stage").exists())
        yield process
    finally:
        (directory / "end").touch()
        process.communicate()


def has_ended(session: int) -> bool:
    return not subprocess.run(["ps", "-o", "pid=", "-s", str(session)], capture_output=True, text=True).stdout


@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_second_signal_ends_both_at_once(tmp_path: Path, send: type[os.kill]) -> None:
    with running(tmp_path) as process:
        send(process.pid, signal.SIGINT)
        wait_until(lambda: (tmp_path / "asked").exists())
        time.sleep(0.1)
        assert process.poll() is None
        send(process.pid, signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT
        wait_until(lambda: has_ended(process.pid), 10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_a_stage_has_the_time_that_it_takes_to_end(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path) as process:
        process.send_signal(number)
        wait_until(lambda: (tmp_path / "asked").exists())
    assert process.returncode == 0 and process.stdout and process.poll() == 0


def test_under_nohup_a_closed_terminal_ends_nothing(tmp_path: Path) -> None:
    with running(tmp_path, nohup=True) as process:
        os.killpg(process.pid, signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None and not (tmp_path / "asked").exists()
