"""When a node takes a snapshot, and the one task that does whatever concerns snapshots.

The work itself is done by a subprocess (writer_process.py); this is the policy around it. One job
runs at a time: a state that is wrong goes first; then it is rebuilt from a file of ours; then come
a fetch, a file to verify, a take, a check.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dengine.config import Config
from dengine.errors import (
    ClusterUnavailable,
    DataCorruption,
    FatalError,
    RequestTimeout,
    StorageIO,
    TryAgain,
)
from dengine.node.backoff import RETRY_S_MIN, Backoff
from dengine.node.cycle import Cycle, boottime_ms
from dengine.node.installing import Installer
from dengine.node.reader_watch import ReaderWatch
from dengine.node.room import Room
from dengine.node.snapshot_files import SnapshotFiles
from dengine.node.snapshot_turn import Lead, OwnTurn, SnapshotTurn
from dengine.node.snapshot_wants import Distrust, Wanted
from dengine.node.transfers import format_bytes, percent
from dengine.node.verifying import Verifier
from dengine.node.writer_process import WriterProcess
from dengine.raft.raft import Raft, Ready, Restore
from dengine.raft.types import Entry, MemberId, SnapshotRef
from dengine.security import Secrets
from dengine.storage.directory import DataDirectory
from dengine.storage.log_store import LogStore
from dengine.storage.snapshot_jobs import Check, Done, Take
from dengine.storage.snapshots import list_files, remove_overtaken, remove_partial
from dengine.storage.state_store import StateStore

log = logging.getLogger("dengine.snapshots")

POLL_S = 1.0


class Snapshots:
    """The snapshots of one node.

    Args:
        lead: has the leader carry out an operation (asks for the turn to take one).
        source: addresses of a member, best first.
        secrets: what members that are asked for a file want to be shown.
    """

    def __init__(
        self,
        config: Config,
        directory: DataDirectory,
        cycle: Cycle,
        log_store: LogStore,
        state: StateStore,
        *,
        lead: Lead,
        source: Callable[[MemberId], Awaitable[Sequence[str]]],
        secrets: Secrets,
        distrusted: Callable[[], None],
    ) -> None:
        self._distrusted = distrusted
        self._config = config.snapshot
        self._directory = directory
        self._path = directory.snapshots_path
        self._cycle = cycle
        self._raft: Raft = cycle.raft
        self._log_store = log_store
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._writer = WriterProcess()
        self._wanted = Wanted()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._take_backoff, self._fetch_backoff = Backoff(), Backoff()
        self._forget_backoff, self._rebuild_backoff = Backoff(), Backoff()
        self._turn, self._turns = OwnTurn(cycle.raft.me.id, lead), SnapshotTurn()
        self.files = SnapshotFiles(self._config, cycle.raft)
        self.room = room = Room(directory.path, config.limits.reserve_bytes)
        self._verifier = Verifier(
            self._config, directory, self.files, self._wanted, self._writer, room
        )
        self.installer = Installer(
            directory, cycle, log_store, state, self.files, self._writer, room, source, secrets
        )
        self._fetched_some = True  # perhaps a fetch that was not finished left something
        self.taken = self.failures = 0
        self.job = ""  # what is being done, for people
        self.last_error: str | None = None

    # --- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin with what lies in the directory: complete files are checked before they count."""
        remove_partial(self._path)
        self._wanted.unverified = list_files(self._path)
        self._task = self._loop.create_task(self._work(), name="snapshots")

    async def stop(self) -> None:
        """End the job under way; its partial file is removed or resumed by the next start."""
        if self._task is not None:
            self._task.cancel()
            self._writer.kill("this node is stopping")
            await asyncio.gather(self._task, return_exceptions=True)
        for taker in self._wanted.takers:
            if not taker.done():
                taker.set_exception(ClusterUnavailable("this node is stopping"))

    async def _work(self) -> None:
        try:
            while True:
                try:
                    await self._next_job()
                except (TryAgain, StorageIO, DataCorruption) as error:
                    self.failures += 1
                    self.last_error = error.message
                    log.warning("%s failed: %s", self.job or "snapshot", error.message)
                    if not self._is_urgent:
                        await self._pause(RETRY_S_MIN)
                finally:
                    self.job = ""
                    self._state.release_dead_readers()
        except Exception as error:  # the owner of this task is the node: no silent death
            self._cycle.fail(error)

    async def _next_job(self) -> None:
        wanted = self._wanted
        await self._tidy_up()
        if wanted.distrust is not None and (self.installer.may_forget or not self.distrusts_state):
            await self._forget(wanted.distrust)
        elif wanted.distrust is not None and not wanted.unverified:
            self._cycle.fail(self.installer.hopeless(wanted.distrust.reason))
            await self._pause(POLL_S)
        elif self._rebuild_backoff.is_due and (ref := self.installer.own_file) is not None:
            await self._rebuild(ref)
        elif wanted.fetch is not None and self._fetch_backoff.is_due:
            (sender, ref), wanted.fetch = wanted.fetch, None
            await self._fetch(sender, ref)
        elif self._verifier.is_due:
            file = wanted.unverified.pop()
            self.job = f"verifying {file.name}"
            await self._verifier.verify(file)
        elif self._is_hopeless():
            self._cycle.fail(self.installer.hopeless(self.installer.forgotten_for))
            await self._pause(POLL_S)
        elif wanted.distrust is not None:
            await self._pause(RETRY_S_MIN)  # until the verifier may try again
        elif (may_take := await self._may_take()) and not self._is_urgent:
            await self._take()
        elif self._is_urgent:
            return  # since the leader was asked
        elif not may_take and wanted.check and not wanted.takers and self._may_check():
            await self._check()
        else:
            await self._pause(POLL_S)

    @property
    def _is_urgent(self) -> bool:
        """Is there something that must not wait for a take or a check?"""
        wanted = self._wanted
        return wanted.distrust is not None or (
            wanted.fetch is not None and self._fetch_backoff.is_due
        )

    async def _forget(self, distrust: Distrust) -> None:
        """Nothing else is done before that has succeeded."""
        self.job = "throwing the state away"
        if not self._forget_backoff.is_due:
            await self._pause(RETRY_S_MIN)
            return
        replaced = self._state.path != distrust.state  # the leader's has been installed meanwhile
        try:
            if not replaced:
                await self.installer.mark(distrust)
            if distrust.files_too:
                await self.installer.put_files_aside(but_received=replaced)
                self._wanted.unverified.clear()
            if not replaced:
                await self.installer.forget(distrust.reason)
        except StorageIO:
            self._forget_backoff.failed()
            raise
        self._forget_backoff.succeeded()
        if self._wanted.distrust is distrust:  # and nobody has more to say
            self._wanted.distrust = None

    async def _tidy_up(self) -> None:
        """What was fetched in part is of use until the log has brought as much: also after a
        restart, and after another way to get there has been found."""
        if self._fetched_some and not self._raft.state_lost:
            applied = self._raft.log.applied_index
            self._fetched_some = await self._loop.run_in_executor(
                None, remove_overtaken, self._path, applied
            )

    async def _rebuild(self, ref: SnapshotRef) -> None:
        """While the state is lost; again and again, for where nobody else has one nothing else
        helps."""
        self.job = "rebuilding the state"
        try:
            await self.installer.unpack(ref)
            if self._raft.state_lost:
                raise TryAgain("the rebuilt state was not wanted")
        except (TryAgain, StorageIO):
            self._rebuild_backoff.failed()
            raise
        self._rebuild_backoff.succeeded()

    def _is_hopeless(self) -> bool:
        """The state is lost, and neither a file of ours nor another member can have it."""
        raft, wanted = self._raft, self._wanted
        return (
            raft.state_lost
            and raft.membership.is_sole_voter(raft.me)
            and self.installer.own_file is None
            and not wanted.unverified
        )

    async def _pause(self, seconds: float) -> None:
        """Until something is wanted, `seconds` at most."""
        self._wake.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    # --- what the node tells ------------------------------------------------------------------

    def applied(self, entries: Sequence[Entry]) -> None:
        self.files.applied_bytes += sum(len(entry.data) for entry in entries)

    def ticked(self) -> None:
        """Now and then, on the loop: let the log go as far as nobody needs it."""
        limit = self.files.purge_limit()
        if limit > self._raft.log.base.index:
            self._raft.purge(limit)
            self._log_store.purge_to = limit
        if self._raft.snapshot_wanted:
            self._wake.set()

    def offered(self, sender: MemberId, ref: SnapshotRef) -> None:
        """The leader offers a file that this node needs; repeated until it is installed."""
        if not self.installer.is_busy_with(sender, ref):
            self._wanted.fetch = (sender, ref)
            # Else what is being done has time until it is. What is here already is had sooner.
            if self._fetch_backoff.is_due and not self.installer.is_unpacking:
                self._writer.kill("a snapshot from the leader comes first")
                self._wake.set()

    def suspect(self, ref: SnapshotRef) -> None:
        """A member cannot use the file that it was sent: look whether it has rotted here, or was
        rotten when it was made."""
        file = self.files.get(ref)
        if file is not None and file not in self._wanted.unverified:
            self._wanted.unverified.append(file)
            self._wake.set()

    def distrust(self, reason: str, *, files_too: bool, index: int | None = None) -> None:
        """The applied state is wrong: throw it away and build it again. From now on it is not to
        be read.

        Args:
            files_too: the state may have been wrong for long, and so our snapshots with it.
            index: the entry after which it was; None says that it is now.
        """
        if index is not None and index <= self.installer.renewed_at:
            return  # that one is gone; of the one that took its place others will be said
        before = self._wanted.distrust or Distrust(reason, files_too, self._state.path)
        self._wanted.distrust = before
        if files_too and not before.files_too:
            self._wanted.distrust = replace(before, files_too=True)
        if files_too:
            replaced = self._wanted.distrust.state != self._state.path
            self.installer.distrust_files(but_received=replaced)
            self._distrusted()
        if self.distrusts_state:
            # At once: this process may end before its task gets there, which tries it again.
            with suppress(StorageIO):
                self._directory.distrust_state(self._state.path, self._wanted.distrust.files_too)
        self._cycle.post(self._step_aside)
        self._writer.kill("the state is thrown away")
        self._wake.set()

    @property
    def distrusts_state(self) -> bool:
        """Is the state in use known to be wrong?"""
        distrust = self._wanted.distrust
        return distrust is not None and distrust.state == self._state.path

    def _step_aside(self) -> None:
        """In a turn: a wrong state leads nobody and tells no result."""
        if self.distrusts_state:
            self._raft.distrust_state()
            self._cycle.proposals.distrusted()

    def require_trusted(self) -> None:
        """Raises ClusterUnavailable while the state in use is known to be wrong."""
        distrust = self._wanted.distrust
        if distrust is not None and self.distrusts_state:
            raise ClusterUnavailable(
                f"the state of this node is wrong and is being replaced ({distrust.reason}); "
                "ask another node"
            )

    def persist_restore(self, ready: Ready) -> None:
        self.installer.persist(ready)

    def restored(self, restore: Restore) -> None:
        self.installer.installed(restore)

    async def take(self, deadline: float) -> SnapshotRef:
        """A snapshot of all that is applied now, taken for somebody who asked.

        Raises:
            RequestTimeout: it goes on, and is not done by `deadline`.
            TryAgain, StorageIO, DataCorruption: it failed.
        """
        future: asyncio.Future[SnapshotRef] = self._loop.create_future()
        self._wanted.takers.append(future)
        self._wake.set()
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.shield(future)
        except TimeoutError:
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise RequestTimeout(
                "the snapshot is not finished and goes on: GET /v1/snapshots shows how far it is"
            ) from None

    # --- taking ---------------------------------------------------------------------------------

    async def _may_take(self) -> bool:
        """Is one wanted or due, and is it our turn?"""
        automatic = self._take_backoff.is_due and self._is_newer()
        if automatic and self._raft.snapshot_wanted:  # somebody waits for it
            return True
        if self._wanted.takers:
            # Without a leader nothing is written, and this may be the last chance of a backup.
            return not self._is_newer() or await self._turn.ask() is not False
        return automatic and self._is_due() and await self._turn.ask() is True

    def _is_newer(self) -> bool:
        return self._state.applied.index > self._newest_index and not self._raft.state_lost

    @property
    def _newest_index(self) -> int:
        newest = self.files.newest
        return newest.index if newest is not None else 0

    def _is_due(self) -> bool:
        """Staggered, so that the members do not all become due at once: node k of n waits for
        1 + k/n times the entries, or bytes, that the configuration names.
        """
        # If no verified file reaches up to where the log begins, for they were damaged, removed or
        # cannot be read now, nothing here could build the state again: that cannot wait.
        if self._newest_index < self._raft.log.base.index:
            return True
        voters = self._raft.membership.voters
        place = voters.index(self._raft.me) if self._raft.me in voters else 0
        share = 1 + place / max(1, len(voters))
        newest = self.files.newest
        entries = self._state.applied.index - self._newest_index
        size = newest.size_bytes if newest is not None else 0
        return entries >= share * self._config.entries or self.files.bytes_since(
            newest
        ) >= share * max(self._config.log_bytes, size)

    async def _take(self) -> None:
        takers, self._wanted.takers = self._wanted.takers, []
        try:
            async with self._turn.kept():
                ref = await self._take_one()
        except FatalError as error:
            self._take_backoff.failed()
            for taker in takers:
                if not taker.done():
                    taker.set_exception(ClusterUnavailable(f"no snapshot: {error.message}"))
            raise
        self._take_backoff.succeeded()
        for taker in takers:
            if not taker.done():
                taker.set_result(ref)

    async def _take_one(self) -> SnapshotRef:
        if not self._is_newer():
            if self.files.newest is None:
                raise TryAgain("this node has nothing applied yet")
            return self.files.newest
        self.job = "taking a snapshot"
        started, applied_bytes = time.monotonic(), self.files.applied_bytes
        try:
            done = await self._run_take()
        except FatalError as error:
            if isinstance(error, DataCorruption):
                self.distrust(error.message, files_too=False)
            # A writer that was killed leaves its file, and the next one will have another name.
            remove_partial(self._path)
            raise
        self.taken += 1
        seconds = time.monotonic() - started
        log.info(
            "snapshot up to entry %d taken: %s in %.1f s (%s/s)",
            done.ref.index,
            format_bytes(done.ref.size_bytes),
            seconds,
            format_bytes(int(done.ref.size_bytes / max(seconds, 0.001))),
        )
        await self.files.add(done.ref, Path(done.file), done.taken_at_s, applied_bytes)
        return done.ref

    async def _run_take(self) -> Done:
        config = self._config
        self.room.require(self._state.used_bytes())

        def report(done: int, total: int) -> None:
            self.job = f"taking a snapshot: {percent(done, total)} %"

        job = Take(
            str(self._state.path),
            str(self._path),
            self._raft.me.id,
            config.chunk_bytes,
            config.max_bytes_per_s,
        )
        return await self._writer.run(job, report, ReaderWatch(self._state, config.max_bytes_per_s))

    def _may_check(self) -> bool:
        return self._take_backoff.is_due and self._state.applied.index > 0

    async def _check(self) -> None:
        """LMDB's pages carry no checksum: a key that has rotted would just not be found."""
        self.job = "checking the state"
        watch = ReaderWatch(self._state, self._config.max_bytes_per_s)
        try:
            await self._writer.run(Check(str(self._state.path)), watch=watch)
        except FatalError as error:
            if isinstance(error, DataCorruption):
                self.distrust(error.message, files_too=False)
            self._take_backoff.failed()
            raise
        self._take_backoff.succeeded()
        self._wanted.check = False
        log.info("the state was read through and is sound")

    async def _fetch(self, sender: MemberId, ref: SnapshotRef) -> None:
        if not self._raft.snapshot_helps(ref.log_id):
            return  # what it was offered for has been had otherwise
        self.job = f"fetching a snapshot from node {sender.id}"
        try:
            self._fetched_some = True
            await self.installer.fetch(sender, ref)
        except FatalError:
            self._fetch_backoff.failed()
            raise
        self._fetch_backoff.succeeded()

    # --- views ----------------------------------------------------------------------------------

    def view(self) -> dict[str, Any]:
        """GET /v1/snapshots."""
        return {
            "snapshots": self.files.view(),
            "job": self.job or None,
            "taken": self.taken,
            "failures": self.failures,
            "last_error": self.last_error,
            "purged_index": self._raft.log.base.index,
        }

    def grant_turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        """On the leader: may member `id` take a snapshot, for the next `for_ms`?"""
        return {"granted": self._turns.grant(turn["id"], boottime_ms(), turn["for_ms"])}
