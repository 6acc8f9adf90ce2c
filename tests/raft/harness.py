"""One `Raft` under a microscope: an in-memory disk, explicit writes, exact comparison of `Ready`.

Nothing here decides anything: a `Server` hands inputs to a real `Raft` and does with each `Ready`
what the node's cycle does with it, one step at a time. Every message passes through msgspec.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from dengine.raft.membership import Member, Membership, Settings, Status, decode_membership
from dengine.raft.messages import (
    AppendResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    Message,
    PreVoteResponse,
    VoteResponse,
)
from dengine.raft.raft import Raft, RaftConfig, Ready, Transition
from dengine.raft.types import (
    Entry,
    EntryKind,
    HardState,
    LogId,
    MemberId,
    ReadState,
    SnapshotRef,
)

START_MS = 10_000  # what the clock says when a test begins

A, B, C, D, E = (MemberId(number, 0xA0 + number) for number in range(1, 6))

_decoder = msgspec.msgpack.Decoder(Message)


def over_the_wire(message: Message) -> Message:
    """`message` as the receiver decodes it."""
    decoded = _decoder.decode(msgspec.msgpack.encode(message))
    assert decoded == message
    return decoded


def member(member_id: MemberId, status: Status = Status.PROMOTABLE) -> Member:
    return Member(member_id, f"n{member_id.id}-{member_id.incarnation:x}:1", status=status)


def membership(
    *voters: MemberId,
    outgoing: Iterable[MemberId] = (),
    learners: Iterable[MemberId] = (),
    tombstones: Iterable[MemberId] = (),
) -> Membership:
    """A membership as `apply_change` would have made it."""
    all_voters = {*voters, *outgoing}
    members = [member(v, Status.ACTIVE) for v in all_voters] + [member(m) for m in learners]
    return Membership(
        cluster_id="test",
        voters=tuple(sorted(voters)),
        outgoing=tuple(sorted(outgoing)),
        learners=tuple(sorted(learners)),
        members=tuple(sorted(members, key=lambda m: m.id)),
        tombstones=tuple(sorted(tombstones)),
        settings=Settings(),
    )


def normal(index: int, term: int, data: bytes = b"") -> Entry:
    return Entry(index, term, EntryKind.NORMAL, data)


def noop(index: int, term: int) -> Entry:
    return Entry(index, term, EntryKind.NOOP, b"")


def config(index: int, term: int, members: Membership) -> Entry:
    return Entry(index, term, EntryKind.CONFIG, members.encode())


def make_log(members: Membership, terms: Sequence[int]) -> list[Entry]:
    """CONFIG at index 1 in term 1, then one entry for each of `terms` from index 2 on."""
    return [config(1, 1, members)] + [normal(i, term) for i, term in enumerate(terms, start=2)]


class Snapshot(NamedTuple):
    """A file, or the state that was unpacked from it: simply all the entries that led to it."""

    ref: SnapshotRef
    entries: tuple[Entry, ...]

    @property
    def membership(self) -> Membership:
        newest = [e for e in self.entries if e.kind is EntryKind.CONFIG][-1]
        return decode_membership(newest.data)


def snapshot_of(entries: Sequence[Entry], name: str = "") -> Snapshot:
    """The file that `name` writes of the state after `entries`: everybody's file is another."""
    last = entries[-1].log_id
    sha256 = hashlib.sha256(f"{name} {last}".encode()).hexdigest()
    return Snapshot(SnapshotRef(last.index, last.term, sha256, 100 + len(entries)), tuple(entries))


