"""When a node takes a snapshot, what ends one, and what becomes of a state that came or went.

The subprocess, the state and the files are real; Raft and the leader say what the test wants.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dengine import config
from dengine.errors import (
    ClusterUnavailable,
    DataCorruption,
    FatalError,
    NotLeader,
    StorageIO,
    TryAgain,
)
from dengine.kv.commands import Put
from dengine.node import installing, reader_watch, writer_process
from dengine.node import snapshots as snapshots_module
from dengine.node.cycle import Cycle
from dengine.node.node import Node
from dengine.node.snapshots import Snapshots
from dengine.node.writer_process import WriterProcess
from dengine.raft.membership import Membership
from dengine.raft.raft import Raft, Ready, Restore
from dengine.raft.types import HardState, LogId, MemberId, SnapshotRef
from dengine.security import Secrets
from dengine.storage.directory import DataDirectory
from dengine.storage.log_store import LogStore
from dengine.storage.snapshot_file import SnapshotInfo
from dengine.storage.snapshot_jobs import Check, Done, Fetch, Job, Take, Unpack, Verify
from dengine.storage.snapshots import make_empty_state, unpack
from dengine.storage.state_store import StateStore
from tests.node.hosts import on_loop, until
from tests.storage.states import commands, history, me, membership, snapshot_of

ENTRIES = 20
SENDER = MemberId(2, 22)
TEXT = """
[cluster]
node_id = 1
db_root_dir = "{root}"
listen_address = "127.0.0.1:1"
initial_cluster = [{{ id = 1, address = "127.0.0.1:1", role = 2, status = 2 }}]
"""


async def addresses_of(member: MemberId) -> list[str]:
    return ["127.0.0.1:1"]


class Stage:
    """The snapshots of a node that has applied a few entries.

    Attributes:
        answers: what the leader says to whoever asks for the turn; None when there is none.
        asked: for how many ms the turn was asked.
    """

    def __init__(self, path: Path, extra: str = "") -> None:
        file = path / "n1.toml"
        file.write_text(TEXT.format(root=path / "db") + extra)
        self.directory = DataDirectory.open(path / "db", 1)
        content = membership(me(self.directory))
        self.directory.set_cluster_id(content.cluster_id)
        self.state = StateStore(self.directory.state_path())
        self.state.apply(history(content, ENTRIES))
        self.log_store = LogStore(self.directory.log_path)
        log = SimpleNamespace(base=LogId(0, 0), applied_index=ENTRIES, commit_index=ENTRIES)
        self.raft: Any = SimpleNamespace(
            me=me(self.directory),
            membership=content,
            log=log,
            state_lost=False,
            snapshot_wanted=False,
            offered_snapshots=dict,
            helped_by_snapshots=dict,
            snapshots_changed=lambda refs: None,
            forget_state=lambda: None,
            distrust_state=lambda: self.fenced.append("raft"),
            restore=lambda log_id, content: False,
            snapshot_helps=lambda log_id: True,
        )
        self.answers: bool | None = True
        self.asked: list[int] = []
        self.failed: list[BaseException] = []
        self.fenced: list[str] = []  # who was told that the state is wrong
        self.config = config.read(file, {})

    @asynccontextmanager
    async def running(self, takers: int = 0) -> AsyncIterator[Snapshots]:
        """The task at work; so many have asked for a snapshot before anything else happens."""
        cycle = SimpleNamespace(
            raft=self.raft,
            act=self.act,
            post=lambda action: action(),
            proposals=SimpleNamespace(distrusted=lambda: self.fenced.append("proposals")),
            fail=self.failed.append,
        )
        snapshots = Snapshots(
            self.config,
            self.directory,
            cast(Cycle, cycle),
            self.log_store,
            self.state,
            lead=self.lead,
            source=addresses_of,
            secrets=Secrets(),
            distrusted=lambda: None,
        )
        self.taking = [asyncio.create_task(snapshots.take(deadline())) for _ in range(takers)]
        snapshots.start()
        try:
            yield snapshots
        finally:
            await snapshots.stop()
            self.state.close()
            self.log_store.close()
            self.directory.close()
        assert not self.failed

    async def lead(self, op: str, args: dict[str, Any], deadline: float) -> dict[str, Any]:
        assert (op, args["id"]) == ("snapshot_turn", 1)
        self.asked.append(args["for_ms"])
        if self.answers is None:
            raise NotLeader("nobody leads")
        return {"granted": self.answers}

    async def act(self, action: Callable[[Raft], Any]) -> Any:
        return action(self.raft)

    def apply(self, size: int = 100) -> None:
        """One more entry, with a value of that size."""
        index = self.state.applied.index + 1
        self.state.apply([commands(index, Put(b"more%d" % index, b"x" * size))])
        self.raft.log.applied_index = self.raft.log.commit_index = index

    def snapshot(self) -> SnapshotInfo:
        """A file of what is applied, made by hand: LMDB opens nothing twice in one process."""
        copy = self.directory.path.parent / "copy"
        shutil.copytree(self.state.path, copy)
        return snapshot_of(copy, self.directory.snapshots_path)

    @property
    def files(self) -> list[str]:
        return sorted(file.name for file in self.directory.snapshots_path.glob("*"))


def deadline() -> float:
    return asyncio.get_running_loop().time() + 20


# --- when ------------------------------------------------------------------------------------


def test_a_purged_log_without_a_file_cannot_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When what was there has rotted, nothing could build the state again: one is taken as soon as
    it is this member's turn, long before so many entries have come; and then no further one."""
    stage = Stage(tmp_path)
    stage.answers = False
    looked: list[bool] = []
    may_take = Snapshots._may_take

    async def record(snapshots: Snapshots) -> bool:
        looked.append(await may_take(snapshots))
        return looked[-1]

    monkeypatch.setattr(Snapshots, "_may_take", record)

    async def test() -> None:
        rotten = stage.directory.snapshots_path / "snapshot-1-19.dsnap"
        rotten.parent.mkdir()
        rotten.write_text("no snapshot any more")
        stage.raft.log.base = LogId(19, 1)
        async with stage.running() as snapshots:
            await until(lambda: len(stage.asked) > 1, "the turn to be asked for again")
            assert stage.files == ["snapshot-1-19.dsnap.damaged"]
            stage.answers = True
            await until(lambda: snapshots.files.refs, "a snapshot")
            assert snapshots.files.refs[0].index == ENTRIES
            stage.apply()
            looked.clear()
            await until(lambda: len(looked) > 1, "it to be looked for something to do")
            assert (snapshots.taken, any(looked)) == (1, False)

    on_loop(test)


