"""The applied state: every key, and how far the log has been applied, in one LMDB environment.

    database  key            record (each ends with a CRC-32 over key and record)
    keys      the user's     layout (u8), create_revision, mod_revision, version (u64 each), value
    meta      b"applied"     index and term of the last entry applied, revision (u64 each), the
                             state hash (16 bytes)
    meta      b"membership"  the last applied CONFIG entry's data

Whatever an entry changes is committed in the same transaction as `applied`. Commits are not synced:
after a power loss the whole directory is rebuilt (see recovery.py), so nothing here has to be
durable before a clean stop.

The state hash is the sum, modulo 2^128, of a hash of every record but `applied`. A sum is kept up
to date by adding what comes and subtracting what goes (Bellare and Micciancio, "A New Paradigm for
Collision-Free Hashing", 1997; against accidents, not against forgers, so a fast hash will do).
Equal entries must give equal hashes on every member; see node/agreement.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple
from zlib import crc32

import lmdb
import msgspec
from xxhash import xxh3_128_intdigest

from dengine.errors import (
    ClusterUnavailable,
    DataCorruption,
    FatalError,
    InvariantBroken,
    StorageIO,
)
from dengine.kv.commands import Result
from dengine.kv.machine import KEY_BYTES_MAX, Record, apply_batch
from dengine.raft.membership import Membership, decode_membership
from dengine.raft.types import Entry, EntryKind, LogId
from dengine.storage.environment import (
    CRC_BYTES,
    CRC_RESIDUE,
    DATA_FILE,
    damaged,
    open_environment,
    pack_crc,
    storage_error,
)
from dengine.storage.marks import distrust_state
from dengine.storage.writeback import LOST_PAGES, write_back

PAGE_BYTES_MAX: Final = 4 * 1024 * 1024  # of records in one page, so that no page stalls the loop
KEYS_PAGE_BYTES_MAX: Final = 64 * 1024 * 1024  # the same when values are only checked, not copied
ROWS_PER_STEP: Final = 1000

_RECORD: Final = struct.Struct("<BQQQ")
_PLAIN: Final = 0  # the only layout so far; a TTL or a lease would make another
_APPLIED: Final = struct.Struct("<QQQ16s")
APPLIED_KEY: Final = b"applied"
MEMBERSHIP_KEY: Final = b"membership"
_REMEDY: Final = "restart this node, which rebuilds its state"
DATABASES_MAX: Final = 16
DATABASES: Final = {b"keys": 0, b"meta": 1}  # by name, and as the hash tells them apart
_KEYS, _META = DATABASES.values()
_HASH_MASK: Final = (1 << 128) - 1
DIGEST_EVERY: Final = 256  # entries between two digests that members compare

_pack_record = _RECORD.pack
_unpack_record = _RECORD.unpack_from


class Page(NamedTuple):
    """One page of a scan. `next` is the first key that is not in it, None at the end."""

    items: list[tuple[bytes, Record]]
    next: bytes | None
    revision: int


class StateDigest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a state is after an entry, in a few bytes; equal on all members that applied it."""

    index: int
    revision: int
    state_hash: bytes  # 16 bytes


