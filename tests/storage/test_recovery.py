"""What a start makes of each directory it may find, also after a crash between any two steps."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import lmdb
import pytest

from dengine.errors import DataCorruption, StorageIO, TryAgain
from dengine.raft.types import HardState, LogId, MemberId
from dengine.storage import recovery
from dengine.storage.directory import DataDirectory
from dengine.storage.log_store import LogStore
from dengine.storage.marks import distrust_state
from dengine.storage.recovery import Stores, after_damage, open_stores
from dengine.storage.snapshot_file import name_durably, snapshot_name
from dengine.storage.snapshots import fetched_path, list_files, unpack
from dengine.storage.state_store import StateStore
from tests.storage.states import (
    OTHER,
    everything,
    keys_of,
    lived,
    me,
    membership,
    purge,
    put,
    snapshot_at,
)

LOSSES = ("lost", "file lost", "emptied")  # what may become of a log


def restarted(directory: DataDirectory) -> DataDirectory:
    """Another process opens the directory."""
    directory.close()
    return DataDirectory.open(directory.path.parent, 1)


def lose_power(directory: DataDirectory) -> None:
    """Nothing says any more that the state can be trusted."""
    (directory.path / "RUN").unlink(missing_ok=True)
    (directory.path / "CLEAN").unlink(missing_ok=True)


def raises(error: Exception) -> Callable[..., None]:
    def refuse(*_: object, **__: object) -> None:
        raise error

    return refuse


def rot(file: Path) -> None:
    """The tree of an LMDB file is gone; both meta pages are there."""
    with file.open("r+b") as stream:
        stream.seek(8192)
        stream.write(b"\x00" * max(0, file.stat().st_size - 8192))


def lose_log(directory: DataDirectory, how: str) -> None:
    """A file system that was mended, or a person, took it away."""
    if how == "lost":
        shutil.rmtree(directory.log_path)
    elif how == "file lost":
        (directory.log_path / "data.mdb").unlink()
    else:
        os.truncate(directory.log_path / "data.mdb", 0)


def opened(directory: DataDirectory, check: Callable[[Stores], None]) -> None:
    stores = open_stores(directory)
    try:
        check(stores)
    finally:
        stores.state.close()
        stores.log.close()


def has(applied: int, last: int, first: int = 1) -> Callable[[Stores], None]:
    def check(stores: Stores) -> None:
        assert stores.state.applied.index == applied
        assert (stores.log.first_index(), stores.log.last_index()) == (first, last)
        assert keys_of(stores.state) == [b"k%03d" % n for n in range(2, applied + 1)]
        if first - 1 <= applied < last:
            stores.state.apply(stores.log.entries(applied + 1, last + 1, 2**30))

    return check


def test_a_trusted_state_is_opened_as_it_is(tmp_path: Path) -> None:
    """After a kill the state is that of the moment, and after a clean stop too."""
    directory = restarted(lived(tmp_path, 9, applied=7))
    opened(directory, has(7, 9))
    directory.mark_clean()
    directory = restarted(directory)
    opened(directory, has(9, 9))
    assert directory.state_path().name == "state-1"
    directory.close()


def test_without_trust_or_snapshot_the_log_builds_it_again(tmp_path: Path) -> None:
    """A power loss costs the state, and no entry."""
    directory = lived(tmp_path, 9)
    lose_power(directory)
    directory = restarted(directory)
    opened(directory, has(0, 9))
    opened(directory, has(9, 9))
    directory.close()


def test_a_damaged_state_is_built_again(tmp_path: Path) -> None:
    """Rot in the state of a node that was only killed."""
    directory = lived(tmp_path, 9)
    rot(directory.state_path() / "data.mdb")
    directory = restarted(directory)
    opened(directory, has(0, 9))
    directory.close()


def test_the_newest_sound_snapshot_in_the_log_is_used(tmp_path: Path) -> None:
    """A damaged one is put aside."""
    directory = lived(tmp_path, 30)
    for index in (10, 20, 25):
        snapshot_at(directory, index)
    newest = directory.snapshots_path / "snapshot-1-25.dsnap"
    newest.write_bytes(newest.read_bytes()[:-1])
    purge(directory, 12)
    lose_power(directory)
    directory = restarted(directory)
    opened(directory, has(20, 30, first=13))
    assert [f.name for f in list_files(directory.snapshots_path)] == [
        "snapshot-1-10.dsnap",
        "snapshot-1-20.dsnap",
    ]
    assert newest.with_name(newest.name + ".damaged").exists()
    opened(directory, has(30, 30, first=13))
    directory.close()


def test_what_was_found_wrong_builds_no_state_again(tmp_path: Path) -> None:
    """Its own members said so: neither the state nor a snapshot of it comes back, whichever of its
    steps the process that threw them away got to."""
    directory = lived(tmp_path, 30, others=[OTHER])
    snapshot_at(directory, 20)
    directory.distrust_state(directory.state_path(), True)
    directory = restarted(directory)
    opened(directory, has(0, 30))
    assert list_files(directory.snapshots_path) == []
    assert not directory.distrusts_files
    directory.close()


def test_a_state_that_is_only_damaged_comes_from_its_own_snapshot(tmp_path: Path) -> None:
    directory = lived(tmp_path, 30)
    snapshot_at(directory, 20)
    directory.distrust_state(directory.state_path(), False)
    directory = restarted(directory)
    opened(directory, has(20, 30))
    directory.close()


def test_a_full_disk_cannot_vouch_for_a_damaged_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark that it is damaged needs room; the one that it can be trusted goes instead."""
    directory = lived(tmp_path, 9)
    monkeypatch.setattr(Path, "touch", raises(OSError(errno.ENOSPC, "no space left")))
    distrust_state(directory.state_path())
    monkeypatch.undo()
    directory = restarted(directory)
    assert not directory.trusted_state()
    opened(directory, has(0, 9))
    directory.close()


