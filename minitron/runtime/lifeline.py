"""Between `minitron run` and the stage that it runs: the stage ends when `minitron run` is told to end, or is gone.

`minitron run` holds the lock of a file. A signal makes it share the lock, and the stage ends as by SIGTERM: it tells
MLflow. A second signal ends `minitron run` at once, which drops the lock, and the stage is killed. If `minitron run`
is killed without a signal before, the stage ends as by SIGTERM.
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
"""What a terminal sends to all its processes: Ctrl-C, and its end."""


@contextmanager
def guide_stages() -> Iterator[list[signal.Signals]]:
    """Let the first SIGINT, SIGTERM or SIGHUP end the stage that runs in the block; yield the list that gets it.

    A signal that is ignored, as `nohup` does with SIGHUP, stays ignored.
    """
    arrived: list[signal.Signals] = []
    with tempfile.NamedTemporaryFile(prefix="minitron-run-") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def end_stage(number: int, frame: FrameType | None) -> None:
            for handled in handlers:
                signal.signal(handled, signal.SIG_DFL)
            arrived.append(signal.Signals(number))
            fcntl.flock(lock, fcntl.LOCK_SH)
            with suppress(OSError):  # the terminal may be gone; print could be interrupted by itself
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
    """End this process, a stage, when `minitron run` shares or drops the lock; without one, do nothing."""
    if is_guided():
        for number in _BY_TERMINAL:  # `minitron run` gets them, too, and decides
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
    """Take the lock for this process alone; return False if `minitron run` shares it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _terminate() -> None:
    """Send SIGTERM to the main thread: a call that it waits in is interrupted."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
