"""A small cluster over real sockets on loopback, whose faults a test drives.

The nodes share one `State` (fake_state.py), so each write of each node is everybody's at once. What
real nodes do rarely, these do when told: hang, die, answer late, drop the reply of a write that was
carried out, refuse, name the wrong leader, lose touch with the cluster, cut a stream at a byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from aiohttp import web

from dengine.errors import ClusterUnavailable, Compacted, DengineError, Unauthorized
from tests.client.fake_state import Answer, Asked, Happened, State, as_json, named

PROGRESS_S = 5.0

Refusing = Callable[[Asked], DengineError | None]


class FakeNode:
    """One node. Its faults are attributes; a test sets them, and `heal` takes all of them back."""

    def __init__(self, cluster: FakeCluster, node_id: int) -> None:
        self.cluster = cluster
        self.node_id = node_id
        self.port = 0
        self.asked: list[Asked] = []
        self._streams: set[asyncio.BaseTransport] = set()
        self._running = asyncio.Event()
        self._server: web.Server | None = None
        self._listener: asyncio.Server | None = None
        self.heal()

    def heal(self) -> None:
        self._running.set()
        self.delay_s = 0.0  # before a request is carried out
        self.late_s = 0.0  # between that and the answer
        self.drop_replies = 0  # so many requests are carried out, and their answer is not sent
        self.refuse: Refusing = lambda _: None
        self.partitioned = False  # out of touch: it refuses what needs the cluster
        self.cut_after: int | None = None  # bytes of a stream, which is then cut
        self.cancel_streams = False  # as a node that takes its reader for too slow
        self.cluster.wake()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def streams(self) -> int:
        """How many watches are open, as far as their clients are concerned."""
        return sum(not transport.is_closing() for transport in self._streams)

    def hang(self) -> None:
        """As SIGSTOP does: connections are accepted, and nothing is answered until `heal`."""
        self._running.clear()

    @property
    def _serves(self) -> bool:
        return self.cluster.leader is not None and not self.partitioned

    def writes(self) -> list[Asked]:
        return [a for a in self.asked if a.method != "GET" and "keepalive" not in a.target]

    async def start(self) -> None:
        self._server = web.Server(self._handle, access_log=None)
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            self._server, "127.0.0.1", self.port, reuse_address=True
        )
        self.port = self._listener.sockets[0].getsockname()[1]

    async def kill(self) -> None:
        """As kill -9: nobody listens, and all connections are gone."""
        if self._listener is None or self._server is None:
            return
        self._listener.close()
        self._listener = None
        for connection in list(self._server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        self._running.set()  # whatever hangs in it ends
        await self._server.shutdown(0.01)

    # --- requests ---------------------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        asked = Asked(request.method, request.raw_path, dict(request.headers), await request.read())
        self.asked.append(asked)
        await self._running.wait()
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        await self._running.wait()
        try:
            refusal = self.refuse(asked)
            if refusal is not None:
                raise refusal
            if asked.path == "/v1/watch":
                return await self._watch(request, asked)
            answer = self._answer(asked)
        except DengineError as error:
            answer = as_json(error.to_dict(), error.status)
        if self.drop_replies and asked.method != "GET":
            self.drop_replies -= 1
            self._abort(request)
        if self.late_s:
            await asyncio.sleep(self.late_s)
        await self._running.wait()
        return web.Response(status=answer.status, body=answer.body, headers=dict(answer.headers))

    @staticmethod
    def _abort(request: web.BaseRequest) -> None:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("as the test wants it")

    def _answer(self, asked: Asked) -> Answer:
        leader = self.cluster.leader
        unready = self.partitioned or leader is None
        if asked.path == "/readyz":
            return Answer(503 if unready else 200)
        if asked.path == "/v1/cluster":
            return as_json(self.cluster.view())
        if self.partitioned or (leader is None and "eventual" not in asked.target):
            raise ClusterUnavailable("this node is cut off from the majority")
        if asked.headers.get("Authorization") != self.cluster.authorization:
            raise Unauthorized("this call needs a token")
        return self.cluster.state.execute(asked)

    # --- watch ------------------------------------------------------------------------------------

    async def _watch(self, request: web.BaseRequest, asked: Asked) -> web.StreamResponse:
        state, query = self.cluster.state, asked.query
        key, prefix = query.get("key"), query.get("prefix", b"")

        def chosen(name: bytes) -> bool:
            return name == key if key is not None else name.startswith(prefix)

        if "from_revision" not in query and not self._serves:  # it does not know what "now" is
            raise ClusterUnavailable("this node is cut off from the majority")
        position = int(query.get("from_revision", str(state.revision + 1).encode()))
        prev = query.get("prev") in (b"1", b"true")
        list(state.changes(position, chosen))  # 410 comes before the stream
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has gone")
        self._streams.add(transport)
        written = 0

        async def write(text: str) -> None:
            nonlocal written
            data = text.encode()
            if self.cut_after is not None and written + len(data) > self.cut_after:
                data, cut = data[: max(0, self.cut_after - written)], True
                self.cut_after = None
            else:
                cut = False
            written += len(data)
            if data:
                await response.write(data)
            if cut:
                transport.close()
                raise ConnectionResetError("as the test wants it")

        try:
            await write(progress(min(state.revision, position - 1)))
            loop = asyncio.get_running_loop()
            due = loop.time() + PROGRESS_S
            while True:
                await self._running.wait()
                if self.cancel_streams:
                    self.cancel_streams = False
                    await write('event: cancelled\ndata: {"reason":"too slow"}\n\n')
                    return response
                upto = state.revision if self._serves else position - 1
                for revision, events in list(state.changes(position, chosen)):
                    if revision <= upto:
                        await write(change(revision, events, prev))
                position = max(position, upto + 1)
                if not (self._serves and state.revision >= position):
                    await self._changed(due)
                await self._running.wait()
                if loop.time() >= due:
                    due = loop.time() + PROGRESS_S
                    await write(progress(position - 1))
        except Compacted as error:
            await write(f'event: cancelled\ndata: {{"reason":"{error.message}"}}\n\n')
            return response
        finally:
            self._streams.discard(transport)

    async def _changed(self, until: float) -> None:
        """Wait for a change of the state, or until the loop's clock says `until`."""
        woken = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        self.cluster.wakers.append(wake)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await woken
        finally:
            self.cluster.wakers.remove(wake)


