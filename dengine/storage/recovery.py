"""What a start makes of the data directory it finds: the log, and a state that agrees with it.

    the state in use can be trusted       it is opened as it is
    it was just unpacked from a snapshot  the snapshot gets its name and the log begins there: an
                                          install is finished
    it cannot be trusted, or is damaged   the newest sound snapshot that the log continues, else
                                          an empty state; the log does the rest
    the log is damaged, lost, or older    this node has broken what it promised with it. With other
    than the state                        voters it goes on under a new incarnation, as a learner
                                          that already holds much of the data; alone it stops

Nothing here guesses. Where a person has to decide, the error says so and names `dengine repair`.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from dengine.errors import DataCorruption, FatalError, StorageIO, TryAgain
from dengine.raft.membership import Membership
from dengine.raft.types import HardState, LogId, MemberId
from dengine.storage.directory import DataDirectory, distrusted_log
from dengine.storage.environment import DATA_FILE, sync_directory
from dengine.storage.log_store import REMEDY, LogStore
from dengine.storage.probe import probe_log, probe_state
from dengine.storage.snapshot_file import (
    name_durably,
    parse_name,
    read_header,
    snapshot_name,
    verify,
)
from dengine.storage.snapshot_frames import disk
from dengine.storage.snapshots import (
    list_fetched,
    list_files,
    put_all_aside,
    put_aside,
    put_aside_foreign,
    unpack,
)
from dengine.storage.state_store import StateStore

log = logging.getLogger("dengine.recovery")

REPAIR = "dengine repair --accept-data-loss --config FILE"
# A kill or two happen, and reading a large state takes time; a row of them may be its own work.
SUSPICIOUS_ENDS = 2
SMALL_FILES_BYTES = 1024 * 1024  # for marks and LMDB's lock files; they are a few pages


class Stores(NamedTuple):
    log: LogStore
    state: StateStore


def open_stores(directory: DataDirectory) -> Stores:
    """Open log and state of a locked directory, and repair what can be repaired without loss.

    The state may come back empty although the log begins later than entry 1: then only a snapshot
    from another member helps, and Raft sees that by itself.

    Raises:
        DataCorruption: a person is needed; the message says what is lost and what to do.
        StorageIO: the disk refused.
    """
    # First, for what is rebuilt may need its room.
    shutil.rmtree(directory.scratch_path, ignore_errors=True)
    if directory.distrusts_files:
        log.warning("the state was found wrong, and its snapshots with it: they are put aside")
        put_all_aside(directory.snapshots_path)
    put_aside_foreign(directory.snapshots_path, directory.identity.cluster_id)
    try:
        store = _sound_log(directory)
    except DataCorruption as error:
        return _without_log(directory, error)
    try:
        old = None
        if directory.identity.cluster_id and not directory.installing:
            old = _rolled_back(directory, store)
        if old is not None:
            store.close()
            return _without_log(directory, old)
        stores = _with_log(directory, store)
    except BaseException:
        store.close()
        raise
    directory.tidy()
    return stores


def _rolled_back(directory: DataDirectory, store: LogStore) -> DataCorruption | None:
    """Does the log lack what this node had in it, as its snapshots show?

    A snapshot holds what was applied, and nothing is applied before it is durable in the log. A
    disk that loses what it had acknowledged, or a person who puts an old copy back, takes that
    away; the log by itself looks sound, and would go on with another history.
    """
    for file in reversed(list_files(directory.snapshots_path)):
        try:
            log_id = read_header(file).log_id
        except (DataCorruption, StorageIO):
            continue  # proves nothing
        if log_id.index > store.last_index():
            what = f"ends at entry {store.last_index()}"
        elif log_id.index >= store.first_index() - 1 and store.term(log_id.index) != log_id.term:
            what = f"has another entry {log_id.index}"
        else:
            continue
        path = directory.log_path
        return DataCorruption(
            f"{path} {what}, but {file.name} was made from it: it was rolled back", file=str(path)
        )
    return None


def after_damage(
    error: DataCorruption, directory: DataDirectory, membership: Membership
) -> FatalError:
    """Damage was found while running: what ends the process, and whether a restart heals it.

    The state is rebuilt by any start, and a log by one that has other voters to turn to.
    """
    file = str(error.details.get("file", ""))
    if file.startswith(str(directory.path / "state-")):
        return StorageIO(f"{error.message}: the next start rebuilds the state", file=file)
    if not file.startswith(str(directory.log_path)):
        return error
    if "index" not in error.details:  # all entries may be sound: then no start finds the damage
        directory.distrust_log(error.message)
    if _others(directory, membership):
        return StorageIO(f"{error.message}: the next start does so by itself", file=file)
    return _needs_person(directory, error)


def _sound_log(directory: DataDirectory) -> LogStore:
    _require_log(directory.log_path / DATA_FILE)
    if (reason := distrusted_log(directory.log_path)) is not None:
        raise DataCorruption(reason, file=str(directory.log_path))
    if directory.died_opening:
        log.warning("the last start ended while it read the log: another process reads it first")
        probe_log(directory.log_path)
    with directory.opening():
        return LogStore(directory.log_path)


def _require_log(file: Path) -> None:
    """Raises DataCorruption where the log is lost, before anything that opens it makes a new one.

    A log is made before the identity is. So a node that has one may have voted.
    """
    try:
        if file.exists() and file.stat().st_size:
            return
    except OSError as error:
        raise StorageIO(f"cannot read {file}: {error.strerror}") from error
    raise DataCorruption(
        f"{file} is missing or empty although this node has an identity: its votes and entries "
        "are lost",
        file=str(file),
    )


def _with_log(directory: DataDirectory, store: LogStore) -> Stores:
    state = _trusted_state(directory)
    if state is None:
        state = _rebuilt_state(directory, store)
    elif directory.installing:
        if not _finish_install(directory, store, state):
            state.close()
            state = _rebuilt_state(directory, store)
    elif not _continues(store, state):
        if state.applied.index > store.last_index() or (
            state.applied.index >= store.first_index() - 1
        ):
            store.close()
            return _begin_anew(
                directory,
                state,
                DataCorruption(
                    f"{directory.log_path} is older than the state, which has applied entry "
                    f"{state.applied.index}: it was rolled back",
                    file=str(directory.log_path),
                ),
            )
        state.close()
        log.warning("the state is older than the log: rebuilding it")
        state = _rebuilt_state(directory, store)
    return Stores(store, state)


def _trusted_state(directory: DataDirectory) -> StateStore | None:
    """The state as it was left; None where it cannot be believed."""
    if not directory.trusted_state():
        log.info("the state was not closed cleanly: rebuilding it")
        return None
    if not directory.installing:
        ends = directory.unclean_ends()
        directory.mark_running(ends)
        if ends >= SUSPICIOUS_ENDS:
            log.warning("%d processes in a row have not closed the state: checking it", ends)
            if not _survives_reading(directory.state_path()):
                return None
            directory.mark_running()
    try:
        return StateStore(directory.state_path())
    except DataCorruption as error:
        log.warning("%s; rebuilding it", error.message)
        return None


def _survives_reading(path: Path) -> bool:
    """Can another process read all of this state, and is it sound?

    LMDB ends the process that meets some kinds of damage, whenever that is; the one that comes next
    would meet it again.
    """
    try:
        probe_state(path)
    except DataCorruption as error:
        log.warning("%s; rebuilding it", error.message)
        return False
    except TryAgain as error:  # the reader was killed, which says nothing about the data
        log.warning("%s: it is used as it is", error.message)
    return True


def _continues(store: LogStore, state: StateStore) -> bool:
    """Does the log hold the last applied entry, so that it goes on from there?"""
    index, term = state.applied.index, state.applied.term
    return store.first_index() - 1 <= index <= store.last_index() and store.term(index) == term


def _finish_install(directory: DataDirectory, store: LogStore, state: StateStore) -> bool:
    """The crash came after the switch to the unpacked state, perhaps before the log was reset.

    False when the file it came from is gone: a log that began behind it would have lost everything
    before with the next power cut. The old log still holds all that this node has promised.
    """
    if not _continues(store, state):
        if state.membership is None:
            raise DataCorruption(f"{state.path} holds no membership", file=str(state.path))
        if not _has_snapshot(directory, state.applied):
            log.warning("the snapshot of entry %d is gone: not installed", state.applied.index)
            return False
        store.reset(_hard_state(store, state), state.applied, state.membership)
    directory.finish_install()
    return True


def _has_snapshot(directory: DataDirectory, last: LogId) -> bool:
    """Is there a snapshot up to `last` that a power cut leaves here? One that was fetched gets its
    name now, where the crash came before that.
    """
    path = directory.snapshots_path
    for file in list_files(path):
        if parse_name(file.name) == last:
            with disk(path):
                sync_directory(path)
            return True
    for file in list_fetched(path):
        with suppress(DataCorruption):
            if read_header(file).log_id == last:
                verify(file)
                name_durably(file, snapshot_name(last))
                return True
    return False


def _hard_state(store: LogStore, state: StateStore) -> HardState:
    """The promises of the old log, with a commit index that the new one starts from."""
    old, _ = store.load()
    term = max(old.term, state.applied.term)
    voted_for = old.voted_for if old.term == term else None
    return HardState(term, voted_for, state.applied.index)


def _rebuilt_state(directory: DataDirectory, store: LogStore) -> StateStore:
    """From the newest sound snapshot that the log continues; an empty one where there is none."""
    if directory.installing:  # its file has its name already, but this log never got that far
        _forget_beyond(directory, store.last_index())
    for file in reversed(list_files(directory.snapshots_path)):
        log_id = parse_name(file.name)
        if (
            log_id is None
            or not store.first_index() - 1 <= log_id.index <= store.last_index()
            or store.term(log_id.index) != log_id.term
        ):
            continue
        try:
            path = _unpacked(directory, file)
        except DataCorruption as error:
            log.warning("%s; trying an older one", error.message)
            put_aside(file)
            continue
        log.info("the state is rebuilt from %s and the log after it", file.name)
        directory.adopt_state(path)
        directory.finish_install()
        return StateStore(path)
    if store.first_index() > 1:
        _require_others(directory, store)  # first: a person may find a use for what is discarded
    directory.discard_state()
    directory.mark_running()
    return StateStore(directory.state_path())


def _unpacked(directory: DataDirectory, file: Path) -> Path:
    """The state in `file`, which the log continues, unpacked and not in use yet.

    Where both do not fit on the disk, the state that cannot be used goes first, or no start would
    ever get further. Until the file has been read through, that state may be all there is.

    Raises:
        DataCorruption: the file is damaged.
        StorageIO: the disk refused.
    """
    path = directory.next_state_path()
    shutil.rmtree(path, ignore_errors=True)  # what an attempt before has left takes room as well
    if not _has_room_for(file, directory.path) and any(directory.path.glob("state-*")):
        verify(file)
        log.warning(
            "%s was verified, and there is no room for the state in it beside the one that cannot "
            "be used: that one is deleted first",
            file,
        )
        _clear_states(directory)
    unpack(file, path, lambda done, total: None)
    return path


def _has_room_for(file: Path, path: Path) -> bool:
    """Can the state in a snapshot, which is as large as that, be unpacked on the disk of `path`?"""
    try:
        room = os.statvfs(path)
        return room.f_bavail * room.f_frsize >= file.stat().st_size + SMALL_FILES_BYTES
    except OSError as error:
        raise StorageIO(f"cannot tell whether {path} has room: {error.strerror}") from error


def _clear_states(directory: DataDirectory) -> None:
    """Delete every state, also the one in use, which is closed and of no use any more.

    The first step takes its name away, and a start builds a state that is missing. Half of one
    under its own name could be taken for an empty one, or for one without damage.
    """
    state, unused = directory.state_path(), directory.next_state_path()
    try:
        if state.exists():
            os.rename(state, unused)
            sync_directory(directory.path)
    except OSError as error:
        raise StorageIO(f"cannot delete {state}: {error.strerror}") from error
    directory.tidy()


def _forget_beyond(directory: DataDirectory, index: int) -> None:
    for file in list_files(directory.snapshots_path):
        log_id = parse_name(file.name)
        if log_id is not None and log_id.index > index:
            log.warning("%s belongs to an install that did not come to its end: removed", file)
            with suppress(OSError):
                file.unlink()
                sync_directory(file.parent)  # else it may come back, and say that the log is old


def _without_log(directory: DataDirectory, error: DataCorruption) -> Stores:
    """The log is damaged or lost: begin a new one behind the state, or a snapshot that is newer."""
    state = _trusted_state(directory)
    if state is not None and not state.applied.index:
        state.close()
        state = None
    newer, unreadable = _newest_snapshot(directory, state.applied.index if state is not None else 0)
    if newer is not None:
        if state is not None:
            state.close()
        state = newer
    if state is None:
        raise DataCorruption(
            f"{error.message.removesuffix(f'; {REMEDY}')}; nothing else here could take its place: "
            f"if this node is one of several, remove {directory.path}, and it joins anew; if it is "
            "the only one, restore a backup with `dengine snapshot restore`, or keep what can be "
            f"read with `{REPAIR}`",
            **error.details,
        )
    return _begin_anew(directory, state, error, unreadable)


def _newest_snapshot(directory: DataDirectory, after: int) -> tuple[StateStore | None, list[Path]]:
    """The newest sound one beyond entry `after`, unpacked and not in use yet, and the damaged ones
    before it. Those stay where they are: what they say of the log's end is true all the same, and
    the next start has to find it again if this one comes to nothing."""
    unreadable: list[Path] = []
    if not directory.identity.cluster_id:
        return None, unreadable  # it has no past, whatever somebody has put into the directory
    for file in reversed(list_files(directory.snapshots_path)):
        log_id = parse_name(file.name)
        if log_id is None or log_id.index <= after:
            break
        path = directory.next_state_path()
        try:
            unpack(file, path, lambda done, total: None)
        except DataCorruption as damage:
            log.warning("%s; trying an older one", damage.message)
            unreadable.append(file)
            continue
        return StateStore(path), unreadable
    return None, unreadable


def _begin_anew(
    directory: DataDirectory,
    state: StateStore,
    error: DataCorruption,
    unreadable: Sequence[Path] = (),
) -> Stores:
    """Votes and acknowledgements given with the lost log count no more: another incarnation takes
    its place, with the state as a valid past of the cluster. The other voters have the rest.

    The incarnation comes first. With anything else done before it, a start after a crash could find
    a directory that agrees with itself and vote under the name whose promises are broken.
    """
    membership, in_use = state.membership, state.path == directory.state_path()
    if membership is None or not _others(directory, membership):
        state.close()
        if not in_use:
            shutil.rmtree(state.path, ignore_errors=True)
        raise _needs_person(directory, error)
    log.warning("%s; going on as a new incarnation, from the other members", error.message)
    with ExitStack() as opened:
        opened.callback(state.close)
        directory.reincarnate()
        if not in_use:
            directory.adopt_state(state.path)
        for file in unreadable:
            put_aside(file)
        hard_state = HardState(state.applied.term, None, state.applied.index)
        store = directory.replace_log(hard_state, state.applied, membership)
        opened.callback(store.close)
        directory.finish_install()
        opened.pop_all()
    return Stores(store, state)


def _require_others(directory: DataDirectory, store: LogStore) -> None:
    """State and snapshots are lost and the log has no beginning: somebody else must have them."""
    _, memberships = store.load()
    membership = memberships[-1][1] if memberships else Membership()
    if not _others(directory, membership):
        raise _needs_person(
            directory,
            DataCorruption(
                f"the state of {directory.path} is lost, the log begins only at entry "
                f"{store.first_index()}, and no sound snapshot reaches up to it",
                file=str(directory.snapshots_path),
            ),
        )


def _others(directory: DataDirectory, membership: Membership) -> set[MemberId]:
    identity = directory.identity
    me = MemberId(identity.node_id, identity.incarnation)
    return {v for v in membership.all_voters if v.id != me.id}


def _needs_person(directory: DataDirectory, error: DataCorruption) -> DataCorruption:
    return DataCorruption(
        f"{error.message.removesuffix(f'; {REMEDY}')}; this node is "
        "the only voter it knows of, so nobody has another copy: restore a backup with "
        f"`dengine snapshot restore`, or keep what can be read with `{REPAIR}`",
        **error.details,
    )