class StateStore:
    """Opens or creates the state in directory `path`.

    All methods but `write_back` belong to one thread, and only that and `sync` wait for a disk.

    Attributes:
        applied: the last entry applied.
        revision: the store's revision after it.
        membership: that of the last applied CONFIG entry; None when there was none.
        digests: after every `DIGEST_EVERY`th entry, since the last `take_digests`.

    Raises:
        DataCorruption: a record failed its CRC; the state can be rebuilt from the log.
        StorageIO: the system refused.
    """

    def __init__(self, path: Path) -> None:
        self._open(path)

    def _open(self, path: Path) -> None:
        self._path = path
        self.applied = LogId(0, 0)
        self.revision = 0
        self.membership: Membership | None = None
        self._hash = 0
        self._digests: list[StateDigest] = []
        try:
            self._environment = open_environment(
                path, durable=False, remedy=_REMEDY, databases=DATABASES_MAX
            )
        except DataCorruption as error:
            _distrusted(path, error)
            raise
        try:
            self._keys = self._environment.open_db(b"keys")
            self._meta = self._environment.open_db(b"meta")
            self._read = self._environment.begin(self._keys)
            self._load()
        except lmdb.Error as error:
            self._environment.close()
            raise _state_error(error, path) from error
        except BaseException:
            self._environment.close()
            raise

    @property
    def path(self) -> Path:
        return self._path

    @property
    def digest(self) -> StateDigest:
        return StateDigest(self.applied.index, self.revision, sum_bytes(self._hash))

    def take_digests(self) -> list[StateDigest]:
        """The digests made since the last call, oldest first."""
        taken, self._digests = self._digests, []
        return taken

    def replace(self, path: Path) -> None:
        """Go on with the state in another directory: a snapshot was installed.

        Whoever reads the old one in steps is told so at the next. Raises as the constructor.
        """
        self.close()
        self._open(path)

    def release_dead_readers(self) -> None:
        """After a process that read this state was killed: LMDB may reuse the pages it held."""
        self._environment.reader_check()

    def data_bytes(self) -> int:
        """Size of the file."""
        return (self._path / DATA_FILE).stat().st_size

    def apply(self, entries: Sequence[Entry]) -> list[list[Result]]:
        """Apply committed entries, all in one transaction.

        Args:
            entries: contiguous, the first one right after `applied`.

        Returns:
            One list per entry: its commands' results, empty for NOOP and CONFIG.

        Raises:
            DataCorruption, StorageIO: nothing was applied.
            InvariantBroken: the entries do not follow `applied`.
        """
        if not entries:
            return []
        applied, revision, membership = self.applied, self.revision, self.membership
        outcome: list[list[Result]] = []
        digests: list[StateDigest] = []
        # An open read transaction would keep the pages that this one frees from being used again.
        self._read.abort()
        try:
            with self._environment.begin(self._keys, write=True) as txn:
                view = _View(txn, self._path, self._hash)
                for entry in entries:
                    if entry.index != applied.index + 1 or entry.term < applied.term:
                        raise InvariantBroken(
                            f"entry {entry.log_id} cannot be applied right after {applied}"
                        )
                    results: list[Result] = []
                    if entry.kind is EntryKind.NORMAL:
                        revision, results = apply_batch(entry.data, view, revision)
                    elif entry.kind is EntryKind.CONFIG:
                        membership = self._decode_membership(entry.data)
                        view.hash += self._put_membership(txn, entry.data)
                    outcome.append(results)
                    applied = entry.log_id
                    if not applied.index % DIGEST_EVERY:
                        digests.append(StateDigest(applied.index, revision, sum_bytes(view.hash)))
                _put_applied(txn, self._meta, applied, revision, view.hash)
        except lmdb.Error as error:
            raise _state_error(error, self._path) from error
        finally:
            self._read_on()
        self.applied, self.revision, self.membership = applied, revision, membership
        self._hash = view.hash & _HASH_MASK
        self._digests += digests
        return outcome

    def found_anew(self, membership: Membership, revision: int) -> None:
        """Make this the state that a new cluster begins with: the keys stay, `applied` too.

        One transaction, not synced. Raises as `apply`.
        """
        self._read.abort()
        try:
            with self._environment.begin(write=True) as txn:
                state_hash = self._hash + self._put_membership(txn, membership.encode())
                _put_applied(txn, self._meta, self.applied, revision, state_hash)
        except lmdb.Error as error:
            raise _state_error(error, self._path) from error
        finally:
            self._read_on()
        self.membership, self.revision = membership, revision
        self._hash = state_hash & _HASH_MASK

    def _read_on(self) -> None:
        # After a write of its first pages has failed, LMDB begins nothing more in this environment.
        # The process ends over that write, and its error is the one that tells why.
        with suppress(lmdb.PanicError):
            self._read = self._environment.begin(self._keys)

    def get(self, key: bytes) -> Record | None:
        """The record of `key` as of `applied`; None when there is none."""
        try:
            raw = self._read.get(key)
        except lmdb.BadValsizeError:
            return None  # no key is empty or that long
        except lmdb.Error as error:
            raise _state_error(error, self._path) from error
        return None if raw is None else _decode_record(key, raw, self._path)

    def page(self, start: bytes, end: bytes | None, limit: int, keys_only: bool) -> Page:
        """Records with `start <= key < end` in order, all from one transaction.

        Args:
            start: b"" is the very first key.
            end: None goes to the last key.
            limit: rows, at least 1. A page also ends early at `PAGE_BYTES_MAX` bytes of records,
                but never without a row.
            keys_only: leave the values empty.
        """
        items: list[tuple[bytes, Record]] = []
        budget = KEYS_PAGE_BYTES_MAX if keys_only else PAGE_BYTES_MAX
        try:
            with self._environment.begin(self._keys, buffers=True) as txn, txn.cursor() as cursor:
                found = _seek(cursor, start)
                while found:
                    key = bytes(cursor.key())
                    if end is not None and key >= end:
                        break
                    raw = cursor.value()
                    budget -= len(raw)
                    if len(items) >= limit or (budget < 0 and items):
                        return Page(items, key, self.revision)
                    items.append((key, _decode_record(key, raw, self._path, keys_only)))
                    found = cursor.next()
        except lmdb.Error as error:
            raise _state_error(error, self._path) from error
        return Page(items, None, self.revision)

    def count(self, start: bytes, end: bytes | None) -> Iterator[int]:
        """Count the keys with `start <= key < end`, with a pause after every 1000.

        Yields:
            Keys so far; the last number is the answer. It is that of the moment of the first
            step: entries applied between two steps do not show. Close the generator when you stop
            early: while it lives, LMDB cannot reuse pages.
        """
        if not start and end is None:
            yield self._read.stat(self._keys)["entries"]
            return
        total, environment = 0, self._environment
        try:
            with environment.begin(self._keys) as txn, txn.cursor() as cursor:
                for _ in _scan(cursor, start, end):
                    total += 1
                    if total % ROWS_PER_STEP == 0:
                        yield total
        except lmdb.Error as error:
            if environment is not self._environment:
                raise ClusterUnavailable("a snapshot replaced the state meanwhile") from None
            raise _state_error(error, self._path) from error
        yield total

    def sync(self) -> None:
        """Make everything applied so far durable. Waits for the disk.

        Raises:
            StorageIO: it may not be durable, and is never tried again: the kernel drops pages that
                it could not write, and the next sync would find nothing wrong. The state is marked
                to be rebuilt.
        """
        try:
            self._environment.sync(True)
        except lmdb.Error as error:
            distrust_state(self._path)
            raise _state_error(error, self._path) from error

    def write_back(self) -> Iterator[float]:
        """Write what is dirty to the disk, as `writeback.write_back`. Any thread may do this.

        Raises:
            OSError: this system cannot, or not now; that says nothing of the state.
            StorageIO: the disk did not take a page, which the kernel then holds for written. The
                state is marked to be rebuilt.
        """
        path = self._path
        try:
            yield from write_back(path / DATA_FILE)
        except OSError as error:
            if path != self._path:
                return  # it was replaced meanwhile
            if error.errno not in LOST_PAGES:
                raise
            distrust_state(path)
            raise StorageIO(f"{path / DATA_FILE}: {error.strerror}; check the disk") from error

    def close(self) -> None:
        """Release the environment, without syncing it."""
        self._read.abort()
        self._environment.close()

    def _load(self) -> None:
        raw = self._read.get(APPLIED_KEY, db=self._meta)
        if raw is not None:
            found = read_applied(raw)
            if found is None:
                raise _damage(self._path, APPLIED_KEY, "fails its CRC or is of an unknown layout")
            self.applied, digest = found
            self.revision = digest.revision
            self._hash = int.from_bytes(digest.state_hash, "big")
        elif self._read.stat(self._keys)["entries"]:
            raise _damage(self._path, APPLIED_KEY, "is missing")
        raw = self._read.get(MEMBERSHIP_KEY, db=self._meta)
        if raw is not None:
            if crc32(raw, crc32(MEMBERSHIP_KEY)) != CRC_RESIDUE:
                raise _damage(self._path, MEMBERSHIP_KEY, "fails its CRC")
            self.membership = self._decode_membership(raw[:-CRC_BYTES])

    def _put_membership(self, txn: lmdb.Transaction[bytes], data: bytes) -> int:
        """By how much the state hash grows."""
        key = MEMBERSHIP_KEY
        old = txn.get(key, db=self._meta)
        new = data + pack_crc(crc32(data, crc32(key)))
        txn.put(key, new, db=self._meta)
        return record_hash(_META, key, new) - (record_hash(_META, key, old) if old else 0)

    def _decode_membership(self, data: bytes) -> Membership:
        try:
            return decode_membership(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InvariantBroken(
                f"{self._path}: a membership that this dengine cannot read ({error}); "
                "start the version that wrote it"
            ) from error


class _View:
    """The state machine's view of one write transaction; `hash` grows and shrinks with it."""

    __slots__ = ("_get", "_key", "_path", "_put", "_raw", "_txn", "hash")

    def __init__(self, txn: lmdb.Transaction[bytes], path: Path, state_hash: int) -> None:
        self._txn = txn
        self._get = txn.get
        self._put = txn.put
        self._path = path
        self._key = b""  # read last, and what was there: a put nearly always follows its get
        self._raw: bytes | None = None
        self.hash = state_hash

    def get(self, key: bytes) -> Record | None:
        self._key, self._raw = key, self._get(key)
        return None if self._raw is None else _decode_record(key, self._raw, self._path)

    def put(self, key: bytes, record: Record) -> None:
        old = self._raw if key == self._key else self._get(key)
        value = record.value
        head = _pack_record(_PLAIN, record.create_revision, record.mod_revision, record.version)
        new = b"".join((head, value, pack_crc(crc32(value, crc32(head, crc32(key))))))
        self._put(key, new)
        if old is not None:
            self.hash -= record_hash(_KEYS, key, old)
        self.hash += record_hash(_KEYS, key, new)
        self._key = b""

    def delete(self, key: bytes) -> None:
        old = self._txn.pop(key)
        if old is not None:
            _decode_record(key, old, self._path, keys_only=True)  # rot would spoil the hash
            self.hash -= record_hash(_KEYS, key, old)
        self._key = b""

    def scan(self, start: bytes, end: bytes | None) -> Iterator[bytes]:
        with self._txn.cursor() as cursor:
            yield from _scan(cursor, start, end)


def record_hash(database: int, key: bytes, raw: bytes) -> int:
    """128 bits of one record; the seed keeps databases apart, and where a key ends.

    Args:
        database: its number in `DATABASES`.
        raw: the whole record, CRC included.
    """
    return xxh3_128_intdigest(key + raw, database << 16 | len(key))


def sum_bytes(record_hashes: int) -> bytes:
    """A sum of `record_hash`es, which may be negative or large, as the state hash: 16 bytes."""
    return (record_hashes & _HASH_MASK).to_bytes(16, "big")


def read_applied(raw: bytes) -> tuple[LogId, StateDigest] | None:
    """The `applied` record as stored; None when it is damaged or of another layout."""
    if crc32(raw, crc32(APPLIED_KEY)) != CRC_RESIDUE or len(raw) != _APPLIED.size + CRC_BYTES:
        return None
    index, term, revision, state_hash = _APPLIED.unpack_from(raw)
    return LogId(index, term), StateDigest(index, revision, state_hash)


def _put_applied(
    txn: lmdb.Transaction[bytes],
    meta: lmdb._Database,
    applied: LogId,
    revision: int,
    state_hash: int,
) -> None:
    data = _APPLIED.pack(applied.index, applied.term, revision, sum_bytes(state_hash))
    txn.put(APPLIED_KEY, data + pack_crc(crc32(data, crc32(APPLIED_KEY))), db=meta)


def _scan(cursor: lmdb.Cursor[bytes], start: bytes, end: bytes | None) -> Iterator[bytes]:
    """Keys with `start <= key < end`, without their values."""
    if _seek(cursor, start):
        for key in cursor.iternext(keys=True, values=False):
            if end is not None and key >= end:
                return
            yield key


def _seek(cursor: lmdb.Cursor[bytes] | lmdb.Cursor[memoryview], start: bytes) -> bool:
    """Go to the first key at or after `start`, which may be of any length."""
    if not start:
        return cursor.first()
    head = start[:KEY_BYTES_MAX]
    found = cursor.set_range(head)
    if found and len(start) > KEY_BYTES_MAX and cursor.key() == head:
        return cursor.next()  # `start` is longer than any key, so it comes after its own head
    return found


def _decode_record(
    key: bytes, raw: bytes | memoryview, path: Path, keys_only: bool = False
) -> Record:
    if crc32(raw, crc32(key)) != CRC_RESIDUE:
        raise _damage(path, key, "fails its CRC")
    layout, create_revision, mod_revision, version = _unpack_record(raw)
    if layout != _PLAIN:
        raise _damage(path, key, f"has the unknown layout {layout}")
    value = b"" if keys_only else bytes(raw[_RECORD.size : -CRC_BYTES])
    return Record(create_revision, mod_revision, version, value)


def _damage(path: Path, key: bytes, what: str) -> DataCorruption:
    error = damaged(path / DATA_FILE, f"the record of {key!r} {what}", _REMEDY)
    error.details["key"] = key.decode("utf-8", "backslashreplace")
    return _distrusted(path, error)


def _state_error(error: lmdb.Error, path: Path) -> FatalError:
    found = storage_error(error, path, _REMEDY)
    return _distrusted(path, found) if isinstance(found, DataCorruption) else found


def _distrusted(path: Path, error: DataCorruption) -> DataCorruption:
    distrust_state(path)
    return error