def test_a_lost_state_waits_for_the_others(tmp_path: Path) -> None:
    """Nothing reaches the beginning of the log: the other members have a snapshot."""
    directory = lived(tmp_path, 30, others=[OTHER])
    purge(directory, 12)
    lose_power(directory)
    directory = restarted(directory)
    opened(directory, has(0, 30, first=13))
    directory.close()


@pytest.mark.parametrize(
    "damage", ["state lost", "log", "log and state lost", "log missing tree", *LOSSES]
)
def test_alone_a_person_decides_and_nothing_is_destroyed(tmp_path: Path, damage: str) -> None:
    """A single node that cannot recover says so at each start, and leaves all of it in place."""
    directory = lived(tmp_path, 30)
    snapshot_at(directory, 8)
    purge(directory, 12)
    state = directory.state_path()
    before = everything(state)
    if "state lost" in damage:
        lose_power(directory)
    if damage in LOSSES:
        lose_log(directory, damage)
    elif "log" in damage:
        rot(directory.log_path / "data.mdb")
    for _ in range(3):
        directory = restarted(directory)
        with pytest.raises(DataCorruption, match="dengine repair --accept-data-loss") as caught:
            open_stores(directory)
        assert caught.value.exit_code == 65
        assert everything(state) == before
    directory.close()


def test_a_state_older_than_the_log_is_built_again(tmp_path: Path) -> None:
    """An old copy of the state beside a log that was purged further."""
    directory = lived(tmp_path, 30, applied=5, others=[OTHER])
    snapshot_at(directory, 20)
    purge(directory, 15)
    directory = restarted(directory)
    opened(directory, has(20, 30, first=16))
    directory.close()


