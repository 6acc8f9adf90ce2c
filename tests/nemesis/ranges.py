"""Clients that put and delete keys, one or a range of them, and list them as they are at a moment.

Nothing else here is ever deleted by anybody. As everywhere, all that a judge needs is kept, and
nothing is judged (range_verdicts.py does).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import quote

from tests.cluster import Reply
from tests.linearizability.checker import FOREVER
from tests.nemesis.client import Caller, held

RANGED = "d/"  # of the keys, which nobody else touches
RANGE_KEYS = tuple(f"{RANGED}{number}" for number in range(6))
RANGE_END = "d0"  # behind all of them
PAGES = (2, 1000, 1000)  # rows at most
LEVELS = ("linearizable", "linearizable", "lease", "eventual")


@dataclass(frozen=True, slots=True)
class Range:
    """Keys from `start` up to `end`, without it."""

    start: str
    end: str

    def __contains__(self, key: str) -> bool:
        return self.start <= key < self.end


def only(key: str) -> Range:
    return Range(key, key + "\0")


@dataclass(frozen=True, slots=True)
class Change:
    """A key was put, or keys were deleted. Times are time.monotonic().

    Attributes:
        value: None: it is a deletion.
        expected: the revision that was asked for; 0: no key; None: whatever is there.
        returned: FOREVER while its outcome is unknown.
        revision: 0 while it is unknown.
        deleted: so many keys, as its answer says.
    """

    keys: Range
    called: float
    value: str | None = None
    expected: int | None = None
    returned: float = FOREVER
    revision: int = 0
    deleted: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """An answer that shows keys as they were at one moment.

    Attributes:
        seen: mod_revision and value by key; of the others in `keys` there were none. The value is
            None where only the revision was told.
        revision: of the state; None: not told. A node that has nothing yet shows 0.
        eventual: an older state may be shown.
    """

    keys: Range
    called: float
    returned: float
    seen: Mapping[str, tuple[int, str | None]]
    revision: int | None = None
    eventual: bool = False


@dataclass
class Ranged:
    """What was done to these keys, and seen of them."""

    changes: list[Change] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    lists: int = 0  # looks at more than one key


class RangeClient:
    """Puts and deletes as it is, or as this client knows it; and lists.

    Args:
        number: of this client; its values begin with it.
        refused: takes the values of puts with the outcome "none".
    """

    def __init__(self, caller: Caller, number: int, ranged: Ranged, refused: set[str]) -> None:
        self.rng = caller.rng
        self.close = caller.close
        self._caller = caller
        self._number = number
        self._ranged = ranged
        self._refused = refused
        self._made = 0
        self._known: dict[str, int] = {}  # revisions, as last seen

    async def once(self, node_id: int) -> bool:
        """One request; False when it was not answered as a working cluster would."""
        dice, key = self.rng.random(), self.rng.choice(RANGE_KEYS)
        if dice < 0.45:
            self._made += 1
            value = f"{self._number}.{self._made}"
            expected = self._known.get(key, 0) if dice < 0.15 else None
            return await self._put(Change(only(key), time.monotonic(), value, expected), node_id)
        if dice < 0.65:
            expected = self._known.get(key) if dice < 0.55 else None
            change = Change(only(key), time.monotonic(), expected=expected)
            return await self._delete(change, f"/v1/kv/{key}", node_id)
        keys = self._some()
        if dice < 0.72:
            change = Change(keys, time.monotonic())
            return await self._delete(change, f"/v1/kv?{_query(keys)}", node_id)
        return await self._read(key, node_id) if dice < 0.78 else await self._list(keys, node_id)

    def _some(self) -> Range:
        if self.rng.random() < 0.5:
            return Range(RANGED, RANGE_END)
        first, last = sorted(self.rng.sample(RANGE_KEYS, 2))
        return Range(first, last)

    async def _put(self, change: Change, node_id: int) -> bool:
        assert change.value is not None
        body, path = change.value.encode(), f"/v1/kv/{change.keys.start}"
        reply, outcome = await self._change(change, "PUT", path, body, node_id)
        if outcome == "none":
            self._refused.add(change.value)
        if reply is not None and reply.status == 200:
            self._known[change.keys.start] = reply.json()["revision"]
        return reply is not None and reply.status in (200, 412)

    async def _delete(self, change: Change, path: str, node_id: int) -> bool:
        reply, _ = await self._change(change, "DELETE", path, None, node_id)
        if reply is not None and reply.status == 200:
            for key in filter(change.keys.__contains__, RANGE_KEYS):
                self._known.pop(key, None)
        return reply is not None and reply.status in (200, 412)

    async def _change(
        self, change: Change, method: str, path: str, body: bytes | None, node_id: int
    ) -> tuple[Reply | None, str]:
        """Note what came of it. One that deletes nothing, or that was refused for what is there, is
        a look."""
        ranged, headers = self._ranged, dict[str, str]()
        if change.expected is not None:
            headers = (
                {"If-Match": f'"{change.expected}"'} if change.expected else {"If-None-Match": "*"}
            )
        ranged.changes.append(change)  # of unknown outcome, should the run break off meanwhile
        reply, outcome = await self._caller.send(method, path, body, headers, node_id)
        returned = time.monotonic()
        if reply is not None and reply.status == 200:
            answer = reply.json()
            deleted, revision = answer.get("deleted", 0), answer["revision"]
            ranged.changes.remove(change)
            if change.value is None and not deleted:
                ranged.looks.append(Look(change.keys, change.called, returned, {}, revision))
            else:
                done = replace(change, returned=returned, revision=revision, deleted=deleted)
                ranged.changes.append(done)
                self._caller.tally.acknowledged_at.append(returned)
        elif reply is not None and reply.status == 412:
            there = json.loads(reply.body)["current_revision"]
            seen = {} if there is None else {change.keys.start: (there, None)}
            ranged.changes.remove(change)
            ranged.looks.append(Look(change.keys, change.called, returned, seen))
            self._known.pop(change.keys.start, None)
        elif outcome == "none":
            ranged.changes.remove(change)
        return reply, outcome

    async def _read(self, key: str, node_id: int) -> bool:
        called = time.monotonic()
        reply, _ = await self._caller.send("GET", f"/v1/kv/{key}", None, {}, node_id)
        returned = time.monotonic()
        if reply is None or reply.status not in (200, 404):
            return False
        self._caller.tally.read_at.append(returned)
        revision, value = held(reply)
        seen = {key: (revision, value)} if revision else {}
        shown = int(reply.headers["dengine-revision"]) if revision else None
        self._ranged.looks.append(Look(only(key), called, returned, seen, shown))
        return True

    async def _list(self, keys: Range, node_id: int) -> bool:
        level, called = self.rng.choice(LEVELS), time.monotonic()
        path = f"/v1/kv?{_query(keys)}&limit={self.rng.choice(PAGES)}&consistency={level}"
        reply, _ = await self._caller.send("GET", path, None, {}, node_id)
        returned = time.monotonic()
        if reply is None or reply.status != 200:
            return False
        self._caller.tally.read_at.append(returned)
        page = reply.json()
        items = {item["key"]: (item["mod_revision"], item["value"]) for item in page["items"]}
        if level != "eventual":
            self._known.update({key: seen[0] for key, seen in items.items()})
        if page["next"] is not None:
            keys = Range(keys.start, max(items, default="") + "\0")  # it says nothing of the rest
        look = Look(keys, called, returned, items, page["revision"], level == "eventual")
        self._ranged.looks.append(look)
        self._ranged.lists += level != "eventual"
        return True


def _query(keys: Range) -> str:
    if keys.end == RANGE_END:
        return f"prefix={quote(keys.start, safe='')}"
    return f"start={quote(keys.start, safe='')}&end={quote(keys.end, safe='')}"
