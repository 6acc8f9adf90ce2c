"""Opening LMDB environments, and what their errors mean.

Every environment has a 1 TiB map and is never resized: a resize closes live readers. Writes do not
go through the map (no writemap): on a full disk that would end in SIGBUS instead of an error.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

import lmdb

from dengine.errors import DataCorruption, FatalError, StorageIO

MAP_BYTES: Final = 1 << 40
DATA_FILE: Final = "data.mdb"

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


def open_environment(path: Path, *, durable: bool, databases: int = 0) -> lmdb.Environment:
    """Open or create the environment in the directory `path`.

    Args:
        path: made with mode 0700 when missing; its files get 0600.
        durable: every commit reaches the disk before it returns.
        databases: how many named databases there may be.

    Raises:
        DataCorruption: what is there is no LMDB environment, or its meta pages contradict.
        StorageIO: the disk or the system refused.
    """
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        _check_meta_pages(path)
        environment = lmdb.open(
            str(path),
            map_size=MAP_BYTES,
            mode=0o700,  # lmdb takes the execute bits away for the files
            sync=durable,
            max_dbs=databases,
            max_spare_txns=1,
        )
        try:
            _cover_all_pages(path, environment)
            # Always, not only when it was made just now: whoever made it may have died before.
            sync_directory(path)
            sync_directory(path.parent)
        except BaseException:
            environment.close()
            raise
    except lmdb.Error as error:
        raise storage_error(error, path) from error
    except OSError as error:
        raise StorageIO(f"cannot open {path}: {error.strerror}") from error
    return environment


def storage_error(error: lmdb.Error, path: Path) -> FatalError:
    """What an error of LMDB means for this process: damaged data, or a disk that refused."""
    if isinstance(error, _DAMAGE):
        return DataCorruption(
            f"{path / DATA_FILE} is damaged: {error}; restore this node from the other members",
            file=str(path / DATA_FILE),
        )
    return StorageIO(f"{path / DATA_FILE}: {error}; check the disk, then start again")


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_meta_pages(path: Path) -> None:
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
        raise _damaged(file, "its second meta page is missing")
    version1, _, id1 = _META.unpack(second)
    newest = max(id0, id1)
    expected = (newest, newest - 1) if newest % 2 == 0 else (newest - 1, newest)
    if version0 == version1 == 1 and newest and (id0, id1) != expected:
        raise _damaged(file, f"its meta pages contradict each other ({id0} and {id1})")


def _cover_all_pages(path: Path, environment: lmdb.Environment) -> None:
    """Let the file reach to its last page, so that a cut-off tail reads as zeros, not as SIGBUS.

    Zeros are no valid page and no valid record, so they are found. A sound file may also be a
    little short: LMDB does not write pages that were allocated and freed in one transaction.
    """
    file = path / DATA_FILE
    wanted = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if wanted > MAP_BYTES:
        raise _damaged(file, "its meta page names a last page beyond the map")
    if file.stat().st_size < wanted:
        os.truncate(file, wanted)


def _damaged(file: Path, what: str) -> DataCorruption:
    return DataCorruption(
        f"{file} is damaged: {what}; restore this node from the other members", file=str(file)
    )
