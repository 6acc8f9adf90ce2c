"""When a node takes, fetches, installs and forgets snapshots, and up to where its log may go.

The work itself is done by a subprocess (writer_process.py); this is the policy around it, and the
only owner of the files in `snapshots/`. One job runs at a time; a fetch goes before everything.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dengine.config import Config
from dengine.errors import (
    ClusterUnavailable,
    DataCorruption,
    DengineError,
    FatalError,
    InvariantBroken,
    NotFound,
    RequestTimeout,
    StorageIO,
    TryAgain,
)
from dengine.node.cycle import Cycle, boottime_ms
from dengine.node.transfers import Transfers, format_bytes
from dengine.node.writer_process import WriterProcess
from dengine.raft.raft import Raft, Ready, Restore
from dengine.raft.types import Entry, MemberId, SnapshotRef
from dengine.snapshot_writer import Fetch, Take, Unpack, Verify
from dengine.storage.directory import DataDirectory
from dengine.storage.log_store import LogStore
from dengine.storage.snapshot_file import read_header
from dengine.storage.snapshots import claimed_refs, put_aside, remove_partial
from dengine.storage.state_store import StateStore

log = logging.getLogger("dengine.snapshots")

POLL_S = 1.0
RETRY_S_MIN, RETRY_S_MAX = 1.0, 60.0
GROWTH_BYTES_MIN = 1024 * 1024 * 1024  # by so much a state may grow behind the writer's reader
AGE_S_MIN = 120.0  # so old may the reader of even the smallest state become
LOG_EVERY_PERCENT = 10
SLOT_S = 30.0  # a member that holds the turn says so more often than that

Lead = Callable[[str, dict[str, Any], float], Awaitable[dict[str, Any]]]


@dataclass(slots=True)
class _Backoff:
    """When the next attempt is due; doubles with each failure."""

    pause_s: float = RETRY_S_MIN
    due_s: float = 0.0

    def failed(self) -> None:
        self.due_s = time.monotonic() + self.pause_s
        self.pause_s = min(2 * self.pause_s, RETRY_S_MAX)

    def succeeded(self) -> None:
        self.pause_s, self.due_s = RETRY_S_MIN, 0.0

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self.due_s


@dataclass(slots=True)
class _Wanted:
    """What the task has to do next, most urgent first."""

    distrust: tuple[str, bool] | None = None  # why the state is wrong; are our files wrong too?
    fetch: tuple[MemberId, SnapshotRef] | None = None
    unverified: list[Path] = field(default_factory=list)  # newest last
    takers: list[asyncio.Future[SnapshotRef]] = field(default_factory=list)


class Snapshots:
    """The snapshots of one node.

    Args:
        lead: has the leader carry out an operation (asks for the turn to take one).
        source: addresses of a member, best first.
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
        source: Callable[[MemberId], Sequence[str]],
    ) -> None:
        self._config = config.snapshot
        self._directory = directory
        self._cycle = cycle
        self._raft: Raft = cycle.raft
        self._log_store = log_store
        self._state = state
        self._lead = lead
        self._source = source
        self._loop = asyncio.get_running_loop()
        self._writer = WriterProcess()
        self._wanted = _Wanted()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._files: dict[SnapshotRef, Path] = {}  # verified, oldest first
        self._bytes = 0  # applied since the start
        self._bytes_at: dict[SnapshotRef, int] = {}
        self._fetching: tuple[MemberId, SnapshotRef] | None = None
        self._installed: asyncio.Future[None] | None = None
        self._take_backoff, self._fetch_backoff = _Backoff(), _Backoff()
        self._turn = SnapshotTurn()
        self.transfers = Transfers()
        self.taken = self.failures = 0
        self.job = ""  # what the subprocess does, for people
        self.last_error: str | None = None

    # --- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin with what lies in the directory: complete files are checked before they count."""
        remove_partial(self._directory.snapshots_path, fetched=True)
        self._wanted.unverified = [p for p, _ in claimed_refs(self._directory.snapshots_path)]
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
                    if self._wanted.fetch is None and self._wanted.distrust is None:
                        await self._pause(RETRY_S_MIN)
                finally:
                    self.job = ""
                    self._state.release_dead_readers()
        except Exception as error:  # the owner of this task is the node: no silent death
            self._cycle.fail(error)

    async def _next_job(self) -> None:
        wanted = self._wanted
        if wanted.distrust is not None:
            (reason, files_too), wanted.distrust = wanted.distrust, None
            await self._rebuild(reason, files_too)
        elif wanted.fetch is not None and self._fetch_backoff.is_due:
            self._fetching, wanted.fetch = wanted.fetch, None
            try:
                await self._fetch(*self._fetching)
            finally:
                self._fetching = None
        elif wanted.unverified:
            await self._verify(wanted.unverified.pop())
        elif wanted.takers or (self._take_backoff.is_due and await self._may_take()):
            await self._take()
        else:
            await self._pause(POLL_S)

    async def _pause(self, seconds: float) -> None:
        """Until something is wanted, `seconds` at most."""
        self._wake.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    # --- what the node tells ------------------------------------------------------------------

    def applied(self, entries: Sequence[Entry]) -> None:
        self._bytes += sum(len(entry.data) for entry in entries)

    def ticked(self) -> None:
        """Now and then, on the loop: purge what nobody needs any more."""
        self._purge()
        if self._raft.snapshot_wanted:
            self._wake.set()

    def offered(self, sender: MemberId, ref: SnapshotRef) -> None:
        """The leader offers a file that this node needs; repeated until it is installed."""
        if self._fetching == (sender, ref) or self._installed is not None:
            return
        self._wanted.fetch = (sender, ref)
        self._writer.kill("a snapshot from the leader comes first")
        self._wake.set()

    def distrust(self, reason: str, *, files_too: bool) -> None:
        """The applied state is wrong: throw it away and build it again.

        Args:
            files_too: the state may have been wrong for long, and so our snapshots with it.
        """
        if self._wanted.distrust is None:
            self._wanted.distrust = (reason, files_too)
            self._writer.kill("the state is thrown away")
            self._wake.set()

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
        """Is one due, and is it our turn?"""
        if self._raft.snapshot_wanted:  # somebody waits for it
            return self._is_newer()
        if not self._is_newer() or not self._is_due():
            return False
        try:
            deadline = self._loop.time() + POLL_S
            answer = await self._lead("snapshot_turn", {"id": self._raft.me.id}, deadline)
            return bool(answer["granted"])
        except DengineError:
            return False  # without a leader nothing is written, so nothing is urgent

    def _is_newer(self) -> bool:
        newest = next(reversed(self._files), None)
        applied = self._state.applied.index
        return applied > (newest.index if newest is not None else 0) and not self._raft.state_lost

    def _is_due(self) -> bool:
        """Staggered, so that the members do not all become due at once: node k of n waits for
        1 + k/n times the entries, or bytes, that the configuration names.
        """
        voters = self._raft.membership.voters
        place = voters.index(self._raft.me) if self._raft.me in voters else 0
        share = 1 + place / max(1, len(voters))
        newest = next(reversed(self._files), None)
        entries = self._state.applied.index - (newest.index if newest is not None else 0)
        size = newest.size_bytes if newest is not None else 0
        return entries >= share * self._config.entries or self._bytes_since(newest) >= share * max(
            self._config.log_bytes, size
        )

    def _bytes_since(self, ref: SnapshotRef | None) -> int:
        """Bytes of log applied after a snapshot; 0 at least, for what came before our start."""
        return self._bytes - (self._bytes_at.get(ref, 0) if ref is not None else 0)

    async def _take(self) -> None:
        takers, self._wanted.takers = self._wanted.takers, []
        try:
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
            newest = next(reversed(self._files), None)
            if newest is None:
                raise TryAgain("this node has nothing applied yet")
            return newest
        self.job = "taking a snapshot"
        started, size = time.monotonic(), self._state.data_bytes()
        bytes_before = self._bytes
        age_s = AGE_S_MIN + 4 * size / self._config.max_bytes_per_s
        growth_bytes = max(GROWTH_BYTES_MIN, size)

        def watch(done: int, total: int) -> str | None:
            self.job = f"taking a snapshot: {_percent(done, total)} %"
            if time.monotonic() - started > age_s:
                return f"the snapshot was not finished within {age_s:.0f} s"
            if self._state.data_bytes() - size > growth_bytes:
                return f"the state grew by more than {format_bytes(growth_bytes)} meanwhile"
            return None

        try:
            done = await self._writer.run(
                Take(
                    str(self._state.path),
                    str(self._directory.snapshots_path),
                    self._raft.me.id,
                    self._config.chunk_bytes,
                    self._config.max_bytes_per_s,
                ),
                watch,
            )
        except FatalError as error:
            if isinstance(error, DataCorruption):
                self.distrust(error.message, files_too=False)
            # A writer that was killed leaves its file, and the next one will have another name.
            path = self._directory.snapshots_path
            await self._loop.run_in_executor(None, partial(remove_partial, path, fetched=False))
            raise
        self._bytes_at[done.ref] = bytes_before
        self.taken += 1
        seconds = time.monotonic() - started
        log.info(
            "snapshot up to entry %d taken: %s in %.1f s (%s/s)",
            done.ref.index,
            format_bytes(done.ref.size_bytes),
            seconds,
            format_bytes(int(done.ref.size_bytes / max(seconds, 0.001))),
        )
        await self._add(done.ref, Path(done.file))
        return done.ref

    async def _verify(self, file: Path) -> None:
        """A file from before this start: only what was read in full counts."""
        self.job = f"verifying {file.name}"
        try:
            done = await self._writer.run(
                Verify(str(file), self._config.max_bytes_per_s), lambda done, total: None
            )
        except DataCorruption as error:
            put_aside(file)
            raise TryAgain(f"{error.message}; it was put aside") from error
        except TryAgain:
            self._wanted.unverified.append(file)
            raise
        await self._add(done.ref, file)

    async def _add(self, ref: SnapshotRef, file: Path) -> None:
        """One more verified file; those that are too many go, but for what is being sent."""
        self._bytes_at.setdefault(ref, 0)
        self._files = dict(sorted({**self._files, ref: file}.items(), key=lambda f: f[0].index))
        in_use = set(self._raft.offered_snapshots().values()) | self.transfers.refs
        spare = list(self._files)[: -self._config.keep]
        gone = [self._files.pop(r) for r in spare if r not in in_use]
        self._raft.snapshots_changed(self.refs)
        self._cycle.wake()
        for path in gone:
            await self._loop.run_in_executor(None, _unlink, path)

    def _purge(self) -> None:
        """Let the log go up to the second-newest snapshot: should the newest one prove unreadable,
        the one before still continues in the log. What a transfer needs stays, within reason.
        """
        refs, raft = self.refs, self._raft
        if len(refs) < 2 or raft.state_lost:
            return
        limit = min(refs[-2].index, raft.log.applied_index - self._config.retained_log_entries)
        for held in raft.offered_snapshots().values():
            if self._bytes_since(held) <= self._config.hold_bytes:
                limit = min(limit, held.index)
        if limit > raft.log.base.index:
            raft.purge(limit)
            self._log_store.purge_to = limit

    # --- fetching and installing ------------------------------------------------------------------

    async def _fetch(self, sender: MemberId, ref: SnapshotRef) -> None:
        self.job = f"fetching a snapshot from node {sender.id}"
        path = self._directory.next_state_path()
        watch = _Report(f"receiving snapshot {ref.term}-{ref.index} from node {sender.id}")
        addresses = self._source(sender)
        try:
            if not addresses:
                raise TryAgain(f"no address of node {sender.id} is known")
            address = addresses[int(time.monotonic()) % len(addresses)]
            cluster_id = self._directory.identity.cluster_id
            done = await self._writer.run(
                Fetch(
                    address,
                    ref,
                    self._raft.me.id,
                    cluster_id,
                    str(self._directory.snapshots_path),
                    str(path),
                ),
                watch,
            )
        except FatalError:
            self._fetch_backoff.failed()
            await self._loop.run_in_executor(None, shutil.rmtree, path, True)
            raise
        self._fetch_backoff.succeeded()
        watch.finished()
        await self._restore(ref, Path(done.file), path)

    async def _restore(self, ref: SnapshotRef, file: Path, state: Path) -> None:
        """Have Raft install the unpacked `state`, and wait until it is; drop it if not wanted."""
        header = read_header(file)
        self._installed = self._loop.create_future()
        try:
            if await self._cycle.act(lambda raft: raft.restore(ref.log_id, header.membership)):
                self.job = "installing a snapshot"
                await self._installed
                await self._add(ref, file)
            else:
                await self._loop.run_in_executor(None, shutil.rmtree, state, True)
        finally:
            self._installed = None

    def persist_restore(self, ready: Ready) -> None:
        """The durable part of an install, on the thread that writes the log. A crash between two
        of these steps leaves a state that the next start finishes (recovery.py).
        """
        restore, hard_state = ready.snapshot, ready.hard_state
        assert restore is not None
        assert hard_state is not None
        self._directory.adopt_state(self._directory.next_state_path())
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
        log.info("snapshot up to entry %d installed", restore.log_id.index)
        if self._installed is not None and not self._installed.done():
            self._installed.set_result(None)

    async def _rebuild(self, reason: str, files_too: bool) -> None:
        """Throw the state away; then the log, our snapshots or the leader's build it again."""
        self.job = "rebuilding the state"
        log.error("the state is wrong and is thrown away: %s", reason)

        def forget(raft: Raft) -> None:
            self._state.replace(self._directory.discard_state())
            self._directory.mark_running()
            raft.forget_state()

        await self._cycle.act(forget)
        if files_too:
            files, self._files = self._files, {}
            self._raft.snapshots_changed(())
            for file in files.values():
                put_aside(file)
        for ref, file in reversed(list(self._files.items())):
            if not self._raft.state_lost or ref.index < self._raft.log.base.index:
                break
            path = self._directory.next_state_path()
            try:
                await self._writer.run(Unpack(str(file), str(path)), lambda done, total: None)
            except DataCorruption as error:
                log.warning("%s; trying an older one", error.message)
                put_aside(self._files.pop(ref))
                continue
            await self._restore(ref, file, path)
        if self._raft.state_lost and self._raft.membership.is_sole_voter(self._raft.me):
            raise_for_person = DataCorruption(
                f"{reason}; no snapshot of this node continues in its log, and it is the only "
                "voter: restore a backup with `dengine snapshot restore`"
            )
            self._cycle.fail(raise_for_person)

    # --- views ----------------------------------------------------------------------------------

    @property
    def refs(self) -> list[SnapshotRef]:
        """Verified, oldest first."""
        return list(self._files)

    def find(self, name: str) -> tuple[Path, SnapshotRef]:
        """A verified file by its SHA-256, or the newest as "latest". Raises NotFound."""
        for ref in reversed(self._files):
            if name in ("latest", ref.sha256):
                return self._files[ref], ref
        raise NotFound("this node has no such snapshot; POST /v1/snapshots takes one")

    def view(self) -> dict[str, Any]:
        """GET /v1/snapshots."""
        return {
            "snapshots": [
                {
                    "index": ref.index,
                    "term": ref.term,
                    "sha256": ref.sha256,
                    "size_bytes": ref.size_bytes,
                    "file": path.name,
                }
                for ref, path in self._files.items()
            ],
            "job": self.job or None,
            "taken": self.taken,
            "failures": self.failures,
            "last_error": self.last_error,
            "purged_index": self._raft.log.base.index,
        }

    def grant_turn(self, node_id: int) -> dict[str, Any]:
        """On the leader: may `node_id` take a snapshot now? Two never do at once."""
        return {"granted": self._turn.grant(node_id, boottime_ms())}