def test_an_older_file_that_does_not_reach_the_log_is_none(tmp_path: Path) -> None:
    """A sound file that ends before the log begins leaves a gap."""
    stage = Stage(tmp_path)
    old = stage.snapshot()
    for _ in range(10):
        stage.apply()

    async def test() -> None:
        stage.raft.log.base = LogId(ENTRIES + 1, 1)
        async with stage.running() as snapshots:
            await until(lambda: len(snapshots.files.refs) == 2, "a snapshot that reaches it")
            assert snapshots.files.refs[0] == old.ref

    on_loop(test)


def test_one_that_was_asked_for_waits_for_its_turn(tmp_path: Path) -> None:
    """Two members do not write at once, whoever asked; the turn ends with the snapshot."""
    stage = Stage(tmp_path)
    stage.answers = False

    async def test() -> None:
        async with stage.running(takers=1) as snapshots:
            await until(lambda: len(stage.asked) > 1, "the turn to be asked for again")
            assert stage.files == []
            stage.answers = True
            assert (await stage.taking[0]).index == ENTRIES
            assert stage.asked[-1] == 0
            assert await snapshots.take(deadline()) == snapshots.files.newest
            assert snapshots.taken == 1

    on_loop(test)


def test_without_a_leader_one_that_was_asked_for_does_not_wait(tmp_path: Path) -> None:
    """It may be the last chance of a backup, and nothing else is written."""
    stage = Stage(tmp_path)
    stage.answers = None

    async def test() -> None:
        async with stage.running(takers=1):
            assert (await stage.taking[0]).index == ENTRIES

    on_loop(test)


