"""JSON over HTTP from the state of a test, with faults: what the servers of these tests share."""

import json
import socket
import ssl
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlparse

CUT, HALF = 0, 1
"""Faults besides a status: the connection is cut before the answer, or in the middle of it."""


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class State(ABC):
    """What a server knows; a subclass answers from it."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[str] = []
        self.faults: list[int] = []
        """What becomes of the next requests: CUT, HALF, a status, or 200: they are answered."""
        self.broken: list[Exception] = []
        """What `answer` raised beside Refused: the end of the block raises the first."""

    @abstractmethod
    def answer(self, method: str, path: str, query: dict[str, str], data: bytes, headers: Any) -> Any:
        """Return text, or what becomes JSON; or raise Refused."""

    def error(self, status: int, message: str) -> Any:
        """Return the content of an error."""
        return {"message": message, "code": status}


S = TypeVar("S", bound=State)


class _Handler(BaseHTTPRequestHandler):
    state: State
    protocol_version = "HTTP/1.1"

    def _respond(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlparse(self.path)
        self.state.requests.append(f"{self.command} {url.path}")
        fault = self.state.faults.pop(0) if self.state.faults else 200
        if fault == CUT:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault > 200:
            return self._send(fault, self.state.error(fault, "out of order"))
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        try:
            content = self.state.answer(self.command, url.path, query, data, self.headers)
        except Refused as refusal:
            return self._send(refusal.status, self.state.error(refusal.status, str(refusal)))
        except Exception as error:  # an assertion fails no test in this thread
            self.state.broken.append(error)
            raise
        self._send(200, content, half=fault == HALF)

    do_GET = do_POST = do_DELETE = _respond

    def _send(self, status: int, content: Any, half: bool = False) -> None:
        text = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text[: len(text) // 2] if half else text)
        self.close_connection = self.close_connection or half

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def http_server(state: S, certificate: tuple[Path, Path] | None = None) -> Iterator[S]:
    """Serve until the block ends, by TLS with a certificate and its key; raise what the server could not answer."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    state.url = f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
    if state.broken:
        raise state.broken[0]


class Page(State):
    """The same text for every request."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__()
        self._status, self._text = status, text

    def answer(self, method: str, path: str, query: dict[str, str], data: bytes, headers: Any) -> Any:
        if self._status != 200:
            raise Refused(self._status, self._text)
        return self._text

    def error(self, status: int, message: str) -> Any:
        return message
