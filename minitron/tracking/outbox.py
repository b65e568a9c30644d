"""Messages that reach a server in the end: sent by a thread of their own, kept in a file while it is away.

A message is one request, in JSON. Who puts it never waits: it goes out within two seconds, in its turn. What cannot be
sent is appended to a file that outlives the process, which locks it for as long as it lives; `deliver` sends what
processes that ended left. A message whose answer is lost is sent again, so a second arrival must not matter.
"""

import errno
import fcntl
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

__all__ = ["Message", "Outbox", "deliver"]

Message = dict[str, Any]
Send = Callable[[Message], None]

_INTERVAL_SECONDS, _PAUSE_SECONDS = 2, 10
_TURN_SECONDS = 12
"""How long the end waits for a request under way: more than its time limit."""

_POINTS = 1000
"""MLflow's limit of metrics per request."""


class Outbox:
    """What one process has to say to a server; `points` of the same `run` go together."""

    def __init__(self, path: Path, send: Send, complain: Callable[[Exception], None]) -> None:
        """Start the thread.

        Args:
            path: file that is made when it is needed; `deliver` takes those of a directory in the order of their names.
            send: makes one request; it raises where the server is away, and then nothing is tried for a while.
            complain: gets the error when the server goes away.
        """
        self._path, self._send, self._complain = path, send, complain
        self._waiting: deque[Message] = deque()
        self._unsent: list[Message] = []
        self._kept: TextIO | None = None
        self._silent_until, self._away, self._closed = 0.0, False, False
        self._turn, self._ending = threading.Lock(), threading.Event()
        threading.Thread(target=self._run, daemon=True, name="outbox").start()

    def put(self, message: Message) -> None:
        """Take a message; it is sent soon."""
        self._waiting.append(message)

    def flush(self) -> bool:
        """Send all that waits, or keep it; say whether all arrived."""
        if self._turn.acquire(timeout=_TURN_SECONDS):  # else the server hangs in the thread
            try:
                self._pass_on()
            finally:
                self._turn.release()
        return not (self._kept or self._waiting)

    def close(self, first: Iterable[Message]) -> bool:
        """Send the rest, `first` before what waits, or keep it; end the thread; say whether all arrived."""
        self._ending.set()
        self._waiting.extendleft(reversed(list(first)))
        arrived = self.flush()
        self._closed = True
        self._keep([*self._unsent, *self._taken()])
        if self._kept:
            self._kept.close()
        return arrived

    def _run(self) -> None:
        while not self._ending.wait(_INTERVAL_SECONDS):
            with self._turn:
                if time.monotonic() >= self._silent_until:
                    self._pass_on()
                else:
                    self._keep(self._taken())

    def _taken(self) -> list[Message]:
        return [self._waiting.popleft() for _ in range(len(self._waiting))]

    def _pass_on(self) -> None:
        """Send what is kept, then what waits; keep it if that fails."""
        self._unsent = list(_together(self._taken()))
        try:
            self._send_kept()
            while self._unsent:
                self._send(self._unsent[0])
                del self._unsent[0]
            self._away = False
        except Exception as error:
            self._put_off(error)

    def _put_off(self, error: Exception) -> None:
        if self._closed:
            return  # the end did not wait for this request, and has kept it
        if not self._away:
            self._complain(error)
        self._away, self._silent_until = True, time.monotonic() + _PAUSE_SECONDS
        self._keep(self._unsent)
        self._unsent = []

    def _send_kept(self) -> None:
        if self._kept:
            self._kept.seek(0)
            for message in _messages(self._kept):
                self._send(message)
            self._path.unlink(missing_ok=True)  # without locks another process may have sent it
            self._kept.close()
            self._kept = None

    def _keep(self, messages: list[Message]) -> None:
        """Append to the file, or, where the disk refuses, leave the messages in memory for the next try."""
        try:
            if messages:
                self._kept = self._kept or self._created()
                self._kept.seek(0, 2)
                self._kept.write("\n".join(["", *(json.dumps(message) for message in _together(messages)), ""]))
                self._kept.flush()
        except OSError as error:
            self._complain(error)
            self._waiting.extendleft(reversed(messages))

    def _created(self) -> TextIO:
        """Return the new file; it gets its name when it is locked, so that nobody takes it for one that was left."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        stream = temporary.open("a+")
        _lock(stream)
        temporary.rename(self._path)
        return stream


def deliver(directory: Path, send: Send) -> None:
    """Send what processes that ended left in a directory, the earliest first; a file goes when all of it arrived."""
    for path in sorted(directory.glob("*.jsonl")):
        try:
            stream = path.open("r+")
        except FileNotFoundError:
            continue  # another process was faster
        with stream:
            if _lock(stream):
                for message in _messages(stream):
                    send(message)
                path.unlink(missing_ok=True)


def _lock(stream: TextIO) -> bool:
    """Lock a file until it is closed, where the file system has locks; False if another process holds it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def _messages(stream: TextIO) -> Iterator[Message]:
    """Read the messages of a file; a kill or a full disk may have cut off a line."""
    for line in stream:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _together(messages: list[Message]) -> Iterator[Message]:
    """Put the points of neighbours for the same run into as few messages as the limit allows."""
    for (run, has_points), group in groupby(messages, lambda message: (message["run"], "points" in message)):
        if not has_points:
            yield from group
            continue
        points = [point for message in group for point in message["points"]]
        for start in range(0, len(points), _POINTS):
            yield {"run": run, "points": points[start : start + _POINTS]}