def test_who_asks_at_once_shares_one_file(tmp_path: Path) -> None:
    """Also while one is under way, for that has everything as well."""
    stage = Stage(tmp_path)

    async def test() -> None:
        async with stage.running(takers=3) as snapshots:
            await until(lambda: snapshots.job.startswith("taking"), "the work to begin")
            later = [asyncio.create_task(snapshots.take(deadline())) for _ in range(2)]
            refs = await asyncio.gather(*stage.taking, *later)
            assert len(set(refs)) == 1
            assert (snapshots.taken, stage.files) == (1, [f"snapshot-1-{ENTRIES}.dsnap"])

    on_loop(test)


# --- what ends one ---------------------------------------------------------------------------


def stand_still(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """In place of the writer, a process that stops before it has said anything."""
    program = path / "writer"
    program.write_text("#!/bin/sh\ncat > /dev/null\nkill -STOP $$\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(writer_process, "WATCH_S", 0.01)


@pytest.mark.parametrize("job", ["take", "check"])
@pytest.mark.parametrize("cause", ["growth", "age"])
def test_a_reader_that_costs_too_much_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, cause: str
) -> None:
    """Whatever it reads the state for: when that grows too much meanwhile, or it takes too long,
    the process is killed and the job is tried again later."""
    stand_still(monkeypatch, tmp_path)
    if cause == "growth":
        monkeypatch.setattr(reader_watch, "GROWTH_BYTES_MIN", 0)
    else:
        monkeypatch.setattr(reader_watch, "AGE_S_MIN", 0.1)
    stage = Stage(tmp_path)
    pids: set[int] = set()

    async def test() -> None:
        async with stage.running(takers=int(job == "take")) as snapshots:

            def ended() -> bool:
                pids.update({snapshots._writer.pid} - {None})
                if cause == "growth":
                    stage.apply(10_000)
                return snapshots.failures > 0

            await until(ended, "the job to be ended")
            assert snapshots.last_error is not None
            expected = "the state grew by" if cause == "growth" else "was not read within"
            assert expected in snapshots.last_error
            if job == "take":
                with pytest.raises(ClusterUnavailable, match=expected):
                    await stage.taking[0]
            assert stage.files == []
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert pids

    on_loop(test)


def test_a_snapshot_leaves_room_for_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that is nearly full none is taken, and none is begun."""
    stage = Stage(tmp_path, "[limits]\nreserve_bytes = 1000000\n")
    enough = stage.state.used_bytes() + 1_000_000
    free = enough - 1
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=free, f_frsize=1))

    async def test() -> None:
        nonlocal free
        async with stage.running() as snapshots:
            with pytest.raises(ClusterUnavailable, match="reserve_bytes"):
                await snapshots.take(deadline())
            assert stage.files == []
            free = enough
            assert (await snapshots.take(deadline())).index == ENTRIES

    on_loop(test)


class Spoiler:
    """Has jobs of one kind end with an error; all others are carried out.

    Attributes:
        begun: the kinds of jobs that were begun.
        error: what ends those of `kind`; None lets them be.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, kind: type[Job], error: FatalError | None
    ) -> None:
        self.begun: list[type[Job]] = []
        self.error = error
        run = WriterProcess.run

        async def spoiled(writer: WriterProcess, job: Job, *args: Any, **more: Any) -> Done:
            self.begun.append(type(job))
            if self.error is not None and isinstance(job, kind):
                raise self.error
            return await run(writer, job, *args, **more)

        monkeypatch.setattr(WriterProcess, "run", spoiled)


@pytest.mark.parametrize("error", [TryAgain("it was killed"), StorageIO("no descriptors")])
def test_a_file_that_cannot_be_verified_blocks_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: FatalError
) -> None:
    """However often that is aborted: snapshots are taken and the state is checked meanwhile, and
    the file counts as soon as it has been read."""
    monkeypatch.setattr(snapshots_module, "RETRY_S_MIN", 0.05)
    spoiler = Spoiler(monkeypatch, Verify, error)
    stage = Stage(tmp_path)
    old = stage.snapshot()
    stage.apply()

    async def test() -> None:
        async with stage.running() as snapshots:
            await until(lambda: Check in spoiler.begun, "the state to be checked")
            assert (await snapshots.take(deadline())).index == ENTRIES + 1
            spoiler.error = None
            await until(lambda: len(snapshots.files.refs) == 2, "the old file to be verified")
            assert snapshots.files.refs[0] == old.ref
            assert spoiler.begun.count(Verify) > 1

    on_loop(test)


