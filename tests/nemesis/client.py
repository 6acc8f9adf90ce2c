"""HTTP for clients that repeat nothing: one request, one answer, or what is known without one."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from typing import Any

from tests.cluster import Reply
from tests.nemesis.machines import PORT, host


class Unanswered(Exception):
    """No answer came. `sent`: the request may have arrived, and what it asks for may happen."""

    def __init__(self, why: str, *, sent: bool) -> None:
        super().__init__(why)
        self.sent = sent


class Connection:
    """Requests to one node, one after the other, on a connection that is opened when needed.

    A library's client is no use here: they send a PUT again on another connection when the first
    one broke, and then the caller cannot know how often it happened.
    """

    def __init__(self, node_id: int) -> None:
        self.node_id = node_id
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 5.0,
    ) -> Reply:
        """Raises Unanswered."""
        sent = False
        try:
            async with asyncio.timeout(timeout_s):
                if self._streams is None:
                    self._streams = await asyncio.open_connection(host(self.node_id), PORT)
                reader, writer = self._streams
                sent = True
                writer.write(_head(method, path, body, headers or {}) + (body or b""))
                await writer.drain()
                reply, goes_on = await _reply(reader)
            if not goes_on:
                self.close()
            return reply
        except BaseException as error:
            self.close()
            if isinstance(error, (OSError, EOFError, TimeoutError, ValueError)):
                raise Unanswered(f"{type(error).__name__}: {error}", sent=sent) from None
            raise

    async def call(
        self, method: str, path: str, body: object = None, timeout_s: float = 5.0
    ) -> Any:
        """The JSON of a 2xx. Raises Unanswered, also for every other status."""
        data = None if body is None else json.dumps(body).encode()
        headers = {} if data is None else {"Content-Type": "application/json"}
        reply = await self.request(method, path, data, headers, timeout_s)
        if not reply.ok:
            raise Unanswered(f"{reply.status} {reply.body[:300]!r}", sent=True)
        return reply.json()

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


async def call(
    node_id: int, method: str, path: str, body: object = None, timeout_s: float = 5.0
) -> Any:
    """One call on a connection of its own. Raises Unanswered."""
    with contextlib.closing(Connection(node_id)) as connection:
        return await connection.call(method, path, body, timeout_s)


def _head(method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: nemesis"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body is not None or method == "POST":
        lines.append(f"Content-Length: {len(body or b'')}")
    return "\r\n".join([*lines, "", ""]).encode()


async def _reply(reader: asyncio.StreamReader) -> tuple[Reply, bool]:
    """The answer, and whether the connection can be used again."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for line in head[1:]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    goes_on = headers.get("connection", "").lower() != "close"
    return Reply(int(head[0].split()[1]), headers, body), goes_on
