"""A watch: every change of a key or prefix, in order, once, from whichever node can tell.

It goes on by itself on another node when its own dies, hangs, is cut off from its cluster, or ends
the stream. What it has seen is a revision, so nothing is lost and nothing comes twice. The stream
is one of server-sent events.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from types import AsyncGeneratorType, TracebackType
from typing import Any

import aiohttp
import orjson

from dengine.client.attempts import Attempts
from dengine.client.calls import positive
from dengine.client.encoding import target
from dengine.client.nodes import Node
from dengine.client.transport import Transport, Unanswered, closed, unanswered
from dengine.client.types import Change
from dengine.errors import Compacted, DengineError, RequestTimeout

BEGIN_S = 3.0  # for a node to begin its answer
QUIET_S = 3.0  # without a byte; then the node is asked whether it is ready
PAUSE_S = 0.05
PAUSE_MAX_S = 2.0
MAX_MESSAGE_BYTES = 128 << 20  # a command meets 16 MiB of values, of 6 bytes each in JSON at worst


class _Ended(Exception):
    """This stream is over and the next one goes on. `well`: the node has done nothing wrong."""

    def __init__(self, *, well: bool) -> None:
        super().__init__()
        self.well = well


class Watch:
    """The changes of a key or prefix, one `Change` for each revision; made by `Client.watch`.

    `revision`: everything up to here has been delivered or was about other keys, so a later watch
    with `from_revision = revision + 1` continues this one. It is 0 until the watch has begun.

    Example:
        async with client.watch(prefix="config/") as watch:
            await client.put("config/color", b"blue")
            change = await anext(watch)
        assert change.events[0].value == b"blue"
    """

    def __init__(
        self,
        transport: Transport,
        chosen: dict[str, bytes],
        from_revision: int | None,
        prev: bool,
        begin_s: float,
    ) -> None:
        # Nothing in there knows of this object, so that it ends with the last who holds it.
        self._course = _Course(transport, chosen, from_revision, prev, begin_s)
        self._awaited = False  # is there a task that waits in it?

    def __del__(self) -> None:
        """Who leaves the loop over it with `break` lets go of the stream."""
        self._course.let_go()

    @property
    def revision(self) -> int:
        return self._course.revision

    async def __aenter__(self) -> Watch:
        """From here on nothing is missed. Errors are those of `Client.get`, and WatchOverflow: the
        nodes have enough watches (limits.watchers).
        """
        with self._only_here():
            await self._course.begin()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> Change:
        """The next change, however long that takes.

        Raises:
            RuntimeError: another task waits for it already.
            Compacted: it is no longer kept, nor is anything up to `details["compact_revision"]`.
                Read the keys anew, and watch from the revision behind that of the reading.
            Unauthorized, InvalidRequest: no node will ever answer.
            ClientClosed: the client was closed.
        """
        with self._only_here():
            change = await self._course.next()
        if change is None:
            raise StopAsyncIteration
        return change

    @contextlib.contextmanager
    def _only_here(self) -> Iterator[None]:
        if self._awaited:
            raise RuntimeError("another task waits in this watch: open one for each")
        self._awaited = True
        try:
            yield
        finally:
            self._awaited = False

    async def aclose(self) -> None:
        """Let go of the stream. The iteration has ended, also for a task that waits in it."""
        await self._course.aclose()


class _Course:
    """Where a watch is, and the stream that brings it on."""

    def __init__(
        self,
        transport: Transport,
        chosen: dict[str, bytes],
        from_revision: int | None,
        prev: bool,
        begin_s: float,
    ) -> None:
        self._transport = transport
        self._chosen = chosen
        self._prev = prev
        self._begin_s = begin_s
        self.revision = 0 if from_revision is None else from_revision - 1
        self._placed = from_revision is not None  # is it fixed where it starts?
        self._problem: DengineError | str = "nobody to ask"  # why the last stream was left
        self._ready: deque[Change] = deque()
        self._failures = 0
        self._unliked: list[Node] = []  # nodes that have just ended a stream of ours
        self._stream: AsyncGenerator[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # of the stream
        self._response: aiohttp.ClientResponse | None = None
        self._greeted = False  # the stream has said its first word
        self._ended = False

    async def next(self) -> Change | None:
        """What `Watch.__anext__` says; None: it has ended."""
        if self._ended:
            return None
        try:
            await self.begin()
            while not (self._ready or self._ended):
                await self._advance()
            if self._ended:
                await self.aclose()  # once more: it may have come while a stream began
                return None
        except DengineError as error:
            if self._placed or not error.retryable:  # else it can still begin
                await self.aclose()
            raise
        change = self._ready.popleft()
        self.revision = change.revision
        return change

    async def aclose(self) -> None:
        self._ended = True
        if self._stream is None:
            return
        if isinstance(self._stream, AsyncGeneratorType) and self._stream.ag_running:
            if self._response is not None:
                self._response.close()
            return
        stream, self._stream = self._stream, None
        await stream.aclose()

    def let_go(self) -> None:
        """Nobody watches any more; called from any thread."""
        if self._stream is not None and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, its streams are ended
                self._loop.call_soon_threadsafe(self._close_soon)

    def _close_soon(self) -> None:
        if not self._transport.closed:  # else this stream is, too
            self._transport.spawn(self.aclose(), "dengine-client-watch-end")

    async def begin(self) -> None:
        """Fix where the watch starts: its first stream says so, which the node that has opened it
        keeps from then on. A revision that was read before may be forgotten when a stream comes to
        ask for it. A stream that breaks before it has said it has delivered nothing, so that
        another one may begin later.

        Raises:
            DengineError: no node has opened one in time.
        """
        if self._placed:
            return
        try:
            async with asyncio.timeout(positive(self._begin_s)) as limit:
                while not (self._placed or self._ended):
                    await self._advance()
        except TimeoutError:
            if not limit.expired():
                raise
            if isinstance(self._problem, DengineError):
                raise Attempts("read").certain(self._problem) from None
            raise RequestTimeout(
                f"the watch has not begun within {self._begin_s:g} s ({self._problem})",
                outcome="none",
            ) from None

    async def _advance(self) -> None:
        """Let the stream make progress; open the next one when it ends."""
        if self._transport.closed:
            raise closed()
        if self._stream is None:
            self._stream, self._loop = self._messages(), asyncio.get_running_loop()
        try:
            await anext(self._stream)
        except StopAsyncIteration:
            self._stream = None
            if self._failures:
                pause_s = min(PAUSE_S * 2 ** (self._failures - 1), PAUSE_MAX_S)
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))

    async def _messages(self) -> AsyncGenerator[None]:
        """One stream of one node; each turn has taken in what came. Ends where the next begins."""
        loop = asyncio.get_running_loop()
        nodes = self._transport.nodes
        node = nodes.choose("follower", loop.time(), self._unliked)
        if node is None:
            self._unliked.clear()
            node = nodes.choose("follower", loop.time())
        assert node is not None, "there is always a node"
        where = target(
            "/v1/watch",
            **self._chosen,
            from_revision=self._seen + 1 if self._placed else None,
            prev="1" if self._prev else None,
        )
        try:
            response = await self._transport.stream(node, where, {}, BEGIN_S)
            self._response, self._greeted, parser = response, False, Parser()
            while True:
                chunk = await self._chunk(node, response.content)
                try:
                    messages = parser.feed(chunk)
                except ValueError as error:
                    raise Unanswered(str(error), sent=False) from None
                for message in messages:
                    self._take(message)
                yield
        except _Ended as ended:
            self._unliked.append(node)
            self._failures = 1 if ended.well else self._failures + 1
        except Unanswered as failure:
            self._problem = f"{node.address}: {failure.why}"
            if not self._ended:
                self._leave(node)
        except DengineError as error:
            if error.status < 500 and not error.retryable:
                raise
            nodes.follow(error.leader, node)
            if not error.retryable and len(self._unliked) + 1 >= len(nodes):
                raise  # not one of them can serve it
            self._problem = error
            self._leave(node)
        finally:
            if self._response is not None:
                self._transport.end(self._response)
            self._response = None

    def _leave(self, node: Node) -> None:
        node.failed(asyncio.get_running_loop().time())
        self._unliked.append(node)
        self._failures += 1
        self._transport.learn(trouble=True)

    @property
    def _seen(self) -> int:
        """The last revision that is here, delivered or not."""
        return max(self._ready[-1].revision, self.revision) if self._ready else self.revision

    async def _chunk(self, node: Node, content: aiohttp.StreamReader) -> bytes:
        """The next bytes of a stream.

        Raises:
            Unanswered: it broke, or its node is not well.
            _Ended: it ended as it should.
        """
        while True:
            try:
                async with asyncio.timeout(QUIET_S):
                    with unanswered():
                        data = await content.readany()
            except TimeoutError:
                if not await self._transport.is_ready(node):
                    raise Unanswered("is silent and not ready", sent=False) from None
                continue
            if not data:
                raise _Ended(well=False)
            return data

    def _take(self, message: Message) -> None:
        if message.event == "cancelled":  # too slow, or the node stops: resume where we are
            raise (_compacted(message) if self._placed else None) or _Ended(well=True)
        if message.event not in ("change", "progress"):
            return
        try:
            fields: Any = orjson.loads(message.data)
            revision = int(fields["revision"])
            change = Change.parse(fields) if message.event == "change" else None
        except (ValueError, KeyError, TypeError) as error:
            raise Unanswered(f"sent a message that is none: {error}", sent=False) from None
        self._failures = 0
        self._unliked.clear()
        # The first message of a stream says how far the node is, not how far the stream is: what
        # happened before that and was asked for comes after it.
        greeting, self._greeted = not self._greeted and change is None, True
        if not self._placed:  # of one that begins from now on, both are the same
            self.revision = revision if change is None else revision - 1
            self._placed = True
        if greeting or revision <= self._seen:
            return  # the latter: a node that is behind, or repeats itself
        if change is not None:
            self._ready.append(change)
        elif not self._ready:  # else the changes before it are still to be delivered
            self.revision = revision


def _compacted(message: Message) -> Compacted | None:
    """What a `cancelled` says that no resumption can make up for."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        fields: Any = orjson.loads(message.data)
        compact = int(fields["compact_revision"])
        return Compacted(str(fields.get("reason")), compact_revision=compact)
    return None


# --- server-sent events ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    event: str
    data: bytes


class Parser:
    """`feed` returns the messages that are complete. The rest waits for more, and is lost with it:
    a stream that is cut in a message has not delivered that message.
    """

    def __init__(self) -> None:
        self._rest = bytearray()  # of a line whose end is still to come
        self._event = ""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[Message]:
        """Raises ValueError for a message of more than MAX_MESSAGE_BYTES."""
        found: list[Message] = []
        self._rest += chunk
        if b"\n" in chunk:
            *lines, rest = bytes(self._rest).split(b"\n")
            self._rest = bytearray(rest)
            for line in lines:
                message = self._line(line.removesuffix(b"\r"))
                if message is not None:
                    found.append(message)
        if self._size + len(self._rest) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of more than {MAX_MESSAGE_BYTES} bytes")
        return found

    def _line(self, line: bytes) -> Message | None:
        if not line:
            event, data = self._event, self._data
            self._event, self._data, self._size = "", [], 0
            return Message(event or "message", b"\n".join(data)) if data else None
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif name == b"data":
            self._data.append(value)
            self._size += len(value)
        return None  # comments begin with a colon; what else there may be says nothing to us
