"""One request to one node, with what is certain about it afterwards.

`Transport` owns the connections, the nodes it knows of, and the tasks that go on behind a call
(learning the members, asking whether a silent node is alive). Which node is asked, when and how
often, is decided in `calls.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import orjson
from yarl import URL

from dengine.client.attempts import IdempotencyKeys
from dengine.client.nodes import Node, Nodes
from dengine.client.types import ClientClosed
from dengine.errors import DengineError, Outcome, from_dict

CONNECT_S = 2.0
CONNECTIONS = 512  # for calls; each stream has one of its own beside them
PROBE_S = 2.0  # for a node to say that it is ready
PROBED_FOR_S = 1.0  # how long that answer is good
LEARN_EVERY_S = 60.0
LEARN_AGAIN_S = 1.0  # after something went wrong
LEARN_WITHIN_S = 3.0

T = TypeVar("T")


class Unanswered(Exception):
    """No answer came. `sent`: the request may have arrived, and what it asks for may happen.
    `late`: it was waited for in vain.
    """

    def __init__(self, why: str, *, sent: bool, late: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.sent = sent
        self.late = late


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer of one node."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    address: str

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300 or self.status == 304

    def parse(self, build: Callable[[dict[str, Any]], T]) -> T:
        """What `build` makes of the JSON object in it. Raises DengineError: it is none of ours."""
        return self.understood(lambda: build(orjson.loads(self.body)))

    def understood(self, build: Callable[[], T]) -> T:
        try:
            return build()
        except (KeyError, TypeError, ValueError, AttributeError):
            raise stranger(self.address, self.status) from None

    def error(self) -> DengineError:
        return parse_error(self.address, self.status, self.body)


def parse_error(address: str, status: int, body: bytes) -> DengineError:
    """The error that an answer other than 2xx describes."""
    try:
        described = orjson.loads(body)
        if isinstance(described, dict) and isinstance(described.get("error"), str):
            return from_dict(described)
    except (orjson.JSONDecodeError, TypeError):
        pass
    return stranger(address, status)


def stranger(address: str, status: int) -> DengineError:
    """No node of ours answers like that; a proxy does, whose node may have done something."""
    outcome: Outcome = "unknown" if status >= 500 or 200 <= status < 300 else "none"
    return DengineError(
        f"{address} answered {status} in a form that is not ours: is that a dengine node?",
        outcome=outcome,
        status=status,
    )


@dataclass(slots=True)
class _Session:
    """aiohttp's session, where it may be used, and its free connections."""

    http: aiohttp.ClientSession
    loop: asyncio.AbstractEventLoop
    free: asyncio.Semaphore


# What a parent process had under way when it forked: closing it here would disturb it there.
_INHERITED: list[object] = []


@dataclass(slots=True)
class _Probe:
    """One question to a node whether it is ready, which everybody waits for who wants to know."""

    task: asyncio.Task[bool]
    asked_at: float


