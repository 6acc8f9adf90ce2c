"""What those who follow keys are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dengine.kv.store import Event


class Changes:
    """What one revision has changed of the keys that a watch selects. Watches share it.

    Attributes:
        events: with what was there before only if that is wanted: it would wait in vain.
        shown: for whoever writes it out: the text is made once for all readers.
        parts: of that text, as far as it is made.
        queues: in how many of them it waits.
    """

    __slots__ = ("events", "parts", "queues", "revision", "shown", "size")

    def __init__(self, revision: int, events: Sequence[Event], *, prev: bool) -> None:
        self.revision = revision
        self.events = events if prev else [_without_prev(event) for event in events]
        self.size = sum(_size(event) for event in self.events)
        self.shown = b""
        self.parts: list[bytes] = []
        self.queues = 0


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