def test_a_file_that_is_gone_is_not_relied_on(tmp_path: Path) -> None:
    """Somebody removed it: who was to be sent it has it looked at, and nobody is offered it."""
    stage = Stage(tmp_path)
    old = stage.snapshot()

    async def test() -> None:
        async with stage.running() as snapshots:
            await until(lambda: snapshots.files.refs, "the file to be verified")
            old.path.unlink()
            snapshots.suspect(old.ref)
            await until(lambda: not snapshots.files.refs, "it to be forgotten")

    on_loop(test)


# --- states that come and go ------------------------------------------------------------------


def test_a_fetched_file_that_raft_declines_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log goes beyond it by now; only what is installed gets a name."""
    stage = Stage(tmp_path)

    async def test() -> None:
        info = stage.snapshot()
        unpacked = stage.directory.next_state_path()
        partial = info.path.with_name(f"fetch-{info.sha256}.partial")

        async def fetched(*_: object) -> Done:
            shutil.copytree(stage.directory.state_path(), unpacked)
            shutil.copy(info.path, partial)
            return Done(str(partial), info.ref, info.header.taken_at_s)

        async with stage.running() as snapshots:
            await until(lambda: snapshots.files.refs, "the file to be verified")
            monkeypatch.setattr(WriterProcess, "run", lambda self, *args: fetched(*args))
            await snapshots.installer.fetch(SENDER, info.ref)
            assert list(snapshots.files.refs) == [info.ref]
            assert not partial.exists()
            assert not unpacked.exists()

    on_loop(test)


def test_a_node_that_stops_within_an_install_names_the_file_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk stood still: the task that asked for it is gone when the thread comes to write. A
    log must not begin behind a file without a name."""
    stage = Stage(tmp_path)
    stage.raft.restore = lambda log_id, content: True

    async def test() -> None:
        info = stage.snapshot()
        partial = info.path.with_name(f"fetch-{info.sha256}.partial")

        async def fetched(*_: object) -> Done:
            shutil.copytree(stage.directory.state_path(), stage.directory.next_state_path())
            info.path.rename(partial)
            return Done(str(partial), info.ref, info.header.taken_at_s)

        async with stage.running() as snapshots:
            await until(lambda: snapshots.files.refs, "the file to be verified")
            monkeypatch.setattr(WriterProcess, "run", lambda self, *args: fetched(*args))
            installer = snapshots.installer
            fetching = asyncio.create_task(installer.fetch(SENDER, info.ref))
            await until(lambda: installer.is_busy_with(MemberId(9, 9), info.ref), "the install")
            fetching.cancel()
            await asyncio.wait([fetching])
            restore = Restore(info.ref.log_id, stage.raft.membership, reset_log=True)
            hard_state = HardState(term=info.ref.term)
            ready = SimpleNamespace(snapshot=restore, hard_state=hard_state)
            await asyncio.to_thread(installer.persist, cast(Ready, ready))
            assert info.path.exists()
            assert not partial.exists()

    on_loop(test)


def test_a_state_is_thrown_away_beside_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node goes on with an empty one at once; removing a large one may take seconds."""
    stage = Stage(tmp_path)
    old = stage.directory.state_path()
    removed: list[tuple[bool, bool]] = []
    rmtree = shutil.rmtree

    def record(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            on_the_loop = threading.current_thread() is threading.main_thread()
            removed.append((on_the_loop, stage.directory.state_path() == path))
        rmtree(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", record)

    async def test() -> None:
        async with stage.running() as snapshots:
            snapshots.distrust("it differs", files_too=True)
            await until(lambda: not old.exists(), "the old state to be gone")
            assert removed == [(False, False)], "beside the loop, and not in use any more"
            assert stage.state.path == stage.directory.state_path() != old
            assert stage.state.applied == LogId(0, 0)
            assert snapshots.installer.forgotten_at == ENTRIES

    on_loop(test)


def test_wrong_files_go_before_the_state_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a crash leaves of it, no start takes a wrong file for the state; also one that was
    not verified yet is such a file."""
    stage = Stage(tmp_path)
    stage.snapshot()
    seen: list[list[str]] = []
    adopt_state = DataDirectory.adopt_state

    def adopt(directory: DataDirectory, path: Path) -> None:
        seen.append(stage.files)
        adopt_state(directory, path)

    monkeypatch.setattr(DataDirectory, "adopt_state", adopt)

    async def test() -> None:
        async with stage.running() as snapshots:
            snapshots.distrust("it differs", files_too=True)
            await until(lambda: stage.state.applied == LogId(0, 0), "the state to be gone")
        assert seen == [[f"snapshot-1-{ENTRIES}.dsnap.damaged"]]
        assert snapshots.files.refs == []

    on_loop(test)


