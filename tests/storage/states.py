"""States and directories that the tests of storage begin with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from dengine.kv.commands import Command, Put, encode_batch, encode_command
from dengine.raft.membership import Member, Membership, Settings, found
from dengine.raft.types import Entry, EntryKind, HardState, LogId, MemberId
from dengine.storage.directory import DataDirectory
from dengine.storage.environment import DATA_FILE
from dengine.storage.log_store import LogStore
from dengine.storage.snapshot_file import SnapshotInfo, SnapshotWriter, verify
from dengine.storage.snapshots import take
from dengine.storage.state_store import StateStore

OTHER = MemberId(2, 22)


def membership(*members: MemberId, cluster_id: str = "c-1") -> Membership:
    who = [Member(m, f"10.0.0.{m.id}:9081", "az-a") for m in members]
    return found(cluster_id, who, Settings(promotion="odd"))


def config(index: int, content: Membership, term: int = 1) -> Entry:
    return Entry(index, term, EntryKind.CONFIG, content.encode())


def commands(index: int, *made: Command, term: int = 1) -> Entry:
    data = encode_batch([encode_command(command) for command in made])
    return Entry(index, term, EntryKind.NORMAL, data)


def put(index: int, term: int = 1) -> Entry:
    return commands(index, Put(b"k%03d" % index, b"v%d" % index * 9), term=term)


def history(content: Membership, last: int) -> list[Entry]:
    """The founding entry, then a put in each up to `last`."""
    return [config(1, content), *(put(index) for index in range(2, last + 1))]


def me(directory: DataDirectory) -> MemberId:
    return MemberId(directory.identity.node_id, directory.identity.incarnation)


def lived(
    root: Path,
    last: int,
    *,
    others: Sequence[MemberId] = (),
    applied: int | None = None,
    cluster_id: str = "c-1",
    like: DataDirectory | None = None,
) -> DataDirectory:
    """A directory whose node has written entries up to `last`, and died; `like` another one."""
    directory = DataDirectory.open(root, 1)
    content = membership(me(like or directory), *others, cluster_id=cluster_id)
    entries = history(content, last)
    directory.mark_running()
    log, state = LogStore(directory.log_path), StateStore(directory.state_path())
    log.save(HardState(1, None, last), entries)
    state.apply(entries[:applied])
    state.sync()
    state.close()
    log.close()
    directory.set_cluster_id(content.cluster_id)
    return directory


def snapshot_of(state: Path, directory: Path, name: str | None = None) -> SnapshotInfo:
    return take(
        state, directory, node_id=1, chunk_bytes=4096, progress=lambda a, b: None, name=name
    )


def signed_anew(file: Path, spoil: Callable[[Path], None]) -> SnapshotInfo:
    """The same snapshot, had `spoil` been done to the state's data file between its check and its
    copy: every part of `file` is then what was written, and the state in it is not sound."""
    scratch = file.parent.parent / "to-be-spoiled"
    scratch.mkdir()
    with (scratch / DATA_FILE).open("wb") as stream:
        header = verify(file, stream.write).header
    spoil(scratch / DATA_FILE)
    writer = SnapshotWriter(file, header, 4096)
    writer.write((scratch / DATA_FILE).read_bytes())
    shutil.rmtree(scratch)
    return writer.finish()


def snapshot_at(directory: DataDirectory, index: int) -> SnapshotInfo:
    """A snapshot of what the directory's node had applied at `index`."""
    log = LogStore(directory.log_path)
    scratch = directory.path.parent / f"scratch-{index}"
    state = StateStore(scratch)
    state.apply(log.entries(1, index + 1, 2**30))
    state.sync()
    state.close()
    log.close()
    return snapshot_of(scratch, directory.snapshots_path)


def purge(directory: DataDirectory, index: int) -> None:
    log = LogStore(directory.log_path)
    log.purge_to = index
    while log.purge_pending:
        log.purge_step()
    log.close()


def keys_of(state: StateStore) -> list[bytes]:
    return [key for key, _ in state.page(b"", None, 1000, True).items]


def everything(path: Path) -> tuple[LogId, int, Membership | None, list[tuple[bytes, object]]]:
    """What a closed state holds."""
    state = StateStore(path)
    found = state.page(b"", None, 1000, False).items
    described = (state.applied, state.revision, state.membership, [(k, r) for k, r in found])
    state.close()
    return described
