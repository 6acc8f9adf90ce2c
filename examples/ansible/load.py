"""Clients beside a playbook: writers that never retry, and an eye on the membership."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import select
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

REQUEST_S = 10.0
READY_EVERY_S = 0.2
RESET_S = 1.0  # within that a reset is here


def request(
    endpoint: str, method: str, path: str, token: str, body: bytes | None = None
) -> tuple[int, bytes]:
    """One HTTP exchange: (status, body). Raises OSError or HTTPException when there is none."""
    connection = http.client.HTTPConnection(endpoint, timeout=REQUEST_S)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Authorization": f"Bearer {token}"})
        response = connection.getresponse()
        return response.status, response.read()


class Clients:
    """What all clients share: the endpoints that are ready, and the token once there is one.

    Args:
        endpoints: all that there will be; one is used as soon as it says that it is ready.
        secrets: the file that the playbook generates.
    """

    def __init__(self, endpoints: list[str], secrets: Path) -> None:
        self.ready: list[str] = []
        self.stopping = threading.Event()
        self._endpoints = endpoints
        self._secrets = secrets
        self._looking = threading.Thread(target=self._look, daemon=True)
        self._looking.start()

    @property
    def token(self) -> str:
        try:
            return str(json.loads(self._secrets.read_text())["token"])
        except (OSError, ValueError):
            return ""

    def _look(self) -> None:
        while not self.stopping.wait(READY_EVERY_S) and len(self.ready) < len(self._endpoints):
            for endpoint in self._endpoints:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    is_new = endpoint not in self.ready
                    if is_new and request(endpoint, "GET", "/readyz", "")[0] == 200:
                        self.ready.append(endpoint)


class Unread(ConnectionError):
    """The node closed the connection, and its process had not read the request."""


class Link:
    """One connection that puts keys, in as few steps as can be: a client that is busy with itself
    would be taken for a slow cluster. Raises OSError when there is no connection.

    Attributes:
        usable: the node has not said that it closes the connection.
    """

    def __init__(self, endpoint: str, token: str) -> None:
        self.usable = True
        host, _, port = endpoint.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=REQUEST_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = f"Host: {endpoint}\r\nAuthorization: Bearer {token}\r\n"

    def put(self, key: str, value: str) -> tuple[int, bytes]:
        """The answer's status and body.

        Raises:
            Unread: the node closed the connection, which it may at any time between two requests.
            OSError: it had read the request, or may have, and there is no whole answer.
        """
        length = len(value.encode())
        head = f"PUT /v1/kv/{key} HTTP/1.1\r\n{self._lines}Content-Length: {length}\r\n\r\n"
        if self._happened(select.POLLIN, 0):  # nothing but its end can have come
            raise Unread("the node closed the connection between two requests")
        answer = self._first((head + value).encode())
        while b"\r\n\r\n" not in answer:
            answer += self._receive()
        head_bytes, _, body = answer.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head_bytes.split(b"\r\n")[1:])
        while len(body) < int(fields[b"content-length"]):
            body += self._receive()
        self.usable = fields.get(b"connection") != b"close"
        return int(head_bytes.split(b" ", 2)[1]), body

    def _first(self, request_bytes: bytes) -> bytes:
        """Send a request; the first bytes of the answer.

        A connection closed by a process that has not read all that came is reset by its kernel, and
        so is one to which more comes after that. With the request read it just ends.
        """
        try:
            self._socket.sendall(request_bytes)
            received = self._socket.recv(65536)
        except (ConnectionResetError, BrokenPipeError) as error:
            raise Unread(f"the node reset the connection: {error}") from None
        if not received and self._happened(select.POLLERR, RESET_S):
            raise Unread("the node closed the connection while the request was on its way")
        if not received:
            raise ConnectionResetError("the node read the request and closed the connection")
        return received

    def _happened(self, event: int, within_s: float) -> bool:
        poll = select.poll()
        poll.register(self._socket, event & select.POLLIN)  # errors are told in any case
        return any(mask & event for _, mask in poll.poll(1000 * within_s))

    def close(self) -> None:
        self._socket.close()

    def _receive(self) -> bytes:
        received = self._socket.recv(65536)
        if not received:
            raise ConnectionResetError("the node closed the connection")
        return received


class Writer(threading.Thread):
    """Writes key after key, each to the next ready node, `per_second` at most.

    Without `patience_s` nothing is retried: every write that is not acknowledged with 200 is a
    failure. With it the write goes to the next node, for that long, after a 503 and where there is
    no answer: a PUT may be repeated (RFC 9110, 9.2.2).

    Attributes:
        retries: how often, by endpoint and reason: "503"; "refused", where nobody listened, and
            "unreachable", where no connection could be made otherwise; "closed" before the node's
            process had read the request; "cut", when it had, or nobody knows.
    """

    def __init__(
        self, clients: Clients, name: str, per_second: float, patience_s: float = 0.0
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.failures: list[str] = []
        self.acknowledged: dict[str, str] = {}
        self.latencies_ms: list[float] = []
        self.retries = Counter[tuple[str, str]]()
        self._clients = clients
        self._pause_s = 1 / per_second
        self._patience_s = patience_s
        self._links: dict[str, Link] = {}
        self._turn = itertools.count()

    def run(self) -> None:
        while not self._clients.ready and not self._clients.stopping.wait(0.02):
            pass  # the first node is not up yet
        token = self._clients.token
        due = time.monotonic()
        for number in itertools.count():
            due = max(due + self._pause_s, time.monotonic() - 1)  # it catches up with a second
            if self._clients.stopping.wait(max(0.0, due - time.monotonic())):
                break
            self._write(f"{self.name}/{number:06d}", f"{self.name} {number}", token)
        for link in self._links.values():
            link.close()

    def _write(self, key: str, value: str, token: str) -> None:
        began = time.monotonic()
        while True:
            endpoint = self._clients.ready[next(self._turn) % len(self._clients.ready)]
            failure, reason = self._put(endpoint, key, value, token)
            seconds = time.monotonic() - began
            if failure is None:
                self.acknowledged[key] = value
                self.latencies_ms.append(1000 * seconds)
                return
            if not reason or seconds >= self._patience_s:
                self.failures.append(f"{key} to {endpoint}: {failure}")
                return
            self.retries[endpoint, reason] += 1
            self._clients.stopping.wait(0.02)

    def _put(self, endpoint: str, key: str, value: str, token: str) -> tuple[str | None, str]:
        """What went wrong, if anything, and the reason for which another node may do better."""
        link = self._links.pop(endpoint, None)
        if link is None:
            try:
                link = Link(endpoint, token)
            except OSError as error:
                refused = isinstance(error, ConnectionRefusedError)
                return repr(error), "refused" if refused else "unreachable"
        try:
            status, body = link.put(key, value)
        except OSError as error:
            link.close()
            return repr(error), "closed" if isinstance(error, Unread) else "cut"
        if link.usable:
            self._links[endpoint] = link
        else:
            link.close()
        if status == 200:
            return None, ""
        return f"{status} {body[:500]!r}", "503" if status == 503 else ""


class Watch(threading.Thread):
    """Every membership that the cluster commits, as GET /v1/cluster/watch on one node shows it."""

    def __init__(self, clients: Clients, endpoint: str) -> None:
        super().__init__(name="watch", daemon=True)
        self.seen: list[dict[str, Any]] = []
        self._clients = clients
        self._endpoint = endpoint

    def run(self) -> None:
        while self._endpoint not in self._clients.ready:
            if self._clients.stopping.wait(0.02):
                return
        link = http.client.HTTPConnection(self._endpoint, timeout=60)
        headers = {"Authorization": f"Bearer {self._clients.token}"}
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(link):
            link.request("GET", "/v1/cluster/watch", headers=headers)
            for line in link.getresponse():
                if line.startswith(b"data:"):
                    self.seen.append(json.loads(line[5:]))
                if self._clients.stopping.is_set():
                    return

    def voters(self) -> list[tuple[int, ...]]:
        """The voter sets in the order in which they came, without repetition."""
        found: list[tuple[int, ...]] = []
        for view in self.seen:
            voters = tuple(sorted({m["id"] for m in view["members"] if m["status"] == "active"}))
            if not view["joint"] and (not found or found[-1] != voters):
                found.append(voters)
        return found
