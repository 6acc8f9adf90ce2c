"""What is between the nodes: a proxy per directed link that can be slow, narrow or stuck.

A node dials a peer as always; nftables in its namespace leads the connection to a proxy on the same
machine, and the proxy connects to the peer from there. Nodes send in both directions on one
connection, so what a link does depends on who sends, not on who has dialled.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from tests.namespaces import inside
from tests.nemesis.machines import PORT, PROXY_MARK, PROXY_PORT, Machines, host

CHUNK_BYTES = 16_384
QUEUED_MAX = 64  # chunks on their way; more than that and the sender has to wait
CONNECT_TIMEOUT_S = 3.0
LINGER_S = 2.0


@dataclass
class Link:
    """How one machine reaches another now."""

    delay_ms: float = 0.0  # with the same again as jitter; the order is kept, as TCP does
    bytes_per_s: float = 0.0  # 0: no limit
    open: asyncio.Event = field(default_factory=asyncio.Event)
    touched: int = 0  # chunks that a fault has held up

    def __post_init__(self) -> None:
        self.open.set()

    @property
    def faulty(self) -> bool:
        return bool(self.delay_ms or self.bytes_per_s) or not self.open.is_set()


class Links:
    """An async context manager: proxies for every pair of `machines`, fast until told otherwise."""

    def __init__(self, machines: Machines, rng: random.Random) -> None:
        self._machines = machines
        self._rng = rng
        self._links = {(i, j): Link() for i in machines.ids for j in machines.ids if i != j}
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Links:
        for dialler, peer in self._links:
            with inside(self._machines.namespace(dialler)):
                listening = socket.create_server(("127.0.0.1", PROXY_PORT + peer))
            server = await asyncio.start_server(self._accepted(dialler, peer), sock=listening)
            self._servers.append(server)
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def between(self, source: int, target: int) -> Link:
        """The link on which `source` sends to `target`."""
        return self._links[source, target]

    def _accepted(
        self, dialler: int, peer: int
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._serve(dialler, peer, reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return accept

    async def _serve(
        self,
        dialler: int,
        peer: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        ends = [writer]
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                far_reader, far_writer = await self._connect(dialler, peer)
            ends.append(far_writer)
            await _first(
                self._carry(reader, far_writer, self.between(dialler, peer)),
                self._carry(far_reader, writer, self.between(peer, dialler)),
            )
            async with asyncio.timeout(LINGER_S):  # the last bytes leave before the end does
                for end in ends:
                    end.close()
                    await end.wait_closed()
        except (OSError, TimeoutError):
            pass  # each side sees it as the end of its connection
        finally:
            for end in ends:
                end.transport.abort()

    async def _connect(
        self, dialler: int, peer: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        with inside(self._machines.namespace(dialler)):
            outgoing = socket.socket()
        try:
            outgoing.setblocking(False)
            outgoing.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, PROXY_MARK)
            await asyncio.get_running_loop().sock_connect(outgoing, (host(peer), PORT))
            return await asyncio.open_connection(sock=outgoing)
        except BaseException:
            outgoing.close()
            raise

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: Link
    ) -> None:
        """Until the sender has ended or the receiver is gone."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_MAX)

        async def read() -> None:
            while chunk := await reader.read(CHUNK_BYTES):
                delay_ms = link.delay_ms * (1 + self._rng.random())
                await queue.put((loop.time() + delay_ms / 1000, chunk))
            await queue.put((0.0, b""))

        reading = asyncio.create_task(read())
        try:
            while True:
                due, chunk = await queue.get()
                if not chunk:
                    return
                link.touched += link.faulty or due > loop.time()
                await asyncio.sleep(due - loop.time())
                await link.open.wait()
                if link.bytes_per_s:
                    await asyncio.sleep(len(chunk) / link.bytes_per_s)
                writer.write(chunk)
                await writer.drain()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


async def _first(*ways: Coroutine[Any, Any, None]) -> None:
    """Until one of them has ended; the others are cancelled."""
    tasks = [asyncio.create_task(way) for way in ways]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
