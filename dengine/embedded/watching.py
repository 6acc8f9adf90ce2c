"""A watch on the node in this process: every change of a key or prefix, in order, once."""

from __future__ import annotations

import asyncio
import random
from types import TracebackType
from typing import Final

from dengine.client.types import Change, Event, EventType
from dengine.embedded.calls import Calls
from dengine.errors import Compacted, DengineError
from dengine.kv.store import DELETE, EXPIRE, PUT
from dengine.node import watch_hub
from dengine.node.node import Node
from dengine.node.watch_hub import Cancelled, Changes, Progress, Selection

PAUSE_S: Final = 0.05
PAUSE_MAX_S: Final = 2.0
TYPES: Final[dict[int, EventType]] = {PUT: "put", DELETE: "delete", EXPIRE: "expire"}


class Watch:
    """The changes of a key or prefix, one `Change` for each revision; made by `Engine.watch`.

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
        if from_revision is not None and from_revision < 1:
            raise ValueError(f"revisions begin at 1, not {from_revision}")
        self._node = node
        self._calls = calls
        self._selection = selection
        self._prev = prev
        self._placed = from_revision is not None  # is it fixed where it starts?
        self._begun = False
        self._source: watch_hub.Watch | None = None
        self._ended = False
        self.revision = 0 if from_revision is None else from_revision - 1

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
        """The next change, however long that takes. Raises as `Engine.watch` says."""
        while not self._ended:
            if self._source is None:
                self._source = await self._open()
            try:
                message = await anext(self._source)
            except StopAsyncIteration:  # it was closed meanwhile
                self._source = None
                continue
            match message:
                case Changes():
                    self.revision = message.revision
                    return self._change(message)
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
        if self._ended:  # closed meanwhile
            source.close()
        return source

    def _change(self, changes: Changes) -> Change:
        return Change(
            changes.revision,
            tuple(
                Event(
                    TYPES[event.kind],
                    event.key,
                    None if event.record is None else event.record.value,
                    None if event.prev is None else event.prev.value,
                    event.created,
                )
                for event in changes.events
            ),
        )