def test_a_verdict_holds_though_the_disk_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the verdict on the node does not lead, tells no result, offers no file and sends no
    more of one; and a start that came now would believe neither the state nor the files."""
    stage = Stage(tmp_path)
    stage.snapshot()

    def refuse(*_: object) -> None:
        raise StorageIO("the disk refuses")

    monkeypatch.setattr(installing, "put_all_aside", refuse)

    async def test() -> None:
        async with stage.running() as snapshots:
            await until(lambda: snapshots.files.refs, "the file to be verified")
            (ref,) = snapshots.files.refs
            snapshots.distrust("it differs", files_too=True)
            assert stage.fenced == ["raft", "proposals"]
            assert snapshots.files.refs == []
            assert snapshots.files.is_distrusted(ref)
            with pytest.raises(ClusterUnavailable, match="it differs"):
                snapshots.require_trusted()
            await until(lambda: snapshots.last_error == "the disk refuses", "an attempt")
            assert not stage.directory.trusted_state()
            assert stage.directory.distrusts_files
            monkeypatch.undo()
            await until(lambda: stage.state.applied == LogId(0, 0), "the state to be gone")
            snapshots.require_trusted()

    on_loop(test)


class Lost:
    """A stage whose state is lost when it is thrown away, for its log begins after entry 10; what
    Raft is told to restore gets installed."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.snapshots: Snapshots | None = None
        stage.raft.log.base = LogId(10, 1)
        stage.raft.forget_state = self.forget_state
        stage.raft.restore = self.restore

    def forget_state(self) -> None:
        self.stage.raft.state_lost = True

    def restore(self, log_id: LogId, content: Membership) -> bool:
        asyncio.get_running_loop().call_soon(self.install, Restore(log_id, content, False))
        return True

    def install(self, restore: Restore) -> None:
        assert self.snapshots is not None
        self.stage.directory.adopt_state(self.stage.directory.next_state_path())
        self.stage.directory.finish_install()
        self.stage.raft.state_lost = False
        self.snapshots.restored(restore)

    @property
    def states(self) -> set[str]:
        return {path.name for path in self.stage.directory.path.glob("state-*")}


@pytest.mark.parametrize("error", [TryAgain("it was killed"), StorageIO("the disk is full")])
def test_a_rebuild_that_was_interrupted_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: FatalError
) -> None:
    """A node alone has nobody else to turn to: it tries its own file again until it is unpacked,
    and nothing is left of the attempts."""
    spoiler = Spoiler(monkeypatch, Unpack, error)
    stage = Stage(tmp_path)
    stage.snapshot()
    lost = Lost(stage)

    async def test() -> None:
        async with stage.running() as snapshots:
            lost.snapshots = snapshots
            await until(lambda: snapshots.files.refs, "the file to be verified")
            next_path = DataDirectory.next_state_path

            def half_made(directory: DataDirectory) -> Path:
                path = next_path(directory)
                if stage.raft.state_lost and spoiler.error is not None:
                    path.mkdir(exist_ok=True)
                return path

            monkeypatch.setattr(DataDirectory, "next_state_path", half_made)
            snapshots.distrust("it is damaged", files_too=False)
            await until(lambda: spoiler.begun.count(Unpack) > 1, "another attempt")
            await until(lambda: lost.states == {stage.state.path.name}, "its rest to be removed")
            assert stage.raft.state_lost
            spoiler.error = None
            await until(lambda: not stage.raft.state_lost, "the state to be there again")
            assert stage.state.applied == LogId(ENTRIES, 1)
            assert lost.states == {stage.state.path.name}

    on_loop(test)