class Transport:
    """Requests to the nodes of one cluster.

    Args:
        nodes: those that are known.
        token: sent with every request, None without one.
    """

    def __init__(self, nodes: Nodes, token: str | None) -> None:
        self.nodes = nodes
        self.keys = IdempotencyKeys()
        self._authorization = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._session: _Session | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._streams: set[aiohttp.ClientResponse] = set()
        self._probes: dict[str, _Probe] = {}
        self._asked_members_at = -math.inf
        self._learning: asyncio.Task[None] | None = None
        self._pid = os.getpid()
        self.closed = False

    # --- a request --------------------------------------------------------------------------------

    async def attempt(
        self,
        node: Node,
        method: str,
        target: str,
        body: bytes | None,
        headers: Mapping[str, str],
        limit_s: float,
        sending: Callable[[], None] = lambda: None,
    ) -> Reply:
        """Ask `node` once.

        Args:
            sending: called when there is a connection for it; nothing has happened before that.

        Raises:
            Unanswered: no whole answer within `limit_s` seconds.
            ClientClosed: this client is closed.
        """
        # The node's own 504 says more than our silence, so let it come first.
        timeout_ms = min(max(int(limit_s * 900), 100), 60_000)
        whole = {**headers, **self._authorization, "Dengine-Timeout-Ms": str(timeout_ms)}
        session = self._open()
        until = session.loop.time() + limit_s
        await _acquire(session.free, until)
        try:
            sending()
            with unanswered():
                async with asyncio.timeout_at(until):
                    async with session.http.request(
                        method, _url(node, target), data=body, headers=whole
                    ) as response:
                        content = await response.read()
                        return Reply(response.status, response.headers, content, node.address)
        finally:
            session.free.release()

    async def stream(
        self, node: Node, target: str, headers: Mapping[str, str], limit_s: float
    ) -> aiohttp.ClientResponse:
        """The endless answer of `node`, which has to begin within `limit_s` seconds; `end` it.

        Raises:
            Unanswered: it does not.
            DengineError: it is a refusal.
        """
        timeout_ms = str(int(limit_s * 900))  # as in `attempt`
        sending = {**headers, **self._authorization, "Dengine-Timeout-Ms": timeout_ms}
        with unanswered():
            async with asyncio.timeout(limit_s):
                response = await self._open().http.get(_url(node, target), headers=sending)
        self._streams.add(response)  # which also keeps it from being collected before its end
        try:
            if response.status != 200 or response.content_type != "text/event-stream":
                with unanswered():
                    async with asyncio.timeout(limit_s):
                        body = await response.read()
                raise parse_error(node.address, response.status, body)
        except BaseException:
            self.end(response)
            raise
        return response

    def end(self, stream: aiohttp.ClientResponse) -> None:
        stream.close()
        self._streams.discard(stream)

    # --- what goes on behind ----------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """A task that ends with this client at the latest."""
        if self.closed:
            work.close()
            raise closed()
        self._leave_parent()
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def learn(self, *, trouble: bool = False) -> None:
        """Ask for the members when it is time, and soon when there is trouble."""
        now = asyncio.get_running_loop().time()
        every_s = LEARN_AGAIN_S if trouble else LEARN_EVERY_S
        if self.closed or now < self._asked_members_at + every_s:
            return
        if self._learning is not None and not self._learning.done():
            return
        self._asked_members_at = now
        self._learning = self.spawn(self._learn(), "dengine-client-members")

    async def _learn(self) -> None:
        loop = asyncio.get_running_loop()
        tried: list[Node] = []
        while (node := self.nodes.choose("any", loop.time(), tried)) is not None:
            tried.append(node)
            with contextlib.suppress(Unanswered, DengineError, ValueError):
                reply = await self.attempt(node, "GET", "/v1/cluster", None, {}, LEARN_WITHIN_S)
                if reply.ok:
                    view: dict[str, Any] = reply.parse(dict)
                    self.nodes.learn(view, node)
                    return

    async def is_ready(self, node: Node) -> bool:
        """Is `node` alive, and in touch with its cluster?"""
        loop = asyncio.get_running_loop()
        probe = self._probes.get(node.address)
        if probe is None or (probe.task.done() and loop.time() - probe.asked_at > PROBED_FOR_S):
            task = self.spawn(self._ask_ready(node), "dengine-client-probe")
            probe = self._probes[node.address] = _Probe(task, loop.time())
        await asyncio.wait({probe.task})
        if probe.task.cancelled():
            raise closed()
        return probe.task.result()

    async def _ask_ready(self, node: Node) -> bool:
        try:
            return (await self.attempt(node, "GET", "/readyz", None, {}, PROBE_S)).ok
        except (Unanswered, ClientClosed):
            return False

    # --- its life ---------------------------------------------------------------------------------

    def _open(self) -> _Session:
        """The session of this process and loop, made when it is first needed."""
        if self.closed:
            raise closed()
        self._leave_parent()
        loop, held = asyncio.get_running_loop(), self._session
        if held is None:
            held = self._session = _Session(_new_session(), loop, asyncio.Semaphore(CONNECTIONS))
        if held.loop is not loop:
            raise RuntimeError("a Client belongs to the event loop in which it was first used")
        return held

    def _leave_parent(self) -> None:
        """In a forked process: leave alone what belongs to its parent."""
        if self._pid == os.getpid():
            return
        _INHERITED.append((self._session, self._tasks, self._streams, self._probes, self._learning))
        self._pid, self._session = os.getpid(), None
        self._tasks, self._streams, self._probes, self._learning = set(), set(), {}, None
        self._asked_members_at = -math.inf

    async def close(self) -> None:
        """End everything that this client has under way. A second time does nothing."""
        if self.closed:
            return
        self.closed = True
        self._leave_parent()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in tuple(self._streams):
            self.end(stream)
        if self._session is not None:
            await self._session.http.close()
        self._session = None


async def _acquire(free: asyncio.Semaphore, until: float) -> None:
    """Raises Unanswered: no connection was free before the time `until`."""
    try:
        async with asyncio.timeout_at(until):
            await free.acquire()
    except TimeoutError:
        why = f"all {CONNECTIONS} connections of this client were in use"
        raise Unanswered(why, sent=False) from None


def closed(outcome: Outcome = "none") -> ClientClosed:
    return ClientClosed("this client is closed: make a new one", outcome=outcome)


def _new_session() -> aiohttp.ClientSession:
    session = aiohttp.ClientSession(
        # Calls wait for `_Session.free`, where it is known that nothing has been sent. Streams are
        # open for long: counted together, waiters for locks would keep every call from its turn.
        connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=10),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Content-Type", "Accept-Encoding"),
    )
    # aiohttp sends a PUT again by itself when a kept connection breaks; what happened to the first
    # one is then nobody's knowledge. The pin in pyproject.toml is also for this name.
    session._retry_connection = False
    return session


def _url(node: Node, target: str) -> URL:
    return URL(f"http://{node.address}{target}", encoded=True)


@contextlib.contextmanager
def unanswered() -> Iterator[None]:
    """What can go wrong on the way, as Unanswered."""
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise Unanswered(_reason(error), sent=False) from None
    except TimeoutError:
        raise Unanswered("timed out", sent=True, late=True) from None
    except (aiohttp.ClientError, OSError) as error:
        raise Unanswered(_reason(error), sent=True) from None


def _reason(error: Exception) -> str:
    """A few words for a failed connection."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "hung up"
    if isinstance(error, aiohttp.ClientConnectorError):
        inner = error.os_error
        if isinstance(inner, ConnectionRefusedError):
            return "refused"
        return (inner.strerror or str(inner)).lower()
    return str(error) or type(error).__name__
