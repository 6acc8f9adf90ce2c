"""What the committed log says: the result of every command, and each key at every index."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from dengine.kv.commands import Command, DeleteRange, Put, Result, Txn, decode_batch
from dengine.kv.machine import Record, apply_batch
from dengine.raft.types import Entry, EntryKind

NOTHING = (0, None)  # what a read says of a key that is not there


def mark_of(command: Command) -> bytes:
    """Tells apart all commands of a run: a put by its value, a deletion by its limit, a transaction
    by what it puts first."""
    if isinstance(command, Put):
        return command.value
    if isinstance(command, Txn):
        return b"t" + mark_of(command.success[0])
    assert isinstance(command, DeleteRange), command
    return b"-%d" % command.limit


class _Records(dict[bytes, Record]):
    """The state machine's view of a dict; `touched` are the keys that have changed."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: dict[bytes, None] = {}

    def put(self, key: bytes, record: Record) -> None:
        self[key] = record
        self.touched[key] = None

    def delete(self, key: bytes) -> None:
        del self[key]
        self.touched[key] = None

    def scan(self, start: bytes, end: bytes | None) -> Iterator[bytes]:
        return iter(sorted(k for k in self if start <= k and (end is None or k < end)))


class Model:
    """Grows with the committed log.

    Attributes:
        results: of every command, by its mark.
        index_of: the entry that a command is in.
    """

    def __init__(self) -> None:
        self.results: dict[bytes, Result] = {}
        self.index_of: dict[bytes, int] = {}
        self._records = _Records()
        self._revision = 0
        self._changes: dict[bytes, tuple[list[int], list[tuple[int, bytes | None]]]] = {}

    def committed(self, entry: Entry) -> Iterator[bytes]:
        """The next entry. Yields the marks of its commands, each before it is taken in."""
        if entry.kind is not EntryKind.NORMAL:
            return
        records = self._records
        self._revision, results = apply_batch(entry.data, records, self._revision)
        for command, result in zip(decode_batch(entry.data), results, strict=True):
            mark = mark_of(command)
            yield mark
            self.index_of[mark] = entry.index
            self.results[mark] = result
        for key in records.touched:
            record = records.get(key)
            indexes, values = self._changes.setdefault(key, ([], []))
            indexes.append(entry.index)
            values.append(NOTHING if record is None else (record.mod_revision, record.value))
        records.touched.clear()

    def read(self, key: bytes, index: int) -> tuple[int, bytes | None]:
        """mod_revision and value of `key` after entry `index`."""
        indexes, values = self._changes.get(key, ((), ()))
        if indexes and indexes[-1] <= index:
            return values[-1]
        place = bisect_right(indexes, index)
        return values[place - 1] if place else NOTHING
