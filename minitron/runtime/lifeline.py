"""The link between `minitron run` and its stage: the stage ends when `minitron run` gets a signal, or is gone.

`minitron run` holds the lock of a file. On a signal it shares the lock: the stage ends as after SIGTERM, and tells
MLflow. A second signal ends `minitron run` at once, which releases the lock, and the stage is killed. If `minitron run`
is killed without an earlier signal, the stage ends as after SIGTERM.
"""

import fcntl
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

__all__ = ["follow_run", "guide_stages", "is_guided"]

_LOCK = "MINITRON_RUN_LOCK"
"""Environment variable of a stage: the path of the file."""

_BY_TERMINAL = (signal.SIGINT, signal.SIGHUP)
"""Signals that a terminal sends to all its processes: on Ctrl-C, and when it closes."""


@contextmanager
def guide_stages() -> Iterator[list[signal.Signals]]:
    """Let the first SIGINT, SIGTERM or SIGHUP end the stage that runs in the block; yield a list for that signal.

    An ignored signal (`nohup` ignores SIGHUP) stays ignored.
    """
    arrived: list[signal.Signals] = []
    with tempfile.NamedTemporaryFile(prefix="minitron-run-") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def end_stage(number: int, frame: FrameType | None) -> None:
            for handled in handlers:
                signal.signal(handled, signal.SIG_DFL)
            arrived.append(signal.Signals(number))
            fcntl.flock(lock, fcntl.LOCK_SH)
            with suppress(OSError):  # the terminal may be gone; print is not reentrant
                os.write(2, f"{arrived[0].name}: the stage ends; a second signal ends it at once\n".encode())

        stops = [number for number in (*_BY_TERMINAL, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
        handlers = {number: signal.signal(number, end_stage) for number in stops}
        os.environ[_LOCK] = lock.name
        try:
            yield arrived
        finally:
            del os.environ[_LOCK]
            for number, handler in handlers.items():
                signal.signal(number, handler)


def is_guided() -> bool:
    """Say whether `minitron run` runs this stage."""
    return _LOCK in os.environ


def follow_run() -> None:
    """End this process, a stage, when `minitron run` shares or releases the lock; without `minitron run` do nothing."""
    if is_guided():
        for number in _BY_TERMINAL:  # `minitron run` also gets them, and decides
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=_end_with_run, args=[Path(os.environ[_LOCK])], daemon=True).start()


def _end_with_run(path: Path) -> None:
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            gone = _take_lock(lock.fileno())
            _terminate()
            if not gone:
                fcntl.flock(lock, fcntl.LOCK_EX)
                os.kill(os.getpid(), signal.SIGKILL)
    except FileNotFoundError:  # `minitron run` ended before this process began
        _terminate()


def _take_lock(descriptor: int) -> bool:
    """Take the lock exclusively; return False if `minitron run` shares it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _terminate() -> None:
    """Send SIGTERM to the main thread, which interrupts a waiting call."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