class Disk:
    """What survives a crash. Each change of it is whole or not at all.

    A start trusts no state but that of a snapshot: the files, or the one whose state was swapped
    in last (`current`). `past` is what was purged; only the checker remembers it.
    """

    def __init__(self, hard_state: HardState = HardState(), log: Sequence[Entry] = ()) -> None:
        self.hard_state = hard_state
        self.log = list(log)
        self.purged = LogId(0, 0)
        self.purged_membership: tuple[int, Membership] | None = None
        self.past: list[Entry] = []
        self.snapshots: dict[SnapshotRef, Snapshot] = {}
        self.current: Snapshot | None = None

    def first_index(self) -> int:
        return self.purged.index + 1

    def last_index(self) -> int:
        return self.purged.index + len(self.log)

    def term(self, index: int) -> int:
        if index == self.purged.index:
            return self.purged.term
        assert self.first_index() <= index <= self.last_index(), f"no entry {index}"
        return self.log[index - self.first_index()].term

    def entries(self, low: int, high: int, max_bytes: int) -> Sequence[Entry]:
        assert self.first_index() <= low < high <= self.last_index() + 1
        first, size = self.first_index(), 0
        for index in range(low, high):
            size += len(self.log[index - first].data)
            if size > max_bytes and index > low:
                return self.log[low - first : index - first]
        return self.log[low - first : high - first]

    def holds(self, log_id: LogId) -> bool:
        index = log_id.index
        if 0 < index <= self.purged.index:
            return self.past[index - 1].term == log_id.term
        return self.purged.index <= index <= self.last_index() and self.term(index) == log_id.term

    def memberships(self) -> list[tuple[int, Membership]]:
        purged = [self.purged_membership] if self.purged_membership else []
        return purged + [
            (e.index, decode_membership(e.data)) for e in self.log if e.kind is EntryKind.CONFIG
        ]

    def save(self, hard_state: HardState | None, entries: Sequence[Entry]) -> None:
        if hard_state is not None:
            assert hard_state.term >= self.hard_state.term
            self.hard_state = hard_state
        if entries:
            assert entries[0].index <= self.last_index() + 1, "a gap in the log"
            self.log[entries[0].index - self.first_index() :] = entries

    def refs(self) -> list[SnapshotRef]:
        """The files, oldest first."""
        return sorted(self.snapshots, key=lambda ref: (ref.index, ref.sha256))

    def state(self) -> Snapshot | None:
        """The newest state that the log goes on from."""
        found = [*self.snapshots.values(), *([self.current] if self.current else [])]
        usable = [s for s in found if self.continues(s.ref)]
        return max(usable, key=lambda s: s.ref.index, default=None)

    def continues(self, ref: SnapshotRef) -> bool:
        return ref.index >= self.purged.index and self.holds(ref.log_id)

    def is_lost(self) -> bool:
        """Would a start find no state and no way to rebuild it?"""
        return bool(self.purged.index) and self.state() is None

    def swap_state(self, snapshot: Snapshot) -> None:
        """CURRENT names another state."""
        self.current = snapshot

    def reset(self, snapshot: Snapshot) -> None:
        """The log begins anew after `snapshot`."""
        self.purged = snapshot.ref.log_id
        self.purged_membership = (snapshot.ref.index, snapshot.membership)
        self.past, self.log = list(snapshot.entries), []

    def finish_install(self) -> None:
        """What a start does: the state was swapped, but the log not reset any more."""
        current = self.current
        if current is not None and current.ref.index > self.purged.index:
            if not self.holds(current.ref.log_id):
                self.reset(current)
            if current.ref.term > self.hard_state.term:
                self.hard_state = HardState(current.ref.term, None, current.ref.index)

    def purge(self, index: int) -> None:
        """Forget the entries up to `index`; a snapshot is what allows it."""
        past = [*self.past, *self.log[: index + 1 - self.first_index()]]
        if not any(ref.index >= index for ref in self.snapshots):
            file = snapshot_of(past)
            self.snapshots[file.ref] = file
        self.past = past
        newest = [pair for pair in self.memberships() if pair[0] <= index][-1:]
        self.purged_membership = newest[0] if newest else None
        purged = LogId(index, self.term(index))
        self.log = self.log[index + 1 - self.first_index() :]
        self.purged = purged


