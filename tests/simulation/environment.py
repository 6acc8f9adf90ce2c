"""LMDB as dengine.storage uses it, in memory: atomic transactions, and a crash model.

A durable environment keeps what it has committed. After a commit whose fsync has failed, all later
ones of that process only seem to work, as with a kernel that drops the pages it could not write.
An environment that is not synced may come back from a power cut with any mixture of old and new
records, or unreadable; after a sync that has failed, also without one.

A file that somebody has written and not LMDB, as a snapshot that is unpacked, is a `packed` image.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import lmdb
import msgspec

Data = dict[bytes, bytes]
PACKED_MAGIC: Final = b"simulated LMDB"


def packed(tables: dict[bytes, Table]) -> bytes:
    """All records as the bytes of a file."""
    rows = [(name, sorted(table.data.items())) for name, table in sorted(tables.items())]
    return PACKED_MAGIC + msgspec.msgpack.encode(rows)


def unpacked(content: bytes) -> dict[bytes, Data] | None:
    """Inverse of `packed`; None for any other bytes."""
    if not content.startswith(PACKED_MAGIC):
        return None
    kind = list[tuple[bytes, list[tuple[bytes, bytes]]]]
    try:
        rows = msgspec.msgpack.decode(content[len(PACKED_MAGIC) :], type=kind)
    except msgspec.MsgspecError:
        return None
    return {name: dict(data) for name, data in rows}


class Table:
    """One database: records, and their keys in order."""

    __slots__ = ("data", "keys")

    def __init__(self, data: Data | None = None) -> None:
        self.data: Data = dict(data or {})
        self.keys = sorted(self.data)

    def put(self, key: bytes, value: bytes) -> None:
        if key not in self.data:
            keys = self.keys
            if keys and keys[-1] > key:
                insort(keys, key)
            else:
                keys.append(key)
        self.data[key] = value

    def delete(self, key: bytes) -> None:
        del self.data[key]
        del self.keys[bisect_left(self.keys, key)]


class Environment:
    """The file, which outlives processes; `Handle` is what a process opens."""

    def __init__(self, durable: bool) -> None:
        self.durable = durable
        self.tables: dict[bytes, Table] = {b"": Table()}
        self.transaction = 0
        self.unreadable = False
        self.synced: dict[bytes, Data] = {}  # of one that is not durable
        self.true_image: dict[bytes, Data] | None = None  # on the disk, while it lies
        self.lies = False  # of one that is not durable: a sync has failed

    def copy(self) -> dict[bytes, Data]:
        return {name: dict(table.data) for name, table in self.tables.items()}

    def load(self, image: dict[bytes, Data]) -> None:
        self.tables = {name: Table(data) for name, data in image.items()}

    def size_bytes(self) -> int:
        return 8192 + 64 * sum(len(table.keys) for table in self.tables.values())

    def durable_record(self, key: bytes) -> bytes | None:
        """What a power cut would leave under `key` of the main database."""
        if self.true_image is not None:
            return self.true_image[b""].get(key)
        return self.tables[b""].data.get(key)

    def begin_to_lie(self) -> None:
        if self.true_image is None:
            self.true_image = self.copy()

    def process_ended(self, rng: random.Random) -> bool:
        """The cache may or may not survive long enough for the next process to see it; False when
        it has not.
        """
        lost = (self.true_image is not None or self.lies) and rng.random() < 0.7
        if lost and self.true_image is not None:
            self.load(self.true_image)
        elif lost:
            self.lose_power(rng)
        self.true_image = None
        return not lost

    def lose_power(self, rng: random.Random) -> bool:
        """False when it is not what it was."""
        if self.durable:
            if self.true_image is not None:
                self.load(self.true_image)
                self.true_image = None
            return True
        self.lies = False
        if self.synced == (now := self.copy()):
            return True
        if rng.random() < 0.2:
            self.unreadable = True
            return False
        for name, data in now.items():
            old = self.synced.get(name, {})
            for key in sorted(data.keys() | old.keys()):
                if rng.random() < 0.5:
                    value = old.get(key)
                    if value is None:
                        data.pop(key, None)
                    else:
                        data[key] = value
        self.load(now)
        self.synced = self.copy()
        return False


class Handle:
    """As lmdb.Environment.

    Args:
        operation: tells the disk what comes; raises what it has to say.
    """

    def __init__(self, environment: Environment, operation: Callable[[str], None]) -> None:
        self.file = environment
        self._operation = operation

    def open_db(self, name: bytes = b"", txn: Any = None) -> bytes:
        self.file.tables.setdefault(name, Table())
        return name

    def begin(self, db: bytes = b"", write: bool = False, buffers: bool = False) -> Transaction:
        return Transaction(self, db, write)

    def info(self) -> dict[str, int]:
        return {"last_txnid": self.file.transaction}

    def sync(self, force: bool = False) -> None:
        try:
            self._ask("sync")
        except lmdb.Error:
            self.file.lies = True
            raise
        if not self.file.lies:
            self.file.synced = self.file.copy()

    def before_commit(self) -> None:
        self._ask("commit")

    def _ask(self, kind: str) -> None:
        try:
            self._operation(kind)
        except OSError as error:
            raise lmdb.DiskError(f"mdb_txn_{kind}: {error.strerror}") from error

    def reader_check(self) -> int:
        return 0

    def close(self) -> None:
        pass


class Transaction:
    """A reader sees the newest commit: dengine holds none open across a write."""

    __slots__ = ("_db", "_handle", "_tables", "_undo", "_write")

    def __init__(self, handle: Handle, db: bytes, write: bool) -> None:
        self._handle = handle
        self._tables = handle.file.tables
        self._db = db
        self._write = write
        self._undo: list[tuple[Table, bytes, bytes | None]] = []

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._write:
            if kind is None:
                self._commit()
            else:
                self.abort()

    def _commit(self) -> None:
        try:
            self._handle.before_commit()
        except BaseException as error:
            self.abort()
            if isinstance(error, lmdb.Error) and self._handle.file.durable:
                self._handle.file.begin_to_lie()
            raise
        self._handle.file.transaction += 1

    def abort(self) -> None:
        for table, key, old in reversed(self._undo):
            if old is None:
                table.delete(key)
            else:
                table.put(key, old)
        self._undo = []

    def id(self) -> int:
        return self._handle.file.transaction + self._write

    def stat(self, db: bytes | None = None) -> dict[str, int]:
        count = len(self._table(db).keys)
        pages = {"branch_pages": 0, "leaf_pages": count, "overflow_pages": 0}
        return {"entries": count, "psize": 64, **pages}

    def _table(self, db: bytes | None) -> Table:
        return self._tables[self._db if db is None else db]

    def get(self, key: bytes, default: Any = None, db: bytes | None = None) -> bytes | None:
        return self._tables[self._db if db is None else db].data.get(key, default)

    def put(self, key: bytes, value: bytes, append: bool = False, db: bytes | None = None) -> bool:
        if not 1 <= len(key) <= 511:
            raise lmdb.BadValsizeError("mdb_put: MDB_BAD_VALSIZE")
        table = self._tables[self._db if db is None else db]
        if append and table.keys and table.keys[-1] >= key:
            return False  # MDB_APPEND takes nothing but a key behind all others
        self._undo.append((table, key, table.data.get(key)))
        table.put(key, value)
        return True

    def delete(self, key: bytes, db: bytes | None = None) -> bool:
        table = self._table(db)
        if key not in table.data:
            return False
        self._undo.append((table, key, table.data[key]))
        table.delete(key)
        return True

    def pop(self, key: bytes, db: bytes | None = None) -> bytes | None:
        old = self.get(key, db=db)
        self.delete(key, db)
        return old

    def drop(self, db: bytes, delete: bool = True) -> None:
        for key in list(self._tables[db].keys):
            self.delete(key, db)

    def cursor(self, db: bytes | None = None) -> Cursor:
        return Cursor(self, self._table(db))


class Cursor:
    """Where it stands is a place among the keys; -1 is before the first."""

    __slots__ = ("_place", "_table", "_transaction")

    def __init__(self, transaction: Transaction, table: Table) -> None:
        self._transaction = transaction
        self._table = table
        self._place = -1

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass

    def _is_on_record(self) -> bool:
        return 0 <= self._place < len(self._table.keys)

    def first(self) -> bool:
        self._place = 0
        return self._is_on_record()

    def set_key(self, key: bytes) -> bool:
        self._place = bisect_left(self._table.keys, key)
        return self._is_on_record() and self._table.keys[self._place] == key

    def set_range(self, key: bytes) -> bool:
        self._place = bisect_left(self._table.keys, key)
        return self._is_on_record()

    def next(self) -> bool:
        self._place += 1
        return self._is_on_record()

    def putmulti(self, items: Iterable[tuple[bytes, bytes]]) -> None:
        for key, value in items:
            self._transaction.put(key, value)

    def delete(self) -> bool:
        return self._transaction.delete(self.key())

    def key(self) -> bytes:
        return self._table.keys[self._place]

    def value(self) -> bytes:
        return self._table.data[self.key()]

    def item(self) -> tuple[bytes, bytes]:
        return self.key(), self.value()

    def iternext(self, keys: bool = True, values: bool = True) -> Iterator[bytes]:
        yield from self._table.keys[max(self._place, 0) :]
