"""The end of a server, or of its clients, while connections are at work; in this process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest
import uvloop

from dengine.api.protocol import Connection, Request, Response, Server
from tests.node.hosts import on_loop, until

LIMIT_S = 0.05
REQUEST = b"GET / HTTP/1.1\r\nHost: t\r\n\r\n"


class Stage:
    """A server that answers once it is allowed to."""

    def __init__(self) -> None:
        self.allowed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.server = Server(self.handle, lambda error: None, lambda target: "")

    async def handle(self, request: Request) -> Response:
        await self.allowed
        return Response(200, b"{}", b"Content-Type: application/json\r\n")

    @property
    def connection(self) -> Connection:
        (connection,) = self.server.connections
        return cast(Connection, connection)

    def busy(self) -> bool:
        return bool(self.server.connections) and self.connection.busy


@asynccontextmanager
async def asked(*, all_said: bool = False) -> AsyncIterator[tuple[Stage, asyncio.StreamReader]]:
    """A server, and a client whose request it has begun to answer, and which may have closed its
    half of the connection. In the end both are rid of each other."""
    stage = Stage()
    listener = await asyncio.get_running_loop().create_server(stage.server, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
    try:
        writer.write(REQUEST)
        await until(stage.busy, "the request to be under way")
        if all_said:
            writer.write_eof()
            await until(lambda: stage.connection.half_closed, "the server to know")
        yield stage, reader
        async with asyncio.timeout(5):
            await reader.read()  # to its end
        await until(lambda: not stage.server.connections, "the connection to end")
    finally:
        writer.close()
        listener.close()


def test_a_request_under_way_is_answered() -> None:
    async def check() -> None:
        async with asked() as (stage, reader):
            end = asyncio.create_task(stage.connection.finish(5))
            stage.allowed.set_result(None)
            await end
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"

    on_loop(check)


def test_a_request_that_takes_too_long_is_cut_off() -> None:
    async def check() -> None:
        async with asked() as (stage, reader):
            await stage.connection.finish(LIMIT_S)
            assert await reader.read() == b""
            assert not stage.busy()

    on_loop(check)


def test_a_client_that_leaves_meanwhile_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with asked() as (stage, _):
            end = asyncio.create_task(stage.connection.finish(5))
            stage.connection.abort()
            await until(lambda: stage.connection.transport is None, "the client to be gone")
            stage.allowed.set_result(None)
            async with asyncio.timeout(1):
                await end

    with caplog.at_level(logging.INFO):
        on_loop(check)
    assert caplog.messages == []


def test_an_answer_in_the_moment_in_which_time_is_over_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check() -> None:
        async with asked() as (stage, _):
            asyncio.get_running_loop().call_later(LIMIT_S, stage.allowed.set_result, None)
            await stage.connection.finish(LIMIT_S)

    with caplog.at_level(logging.INFO):
        on_loop(check)
    assert caplog.messages == []


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_who_sends_no_more_is_answered(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """However long that takes, and told that this was the last answer."""

    async def check() -> None:
        async with asked(all_said=True) as (stage, reader):
            stage.allowed.set_result(None)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"Connection: close\r\n" in head

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(check())


def test_who_sends_no_more_is_answered_by_a_server_that_stops() -> None:
    async def check() -> None:
        async with asked(all_said=True) as (stage, reader):
            end = asyncio.create_task(stage.connection.finish(5))
            stage.allowed.set_result(None)
            await end
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"

    on_loop(check)


def test_an_idle_client_that_sends_no_more_is_let_go() -> None:
    async def check() -> None:
        stage = Stage()
        listener = await asyncio.get_running_loop().create_server(stage.server, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
        writer.write_eof()
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
        listener.close()

    on_loop(check)
