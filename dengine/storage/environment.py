"""Opening LMDB environments, and what their errors mean.

Every environment has a 1 TiB map and is never resized: a resize closes live readers. Writes do not
go through the map (no writemap): on a full disk that would end in SIGBUS instead of an error.
"""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import lmdb

from dengine.errors import DataCorruption, FatalError, StorageIO

MAP_BYTES: Final = 1 << 40
DATA_FILE: Final = "data.mdb"
# How LMDB ends a process that reads a damaged page: an assertion, or an address that is none.
LMDB_SIGNALS: Final = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
FULL_BYTES: Final = 1024 * 1024  # a disk with less that is free is called full
RECORD_BYTES_MAX: Final = 64 * 1024 * 1024  # far above the largest entry that travels

# A record ends with the CRC-32 of its key and everything before it. Running the CRC over data AND
# that trailer leaves this constant, whatever the data: one call checks a record without slicing.
CRC_RESIDUE: Final = 0x2144DF1C
CRC_BYTES: Final = 4
pack_crc = struct.Struct("<I").pack

_DAMAGE = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.IncompatibleError,
    lmdb.BadDbiError,
    lmdb.BadValsizeError,
    lmdb.CursorFullError,
    lmdb.PageFullError,
)

# Start of a meta page of format 1 (LMDB 0.9): page header, magic, version, address, map size,
# page size and the rest of the first tree, second tree, last page, transaction id.
_META: Final = struct.Struct("<16x 4x I 8x 8x I 44x 48x 8x Q")


def open_environment(
    path: Path, *, durable: bool, remedy: str, databases: int = 0
) -> lmdb.Environment:
    """Open or create the environment in the directory `path`.

    Args:
        path: made with mode 0700 when missing; its files get 0600.
        durable: every commit reaches the disk before it returns.
        remedy: what to do when it is damaged, for the error message.
        databases: how many named databases there may be.

    Raises:
        DataCorruption: what is there is no LMDB environment, or its meta pages contradict.
        StorageIO: the disk or the system refused.
    """
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        _check_meta_pages(path, remedy)
        environment = lmdb.open(
            str(path),
            map_size=MAP_BYTES,
            mode=0o700,  # lmdb takes the execute bits away for the files
            sync=durable,
            max_dbs=databases,
            max_spare_txns=1,
        )
        try:
            _cover_all_pages(path, environment, remedy)
            # Always, not only when it was made just now: whoever made it may have died before.
            sync_directory(path)
            sync_directory(path.parent)
        except BaseException:
            environment.close()
            raise
    except lmdb.Error as error:
        raise storage_error(error, path, remedy) from error
    except OSError as error:
        raise StorageIO(f"cannot open {path}: {error.strerror}") from error
    return environment


def storage_error(error: lmdb.Error, path: Path, remedy: str) -> FatalError:
    """What an error of LMDB means for this process: damaged data, or a disk that refused."""
    if isinstance(error, _DAMAGE):
        return damaged(path / DATA_FILE, str(error), remedy)
    advice = "the disk is full: make room" if _is_full(path) else "check the disk"
    return StorageIO(f"{path / DATA_FILE}: {error}; {advice}, then start again")


def _is_full(path: Path) -> bool:
    """A write that the disk took only in part is an input/output error in LMDB's words."""
    with suppress(OSError):
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize < FULL_BYTES
    return False


def damaged(file: Path, what: str, remedy: str) -> DataCorruption:
    """The error for damage in `file`, which `details` name too."""
    return DataCorruption(f"{file} is damaged: {what}; {remedy}", file=str(file))


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Make a directory and what is missing above it, each of them durable. Raises OSError."""
    missing = [each for each in path.parents if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    # Its own name always: whoever made it may have died before. A vote that is durable in a
    # directory which a power cut takes away would be given twice.
    for made in (path, *missing):
        with suppress(PermissionError):  # one that we may not even read, we have not made
            sync_directory(made.parent)


@contextmanager
def padded(path: Path) -> Iterator[None]:
    """While inside, the data file goes on with zeros for `RECORD_BYTES_MAX` bytes.

    A damaged length can make LMDB hand out a record that ends behind the end of the file, where
    reading is a SIGBUS. Inside, a record of at most that size can be read, and its CRC tells.
    Nothing may be written meanwhile.
    """
    file = path / DATA_FILE
    size = file.stat().st_size
    os.truncate(file, size + RECORD_BYTES_MAX)
    try:
        yield
    finally:
        os.truncate(file, size)


def _check_meta_pages(path: Path, remedy: str) -> None:
    """Refuse an environment whose newest commit can no longer be told from the one before.

    LMDB keeps two meta pages without a checksum and believes the one with the higher transaction
    id, so one flipped bit there could silently undo the last commit, a vote for example. But the
    two ids always differ by one and an even one is on page 0.
    """
    file = path / DATA_FILE
    if not file.exists():
        return
    with open(file, "rb") as stream:
        first = stream.read(_META.size)
        if len(first) < _META.size:
            return  # empty: still to be created; anything else LMDB refuses by itself
        version0, page_size, id0 = _META.unpack(first)
        stream.seek(page_size)
        second = stream.read(_META.size)
    if len(second) < _META.size:
        raise damaged(file, "its second meta page is missing", remedy)
    version1, _, id1 = _META.unpack(second)
    newest = max(id0, id1)
    expected = (newest, newest - 1) if newest % 2 == 0 else (newest - 1, newest)
    if version0 == version1 == 1 and newest and (id0, id1) != expected:
        raise damaged(file, f"its meta pages contradict each other ({id0} and {id1})", remedy)


def _cover_all_pages(path: Path, environment: lmdb.Environment, remedy: str) -> None:
    """Let the file reach to its last page, so that a cut-off tail reads as zeros, not as SIGBUS.

    Zeros are no valid page and no valid record, so they are found. A sound file may also be a
    little short: LMDB does not write pages that were allocated and freed in one transaction.
    """
    file = path / DATA_FILE
    wanted = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if wanted > MAP_BYTES:
        raise damaged(file, "its meta page names a last page beyond the map", remedy)
    if file.stat().st_size < wanted:
        os.truncate(file, wanted)
