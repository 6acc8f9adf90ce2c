"""HTTP as bytes on a socket: what no client library lets through."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.cluster import ServeProcess


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """One connection; `answer()` reads exactly one response from it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._stream = sock.makefile("rb")

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def answer(self, method: str = "GET") -> Answer:
        """The next response.

        Raises:
            ConnectionError: the connection ended first.
        """
        first = self._stream.readline()
        if not first:
            raise ConnectionError("closed without an answer")
        status = int(first.split()[1])
        headers: dict[str, str] = {}
        while (line := self._stream.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        size = 0 if method == "HEAD" or status < 200 else int(headers.get("content-length", 0))
        return Answer(status, headers, self._stream.read(size))

    def closed(self) -> bool:
        """True when the node ends the connection (waits for the socket's timeout)."""
        try:
            return self._stream.read(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    def request(
        self, method: str, target: str, body: bytes | None = None, head: str = ""
    ) -> Answer:
        """Send one request; `head` holds further header lines, each ended by CRLF."""
        length = "" if body is None else f"Content-Length: {len(body)}\r\n"
        text = f"{method} {target} HTTP/1.1\r\nHost: test\r\n{length}{head}\r\n"
        self.send(text.encode("latin-1") + (body or b""))
        return self.answer(method)

    def json(self, method: str, target: str, value: object) -> Answer:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        return self.request(method, target, data, "Content-Type: application/json\r\n")


@contextmanager
def wire(node: ServeProcess, timeout_s: float = 5.0) -> Iterator[Wire]:
    with socket.create_connection((node.host, node.port), timeout_s) as sock:
        connection = Wire(sock)
        with connection._stream:
            yield connection


def assert_error(answer: Answer, status: int, name: str) -> dict[str, Any]:
    """`answer` is this error in the shape that every error has; returns its JSON."""
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json"), answer
    body: dict[str, Any] = answer.json()
    assert body["error"] == name, body
    assert isinstance(body["code"], int)
    assert isinstance(body["retryable"], bool)
    assert isinstance(body["message"], str)
    assert len(body["message"]) > 5
    assert body["outcome"] in ("none", "unknown")
    assert isinstance(body["leader"]["id"], int), body  # known in all these tests
    return body
