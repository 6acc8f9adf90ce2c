"""Watches of large changes over HTTP, in this process: whole, in fair turns, and not for nobody."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest

from dengine.api import sse, watch
from dengine.api.protocol import Request, Response, Server
from dengine.node import watch_messages
from dengine.node.watch_hub import Changes, Selection, Watch
from dengine.node.watch_messages import Part
from tests.node.hosts import on_loop, until
from tests.node.hubs import bare_hub, change_of, told

PROGRESS = b'event: progress\nid: 0\ndata: {"revision":0}\n\n'
STOPPING = b'event: cancelled\ndata: {"reason":"this node is stopping: resume at another one"}\n\n'
PARTS = 20  # of each change here
PATIENT_S = 30.0


def whole(changes: Changes) -> bytes:
    """The event as it has always been."""
    events = [watch._shown(event) for event in changes.events]
    data = orjson.dumps({"revision": changes.revision, "events": events})
    return b"event: change\nid: %d\ndata: %b\n\n" % (changes.revision, data)


class Stage:
    """A server whose watches have these messages waiting: each new connection gets the next ones.

    Attributes:
        made: the names, which keys begin with, of whose text was made, part by part.
        stop_after: so many parts, and the server stops.
    """

    def __init__(self, plans: Sequence[Sequence[Changes]]) -> None:
        self.hub = bare_hub()
        self.made: list[bytes] = []
        self.stop_after: int | None = None
        self.closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._plans = iter(plans)
        limits = SimpleNamespace(key_bytes=511)
        self._calls = watch.WatchCalls(
            cast(Any, self), cast(Any, SimpleNamespace(limits=limits)), self.closing
        )
        self._text = watch._text

    async def watch(self, selection: Selection, first: int | None, **_: object) -> Watch:
        """As a node does it."""
        return told(self.hub, *next(self._plans))

    async def handle(self, request: Request) -> Response:
        request.params = {"prefix": b""}
        return await self._calls.watch(request)

    def text(self, part: Part) -> bytes:
        self.made.append(part.events[0].key.split(b"/")[0])
        if len(self.made) == self.stop_after:
            self.closing.set_result(None)
        return self._text(part)

    @property
    def in_line(self) -> int:
        """Streams that wait for their turn to have a part made."""
        return sum(one._held_up for one in self.hub._all)


@asynccontextmanager
async def serving(
    plans: Sequence[Sequence[Changes]], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Stage, int]]:
    """A stage, and its port."""
    monkeypatch.setattr(watch_messages, "PART_EVENTS", 10)
    stage = Stage(plans)
    monkeypatch.setattr(watch, "_text", stage.text)
    server = Server(stage.handle, lambda error: None, lambda target: "")
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    try:
        yield stage, listener.sockets[0].getsockname()[1]
        await until(lambda: not server.connections, "all streams to end")
        assert stage.hub.count == 0
        assert stage.hub._bytes == 0
    finally:
        listener.close()


async def received(port: int, size: int | None = None) -> tuple[bytes, bool]:
    """What a client gets, up to this size, and whether the stream had an end then."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /v1/watch HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
    body = b""
    try:
        async with asyncio.timeout(PATIENT_S):
            await reader.readuntil(b"\r\n\r\n")
            while size is None or len(body) < size:
                length = int(await reader.readuntil(b"\r\n"), 16)
                body += (await reader.readexactly(length + 2))[:-2]
                if not length:
                    return body, True
            return body[:size], False
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return body, False
    finally:
        writer.close()


def of_its_own(streams: int, changes: int = 1) -> list[list[Changes]]:
    return [
        [change_of(1 + n, 10 * PARTS, f"s{stream}") for n in range(changes)]
        for stream in range(streams)
    ]


def test_events_are_whole_and_turns_are_fair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte by byte what they were, with no comment within one, however soon a stream that says
    nothing has to write one; and none of many readers waits for all of what another has."""
    monkeypatch.setattr(sse, "COMMENT_INTERVAL_S", 0.0)
    plans = of_its_own(10, changes=3)
    wanted = [PROGRESS + b"".join(map(whole, plan)) for plan in plans]

    async def check() -> None:
        async with serving(plans, monkeypatch) as (stage, port):
            clients: list[asyncio.Task[tuple[bytes, bool]]] = []
            async with stage.hub.turn:
                for expected in wanted:
                    clients.append(asyncio.create_task(received(port, len(expected))))
                    await until(lambda: stage.in_line == len(clients), "it to stand in the line")
            assert [(await client)[0] for client in clients] == wanted
        counts = Counter({b"s%d" % n: 0 for n in range(10)})
        for name in stage.made:
            counts[name] += 1
            assert max(counts.values()) - min(counts.values()) <= 5
        assert set(counts.values()) == {3 * PARTS}

    on_loop(check)


def test_the_text_is_made_once_for_all_who_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = change_of(1, 10 * PARTS)
    expected = PROGRESS + whole(changes)

    async def check() -> None:
        async with serving([[changes]] * 5, monkeypatch) as (stage, port):
            async with stage.hub.turn:
                clients = [asyncio.create_task(received(port, len(expected))) for _ in range(5)]
                await until(lambda: stage.in_line == 5, "all to stand in the line")
            assert {(await client)[0] for client in clients} == {expected}
            assert len(stage.made) == PARTS

    on_loop(check)


def test_nothing_is_made_for_a_client_that_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = of_its_own(3)
    wanted = [PROGRESS + whole(*plan) for plan in plans]

    async def check() -> None:
        async with serving(plans, monkeypatch) as (stage, port):
            clients: list[asyncio.Task[tuple[bytes, bool]]] = []
            async with stage.hub.turn:
                for expected in wanted:
                    clients.append(asyncio.create_task(received(port, len(expected))))
                    await until(lambda: stage.in_line == len(clients), "it to stand in the line")
                clients[1].cancel()
                await until(lambda: stage.hub.count == 2, "one to have left")
            assert [(await clients[n])[0] for n in (0, 2)] == [wanted[0], wanted[2]]
            assert set(stage.made) == {b"s0", b"s2"}

    on_loop(check)


def test_a_stop_reaches_those_who_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told at once, for in the time that there is not all could be written out."""

    async def check() -> None:
        async with serving(of_its_own(5, changes=2), monkeypatch) as (stage, port):
            async with stage.hub.turn:
                clients = [asyncio.create_task(received(port)) for _ in range(5)]
                await until(lambda: stage.in_line == 5, "all to stand in the line")
                stage.closing.set_result(None)
            assert {await client for client in clients} == {(PROGRESS + STOPPING, True)}
            assert stage.made == []

    on_loop(check)


def test_a_stop_cuts_off_those_in_the_midst_of_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of an event is none to any client: it resumes at another node, at once."""
    plans = of_its_own(5)
    wanted = [PROGRESS + whole(*plan) for plan in plans]

    async def check() -> None:
        async with serving(plans, monkeypatch) as (stage, port):
            stage.stop_after = 13
            clients: list[asyncio.Task[tuple[bytes, bool]]] = []
            async with stage.hub.turn:
                for _ in plans:
                    clients.append(asyncio.create_task(received(port)))
                    await until(lambda: stage.in_line == len(clients), "it to stand in the line")
            for client, expected in zip(clients, wanted, strict=True):
                body, ended = await client
                assert len(PROGRESS) < len(body) < len(expected)
                assert expected.startswith(body)
                assert not ended
            assert len(stage.made) == 13

    on_loop(check)
