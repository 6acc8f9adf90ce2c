"""The other nodes: one identity-checked stream to each, dialled again and again.

**Handshake.** Where there is a peer secret, both ends first prove that they know it
(authentication.py). The dialler sends its `Hello`, the acceptor answers with its own, the dialler
confirms with a `Ping`. Each side may answer `Refused` instead. Only then is the stream in use.

**One stream per pair.** Both ends dial, so two streams can appear at once; both ends apply
`_supersedes` and reach the same verdict. A verdict that a lost packet spoils leaves at worst no
stream for the moment until the next dial, never two ends that use different ones.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import aiohttp
from aiohttp import web

from dengine.errors import ClusterUnavailable
from dengine.node.authentication import (
    NOT_AUTHENTICATED,
    SEAL_BYTES,
    Complaints,
    NotAuthenticated,
    Unproven,
    authenticate,
)
from dengine.node.stream import BEAT_S, CLOSE_TIMEOUT_S, Stream, StreamEnded, explain
from dengine.node.wire import MAX_FRAME_BYTES, Challenge, Frame, Hello, Ping, Refused
from dengine.raft.types import MemberId
from dengine.security import PeerSecret

log = logging.getLogger("dengine.peers")

PATH = "/v1/peer"
HANDSHAKE_TIMEOUT_S = 2.0  # from the first SYN to the answered Hello
REDIAL_MIN_S = 0.5  # between the starts of two dials; the jitter keeps two ends from dialling
REDIAL_MAX_S = 1.0  # in step for ever
REDIAL_LOST_S = 0.05  # how soon a stream that had lasted is dialled again
MAX_UNSETTLED = 64  # streams in a handshake or closing
MAX_MESSAGE_BYTES = SEAL_BYTES + MAX_FRAME_BYTES + 1  # aiohttp's limit is exclusive

_UNKNOWN = (
    " did not prove that it knows the peer secret and gets nothing: "
    "security.peer_secret_file must hold the same on every node"
)
_WE_HAVE_NONE = " asks for a peer secret, and this node has none: set security.peer_secret_file"


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """What is known of one node; `error` is a short reason ("refused", "timed out", ...)."""

    node_id: int
    address: str
    connected: bool
    member: MemberId | None
    error: str | None


@dataclass(slots=True)
class _Dialler:
    """The task that keeps a stream to one node, and why each of its addresses failed last."""

    addresses: tuple[str, ...]
    errors: dict[str, str] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def error(self) -> str | None:
        """One reason, or each address with its own where there are several."""
        known = [(a, self.errors[a]) for a in self.addresses if a in self.errors]
        if len(self.addresses) == 1 and known:
            return known[0][1]
        return "; ".join(f"{address} {error}" for address, error in known) or None


class Peers:
    """All streams of this node. Made, used and closed on one event loop.

    Args:
        hello: our fresh `Hello` for a handshake, given the node we expect (None: we were called)
            and the address we dialled ("" when called).
        admit: given the other side's `Hello` and the host it is seen from, a reason to refuse it.
        on_refused: the node expected or speaking, and why it does not want us.
        on_connected: a stream is in use; its `Hello`.
        on_frame: a frame other than `Ping` and `Refused` from this member.
        on_disconnected: the stream to this member is out of use; what was sent may be lost.
        secret: what every other node must know too; None: nobody is asked.

    Callbacks are called on the loop, must not wait, and may call every method here but `close`.
    When one raises, or a task in here dies, `failed` gets the exception: the node awaits it and
    ends the process.
    """

    def __init__(
        self,
        *,
        hello: Callable[[int | None, str], Hello],
        admit: Callable[[Hello, str], Refused | None],
        on_refused: Callable[[int | None, Refused], None],
        on_connected: Callable[[Hello], None],
        on_frame: Callable[[MemberId, Frame], None],
        on_disconnected: Callable[[MemberId], None],
        secret: PeerSecret | None = None,
    ) -> None:
        self._hello = hello
        self._admit = admit
        self._on_refused = on_refused
        self._on_connected = on_connected
        self._on_frame = on_frame
        self._on_disconnected = on_disconnected
        self._secret = secret
        self._complaints = Complaints()
        self._loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[None] = self._loop.create_future()
        self._streams: dict[MemberId, Stream] = {}  # in use, the newest last
        self._open: set[Stream] = set()  # also those in a handshake and those that are closing
        self._diallers: dict[int, _Dialler] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None
        self._closed = False
        self._spawn(self._keep_alive())

    # --- What the node calls.

    def set_targets(self, targets: Mapping[int, Sequence[str]]) -> None:
        """Dial these nodes from now on, each at its addresses ("host:port") in order.

        A node that is no longer named is not dialled any more and loses the stream that we
        dialled; one that it dialled stays.
        """
        for node_id in self._diallers.keys() - targets.keys():
            task = self._diallers.pop(node_id).task
            if task is not None:
                task.cancel()
        for node_id, addresses in targets.items():
            if self._closed:
                return
            known = self._diallers.get(node_id)
            if known is None:
                self._diallers[node_id] = known = _Dialler(tuple(addresses))
                known.task = self._spawn(self._keep_dialling(node_id, known))
            elif known.addresses != tuple(addresses):
                known.addresses = tuple(addresses)
                known.wake.set()

    def send(self, to: MemberId, frame: Frame) -> bool:
        """Send without waiting: the kernel has the frame at the latest when the loop next turns.

        False: dropped, because there is no stream to exactly this incarnation or more than
        `MAX_QUEUED_BYTES` wait on it. True promises nothing: the link may break.

        Raises:
            InvariantBroken: the frame is larger than `MAX_FRAME_BYTES`.
        """
        stream = self._streams.get(to)
        return stream is not None and stream.send(frame)

    def disconnect(self, node_id: int, refused: Refused) -> None:
        """Tell this node why it is not wanted and end its streams."""
        for member, stream in list(self._streams.items()):
            if member.id == node_id:
                stream.refuse(refused)
                self._drop(stream, f"we ended it: {refused.message}")

    def connected(self, node_id: int) -> Hello | None:
        """The `Hello` of this node's newest stream in use (a wiped node may briefly have two)."""
        for member in reversed(self._streams):
            if member.id == node_id:
                return self._streams[member].hello
        return None

    def status(self) -> dict[int, PeerStatus]:
        """Every node that we dial or have a stream to, by id."""
        report = {
            node_id: PeerStatus(node_id, ", ".join(d.addresses), False, None, d.error())
            for node_id, d in self._diallers.items()
        }
        for member, stream in self._streams.items():
            report[member.id] = PeerStatus(member.id, stream.address, True, member, None)
        return report

    async def accept(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve `GET /v1/peer`: returns when the stream is over.

        Raises:
            ClusterUnavailable: not now, for there is too much of it under way.
            web.HTTPException: the request is no WebSocket handshake.
        """
        if self._closed:
            raise ClusterUnavailable("this node is stopping")
        if len(self._open) - len(self._streams) >= MAX_UNSETTLED:
            raise ClusterUnavailable(
                f"{MAX_UNSETTLED} handshakes are under way already: try again in a moment"
            )
        socket = web.WebSocketResponse(
            timeout=CLOSE_TIMEOUT_S,
            compress=False,
            max_msg_size=MAX_MESSAGE_BYTES,
        )
        await socket.prepare(request)
        try:
            await self._own(Stream(socket, None), None, self._loop.time() + HANDSHAKE_TIMEOUT_S)
        except Exception as error:
            self._fail(error)
        return socket

    async def close(self) -> None:
        """Flush and close all streams, end all tasks; takes at most about CLOSE_TIMEOUT_S."""
        self._closed = True
        try:
            for stream in list(self._open):
                self._drop(stream, "this node is stopping")
                stream.close("this node is stopping")
            if self._open:
                ends = [stream.finished for stream in self._open]
                await asyncio.wait(ends, timeout=2 * CLOSE_TIMEOUT_S)
        finally:
            self._diallers.clear()
            for task in self._tasks:
                task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT_S)
        if self._session is not None:
            await self._session.close()

    # --- Dialling.

    async def _keep_dialling(self, node_id: int, dialler: _Dialler) -> None:
        while not self._closed:
            started = self._loop.time()
            for address in dialler.addresses:
                if self.connected(node_id) is not None:
                    break
                error = await self._dial(node_id, address)
                if dialler.errors.get(address) != error and self.connected(node_id) is None:
                    log.info("node %d at %s: %s", node_id, address, error)
                dialler.errors[address] = error
            dialler.wake.clear()
            if self.connected(node_id) is not None:
                await dialler.wake.wait()
            earliest = started + random.uniform(REDIAL_MIN_S, REDIAL_MAX_S)
            pause = random.uniform(0, REDIAL_LOST_S)
            await asyncio.sleep(max(pause, earliest - self._loop.time()))

    async def _dial(self, node_id: int, address: str) -> str:
        """One attempt and, if it succeeds, the whole life of the stream. Returns why it ended."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        deadline = self._loop.time() + HANDSHAKE_TIMEOUT_S
        try:
            async with asyncio.timeout_at(deadline):
                socket = await self._session.ws_connect(
                    f"http://{address}{PATH}",
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT_S),
                    max_msg_size=MAX_MESSAGE_BYTES,
                )
        except (aiohttp.ClientError, OSError, UnicodeError) as error:
            return explain(error)
        return await self._own(Stream(socket, address), node_id, deadline)

    # --- A stream's life.

    async def _own(self, stream: Stream, expects: int | None, deadline: float) -> str:
        """Run `stream` from handshake to end as its owner; returns the reason of the end."""
        reason = "closed"
        garbled = False
        self._open.add(stream)
        try:
            await self._shake_hands(stream, expects, deadline)
            self._take_into_use(stream)
            while True:
                self._deliver(stream, await stream.receive())
        except StreamEnded as end:
            reason, garbled = str(end), end.garbled
        finally:
            self._open.discard(stream)
            try:
                if not self._drop(stream, reason, garbled=garbled) and garbled:
                    self._complaints.about(
                        stream.remote_host, f"a stranger at {stream.remote_host} {reason}"
                    )
            finally:
                await stream.finish()
        return reason

    async def _shake_hands(self, stream: Stream, expects: int | None, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                if self._secret is not None:
                    await self._authenticate(stream, self._secret)
                if expects is None:
                    await self._answer(stream)
                else:
                    await self._greet(stream, expects)
        except TimeoutError:
            raise StreamEnded("timed out") from None

    async def _authenticate(self, stream: Stream, secret: PeerSecret) -> None:
        try:
            await authenticate(stream, secret)
        except NotAuthenticated:
            await self._reject(stream, _UNKNOWN)

    async def _reject(self, stream: Stream, complaint: str) -> NoReturn:
        """End the handshake with a node that has no secret, or another one, or no need of ours."""
        self._complain(stream, complaint)
        stream.seal = (
            Unproven()
        )  # what follows says nothing, and a code would be something to guess at
        stream.refuse(NOT_AUTHENTICATED)
        with suppress(StreamEnded):
            while True:  # until the other side has read it and closes
                await stream.receive()
        raise StreamEnded("not authenticated")

    def _complain(self, stream: Stream, complaint: str) -> None:
        address = stream.dialled or stream.remote_host
        self._complaints.about(address, address + complaint)

    async def _greet(self, stream: Stream, expects: int) -> None:
        if self.connected(expects) is not None:
            raise StreamEnded("was faster")
        ours = self._hello(expects, stream.dialled or "")
        stream.send(ours)
        await self._meet(stream, expects)
        stream.own = ours.member
        stream.send(Ping())

    async def _answer(self, stream: Stream) -> None:
        await self._meet(stream, None)
        # Where we would have dialled: one that listens on a wildcard may learn its address here.
        dialler = self._diallers.get(stream.hello.member.id)
        ours = self._hello(None, dialler.addresses[0] if dialler and dialler.addresses else "")
        stream.own = ours.member
        stream.send(ours)
        confirmation = await stream.receive()
        if isinstance(confirmation, Refused):
            raise self._refused(stream.hello.member.id, confirmation)
        if not isinstance(confirmation, Ping):
            raise StreamEnded("did not confirm the handshake", garbled=True)

    async def _meet(self, stream: Stream, expects: int | None) -> None:
        """Receive the other side's Hello and judge it."""
        theirs = await stream.receive()
        if isinstance(theirs, Refused):
            if theirs.reason == "not_authenticated":
                self._complain(stream, _WE_HAVE_NONE)
            raise self._refused(expects, theirs)
        if isinstance(theirs, Challenge):
            await self._reject(stream, _WE_HAVE_NONE)
        if not isinstance(theirs, Hello):
            raise StreamEnded("did not begin with a Hello", garbled=True)
        if expects not in (None, theirs.member.id):
            raise StreamEnded(f"node {theirs.member.id} answers there")
        refused = self._admit(theirs, stream.remote_host)
        if refused is not None:
            log.debug("node %d at %s: %s", theirs.member.id, stream.remote_host, refused.message)
            stream.refuse(refused)
            while True:  # until the other side has read why and closes
                await stream.receive()
        stream.hello = theirs

    def _refused(self, node_id: int | None, refused: Refused) -> StreamEnded:
        if refused.reason == "not_authenticated":
            return StreamEnded("not authenticated")  # no member speaks: it concerns nobody else
        self._on_refused(node_id, refused)
        return StreamEnded(refused.reason.replace("_", " "))

    def _deliver(self, stream: Stream, frame: Frame) -> None:
        member = stream.hello.member
        if type(frame) is Ping or self._streams.get(member) is not stream:
            return
        if type(frame) is Refused:
            raise self._refused(member.id, frame)
        self._on_frame(member, frame)

    def _take_into_use(self, stream: Stream) -> None:
        """Make `stream` the one to its member.

        Raises:
            StreamEnded: there is one already, and it is to stay.
        """
        member = stream.hello.member
        rival = self._streams.get(member)
        if self._closed or (rival is not None and not _supersedes(stream, rival)):
            raise StreamEnded("one stream is enough")
        if rival is not None:
            self._drop(rival, "replaced by another stream")
            rival.close("replaced by another stream")
        self._streams[member] = stream
        log.info("node %d at %s: connected", member.id, stream.address)
        self._on_connected(stream.hello)

    def _drop(self, stream: Stream, reason: str, *, garbled: bool = False) -> bool:
        """Take `stream` out of use; False when it was not in use."""
        if stream not in self._streams.values():
            return False
        member = stream.hello.member
        del self._streams[member]
        level = logging.WARNING if garbled else logging.INFO
        log.log(level, "node %d at %s: disconnected: %s", member.id, stream.address, reason)
        if (dialler := self._diallers.get(member.id)) is not None:
            if stream.dialled is None:  # what our own dials met before says nothing any more
                dialler.errors = dict.fromkeys(dialler.addresses, reason)
            dialler.wake.set()
        self._on_disconnected(member)
        return True

    # --- Housekeeping.

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            for stream in self._streams.values():
                stream.beat()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        log.error("the peer streams failed", exc_info=error)
        if not self.failed.done():
            self.failed.set_exception(error)


def _supersedes(new: Stream, old: Stream) -> bool:
    """Whether `new` replaces `old`, a stream to the same member.

    A new boot means that the old process is gone. A node dials only when it has no stream, so a
    second dial by the same end, or one while the old stream is quiet, says that the other side
    lost the old one. What remains is both ends dialling at once: the lower member's dial stays.
    """
    if new.hello.boot != old.hello.boot or old.quiet:
        return True
    if (new.dialled is None) == (old.dialled is None):
        return True
    return (new.dialled is not None) == (new.own < new.hello.member)
