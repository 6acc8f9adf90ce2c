"""One entry's changes, with all that goes with them.

A `Recorder` stands between the machine and the store. Whatever is put or deleted through it also
keeps the index of what is due and the list of what each lease holds, becomes an event of the
history, and is counted: an entry may do only so much, or one with a thousand small puts over large
values would hold up the node for seconds, and with it the heartbeats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from dengine.kv import tables
from dengine.kv.store import (
    DELETE,
    EXPIRE,
    PUT,
    Change,
    Event,
    Record,
    Rules,
    Totals,
    View,
    encode_changes,
)

WORK_BYTES_MAX: Final = 16 * 1024 * 1024  # of values that one command, or one entry, meets
WORK_KEYS_MAX: Final = 10_000
COMMAND_KEYS_MAX: Final = 25_000  # a range of so many is looked through, then read; and some more
PRUNED_MAX: Final = 256  # records that leave the history with an entry, beside as many as came
PRUNED_BYTES_MAX: Final = 16 * 1024 * 1024  # and their bytes, beside as many as came


class Recorder:
    """A store for records, on top of a `View`.

    Of a state without `Totals` nothing is recorded and no work is bounded: it is one that members
    of the release before share, which do neither.

    Attributes:
        revision: of the store; `close` moves it on.
        place: names a command within the whole log: index of the entry, position in it.
        expiring: deletions are the work of time.
    """

    def __init__(self, view: View, revision: int, rules: Rules, index: int) -> None:
        self.view = view
        self.totals: Totals | None = view.totals
        self.revision = revision
        self.rules = rules
        self.place = (index, 0)
        self.expiring = False
        self._events: list[Event] = []  # since the last `close`
        self._changes: list[Change] = []
        self._last_key = b""  # read last, and what was there: a put nearly always follows its get
        self._last: Record | None = None
        self._bytes = self._keys = 0
        self._bytes_before = self._keys_before = 0  # those of earlier commands of this entry

    # --- work ---------------------------------------------------------------------------------

    @property
    def clock_ms(self) -> int:
        """The log time; 0 for a state that has none."""
        return self.totals.clock_ms if self.totals is not None else 0

    def begin(self, position: int) -> bool:
        """The next command. False when this entry has done enough: it must be deferred."""
        if self.totals is None:
            return True
        self.place = (self.place[0], position)
        self._bytes_before, self._keys_before = self._bytes, self._keys
        return self._bytes < WORK_BYTES_MAX and self._keys < WORK_KEYS_MAX

    @property
    def too_much(self) -> bool:
        """Has this command met more than one may? Then `scan` ends."""
        return self.totals is not None and (
            self._bytes - self._bytes_before > WORK_BYTES_MAX
            or self._keys - self._keys_before > COMMAND_KEYS_MAX
        )

    def keys_limit(self, wanted: int) -> int:
        """How many keys a range may hold of which `wanted` are allowed."""
        return wanted if self.totals is None else min(wanted, WORK_KEYS_MAX)

    # --- records ------------------------------------------------------------------------------

    def get(self, key: bytes) -> Record | None:
        record = self.view.get(key)
        self._keys += 1
        if record is not None:
            self._bytes += len(record.value)
        self._last_key, self._last = key, record
        return record

    def recall(self, key: bytes, record: Record | None) -> None:
        """What `get` has found there, and is there still: the next put need not read it again."""
        self._last_key, self._last = key, record

    def put(self, key: bytes, record: Record) -> None:
        if self.totals is None:
            self.view.put(key, record)
            return
        old = self._last if key == self._last_key else self.view.get(key)
        if old is not None and old.expires_ms | len(old.lease):
            self._let_go(key, old)
        if record.expires_ms:
            tables.set_due(self.view, record.expires_ms, tables.KEY, key)
        elif record.lease:
            tables.attach(self.view, record.lease, key)
        self._events.append(Event(PUT, key, record, old))
        self.view.put(key, record)
        self._last_key = b""

    def get_many(self, keys: Sequence[bytes]) -> list[Record | None]:
        """As `get` for each of `keys`; when that is `too_much`, not for all."""
        left = None
        if self.totals is not None:
            left = WORK_BYTES_MAX - (self._bytes - self._bytes_before)
        found = self.view.get_many(keys, left)
        self._keys += len(found)
        self._bytes += sum([len(record.value) for record in found if record is not None])
        return found

    def put_many(
        self, keys: Sequence[bytes], records: Sequence[Record], olds: Sequence[Record | None]
    ) -> None:
        """As `put` for each of `keys`, which all differ: of records that stay, where `get_many` has
        found `olds`, and they are there still."""
        if self.totals is not None:
            for key, old in zip(keys, olds, strict=True):
                if old is not None and old.expires_ms | len(old.lease):
                    self._let_go(key, old)
            made = zip(keys, records, olds, strict=True)
            self._events += [Event(PUT, key, record, old) for key, record, old in made]
        self.view.put_many(keys, records)
        self._last_key = b""

    def delete(self, key: bytes) -> None:
        """Removes `key`, which exists."""
        if self.totals is None:
            self.view.delete(key)
            return
        old = self._last if key == self._last_key else self.view.get(key)
        if old is not None and old.expires_ms | len(old.lease):
            self._let_go(key, old)
        self._events.append(Event(EXPIRE if self.expiring else DELETE, key, None, old))
        self.view.delete(key)
        self._last_key = b""

    def scan(self, start: bytes, end: bytes | None) -> Iterator[bytes]:
        for key in self.view.scan(start, end):
            self._keys += 1
            if self.too_much:
                return
            yield key

    def _let_go(self, key: bytes, old: Record) -> None:
        if old.expires_ms:
            tables.clear_due(self.view, old.expires_ms, tables.KEY, key)
        if old.lease:
            tables.detach(self.view, old.lease, key)

    # --- history ------------------------------------------------------------------------------

    def close(self, revision: int) -> None:
        """What was changed since the last call is `revision`, which may be the same as before.

        Each revision is in the history, also the one whose changes undid each other: so the oldest
        and the newest tell how many there are.
        """
        if revision == self.revision:
            return
        self.revision = revision
        if self.totals is not None:
            events, self._events = self._events, []
            self._changes.append((revision, events))
            self.view.changed(revision, events)

    def end(self) -> None:
        """At the end of an entry: its changes are one record of the history, for a record each
        would cost a PUT as much again as all else; and the oldest records go that are too many.
        """
        totals = self.totals
        if totals is None:
            return
        came = 0
        if self._changes:
            data = encode_changes(self._changes)
            self.view.append("history", tables.number_key(self.revision), data)
            came = len(data)
            totals.history_bytes += came
        gone = 0
        for _ in range(len(self._changes) + PRUNED_MAX):
            pruned = self._prune(totals)
            gone += pruned
            if not pruned or gone >= came + PRUNED_BYTES_MAX:
                return

    def _prune(self, totals: Totals) -> int:
        """Forget the oldest record, if `history_revisions` are kept without it or all are too
        large. Returns its size; 0: it stays."""
        rules, first = self.rules, totals.history_first
        large = totals.history_bytes > rules.history_bytes
        count = self.revision + 1 - first
        if not count or (count <= rules.history_revisions and not large):
            return 0
        oldest = self.view.first("history", tables.number_key(first))
        if oldest is None:
            return 0
        last = tables.key_number(oldest[0])
        if self.revision - last < rules.history_revisions and not large:
            return 0
        self.view.remove("history", oldest[0])
        totals.history_first = last + 1
        totals.history_bytes -= len(oldest[1])
        return len(oldest[1])
