"""The `.dsnap` format: one file that holds a state and describes itself.

    magic, format, length and CRC of the header         _PREFIX
    header                                              msgpack of `SnapshotHeader`
    chunk, ...                                          length, CRC-32, data: an LMDB file in pieces
    end                                                 a length of 0, then sizes: _END
    SHA-256 of everything before it                     names the file

A reader trusts nothing it has not checked: each chunk by its CRC, so that a transfer is caught at
the first bad piece, and the whole by its SHA-256.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import msgspec

from dengine.errors import DataCorruption, StorageIO
from dengine.raft.membership import Membership
from dengine.raft.types import LogId, SnapshotRef
from dengine.storage.environment import sync_directory
from dengine.storage.snapshot_frames import (
    PACED_SYNC_BYTES,
    PARTIAL_SUFFIX,
    SyncedSteps,
    damaged_snapshot,
    disk,
    lock_partial,
    name_new,
    pack_chunk,
    pack_end,
    pack_header,
    read_header_bytes,
    reading,
    scan,
    sync_file,
)

SUFFIX: Final = ".dsnap"
DAMAGED_SUFFIX: Final = ".damaged"  # was complete once; kept for a person until the next one

_NAME: Final = re.compile(r"snapshot-(\d{1,20})-(\d{1,20})\.dsnap")


class SnapshotHeader(msgspec.Struct, frozen=True):
    """What a snapshot says of itself; all of it from one read transaction."""

    cluster_id: str
    node_id: int  # who wrote it
    index: int  # last included entry
    term: int
    revision: int
    state_hash: bytes  # 16 bytes, see state_store
    membership: Membership
    records: int  # in all databases
    taken_at_s: int  # Unix time, for people only

    @property
    def log_id(self) -> LogId:
        return LogId(self.index, self.term)


class SnapshotInfo(NamedTuple):
    """A verified file."""

    path: Path
    header: SnapshotHeader
    sha256: str
    size_bytes: int
    data_bytes: int  # of the LMDB file inside

    @property
    def ref(self) -> SnapshotRef:
        header = self.header
        return SnapshotRef(header.index, header.term, self.sha256, self.size_bytes)


def snapshot_name(log_id: LogId) -> str:
    return f"snapshot-{log_id.term}-{log_id.index}{SUFFIX}"


def parse_name(name: str) -> LogId | None:
    """Inverse of `snapshot_name`; None for any other name."""
    found = _NAME.fullmatch(name)
    return LogId(int(found[2]), int(found[1])) if found else None


class SnapshotWriter:
    """Writes one file, from the header to the durable rename.

    Args:
        path: the final name; until `finish` the data is in `path` + PARTIAL_SUFFIX.
        header: what the file says of itself.
        chunk_bytes: of data per chunk.
        replace: may there be a file of that name already?

    Raises (here and in every method):
        StorageIO: the disk refused; the partial file is gone.
        Conflict: another process writes a file of that name, or has done so.
    """

    def __init__(
        self, path: Path, header: SnapshotHeader, chunk_bytes: int, *, replace: bool = True
    ) -> None:
        self._path = path
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        self._header = header
        self._chunk_bytes = chunk_bytes
        self._replace = replace
        self._pending = bytearray()
        self._sha = hashlib.sha256()
        self._chunks = self._data_bytes = 0
        encoded = msgspec.msgpack.encode(header)
        with disk(self._partial):
            self._stream: BinaryIO = os.fdopen(_open_new(self._partial), "wb")
            lock_partial(self._partial, self._stream.fileno())
        self._steps = SyncedSteps(self._stream, PACED_SYNC_BYTES)
        self._put(pack_header(encoded))

    @property
    def data_bytes(self) -> int:
        """Data written so far."""
        return self._data_bytes + len(self._pending)

    def write(self, data: bytes) -> None:
        """The next piece of the state, of any length."""
        self._pending += data
        while len(self._pending) >= self._chunk_bytes:
            self._put_chunk(bytes(self._pending[: self._chunk_bytes]))
            del self._pending[: self._chunk_bytes]

    def finish(self, progress: Callable[[int], None] | None = None) -> SnapshotInfo:
        """Make the file durable under its final name, after reading it back.

        Args:
            progress: told how many bytes have been read back.
        """
        if self._pending:
            self._put_chunk(bytes(self._pending))
        self._put(pack_end(self._chunks, self._data_bytes))
        with disk(self._partial):
            self._stream.write(self._sha.digest())
            sync_file(self._stream)
            self._stream.close()
        try:
            sha256 = self._sha.hexdigest()
            return publish(self._partial, self._path, sha256, progress, replace=self._replace)
        except DataCorruption as error:
            raise StorageIO(f"the disk did not keep what was written: {error.message}") from error

    def abandon(self) -> None:
        """Remove the partial file, as far as the disk still does what it is told."""
        with suppress(OSError):
            self._stream.close()  # tries once more to write what it could not
        with suppress(OSError):
            self._partial.unlink(missing_ok=True)

    def _put_chunk(self, data: bytes) -> None:
        self._chunks += 1
        self._data_bytes += len(data)
        self._put(pack_chunk(data))
        with disk(self._partial):
            self._steps.wrote(len(data))

    def _put(self, data: bytes) -> None:
        self._sha.update(data)
        with disk(self._partial):
            self._stream.write(data)


def _open_new(partial: Path) -> int:
    """A file that nobody else can read or has prepared, for what is left of an earlier attempt may
    have another mode, or be a link to another place.

    Raises:
        Conflict: another process still writes what is there.
        OSError: the disk refused.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        return os.open(partial, flags, 0o600)
    except FileExistsError:
        if partial.is_file() and not partial.is_symlink():
            with suppress(OSError), open(partial, "rb") as left:
                lock_partial(partial, left.fileno())
        partial.unlink(missing_ok=True)
        return os.open(partial, flags, 0o600)


