"""The cycle: the one place that drives Raft.

    inbox, proposals, reads, actions
        -> tick, step, propose                      (Raft decides)
        -> ready: send; write (thread); apply; answer
        -> written: advance, send what waited for the disk
        -> the next turn

A turn is synchronous and runs on the event loop when something has arrived, a write is durable or
a tick is due. While one write is under way the cycle goes on: it steps, ticks, confirms reads and
applies; commands that arrive meanwhile share the next entry (group commit).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from dengine.errors import (
    ClusterUnavailable,
    DengineError,
    FatalError,
    InvariantBroken,
    NotLeader,
    TryAgain,
)
from dengine.kv.commands import COMMAND_VERSION, batch_clock_ms, encode_batch
from dengine.node.log_writer import LogWriter
from dengine.node.proposals import Proposals
from dengine.node.reads import Reads
from dengine.node.state_flusher import StateFlusher
from dengine.raft.membership import Membership, decode_membership
from dengine.raft.messages import Message
from dengine.raft.raft import Raft, Ready, Restore, Transition
from dengine.raft.types import Entry, EntryKind, LogId, MemberId, SnapshotRef
from dengine.storage.log_store import LogStore
from dengine.storage.state_store import StateStore

T = TypeVar("T")

GATHER_S = 0.002  # how long commands wait for an entry that is on its way to a majority
INBOX_MAX = 20_000  # messages; beyond it they are dropped, as a network may do
APPLY_S = 0.05  # for which a turn applies at most, but for its first entry: heartbeats wait
SOUGHT = 16  # entries at once, where links are slow, towards a comparison that is waited for
TICK_MS = 1000  # while anything can expire, the log hears of the time so often at least


class Owner(Protocol):
    """What the cycle tells the node around it."""

    def send(self, to: MemberId, messages: list[Message]) -> bool: ...
    def role_changed(self, transition: Transition) -> None: ...
    def leader_changed(self) -> None: ...
    def membership_committed(self, index: int, old: Membership, new: Membership) -> None: ...
    def ticked(self, now_ms: int) -> None: ...
    def wrote(self, seconds: float, entries: int) -> None: ...
    def rolled_back(self) -> None: ...
    def applied(self, entries: Sequence[Entry]) -> None: ...
    def snapshot_offered(self, sender: MemberId, ref: SnapshotRef) -> None: ...
    def persist_restore(self, ready: Ready) -> None: ...
    def restored(self, restore: Restore) -> None: ...


def boottime_ms() -> int:
    """CLOCK_BOOTTIME: never goes back, and goes on while the machine is suspended."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class Cycle:
    """Owns Raft, the log writer, the application of committed entries and the state's flusher.

    `failed` ends with the error that must end the process: no part of the core dies silently.
    `turns` counts the turns that were completed: while it grows, the node lives.
    """

    def __init__(
        self,
        raft: Raft,
        log: LogStore,
        state: StateStore,
        owner: Owner,
        *,
        proposals: Proposals,
        reads: Reads,
    ) -> None:
        self.raft = raft
        self.proposals = proposals
        self.reads = reads
        self.turns = 0
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._state = state
        self._owner = owner
        self._writer = LogWriter(log, owner.persist_restore, self._loop, self._written, self.fail)
        self._flusher = StateFlusher(state, self._loop, self.fail)
        self._inbox: deque[Message] = deque()
        self._actions: deque[Callable[[], None]] = deque()
        self._turn_due: asyncio.Handle | None = None
        self._tick_due: asyncio.Handle | None = None
        self._tick_s = min(25, raft.config.heartbeat_ms / 4) / 1000
        self._leader: MemberId | None = None
        self._proposed_at = 0.0
        self._running = False
        self.may_tick = True  # the disk has room for entries that only carry the time

    def start(self) -> None:
        self._running = True
        self._flusher.start()
        self._tick()

    def stop(self, timeout_s: float) -> bool:
        """No further turns. False when the disk did not finish its last write in time."""
        self._running = False
        for handle in (self._turn_due, self._tick_due):
            if handle is not None:
                handle.cancel()
        written = self._writer.stop(timeout_s)
        return self._flusher.stop(timeout_s) and written

    # --- what goes in -----------------------------------------------------------------------

    def receive(self, messages: Sequence[Message]) -> None:
        if len(self._inbox) < INBOX_MAX:
            self._inbox.extend(messages)
            self.wake()

    def wake(self) -> None:
        """There is work: take a turn in the next iteration of the loop."""
        if self._turn_due is None and self._running:
            self._turn_due = self._loop.call_soon(self._turn)

    def wake_to_propose(self) -> None:
        """A command was queued. While an entry is on its way a turn could not take it; the one
        that sees that entry durable or committed will.
        """
        raft = self.raft
        if not raft.is_leader or (not raft.writing and self._gathered()):
            self.wake()

    async def act(self, action: Callable[[Raft], T]) -> T:
        """Run `action` on Raft inside a turn and return, or raise, what it does.

        Raises:
            ClusterUnavailable: the cycle has ended, and with it every turn.
        """
        if not self._running:
            raise ClusterUnavailable("this node is stopping")
        future: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            if future.done():
                return
            try:
                future.set_result(action(self.raft))
            except FatalError:
                raise
            except Exception as error:
                future.set_exception(error)

        self._actions.append(run)
        self.wake()
        return await future

    def post(self, action: Callable[[], None]) -> None:
        """Run `action` inside the next turn, before anything more is applied."""
        self._actions.append(action)
        self.wake()

    # --- the turn -----------------------------------------------------------------------------

    def _turn(self) -> None:
        self._turn_due = None
        if not self._running:
            return  # after a broken invariant nothing more may leave this node
        try:
            self._take_in()
            self._carry_out(self.raft.ready())
        except Exception as error:
            self.fail(error)
        else:
            self.turns += 1

    def _take_in(self) -> None:
        raft = self.raft
        raft.tick(boottime_ms())
        for _ in range(len(self._inbox)):
            raft.step(self._inbox.popleft())
        while self._actions:
            self._actions.popleft()()
        if raft.role != "leader":
            if self.proposals.queued:
                self.proposals.refuse_queued(NotLeader("this node does not lead any more"))
        elif raft.may_propose and not raft.writing and self._entry_wanted():
            self._propose()
        for nonce, lease in self.reads.take(self._loop.time()):
            raft.read_index(nonce, lease=lease)

    def _entry_wanted(self) -> bool:
        return (self.proposals.queued and self._gathered()) or self._tick_wanted()

    def _gathered(self) -> bool:
        """While an entry is on its way, commands gather for the next one: fewer, larger entries
        cost all members less. Where the way is long, waiting for its end would cost more.
        """
        log = self.raft.log
        return (
            log.commit_index == log.last_index or self._loop.time() - self._proposed_at >= GATHER_S
        )

    def _tick_wanted(self) -> bool:
        """Has time alone something to end? Then an entry without commands carries it; any other
        does so too, so there is one only where nothing else is under way. One also tells, where all
        members have come to understand it, that changes are recorded from there on.
        """
        raft = self.raft
        if not (raft.may_propose and self.may_tick):
            return False
        if raft.log.applied_index < raft.log.last_index:
            return False
        if not self.records:
            return self.command_version >= COMMAND_VERSION
        due_ms = self._state.next_due_ms
        if due_ms is None:
            return False
        now_ms = raft.proposal_clock_ms(self._state.clock_ms)
        return now_ms >= due_ms or now_ms - self._state.clock_ms >= TICK_MS

    @property
    def records(self) -> bool:
        """Has an entry of version 2 been applied here? From the first on the state has a history.
        What lies before it, perhaps still unapplied, is told to nobody."""
        return self._state.totals is not None

    @property
    def command_version(self) -> int:
        """The format of the entries that a leader makes: what every member can apply, and what
        was in use once stays in use.
        """
        if self.records:
            return COMMAND_VERSION
        members = self.raft.membership.members
        return min((m.command_version for m in members), default=1)

    def propose_time(self) -> None:
        """Some more entries, if nothing else is under way."""

        def propose() -> None:
            raft = self.raft
            if raft.may_propose and self.may_tick and self.records and not self._busy:
                for _ in range(SOUGHT):
                    self._propose()

        self.post(propose)

    @property
    def _busy(self) -> bool:
        """Is an entry under way, or about to be? It tells the time, too."""
        log = self.raft.log
        return self.proposals.queued or log.applied_index < log.last_index

    async def keep_time(self, timeout_s: float) -> None:
        """Before a leader stops from which nobody takes over: have the time until now in the log,
        where anything can expire. On a node that is restarted all the time it would else hardly
        pass, and what was put for a time would stay."""

        def tick(raft: Raft) -> asyncio.Future[None] | None:
            if not raft.may_propose or len(raft.membership.voters) > 1 or self._busy:
                return None
            kept: asyncio.Future[None] = self._loop.create_future()
            self.proposals.watch(self._propose(), kept, self._loop.time() + timeout_s)
            return kept

        if self._state.next_due_ms is None or not (self.may_tick and self._running):
            return
        with suppress(DengineError, TimeoutError):
            async with asyncio.timeout(timeout_s):
                kept = await self.act(tick)
                if kept is not None:
                    await kept

    def _propose(self) -> LogId:
        batch = self.proposals.take_batch()
        commands = [waiting.command for waiting in batch]
        new = self.command_version >= COMMAND_VERSION
        clock_ms = self.raft.proposal_clock_ms(self._state.clock_ms) if new else None
        log_id = self.raft.propose(encode_batch(commands, clock_ms))
        if batch:
            self.proposals.appended(log_id, batch)
        self._proposed_at = self._loop.time()
        return log_id

    def _carry_out(self, ready: Ready) -> None:
        self._send(ready.messages)
        if ready.number:
            self._writer.submit(ready)
        if ready.entries and not self.raft.is_leader:
            self._learn_clock(ready.entries)
        if ready.fetch is not None:
            self._owner.snapshot_offered(*ready.fetch)
        if ready.committed_entries:
            self._apply(ready)
        for read_state in ready.read_states:
            self.reads.answered(read_state, self.raft.log.applied_index)
        for transition in ready.transitions:
            self._owner.role_changed(transition)
        if self.raft.leader != self._leader:
            self._leader = self.raft.leader
            self._owner.leader_changed()
        if self.raft.saw_lost_entries:
            self._owner.rolled_back()

    def _apply(self, ready: Ready) -> None:
        membership = self._state.membership or Membership()
        until = time.monotonic() + APPLY_S
        outcome = self._state.apply(ready.committed_entries, lambda: time.monotonic() < until)
        entries = ready.committed_entries[: len(outcome)]
        deferred = False
        for entry, results in zip(entries, outcome, strict=True):
            deferred |= self.proposals.applied(entry, results)
        last = entries[-1].index
        self.raft.applied_to(last)
        self.reads.applied(last)
        self._owner.applied(entries)
        for entry in entries:
            if entry.kind is EntryKind.CONFIG:
                old, membership = membership, decode_membership(entry.data)
                self._owner.membership_committed(entry.index, old, membership)
        if self.raft.log.may_apply or deferred or self._tick_wanted():
            self.wake()  # what one turn applies is bounded, and so is what one entry does

    def _learn_clock(self, entries: Sequence[Entry]) -> None:
        """The last entry that carries the log time is a witness, beside the heartbeats."""
        for entry in reversed(entries):
            if entry.kind is EntryKind.NORMAL:
                clock_ms = batch_clock_ms(entry.data)
                if clock_ms is not None:
                    self.raft.learn_clock(entry.log_id, clock_ms)
                return

    def _written(self, ready: Ready, error: BaseException | None, seconds: float) -> None:
        """The log writer is done with `ready` (called on the loop)."""
        if not self._running and error is None:
            return
        try:
            if error is not None:
                raise error
            self._owner.wrote(seconds, len(ready.entries))
            if ready.snapshot is not None:
                self._restored(ready.snapshot)
            self.raft.advance(ready)
            self._send(ready.messages_after_sync)
        except BaseException as caught:
            self.fail(caught)
            return
        if self._turn_due is not None:
            self._turn_due.cancel()
        self._turn()

    def _restored(self, restore: Restore) -> None:
        """A snapshot has replaced the state. What it skipped is answered as far as it is known."""
        old = self._state.membership or Membership()
        index = restore.log_id.index
        self._owner.restored(restore)
        self.raft.learn_clock(restore.log_id, self._state.clock_ms)
        self.proposals.restored(index)
        self.reads.applied(index)
        if restore.membership != old:
            self._owner.membership_committed(index, old, restore.membership)

    def _send(self, messages: Sequence[Message]) -> None:
        by_member: dict[MemberId, list[Message]] = {}
        for message in messages:
            by_member.setdefault(message.to, []).append(message)
        for member, batch in by_member.items():
            if not self._owner.send(member, batch):
                self.raft.report_unreachable(member)

    def _tick(self) -> None:
        self._tick_due = self._loop.call_later(self._tick_s, self._tick)
        try:
            self._owner.ticked(boottime_ms())
        except Exception as error:
            self.fail(error)
        self.wake()

    def fail(self, error: BaseException) -> None:
        """Something of the core broke: stop turning, and let the process end with `error`."""
        self._running = False
        if self._tick_due is not None:
            self._tick_due.cancel()
        if not isinstance(error, FatalError):
            wrapped: FatalError
            if isinstance(error, AssertionError):
                wrapped = InvariantBroken(f"a broken assertion: {error}")
            else:
                wrapped = TryAgain(f"the cycle died of {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            error = wrapped
        if not self.failed.done():
            self.failed.set_exception(error)
