"""Getting a state from elsewhere: fetched from the leader, or unpacked from an own snapshot.

    offered (Raft)  ->  the writer process fetches, verifies and unpacks the file
    restore (Raft)  ->  persist, on the thread that writes the log: CURRENT, log reset, marks
    installed       ->  the loop goes on with the new state

A crash between two steps leaves one good state; recovery.py finishes what is missing.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

from dengine.errors import DataCorruption, FatalError, InvariantBroken, TryAgain
from dengine.node.cycle import Cycle
from dengine.node.room import Room
from dengine.node.snapshot_files import SnapshotFiles
from dengine.node.snapshot_wants import Distrust
from dengine.node.transfers import Report
from dengine.node.writer_process import WriterProcess
from dengine.raft.raft import Raft, Ready, Restore
from dengine.raft.types import MemberId, SnapshotRef
from dengine.security import Secrets
from dengine.storage.directory import DataDirectory
from dengine.storage.log_store import LogStore
from dengine.storage.snapshot_file import name_durably, read_header, snapshot_name
from dengine.storage.snapshot_jobs import Credentials, Fetch, Unpack
from dengine.storage.snapshots import (
    keep_fetched,
    make_empty_state,
    put_all_aside,
    remove_fetched,
)
from dengine.storage.state_store import StateStore

log = logging.getLogger("dengine.snapshots")


class Installer:
    """Replaces the state of this node. Called by the one task of `Snapshots`, one job at a time.

    Args:
        source: addresses of a member, best first.
        secrets: what it may want to be shown.
    """

    def __init__(
        self,
        directory: DataDirectory,
        cycle: Cycle,
        log_store: LogStore,
        state: StateStore,
        files: SnapshotFiles,
        writer: WriterProcess,
        room: Room,
        source: Callable[[MemberId], Awaitable[Sequence[str]]],
        secrets: Secrets,
    ) -> None:
        self._directory = directory
        self._cycle = cycle
        self._raft: Raft = cycle.raft
        self._log_store = log_store
        self._state = state
        self._files = files
        self._writer = writer
        self._room = room
        self._source = source
        self._secrets = secrets
        self._fetching: tuple[MemberId, SnapshotRef] | None = None
        self._installed: asyncio.Future[None] | None = None
        self._fetched: Path | None = None  # gets its name with the install that began last
        self._received: Path | None = None  # the last one that was
        self._attempts = -1  # the first goes to the best address
        self.is_unpacking = False  # a file of ours
        self.forgotten_for = "the state is lost"
        self.forgotten_at = 0  # commit index when the state was last thrown away
        self.renewed_at = 0  # all that was said of the state up to this entry is about another one

    def is_busy_with(self, sender: MemberId, ref: SnapshotRef) -> bool:
        """Is this very file on its way, or any already being installed?"""
        return self._fetching == (sender, ref) or self._installed is not None

    async def fetch(self, sender: MemberId, ref: SnapshotRef) -> None:
        """Get a file from a member, and have it installed.

        Raises:
            TryAgain, StorageIO: not this time; what came is kept as far as it is sound.
            DataCorruption: never with this file; nothing of it is kept.
        """
        addresses = await self._source(sender)
        if not addresses:
            raise TryAgain(f"no address of node {sender.id} is known")
        await self._make_room(ref)
        self._attempts += 1
        address = addresses[self._attempts % len(addresses)]
        path = self._directory.next_state_path()
        report = Report(f"receiving snapshot {ref.term}-{ref.index} from node {sender.id}")
        self._fetching = (sender, ref)
        try:
            done = await self._writer.run(
                Fetch(
                    address,
                    ref,
                    self._raft.me.id,
                    self._directory.identity.cluster_id,
                    str(self._directory.snapshots_path),
                    str(path),
                    Credentials.of(self._secrets),
                ),
                report,
            )
        except FatalError as error:  # a writer that was killed leaves what it had unpacked
            await self._drop(path)
            if isinstance(error, DataCorruption):
                await self._give_up(ref)
            raise
        finally:
            self._fetching = None
        report.finished()
        if await self._restore(ref, Path(done.file), path):
            self._received = self._directory.snapshots_path / snapshot_name(ref.log_id)

    async def mark(self, distrust: Distrust) -> None:
        """On disk, so that no start before the end takes the state or a file for a sound one.
        Raises StorageIO.
        """
        await self._in_thread(self._directory.distrust_state, distrust.state, distrust.files_too)

    async def _make_room(self, ref: SnapshotRef) -> None:
        """For a file that is to be fetched, and the state unpacked from it. What a leader that is
        gone has sent in part must not keep its successor's file out for ever, and what is here of
        this one is not needed once more. Raises TryAgain, StorageIO.
        """
        here = await asyncio.get_running_loop().run_in_executor(
            None, keep_fetched, self._directory.snapshots_path, ref.sha256
        )
        if self._files.get(ref) is not None:
            here = ref.size_bytes  # it is one of ours
        self._room.require(2 * ref.size_bytes - min(here, ref.size_bytes))

    async def _give_up(self, ref: SnapshotRef) -> None:
        """All of it has come, and the state in it is unsound: to go on with it would end so each
        time. That it is asked for once more tells the sender.
        """
        self._files.put_aside(ref)  # where it was one of ours
        await self._in_thread(remove_fetched, self._directory.snapshots_path, ref.sha256)

    async def put_files_aside(self, *, but_received: bool) -> None:
        """They may be of a wrong state. That comes before the state is thrown away: a start in the
        middle would take the newest one for the state.

        Args:
            but_received: leave what the leader sent last, and was installed.
        """
        spare = self.distrust_files(but_received=but_received)
        await self._in_thread(put_all_aside, self._directory.snapshots_path, spare)

    def distrust_files(self, *, but_received: bool) -> Path | None:
        """Rely on none of them from now on; returns the one that is spared, as above."""
        spare = self._received if but_received else None
        self._files.distrust(spare)
        return spare

    @property
    def may_forget(self) -> bool:
        """May the state be thrown away? The only voter, of whose log a part is gone, needs a file
        that is known to be sound: nobody else could give it what it throws away.
        """
        raft = self._raft
        base = raft.log.base.index
        if not (base and raft.membership.is_sole_voter(raft.me)):
            return True
        return any(ref.index >= base for ref in self._files.refs)

    @staticmethod
    def hopeless(reason: str) -> DataCorruption:
        return DataCorruption(
            f"{reason}; no snapshot of this node continues in its log, and it is the only voter: "
            "restore a backup with `dengine snapshot restore`"
        )

    async def forget(self, reason: str) -> None:
        """Throw the state away; then the log, our snapshots or the leader's build it again.

        Raises:
            StorageIO: it is still there.
        """
        log.error("the state is wrong and is thrown away: %s", reason)
        self.forgotten_for = reason
        old, new = self._directory.state_path(), self._directory.next_state_path()
        await self._in_thread(make_empty_state, new)
        await self._cycle.act(lambda raft: self._forget_state(raft, new))
        # A large one takes its time. What a crash leaves of it the next start removes.
        await self._drop(old)

    def _forget_state(self, raft: Raft, new: Path) -> None:
        """In a turn, so that nobody sees half of it: go on with the empty state at `new`."""
        self._directory.adopt_state(new)
        self._state.replace(new)
        self._directory.mark_running()
        self.forgotten_at = self.renewed_at = raft.log.commit_index
        raft.forget_state()

    @property
    def own_file(self) -> SnapshotRef | None:
        """The newest file of ours from which the log goes on, while the state is lost."""
        if not self._raft.state_lost:
            return None
        usable = [ref for ref in self._files.refs if ref.index >= self._raft.log.base.index]
        return usable[-1] if usable else None

    async def unpack(self, ref: SnapshotRef) -> None:
        """Have the state again from a file of ours.

        Raises:
            TryAgain, StorageIO: not this time.
            DataCorruption: never with this file; it was put aside.
        """
        file, path = self._files.get(ref), self._directory.next_state_path()
        if file is None:
            return
        self.is_unpacking = True
        try:
            await self._writer.run(Unpack(str(file), str(path)))
        except FatalError as error:
            await self._drop(path)  # of a writer that was killed
            if isinstance(error, DataCorruption):
                self._files.put_aside(ref)
            raise
        finally:
            self.is_unpacking = False
        await self._restore(ref, file, path)

    async def _restore(self, ref: SnapshotRef, file: Path, state: Path) -> bool:
        """Have Raft install the unpacked `state`, and wait until it is; drop it if not wanted."""
        header = read_header(file)
        named = self._directory.snapshots_path / snapshot_name(ref.log_id)
        self._fetched = fetched = file if file != named else None
        self._installed = asyncio.get_running_loop().create_future()
        try:
            if await self._cycle.act(lambda raft: raft.restore(ref.log_id, header.membership)):
                await self._installed
                if self._files.get(ref) is None:
                    applied_bytes = self._files.applied_bytes  # nothing was applied after it yet
                    await self._files.add(ref, named, header.taken_at_s, applied_bytes)
                return True
            await self._drop(state)
            if fetched is not None:
                with suppress(OSError):  # it is of no use; a later fetch or start removes it
                    fetched.unlink(missing_ok=True)
            return False
        finally:
            # Of `_fetched` nothing is taken back: when a node stops in the middle of an install,
            # this task is gone before the thread comes to give the file its name.
            self._installed = None

    async def _drop(self, state: Path) -> None:
        await self._in_thread(shutil.rmtree, state, True)

    async def _in_thread(self, function: Callable[..., None], *args: object) -> None:
        await asyncio.get_running_loop().run_in_executor(None, function, *args)

    def persist(self, ready: Ready) -> None:
        """The durable part of an install, on the thread that writes the log."""
        restore, hard_state = ready.snapshot, ready.hard_state
        assert restore is not None
        assert hard_state is not None
        self._directory.adopt_state(self._directory.next_state_path())
        if self._fetched is not None:
            name_durably(self._fetched, snapshot_name(restore.log_id))
        if restore.reset_log:
            self._log_store.reset(hard_state, restore.log_id, restore.membership)
        else:
            self._log_store.save(hard_state, ())
        self._directory.finish_install()

    def installed(self, restore: Restore) -> None:
        """On the loop again: the node goes on with the new state."""
        self._state.replace(self._directory.state_path())
        if self._state.applied != restore.log_id:
            raise InvariantBroken(f"the installed state is of {self._state.applied}")
        self.renewed_at = max(self.renewed_at, restore.log_id.index)
        log.info("snapshot up to entry %d installed", restore.log_id.index)
        if self._installed is not None and not self._installed.done():
            self._installed.set_result(None)
