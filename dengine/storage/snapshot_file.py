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
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple
from zlib import crc32

import msgspec

from dengine.errors import DataCorruption, StorageIO
from dengine.raft.membership import Membership
from dengine.raft.types import LogId, SnapshotRef
from dengine.storage.environment import sync_directory

SUFFIX: Final = ".dsnap"
PARTIAL_SUFFIX: Final = ".partial"  # written or fetched, not complete
DAMAGED_SUFFIX: Final = ".damaged"  # was complete once; kept for a person until the next one
FORMAT: Final = 1
CHUNK_BYTES_MAX: Final = 4 * 1024 * 1024

SYNC_BYTES: Final = 4 * 1024 * 1024  # between two syncs of a file that is being written

_MAGIC: Final = b"DENGSNAP"
_PREFIX: Final = struct.Struct("<8sHII")
_CHUNK: Final = struct.Struct("<II")
_END: Final = struct.Struct("<IIQQ")
_HEADER_BYTES_MAX: Final = 16 * 1024 * 1024
_DIGEST_BYTES: Final = 32
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

    Raises (here and in every method):
        StorageIO: the disk refused; the partial file is gone.
    """

    def __init__(self, path: Path, header: SnapshotHeader, chunk_bytes: int) -> None:
        self._path = path
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        self._header = header
        self._chunk_bytes = chunk_bytes
        self._pending = bytearray()
        self._sha = hashlib.sha256()
        self._chunks = self._data_bytes = self._unsynced_bytes = 0
        encoded = msgspec.msgpack.encode(header)
        with _disk(self._partial):
            fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            self._stream: BinaryIO = os.fdopen(fd, "wb")
        self._put(_PREFIX.pack(_MAGIC, FORMAT, len(encoded), crc32(encoded)) + encoded)

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
        self._put(_END.pack(0, 0, self._chunks, self._data_bytes))
        with _disk(self._partial):
            self._stream.write(self._sha.digest())
            self._stream.flush()
            os.fsync(self._stream.fileno())
            # Verify what the disk holds, not what the page cache remembers.
            os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._stream.close()
        try:
            return publish(self._partial, self._path, self._sha.hexdigest(), progress)
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
        self._put(_CHUNK.pack(len(data), crc32(data)) + data)
        self._unsynced_bytes += len(data)
        if self._unsynced_bytes >= SYNC_BYTES:
            # In small steps: the log's next sync on this disk waits for what is under way.
            self._unsynced_bytes = 0
            with _disk(self._partial):
                self._stream.flush()
                os.fdatasync(self._stream.fileno())

    def _put(self, data: bytes) -> None:
        self._sha.update(data)
        with _disk(self._partial):
            self._stream.write(data)


def publish(
    partial: Path, path: Path, sha256: str, progress: Callable[[int], None] | None = None
) -> SnapshotInfo:
    """Verify the synced file `partial` and give it its final name, durably.

    Args:
        sha256: of the file that it must be.
        progress: told how many bytes have been read.

    Raises:
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
    with _disk(path):
        os.replace(partial, path)
        try:
            sync_directory(path.parent)
        except OSError:  # it may be gone after a power loss, so nobody must rely on it
            path.unlink(missing_ok=True)
            raise
    return info._replace(path=path)


def read_header(path: Path) -> SnapshotHeader:
    """The header alone, which proves nothing about the rest.

    Raises:
        DataCorruption: this is no snapshot, or one of a newer format.
        StorageIO: it cannot be read.
    """
    with _disk(path), open(path, "rb") as stream:
        return _header(path, stream, hashlib.sha256())


def read_ref(path: Path) -> SnapshotRef:
    """What a file claims to be, by its header and its last bytes; see `verify` for the truth.

    Raises: as `read_header`.
    """
    with _disk(path), open(path, "rb") as stream:
        header = _header(path, stream, hashlib.sha256())
        size = os.fstat(stream.fileno()).st_size
        stream.seek(max(0, size - _DIGEST_BYTES))
        digest = stream.read(_DIGEST_BYTES)
    return SnapshotRef(header.index, header.term, digest.hex(), size)


