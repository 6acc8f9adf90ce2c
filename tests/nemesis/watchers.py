"""Watchers, which follow keys over the whole run: from node to node, behind what they were told.

Some follow everything, one only a prefix. Each notes every message, and where it was told that what
it asks for is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote

from tests.nemesis.client import Caller, Message, Refused, Unanswered, another, call, follow

FOLLOWED = ("", "", "", "r/")  # what each watcher follows
PATIENCE_S = (1.0, 5.0, 12.0)  # without a message; a node says something every 10 s
STAYS_S = 10.0  # at a node, on average; then it goes on at another one, though nothing is wrong
PAUSE_S = 0.05
LISTING_S = 5.0


class Event(NamedTuple):
    """A key changed. `value` is None unless it was put."""

    type: str
    key: str
    value: str | None


@dataclass(frozen=True, slots=True)
class Told:
    """A message: what changed at a revision, or that everything up to it was told.

    Attributes:
        at: when it had come, by time.monotonic().
        events: none: it tells of progress.
    """

    at: float
    node_id: int
    revision: int
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True)
class Gap:
    """It was told that the history does not reach back so far, and read the keys anew.

    Attributes:
        asked: the first revision that it wanted.
        compact_revision: the newest that is gone, as it was told.
        revision: of the listing; it goes on behind that.
    """

    asked: int
    compact_revision: int
    revision: int


@dataclass
class Watched:
    """All that one watcher was told, in that order.

    Attributes:
        prefix: of the keys that it follows.
        position: the next revision that it wants.
        resumed: how often it went on, here or at another node.
    """

    number: int
    prefix: str
    told: list[Told] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    position: int = 1
    resumed: int = 0

    @property
    def changes(self) -> list[Told]:
        return [told for told in self.told if told.events]

    def selected(self, other: Watched) -> list[tuple[int, tuple[Event, ...]]]:
        """What `other` was told of the keys that this one follows, by revision."""
        found = []
        for told in other.changes:
            events = tuple(event for event in told.events if event.key.startswith(self.prefix))
            if events:
                found.append((told.revision, events))
        return found


class Watcher:
    """One of them.

    Args:
        first: the node that it begins at.
        nodes: ids of those that may be asked now.
    """

    def __init__(
        self, caller: Caller, watched: Watched, first: int, nodes: Callable[[], Sequence[int]]
    ) -> None:
        self.watched = watched
        self._caller = caller
        self._node_id = first
        self._nodes = nodes

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self._follow()
            except Refused as error:
                await self._refused(error)
            except Unanswered:
                pass
            await asyncio.sleep(PAUSE_S)
            self._node_id = another(self._caller.rng, self._nodes(), self._node_id)
            self.watched.resumed += 1

    async def _follow(self) -> None:
        watched, rng = self.watched, self._caller.rng
        path = f"/v1/watch?prefix={quote(watched.prefix, safe='')}"
        headers = {}
        if rng.random() < 0.5 and watched.position > 1:
            headers = {"Last-Event-ID": str(watched.position - 1)}
        else:
            path += f"&from_revision={watched.position}"
        leaves_at = time.monotonic() + rng.expovariate(1 / STAYS_S)
        messages = follow(self._node_id, path, headers, rng.choice(PATIENCE_S))
        async with contextlib.aclosing(messages):
            async for message in messages:
                if message.event == "cancelled":
                    if "compact_revision" in message.data:
                        await self._begin_anew(message.data["compact_revision"])
                    return
                self._note(message)
                if time.monotonic() > leaves_at:
                    return

    def _note(self, message: Message) -> None:
        watched, revision = self.watched, message.data["revision"]
        events = tuple(map(_event, message.data.get("events", ())))
        if not events and message.id is None:
            return  # before what was asked for, and no place to resume from
        watched.told.append(Told(time.monotonic(), self._node_id, revision, events))
        watched.position = max(watched.position, revision + 1)

    async def _refused(self, error: Refused) -> None:
        reply = error.reply
        self._caller.tally.counts[str(reply.status)] += 1
        if reply.status == 410:
            await self._begin_anew(reply.json()["compact_revision"])
        elif reply.status not in (429, 503, 504):
            self._caller.surprise(self._node_id, "GET /v1/watch", reply)

    async def _begin_anew(self, compact_revision: int) -> None:
        """Behind a listing; where none can be had, it asks again for what it wanted."""
        watched = self.watched
        path = f"/v1/kv?prefix={quote(watched.prefix, safe='')}&limit=1&consistency=linearizable"
        with contextlib.suppress(Unanswered):
            listing = await call(self._node_id, "GET", path, timeout_s=LISTING_S)
            watched.gaps.append(Gap(watched.position, compact_revision, listing["revision"]))
            watched.position = listing["revision"] + 1


def _event(fields: dict[str, Any]) -> Event:
    key = fields.get("key", fields.get("key_base64", ""))
    return Event(fields["type"], key, fields.get("value", fields.get("value_base64")))


def behind(watched: Sequence[Watched], revision: int) -> list[Watched]:
    """Those that have not been told yet of everything up to a revision, after which nothing
    happens."""
    whole = next(one for one in watched if not one.prefix)
    found = [one for one in watched if not one.prefix and one.position <= revision]
    if not found:  # then these know what the others are to be told
        filtered = [one for one in watched if one.prefix]
        ends = [max((at for at, _ in one.selected(whole)), default=0) for one in filtered]
        found = [one for one, end in zip(filtered, ends, strict=True) if one.position <= end]
    return found
