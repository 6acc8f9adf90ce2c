"""The state machine's view of one write transaction; records in, soundness out.

With it all that reads records of a state: every one is checked on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import lmdb
import msgspec
from zlib_ng.zlib_ng import crc32

from dengine.errors import ConfigError, DataCorruption, InvariantBroken
from dengine.kv.commands import COMMAND_VERSION, batch_version
from dengine.kv.store import (
    KEY_BYTES_MAX,
    TABLES,
    Change,
    Event,
    Record,
    Rules,
    Table,
    Totals,
    decode_changes,
)
from dengine.raft.membership import Membership
from dengine.raft.types import Entry, EntryKind, LogId
from dengine.storage.environment import CRC_BYTES, CRC_RESIDUE, DATA_FILE, damaged
from dengine.storage.marks import distrust_state
from dengine.storage.state_records import (
    KEYS,
    META,
    TOTALS_KEY,
    decode_record,
    encode_row,
    is_sound,
    number_of,
    record_hash,
    row_hash,
    signed,
)

REMEDY: Final = "restart this node, which rebuilds its state"
_NUMBERS: Final = {table: number_of(table) for table in TABLES}

Databases = Mapping[Table, "lmdb._Database"]


class StateView:
    """A `kv.store.View` of a write transaction whose default database is that of the keys.

    Args:
        state_hash: before the transaction; `hash` grows and shrinks with it.
        totals: before it. They are the machine's to change, hence a copy.

    Attributes:
        changes: with `keep_changes`, every revision made in the transaction, with its events.
        due_changed: is there anything new to be due, or gone from what was?
    """

    __slots__ = (
        "_cursors",
        "_databases",
        "_get",
        "_keep_changes",
        "_key",
        "_path",
        "_put",
        "_raw",
        "_rows",
        "_totals_raw",
        "_txn",
        "changes",
        "due_changed",
        "hash",
        "totals",
    )

    def __init__(
        self,
        txn: lmdb.Transaction[bytes],
        databases: Databases,
        path: Path,
        state_hash: int,
        totals: Totals | None,
        *,
        keep_changes: bool = False,
    ) -> None:
        self._txn = txn
        self._keep_changes = keep_changes
        self._databases = databases
        self._cursors: dict[Table, lmdb.Cursor[bytes]] = {}
        self._get = txn.get
        self._put = txn.put
        self._path = path
        self._key = b""  # read last, and what was there: a put nearly always follows its get
        self._raw: bytes | None = None
        self._rows: dict[bytes, bytes | None] = {}  # the same of `get_many`; keys with records
        self.hash = state_hash
        self.totals = totals
        self._totals_raw = b"" if totals is None else signed(TOTALS_KEY, totals.encode())
        self.changes: list[Change] = []
        self.due_changed = False

    # --- the users' keys ----------------------------------------------------------------------

    def get(self, key: bytes) -> Record | None:
        self._key, self._raw = key, self._get(key)
        return None if self._raw is None else sound_record(key, self._raw, self._path)

    def put(self, key: bytes, record: Record) -> None:
        old = self._raw if key == self._key else self._get(key)
        row = encode_row(key, record)
        self._put(key, row[len(key) :])
        if old is not None:
            self.hash -= record_hash(KEYS, key, old)
        self.hash += row_hash(key, row)
        self._key = b""
        self._rows = {}

    def get_many(self, keys: Sequence[bytes], size: int | None) -> list[Record | None]:
        found: list[Record | None] = []
        rows: dict[bytes, bytes | None] = {}
        with self._txn.cursor() as cursor:
            seek_key, value = cursor.set_key, cursor.value
            for key in keys:
                if not seek_key(key):
                    rows[key] = None
                    found.append(None)
                    continue
                raw = value()
                rows[key] = row = key + raw
                if crc32(row) != CRC_RESIDUE:
                    raise damage(self._path, key, "fails its CRC")
                record = decode_record(raw)
                if isinstance(record, int):
                    raise damage(self._path, key, f"has the unknown layout {record}")
                found.append(record)
                if size is not None:
                    size -= len(record.value)
                    if size < 0:
                        break
        self._rows = rows
        return found

    def put_many(self, keys: Sequence[bytes], records: Sequence[Record]) -> None:
        rows = self._rows
        if rows.keys() != set(keys):
            raise InvariantBroken(f"{self._path}: keys are put that were not read just before")
        new = [encode_row(k, r) for k, r in zip(keys, records, strict=True)]
        with self._txn.cursor() as cursor:
            cursor.putmulti((key, row[len(key) :]) for key, row in zip(keys, new, strict=True))
        self.hash += sum(map(row_hash, keys, new))
        self.hash -= sum([row_hash(key, row) for key, row in rows.items() if row is not None])
        self._key = b""
        self._rows = {}

    def delete(self, key: bytes) -> None:
        old = self._txn.pop(key)
        if old is not None:
            sound_record(key, old, self._path, keys_only=True)  # rot would spoil the hash
            self.hash -= record_hash(KEYS, key, old)
        self._key = b""
        self._rows = {}

    def scan(self, start: bytes, end: bytes | None) -> Iterator[bytes]:
        with self._txn.cursor() as cursor:
            yield from scan(cursor, start, end)

    # --- the machine's tables -----------------------------------------------------------------

    def read(self, table: Table, key: bytes) -> bytes | None:
        raw = self._get(key, db=self._databases[table])
        return None if raw is None else sound_data(key, raw, self._path)

    def write(self, table: Table, key: bytes, data: bytes) -> None:
        number, database = _NUMBERS[table], self._databases[table]
        old = self._get(key, db=database)
        if old is not None:
            sound_data(key, old, self._path)
            self.hash -= record_hash(number, key, old)
        new = signed(key, data)
        self._put(key, new, db=database)
        self.hash += record_hash(number, key, new)
        self.due_changed |= table == "due"

    def append(self, table: Table, key: bytes, data: bytes) -> None:
        new = signed(key, data)
        if not self._put(key, new, append=True, db=self._databases[table]):
            # Only appended to, it cannot hold a later key, unless one has rotted, or a page has.
            raise damage(self._path, key, f"does not come after all others of {table}")
        self.hash += record_hash(_NUMBERS[table], key, new)

    def remove(self, table: Table, key: bytes) -> bytes | None:
        old = self._txn.pop(key, db=self._databases[table])
        if old is None:
            return None
        data = sound_data(key, old, self._path)
        self.hash -= record_hash(_NUMBERS[table], key, old)
        self.due_changed |= table == "due"
        return data

    def first(self, table: Table, start: bytes) -> tuple[bytes, bytes] | None:
        cursor = self._cursors.get(table)
        if cursor is None:
            cursor = self._cursors[table] = self._txn.cursor(self._databases[table])
        if not (cursor.set_range(start) if start else cursor.first()):
            return None
        key, raw = cursor.item()
        return key, sound_data(key, raw, self._path)

    def clear(self, table: Table) -> None:
        """Remove all records of a table, however many."""
        while (found := self.first(table, b"")) is not None:
            self.remove(table, found[0])

    def changed(self, revision: int, events: Sequence[Event]) -> None:
        if self._keep_changes:
            self.changes.append((revision, events))

    def end_entry(self, meta: lmdb._Database) -> None:
        """Keep the totals: after each entry, for the hash of this very entry counts them."""
        if self.totals is None:
            return
        old, new = self._totals_raw, signed(TOTALS_KEY, self.totals.encode())
        if old == new:
            return
        if old:
            self.hash -= record_hash(META, TOTALS_KEY, old)
        self._put(TOTALS_KEY, new, db=meta)
        self.hash += record_hash(META, TOTALS_KEY, new)
        self._totals_raw = new

    def close(self) -> None:
        """Before the transaction ends."""
        for cursor in self._cursors.values():
            cursor.close()


def table_rows(
    txn: lmdb.Transaction[bytes],
    database: lmdb._Database,
    start: bytes,
    limit: int,
    size: int,
    path: Path,
) -> list[tuple[bytes, bytes]]:
    """Up to `limit` records from `start` on, and about `size` bytes of them, but never none."""
    rows: list[tuple[bytes, bytes]] = []
    with txn.cursor(database) as cursor:
        found = cursor.set_range(start) if start else cursor.first()
        while found and len(rows) < limit and size > 0:
            key, raw = cursor.item()
            rows.append((key, sound_data(key, raw, path)))
            size -= len(raw)
            found = cursor.next()
    return rows


def rules_of(membership: Membership) -> Rules:
    """What the settings of a membership tell the state machine."""
    settings = membership.settings
    return Rules(
        cluster_id=membership.cluster_id,
        history_revisions=settings.history_revisions,
        history_bytes=settings.history_bytes,
        idempotency_window_ms=settings.idempotency_window_s * 1000,
    )


def require_next(entry: Entry, applied: LogId) -> None:
    """Raises InvariantBroken unless `entry` comes right after `applied`, and ConfigError when it
    was made by a newer release: whoever applies a part of it has another state than the others.
    """
    if entry.index != applied.index + 1 or entry.term < applied.term:
        raise InvariantBroken(f"entry {entry.log_id} cannot be applied right after {applied}")
    if entry.kind is EntryKind.NORMAL and batch_version(entry.data) > COMMAND_VERSION:
        raise ConfigError(
            f"entry {entry.index} is of command version {batch_version(entry.data)} and this "
            f"dengine applies up to {COMMAND_VERSION}: install the release of the other members"
        )


def scan(cursor: lmdb.Cursor[bytes], start: bytes, end: bytes | None) -> Iterator[bytes]:
    """Keys with `start <= key < end`, without their values."""
    if seek(cursor, start):
        for key in cursor.iternext(keys=True, values=False):
            if end is not None and key >= end:
                return
            yield key


def seek(cursor: lmdb.Cursor[bytes] | lmdb.Cursor[memoryview], start: bytes) -> bool:
    """Go to the first key at or after `start`, which may be of any length."""
    if not start:
        return cursor.first()
    head = start[:KEY_BYTES_MAX]
    found = cursor.set_range(head)
    if found and len(start) > KEY_BYTES_MAX and cursor.key() == head:
        return cursor.next()  # `start` is longer than any key, so it comes after its own head
    return found


def sound_record(
    key: bytes, raw: bytes | memoryview, path: Path, keys_only: bool = False
) -> Record:
    """The record of a user's key. Raises DataCorruption, and marks the state at `path`."""
    if not is_sound(key, raw):
        raise damage(path, key, "fails its CRC")
    record = decode_record(raw, keys_only)
    if isinstance(record, int):
        raise damage(path, key, f"has the unknown layout {record}")
    return record


def sound_data(key: bytes, raw: bytes, path: Path) -> bytes:
    """What a record of any other database holds. Raises as `sound_record`."""
    if not is_sound(key, raw):
        raise damage(path, key, "fails its CRC")
    return raw[:-CRC_BYTES]


def sound_changes(
    rows: list[tuple[bytes, bytes]], revisions: int, path: Path
) -> tuple[list[Change], int]:
    """What records of the history hold, whole ones until there are so many revisions; and how many
    bytes these have. Raises as `sound_record`."""
    changes: list[Change] = []
    size = 0
    for key, data in rows:
        try:
            changes += decode_changes(data)
        except msgspec.MsgspecError as error:
            raise damage(path, key, f"cannot be read ({error})") from error
        size += len(data)
        if len(changes) >= revisions:
            break
    return changes, size


def damage(path: Path, key: bytes, what: str) -> DataCorruption:
    """The error for a record of the state at `path`, which is marked."""
    error = damaged(path / DATA_FILE, f"the record of {key!r} {what}", REMEDY)
    error.details["key"] = key.decode("utf-8", "backslashreplace")
    distrust_state(path)
    return error
