"""Reads of the state of the node in this process, each as fresh as it was asked to be, and watches
of it: every change of a key or prefix, in order, once.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from types import TracebackType
from typing import Final

from dengine.api.kv import CONSISTENCY_LEVELS, DEFAULT_BARRIER
from dengine.client.encoding import as_from_revision
from dengine.client.types import Change, Event, EventType, LeaseInfo, Listing, Page, Value
from dengine.config import Config
from dengine.embedded.calls import Calls
from dengine.embedded.commands import checked_key, item
from dengine.errors import Compacted, DengineError, InvalidRequest, RequestTimeout
from dengine.kv.store import DELETE, EXPIRE, PUT
from dengine.node import watch_hub
from dengine.node.node import Node
from dengine.node.watch_hub import Cancelled, Changes, Progress, Selection
from dengine.node.watch_messages import Part, Reading

Span = tuple[bytes, bytes | None]  # the first key, and the first behind the last
PAUSE_S: Final = 0.05  # before a watch is opened again
PAUSE_MAX_S: Final = 2.0
TYPES: Final[dict[int, EventType]] = {PUT: "put", DELETE: "delete", EXPIRE: "expire"}


class Reads:
    """What `Engine` documents, by the same names.

    Args:
        config: with the limits, and the consistency of reads that name none.
    """

    def __init__(self, node: Node, calls: Calls, config: Config) -> None:
        self._node = node
        self._calls = calls
        self._limits = config.limits
        self._default = config.read.default

    async def get(
        self, key: str | bytes, consistency: str | None, timeout_s: float | None
    ) -> Value | None:
        name = checked_key(key, self._limits)

        async def look(_: float) -> Value | None:
            state = self._node.state
            record = state.get(name)
            if record is None:
                return None
            ttl_s = self._node.lifetimes.remaining_s(record)
            return Value(name, record.value, record.mod_revision, state.revision, ttl_s)

        return await self._calls.read(look, self._as_fresh_as(consistency), timeout_s)

    def list(
        self,
        span: Span,
        limit: int | None,
        keys_only: bool,
        consistency: str | None,
        timeout_s: float | None,
    ) -> Listing:
        first, last = span
        wanted = self._as_fresh_as(consistency)
        if limit is not None and limit < 1:
            raise ValueError(f"limit is at least 1, not {limit}")

        async def fetch(most: int | None, after: str | None) -> Page:
            rows = self._limits.page if most is None else min(most, self._limits.page)
            start = first if after is None else bytes.fromhex(after)

            async def look(_: float) -> Page:
                page = self._node.state.page(start, last, rows, keys_only)
                lifetimes = self._node.lifetimes
                items = tuple(item(key, record, lifetimes) for key, record in page.items)
                return Page(page.revision, items, None if page.next is None else page.next.hex())

            return await self._calls.read(look, wanted, timeout_s)

        return Listing(fetch, limit)

    async def count(self, span: Span, consistency: str | None, timeout_s: float | None) -> int:
        loop = asyncio.get_running_loop()

        async def look(deadline: float) -> int:
            total = 0
            for counted in self._node.state.count(*span):
                total = counted
                await asyncio.sleep(0)  # others get their turn every 1000 keys
                await self._calls.require_alive(deadline)
                if loop.time() > deadline:
                    raise RequestTimeout(
                        f"counted {total} keys in time and there are more: count smaller ranges",
                        outcome="none",
                    )
            return total

        return await self._calls.read(look, self._as_fresh_as(consistency), timeout_s)

    async def lease(self, lease: str, timeout_s: float | None) -> LeaseInfo:
        async def look(_: float) -> LeaseInfo:
            seen = self._node.lifetimes.lease(lease)
            return LeaseInfo(seen.lease, seen.ttl_s, seen.remaining_s, tuple(seen.keys))

        return await self._calls.read(look, DEFAULT_BARRIER, timeout_s)

    def _as_fresh_as(self, asked: str | None) -> str:
        wanted = self._default if asked is None else asked
        if wanted not in CONSISTENCY_LEVELS:
            raise InvalidRequest(f"consistency is one of {', '.join(CONSISTENCY_LEVELS)}")
        return wanted


# --- watches --------------------------------------------------------------------------------------


class Watch:
    """The changes of a key or prefix, one `Change` for each revision; made by `Engine.watch`, for
    one reader at a time.

    What waits for a slow reader is bounded: it waits in the history that the cluster keeps, and the
    watch goes on from there.

    `revision`: everything up to here has been delivered or was about other keys, so a later watch
    with `from_revision = revision + 1` continues this one, here or at another node. It is 0 until
    the watch has begun.

    Example:
        async with engine.watch(prefix="config/") as watch:
            await engine.put("config/color", b"blue")
            change = await anext(watch)
        assert change.events[0].value == b"blue"
    """

    def __init__(
        self,
        node: Node,
        calls: Calls,
        selection: Selection,
        from_revision: int | None,
        prev: bool,
    ) -> None:
        self._source: watch_hub.Watch | None = None
        from_revision = as_from_revision(from_revision)
        self._node = node
        self._calls = calls
        self._selection = selection
        self._prev = prev
        self._placed = from_revision is not None  # is it fixed where it starts?
        self._begun = False
        self._large: _LargeChange | None = None  # was taken from there, and not returned yet
        self._ended = False
        self._awaited = False  # is there a task that waits for the next change?
        self.revision = 0 if from_revision is None else from_revision - 1

    def __del__(self) -> None:
        """Who leaves the loop over it with `break` gives its place in the node back."""
        if self._source is not None:
            # Perhaps in another thread, or amid the work of the node's own watches: not here.
            with suppress(RuntimeError):  # the loop is closed, and its node has ended before
                self._loop.call_soon_threadsafe(self._source.close)

    async def __aenter__(self) -> Watch:
        """From here on nothing is missed. Raises as `Engine.watch` says."""
        self._source = await self._open()
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
        """The next change, however long that takes; nothing is lost where this is cancelled.

        Raises:
            RuntimeError: another task waits for it already, or this is another event loop.
            DengineError: as `Engine.watch` says.
        """
        self._calls.require_loop()
        if self._awaited:
            raise RuntimeError("another task waits in this watch: open one for each")
        self._awaited = True
        try:
            return await self._next()
        finally:
            self._awaited = False

    async def _next(self) -> Change:
        while not self._ended:
            if self._large is not None:
                change = await self._large.made()
                self._large = None
                if change is not None:
                    self.revision = change.revision
                    return change
            if self._source is None:
                self._source = await self._open()
            try:
                message = await anext(self._source)
            except StopAsyncIteration:  # it was closed meanwhile
                self._source = None
                continue
            match message:
                case Changes(is_large=True):
                    self._large = _LargeChange(self._source, message)
                case Changes():
                    self.revision = message.revision
                    self._source.done()
                    return Change(message.revision, tuple(message.whole(_events)))
                case Progress(revision):
                    self.revision = max(self.revision, revision)
                case Cancelled(reason, compact_revision):
                    self._source = None
                    if compact_revision is not None:
                        self._ended = True
                        raise Compacted(reason, compact_revision=compact_revision)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """No more changes, also for a task that waits for one: its iteration has ended."""
        self._ended = True
        if self._source is not None:
            self._source.close()
            self._source = None

    async def _open(self) -> watch_hub.Watch:
        """Begin, or go on behind the last revision, however long that takes then."""
        pause_s = PAUSE_S
        while True:
            try:
                return await self._open_now()
            except DengineError as error:
                if not self._begun or not error.retryable:
                    raise
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, PAUSE_MAX_S)

    async def _open_now(self) -> watch_hub.Watch:
        first = self.revision + 1 if self._placed else None
        deadline = self._calls.deadline(None)

        async def attempt() -> watch_hub.Watch:
            return await self._node.watch(
                self._selection, first, prev=self._prev, deadline=deadline
            )

        source = await self._calls.repeat(attempt, deadline, "read")
        if not self._placed:
            self.revision = source.first - 1
        self._placed = self._begun = True
        self._loop = asyncio.get_running_loop()
        if self._ended:  # closed meanwhile
            source.close()
        return source


class _LargeChange:
    """A change of which so many events are made at once that others have their turns in between."""

    def __init__(self, source: watch_hub.Watch, changes: Changes) -> None:
        self._source = source
        self._revision = changes.revision
        self._reading = Reading(source, changes, _events)
        self._events: list[Event] = []

    async def made(self) -> Change | None:
        """All of it; None: its watch has ended before. Who cancels this can ask again."""
        while (events := await self._reading.next()) is not None:
            self._events += events
        if self._reading.in_midst or not self._events:
            return None
        self._source.done()
        return Change(self._revision, tuple(self._events))


def _events(part: Part) -> list[Event]:
    """What an app is given."""
    return [
        Event(
            TYPES[event.kind],
            event.key,
            None if event.record is None else event.record.value,
            None if event.prev is None else event.prev.value,
            event.created,
        )
        for event in part.events
    ]
