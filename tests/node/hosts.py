"""A `Peers` behind a real port, what it reported, and a proxy that spoils the line between two."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import uvloop
from aiohttp import web

from dengine.config import Config
from dengine.errors import ClusterUnavailable
from dengine.node.addresses import AddressBook
from dengine.node.admission import Admission
from dengine.node.founding import Founding
from dengine.node.peers import Peers
from dengine.node.wire import ForwardRequest, Frame, Hello, Refused, encode
from dengine.raft.raft import Raft
from dengine.raft.types import MemberId
from dengine.security import PeerSecret
from dengine.storage.directory import DataDirectory

WAIT_S = 10.0
STRANGER = MemberId(9, 1009)


def on_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `test` on uvloop and check that it leaves no task behind."""

    async def checked() -> None:
        await test()
        ours = asyncio.current_task()
        await until(lambda: asyncio.all_tasks() == {ours}, "all tasks to end")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(checked())


async def until(condition: Callable[[], object], what: str, timeout_s: float = WAIT_S) -> float:
    """Wait for `condition`, at most `timeout_s`; returns the seconds it took."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    while not condition():
        if loop.time() - start > timeout_s:
            raise AssertionError(f"waited {timeout_s} s for {what}")
        await asyncio.sleep(0.002)
    return loop.time() - start


def admission_of(
    config: Config, directory: DataDirectory, raft: Raft, fail: Callable[[BaseException], None]
) -> Admission:
    """Who is let in at node 1, which is `raft`; `fail` is told what ends the node."""
    founding = Founding(config, raft.me, directory.boot)
    return Admission(
        config, directory, raft, AddressBook(config), founding, connected=lambda _: None, fail=fail
    )


def local_address(listener: socket.socket) -> str:
    """ "host:port" of a listening socket."""
    host, port = listener.getsockname()
    return f"{host}:{port}"


class Host:
    """One node's streams on a loopback port, for an `async with` block.

    `connected`, `frames`, `refused` and `disconnected` list what the callbacks were given; a test
    may put its own in place of `admit` and `on_...`.
    """

    def __init__(
        self,
        node_id: int,
        *,
        port: int = 0,
        boot: int = 1,
        cluster: str = "c",
        secret: bytes | None = None,
    ) -> None:
        self.secret = None if secret is None else PeerSecret(secret)
        self.member = MemberId(node_id, 1000 + node_id)
        self.boot = boot
        self.cluster = cluster
        self.port = port
        self.connected: list[Hello] = []
        self.frames: list[tuple[MemberId, Frame]] = []
        self.refused: list[tuple[int | None, Refused]] = []
        self.disconnected: list[MemberId] = []
        self.on_connected: Callable[[Hello], None] = self.connected.append
        self.on_frame: Callable[[MemberId, Frame], None] = lambda *frame: self.frames.append(frame)
        self.on_disconnected: Callable[[MemberId], None] = self.disconnected.append
        self.expected: list[int | None] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """TCP connections that others opened to this host and that still live."""
        return len(self._server.connections)

    async def __aenter__(self) -> Host:
        self.peers = Peers(
            hello=self.hello,
            admit=lambda *seen: self.admit(*seen),
            on_refused=lambda *refusal: self.refused.append(refusal),
            on_connected=lambda hello: self.on_connected(hello),
            on_frame=lambda *frame: self.on_frame(*frame),
            on_disconnected=lambda member: self.on_disconnected(member),
            secret=self.secret,
        )
        self._server = web.Server(self._accept)
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            self._server, "127.0.0.1", self.port, reuse_address=True
        )
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        await self.peers.close()
        await self._server.shutdown(1)

    async def _accept(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self.peers.accept(request)
        except ClusterUnavailable as error:  # the API makes its JSON of it
            return web.Response(status=error.status)

    def hello(self, expects: int | None, dialled: str) -> Hello:
        return Hello(
            protocol_version=1,
            command_version=1,
            cluster_id=self.cluster,
            member=self.member,
            boot=self.boot,
            address=self.address,
            timeout_ms_min=1000,
            last_index=0,
            expects=expects,
            dialled=dialled,
        )

    def admit(self, theirs: Hello, host: str) -> Refused | None:
        assert host == "127.0.0.1"
        self.expected.append(theirs.expects)
        if theirs.cluster_id == self.cluster:
            return None
        return Refused("foreign_cluster", f"this is {self.cluster}, not {theirs.cluster_id}")

    def dials(self, *others: Host) -> None:
        self.peers.set_targets({other.member.id: [other.address] for other in others})

    def has(self, other: Host) -> bool:
        """Whether a stream to exactly this process of `other` is in use."""
        hello = self.peers.connected(other.member.id)
        return hello is not None and hello.boot == other.boot and hello.member == other.member

    def error(self, node_id: int) -> str | None:
        return self.peers.status()[node_id].error


async def joined(one: Host, other: Host) -> float:
    """Wait until both hold exactly one stream in use and one TCP connection is left of all."""
    return await until(
        lambda: one.has(other) and other.has(one) and one.connections + other.connections == 1,
        f"one stream between {one.member.id} and {other.member.id}",
    )


def note(number: int, body: bytes = b"") -> ForwardRequest:
    return ForwardRequest(number, "note", body, 1000)


@asynccontextmanager
async def stranger(host: Host, *frames: object) -> AsyncIterator[Any]:
    """A hand-made client that has sent `frames` (structs are encoded, str is sent as text)."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"http://{host.address}/v1/peer", max_msg_size=0) as ws,
    ):
        with suppress(ConnectionError):  # of the host that has read enough
            for frame in frames:
                if isinstance(frame, str):
                    await ws.send_str(frame)
                else:
                    await ws.send_bytes(frame if isinstance(frame, bytes) else encode(frame))
        yield ws


def stranger_hello(host: Host) -> Hello:
    return Host(STRANGER.id, cluster=host.cluster).hello(host.member.id, host.address)


class Proxy:
    """Passes bytes on to `target`, late by up to `lag_s`, until `swallow` makes a dead link of it:
    both connections stay open and nothing gets through any more."""

    def __init__(self, target: Host, lag_s: float = 0, rng: random.Random | None = None) -> None:
        self._target = target
        self._lag_s = lag_s
        self._rng = rng or random.Random(0)
        self._tasks: set[asyncio.Task[None]] = set()
        self.swallow = False

    async def __aenter__(self) -> Proxy:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = local_address(self._listener.sockets[0])
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target.port)
            await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
        except OSError:
            writer.close()
        except asyncio.CancelledError:
            pass  # a server's task that ends cancelled counts as unhandled
        finally:
            self._tasks.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await asyncio.sleep(self._rng.uniform(0, self._lag_s))
                if not self.swallow and not writer.is_closing():
                    writer.write(data)
                    await writer.drain()
        except OSError:
            pass  # one of the ends broke off, the other hears of it
        finally:
            writer.close()
