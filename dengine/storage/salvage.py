"""What can still be read of a log that is damaged, for `dengine repair`.

Nothing here votes or serves: it reads records one by one and stops at the first that is not what
was written. It works on a copy, for the damaged file is evidence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import lmdb
from zlib_ng.zlib_ng import crc32

from dengine.errors import DataCorruption
from dengine.raft.types import Entry, LogId
from dengine.storage.environment import (
    CRC_BYTES,
    CRC_RESIDUE,
    DATA_FILE,
    MAP_BYTES,
    RECORD_BYTES_MAX,
)
from dengine.storage.log_store import ENTRY, ENTRY_KEY, HEAD, HEAD_KEY, KINDS, LogStore
from dengine.storage.probe import probe_log

_BATCH = 256  # entries per transaction


class SalvagedLog:
    """The log in directory `path`, as far as it can be read. `path` itself may be changed.

    Args:
        distrusted: what a node found to be wrong with it, if it did.

    Attributes:
        damage: why a node cannot use it; None when it is sound.
        base: the last entry before those it holds; None when that cannot be told.
        last_index: of the newest entry it claims to hold; None when that cannot be told.
    """

    def __init__(self, path: Path, distrusted: str | None = None) -> None:
        self.damage: str | None = distrusted
        self.base: LogId | None = None
        self.last_index: int | None = None
        self._environment: lmdb.Environment | None = None
        if not (path / DATA_FILE).exists():
            self.damage = "the log is missing"
            return
        try:
            probe_log(path)
            store = LogStore(path)
        except DataCorruption as error:
            self.damage = error.message
        else:
            base = store.first_index() - 1
            self.base, self.last_index = LogId(base, store.term(base)), store.last_index()
            store.close()
        if self.damage is not None:
            self.damage = self.damage.split(" is damaged: ", 1)[-1].split("; ")[0]
        self._open(path)

    def close(self) -> None:
        if self._environment is not None:
            self._environment.close()

    def after(self, base: LogId) -> Iterator[Entry]:
        """The sound entries that follow `base` without a gap, the applied end of a state."""
        known = self._entry(base.index) if base.index else None
        if known is not None and known.term != base.term:
            return  # another history
        if self.base is not None and self.base.index == base.index and self.base != base:
            return
        index, term = base.index, base.term
        while batch := self._read(index + 1, _BATCH):
            for entry in batch:
                if entry.term < term:
                    return
                yield entry
                index, term = entry.index, entry.term

    def lacks(self, log_id: LogId) -> bool:
        """Is this log sound, and yet without an entry that was applied from it?"""
        if self.damage is not None or self.base is None or self.last_index is None:
            return False
        if log_id.index == self.base.index:
            return log_id != self.base
        if self.base.index < log_id.index <= self.last_index:
            entry = self._entry(log_id.index)
            return entry is not None and entry.term != log_id.term
        return log_id.index > self.last_index

    def _entry(self, index: int) -> Entry | None:
        return next(iter(self._read(index, 1)), None)

    def _read(self, first: int, count: int) -> list[Entry]:
        """Up to `count` contiguous sound entries from index `first` on."""
        found: list[Entry] = []
        if self._environment is None:
            return found
        last = first + count - 1
        if self.last_index is not None:
            last = min(last, self.last_index)
        try:
            with self._environment.begin() as txn:
                for index in range(first, last + 1):
                    key = ENTRY_KEY.pack(b"e", index)
                    entry = _decoded(index, key, txn.get(key))
                    if entry is None:
                        break
                    found.append(entry)
        except lmdb.Error:
            pass  # the tree leads nowhere: what was read is all there is
        return found

    def _open(self, path: Path) -> None:
        file = path / DATA_FILE
        try:
            # Room for a record that a damaged length makes too long; see `padded`.
            os.truncate(file, file.stat().st_size + RECORD_BYTES_MAX)
            environment = lmdb.open(str(path), map_size=MAP_BYTES, readonly=True, lock=False)
            wanted = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if wanted > MAP_BYTES:
                environment.close()
                return
            os.truncate(file, max(file.stat().st_size, wanted + RECORD_BYTES_MAX))
            self._environment = environment
            if self.last_index is None:
                self._read_ends(environment)
        except (lmdb.Error, OSError):
            pass

    def _read_ends(self, environment: lmdb.Environment) -> None:
        with environment.begin() as txn:
            raw = txn.get(HEAD_KEY)
            if (
                raw is not None
                and len(raw) == HEAD.size + CRC_BYTES
                and crc32(raw, crc32(HEAD_KEY)) == CRC_RESIDUE
            ):
                fields = HEAD.unpack_from(raw)
                self.base, self.last_index = LogId(fields[2], fields[3]), fields[4]
                return
        with environment.begin() as txn, txn.cursor() as cursor:
            if cursor.last() and len(cursor.key()) == ENTRY_KEY.size:
                tag, index = ENTRY_KEY.unpack(cursor.key())
                if tag == b"e":
                    self.last_index = index


def _decoded(index: int, key: bytes, raw: bytes | None) -> Entry | None:
    """The entry in a sound record; None for anything else."""
    if raw is None or not ENTRY.size + CRC_BYTES <= len(raw) <= RECORD_BYTES_MAX:
        return None
    if crc32(raw, crc32(key)) != CRC_RESIDUE:
        return None
    term, kind = ENTRY.unpack_from(raw)
    if kind >= len(KINDS):
        return None
    return Entry(index, term, KINDS[kind], raw[ENTRY.size : -CRC_BYTES])
