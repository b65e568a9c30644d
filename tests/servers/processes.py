"""Processes of a test: several at a time, or a server until the test ends."""

import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Call a condition until it returns something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not there after {seconds} seconds")
        time.sleep(0.05)
    return result


@contextmanager
def run_server(
    command: list[str], directory: Path, uri: str, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen]:
    """Run a server in a directory until the block ends; it is healthy when the block begins."""
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=directory, start_new_session=True
        )
    try:
        wait_until_healthy(uri, directory / "log")
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_healthy(uri: str, log: Path) -> None:
    for _ in range(2400):
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(log.read_text())
