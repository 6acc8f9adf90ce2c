"""What is done with snapshots and states as files: take, unpack, list, clean up.

Everything here may take seconds and blocks; a node has it done by a process of its own (see
dengine/snapshot_writer.py), except at start, before it serves anybody.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from dengine.errors import DataCorruption, StorageIO
from dengine.storage.directory import UNPACKED_MARK
from dengine.storage.environment import DATA_FILE, sync_directory
from dengine.storage.snapshot_file import (
    DAMAGED_SUFFIX,
    SnapshotHeader,
    SnapshotInfo,
    SnapshotWriter,
    parse_name,
    read_header,
    snapshot_name,
    verify,
)
from dengine.storage.snapshot_frames import PARTIAL_SUFFIX, SyncedSteps, damaged_snapshot, disk
from dengine.storage.state_reader import StateReader, check_state

log = logging.getLogger("dengine.snapshots")

FOREIGN_SUFFIX: Final = ".foreign"  # for a person, who may want it back
CHECK_RATE: Final = 4  # times as fast as the file is written, the state may be checked
VERIFY_RATE: Final = 2  # and what was written be read back

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def take(
    state: Path,
    directory: Path,
    *,
    node_id: int,
    chunk_bytes: int,
    progress: Progress,
    name: str | None = None,
) -> SnapshotInfo:
    """Write the state in directory `state`, which may be in use, to a file in `directory`.

    `name` is that file's, and must be new; None names it after the last entry it includes.

    One read transaction gives everything; its records are checked against the state hash before
    a byte is written, so that rot is never signed into a snapshot.

    Raises:
        Conflict: there is a file called `name`.
        DataCorruption: the state is damaged, or the disk did not keep what was written.
        StorageIO: the disk refused.
    """
    with StateReader(state) as reader:
        size = reader.data_bytes
        # Reading costs others less than writing does, in memory less than from the disk.
        checked, total = size // CHECK_RATE, size // CHECK_RATE + size + size // VERIFY_RATE
        reader.check(lambda read: progress(min(checked, read // CHECK_RATE), total))
        header = SnapshotHeader(
            cluster_id=reader.membership.cluster_id,
            node_id=node_id,
            index=reader.applied.index,
            term=reader.applied.term,
            revision=reader.digest.revision,
            state_hash=reader.digest.state_hash,
            membership=reader.membership,
            records=reader.records,
            taken_at_s=int(time.time()),
        )
        make_private(directory)
        file = directory / (name or snapshot_name(header.log_id))
        writer = SnapshotWriter(file, header, chunk_bytes, replace=name is None)

        def write(data: bytes) -> None:
            writer.write(data)
            progress(checked + writer.data_bytes, total)

        try:
            reader.copy(write)
        except BaseException:
            writer.abandon()
            raise
    # The reader is gone: while the file is read back, the node may use its old pages again.
    done = checked + writer.data_bytes
    try:
        return writer.finish(lambda read: progress(done + read // VERIFY_RATE, total))
    except BaseException:
        writer.abandon()
        raise


def unpack(file: Path, state: Path, progress: Progress) -> SnapshotInfo:
    """Unpack a snapshot into the new directory `state`, checked in full, synced and marked.

    Raises:
        DataCorruption: the file is damaged, or what was in it is; `state` is gone again.
        StorageIO: the disk refused.
    """
    shutil.rmtree(state, ignore_errors=True)
    try:
        total = file.stat().st_size
        state.mkdir(mode=0o700, parents=True)
        fd = os.open(state / DATA_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as stream:
            steps = SyncedSteps(stream)

            def write(data: bytes) -> None:
                try:
                    stream.write(data)
                    steps.wrote(len(data))
                except OSError as error:  # of this file, not of the one that is read
                    raise StorageIO(f"cannot write {state}: {error.strerror}") from error

            info = verify(file, write, lambda done: progress(done, total))
            stream.flush()
            os.fsync(stream.fileno())
        try:
            reader = check_state(state, lambda _: progress(total, total))
        except DataCorruption as error:
            what = error.message.removeprefix(f"{state / DATA_FILE} is damaged: ").split("; ")[0]
            raise damaged_snapshot(file, f"the state in it is unsound ({what})") from error
        header = info.header
        if (reader.applied, reader.digest.state_hash, reader.membership) != (
            header.log_id,
            header.state_hash,
            header.membership,
        ):
            raise damaged_snapshot(file, "its header does not describe the state in it")
        (state / UNPACKED_MARK).touch(mode=0o600)
        sync_directory(state)
        sync_directory(state.parent)
    except OSError as error:
        shutil.rmtree(state, ignore_errors=True)
        raise StorageIO(f"cannot unpack {file}: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(state, ignore_errors=True)
        raise
    return info


def make_empty_state(state: Path) -> None:
    """Make the directory of a state that holds nothing, durably. Raises StorageIO."""
    shutil.rmtree(state, ignore_errors=True)
    try:
        state.mkdir(mode=0o700)
        sync_directory(state)
    except OSError as error:
        raise StorageIO(f"cannot make {state}: {error.strerror}") from error


def list_files(directory: Path) -> list[Path]:
    """The complete snapshots in `directory`, oldest first. Nothing is read yet."""
    found = [(parse_name(path.name), path) for path in directory.glob("snapshot-*")]
    complete = [(log_id.index, log_id.term, path) for log_id, path in found if log_id is not None]
    return [path for _, _, path in sorted(complete)]


def put_aside(file: Path) -> None:
    """A file turned out to be damaged: keep it, under a name that nobody takes for a snapshot. Of
    several the newest one stays, for it may be all that is left of what is in no log any more.
    """
    with suppress(OSError):
        file.rename(file.with_name(file.name + DAMAGED_SUFFIX))
        for path in sorted(file.parent.glob(f"*{DAMAGED_SUFFIX}"), key=_index_aside)[:-1]:
            path.unlink(missing_ok=True)


def _index_aside(path: Path) -> int:
    log_id = parse_name(path.name.removesuffix(DAMAGED_SUFFIX))
    return log_id.index if log_id is not None else 0


def put_all_aside(directory: Path, spare: Path | None = None) -> None:
    """All snapshots in `directory` but `spare` may be of a wrong state: none of them is one any
    more, and a crash brings none back. Raises StorageIO.
    """
    wrong = [file for file in list_files(directory) if file != spare]
    for file in wrong:
        put_aside(file)
    if left := [file for file in list_files(directory) if file != spare]:
        raise StorageIO(f"cannot rename {left[0]}, which may hold a wrong state", file=str(left[0]))
    try:
        if wrong:
            sync_directory(directory)
    except OSError as error:
        raise StorageIO(f"cannot sync {directory}: {error.strerror}") from error


def put_aside_foreign(directory: Path, cluster_id: str) -> None:
    """Put aside what was never of this cluster, or is not what its name says: nobody here may
    take it for the cluster's past. One that cannot be read is left to whoever verifies it, and
    so is all of it while this node (`cluster_id` is empty) belongs to none."""
    for file in list_files(directory) if cluster_id else ():
        with suppress(DataCorruption, StorageIO, OSError):
            header = read_header(file)
            if header.log_id != parse_name(file.name) or header.cluster_id != cluster_id:
                log.warning(
                    "%s holds entry %d of cluster %s and not what its name and this directory say:"
                    " it is put aside",
                    file,
                    header.index,
                    header.cluster_id,
                )
                file.rename(file.with_name(file.name + FOREIGN_SUFFIX))


def remove_partial(directory: Path) -> None:
    """Remove what an interrupted take has left.

    What the disk does not let go stays, and so does all of it where the directory cannot be read,
    as by a process without a free file descriptor: the next one removes it.
    """
    with suppress(OSError):
        for path in directory.glob(f"snapshot-*{PARTIAL_SUFFIX}"):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def fetched_path(directory: Path, sha256: str) -> Path:
    """Where a file is while it is fetched, and until it is installed."""
    return directory / f"fetch-{sha256}{PARTIAL_SUFFIX}"


def list_fetched(directory: Path) -> list[Path]:
    """What fetches have left: complete, in part, or of no use."""
    return sorted(directory.glob(f"fetch-*{PARTIAL_SUFFIX}"))


def keep_fetched(directory: Path, sha256: str) -> int:
    """Remove what interrupted fetches of other files have left; how many bytes are here of the one
    with this SHA-256. Raises StorageIO.
    """
    ours = fetched_path(directory, sha256)
    with disk(directory):
        for partial in list_fetched(directory):
            if partial != ours:
                partial.unlink(missing_ok=True)
        return ours.stat().st_size if ours.exists() else 0


def remove_fetched(directory: Path, sha256: str) -> None:
    """Remove what a fetch of the file with this SHA-256 has left, if the disk lets it go."""
    with suppress(OSError):
        fetched_path(directory, sha256).unlink(missing_ok=True)


def remove_overtaken(directory: Path, applied: int) -> bool:
    """Remove what interrupted fetches have left, where a state that has applied so much needs it
    no more. True when some is left, with which a fetch may go on.
    """
    left = True  # until all of it has been seen
    with suppress(OSError):
        partial = list_fetched(directory)
        left = False
        for path in partial:
            with suppress(OSError, StorageIO):
                if _brings(path) <= applied:
                    path.unlink(missing_ok=True)
                else:
                    left = True
    return left


def _brings(partial: Path) -> int:
    """Up to which entry the file would go; 0 where not even that has come."""
    try:
        return read_header(partial).index
    except DataCorruption:
        return 0


def make_private(directory: Path) -> None:
    """A directory that only we can read, durably. Raises StorageIO."""
    try:
        if not directory.exists():
            directory.mkdir(mode=0o700)
        with suppress(PermissionError):  # above one that we may not even read, we made nothing
            sync_directory(directory.parent)  # always: whoever made it may have died before
    except OSError as error:
        raise StorageIO(f"cannot make {directory}: {error.strerror}") from error