def verify(
    path: Path,
    sink: Callable[[bytes], object] | None = None,
    progress: Callable[[int], None] | None = None,
) -> SnapshotInfo:
    """Read all of a file and check every part of it.

    Args:
        sink: takes the state's bytes, in order, as they are found sound.
        progress: told how many bytes of the file have been read.

    Raises:
        DataCorruption: damaged, cut off, of a newer format, or no snapshot at all.
        StorageIO: it cannot be read.
    """
    sha = hashlib.sha256()
    with _disk(path), open(path, "rb") as stream:
        header = _header(path, stream, sha)
        data_bytes = chunks = 0
        for data in _chunks(path, stream, sha):
            chunks += 1
            data_bytes += len(data)
            if sink is not None:
                sink(data)
            if progress is not None:
                progress(stream.tell())
        end = _read(path, stream, _END.size - _CHUNK.size)
        if struct.unpack("<QQ", end) != (chunks, data_bytes):
            raise damaged_snapshot(path, "its sizes do not add up")
        sha.update(end)
        if _read(path, stream, _DIGEST_BYTES) != sha.digest():
            raise damaged_snapshot(path, "its SHA-256 is not that of its content")
        if stream.read(1):
            raise damaged_snapshot(path, "it goes on after its end")
        size = stream.tell()
    return SnapshotInfo(path, header, sha.hexdigest(), size, data_bytes)


def sound_prefix(path: Path) -> int:
    """How many bytes of a partial file may be kept: up to the end of its last sound chunk."""
    kept = 0
    try:
        with _disk(path), open(path, "rb") as stream:
            sha = hashlib.sha256()
            _header(path, stream, sha)
            kept = stream.tell()
            for _ in _chunks(path, stream, sha):
                kept = stream.tell()
    except DataCorruption:
        pass
    return kept


def damaged_snapshot(path: Path, what: str) -> DataCorruption:
    return DataCorruption(
        f"{path} is damaged: {what}; take or fetch another snapshot", file=str(path)
    )


def _header(path: Path, stream: BinaryIO, sha: hashlib._Hash) -> SnapshotHeader:
    prefix = stream.read(_PREFIX.size)
    if prefix[: len(_MAGIC)] != _MAGIC:
        raise DataCorruption(f"{path} is not a dengine snapshot", file=str(path))
    if len(prefix) < _PREFIX.size:
        raise damaged_snapshot(path, "it ends inside its header")
    _, version, length, crc = _PREFIX.unpack(prefix)
    if version != FORMAT:
        raise DataCorruption(
            f"{path} has snapshot format {version}, this dengine reads format {FORMAT}: "
            "use the version that wrote it",
            file=str(path),
        )
    if length > _HEADER_BYTES_MAX:
        raise damaged_snapshot(path, "its header cannot be that long")
    encoded = _read(path, stream, length)
    if crc32(encoded) != crc:
        raise damaged_snapshot(path, "its header fails its CRC")
    sha.update(prefix + encoded)
    try:
        return msgspec.msgpack.decode(encoded, type=SnapshotHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise damaged_snapshot(path, f"its header cannot be read ({error})") from error


def _chunks(path: Path, stream: BinaryIO, sha: hashlib._Hash) -> Iterator[bytes]:
    """The data of each chunk up to the end mark, which is read."""
    while True:
        head = _read(path, stream, _CHUNK.size)
        length, crc = _CHUNK.unpack(head)
        sha.update(head)
        if not length:
            if crc:
                raise damaged_snapshot(path, "its end mark is wrong")
            return
        if length > CHUNK_BYTES_MAX:
            raise damaged_snapshot(path, f"a chunk before byte {stream.tell()} is too long")
        data = _read(path, stream, length)
        if crc32(data) != crc:
            raise damaged_snapshot(path, f"the chunk before byte {stream.tell()} fails its CRC")
        sha.update(data)
        yield data


def _read(path: Path, stream: BinaryIO, length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise damaged_snapshot(path, f"it ends after {stream.tell()} bytes, in the middle")
    return data


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn an OSError about `path` into a StorageIO."""
    try:
        yield
    except OSError as error:
        raise StorageIO(f"{path}: {error.strerror or error}") from error
