"""HTTP for clients that repeat nothing: one request, one answer, or what is known without one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.cluster import Reply
from tests.nemesis.machines import PORT, host

TIMEOUTS_MS = (500, 2000, 5000)
GRACE_S = 3.0  # beyond the timeout that the node was given; then there is no answer
EXPECTED = {200, 404, 412, 429, 503, 504, 507}


class Unanswered(Exception):
    """No answer came. `sent`: the request may have arrived, and what it asks for may happen."""

    def __init__(self, why: str, *, sent: bool) -> None:
        super().__init__(why)
        self.sent = sent


class Refused(Exception):
    """A stream was asked for, and the answer is none."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"{reply.status} {reply.body[:200]!r}")
        self.reply = reply


class Message(NamedTuple):
    """A server-sent event."""

    event: str
    id: int | None
    data: Any  # from JSON


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


@dataclass
class Tally:
    """Of the answers to all clients. Times are time.monotonic()."""

    acknowledged_at: list[float] = field(default_factory=list)
    read_at: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)  # answers that no fault explains

    @property
    def operations(self) -> int:
        return sum(self.counts.values())


class Caller:
    """What one client asks any node with, one request at a time.

    Args:
        rng: of this client.
        tally: of all of them.
        excused: may this node answer with an internal error now?
    """

    def __init__(self, rng: random.Random, tally: Tally, excused: Callable[[int], bool]) -> None:
        self.rng = rng
        self.tally = tally
        self._excused = excused
        self._connections: dict[int, Connection] = {}

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        node_id: int,
        patience_s: float | None = None,
    ) -> tuple[Reply | None, str]:
        """The answer, if there was one, and the outcome if it was a refusal.

        Args:
            patience_s: hang up after that; None: a moment after the node should have answered.
        """
        timeout_ms = self.rng.choice(TIMEOUTS_MS)
        if patience_s is None:
            patience_s = timeout_ms / 1000 + GRACE_S
        connection = self._connections.setdefault(node_id, Connection(node_id))
        headers = {**headers, "Dengine-Timeout-Ms": str(timeout_ms)}
        counts = self.tally.counts
        try:
            reply = await connection.request(method, path, body, headers, patience_s)
        except Unanswered as error:
            counts["unanswered" if error.sent else "not sent"] += 1
            return None, "unknown" if error.sent else "none"
        counts[str(reply.status)] += 1
        if reply.status in (200, 404, 412):
            return reply, ""
        if reply.status not in EXPECTED:
            self.surprise(node_id, f"{method} {path}", reply)
        return reply, str(json.loads(reply.body).get("outcome", "unknown"))

    def surprise(self, node_id: int, asked: str, reply: Reply) -> None:
        """Note an answer that only what is being done to this node can explain."""
        if not self._excused(node_id):
            said = f"node {node_id}: {asked}: {reply.status} {reply.body[:200]!r}"
            self.tally.surprises.append(said)

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()


def held(reply: Reply) -> tuple[int, str | None]:
    """Of a key, as an answer to GET shows it: mod_revision and value; (0, None) without one."""
    if reply.status == 404:
        return 0, None
    return int(reply.headers["etag"].strip('"')), reply.body.decode()


def another(rng: random.Random, nodes: Sequence[int], node_id: int) -> int:
    """One of the nodes, and not this one if there are others."""
    others = [other for other in nodes if other != node_id]
    return rng.choice(others or [*nodes] or [node_id])


async def follow(
    node_id: int, path: str, headers: Mapping[str, str], patience_s: float
) -> AsyncGenerator[Message, None]:
    """The server-sent events of a stream, until its end.

    Args:
        patience_s: hang up when nothing has come for so long, not even a comment.

    Raises:
        Unanswered: it broke, or nothing came.
        Refused: there is no stream.
    """
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(patience_s):
            reader, writer = await asyncio.open_connection(host(node_id), PORT)
            writer.write(_head("GET", path, None, headers))
            status, names = await _reply_head(reader)
            if status != 200:
                body = await reader.readexactly(int(names.get("content-length", "0")))
                raise Refused(Reply(status, names, body))
        text = b""
        while piece := await _chunk(reader, patience_s):
            *whole, text = (text + piece).split(b"\n\n")
            for block in whole:
                if not block.startswith(b":"):
                    yield _message(block.decode())
    except (OSError, EOFError, TimeoutError, ValueError) as error:
        raise Unanswered(f"{type(error).__name__}: {error}", sent=True) from None
    finally:
        if writer is not None:
            writer.transport.abort()


async def _chunk(reader: asyncio.StreamReader, patience_s: float) -> bytes:
    """The next piece of a body that comes in pieces; b"" at its end."""
    async with asyncio.timeout(patience_s):
        size = int(await reader.readline(), 16)
        return (await reader.readexactly(size + 2))[:size]


def _message(block: str) -> Message:
    try:
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        number = fields.get("id")
        return Message(fields["event"], int(number) if number else None, json.loads(fields["data"]))
    except (KeyError, ValueError):  # no stream that broke, but one that is wrong
        raise RuntimeError(f"no server-sent event: {block[:500]!r}") from None


def _head(method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: nemesis"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body is not None or method == "POST":
        lines.append(f"Content-Length: {len(body or b'')}")
    return "\r\n".join([*lines, "", ""]).encode()


async def _reply(reader: asyncio.StreamReader) -> tuple[Reply, bool]:
    """The answer, and whether the connection can be used again."""
    status, headers = await _reply_head(reader)
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Reply(status, headers, body), headers.get("connection", "").lower() != "close"


async def _reply_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for line in head[1:]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return int(head[0].split()[1]), headers