def test_a_node_alone_without_any_file_ends(tmp_path: Path) -> None:
    """After the last of its own has turned out to be damaged nothing can be waited for."""
    stage = Stage(tmp_path)
    made = stage.snapshot()
    lost = Lost(stage)

    async def test() -> None:
        async with stage.running() as snapshots:
            lost.snapshots = snapshots
            await until(lambda: snapshots.files.refs, "the file to be verified")
            made.path.write_bytes(made.path.read_bytes()[:-1])
            snapshots.distrust("it is damaged", files_too=False)
            await until(lambda: stage.failed, "the node to be ended")
            error = stage.failed.pop()
            assert isinstance(error, DataCorruption)
            assert error.message.startswith("it is damaged; no snapshot of this node")
            assert stage.files == [f"{made.path.name}.damaged"]
        stage.failed.clear()

    on_loop(test)


def test_a_file_that_is_here_is_unpacked_before_another_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader's offer does not end that, and is not taken up when it is not needed any more."""
    spoiler = Spoiler(monkeypatch, Unpack, None)
    stage = Stage(tmp_path)
    stage.snapshot()
    lost = Lost(stage)
    stage.raft.snapshot_helps = lambda log_id: stage.raft.state_lost

    async def test() -> None:
        async with stage.running() as snapshots:
            lost.snapshots = snapshots
            await until(lambda: snapshots.files.refs, "the file to be verified")
            snapshots.distrust("it is damaged", files_too=False)
            await until(lambda: Unpack in spoiler.begun, "the unpacking to begin")
            snapshots.offered(SENDER, SnapshotRef(99, 1, "c" * 64, 100))
            await until(lambda: stage.state.applied.index, "the state to be there again")
            await until(lambda: snapshots._wanted.fetch is None, "the offer to be looked at")
            await snapshots.take(deadline())  # comes after it
            assert Fetch not in spoiler.begun
            assert spoiler.begun.count(Unpack) == 1

    on_loop(test)


def test_a_state_that_turns_out_to_be_wrong_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that is heard of while the leader is asked for the turn, when there is nothing to
    end yet; and from that moment nobody reads it."""
    spoiler = Spoiler(monkeypatch, Take, None)
    stage = Stage(tmp_path)
    granted = asyncio.Event()
    asked: list[bool] = []
    lead = stage.lead

    async def slow(op: str, args: dict[str, Any], deadline: float) -> dict[str, Any]:
        if args["for_ms"]:
            asked.append(True)
            await granted.wait()
        return await lead(op, args, deadline)

    monkeypatch.setattr(stage, "lead", slow)

    async def test() -> None:
        async with stage.running(takers=1) as snapshots:
            await until(lambda: asked, "the turn to be asked for")
            snapshots.require_trusted()
            snapshots.distrust("it differs", files_too=False)
            with pytest.raises(ClusterUnavailable, match="it differs"):
                snapshots.require_trusted()
            granted.set()
            await until(lambda: stage.state.applied == LogId(0, 0), "the state to be gone")
            await until(lambda: snapshots._wanted.distrust is None, "the end of that")
            snapshots.require_trusted()
            assert Take not in spoiler.begun
            with pytest.raises(ClusterUnavailable):
                await stage.taking[0]  # nothing is applied any more

    on_loop(test)


def test_a_wrong_state_goes_before_anything_else_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk refuses that for now, it is tried again, and the state is neither read nor
    written to a file meanwhile."""
    spoiler = Spoiler(monkeypatch, Take, None)
    stage = Stage(tmp_path)
    full, tried = True, 0

    def make(path: Path) -> None:
        nonlocal tried
        tried += 1
        if full:
            raise StorageIO("the disk is full")
        make_empty_state(path)

    monkeypatch.setattr(installing, "make_empty_state", make)

    async def test() -> None:
        nonlocal full
        async with stage.running() as snapshots:
            snapshots.distrust("it differs", files_too=False)
            taking = asyncio.create_task(snapshots.take(deadline()))
            await until(lambda: tried > 1, "another attempt")
            with pytest.raises(ClusterUnavailable, match="it differs"):
                snapshots.require_trusted()
            assert spoiler.begun == []
            full = False
            await until(lambda: stage.state.applied == LogId(0, 0), "the state to be gone")
            with pytest.raises(ClusterUnavailable):
                await taking

    on_loop(test)


