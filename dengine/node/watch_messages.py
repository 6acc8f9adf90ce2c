"""What those who follow keys are told, and what they make of it: the text of events, for one.

That is made once for all who are told the same. Where it is much it is made in parts: nodes send
their heartbeats from the same event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

from dengine.kv.store import Event

if TYPE_CHECKING:
    from dengine.node.watch_hub import Watch

PART_EVENTS: Final = 250  # at most, of which the text takes 0.5 ms where values are small
PART_BYTES: Final = 256 * 1024  # and so much: 3 ms at worst; a single larger event takes longer

T = TypeVar("T")


class Changes:
    """What one revision has changed of the keys that a watch selects. Watches share it.

    Attributes:
        events: with what was there before only if that is wanted: it would wait in vain.
        size: of them, in bytes.
        queues: how many watches have it waiting, or being read.
    """

    __slots__ = ("_parts", "events", "queues", "revision", "size")

    def __init__(self, revision: int, events: Sequence[Event], *, prev: bool) -> None:
        self.revision = revision
        self.events = events if prev else [_without_prev(event) for event in events]
        self.size = sum(_size(event) for event in self.events)
        self.queues = 0
        self._parts: dict[Make[Any], Parts[Any]] = {}

    @property
    def is_large(self) -> bool:
        """Is it too much for one part, so that it takes a `Reading`?"""
        return len(self.events) > PART_EVENTS or self.size > PART_BYTES

    def whole(self, make: Make[T]) -> T:
        """What `make` makes of all of it, if it is not large."""
        parts = self.parts(make)
        if parts.lacks(0):
            parts.make_next()
        return parts.give(0, keep=True)

    def parts(self, make: Make[T]) -> Parts[T]:
        """What `make` makes of it, shared by all who ask."""
        parts = self._parts.get(make)
        if parts is None:
            parts = self._parts[make] = Parts(self.revision, self.events, make)
        return parts


class Part(NamedTuple):
    """Some events of a change, in order."""

    revision: int
    events: Sequence[Event]
    is_first: bool
    is_last: bool


Make = Callable[[Part], T]


class Parts(Generic[T]):
    """What is made of a change, as far as somebody has asked for it."""

    __slots__ = ("_events", "_made", "_make", "_next_event", "_revision")

    def __init__(self, revision: int, events: Sequence[Event], make: Make[T]) -> None:
        self._revision = revision
        self._events = events
        self._make = make
        self._made: list[T | None] = []
        self._next_event = 0

    def has(self, number: int) -> bool:
        """Is this part made?"""
        return number < len(self._made)

    def lacks(self, number: int) -> bool:
        """Is this part the next to be made?"""
        return number == len(self._made) and self._next_event < len(self._events)

    def make_next(self) -> None:
        """Make the part that `lacks` speaks of."""
        start = stop = self._next_event
        size = 0
        for event in self._events[start : start + PART_EVENTS]:
            size += _size(event)
            if size > PART_BYTES and stop > start:
                break
            stop += 1
        is_last = stop == len(self._events)
        part = Part(self._revision, self._events[start:stop], start == 0, is_last)
        self._made.append(self._make(part))
        self._next_event = stop

    def give(self, number: int, *, keep: bool) -> T:
        """A part that is made. `keep`: is there anybody else who will want it?"""
        part = self._made[number]
        assert part is not None
        if not keep:
            self._made[number] = None
        return part


class Reading(Generic[T]):
    """One reader's way through a large message that it has taken, part by part."""

    def __init__(self, watch: Watch, changes: Changes, make: Make[T]) -> None:
        self._watch = watch
        self._changes = changes
        self._parts = changes.parts(make)
        self._number = 0  # of the part that comes next

    @property
    def in_midst(self) -> bool:
        """Has the reader some parts, and not all?"""
        number = self._number
        return number > 0 and (self._parts.has(number) or self._parts.lacks(number))

    async def next(self) -> T | None:
        """The next part; nothing is lost where this is cancelled, and called again.

        In one turn of the event loop one part is made, whoever reads on this node: heartbeats come
        between.

        Returns:
            None: that was all. Or the watch was closed, and the reader may be `in_midst`. Or it was
            cancelled before the reader had a part: the next message says why.
        """
        if self._parts.lacks(self._number):
            async with self._watch.turn():
                # Another may have made it meanwhile; and nothing is made for one that has left.
                if self._parts.lacks(self._number) and not self._is_over:
                    self._parts.make_next()
                    await asyncio.sleep(0)
        if self._is_over or not self._parts.has(self._number):
            return None
        part = self._parts.give(self._number, keep=self._changes.queues > 1)
        self._number += 1
        self._watch.took_part()
        return part

    @property
    def _is_over(self) -> bool:
        """A reader of a watch that was cancelled gets the rest of what it has begun with, and then
        learns why: else a slow one would begin with it again and again.
        """
        return self._watch.closed or (self._watch.over and not self._number)


class Progress(NamedTuple):
    """Everything up to `revision` is applied here, and was delivered if it was selected."""

    revision: int
    size: int = 16


class Cancelled(NamedTuple):
    """The watch has ended. `compact_revision`: so far the history is gone, if that is why."""

    reason: str
    compact_revision: int | None = None
    size: int = 0


Message = Changes | Progress | Cancelled


def _without_prev(event: Event) -> Event:
    return event if event.prev is None else Event(event.kind, event.key, event.record, None)


def _size(event: Event) -> int:
    size = 64 + len(event.key)
    if event.record is not None:
        size += len(event.record.value)
    if event.prev is not None:
        size += len(event.prev.value)
    return size