@pytest.mark.parametrize("source", ["state", "snapshot"])
@pytest.mark.parametrize("damage", ["rotten", *LOSSES])
def test_with_others_a_damaged_log_is_replaced(tmp_path: Path, source: str, damage: str) -> None:
    """The promises of the old log are broken: it goes on as another incarnation, with its data. Of
    a log that is gone nothing says what it had promised, so it is no better."""
    directory = lived(tmp_path, 30, others=[OTHER])
    snapshot_at(directory, 20)
    old = directory.identity
    if source == "snapshot":
        lose_power(directory)
    if damage == "rotten":
        rot(directory.log_path / "data.mdb")
    else:
        lose_log(directory, damage)
    directory = restarted(directory)
    applied = 30 if source == "state" else 20
    opened(directory, has(applied, applied, first=applied + 1))
    assert directory.identity.incarnation != old.incarnation
    evidence = directory.path / "log.damaged" / "data.mdb"
    assert evidence.exists() == (damage in ("rotten", "emptied"))
    again = directory.identity
    directory = restarted(directory)
    opened(directory, has(applied, applied, first=applied + 1))
    assert directory.identity == again
    directory.close()


def test_a_log_older_than_the_state_is_replaced(tmp_path: Path) -> None:
    """Somebody put back an old copy of the log: what it promised since cannot be known."""
    directory = lived(tmp_path, 9, others=[OTHER])
    copy = tmp_path / "copy"
    shutil.copytree(directory.log_path, copy)
    with (
        closing(LogStore(directory.log_path)) as log,
        closing(StateStore(directory.state_path())) as state,
    ):
        log.save(HardState(1, None, 10), [put(10)])
        state.apply([put(10)])
    shutil.rmtree(directory.log_path)
    copy.rename(directory.log_path)
    old = directory.identity.incarnation
    directory = restarted(directory)
    opened(directory, has(10, 10, first=11))
    assert directory.identity.incarnation != old
    directory.close()


def test_snapshots_of_others_are_put_aside(tmp_path: Path) -> None:
    """A file of another cluster, or one that is not what its name says, is never anybody's past."""
    other = lived(tmp_path / "other", 30)
    other.set_cluster_id("c-1")
    directory = lived(tmp_path / "this", 30, cluster_id="c-2")
    foreign = directory.snapshots_path / "snapshot-1-28.dsnap"
    renamed = directory.snapshots_path / "snapshot-1-29.dsnap"
    own = snapshot_at(directory, 20).path
    shutil.copy(snapshot_at(other, 28).path, foreign)
    shutil.copy(own, renamed)
    other.close()
    lose_power(directory)
    directory = restarted(directory)
    opened(directory, has(20, 30))
    assert list_files(directory.snapshots_path) == [own]
    directory.close()


def term_of(index: int, term: int, log_path: Path) -> None:
    """Put another history into the log from `index` on."""
    with closing(LogStore(log_path)) as log:
        log.save(HardState(term, None, 0), [put(index, term)])


@pytest.mark.parametrize("how", ["ends earlier", "another history"])
def test_a_log_older_than_a_snapshot_is_replaced(tmp_path: Path, how: str) -> None:
    """Power was lost, and the disk had not kept the end of the log. The state cannot be trusted,
    but a snapshot shows what was there: with others the node goes on from it under a new
    incarnation; alone it stops, as it would otherwise mix two histories."""
    for others in ([OTHER], []):
        root = tmp_path / str(len(others))
        directory = lived(root, 30, others=others)
        snapshot_at(directory, 25)
        if how == "ends earlier":
            shutil.rmtree(directory.log_path)
            lived(root / "old", 20, others=others, like=directory).close()
            shutil.move(root / "old" / "1" / "log", directory.log_path)
        else:
            term_of(24, 3, directory.log_path)
            term_of(25, 3, directory.log_path)
        lose_power(directory)
        old = me(directory)
        directory = restarted(directory)
        if others:
            opened(directory, has(25, 25, first=26))
            assert me(directory) != old
        else:
            with pytest.raises(DataCorruption, match=r"rolled back.*dengine repair"):
                open_stores(directory)
        directory.close()


