"""The applied state: every key, and how far the log has been applied, in one LMDB environment.

What lies where is told in state_records.py. Whatever an entry changes is committed in the same
transaction as `applied`. Commits are not synced: after a power loss the whole directory is rebuilt
(see recovery.py), so nothing here has to be durable before a clean stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import lmdb
import msgspec

from dengine.errors import (
    ClusterUnavailable,
    DataCorruption,
    FatalError,
    InvariantBroken,
    StorageIO,
)
from dengine.kv import tables
from dengine.kv.commands import Result
from dengine.kv.machine import apply_batch
from dengine.kv.store import (
    TABLES,
    Change,
    Record,
    Rules,
    Table,
    Totals,
    decode_totals,
)
from dengine.raft.membership import Membership, decode_membership
from dengine.raft.types import Entry, EntryKind, LogId
from dengine.storage.environment import (
    DATA_FILE,
    open_environment,
    storage_error,
)
from dengine.storage.marks import distrust_state
from dengine.storage.state_records import (
    APPLIED_KEY,
    DATABASES_MAX,
    MEMBERSHIP_KEY,
    META,
    TOTALS_KEY,
    StateDigest,
    encode_applied,
    read_applied,
    record_hash,
    signed,
    sum_bytes,
)
from dengine.storage.state_view import (
    REMEDY,
    StateView,
    damage,
    require_next,
    rules_of,
    scan,
    seek,
    sound_changes,
    sound_data,
    sound_record,
    table_rows,
)
from dengine.storage.writeback import LOST_PAGES, write_back

PAGE_BYTES_MAX: Final = 4 * 1024 * 1024  # of records in one page, so that no page stalls the loop
KEYS_PAGE_BYTES_MAX: Final = 64 * 1024 * 1024  # the same when values are only checked, not copied
ROWS_PER_STEP: Final = 1000
_HASH_MASK: Final = (1 << 128) - 1
DIGEST_EVERY: Final = 256  # entries between two digests that members compare


class Page(NamedTuple):
    """One page of a scan. `next` is the first key that is not in it, None at the end."""

    items: list[tuple[bytes, Record]]
    next: bytes | None
    revision: int


class StateStore:
    """Opens or creates the state in directory `path`.

    All methods but `write_back` belong to one thread, and only that and `sync` wait for a disk.

    Attributes:
        applied: the last entry applied.
        revision: the store's revision after it.
        membership: that of the last applied CONFIG entry; None when there was none.
        keep_changes: set while somebody will `take_changes`.
        totals: what the state machine knows of its tables; None for a state in which no entry of
            command version 2 was applied yet.
        next_due_ms: the log time at which the first of all that can expire is due; None: nothing
            can.

    Raises:
        DataCorruption: a record failed its CRC; the state can be rebuilt from the log.
        StorageIO: the system refused.
    """

    def __init__(self, path: Path) -> None:
        self.keep_changes = False
        self._open(path)

    def _open(self, path: Path) -> None:
        self._path = path
        self.applied = LogId(0, 0)
        self.revision = 0
        self.membership: Membership | None = None
        self.totals: Totals | None = None
        self.next_due_ms: int | None = None
        self._rules = Rules()
        self._hash = 0
        self._digests: list[StateDigest] = []
        self._changes: list[Change] = []
        try:
            self._environment = open_environment(
                path, durable=False, remedy=REMEDY, databases=DATABASES_MAX
            )
        except DataCorruption as error:
            _distrusted(path, error)
            raise
        try:
            before = self._environment.info()["last_txnid"]
            self._keys = self._environment.open_db(b"keys")
            self._meta = self._environment.open_db(b"meta")
            # Made where an older release left none: then they are empty, and change no hash.
            self._tables = {t: self._environment.open_db(t.encode()) for t in TABLES}
            if self._environment.info()["last_txnid"] != before:
                self.sync()  # what vouches for the state may have been written already
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
        """Size of the file, which never shrinks."""
        return (self._path / DATA_FILE).stat().st_size

    def used_bytes(self) -> int:
        """About what is in the file, and in a copy of it."""
        stats = [self._read.stat(db) for db in (self._keys, self._meta, *self._tables.values())]
        pages = sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats)
        return pages * stats[0]["psize"]

    @property
    def clock_ms(self) -> int:
        """The log time of the last entry; 0 as long as no entry has carried one."""
        return self.totals.clock_ms if self.totals is not None else 0

    def take_changes(self) -> list[Change]:
        """What was changed since the last call while `keep_changes` was set, in order."""
        taken, self._changes = self._changes, []
        return taken

    def apply(
        self, entries: Sequence[Entry], go_on: Callable[[], bool] = lambda: True
    ) -> list[list[Result]]:
        """Apply committed entries, all in one transaction.

        Args:
            entries: contiguous, the first one right after `applied`.
            go_on: asked after each entry; False leaves the rest for another call.

        Returns:
            One list per entry that was applied: its commands' results, empty for NOOP and CONFIG.

        Raises:
            DataCorruption, StorageIO: nothing was applied.
            InvariantBroken: the entries do not follow `applied`.
            ConfigError: a newer release made an entry. Nothing was applied.
        """
        if not entries:
            return []
        applied, revision = self.applied, self.revision
        membership, rules = self.membership, self._rules
        totals = None if self.totals is None else msgspec.structs.replace(self.totals)
        outcome: list[list[Result]] = []
        digests: list[StateDigest] = []
        # An open read transaction would keep the pages that this one frees from being used again.
        self._read.abort()
        try:
            with self._environment.begin(self._keys, write=True) as txn:
                view = StateView(
                    txn,
                    self._tables,
                    self._path,
                    self._hash,
                    totals,
                    keep_changes=self.keep_changes,
                )
                for entry in entries:
                    require_next(entry, applied)
                    results: list[Result] = []
                    if entry.kind is EntryKind.NORMAL:
                        revision, results = apply_batch(
                            entry.data, view, revision, rules, entry.index
                        )
                        view.end_entry(self._meta)
                    elif entry.kind is EntryKind.CONFIG:
                        membership = self._decode_membership(entry.data)
                        rules = rules_of(membership)
                        view.hash += self._put_membership(txn, entry.data)
                    outcome.append(results)
                    applied = entry.log_id
                    if not applied.index % DIGEST_EVERY:
                        digests.append(StateDigest(applied.index, revision, sum_bytes(view.hash)))
                    if not go_on():
                        break
                view.close()
                _put_applied(txn, self._meta, applied, revision, view.hash)
        except lmdb.Error as error:
            raise _state_error(error, self._path) from error
        finally:
            self._read_on()
        self.applied, self.revision, self.membership = applied, revision, membership
        self.totals, self._rules = view.totals, rules
        self._hash = view.hash & _HASH_MASK
        self._digests += digests
        self._changes += view.changes
        if view.due_changed:
            self._find_next_due()
        return outcome

    def found_anew(self, membership: Membership, revision: int) -> None:
        """Make this the state that a new cluster begins with: the keys stay, `applied` too.

        The history goes: whoever followed the old cluster further than this state does has seen
        changes that were never made here, and must learn of it by a revision that is compacted.
        One transaction, not synced. Raises as `apply`.
        """
        totals = None if self.totals is None else msgspec.structs.replace(self.totals)
        self._read.abort()
        try:
            with self._environment.begin(self._keys, write=True) as txn:
                view = StateView(txn, self._tables, self._path, self._hash, totals)
                if totals is not None:
                    view.clear("history")
                    totals.history_first, totals.history_bytes = revision + 1, 0
                    view.end_entry(self._meta)
                view.close()
                state_hash = view.hash + self._put_membership(txn, membership.encode())
                _put_applied(txn, self._meta, self.applied, revision, state_hash)
        except lmdb.Error as error:
            raise _state_error(error, self._path) from error
        finally:
            self._read_on()
        self.membership, self.revision, self.totals = membership, revision, totals
        self._rules = rules_of(membership)
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
        return None if raw is None else sound_record(key, raw, self._path)

    def lease(self, lease_id: str) -> tables.Lease | None:
        """A lease as of `applied`, also one whose keys are being deleted."""
        if not tables.may_be_lease(lease_id):
            return None
        data = self._table_get("leases", lease_id.encode())
        return None if data is None else tables.decode_lease(data)

    def attached(self, lease_id: str, limit: int) -> list[bytes]:
        """Up to `limit` of the keys that a lease holds, in no particular order."""
        prefix = tables.attached_prefix(lease_id)
        rows = self._table_rows("attached", prefix, limit, PAGE_BYTES_MAX)
        return [data for key, data in rows if key.startswith(prefix)]

    def history(self, revision: int, revisions: int, size: int) -> tuple[list[Change], int]:
        """Whole records of the history, the first one that in which `revision` is, or the first
        one after it: what their revisions have changed, and how many bytes were read.

        Args:
            revisions, size: they end with the one that comes to so many revisions, or so many
                bytes; but there is never none where there are some.
        """
        rows = self._table_rows("history", tables.number_key(revision), revisions, size)
        return sound_changes(rows, revisions, self._path)

    def _table_get(self, table: Table, key: bytes) -> bytes | None:
        try:
            raw = self._read.get(key, db=self._tables[table])
        except lmdb.Error as error:
            raise _state_error(error, self._path) from error
        return None if raw is None else sound_data(key, raw, self._path)

    def _table_rows(
        self, table: Table, start: bytes, limit: int, size: int
    ) -> list[tuple[bytes, bytes]]:
        try:
            return table_rows(self._read, self._tables[table], start, limit, size, self._path)
        except lmdb.Error as error:
            raise _state_error(error, self._path) from error

    def _find_next_due(self) -> None:
        rows = [self._table_rows("due", group, 1, 1) for group in tables.DUE_GROUPS]
        self.next_due_ms = min((tables.due_ms(r[0][0]) for r in rows if r), default=None)

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
                found = seek(cursor, start)
                while found:
                    key = bytes(cursor.key())
                    if end is not None and key >= end:
                        break
                    raw = cursor.value()
                    budget -= len(raw)
                    if len(items) >= limit or (budget < 0 and items):
                        return Page(items, key, self.revision)
                    items.append((key, sound_record(key, raw, self._path, keys_only)))
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
                for _ in scan(cursor, start, end):
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
                raise damage(self._path, APPLIED_KEY, "fails its CRC or is of an unknown layout")
            self.applied, digest = found
            self.revision = digest.revision
            self._hash = int.from_bytes(digest.state_hash, "big")
        elif self._read.stat(self._keys)["entries"]:
            raise damage(self._path, APPLIED_KEY, "is missing")
        raw = self._read.get(MEMBERSHIP_KEY, db=self._meta)
        if raw is not None:
            self.membership = self._decode_membership(sound_data(MEMBERSHIP_KEY, raw, self._path))
            self._rules = rules_of(self.membership)
        raw = self._read.get(TOTALS_KEY, db=self._meta)
        if raw is not None:
            self.totals = decode_totals(sound_data(TOTALS_KEY, raw, self._path))
            if self.totals is None:
                raise damage(self._path, TOTALS_KEY, "is of an unknown layout")
        self._find_next_due()

    def _put_membership(self, txn: lmdb.Transaction[bytes], data: bytes) -> int:
        """By how much the state hash grows."""
        key = MEMBERSHIP_KEY
        old = txn.get(key, db=self._meta)
        grown = 0
        if old is not None:
            sound_data(key, old, self._path)  # rot would spoil the hash
            grown -= record_hash(META, key, old)
        new = signed(key, data)
        txn.put(key, new, db=self._meta)
        return grown + record_hash(META, key, new)

    def _decode_membership(self, data: bytes) -> Membership:
        try:
            return decode_membership(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InvariantBroken(
                f"{self._path}: a membership that this dengine cannot read ({error}); "
                "start the version that wrote it"
            ) from error


def _put_applied(
    txn: lmdb.Transaction[bytes],
    meta: lmdb._Database,
    applied: LogId,
    revision: int,
    state_hash: int,
) -> None:
    txn.put(APPLIED_KEY, encode_applied(applied, revision, state_hash), db=meta)


def _state_error(error: lmdb.Error, path: Path) -> FatalError:
    found = storage_error(error, path, REMEDY)
    return _distrusted(path, found) if isinstance(found, DataCorruption) else found


def _distrusted(path: Path, error: DataCorruption) -> DataCorruption:
    distrust_state(path)
    return error