def publish(
    partial: Path,
    path: Path,
    sha256: str,
    progress: Callable[[int], None] | None = None,
    *,
    replace: bool = True,
) -> SnapshotInfo:
    """Verify the synced file `partial` and give it its final name, durably.

    Args:
        sha256: of the file that it must be.
        progress: told how many bytes have been read.
        replace: may there be a file of that name already?

    Raises:
        Conflict: there is one, and it stays.
        DataCorruption: it is damaged; it was removed.
        StorageIO: the disk refused.
    """
    try:
        info = verify(partial, progress=progress)
        if info.sha256 != sha256:
            raise damaged_snapshot(partial, "it is sound, but not the file it should be")
    except DataCorruption:
        partial.unlink(missing_ok=True)
        raise
    return info._replace(path=name_durably(info.path, path.name, replace=replace))


def name_durably(file: Path, name: str, *, replace: bool = True) -> Path:
    """Give a file that is synced and was verified its final name.

    Raises:
        Conflict: there is such a file, and it is not to be replaced.
        StorageIO: the disk refused.
    """
    path = file.with_name(name)
    with disk(path):
        if replace:
            os.replace(file, path)
        else:
            name_new(file, path)
        try:
            sync_directory(path.parent)
        except OSError:  # it may be gone after a power loss, so nobody must rely on it
            path.unlink(missing_ok=True)
            raise
    return path


def read_header(path: Path) -> SnapshotHeader:
    """The header alone, which proves nothing about the rest.

    Raises:
        DataCorruption: this is no snapshot, or one of a newer format; or the disk cannot give it
            back.
        StorageIO: it cannot be opened.
    """
    with reading(path), open(path, "rb") as stream:
        return _decoded(path, read_header_bytes(path, stream, hashlib.sha256()))


def verify(
    path: Path,
    sink: Callable[[bytes], object] | None = None,
    progress: Callable[[int], None] | None = None,
) -> SnapshotInfo:
    """Read all of a file and check every part of it.

    Args:
        sink: takes the state's bytes, in order, as they are found sound; raises no OSError.
        progress: told how many bytes of the file have been read.

    Raises:
        DataCorruption: damaged, cut off, of a newer format, or no snapshot at all; or the disk
            cannot give it back.
        StorageIO: it cannot be opened.
    """
    frames = scan(path, sink, progress)
    header = _decoded(path, frames.header)
    return SnapshotInfo(path, header, frames.sha256, frames.size_bytes, frames.data_bytes)


def _decoded(path: Path, encoded: bytes) -> SnapshotHeader:
    try:
        return msgspec.msgpack.decode(encoded, type=SnapshotHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise damaged_snapshot(path, f"its header cannot be read ({error})") from error