def rolled_back(root: Path, others: Sequence[MemberId]) -> DataDirectory:
    """It had 30 entries and a snapshot of 25; its log ends at 20, and its state is lost."""
    directory = lived(root, 30, others=others)
    snapshot_at(directory, 25)
    shutil.rmtree(directory.log_path)
    lived(root / "old", 20, others=others, like=directory).close()
    shutil.move(root / "old" / "1" / "log", directory.log_path)
    lose_power(directory)
    return restarted(directory)


def flip_body(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-200] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("others", [(OTHER,), ()])
def test_a_refused_start_leaves_the_proof_for_the_next_one(
    tmp_path: Path, others: tuple[MemberId, ...]
) -> None:
    """The only snapshot that shows the rollback is damaged behind its header. There is nothing to
    go on from, so every start says so and changes nothing."""
    directory = rolled_back(tmp_path, others)
    (file,) = list_files(directory.snapshots_path)
    flip_body(file)
    for _ in range(3):
        with pytest.raises(DataCorruption, match="rolled back"):
            open_stores(directory)
        assert list_files(directory.snapshots_path) == [file]
        directory = restarted(directory)
    directory.close()


@pytest.mark.parametrize("fails", ["_write_identity", "adopt_state", "replace_log"])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_rolled_back_node_never_comes_back_under_its_old_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, damaged: bool
) -> None:
    """The start that goes on as a new incarnation ends at any step: the next one does as well,
    whether the newest snapshot can be used or only one before it."""
    directory = rolled_back(tmp_path, [OTHER])
    old = me(directory)
    if damaged:
        (newest,) = list_files(directory.snapshots_path)
        flip_body(newest)
        with closing(LogStore(directory.log_path)):
            pass
        snapshot_at(directory, 15)

    def full(*args: object) -> None:
        raise StorageIO("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(DataDirectory, fails, full)
        with pytest.raises(StorageIO):
            open_stores(directory)
    directory = restarted(directory)
    opened(directory, lambda stores: None)
    assert me(directory) != old
    directory.close()


class Crash(BaseException):
    """The process ends here, and nothing that it would have done after an error is done."""


DURABLE_STEPS = ("open", "fsync", "fdatasync", "replace", "rename", "unlink", "rmdir", "mkdir")


@contextmanager
def ends_at_step(number: int, end: BaseException) -> Iterator[list[str]]:
    """Raise `end` instead of carrying out the given step on the disk; what was reached."""
    reached: list[str] = []

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            reached.append(f"{name} {args[0]}")
            if len(reached) == number:
                raise end
            return real(*args, **options)

        return step

    with pytest.MonkeyPatch.context() as patched:
        for name in DURABLE_STEPS:
            patched.setattr(os, name, counting(name, getattr(os, name)))
        yield reached


def without_log(root: Path, how: str) -> DataDirectory:
    """It had 30 entries and a snapshot of 25. Its log is gone; the state is not, with 'emptied'."""
    directory = lived(root, 30, others=[OTHER])
    snapshot_at(directory, 25)
    if how != "emptied":
        lose_power(directory)
    lose_log(directory, how)
    return restarted(directory)


@pytest.mark.parametrize("end", [Crash(), OSError(errno.EIO, "Input/output error")])
@pytest.mark.parametrize("cause", ["rolled back", "lost", "emptied"])
def test_every_step_of_going_on_anew_may_be_the_last(
    tmp_path: Path, cause: str, end: BaseException
) -> None:
    """Whatever step a start with a rolled back log, or without one, dies at or fails at: the one
    after it goes on as a new incarnation, with what the state or the snapshot has, and leaves one
    state and nothing half-made."""
    reaches = 30 if cause == "emptied" else 25
    for number in itertools.count(1):
        root = tmp_path / str(number)
        rolled = cause == "rolled back"
        directory = rolled_back(root, [OTHER]) if rolled else without_log(root, cause)
        old = me(directory)
        with ends_at_step(number, end) as reached, suppress(type(end), StorageIO):
            opened(directory, lambda stores: None)
        if len(reached) < number:
            directory.close()
            break
        directory = restarted(directory)
        opened(directory, has(reaches, reaches, first=reaches + 1))
        assert me(directory) != old, reached[-1]
        left = {path.name for path in directory.path.iterdir()}
        known = {"LOCK", "identity.json", "CURRENT", "RUN", "log", "snapshots"}
        left.discard("log.damaged")  # once the state is in use, the old log is just emptied
        assert left == known | {directory.state_path().name}, reached[-1]
        directory.close()
    assert number > 20


def fetched(root: Path, target: DataDirectory) -> Path:
    """A snapshot up to entry 25, as another node's file lies here when all of it has come."""
    source = lived(root / "source", 30, others=[OTHER])
    made = snapshot_at(source, 25)
    source.close()
    target.snapshots_path.mkdir(exist_ok=True)
    file = fetched_path(target.snapshots_path, made.sha256)
    return Path(shutil.copy(made.path, file))


@pytest.mark.parametrize("crash_after", ["unpack", "adopt", "name", "reset", "running", "finish"])
def test_an_install_is_done_or_not(tmp_path: Path, crash_after: str) -> None:
    """A crash between any two steps leaves the old state or the new one, with its log. A log that
    begins behind the snapshot has it: a power cut right afterwards takes nothing away."""
    directory = lived(tmp_path / "target", 9, others=[OTHER])
    file = fetched(tmp_path, directory)
    path = directory.next_state_path()
    info = unpack(file, path, lambda done, total: None)
    log_id = info.header.log_id
    steps: dict[str, Callable[[], object]] = {
        "unpack": lambda: None,
        "adopt": lambda: directory.adopt_state(path),
        "name": lambda: name_durably(file, snapshot_name(log_id)),
        "reset": lambda: reset(directory, info.header.log_id),
        "running": directory.mark_running,
        "finish": directory.finish_install,
    }
    for name, step in steps.items():
        step()
        if name == crash_after:
            break
    directory = restarted(directory)
    for _ in range(2):
        if crash_after == "unpack":
            opened(directory, has(9, 9))
        else:
            opened(directory, has(25, 25, first=26))
        assert not directory.installing
        directory = restarted(directory)
        if crash_after != "unpack":
            lose_power(directory)
    assert len(list(directory.path.glob("state-*"))) == 1
    directory.close()


@pytest.mark.parametrize("file_is", ["gone", "cut", "rotten"])
def test_an_install_whose_file_is_lost_before_its_end_leaves_the_old_log(
    tmp_path: Path, file_is: str
) -> None:
    """Behind an entry that only the unsynced state holds, no log may begin."""
    directory = lived(tmp_path / "target", 9, others=[OTHER])
    file = fetched(tmp_path, directory)
    path = directory.next_state_path()
    unpack(file, path, lambda done, total: None)
    directory.adopt_state(path)
    if file_is == "gone":
        file.unlink()
    elif file_is == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        flip_body(file)
    old = me(directory)
    for _ in range(2):
        directory = restarted(directory)
        opened(directory, has(0, 9))
        lose_power(directory)
    assert me(directory) == old
    directory.close()


def test_the_name_of_a_finished_install_is_synced_before_the_log_is_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The crash may have come between the rename and its sync, which nothing on disk tells."""
    directory = lived(tmp_path / "target", 9, others=[OTHER])
    file = fetched(tmp_path, directory)
    path = directory.next_state_path()
    unpack(file, path, lambda done, total: None)
    directory.adopt_state(path)
    file.rename(file.with_name(snapshot_name(LogId(25, 1))))
    steps: list[object] = []
    real_reset, real_sync = LogStore.reset, recovery.sync_directory

    def reset_log(store: LogStore, *args: Any) -> None:
        steps.append("reset")
        real_reset(store, *args)

    def sync(path: Path) -> None:
        steps.append(path)
        real_sync(path)

    monkeypatch.setattr(LogStore, "reset", reset_log)
    monkeypatch.setattr(recovery, "sync_directory", sync)
    opened(directory, has(25, 25, first=26))
    assert steps.index(directory.snapshots_path) < steps.index("reset")
    directory.close()


def reset(directory: DataDirectory, base: LogId) -> None:
    with closing(LogStore(directory.log_path)) as log:
        log.reset(HardState(1, None, base.index), base, membership(me(directory), OTHER))


@pytest.mark.parametrize("crash_after", ["reincarnate", "new log", "aside", "in place"])
def test_a_log_is_replaced_or_not(tmp_path: Path, crash_after: str) -> None:
    """A crash between any two steps of the replacement ends in the same directory."""
    directory = lived(tmp_path, 30, others=[OTHER])
    rot(directory.log_path / "data.mdb")
    old = directory.identity.incarnation
    directory.reincarnate()
    new = directory.path / "log.new"
    if crash_after != "reincarnate":
        with closing(LogStore(new)) as log:
            log.reset(HardState(1, None, 30), LogId(30, 1), membership(MemberId(1, old), OTHER))
    if crash_after in ("aside", "in place"):
        os.rename(directory.log_path, directory.path / "log.damaged")
    if crash_after == "in place":
        os.rename(new, directory.log_path)
    directory = restarted(directory)
    for _ in range(2):
        opened(directory, has(30, 30, first=31))
        assert directory.identity.incarnation != old
        assert (directory.path / "log.damaged").exists()
        assert not new.exists()
        directory = restarted(directory)
    directory.close()


FIRST_TREE = 16 + 24  # in a meta page: where its description of the free pages' tree begins


def root_page(file: Path, tree: int) -> int:
    """The root of a tree, by where the meta page describes it."""
    content = file.read_bytes()
    metas = [content[:4096], content[4096:8192]]
    newest = max(metas, key=lambda meta: int.from_bytes(meta[136:144], "little"))
    return int.from_bytes(newest[tree + 40 : tree + 48], "little")


def keys_page(directory: Path) -> int:
    """The root of the tree that holds the keys of a state, as LMDB describes a named database."""
    with lmdb.open(str(directory), readonly=True, map_size=1 << 40) as state, state.begin() as txn:
        described = txn.get(b"keys")
        assert described is not None
        return int.from_bytes(described[40:48], "little")


def make_deadly(file: Path, page: int) -> None:
    """Damage a branch page of an LMDB file such that LMDB ends the process which reads it: one
    with a single child, which its assertions exclude."""
    with file.open("r+b") as stream:
        stream.seek(page * 4096 + 12)  # where its list of children ends
        stream.write((16 + 2).to_bytes(2, "little"))


def begins_after(stores: Stores, index: int) -> None:
    assert stores.log.first_index() == index + 1
    assert stores.state.applied.index == index


START = """
import sys
from pathlib import Path
from dengine.storage.directory import DataDirectory
from dengine.storage.recovery import open_stores

stores = open_stores(DataDirectory.open(Path(sys.argv[1]), 1))
"""
READ_ALL = 'stores.state.page(b"", None, 1000, False)'


@pytest.mark.parametrize("others", [(OTHER,), ()])
def test_a_log_that_ends_its_reader_is_damage_for_the_next_start(
    tmp_path: Path, others: tuple[MemberId, ...]
) -> None:
    """LMDB aborts the process over some damage. The next start has another process read the log,
    and then does what it does for any damage: go on anew with other voters, else stop."""
    directory = lived(tmp_path, 400, others=others)
    directory.close()
    file = directory.log_path / "data.mdb"
    make_deadly(file, root_page(file, FIRST_TREE + 48))
    start = [sys.executable, "-c", START, str(tmp_path)]
    assert subprocess.run(start, capture_output=True, check=False).returncode == -signal.SIGABRT

    again = DataDirectory.open(tmp_path, 1)
    if others:
        opened(again, lambda stores: begins_after(stores, 400))
        assert me(again) != me(directory)
        assert (again.path / "log.damaged").exists()
    else:
        with pytest.raises(DataCorruption, match=r"LMDB cannot read it.*dengine repair"):
            open_stores(again)
    assert again.died_opening == (not others), "a log that stays is read with care again"
    again.close()


def test_a_state_that_ends_its_reader_is_built_again(tmp_path: Path) -> None:
    """LMDB aborts the node whenever somebody asks for a certain key. After the second time in a
    row another process reads the state first, and what is damaged is built again from the log."""
    directory = lived(tmp_path, 400)
    directory.mark_running()
    directory.close()
    make_deadly(directory.state_path() / "data.mdb", keys_page(directory.state_path()))
    start = [sys.executable, "-c", START + READ_ALL, str(tmp_path)]
    ends = [subprocess.run(start, capture_output=True, check=False).returncode for _ in range(3)]
    assert ends == [-signal.SIGABRT, 0, 0], "the kill before was the first of the row"
    assert DataDirectory.open(tmp_path, 1).state_path().name == "state-2"


def test_a_row_of_kills_costs_a_sound_state_nothing(tmp_path: Path) -> None:
    """It is read through, kept, and the row begins anew."""
    directory = lived(tmp_path, 9)
    for number in (1, 2, 1, 2):
        directory = restarted(directory)
        assert directory.unclean_ends() == number
        opened(directory, has(9, 9))
    assert directory.state_path().name == "state-1"
    directory.mark_clean()
    assert directory.unclean_ends() == 0
    directory.close()


def test_a_missing_state_is_built_again(tmp_path: Path) -> None:
    """As one that cannot be trusted; nothing else is thrown away for it before."""
    directory = lived(tmp_path, 9)
    shutil.copytree(directory.state_path(), directory.path / "state-7")
    shutil.rmtree(directory.state_path())
    directory = restarted(directory)
    assert (directory.path / "state-7").exists()
    opened(directory, has(0, 9))
    opened(directory, has(9, 9))
    directory.close()


def test_without_current_no_state_goes_before_another_is_sound(tmp_path: Path) -> None:
    """Nothing says which state is in use, the only snapshot is damaged, and the log has no
    beginning: alone the node stops, each time, and what a repair could use stays."""
    directory = lived(tmp_path, 30)
    flip_body(snapshot_at(directory, 25).path)
    purge(directory, 20)
    (directory.path / "CURRENT").unlink()
    for _ in range(3):
        directory = restarted(directory)
        with pytest.raises(DataCorruption, match="dengine repair"):
            open_stores(directory)
        assert (directory.path / "state-1" / "data.mdb").exists()
    directory.close()


def test_a_failed_sync_of_the_state_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel drops the pages that it could not write: a later sync would succeed, and CLEAN
    would vouch for what is not there. The next start builds the state again."""
    directory = lived(tmp_path, 9)
    state = StateStore(directory.state_path())

    class Failing:
        def sync(self, force: bool) -> None:
            raise lmdb.DiskError("Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(state, "_environment", Failing())
        with pytest.raises(StorageIO):
            state.sync()
    state.close()
    directory = restarted(directory)
    assert not directory.trusted_state()
    opened(directory, has(0, 9))
    directory.close()


def test_marks_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    directory = lived(tmp_path, 9)
    (directory.path / "CLEAN").mkdir()
    with pytest.raises(StorageIO, match=r"cannot read .*CLEAN"):
        open_stores(directory)
    directory.close()


def test_a_reader_that_is_killed_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody stops the process that reads a suspected log: the node tries again another time."""
    directory = lived(tmp_path / "db", 30, others=[OTHER])
    (directory.path / "OPENING").touch()
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -KILL $$\n")
    killed.chmod(0o700)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(killed))
        with pytest.raises(TryAgain):
            open_stores(directory)
    assert directory.died_opening
    old = me(directory)
    opened(directory, has(30, 30))
    assert me(directory) == old
    assert not directory.died_opening
    directory.close()


def test_a_blank_directory_takes_nothing_from_a_snapshot_that_lies_in_it(tmp_path: Path) -> None:
    """A node that belongs to no cluster yet has no past."""
    source = lived(tmp_path / "source", 30, others=[OTHER])
    file = snapshot_at(source, 25).path
    source.close()
    directory = DataDirectory.open(tmp_path / "blank", 1)
    directory.snapshots_path.mkdir()
    shutil.copy(file, directory.snapshots_path)
    old = me(directory)
    opened(directory, has(0, 0))
    assert me(directory) == old
    lose_log(directory, "emptied")
    with pytest.raises(DataCorruption, match="is missing or empty"):
        open_stores(directory)
    assert me(directory) == old
    directory.close()


def test_an_install_whose_state_is_damaged_before_its_end_leaves_no_trace(tmp_path: Path) -> None:
    """CURRENT names the unpacked state and the file has its name, then power is lost and the state
    is rotten: the old log goes on, and its node with it."""
    source = lived(tmp_path / "source", 30, others=[OTHER])
    file = snapshot_at(source, 25).path
    source.close()
    directory = lived(tmp_path / "target", 9, others=[OTHER])
    path = directory.next_state_path()
    unpack(file, path, lambda done, total: None)
    directory.adopt_state(path)
    directory.snapshots_path.mkdir(exist_ok=True)
    shutil.copy(file, directory.snapshots_path)
    (path / "data.mdb").write_bytes(b"rotten" * 4096)
    old = me(directory)
    for _ in range(2):
        directory = restarted(directory)
        opened(directory, has(0, 9))
        lose_power(directory)
    assert me(directory) == old
    assert list_files(directory.snapshots_path) == []
    directory.close()


def test_a_log_that_can_only_not_be_written_is_damage_for_the_next_start(tmp_path: Path) -> None:
    """Where LMDB's list of free pages is damaged every entry can be read, so no start finds it:
    the write that did is remembered, or the node would start and stop for ever."""
    directory = lived(tmp_path, 400, others=(OTHER,))
    purge(directory, 300)
    file = directory.log_path / "data.mdb"
    with file.open("r+b") as stream:
        stream.seek(root_page(file, FIRST_TREE) * 4096)
        stream.write(bytes(4096))
    directory = restarted(directory)
    stores = open_stores(directory)
    with pytest.raises(DataCorruption) as caught:
        stores.log.save(HardState(2, None, 400), ())
    stores.state.close()
    stores.log.close()
    alone = after_damage(caught.value, directory, membership(me(directory)))
    assert isinstance(alone, DataCorruption)
    assert "dengine repair" in alone.message
    error = after_damage(caught.value, directory, membership(me(directory), OTHER))
    assert isinstance(error, StorageIO)
    incarnation = me(directory)
    directory = restarted(directory)
    opened(directory, lambda stores: begins_after(stores, 400))
    assert me(directory) != incarnation
    opened(directory, lambda stores: stores.log.save(HardState(2, None, 400), ()))
    directory.close()


@pytest.mark.parametrize("term", [1, 7])
def test_what_was_promised_outlives_an_interrupted_install(tmp_path: Path, term: int) -> None:
    """Else a voter could vote twice in one term."""
    directory = lived(tmp_path / "target", 9, others=[OTHER])
    file = fetched(tmp_path, directory)
    with closing(LogStore(directory.log_path)) as log:
        log.save(HardState(term, OTHER, 9), [])
    path = directory.next_state_path()
    unpack(file, path, lambda done, total: None)
    directory.adopt_state(path)  # the crash comes here
    directory = restarted(directory)
    kept: list[HardState] = []
    opened(directory, lambda stores: kept.append(stores.log.load()[0]))
    directory.close()
    assert [(hard.term, hard.voted_for) for hard in kept] == [(term, OTHER)]