class Server:
    """A `Raft` on its disk. `take` is a turn of the cycle, `finish_write` ends its log write."""

    def __init__(
        self, me: MemberId, disk: Disk, now_ms: int = START_MS, *, seed: int = 1, **timing: int
    ) -> None:
        self.me = me
        self.disk = disk
        self.config = RaftConfig(me, **timing)
        self.rng = random.Random(seed)
        self.applied: list[Entry] = []  # the state: every entry that made it
        self.read_states: list[ReadState] = []
        self.transitions: list[Transition] = []
        self.in_flight: Ready | None = None
        self.restoring: Snapshot | None = None  # accepted by Raft
        self.fetching: tuple[MemberId, SnapshotRef] | None = None  # as Raft wished last
        self.purge_due = 0  # Raft has forgotten the log up to here, the disk has not
        self.now_ms = now_ms
        self.raft = self._start()

    def _start(self) -> Raft:
        disk = self.disk
        disk.finish_install()
        state = disk.state()
        self.applied = list(state.entries) if state else []
        raft = Raft(
            self.config,
            disk,
            disk.hard_state,
            disk.memberships(),
            len(self.applied),
            self.rng,
            self.now_ms,
        )
        raft.snapshots_changed(disk.refs())
        return raft

    def restart(self, now_ms: int | None = None) -> None:
        """kill -9 and a new process: everything that is not on the disk is gone."""
        self.now_ms = self.now_ms if now_ms is None else now_ms
        self.in_flight = self.restoring = self.fetching = None
        self.purge_due = 0
        self.read_states = []
        self.raft = self._start()

    def tick(self, elapsed_ms: int = 0) -> None:
        self.now_ms += elapsed_ms
        self.raft.tick(self.now_ms)

    def step(self, *messages: Message) -> None:
        for message in messages:
            self.raft.step(over_the_wire(message))

    def take(self) -> Ready:
        """`raft.ready()`: a write it asks for is now in flight, what is committed is applied."""
        ready = self.raft.ready()
        if ready.number:
            assert self.in_flight is None
            self.in_flight = ready
        if ready.fetch is not None:
            self.fetching = ready.fetch
        if ready.committed_entries:
            assert ready.committed_entries[0].index == len(self.applied) + 1, "a gap in the state"
            self.applied += ready.committed_entries
            self.raft.applied_to(ready.committed_entries[-1].index)
        self.read_states += ready.read_states
        self.transitions += ready.transitions
        return ready

    def finish_write(self) -> Sequence[Message]:
        """The write in flight is durable; returns what may be sent because of it."""
        ready, self.in_flight = self.in_flight, None
        assert ready is not None, "no write is in flight"
        self.write(ready)
        if ready.snapshot is not None:
            assert self.restoring is not None
            self.applied, self.restoring = list(self.restoring.entries), None
        self.raft.advance(ready)
        return ready.messages_after_sync

    def write(self, ready: Ready, *, only_swap: bool = False) -> None:
        """The durable steps of `ready`; `only_swap`: an install gets no further than the state."""
        if ready.snapshot is not None:
            assert self.restoring is not None
            assert not ready.entries
            assert ready.hard_state is not None
            self.disk.swap_state(self.restoring)
            if only_swap:
                return
            if ready.snapshot.reset_log:
                self.disk.reset(self.restoring)
        if not only_swap:
            self.disk.save(ready.hard_state, ready.entries)

    # --- snapshots ------------------------------------------------------------------------------

    def take_snapshot(self) -> SnapshotRef:
        """Write the state as it is now to a file of its own."""
        file = snapshot_of(self.applied, str(self.me))
        self.keep_file(file)
        return file.ref

    def keep_file(self, file: Snapshot) -> None:
        """`file` is verified and durable here."""
        self.disk.snapshots[file.ref] = file
        self.raft.snapshots_changed(self.disk.refs())

    def lose_file(self, ref: SnapshotRef) -> None:
        del self.disk.snapshots[ref]
        self.raft.snapshots_changed(self.disk.refs())

    def purge(self, index: int, *, durably: bool = True) -> None:
        """Drop the log up to `index`: in memory at once, on the disk when its turn comes."""
        self.raft.purge(index)
        self.purge_due = max(self.purge_due, index)
        if durably:
            self.finish_purge()

    def finish_purge(self) -> None:
        if self.purge_due > self.disk.purged.index:
            self.disk.purge(self.purge_due)
        self.purge_due = 0

    def receive(self, file: Snapshot) -> bool:
        """`file` has arrived, is verified and unpacked; does Raft want it installed?"""
        self.keep_file(file)
        wanted = self.raft.restore(file.ref.log_id, file.membership)
        if wanted:
            self.restoring = file
        return wanted

    def install(self, file: Snapshot) -> list[Message]:
        assert self.receive(file)
        return self.settle()

    def lose_state(self) -> None:
        """The state and all files are damaged; the log is sound."""
        self.disk.current = None
        self.disk.snapshots.clear()
        self.raft.snapshots_changed([])
        self.applied = []
        self.raft.forget_state()

    def settle(self) -> list[Message]:
        """Take turns and finish writes until nothing is left to do; returns all that was sent."""
        sent: list[Message] = []
        for _ in range(1000):
            ready = self.take()
            sent += ready.messages
            if self.in_flight is not None:
                sent += self.finish_write()
            elif not (ready.messages or ready.committed_entries or ready.transitions):
                return sent
        raise AssertionError("it never comes to rest")

    def entries(self, first: int, last: int) -> list[Entry]:
        """The entries `first .. last` of its log, durable or not."""
        found: list[Entry] = []
        while first + len(found) <= last:
            found += self.raft.log.entries(first + len(found), last + 1, 2**40)
        return found

    # --- shortcuts to a situation, through the front door ------------------------------------

    def stand_for_election(self) -> list[Message]:
        """Let the election timer run out and win the pre-vote; returns the vote requests."""
        self.tick(self.config.timeout_ms_max + 1)
        self.take()
        term = self.raft.term + 1
        for voter in sorted(self.raft.membership.all_voters - {self.me}):
            self.step(PreVoteResponse(voter, self.me, term, True))
        return self.settle()

    def lead(self) -> list[Message]:
        """Win an election; returns what the new leader says first."""
        self.stand_for_election()
        for voter in sorted(self.raft.membership.all_voters - {self.me}):
            self.step(VoteResponse(voter, self.me, self.raft.term, True))
        assert self.raft.is_leader
        return self.settle()

    def acknowledge(self, *followers: MemberId, index: int | None = None) -> None:
        """`followers` report that they hold the log durably up to `index` (default: all of it)."""
        last = self.raft.log.last_index if index is None else index
        term = self.raft.log.term(last) or 0
        for follower in followers:
            self.step(
                AppendResponse(follower, self.me, self.raft.term, True, last, term, last, term)
            )

    def answer_heartbeats(
        self,
        sent: Iterable[Message],
        *followers: MemberId,
        timeout_ms_min: int = 1000,
        needs_snapshot: int | None = None,
    ) -> None:
        """`followers` answer the heartbeats to them among `sent`."""
        for m in sent:
            if isinstance(m, HeartbeatRequest) and m.to in followers and m.round:
                self.step(
                    HeartbeatResponse(
                        m.to, self.me, m.term, m.round, timeout_ms_min, needs_snapshot
                    )
                )


