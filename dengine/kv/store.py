"""What the state machine keeps, and what it needs of the store that keeps it.

Beside the users' records there are a few small tables (see tables.py) whose keys and bytes the
machine makes itself; the store adds a CRC to each record, counts it into the state hash, and writes
all of an entry's changes in one transaction.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final, Literal, Protocol

import msgspec

KEY_BYTES_MAX: Final = 511
VALUE_BYTES_MAX: Final = 1024 * 1024

Table = Literal["due", "leases", "attached", "history", "clients", "results", "opaque"]
TABLES: Final[tuple[Table, ...]] = (
    "due",
    "leases",
    "attached",
    "history",
    "clients",
    "results",
    "opaque",
)


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What the store holds for a key. The first three numbers are at least 1."""

    create_revision: int  # revision of the put that made the key
    mod_revision: int  # revision of the last put
    version: int  # puts since the key was made
    value: bytes
    expires_ms: int = 0  # the log time from which on it is due; 0: it stays
    lease: str = ""  # id of the lease that it is attached to


PUT, DELETE, EXPIRE = 0, 1, 2
KINDS: Final = ("put", "delete", "expire")


class Event(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One change of one key, as watchers see it.

    Args:
        kind: PUT, DELETE or EXPIRE.
        record: what a put made of the key; else None.
        prev: what was there before; None: nothing.
    """

    kind: int
    key: bytes
    record: Record | None
    prev: Record | None

    @property
    def created(self) -> bool:
        """A put that made the key, however often its transaction has put it."""
        made = self.record
        return made is not None and made.create_revision == made.mod_revision


Change = tuple[int, Sequence[Event]]  # a revision, and what it has changed

_encoder = msgspec.msgpack.Encoder()
_changes_decoder = msgspec.msgpack.Decoder(list[tuple[int, list[Event]]])


def encode_changes(changes: Sequence[Change]) -> bytes:
    """All changes of one entry as bytes, lowest revision first."""
    return _encoder.encode(changes)


def decode_changes(data: bytes) -> list[tuple[int, list[Event]]]:
    """Inverse of `encode_changes`; raises `msgspec.MsgspecError` on anything else."""
    return _changes_decoder.decode(data)


class Totals(msgspec.Struct, gc=False):
    """What the machine knows of its tables without looking into them: one record of the state.

    A state has it from the first entry of version 2 on. Until then there is no log time, and
    nothing is recorded but the users' keys, as by the release before.
    """

    clock_ms: int = 0  # the log time of the last entry
    history_first: int = 1  # the oldest revision in the history, or the next one if it is empty
    history_bytes: int = 0
    leases: int = 0
    clients: int = 0
    opaque: int = 0
    remembered_bytes: int = 0  # of all results that are kept for exactly-once

    def encode(self) -> bytes:
        return _TOTALS.pack(
            self.clock_ms,
            self.history_first,
            self.history_bytes,
            self.leases,
            self.clients,
            self.opaque,
            self.remembered_bytes,
        )


_TOTALS: Final = struct.Struct("<7Q")


def decode_totals(data: bytes) -> Totals | None:
    """Inverse of `Totals.encode`; None for anything else."""
    return Totals(*_TOTALS.unpack(data)) if len(data) == _TOTALS.size else None


class Rules(msgspec.Struct, frozen=True, gc=False):
    """What the cluster's replicated settings, in force at an entry, tell the machine."""

    cluster_id: str = ""
    history_revisions: int = 100_000
    history_bytes: int = 268_435_456
    idempotency_window_ms: int = 600_000


class View(Protocol):
    """The store as one entry sees it: its own changes are visible at once."""

    totals: Totals | None  # the machine makes and changes it; the store keeps it

    def get(self, key: bytes) -> Record | None: ...

    def put(self, key: bytes, record: Record) -> None: ...

    def get_many(self, keys: Sequence[bytes], size: int | None) -> list[Record | None]:
        """What `get` finds for each of `keys`. It ends early, with the one that does it, when the
        values have more than `size` bytes; None: never."""
        ...

    def put_many(self, keys: Sequence[bytes], records: Sequence[Record]) -> None:
        """`put` for each of `keys`, which all differ: those that `get_many` has found last, all of
        them, and no record was put or deleted since."""
        ...

    def delete(self, key: bytes) -> None:
        """Removes `key`, which exists."""
        ...

    def scan(self, start: bytes, end: bytes | None) -> Iterator[bytes]:
        """Keys with `start <= key < end` in ascending order; `end` None: to the last key."""
        ...

    def read(self, table: Table, key: bytes) -> bytes | None: ...

    def write(self, table: Table, key: bytes, data: bytes) -> None: ...

    def append(self, table: Table, key: bytes, data: bytes) -> None:
        """`write` of a key that comes after all others of its table."""
        ...

    def remove(self, table: Table, key: bytes) -> bytes | None:
        """What was there, if anything was."""
        ...

    def first(self, table: Table, start: bytes) -> tuple[bytes, bytes] | None:
        """The first key at or after `start`, and what is there."""
        ...

    def changed(self, revision: int, events: Sequence[Event]) -> None:
        """For whoever watches: what `revision` has changed."""
        ...
