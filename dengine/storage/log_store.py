"""The durable log: entries and hard state in one LMDB environment, every commit on disk.

    key                     record (each ends with a CRC-32 over key and record)
    "a"                     head: hard state, both ends of the log, transaction id
    "c"                     once a prefix is gone: index (u64) and content of the membership that
                            was in force at its end
    "e" + index (u64, BE)   term (u64), kind (u8), data

The head sorts before the entries, so that new ones are appended at the very end of the tree; that
and their neighbourhood make a save dirty only two small leaves besides the data itself.

Nothing here is ever torn: LMDB's commit is atomic. So a record that fails its CRC, a gap, or a
head that does not belong to the newest transaction is damage, wherever it is, and a node must not
vote with such a log. Everything is checked once, when the log is opened, and again on each read.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import lmdb
import msgspec
from zlib_ng.zlib_ng import crc32

from dengine.errors import DataCorruption, IdentityError, InvariantBroken, StorageIO
from dengine.raft.membership import Membership, decode_membership
from dengine.raft.types import Entry, EntryKind, HardState, LogId, MemberId
from dengine.storage.environment import (
    CRC_BYTES,
    CRC_RESIDUE,
    DATA_FILE,
    RECORD_BYTES_MAX,
    damaged,
    open_environment,
    pack_crc,
    padded,
    storage_error,
)

HEAD_KEY: Final = b"a"
_BASE_KEY: Final = b"c"
_BASE: Final = struct.Struct("<Q")
# Format, transaction id, purged index and term, last index and term; then the hard state: term,
# voted (0 or 1), id and incarnation of whom, commit index.
HEAD: Final = struct.Struct("<B Q QQ QQ Q BQQ Q")
_HEAD_FORMAT: Final = 1
ENTRY_KEY: Final = struct.Struct(">cQ")
ENTRY: Final = struct.Struct("<QB")
KINDS: Final = tuple(EntryKind)
REMEDY: Final = "restore this node from the other members"
_PURGE_STEP: Final = 256  # entries per transaction of their own; a write waits that long at most
_PURGE_PER_ENTRY: Final = 3  # old entries that go with every new one: the log cannot outgrow it


class _Extent(NamedTuple):
    """How far the log reaches and which term each part of it has.

    Swapped as a whole at the end of a save, so the loop thread never sees half of one. Term
    `terms[n]` begins at index `starts[n]`; the first pair is the position before the first entry.
    """

    last_index: int
    starts: tuple[int, ...]
    terms: tuple[int, ...]

    def term(self, index: int) -> int:
        return self.terms[bisect_right(self.starts, index) - 1]

    def purge(self, index: int) -> _Extent:
        """The same without everything up to `index`."""
        count = bisect_right(self.starts, index) - 1
        return _Extent(self.last_index, (index, *self.starts[count + 1 :]), self.terms[count:])

    def cut(self, last_index: int) -> _Extent:
        """The same without everything after `last_index`."""
        count = bisect_right(self.starts, last_index)
        return _Extent(last_index, self.starts[:count], self.terms[:count])

    def extend(self, index: int, term: int) -> _Extent:
        if term == self.terms[-1]:
            return _Extent(index, self.starts, self.terms)
        return _Extent(index, (*self.starts, index), (*self.terms, term))


class LogStore:
    """Opens or creates the log in directory `path` and verifies all of it.

    One thread may call `save`, `purge_step` and `reset` while another reads; reads never wait for a
    write and see only what is durable.

    Attributes:
        purge_to: entries up to here may go. Set by the reader, who never reads at or below it
            again; the writer deletes them little by little.

    Raises:
        DataCorruption: damaged; `details` holds `file` and, for an entry, `index`.
        StorageIO: the disk refused.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path / DATA_FILE
        self._failed = False
        self._hard_state = HardState()
        self._configs: list[tuple[int, Membership]] = []  # ascending; the first may be the base
        self._extent = _Extent(0, (0,), (0,))
        self.purge_to = 0
        self._environment = open_environment(path, durable=True, remedy=REMEDY)
        try:
            self._verify()
        except lmdb.Error as error:
            self._environment.close()
            raise storage_error(error, path, REMEDY) from error
        except OSError as error:
            self._environment.close()
            raise StorageIO(f"cannot open {path}: {error.strerror}") from error
        except BaseException:
            self._environment.close()
            raise

    def load(self) -> tuple[HardState, list[tuple[int, Membership]]]:
        """The hard state, and index and content of the memberships, oldest first: that in force
        where the log begins, if a prefix is gone, and every CONFIG entry.
        """
        return self._hard_state, list(self._configs)

    def first_index(self) -> int:
        """Index of the oldest entry kept."""
        return self._extent.starts[0] + 1

    def last_index(self) -> int:
        """Index of the newest durable entry; `first_index() - 1` when there is none."""
        return self._extent.last_index

    def term(self, index: int) -> int:
        """Term of the entry at `index`, from memory; also at `first_index() - 1`.

        Raises:
            InvariantBroken: there is no such entry.
        """
        extent = self._extent
        if not extent.starts[0] <= index <= extent.last_index:
            raise self._outside(index)
        return extent.term(index)

    def entries(self, low: int, high: int, max_bytes: int) -> Sequence[Entry]:
        """Entries with `low <= index < high`, cut after `max_bytes` of data but never empty.

        Raises:
            DataCorruption: an entry is damaged or missing.
            InvariantBroken: there is no entry `low`.
        """
        high = min(high, self._extent.last_index + 1)
        if low >= high or low < self.first_index():
            raise self._outside(low)
        found: list[Entry] = []
        size = 0
        try:
            with self._environment.begin() as txn:
                for index in range(low, high):
                    key = ENTRY_KEY.pack(b"e", index)
                    raw = txn.get(key)
                    if raw is None:
                        raise self._damaged_entry(index, "is missing")
                    term, kind = self._check(index, key, raw)
                    data = raw[ENTRY.size : -CRC_BYTES]
                    size += len(data)
                    if size > max_bytes and found:
                        break
                    found.append(Entry(index, term, kind, data))
        except lmdb.Error as error:
            raise storage_error(error, self._path, REMEDY) from error
        return found

    def save(self, hard_state: HardState | None, entries: Sequence[Entry]) -> None:
        """Make both durable in one transaction; on return they are.

        Args:
            hard_state: None keeps the old one.
            entries: contiguous; they replace everything from `entries[0].index` on.

        Raises:
            StorageIO: the disk refused; nothing was acknowledged and no later save is tried,
                since the kernel may have dropped what it could not write.
            DataCorruption: the log has rotted where they are to go; nothing was written.
            InvariantBroken: the entries would leave a gap.
        """
        if hard_state is None and not entries:
            return
        hard_state = hard_state or self._hard_state
        extent = self._extent
        configs = [
            (entry.index, self._membership(entry.index, entry.data))
            for entry in entries
            if entry.kind is EntryKind.CONFIG
        ]
        kept = [c for c in self._configs if not entries or c[0] < entries[0].index]
        with self._writing() as txn:
            if entries:
                extent = self._put_entries(txn, extent, entries)
                extent = self._purge(txn, extent, kept, _PURGE_PER_ENTRY * len(entries))
            self._put_head(txn, hard_state, extent)
        self._configs = _after(kept, extent.starts[0]) + configs
        self._hard_state, self._extent = hard_state, extent

    @property
    def purge_pending(self) -> bool:
        """Are there entries that `purge_step` would delete?"""
        return self._extent.starts[0] < self.purge_to

    def purge_step(self) -> None:
        """Delete a few of the entries up to `purge_to`, durably. Raises as `save`."""
        with self._writing() as txn:
            extent = self._purge(txn, self._extent, self._configs, _PURGE_STEP)
            self._put_head(txn, self._hard_state, extent)
        self._configs = _after(self._configs, extent.starts[0])
        self._extent = extent

    def reset(self, hard_state: HardState, base: LogId, membership: Membership) -> None:
        """Forget every entry, durably and in one transaction: the log goes on after `base`.

        Args:
            hard_state: the new one.
            base: the last entry that an installed snapshot includes.
            membership: in force there.

        Raises:
            StorageIO: as `save`.
        """
        extent = _Extent(base.index, (base.index,), (base.term,))
        with self._writing() as txn:
            txn.drop(self._environment.open_db(txn=txn), delete=False)
            self._put_base(txn, base.index, membership)
            self._put_head(txn, hard_state, extent)
        self._configs = [(base.index, membership)]
        self._hard_state, self._extent = hard_state, extent
        self.purge_to = 0

    def close(self) -> None:
        """Release the environment. Everything saved is durable already."""
        self._environment.close()

    @contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction[bytes]]:
        """One durable transaction. After one that failed no other is tried: the kernel may have
        dropped what it could not write, and a second fsync would not say so.
        """
        if self._failed:
            raise StorageIO(f"{self._file}: an earlier write failed; restart this node")
        try:
            with self._environment.begin(write=True) as txn:
                yield txn
        except lmdb.Error as error:
            self._failed = True
            raise storage_error(error, self._path, REMEDY) from error

    def _purge(
        self,
        txn: lmdb.Transaction[bytes],
        extent: _Extent,
        configs: Sequence[tuple[int, Membership]],
        limit: int,
    ) -> _Extent:
        """Delete up to `limit` of the entries that `purge_to` lets go; what is left of `extent`."""
        first = extent.starts[0]
        last = min(self.purge_to, extent.last_index, first + limit)
        if last <= first:
            return extent
        cursor = txn.cursor()
        if not cursor.set_key(ENTRY_KEY.pack(b"e", first + 1)):
            raise self._damaged_entry(first + 1, "is missing")
        for _ in range(last - first):
            cursor.delete()  # the cursor is on the next one then
        index, membership = [(0, Membership()), *(c for c in configs if c[0] <= last)][-1]
        if index > first or not first:
            self._put_base(txn, index, membership)
        return extent.purge(last)

    def _put_base(self, txn: lmdb.Transaction[bytes], index: int, membership: Membership) -> None:
        record = _BASE.pack(index) + membership.encode()
        txn.put(_BASE_KEY, record + pack_crc(crc32(record, crc32(_BASE_KEY))))

    def _put_entries(
        self, txn: lmdb.Transaction[bytes], extent: _Extent, entries: Sequence[Entry]
    ) -> _Extent:
        first = entries[0].index
        if not extent.starts[0] < first <= extent.last_index + 1:
            raise self._outside(first)
        for index in range(first, extent.last_index + 1):
            if not txn.delete(ENTRY_KEY.pack(b"e", index)):
                raise self._damaged_entry(index, "is missing")
        extent = extent.cut(first - 1)
        for entry in entries:
            if entry.index != extent.last_index + 1 or entry.term < extent.terms[-1]:
                raise InvariantBroken(
                    f"entry {entry.log_id} cannot follow "
                    f"{LogId(extent.last_index, extent.terms[-1])}"
                )
            if len(entry.data) > RECORD_BYTES_MAX // 2:
                raise InvariantBroken(f"entry {entry.log_id} has {len(entry.data)} bytes")
            key = ENTRY_KEY.pack(b"e", entry.index)
            head = ENTRY.pack(entry.term, entry.kind)
            crc = crc32(entry.data, crc32(head, crc32(key)))
            if not txn.put(key, b"".join((head, entry.data, pack_crc(crc))), append=True):
                # LMDB holds a later key than any that was put: one has rotted, or a page has.
                raise self._damaged_entry(entry.index, "cannot come last: a later one is there")
            extent = extent.extend(entry.index, entry.term)
        return extent

    def _put_head(
        self, txn: lmdb.Transaction[bytes], hard_state: HardState, extent: _Extent
    ) -> None:
        voted_for = hard_state.voted_for
        head = HEAD.pack(
            _HEAD_FORMAT,
            txn.id(),
            extent.starts[0],
            extent.terms[0],
            extent.last_index,
            extent.terms[-1],
            hard_state.term,
            voted_for is not None,
            *(voted_for or (0, 0)),
            hard_state.commit_index,
        )
        txn.put(HEAD_KEY, head + pack_crc(crc32(head, crc32(HEAD_KEY))))

    def _verify(self) -> None:
        """Read every record once. A new log gets its head, so that none ever lacks one."""
        with padded(self._path), self._environment.begin(buffers=True) as txn:
            raw = txn.get(HEAD_KEY)
            is_new = raw is None
            if raw is not None:
                self._read_entries(txn, self._read_head(raw))
            elif txn.stat()["entries"]:
                raise self._damaged("its head is missing")
        if is_new:
            with self._environment.begin(write=True) as txn:
                self._put_head(txn, self._hard_state, self._extent)

    def _read_head(self, raw: memoryview) -> LogId:
        if len(raw) != HEAD.size + CRC_BYTES or crc32(raw, crc32(HEAD_KEY)) != CRC_RESIDUE:
            raise self._damaged("its head fails its CRC")
        (
            version,
            transaction,
            purged_index,
            purged_term,
            last_index,
            last_term,
            term,
            voted,
            voted_id,
            voted_incarnation,
            commit_index,
        ) = HEAD.unpack_from(raw)
        if version != _HEAD_FORMAT:
            raise IdentityError(
                f"{self._file} has format {version}, this dengine reads format {_HEAD_FORMAT}: "
                "start the version that wrote it"
            )
        if transaction != self._environment.info()["last_txnid"]:
            raise self._damaged("its head is not that of the newest transaction")
        voted_for = MemberId(voted_id, voted_incarnation) if voted else None
        self._hard_state = HardState(term, voted_for, commit_index)
        self._extent = _Extent(purged_index, (purged_index,), (purged_term,))
        return LogId(last_index, last_term)

    def _read_entries(self, txn: lmdb.Transaction[memoryview], last: LogId) -> None:
        """One look-up for each entry: a cursor that walks into a damaged page can end the process
        (an assertion of LMDB), where a look-up reports it.
        """
        extent = self._extent
        records = 1 + last.index - extent.last_index
        if extent.starts[0]:
            self._read_base(txn, extent.starts[0])
            records += 1
        for index in range(extent.last_index + 1, last.index + 1):
            key = ENTRY_KEY.pack(b"e", index)
            raw = txn.get(key)
            if raw is None:
                raise self._damaged_entry(index, "is missing")
            term, kind = self._check(index, key, raw)
            if term < extent.terms[-1]:
                raise self._damaged_entry(index, "has a lower term than the one before it")
            extent = extent.extend(index, term)
            if kind is EntryKind.CONFIG:
                data = bytes(raw[ENTRY.size : -CRC_BYTES])
                self._configs.append((index, self._membership(index, data)))
        if extent.terms[-1] != last.term:
            raise self._damaged_entry(last.index, f"has not the term {last.term} of the head")
        if (found := txn.stat()["entries"]) != records:
            raise self._damaged(f"it holds {found} records and not {records}")
        self._extent = extent

    def _read_base(self, txn: lmdb.Transaction[memoryview], purged_index: int) -> None:
        raw = txn.get(_BASE_KEY)
        if raw is None:
            raise self._damaged("the membership at its beginning is missing")
        if not _BASE.size <= len(raw) <= RECORD_BYTES_MAX or (
            crc32(raw, crc32(_BASE_KEY)) != CRC_RESIDUE
        ):
            raise self._damaged("the membership at its beginning fails its CRC")
        index = _BASE.unpack_from(raw)[0]
        membership = self._membership(index, bytes(raw[_BASE.size : -CRC_BYTES]))
        if index > purged_index:
            raise self._damaged("the membership at its beginning is from a later entry")
        self._configs.append((index, membership))

    def _check(
        self, index: int, key: bytes | memoryview, raw: bytes | memoryview
    ) -> tuple[int, EntryKind]:
        """Term and kind of a sound record; the length comes first, see `padded`."""
        if not ENTRY.size + CRC_BYTES <= len(raw) <= RECORD_BYTES_MAX:
            raise self._damaged_entry(index, f"has {len(raw)} bytes")
        if crc32(raw, crc32(key)) != CRC_RESIDUE:
            raise self._damaged_entry(index, "fails its CRC")
        term, kind = ENTRY.unpack_from(raw)
        if kind >= len(KINDS):
            raise self._damaged_entry(index, f"is of the unknown kind {kind}")
        return term, KINDS[kind]

    def _membership(self, index: int, data: bytes) -> Membership:
        try:
            return decode_membership(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InvariantBroken(
                f"{self._file}: entry {index} holds a membership that this dengine cannot "
                f"read ({error}); start the version that wrote it"
            ) from error

    def _outside(self, index: int) -> InvariantBroken:
        extent = self._extent
        return InvariantBroken(
            f"entry {index} is outside the log, which has "
            f"{extent.starts[0] + 1} to {extent.last_index}"
        )

    def _damaged_entry(self, index: int, what: str) -> DataCorruption:
        error = self._damaged(f"entry {index} {what}")
        error.details["index"] = index
        return error

    def _damaged(self, what: str) -> DataCorruption:
        return damaged(self._file, what, REMEDY)


def _after(
    configs: Sequence[tuple[int, Membership]], purged_index: int
) -> list[tuple[int, Membership]]:
    """Those after `purged_index`, and before them the one that was in force there."""
    older = [c for c in configs if c[0] <= purged_index]
    return older[-1:] + [c for c in configs if c[0] > purged_index]