def test_a_state_that_has_just_come_from_the_leader_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said of the one before is not about it; but our own files are not believed."""
    stage = Stage(tmp_path)
    lost = Lost(stage)
    own = stage.snapshot()
    sent = stage.directory.path.parent / "sent"

    async def fetched(job: Fetch) -> Done:
        info = unpack(own.path, Path(job.state), lambda done, total: None)
        partial = own.path.with_name("fetch-sent.partial")
        shutil.copy(own.path, partial)
        return Done(str(partial), info.ref, info.header.taken_at_s)

    async def test() -> None:
        async with stage.running() as snapshots:
            lost.snapshots = snapshots
            await until(lambda: snapshots.files.refs, "the file to be verified")
            shutil.copytree(stage.directory.snapshots_path, sent)
            old, run = stage.state.path, WriterProcess.run

            def restore(log_id: LogId, content: Membership) -> bool:
                snapshots.distrust("it differs", files_too=True)
                own.path.rename(own.path.with_name("snapshot-1-7.dsnap"))
                shutil.copy(sent / own.path.name, own.path)  # as the durable part names it
                return lost.restore(log_id, content)

            async def with_fetch(self: WriterProcess, job: Job, *args: Any, **more: Any) -> Done:
                if isinstance(job, Fetch):
                    return await fetched(job)
                return await run(self, job, *args, **more)

            monkeypatch.setattr(WriterProcess, "run", with_fetch)
            stage.raft.restore = restore
            snapshots.offered(SENDER, own.ref)
            await until(lambda: stage.state.path != old, "the state to be replaced")
            await until(lambda: snapshots._wanted.distrust is None, "that to be looked at")
            assert stage.state.applied == LogId(ENTRIES, 1)
            assert "snapshot-1-7.dsnap.damaged" in stage.files
            assert own.path.name in stage.files
            assert snapshots.files.refs == [own.ref]

    on_loop(test)


@pytest.mark.parametrize("consistency", ["eventual", "linearizable"])
def test_a_state_that_is_known_to_be_wrong_is_not_read(consistency: str) -> None:
    """Neither by who comes then, nor by who has waited for the leader's word meanwhile."""
    refused: list[str] = []
    waiting: list[asyncio.Future[None]] = []

    def require_trusted() -> None:
        if refused:
            raise ClusterUnavailable(refused[0])

    node: Any = SimpleNamespace(
        snapshots=SimpleNamespace(
            require_trusted=require_trusted, installer=SimpleNamespace(forgotten_at=0)
        ),
        raft=SimpleNamespace(log=SimpleNamespace(applied_index=5), leader=SENDER),
        _announce_above=0,
        _reads=SimpleNamespace(add=lambda future, deadline, lease: waiting.append(future)),
        _cycle=SimpleNamespace(wake=lambda: None),
    )

    async def test() -> None:
        node._loop = asyncio.get_running_loop()
        early = asyncio.create_task(Node.read_barrier(node, consistency, deadline()))
        await until(lambda: waiting or early.done(), "the read to be served, or to wait")
        refused.append("it differs")
        if consistency == "eventual":
            await early
        else:
            waiting[0].set_result(None)
            with pytest.raises(ClusterUnavailable):
                await early
        with pytest.raises(ClusterUnavailable):
            await Node.read_barrier(node, consistency, deadline())

    on_loop(test)


@pytest.mark.parametrize("consistency", ["eventual", "linearizable"])
def test_a_state_that_is_being_built_again_is_not_read(consistency: str) -> None:
    """It would take readers back in time; as would one that is thrown away while they wait."""
    installer = SimpleNamespace(forgotten_at=9)
    log = SimpleNamespace(applied_index=5)
    waiting: list[asyncio.Future[None]] = []

    async def known(deadline: float) -> None:
        await asyncio.sleep(0)

    node: Any = SimpleNamespace(
        snapshots=SimpleNamespace(require_trusted=lambda: None, installer=installer),
        raft=SimpleNamespace(log=log, leader=SENDER),
        _announce_above=0,
        _reads=SimpleNamespace(add=lambda future, deadline, lease: waiting.append(future)),
        _cycle=SimpleNamespace(wake=lambda: None),
        _at_leader=SimpleNamespace(known=known),
    )

    async def test() -> None:
        node._loop = asyncio.get_running_loop()
        read = asyncio.create_task(Node.read_barrier(node, consistency, deadline()))
        await until(lambda: waiting or read.done(), "the read to be served, or to wait")
        assert not read.done()
        waiting[0].set_result(None)
        await until(lambda: len(waiting) > 1 or read.done(), "the read to be served, or to wait")
        assert not read.done()
        log.applied_index = 9
        waiting[1].set_result(None)
        await read
        assert len(waiting) == 2

    on_loop(test)


