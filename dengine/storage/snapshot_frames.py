"""How the bytes of a `.dsnap` file are framed, and whether they are sound; see snapshot_file.py.

Standard library only: a client without the extra `dengine[node]` downloads and checks files too.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple
from zlib import crc32

from dengine.errors import Conflict, DataCorruption, StorageIO

PARTIAL_SUFFIX: Final = ".partial"  # written or fetched, not complete
FORMAT: Final = 1
CHUNK_BYTES_MAX: Final = 4 * 1024 * 1024
DIGEST_BYTES: Final = 32
# Between two syncs of a file that is being written. The pace of a take leaves time for small steps;
# where nothing paces the writer, larger ones cost neither it nor the log's own syncs more.
PACED_SYNC_BYTES: Final = 4 * 1024 * 1024
SYNC_BYTES: Final = 16 * 1024 * 1024

_MAGIC: Final = b"DENGSNAP"
_PREFIX: Final = struct.Struct("<8sHII")
_CHUNK: Final = struct.Struct("<II")
_END: Final = struct.Struct("<IIQQ")
_HEADER_BYTES_MAX: Final = 16 * 1024 * 1024
# What a disk or a file system says of data that it cannot give back. Nothing else, as a lack of
# descriptors or permissions, says anything of the file.
_LOST: Final = frozenset(
    (errno.EIO, errno.ENODATA, errno.EBADMSG, errno.EUCLEAN, errno.EILSEQ, errno.EREMOTEIO)
)


class Frames(NamedTuple):
    """A file whose every byte was checked; what the header says is up to snapshot_file.py."""

    header: bytes
    sha256: str
    size_bytes: int
    data_bytes: int


def pack_header(encoded: bytes) -> bytes:
    """The beginning of a file."""
    return _PREFIX.pack(_MAGIC, FORMAT, len(encoded), crc32(encoded)) + encoded


def pack_chunk(data: bytes) -> bytes:
    return _CHUNK.pack(len(data), crc32(data)) + data


def pack_end(chunks: int, data_bytes: int) -> bytes:
    """What follows the last chunk; only the SHA-256 of everything comes after it."""
    return _END.pack(0, 0, chunks, data_bytes)


def scan(
    path: Path,
    sink: Callable[[bytes], object] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Frames:
    """Read all of a file and check every part of it.

    Args:
        sink: takes the data of each chunk, in order, as it is found sound; raises no OSError.
        progress: told how many bytes of the file have been read.

    Raises:
        DataCorruption: damaged, cut off, of a newer format, or no snapshot at all; or the disk
            cannot give it back.
        StorageIO: it cannot be opened.
    """
    sha = hashlib.sha256()
    with reading(path), open(path, "rb") as stream:
        header = read_header_bytes(path, stream, sha)
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
        if _read(path, stream, DIGEST_BYTES) != sha.digest():
            raise damaged_snapshot(path, "its SHA-256 is not that of its content")
        if stream.read(1):
            raise damaged_snapshot(path, "it goes on after its end")
        size = stream.tell()
    return Frames(header, sha.digest().hex(), size, data_bytes)


def sound_prefix(path: Path, progress: Callable[[int], None] | None = None) -> int:
    """How many bytes of a partial file may be kept: up to the end of its last sound chunk.

    Args:
        progress: told how many bytes of the file have been read.
    """
    kept = 0
    try:
        with reading(path), open(path, "rb") as stream:
            sha = hashlib.sha256()
            read_header_bytes(path, stream, sha)
            kept = stream.tell()
            for _ in _chunks(path, stream, sha):
                kept = stream.tell()
                if progress is not None:
                    progress(kept)
    except DataCorruption:
        pass
    return kept


def read_header_bytes(path: Path, stream: BinaryIO, sha: hashlib._Hash) -> bytes:
    """The encoded header at the beginning of `stream`. Raises DataCorruption."""
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
    return encoded


def damaged_snapshot(path: Path, what: str) -> DataCorruption:
    return DataCorruption(
        f"{path} is damaged: {what}; take or fetch another snapshot", file=str(path)
    )


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn an OSError about `path` into a StorageIO."""
    try:
        yield
    except OSError as error:
        raise StorageIO(f"{path}: {error.strerror or error}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """As `disk`, of a snapshot that is read: where a sector is lost it is damaged, as where one is
    wrong. Another snapshot helps then, and no other attempt.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _LOST:
            raise damaged_snapshot(path, f"it cannot be read ({error.strerror})") from error
        raise StorageIO(f"{path}: {error.strerror or error}") from error


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


def name_new(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`, which must not exist; nobody's file is ever replaced.

    Raises:
        Conflict: it exists.
        OSError: the disk refused.
    """
    try:
        os.link(partial, path, follow_symlinks=False)
    except FileExistsError:
        raise existing(path) from None
    except OSError:  # a file system without hard links
        _rename_new(partial, path)
    else:
        partial.unlink()


def _rename_new(partial: Path, path: Path) -> None:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        raise existing(path) from None
    try:
        os.replace(partial, path)  # the empty one that has just been made
    except OSError:
        path.unlink(missing_ok=True)
        raise


def existing(path: Path) -> Conflict:
    """A backup never replaces another one."""
    return Conflict(f"{path} exists and is never overwritten: choose another name or remove it")


def lock_partial(path: Path, fd: int) -> None:
    """Keep every other process from writing the open partial file. Raises Conflict, OSError."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Conflict(f"{path} is being written by another process") from None


def sync_file(stream: BinaryIO) -> None:
    """Make what was written durable, and have a later read ask the disk, not the page cache."""
    stream.flush()
    os.fsync(stream.fileno())
    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class SyncedSteps:
    """Syncs a large file every few MiB while it is written. One sync at the end would make the
    log's next one, on the same disk, wait until all of it is out. Errors are those of the disk.
    """

    def __init__(self, stream: BinaryIO, step_bytes: int = SYNC_BYTES) -> None:
        self._stream = stream
        self._step_bytes = step_bytes
        self._unsynced_bytes = 0

    def wrote(self, count: int) -> None:
        self._unsynced_bytes += count
        if self._unsynced_bytes >= self._step_bytes:
            self._unsynced_bytes = 0
            self._stream.flush()
            os.fdatasync(self._stream.fileno())