class SnapshotTurn:
    """Whose turn it is to take a snapshot; forgotten with the leader, which does no harm."""

    def __init__(self) -> None:
        self._holder = 0
        self._until_ms = 0

    def grant(self, node_id: int, now_ms: int) -> bool:
        if node_id != self._holder and now_ms < self._until_ms:
            return False
        self._holder, self._until_ms = node_id, now_ms + int(SLOT_S * 1000)
        return True


class _Report:
    """Logs how far a transfer is, every ten percent."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = time.monotonic()
        self._first: int | None = None
        self._done = self._due = 0

    def __call__(self, done: int, total: int) -> None:
        if self._first is None:
            self._first = done  # of an earlier attempt
        self._done = done
        percent = _percent(done, total)
        if percent >= self._due:
            self._due = percent - percent % LOG_EVERY_PERCENT + LOG_EVERY_PERCENT
            log.info("%s: %d %%, %s/s", self._what, percent, format_bytes(self._rate()))

    def finished(self) -> None:
        log.info("%s: done, %s/s", self._what, format_bytes(self._rate()))

    def _rate(self) -> int:
        return int((self._done - (self._first or 0)) / max(time.monotonic() - self._started, 0.001))


def _percent(done: int, total: int) -> int:
    return min(100, done * 100 // max(total, 1))


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # the next start finds it and tries again
        log.warning("cannot remove %s, which is not needed any more: %s", path, error.strerror)
