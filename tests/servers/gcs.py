"""gcp-storage-emulator with additions: preconditions, pinned generations, parallel requests, faults, counts.

`World.fault` returns the fault for a request: a status to answer with, CUT (the connection breaks in the middle),
STALL (it hangs there) or DAMAGE (a byte is wrong).
"""

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler, Router
from gcp_storage_emulator.storage import Storage

CUT, STALL, DAMAGE = "cut", "stall", "damage"


@dataclass
class Request:
    """One request, with the bytes of an object that it uploaded or downloaded."""

    method: str
    path: str
    uploaded: int
    downloaded: int = 0


@dataclass
class World:
    """The state of the server: the stored objects, the requests, the faults."""

    storage: Any
    address: str = ""
    log: list[Request] = field(default_factory=list)
    fault: Callable[[Request], Any] = lambda request: None
    lock: Any = field(default_factory=threading.RLock)
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def generation(self, bucket: str, name: str) -> str:
        return str(self.storage.objects.get(bucket, {}).get(name, {}).get("generation", 0))

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self.storage.objects.get("bucket", {}) if name.startswith(prefix))

    def put(self, name: str, content: bytes | Path) -> None:
        from google.cloud import storage

        blob = storage.Client().bucket("bucket").blob(name)
        blob.upload_from_string(content if isinstance(content, bytes) else content.read_bytes())

    @property
    def uploaded(self) -> int:
        return sum(request.uploaded for request in self.log)

    @property
    def downloaded(self) -> int:
        return sum(request.downloaded for request in self.log)

    def fetched(self) -> list[str]:
        """Return the downloaded objects, once per request."""
        return [entry.path.partition("/o/")[2] for entry in self.log if entry.downloaded]


class _FailedPrecondition(Exception):
    pass


class _CheckedStorage(Storage):
    """Storage that creates an object only if its generation is the one that the request expects."""

    expected: str | None = None

    def create_file(self, bucket_name: str, file_name: str, *arguments: Any) -> None:
        there = self.objects.get(bucket_name, {}).get(file_name, {}).get("generation", 0)
        if self.expected not in (None, str(there)):
            raise _FailedPrecondition
        super().create_file(bucket_name, file_name, *arguments)


class _Handler(RequestHandler):
    def __init__(self, world: World, *arguments: Any) -> None:
        self.world = world
        super().__init__(world.storage, *arguments)

    def handle_method(self, method: str) -> None:
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_upload = url.path.startswith("/upload")
        request = Request(method, unquote(url.path), len(body) if is_upload else 0)
        fault = self.world.fault(request)
        if fault == CUT and is_upload:
            self.world.log.append(request)
            self.connection.close()
            return
        answer = self._answer(method, url.path, query, body) if not isinstance(fault, int) else self._error(fault)
        if "/o/" in url.path and query.get("alt") == "media" and b" 20" in answer[:12]:
            request.downloaded = len(answer.partition(b"\r\n\r\n")[2])
        self.world.log.append(request)
        self._send(answer, fault)

    def do_GET(self) -> None:
        self.handle_method("GET")

    def do_POST(self) -> None:
        self.handle_method("POST")

    def do_PUT(self) -> None:
        self.handle_method("PUT")

    def do_DELETE(self) -> None:
        self.handle_method("DELETE")

    def _answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> bytes:
        """Let the emulator answer, with generations checked before."""
        bucket, _, name = unquote(path).partition("/b/")[2].partition("/o/")
        expected = query.get("ifGenerationMatch")
        with self.world.lock:
            if name and query.get("generation") not in (None, self.world.generation(bucket, name)):
                return self._error(404)
            if name and expected not in (None, self.world.generation(bucket, name)):
                return self._error(412)
            self.world.storage.expected = expected
            self.rfile, sent, self.wfile = io.BytesIO(body), self.wfile, io.BytesIO()
            try:
                Router(self).handle(method)
                return self.wfile.getvalue()
            except _FailedPrecondition:
                return self._error(412)
            finally:
                self.wfile, self.world.storage.expected = sent, None

    def _error(self, status: int) -> bytes:
        return f"HTTP/1.0 {status} Refused\r\nContent-Length: 0\r\n\r\n".encode()

    def _send(self, answer: bytes, fault: Any) -> None:
        if fault == DAMAGE:
            answer = answer[:-1] + bytes([answer[-1] ^ 1])
        half = len(answer) // 2 if fault in (CUT, STALL) else len(answer)
        try:
            self.wfile.write(answer[:half])
            self.wfile.flush()
            if fault == STALL:
                self.world.stalled.set()
                self.world.released.wait(60)
        except OSError:
            return


@contextmanager
def serving_bucket() -> Iterator[World]:
    """Run the server with one empty bucket named `bucket`."""
    world = World(_CheckedStorage(use_memory_fs=True))
    buckets.create_bucket("bucket", world.storage)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, world))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    world.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield world
    finally:
        world.released.set()
        server.shutdown()
        server.server_close()
