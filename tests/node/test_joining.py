"""A joiner says of each address why that one does not let it in."""

from __future__ import annotations

import asyncio
import logging
import socket

import orjson
import pytest
from aiohttp import web

from dengine.errors import ClusterUnavailable, DengineError, JoinError
from dengine.node import joining
from dengine.security import Secrets
from tests.node.hosts import local_address, on_loop, until


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "ATTEMPT_TIMEOUT_S", 0.5)
    monkeypatch.setattr(joining, "REPORT_EVERY_S", 0.0)


class Refusing:
    """A node that refuses, not before the time is up that it was given."""

    def __init__(self, error: DengineError) -> None:
        self._error = error
        self._server = web.Server(self._answer)

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        await asyncio.sleep(int(request.headers["Dengine-Timeout-Ms"]) / 1000)
        body = orjson.dumps(self._error.to_dict())
        return web.Response(status=self._error.status, body=body, content_type="application/json")

    async def __aenter__(self) -> str:
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._server, "127.0.0.1", 0)
        return local_address(self._listener.sockets[0])

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        await self._server.shutdown(1)


def test_the_reason_of_each_address_is_named(quick: None, caplog: pytest.LogCaptureFixture) -> None:
    """Refused, timed out, no leader, foreign cluster. A node without a leader answers only when
    its time is up; that answer must still arrive."""

    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as gone:
            nobody = local_address(gone)
        with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts and never answers
            async with (
                Refusing(ClusterUnavailable("no leader; node 2 (b:1) refused")) as leaderless,
                Refusing(JoinError("foreign cluster: this is cluster c1")) as foreign,
            ):
                everyone = [nobody, local_address(mute), leaderless, foreign]
                with caplog.at_level(logging.WARNING, "dengine.join"):
                    asking = asyncio.create_task(
                        joining.join({"id": 4}, lambda: everyone, bool, Secrets())
                    )
                    await until(lambda: caplog.records, "the report")
                    asking.cancel()
                    await asyncio.wait([asking])
        assert caplog.records[0].getMessage() == (
            f"cannot join yet; {everyone[0]}: refused; {everyone[1]}: timed out; "
            f"{everyone[2]}: no leader; node 2 (b:1) refused; "
            f"{everyone[3]}: foreign cluster: this is cluster c1"
        )

    on_loop(scenario)