def test_the_only_voter_throws_nothing_away_that_nothing_can_replace(tmp_path: Path) -> None:
    """Its log begins behind what it would have to apply again, and there is no file: what is left
    of the state is all that a repair could go on from."""
    stage = Stage(tmp_path)
    stage.raft.log.base = LogId(ENTRIES, 1)
    before = stage.state.path

    async def test() -> None:
        async with stage.running() as snapshots:
            snapshots.distrust("a record has rotted", files_too=False)
            await until(lambda: stage.failed, "the end")
            assert stage.state.path == before
            assert before.exists()
            assert "restore a backup" in str(stage.failed[0])
            stage.failed.clear()

    on_loop(test)


def test_what_is_known_to_be_wrong_is_marked_before_anything_else_happens(tmp_path: Path) -> None:
    """The process may end before its task gets there, and the next start would believe it."""
    stage = Stage(tmp_path)
    told: list[str] = []

    async def test() -> None:
        async with stage.running() as snapshots:
            snapshots._distrusted = lambda: told.append("the watches")
            snapshots.distrust("it differs", files_too=True, index=ENTRIES)
            assert (stage.state.path / "DAMAGED").exists()
            assert not stage.directory.trusted_state()
            assert told == ["the watches"]
            await until(lambda: snapshots._wanted.distrust is None, "the end of that")

    on_loop(test)


@pytest.mark.parametrize("renewed", ["thrown away", "installed"])
def test_a_verdict_on_a_state_that_is_gone_is_ignored(tmp_path: Path, renewed: str) -> None:
    """Several may be under way. The next one that is about the new state counts."""
    stage = Stage(tmp_path)
    lost = Lost(stage)
    stage.raft.membership = membership(stage.raft.me, MemberId(2, 2))
    stage.raft.forget_state = lambda: None  # the log has it all

    async def test() -> None:
        async with stage.running() as snapshots:
            lost.snapshots = snapshots
            if renewed == "thrown away":
                snapshots.distrust("it differs", files_too=True, index=ENTRIES)
                await until(lambda: stage.state.applied == LogId(0, 0), "the state to be gone")
                await until(lambda: snapshots._wanted.distrust is None, "the end of that")
            else:
                new = stage.directory.next_state_path()
                shutil.copytree(stage.state.path, new)
                lost.install(Restore(LogId(ENTRIES, 1), stage.raft.membership, False))
            path = stage.state.path
            snapshots.distrust("it differs", files_too=True, index=ENTRIES - 1)
            snapshots.require_trusted()
            assert stage.state.path == path
            snapshots.distrust("it differs", files_too=True, index=ENTRIES + 1)
            with pytest.raises(ClusterUnavailable):
                snapshots.require_trusted()
            await until(lambda: stage.state.path != path, "the new one to be thrown away")

    on_loop(test)


def test_what_was_fetched_is_kept_while_it_is_of_use(tmp_path: Path) -> None:
    """A member that lags goes on where it was, also after a restart. What the log has brought by
    another way is removed, without a restart, and so is what is no beginning of a file."""
    stage = Stage(tmp_path)
    stage.apply()
    ahead = stage.snapshot()
    partial = ahead.path.with_name(f"fetch-{ahead.sha256}.partial")
    partial.write_bytes(ahead.path.read_bytes()[:2000])
    ahead.path.unlink()
    scraps = ahead.path.with_name("fetch-scraps.partial")
    scraps.write_bytes(b"DENG")
    stage.raft.log.applied_index = ENTRIES
    stage.answers = False

    async def test() -> None:
        async with stage.running():
            await until(lambda: not scraps.exists(), "what is of no use to be removed")
            assert partial.exists(), "it goes one entry further"
            stage.raft.log.applied_index = ENTRIES + 1
            await until(lambda: not partial.exists(), "it to be removed as well")

    on_loop(test)
