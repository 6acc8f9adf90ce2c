"""What the committed log says of every key, worked out by the state machine's twin.

The twin (tests/kv/twin.py) has only the layout of commands, results and records in common with
dengine.kv. It decides what puts, deletions, range deletes and transactions come to, and so what
reads have to show. What time and leases have ended it takes as it comes: that, and what is done
only once, is judged by promises.py.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence

from dengine.kv.commands import (
    Effect,
    LeaseGrant,
    LeaseKeepAlive,
    LeaseRevoke,
    LeaseRevoked,
    Result,
)
from dengine.kv.store import DELETE, PUT, Event, Record
from tests.kv.twin import Twin
from tests.simulation.violation import violated

Rows = list[tuple[bytes, Record]]


class Keys:
    """Grows with the committed log.

    Args:
        keys_max, alive: see Twin.
    """

    def __init__(self, keys_max: int, alive: Callable[[str], bool]) -> None:
        self._twin = Twin(keys_max, alive)
        self._past: dict[bytes, tuple[list[int], list[Record | None]]] = {}  # with entry's indexes
        self._names: list[bytes] = []  # of all keys that there ever were, in order
        self._changes: dict[int, dict[bytes, Record | None]] = {}

    def carry_out(
        self,
        command: Effect,
        result: Result,
        events: Sequence[Event] | None,
        index: int,
        clock_ms: int,
    ) -> None:
        """A command of entry `index`, and what has come of it. Raises Violation."""
        if isinstance(command, LeaseGrant | LeaseKeepAlive | LeaseRevoke):
            self.ended(events or (), index)
            if isinstance(result, LeaseRevoked):
                truth = LeaseRevoked(self._twin.revision, len(events or ()), result.going)
                self._is_true(command, result, truth, index)
            return
        twin = self._twin
        before, twin.clock_ms = twin.records, clock_ms
        self._is_true(command, result, twin.apply(command), index)
        after = twin.records
        names = sorted(before.keys() | after.keys()) if after is not before else ()
        changed = {k: after.get(k) for k in names if after.get(k) is not before.get(k)}
        wanted = [
            Event(DELETE if new is None else PUT, key, new, before.get(key))
            for key, new in changed.items()
        ]
        shown = sorted(events or (), key=lambda event: event.key)
        if shown != wanted:
            violated("14 events", f"entry {index}: {command} has changed {shown}, not {wanted}")
        if after is not before:
            self._changed(changed, index)

    @staticmethod
    def _is_true(command: Effect, result: Result, truth: Result, index: int) -> None:
        if result != truth:
            violated("11 outcome", f"entry {index}: {command} came to {result}, not to {truth}")

    def ended(self, events: Sequence[Event], index: int) -> None:
        """Keys that are gone with one revision. Raises Violation."""
        twin = self._twin
        records = dict(twin.records)
        for event in events:
            old = records.pop(event.key, None)
            if old is None or event.prev != old or event.record is not None:
                violated("14 events", f"entry {index}: {event} has ended, and there was {old}")
        if events:
            twin.records = records
            twin.revision += 1
            self._changed({event.key: None for event in events}, index)

    def compare(self, left: Mapping[bytes, Record | None], revision: int, index: int) -> None:
        """With what the state machine has after entry `index` of the keys that it has changed."""
        for key, record in left.items():
            truth = self._twin.records.get(key)
            if record != truth:
                violated("14 events", f"entry {index} leaves {key!r} as {record}, not {truth}")
        if revision != self._twin.revision:
            violated("14 events", f"entry {index} ends at {revision}, not {self._twin.revision}")

    def _changed(self, changes: dict[bytes, Record | None], index: int) -> None:
        self._changes[self._twin.revision] = changes
        for key, record in changes.items():
            if key not in self._past:
                self._past[key] = ([], [])
                self._names.insert(bisect_left(self._names, key), key)
            indexes, records = self._past[key]
            indexes.append(index)
            records.append(record)

    # --- what was there ---------------------------------------------------------------------------

    def read(self, key: bytes, index: int) -> Record | None:
        """`key` after entry `index`."""
        indexes, records = self._past.get(key, ((), ()))
        place = bisect_right(indexes, index)
        return records[place - 1] if place else None

    def rows(self, start: bytes, end: bytes | None, index: int) -> Rows:
        """The keys with `start <= key < end` after entry `index`, in order."""
        names = self._names
        last = len(names) if end is None else bisect_left(names, end)
        found = [(key, self.read(key, index)) for key in names[bisect_left(names, start) : last]]
        return [(key, record) for key, record in found if record is not None]

    def changed_by(self, revision: int) -> Mapping[bytes, Record | None]:
        """What each of the keys that `revision` has changed is since."""
        return self._changes.get(revision, {})
