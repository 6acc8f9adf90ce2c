"""A new cluster from a state that exists: a snapshot that is restored, or what repair could keep.

The new data directory is built beside the place where it is to be, whole and durable, under another
name. One rename puts it there. So a crash leaves either nothing that a node would use, and the next
attempt begins anew, or a complete directory.

The new cluster has an id of its own and one voter, of a new incarnation. So members of the old one
are refused, and their directories must be emptied before they join. The revision moves up far: what
the old cluster acknowledged after the snapshot was taken, or one that was restored from it before,
used revisions that must not be given out again for other changes.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from dengine.errors import Conflict, StorageIO, TryAgain
from dengine.kv.commands import COMMAND_VERSION
from dengine.raft.membership import Member, Membership, Settings, found
from dengine.raft.types import HardState, LogId, MemberId
from dengine.storage.directory import DataDirectory
from dengine.storage.environment import make_directory, sync_directory
from dengine.storage.log_store import LogStore
from dengine.storage.snapshot_file import read_header
from dengine.storage.snapshots import Progress, take, unpack
from dengine.storage.state_store import StateStore

REVISION_STEP: Final = 1_000_000  # at least
REVISIONS_PER_S: Final = 1_000_000  # more than any cluster makes
CHUNK_BYTES: Final = 1024 * 1024


def _first_revision(old: int) -> int:
    """Above all that a cluster can have used since 1970, also one that began by another restore;
    below 2**53, which is as far as JSON's numbers are exact everywhere. By the clock of this
    machine; where that is wrong, at least some.
    """
    return max(old + REVISION_STEP, int(time.time() * REVISIONS_PER_S))


class Founded(NamedTuple):
    """The cluster that was made."""

    path: Path  # its first data directory
    membership: Membership
    applied: LogId  # where its log begins
    revision: int


def restore(file: Path, root: Path, node_id: int, address: str, progress: Progress) -> Founded:
    """Make `<root>/<node_id>`, which must not hold anything yet, the directory of a new cluster.

    Raises:
        DataCorruption: the file is no sound snapshot; nothing was changed.
        Conflict: there is something in that directory.
        TryAgain: another restore of this node is under way.
        StorageIO: the disk refused.
    """
    target = root / str(node_id)
    require_unused(target)
    read_header(file)  # before anything is made
    with building(root, node_id) as directory:
        state = directory.next_state_path()
        unpack(file, state, progress)
        founded = found_cluster(directory, state, address, "", progress)
        give_to(directory.path, root)
        try:
            os.rename(directory.path, target)
            sync_directory(root)
        except OSError as error:
            raise StorageIO(f"cannot make {target}: {error.strerror}") from error
    return founded._replace(path=target)


def require_unused(target: Path) -> None:
    """Raises Conflict unless `target` is missing or an empty directory."""
    try:
        if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
            raise Conflict(
                f"{target} exists and is not empty: a new cluster begins in a new directory, so "
                "move it away, or choose another --data-dir"
            )
    except OSError as error:
        raise StorageIO(f"cannot read {target}: {error.strerror}") from error


@contextmanager
def building(root: Path, node_id: int) -> Iterator[DataDirectory]:
    """A new, locked data directory of `node_id` that no node finds: `<root>/.new-<id>/<id>`.

    What is left of it at the end is removed, and `root` too if it was made for it in vain.

    Raises:
        TryAgain: another process builds one.
        StorageIO: the disk refused.
    """
    work = root / f".new-{node_id}"
    missing = [path for path in (root, *root.parents) if not path.exists()]
    try:
        make_directory(root)
        work.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StorageIO(f"cannot make {work}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TryAgain(
                f"another process is making a directory for node {node_id} in {root}: wait for it"
            ) from None
        shutil.rmtree(work / str(node_id), ignore_errors=True)
        try:
            directory = DataDirectory.open(work, node_id)
            try:
                yield directory
            finally:
                directory.close()
        finally:
            shutil.rmtree(work, ignore_errors=True)
            for path in missing:  # the deepest first
                with suppress(OSError):
                    path.rmdir()
    finally:
        os.close(lock)


def found_cluster(
    directory: DataDirectory, state_path: Path, address: str, zone: str, progress: Progress
) -> Founded:
    """Found a cluster of this new directory alone, on the closed, sound state at `state_path`.

    Everything is durable on return, with a snapshot as the log begins only where the state ends:
    a start that cannot trust the state needs one.

    Raises:
        DataCorruption, StorageIO: the directory is of no use.
    """
    identity = directory.identity
    me = MemberId(identity.node_id, identity.incarnation)
    state = StateStore(state_path)
    try:
        settings = state.membership.settings if state.membership is not None else Settings()
        member = Member(me, address, zone, command_version=COMMAND_VERSION)
        membership = found(secrets.token_hex(16), [member], settings)
        state.found_anew(membership, _first_revision(state.revision))
        state.sync()
        applied, revision = state.applied, state.revision
    finally:
        state.close()
    log = LogStore(directory.log_path)
    try:
        log.reset(HardState(max(1, applied.term), None, applied.index), applied, membership)
    finally:
        log.close()
    directory.adopt_state(state_path)
    directory.finish_install()
    take(
        state_path,
        directory.snapshots_path,
        node_id=me.id,
        chunk_bytes=CHUNK_BYTES,
        progress=progress,
    )
    directory.set_cluster_id(membership.cluster_id)
    directory.set_address(address)
    directory.mark_clean()
    return Founded(directory.path, membership, applied, revision)


def give_to(path: Path, model: Path) -> None:
    """What root has made must be usable by the user whose node runs beside it, or ran there."""
    if os.geteuid() != 0:
        return
    try:
        wanted = model.stat()
        for each in (path, *path.rglob("*")):
            os.lchown(each, wanted.st_uid, wanted.st_gid)
    except OSError as error:
        raise StorageIO(f"cannot give {path} to its owner: {error.strerror}") from error
