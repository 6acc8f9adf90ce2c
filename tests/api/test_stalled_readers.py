"""Clients that stop reading: what a node has for them must not stay with it for ever.

In this process and with small buffers in the kernel, so that little has to be sent until a writer
feels that nobody reads. A stream is cut off by its time limit, which is shortened here.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvloop

from dengine.api import protocol
from dengine.api.cluster import ClusterCalls
from dengine.api.protocol import Request, Response, Server
from dengine.api.snapshots import SnapshotCalls
from dengine.api.sse import stream
from dengine.raft.types import SnapshotRef

BUFFER_BYTES = 8192
Handler = Callable[[Request], Awaitable[Any]]


class Listening(Server):
    """Knows when a connection is gone."""

    def __init__(self, handler: Handler) -> None:
        super().__init__(handler, lambda error: None, lambda target: "")
        self.let_go = asyncio.Event()

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self.let_go.set()


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[tuple[Listening, socket.socket]]:
    """A server with that handler, and a client that has asked for it and reads nothing yet."""
    loop = asyncio.get_running_loop()
    with socket.socket() as listening, socket.socket() as client:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)
        server = Listening(handler)
        listener = await loop.create_server(server, sock=listening)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        client.setblocking(False)
        await loop.sock_connect(client, listening.getsockname())
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
        yield server, client
        listener.close()


def of_events(event: bytes, times: int) -> Handler:
    async def handle(request: Request) -> Response:
        left = iter(range(times))

        async def following() -> bytes:
            if next(left, None) is None:
                raise StopAsyncIteration
            return event

        return await stream(request, following, lambda: None)

    return handle


def of_membership(tmp_path: Path) -> Handler:
    async def views() -> AsyncIterator[dict[str, Any]]:
        while True:
            yield {"members": ["x" * 100_000]}

    async def handle(request: Request) -> Response:
        node = SimpleNamespace(membership_events=views, view_here=dict)
        config = SimpleNamespace(limits=SimpleNamespace(watchers=1))
        closing = asyncio.get_running_loop().create_future()
        calls = ClusterCalls(cast(Any, node), cast(Any, config), cast(Any, None), closing)
        return await calls.watch(request)

    return handle


def of_a_snapshot(tmp_path: Path) -> Handler:
    content = bytes(8 * 2**20)
    file = tmp_path / "snapshot-1-1.dsnap"
    file.write_bytes(content)
    ref = SnapshotRef(1, 1, hashlib.sha256(content).hexdigest(), len(content))
    files = SimpleNamespace(find=lambda name: (file, ref), is_distrusted=lambda ref: False)
    node = SimpleNamespace(snapshots=SimpleNamespace(files=files))
    config = SimpleNamespace(snapshot=SimpleNamespace(max_bytes_per_s=2**40))

    async def handle(request: Request) -> Response:
        request.tail = "latest"
        calls = SnapshotCalls(cast(Any, node), cast(Any, config), cast(Any, None))
        return await calls.download(request)

    return handle


def of_a_large_answer(tmp_path: Path) -> Handler:
    async def handle(request: Request) -> Response:
        return Response(200, bytes(8 * 2**20))

    return handle


def of_a_small_answer(tmp_path: Path) -> Handler:
    """Too little for a writer to wait, too much for the kernel."""

    async def handle(request: Request) -> Response:
        return Response(200, bytes(60_000))

    return handle


def of_a_large_event(tmp_path: Path) -> Handler:
    return of_events(bytes(8 * 2**20), 1)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize(
    "handler",
    [of_a_large_event, of_membership, of_a_snapshot, of_a_large_answer, of_a_small_answer],
)
def test_a_client_that_reads_nothing_is_cut_off(
    handler: Callable[[Path], Handler],
    loop: Callable[[], asyncio.AbstractEventLoop],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "WRITE_STALL_S", 0.3)

    async def scenario() -> None:
        async with serving(handler(tmp_path)) as (server, _):
            await asyncio.wait_for(server.let_go.wait(), 20)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scenario())


async def a_mebibyte(request: Request) -> Response:
    return Response(200, bytes(2**20))


@pytest.mark.parametrize("handler", [of_events(bytes(2**20), 1), a_mebibyte])
def test_a_client_that_reads_slowly_gets_everything(
    handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is for 64 KiB, not for all of an event or answer."""
    monkeypatch.setattr(protocol, "WRITE_STALL_S", 1.5)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with serving(handler) as (_, client):
            received = 0
            while data := await loop.sock_recv(client, 64 * 1024):
                received += len(data)
                await asyncio.sleep(0.2 * len(data) / (64 * 1024))
            assert received > 2**20

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())
