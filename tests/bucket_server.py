"""Google Cloud Storage over HTTP: gcp-storage-emulator, and before it a proxy that does what the emulator leaves out.

The proxy holds writes and reads to their generation preconditions, counts the bytes of the objects that pass, and makes
faults: connections that are cut, bytes that are damaged, a bucket that may only be read.
"""

import http.client
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlparse

import pytest
from conftest import free_port
from gcp_storage_emulator.server import create_server
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

_KEPT_BY_SENDER = {"connection", "content-length", "date", "server", "transfer-encoding"}


class BucketServer:
    """The bucket `bucket`, what passed, and what shall go wrong."""

    def __init__(self, emulator: int) -> None:
        self.emulator, self.url = emulator, ""
        self.uploaded = self.downloaded = 0
        self.stored: list[str] = []
        """Names of the objects, in the order in which they were written."""
        self.cut: Callable[[str, str], bool] = lambda method, name: False
        """Says whether the connection is cut instead of an answer."""
        self.before: Callable[[str, str], None] = lambda method, name: None
        """Called before a request is passed on."""
        self.read_only = self.damaging = False
        self.delay = 0.0
        self._lock = Lock()

    def put(self, name: str, content: bytes | str) -> None:
        """Write an object past the proxy."""
        self.client(f"http://127.0.0.1:{self.emulator}").bucket("bucket").blob(name).upload_from_string(content)

    def names(self, prefix: str = "") -> list[str]:
        client = self.client(f"http://127.0.0.1:{self.emulator}")
        return [blob.name for blob in client.list_blobs("bucket", prefix=prefix)]

    def client(self, endpoint: str) -> storage.Client:
        options = {"api_endpoint": endpoint}
        return storage.Client(project="test", credentials=AnonymousCredentials(), client_options=options)

    def generation(self, name: str) -> int:
        status, _, body = self.ask("GET", f"/storage/v1/b/bucket/o/{quote(name, safe='')}", b"", {})
        return int(json.loads(body)["generation"]) if status == 200 else 0

    def ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.emulator)
        connection.request(method, path, body or None, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), content

    def count(self, uploaded: int = 0, downloaded: int = 0, name: str = "") -> None:
        with self._lock:
            self.uploaded += uploaded
            self.downloaded += downloaded
            if name:
                self.stored.append(name)


class _Handler(BaseHTTPRequestHandler):
    state: BucketServer
    protocol_version = "HTTP/1.1"

    def _respond(self) -> None:
        state, url = self.state, urlparse(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        name = self._name(url.path, query, body)
        state.before(self.command, name)
        time.sleep(state.delay)
        if state.cut(self.command, name):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if state.read_only and self.command != "GET":
            return self._refuse(403, "minitron-tasks does not have storage.objects.create access")
        if name and (fault := self._broken_precondition(name, query)):
            return self._refuse(*fault)
        self._pass_on(name, query, body)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _respond

    def _name(self, path: str, query: dict[str, str], body: bytes) -> str:
        if match := re.search(r"/b/bucket/o/(.+)", path):
            return unquote(match.group(1))
        if "name" in query:
            return query["name"]
        match_in_body = re.search(rb'"name": ?"([^"]+)"', body[:2000]) if path.startswith("/upload") else None
        return match_in_body.group(1).decode() if match_in_body else ""

    def _broken_precondition(self, name: str, query: dict[str, str]) -> tuple[int, str] | None:
        if (wanted := query.get("ifGenerationMatch")) and int(wanted) != self.state.generation(name):
            return 412, "At least one of the pre-conditions you specified did not hold."
        if (wanted := query.get("generation")) and int(wanted) != self.state.generation(name):
            return 404, f"No such object: bucket/{name}"
        return None

    def _pass_on(self, name: str, query: dict[str, str], body: bytes) -> None:
        state, is_upload = self.state, self.path.startswith("/upload")
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")}
        status, answered, content = state.ask(self.command, self.path, body, headers)
        if is_upload and status == 200 and (query.get("uploadType") == "multipart" or self.command == "PUT"):
            state.count(uploaded=len(body), name=name or json.loads(content or b"{}").get("name", ""))
        elif is_upload and self.command == "PUT":
            state.count(uploaded=len(body))
        if query.get("alt") == "media" and status in (200, 206):
            state.count(downloaded=len(content))
            if state.damaging and content:
                content = bytes([content[0] ^ 1]) + content[1:]
        elif query.get("alt") != "media":  # where an object is to be had
            content = content.replace(f":{state.emulator}/".encode(), f":{urlparse(state.url).port}/".encode())
        self._send(status, answered, content)

    def _refuse(self, status: int, message: str) -> None:
        content = json.dumps({"error": {"code": status, "message": message}}).encode()
        self._send(status, [("Content-Type", "application/json")], content)

    def _send(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response(status)
        for key, value in headers:
            if key.lower() not in _KEPT_BY_SENDER:
                self.send_header(key, value.replace(f"127.0.0.1:{self.state.emulator}", self.headers["Host"]))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def bucket_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketServer]:
    """Serve until the block ends, for this process and those that it starts."""
    port = free_port()
    emulator = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    emulator.start()
    state = BucketServer(port)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", state.url)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "test")
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        emulator.stop()
