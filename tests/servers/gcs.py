"""gcp-storage-emulator with what it lacks: preconditions, pinned generations, parallel requests, faults, counts.

Answers and faults are those of googleapis/storage-testbench 0.45.0:

    the status of a precondition, 404 before 412           testbench/common.py make_json_preconditions,
                                                           testbench/database.py insert_object, __get_object
    a resumable upload is checked when it ends, gets its   testbench/rest_server.py resumable_upload_chunk
    generation then, may send bytes again, and answers
    again after its end
    an upload with another checksum is refused             gcs/object.py init_multipart, gcs/upload.py
    503 or a broken connection before a request works,     testbench/common.py handle_retry_test_instruction
    a broken answer after it worked, a stall
    a wrong byte                                           testbench/common.py corrupt_media

Two things differ. A replaced generation is gone, as in a bucket without versioning; the testbench keeps it. A wrong
checksum is answered with 400, as the emulator does it, not with 412. A precondition other than ifGenerationMatch is
answered with 501, so that none is passed over.

`World.fault` returns the fault for a request: a status to answer with; CUT: the connection breaks before an upload
arrives, or in the middle of an answer; LOST: it breaks after the request worked, before the answer; STALL: the answer
hangs in its middle; DAMAGE: a byte of the object is wrong.
"""

import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator.exceptions import Conflict
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler, Router
from gcp_storage_emulator.storage import Storage

CUT, LOST, STALL, DAMAGE = "cut", "lost", "stall", "damage"


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
    finished: dict[str, bytes] = field(default_factory=dict)
    """The answers of the resumable uploads that ended, by their ids."""

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
    """Storage that creates an object only if its generation and its content are those that the request expects."""

    expected: str | None = None
    checksum: str | None = None

    def create_file(self, bucket_name: str, file_name: str, content: bytes, resource: Any, *arguments: Any) -> None:
        there = self.objects.get(bucket_name, {}).get(file_name, {}).get("generation", 0)
        if self.expected not in (None, str(there)):
            raise _FailedPrecondition
        if self.checksum and f"crc32c={resource['crc32c']}" not in self.checksum.split(","):
            raise Conflict(f"{file_name} did not come as its CRC32C says")
        generation = str(time.time_ns())  # a resumable upload had one since its beginning
        resource["mediaLink"] = resource["mediaLink"].replace(resource["generation"], generation)
        resource["generation"] = generation
        super().create_file(bucket_name, file_name, content, resource, *arguments)

    def add_to_resumable_upload(
        self, file_id: str, content: bytes, total_size: int | None = None, expected_start: int | None = None
    ) -> bytes | None:
        if expected_start is not None:  # bytes that came before are sent again if the answer was lost
            received = self.get_resumable_byte_count(file_id)
            content, expected_start = content[received - expected_start :], max(expected_start, received)
        return super().add_to_resumable_upload(file_id, content, total_size, expected_start)

    def _write_config_to_file(self) -> None:
        """Everything stays in memory; the emulator would write the list of all objects at each change."""


class _Handler(RequestHandler):
    def __init__(self, world: World, *arguments: Any) -> None:
        self.world = world
        super().__init__(world.storage, *arguments)

    def handle_method(self, method: str) -> None:
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_upload = url.path.startswith("/upload")
        path = f"{unquote(url.path)}/{_uploaded_name(query, body)}" if is_upload else unquote(url.path)
        request = Request(method, path, len(body) if is_upload else 0)
        fault = self.world.fault(request)
        if fault == CUT and is_upload:
            self.world.log.append(request)
            self.connection.close()
            return
        if fault == DAMAGE and is_upload:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        answer = self._answer(method, url.path, query, body) if not isinstance(fault, int) else self._error(fault)
        if "/o/" in url.path and query.get("alt") == "media" and b" 20" in answer[:12]:
            request.downloaded = len(answer.partition(b"\r\n\r\n")[2])
        self.world.log.append(request)
        self._send(answer, None if is_upload and fault == DAMAGE else fault)

    def do_GET(self) -> None:
        self.handle_method("GET")

    def do_POST(self) -> None:
        self.handle_method("POST")

    def do_PUT(self) -> None:
        self.handle_method("PUT")

    def do_DELETE(self) -> None:
        self.handle_method("DELETE")

    def _answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> bytes:
        """Let the emulator answer, with preconditions checked before."""
        bucket, _, name = unquote(path).partition("/b/")[2].partition("/o/")
        expected, upload = query.get("ifGenerationMatch"), query.get("upload_id", "")
        if any(key.startswith("if") and key != "ifGenerationMatch" for key in query):
            return self._error(501)
        with self.world.lock:
            generation = self.world.generation(bucket, name)
            if name and (generation == "0" or query.get("generation") not in (None, generation)):
                return self._error(404)
            if name and expected not in (None, generation):
                return self._error(412)
            if upload in self.world.finished:
                return self.world.finished[upload]
            self.world.storage.expected, self.world.storage.checksum = expected, self.headers.get("x-goog-hash")
            self.rfile, sent, self.wfile = io.BytesIO(body), self.wfile, io.BytesIO()
            try:
                Router(self).handle(method)
                answer = self.wfile.getvalue()
            except _FailedPrecondition:
                return self._error(412)
            finally:
                self.wfile = sent
            if query.get("alt") == "media":  # gcs/object.py rest_media
                answer = answer.replace(b"\r\n", f"\r\nX-Goog-Generation: {generation}\r\n".encode(), 1)
            if upload and b" 200 " in answer[:13]:
                self.world.finished[upload] = answer
            return answer

    def _error(self, status: int) -> bytes:
        return f"HTTP/1.0 {status} Refused\r\nContent-Length: 0\r\n\r\n".encode()

    def _send(self, answer: bytes, fault: Any) -> None:
        if fault == DAMAGE:
            answer = answer[:-1] + bytes([answer[-1] ^ 1])
        middle = (len(answer) + answer.index(b"\r\n\r\n") + 4) // 2  # of the body, as the testbench cuts it
        part = {LOST: 0, CUT: middle, STALL: middle}.get(fault, len(answer))
        try:
            self.wfile.write(answer[:part])
            self.wfile.flush()
            if fault == STALL:
                self.world.stalled.set()
                self.world.released.wait(60)
        except OSError:
            return


def _uploaded_name(query: dict[str, str], body: bytes) -> str:
    """Return the name of the object that a request uploads: from its session, or from the metadata in its body."""
    if "upload_id" in query:
        return query["upload_id"].split(":")[1]
    found = re.search(rb'"name": "([^"]+)"', body[:1000])
    return found[1].decode() if found else query.get("name", "")


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