def server(
    me: MemberId,
    members: Membership,
    terms: Sequence[int] = (),
    *,
    term: int | None = None,
    vote: MemberId | None = None,
    commit: int = 1,
    **options: int,
) -> Server:
    """A server that has just started with the log `make_log(members, terms)`, and is at rest."""
    hard_state = HardState(term or max([1, *terms]), vote, commit)
    node = Server(me, Disk(hard_state, make_log(members, terms)), **options)
    node.settle()
    return node


def past_grace(node: Server) -> Server:
    """`node` once it is old enough to vote, but not yet impatient enough to campaign."""
    node.tick(node.config.timeout_ms_min)
    assert not node.settle()
    return node


def leader(me: MemberId, members: Membership, terms: Sequence[int] = (), **options: Any) -> Server:
    """A leader whose no-op is durable and acknowledged by everybody."""
    node = server(me, members, terms, **options)
    sent = node.lead()
    everybody = [m.id for m in members.members if m.id != me]
    node.acknowledge(*everybody)
    node.answer_heartbeats(sent, *everybody)
    node.settle()
    assert node.raft.committed_in_term
    node.transitions.clear()
    return node


def expect(ready: Ready, **wanted: Any) -> None:
    """Compare the whole of `ready`: a field that is not named must be empty."""
    got = {
        "messages": list(ready.messages),
        "hard_state": ready.hard_state,
        "entries": list(ready.entries),
        "messages_after_sync": list(ready.messages_after_sync),
        "committed_entries": list(ready.committed_entries),
        "read_states": list(ready.read_states),
        "transitions": list(ready.transitions),
        "snapshot": ready.snapshot,
        "fetch": ready.fetch,
    }
    one_or_none = dict.fromkeys(("hard_state", "snapshot", "fetch"))
    empty: dict[str, Any] = {name: [] for name in got} | one_or_none
    assert got == empty | wanted
    assert bool(ready.number) == bool(ready.hard_state)
