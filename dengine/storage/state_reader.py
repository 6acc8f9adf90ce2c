"""A state as another process reads it: one transaction, from which all of a snapshot comes.

The node goes on writing meanwhile. LMDB keeps the pages of this transaction for as long as it
lives, so the data file grows; whoever opens one must be bounded in time.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

import lmdb
import msgspec
from zlib_ng.zlib_ng import crc32

from dengine.errors import DataCorruption, StorageIO
from dengine.raft.membership import Membership, decode_membership
from dengine.raft.types import LogId
from dengine.storage.environment import (
    CRC_RESIDUE,
    DATA_FILE,
    MAP_BYTES,
    damaged,
    padded,
    storage_error,
)
from dengine.storage.state_records import (
    APPLIED_KEY,
    DATABASES,
    DATABASES_MAX,
    MEMBERSHIP_KEY,
    REQUIRED,
    StateDigest,
    read_applied,
    record_hash,
    sum_bytes,
)

PIPE_BYTES: Final = 1024 * 1024
_OWN_PAGES: Final = 3  # two meta pages, and the list of databases
PROGRESS_BYTES: Final = 256 * 1024  # of records
_REMEDY: Final = "the node throws this state away and rebuilds it"


class StateReader:
    """Opens the state in directory `path`, read-only, and takes one snapshot of it.

    Attributes:
        applied, digest, membership: of the moment it was opened.
        records: in all databases.
        data_bytes: of the file that `copy` makes. The one that is read may be much larger: most of
            it is free for use again where much was written while somebody read.

    Raises:
        DataCorruption: its own description is damaged.
        StorageIO: the system refused.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._environment = lmdb.open(
                str(path),
                map_size=MAP_BYTES,
                mode=0o700,  # of the lock file, which this may be the first to make
                max_dbs=DATABASES_MAX,
                readonly=True,
            )
        except lmdb.Error as error:
            raise storage_error(error, path, _REMEDY) from error
        try:
            self._databases = dict(self._open_databases())
            self._txn = self._environment.begin()
            self._describe()
        except lmdb.Error as error:
            self._environment.close()
            raise storage_error(error, path, _REMEDY) from error
        except BaseException:
            self._environment.close()
            raise

    def __enter__(self) -> StateReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._txn.abort()
        self._environment.close()

    def check(self, progress: Callable[[int], None] | None = None) -> None:
        """Read every record, and recompute the state hash from them.

        Args:
            progress: told now and then how many bytes of records have been read.

        Raises:
            DataCorruption: a record fails its CRC, or together they are not what was applied.
        """
        total = read = told = 0
        try:
            for name, database in self._databases.items():
                number = DATABASES[name]
                with self._txn.cursor(db=database) as cursor:
                    for key, raw in cursor:
                        if crc32(raw, crc32(key)) != CRC_RESIDUE:
                            raise self._damaged(f"the record of {key!r} fails its CRC")
                        read += len(raw)
                        if read - told >= PROGRESS_BYTES and progress is not None:
                            progress(read)
                            told = read
                        if key != APPLIED_KEY or name != b"meta":
                            total += record_hash(number, key, raw)
        except lmdb.Error as error:
            raise storage_error(error, self._path, _REMEDY) from error
        if sum_bytes(total) != self.digest.state_hash:
            raise self._damaged(
                f"its records do not add up to the state hash of entry {self.applied.index}"
            )

    def copy(self, write: Callable[[bytes], object]) -> None:
        """The state as a compacted LMDB file, in pieces. Raises StorageIO, and what `write` does.

        LMDB writes into a pipe from a thread of its own, so a slow `write` slows it down.
        """
        source, target = os.pipe()
        with suppress(OSError):  # more than the system allows: then more often less
            fcntl.fcntl(target, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        failure: list[lmdb.Error] = []

        def fill() -> None:
            try:
                self._environment.copyfd(target, compact=True, txn=self._txn)
            except lmdb.Error as error:
                failure.append(error)
            finally:
                os.close(target)

        thread = threading.Thread(target=fill, name="lmdb copy", daemon=True)
        thread.start()
        try:
            while data := os.read(source, PIPE_BYTES):
                write(data)
        finally:
            os.close(source)  # ends the copy with EPIPE if `write` failed
            thread.join()
        if failure:
            raise storage_error(failure[0], self._path, _REMEDY) from failure[0]

    def _open_databases(self) -> Iterator[tuple[bytes, lmdb._Database]]:
        """By name; a state of an older release has not all of them."""
        for name in DATABASES:
            try:
                yield name, self._environment.open_db(name, create=False)
            except lmdb.NotFoundError:
                if name in REQUIRED:
                    raise

    def _describe(self) -> None:
        raw = self._txn.get(APPLIED_KEY, db=self._databases[b"meta"])
        found = read_applied(raw) if raw is not None else None
        if found is None:
            raise self._damaged("it does not say what it has applied")
        self.applied: LogId = found[0]
        self.digest: StateDigest = found[1]
        raw = self._txn.get(MEMBERSHIP_KEY, db=self._databases[b"meta"])
        if raw is None or crc32(raw, crc32(MEMBERSHIP_KEY)) != CRC_RESIDUE:
            raise self._damaged("its membership is missing or fails its CRC")
        try:
            self.membership: Membership = decode_membership(raw[:-4])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self._damaged(f"its membership cannot be read ({error})") from error
        stats = [self._txn.stat(database) for database in self._databases.values()]
        self.records = sum(stat["entries"] for stat in stats)
        used = sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats)
        self.data_bytes = (used + _OWN_PAGES) * stats[0]["psize"]

    def _damaged(self, what: str) -> DataCorruption:
        return damaged(self._path / DATA_FILE, what, _REMEDY)


def check_state(path: Path, progress: Callable[[int], None] | None = None) -> StateReader:
    """Check all of the unused state in directory `path`; what it says of itself is returned.

    Raises:
        DataCorruption, StorageIO: as `StateReader` and `StateReader.check`.
    """
    try:
        with padded(path), StateReader(path) as reader:
            reader.check(progress)
    except OSError as error:
        raise StorageIO(f"{path}: {error.strerror or error}") from error
    return reader
