"""Send messages to a server from a separate thread; keep them in a file while the server is not available.

A message is one request, in JSON. `put` never waits: the thread sends messages in order, within two seconds. Messages
that cannot be sent are appended to a file that outlives the process; the process locks the file while it runs.
`deliver_messages` sends the files of ended processes. If the answer to a message is lost, the message is sent again, so
every message must be idempotent.
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

__all__ = ["Message", "Outbox", "deliver_messages"]

Message = dict[str, Any]
Send = Callable[[Message], None]

_INTERVAL_SECONDS, _PAUSE_SECONDS, _SILENCE_SECONDS = 2, 10, 60
_SENDING_SECONDS = 12
"""Seconds that `close` waits for a request under way: more than the time limit of a request."""

_POINTS = 1000
"""MLflow's limit of metrics per request."""


class Outbox:
    """The messages of one process to a server; neighboring `points` of the same `run` share a request."""

    def __init__(
        self, path: Path, send: Send, complain: Callable[[Exception], None], make_sign: Callable[[], Message]
    ) -> None:
        """Start the thread.

        Args:
            path: file for unsent messages, created when needed; `deliver_messages` sorts files by name.
            send: makes one request; if it raises, the server is not available, and the next attempt follows a pause.
            complain: called with the error when the server becomes unavailable.
            make_sign: makes a sign of life of the process; the server gets one per minute.
        """
        self._path, self._send, self._complain, self._make_sign = path, send, complain, make_sign
        self._queued: deque[Message] = deque()
        self._unsent: list[Message] = []
        self._file: TextIO | None = None
        self._silent_until, self._away, self._closed = 0.0, False, False
        self._next_sign = time.monotonic() + _SILENCE_SECONDS
        self._sending, self._ending = threading.Lock(), threading.Event()
        threading.Thread(target=self._run, daemon=True, name="outbox").start()

    def put(self, message: Message) -> None:
        """Queue a message; the thread sends it soon."""
        self._queued.append(message)

    def flush(self) -> bool:
        """Send all queued messages, or store them; say whether all arrived."""
        if self._sending.acquire(timeout=_SENDING_SECONDS):  # else a request of the thread is hanging
            try:
                self._send_queued()
            finally:
                self._sending.release()
        return not (self._file or self._queued)

    def store(self) -> None:
        """Move all queued messages to the file, which survives a kill; they are sent from there."""
        if self._sending.acquire(timeout=_SENDING_SECONDS):
            try:
                self._store_messages(self._take_queued())
            finally:
                self._sending.release()

    def close(self, first: Iterable[Message]) -> bool:
        """Send `first`, then the queued messages, or store them; end the thread; say whether all arrived."""
        self._ending.set()
        self._queued.extendleft(reversed(list(first)))
        arrived = self.flush()
        self._closed = True
        self._store_messages([*self._unsent, *self._take_queued()])
        if self._file:
            self._file.close()
        return arrived

    def _run(self) -> None:
        while not self._ending.wait(_INTERVAL_SECONDS):
            if not self._away and time.monotonic() >= self._next_sign:
                self._next_sign = time.monotonic() + _SILENCE_SECONDS
                self.put(self._make_sign())
            with self._sending:
                if time.monotonic() >= self._silent_until:
                    self._send_queued()
                else:
                    self._store_messages(self._take_queued())

    def _take_queued(self) -> list[Message]:
        return [self._queued.popleft() for _ in range(len(self._queued))]

    def _send_queued(self) -> None:
        """Send stored messages, then queued ones; store them if the server is not available."""
        self._unsent = list(_merge_points(self._take_queued()))
        try:
            self._send_stored()
            while self._unsent:
                self._send(self._unsent[0])
                del self._unsent[0]
            self._away = False
        except Exception as error:
            self._store_unsent(error)

    def _store_unsent(self, error: Exception) -> None:
        if self._closed:
            return  # `close` did not wait for this request, and has stored it
        if not self._away:
            self._complain(error)
        self._away, self._silent_until = True, time.monotonic() + _PAUSE_SECONDS
        self._store_messages(self._unsent)
        self._unsent = []

    def _send_stored(self) -> None:
        if self._file:
            self._file.seek(0)
            for message in _read_messages(self._file):
                self._send(message)
            self._path.unlink(missing_ok=True)  # without locks, another process may have sent and deleted it
            self._file.close()
            self._file = None

    def _store_messages(self, messages: list[Message]) -> None:
        """Append messages to the file; if the disk fails, queue them in memory for the next attempt."""
        try:
            if messages:
                self._file = self._file or self._create_file()
                self._file.seek(0, 2)
                self._file.write(
                    "\n".join(["", *(json.dumps(message, allow_nan=False) for message in _merge_points(messages)), ""])
                )
                self._file.flush()
        except OSError as error:
            self._complain(error)
            self._queued.extendleft(reversed(messages))

    def _create_file(self) -> TextIO:
        """Create the file. It gets its name when it is locked, so that no other process treats it as a leftover."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        stream = temporary.open("a+")
        _lock_file(stream)
        temporary.rename(self._path)
        return stream


def deliver_messages(directory: Path, send: Send) -> None:
    """Send the files of ended processes in a directory, the earliest first; delete a file when all has arrived."""
    for path in sorted(directory.glob("*.jsonl")):
        try:
            stream = path.open("r+")
        except FileNotFoundError:
            continue  # another process was faster
        with stream:
            if _lock_file(stream):
                for message in _read_messages(stream):
                    send(message)
                path.unlink(missing_ok=True)


def _lock_file(stream: TextIO) -> bool:
    """Lock a file until it is closed, if the file system has locks; return False if another process holds it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def _read_messages(stream: TextIO) -> Iterator[Message]:
    """Yield the messages of a file; skip a line that is incomplete because of a kill or a full disk."""
    for line in stream:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _merge_points(messages: list[Message]) -> Iterator[Message]:
    """Merge neighboring points of the same run into as few messages as the limit allows."""
    for (run, has_points), group in groupby(messages, lambda message: (message["run"], "points" in message)):
        if not has_points:
            yield from group
            continue
        points = [point for message in group for point in message["points"]]
        for start in range(0, len(points), _POINTS):
            yield {"run": run, "points": points[start : start + _POINTS]}