def progress(revision: int) -> str:
    return f'event: progress\nid: {revision}\ndata: {{"revision":{revision}}}\n\n'


def change(revision: int, events: list[Happened], prev: bool) -> str:
    shown = []
    for event in events:
        fields: dict[str, Any] = {"type": event.type, **named("key", event.key)}
        if event.value is not None:
            fields |= {**named("value", event.value), "created": event.prev is None}
        if prev and event.prev is not None:
            fields |= named("prev", event.prev)
        shown.append(fields)
    data = json.dumps({"revision": revision, "events": shown})
    return f"event: change\nid: {revision}\ndata: {data}\n\n"


class FakeCluster:
    """Some nodes, one state. `leader` is who is said to lead, None for nobody.

    Args:
        size: how many nodes.
        clock: seconds for leases and TTLs; None: the time of the event loop.
        page: limits.page of the nodes.
    """

    def __init__(
        self, size: int = 3, *, clock: Callable[[], float] | None = None, page: int = 1000
    ) -> None:
        self._follows_loop = clock is None
        self.state = State(clock or (lambda: asyncio.get_running_loop().time()), page)
        self.state.on_change.append(self.wake)
        self.wakers: list[Callable[[], None]] = []
        self.nodes = [FakeNode(self, number) for number in range(1, size + 1)]
        self.leader: FakeNode | None = self.nodes[0]
        self.authorization: str | None = None
        self._ticker: asyncio.Task[None] | None = None

    @property
    def endpoints(self) -> list[str]:
        return [node.address for node in self.nodes]

    @property
    def asked(self) -> list[Asked]:
        return [asked for node in self.nodes for asked in node.asked]

    def view(self) -> dict[str, Any]:
        members = [{"id": n.node_id, "address": n.address, "role": "follower"} for n in self.nodes]
        leader = None
        if self.leader is not None:
            leader = {"id": self.leader.node_id, "address": self.leader.address}
        return {"cluster_id": "fake", "leader": leader, "term": 2, "members": members}

    def wake(self) -> None:
        """Have every stream look at what there is."""
        for waker in list(self.wakers):
            waker()

    async def start(self) -> None:
        for node in self.nodes:
            await node.start()
        if self._follows_loop:
            self._ticker = asyncio.create_task(self._tick())

    async def stop(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        for node in self.nodes:
            node.heal()
            await node.kill()

    async def _tick(self) -> None:
        """Let leases and TTLs end when they are due, while there is a leader."""
        loop = asyncio.get_running_loop()
        while True:
            due = self.state.next_due()
            await asyncio.sleep(0.25 if due is None else min(max(due - loop.time(), 0.01), 0.25))
            if self.leader is not None:
                self.state.tick()


@contextlib.asynccontextmanager
async def fake_cluster(size: int = 3, **options: Any) -> AsyncIterator[FakeCluster]:
    """A cluster in this very loop."""
    cluster = FakeCluster(size, **options)
    await cluster.start()
    try:
        yield cluster
    finally:
        await cluster.stop()


class ClusterThread:
    """A cluster in a thread and loop of its own, for callers that wait; `do` runs code there."""

    def __init__(self, size: int = 3, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake-cluster")
        self._thread.start()

        async def make() -> FakeCluster:
            cluster = FakeCluster(size, **options)
            await cluster.start()
            return cluster

        self.cluster = asyncio.run_coroutine_threadsafe(make(), self._loop).result(60)

    def do(self, action: Callable[[FakeCluster], Any]) -> Any:
        """What `action` of the cluster returns or its coroutine gives."""

        async def act() -> Any:
            result = action(self.cluster)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(act(), self._loop).result(60)

    def stop(self) -> None:
        try:
            asyncio.run_coroutine_threadsafe(self.cluster.stop(), self._loop).result(60)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(60)
            self._loop.close()


@contextlib.contextmanager
def cluster_thread(size: int = 3, **options: Any) -> Iterator[ClusterThread]:
    thread = ClusterThread(size, **options)
    try:
        yield thread
    finally:
        thread.stop()
