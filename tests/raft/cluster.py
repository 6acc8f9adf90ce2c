"""Several servers, a network that loses, repeats and reorders, and a checker that forgets nothing.

Time moves only in `tick`. Each primitive (`pump`, `finish_write`, `deliver`) is one boundary at
which a test may crash a server; after each one the checker looks at the server that moved.
"""

from __future__ import annotations

from collections.abc import Callable

from dengine.raft.membership import Membership
from dengine.raft.messages import (
    AppendResponse,
    HeartbeatResponse,
    InstallSnapshotRequest,
    Message,
    VoteRequest,
    VoteResponse,
)
from dengine.raft.types import Entry, HardState, LogId, MemberId
from tests.raft.harness import START_MS, Disk, Server, config


class Checker:
    """The safety properties of figure 3 of the paper, and what an acknowledgement promises."""

    def __init__(self) -> None:
        self.leaders: dict[int, MemberId] = {}
        self.committed: list[Entry] = []
        self.committed_in: list[int] = []  # the term in which each was first seen committed
        self._entries: dict[tuple[int, int], tuple[Entry, int]] = {}
        self._seen_terms: dict[MemberId, list[int]] = {}
        self._commit: dict[MemberId, int] = {}
        self._applied: dict[MemberId, tuple[list[Entry], int]] = {}  # how much of which was seen

    def forget(self, me: MemberId) -> None:
        """`me` has crashed: what it held in memory may go back to what is durable."""
        for seen in (self._seen_terms, self._commit, self._applied):
            seen.pop(me, None)

    def look(self, node: Server, disks: dict[MemberId, Disk]) -> None:
        self._order(node)
        self._log_matching(node)
        self._commitment(node, disks)
        self._leadership(node)
        self._application(node)

    def _order(self, node: Server) -> None:
        """purged <= applied <= commit <= last, unless the state is lost or being replaced; and
        what is purged is committed.
        """
        raft, log = node.raft, node.raft.log
        log_is_sound = log.base.index <= log.commit_index <= log.last_index
        assert log_is_sound, f"{node.me}: {log.base} {log.commit_index} {log.last_index}"
        assert len(node.applied) == log.applied_index, f"{node.me}: another state than Raft thinks"
        if node.restoring is None:
            assert log.applied_index == 0 or log.base.index <= log.applied_index
            assert log.applied_index <= log.commit_index
        assert not (raft.is_leader and node.restoring), f"{node.me} leads"
        assert not (raft.may_propose and raft.state_lost), f"{node.me} leads, and cannot serve"
        if log.base.index:
            assert log.base == self.committed[log.base.index - 1].log_id, f"{node.me}: {log.base}"

    def _log_matching(self, node: Server) -> None:
        """An (index, term) names one entry, with one predecessor, for ever."""
        log = node.raft.log
        terms = self._seen_terms.setdefault(node.me, [0])
        if len(terms) - 1 == log.last_index and terms[-1] == log.last_term:
            return
        base = log.base.index  # what is before it is committed
        if base and (base >= len(terms) or terms[base] != log.base.term):
            terms[:] = [0, *(entry.term for entry in self.committed[:base])]
        start = log.last_index
        while start > base and (start >= len(terms) or log.term(start) != terms[start]):
            start -= 1
        del terms[start + 1 :]
        if start == log.last_index:
            return
        for entry in node.entries(start + 1, log.last_index):
            known = self._entries.setdefault((entry.index, entry.term), (entry, terms[-1]))
            assert known == (entry, terms[-1]), f"{node.me}: two entries {entry.log_id}"
            terms.append(entry.term)

    def _commitment(self, node: Server, disks: dict[MemberId, Disk]) -> None:
        """What is committed is durable on a majority, never changes and never goes back."""
        raft, commit = node.raft, node.raft.log.commit_index
        before = self._commit.get(node.me, 0)
        assert commit >= before, f"{node.me}: commit went back from {before} to {commit}"
        self._commit[node.me] = commit
        if commit == before:
            return
        for entry in node.entries(max(before, raft.log.base.index) + 1, commit):
            if entry.index <= len(self.committed):
                known = self.committed[entry.index - 1]
                assert entry == known, f"{node.me}: {entry.log_id} committed over {known.log_id}"
                continue
            assert entry.index == len(self.committed) + 1
            assert self._durable(entry.log_id, raft.membership, disks), (
                f"{node.me}: {entry.log_id} is committed but not durable on a majority"
            )
            self.committed.append(entry)
            self.committed_in.append(raft.term)

    @staticmethod
    def _durable(log_id: LogId, members: Membership, disks: dict[MemberId, Disk]) -> bool:
        if not members.voters:
            return False
        for half in (members.voters, members.outgoing or members.voters):
            held = sum(m in disks and disks[m].holds(log_id) for m in half)
            if held <= len(half) // 2:
                return False
        return True

    def _leadership(self, node: Server) -> None:
        """At most one leader per term, and it holds all that earlier terms committed."""
        raft = node.raft
        if not raft.is_leader or self.leaders.get(raft.term) == node.me:
            return
        assert raft.term not in self.leaders, (
            f"term {raft.term} has two leaders: {self.leaders[raft.term]} and {node.me}"
        )
        self.leaders[raft.term] = node.me
        for entry, term in zip(self.committed, self.committed_in, strict=True):
            if term < raft.term and entry.index > raft.log.base.index:
                assert raft.log.matches(entry.log_id), (
                    f"leader {node.me} of term {raft.term} lacks committed {entry.log_id}"
                )

    def _application(self, node: Server) -> None:
        """State Machine Safety: a state is made of what is committed, in order, and nothing else,
        whether it was applied or came as a snapshot.
        """
        state, done = self._applied.get(node.me, (node.applied, 0))
        if state is not node.applied:
            done = 0
        if done < len(node.applied):
            assert node.applied[done:] == self.committed[done : len(node.applied)]
        self._applied[node.me] = node.applied, len(node.applied)

    def sent(self, m: Message, disk: Disk) -> None:
        """Nothing leaves before what it promises is durable on the sender's disk."""
        match m:
            case VoteResponse(granted=True):
                state = disk.hard_state
                assert state.term > m.term or (state.term, state.voted_for) == (m.term, m.to)
            case VoteRequest():
                state = disk.hard_state
                assert state.term > m.term or (state.term, state.voted_for) == (m.term, m.sender)
                if state.term == m.term:
                    assert disk.holds(LogId(m.last_index, m.last_term))
            case AppendResponse(granted=True):
                assert disk.hard_state.term >= m.term
                assert disk.holds(LogId(m.index, m.index_term))
            case HeartbeatResponse():
                assert disk.hard_state.term >= m.term
            case InstallSnapshotRequest(snapshot=ref):
                assert self.committed[ref.index - 1].log_id == ref.log_id


class Cluster:
    """Servers by id. `wire` holds what was sent and has not arrived, in the order it was sent."""

    def __init__(self, founders: Membership, *, seed: int = 0, **timing: int) -> None:
        self.now_ms = START_MS
        self.seed = seed
        self.timing = timing
        self.servers: dict[MemberId, Server] = {}
        self.disks: dict[MemberId, Disk] = {}  # of everybody who was ever added
        self.down: dict[MemberId, Disk] = {}
        self.stalled: set[MemberId] = set()  # disks that finish no write
        self.wire: list[Message] = []
        self.cut: set[tuple[MemberId, MemberId]] = set()
        self.checker = Checker()
        self.boundaries = 0
        self.at_boundary: Callable[[], None] | None = None
        self.newest_first = False  # the order in which `settle` delivers
        self.slow_disks = False  # `settle` finishes a write only when nothing else can happen
        for voter in founders.voters:
            self.down[voter] = Disk(HardState(1, None, 1), [config(1, 1, founders)])
        self.disks |= self.down
        for voter in founders.voters:
            self.restart(voter)

    # --- primitives ----------------------------------------------------------------------------

    def add(self, me: MemberId, disk: Disk | None = None) -> Server:
        seed = self.seed * 1000 + me.id
        node = Server(me, disk or Disk(), self.now_ms, seed=seed, **self.timing)
        self.servers[me] = node
        self.disks[me] = node.disk
        self._moved(node)
        return node

    def crash(self, me: MemberId, *, write_survives: bool = False, only_swap: bool = False) -> None:
        """`write_survives`: the write in flight reached the disk, but nobody heard of it;
        `only_swap`: of an install, only the state did.
        """
        node = self.servers.pop(me)
        if (write_survives or only_swap) and node.in_flight is not None:
            node.write(node.in_flight, only_swap=only_swap)
        self.checker.forget(me)
        self.down[me] = node.disk

    def restart(self, me: MemberId) -> Server:
        return self.add(me, self.down.pop(me))

    def tick(self, elapsed_ms: int) -> None:
        self.now_ms += elapsed_ms
        for node in self.servers.values():
            node.now_ms = self.now_ms
            node.tick()
            self._moved(node)

    def pump(self, me: MemberId) -> bool:
        """One turn of `me`; False when it had nothing to do."""
        node = self.servers[me]
        ready = node.take()
        for m in ready.messages:
            self._post(m, node.disk)
        self._moved(node)
        return bool(ready.messages or ready.number or ready.committed_entries or ready.read_states)

    def finish_write(self, me: MemberId) -> None:
        node = self.servers[me]
        for m in node.finish_write():
            self._post(m, node.disk)
        self._moved(node)

    def transfer(self, me: MemberId) -> bool:
        """The file that `me` fetches arrives, or its source fails; False when it fetches none."""
        node = self.servers[me]
        if node.fetching is None:
            return False
        (source, ref), node.fetching = node.fetching, None
        file = node.disk.snapshots.get(ref)
        if file is None and source in self.servers and (source, me) not in self.cut:
            file = self.disks[source].snapshots.get(ref)
        if file is not None:
            node.receive(file)
            self._moved(node)
        return True

    def take_snapshot(self, me: MemberId) -> bool:
        """False when `me` has no state that is newer than its newest file."""
        node = self.servers[me]
        newest = max((ref.index for ref in node.disk.snapshots), default=0)
        if len(node.applied) <= newest or node.raft.state_lost:
            return False
        node.take_snapshot()
        return True

    def deliver(self, position: int = 0, *, keep: bool = False) -> None:
        """The message at `position` arrives; with `keep` it will arrive once more."""
        m = self.wire[position] if keep else self.wire.pop(position)
        if (m.sender, m.to) not in self.cut and m.to in self.servers:
            node = self.servers[m.to]
            node.step(m)
            self._moved(node)

    def _post(self, m: Message, disk: Disk) -> None:
        self.checker.sent(m, disk)
        self.wire.append(m)

    def _moved(self, node: Server) -> None:
        self.checker.look(node, self.disks)

    def _boundary(self) -> None:
        self.boundaries += 1
        if self.at_boundary is not None:
            self.at_boundary()

    # --- time and the whole --------------------------------------------------------------------

    def settle(self) -> None:
        """Deliver, write and take turns until everybody rests; no time passes."""
        for _ in range(10_000):
            busy = False
            for me in list(self.servers):
                if me in self.servers and self.pump(me):
                    busy = True
                    self._boundary()
                if not self.slow_disks:
                    busy |= self._finish_write(me)
                busy |= self._snapshots(me)
            for _ in range(len(self.wire)):
                if self.wire:
                    busy = True
                    self.deliver(-1 if self.newest_first else 0)
                    self._boundary()
            if not busy:
                finished = [self._finish_write(me) for me in list(self.servers)]
                if not any(finished):
                    return
        raise AssertionError("it never comes to rest")

    def _finish_write(self, me: MemberId) -> bool:
        node = self.servers.get(me)
        if node is None or node.in_flight is None or me in self.stalled:
            return False
        self.finish_write(me)
        self._boundary()
        return True

    def _snapshots(self, me: MemberId) -> bool:
        """Owners fetch what is offered, and take a snapshot when one is wanted."""
        node = self.servers.get(me)
        if node is None:
            return False
        moved = self.transfer(me)
        if node.raft.snapshot_wanted:
            moved |= self.take_snapshot(me)
        if moved:
            self._boundary()
        return moved

    def run(self, ms: int, until: Callable[[], bool] | None = None, step_ms: int = 25) -> bool:
        """Let `ms` pass, or less once `until` holds; True when it does."""
        self.settle()
        for _ in range(ms // step_ms):
            if until is not None and until():
                return True
            self.tick(step_ms)
            self.settle()
        return until is None or until()

    def isolate(self, *members: MemberId) -> None:
        others = {*self.servers, *self.down} - set(members)
        self.cut |= {(m, o) for m in members for o in others}
        self.cut |= {(o, m) for m in members for o in others}

    def heal(self) -> None:
        self.cut.clear()
        self.stalled.clear()

    @property
    def leader(self) -> Server | None:
        """The leader of the newest term, when there is one."""
        leaders = [s for s in self.servers.values() if s.raft.is_leader]
        return max(leaders, key=lambda s: s.raft.term, default=None)

    def elect(self) -> Server:
        """Wait for a leader that takes writes and has committed an entry of its own term."""

        def ready() -> bool:
            raft = self.leader.raft if self.leader else None
            return raft is not None and raft.committed_in_term and raft.may_propose

        assert self.run(20_000, ready), "no leader within 20 s"
        assert self.leader is not None
        return self.leader

    def write(self, data: bytes) -> Entry:
        """Propose `data` on the leader and wait until it is committed."""
        node = self.elect()
        log_id = node.raft.propose(data)
        assert self.run(5000, lambda: node.raft.log.commit_index >= log_id.index), "not committed"
        return self.checker.committed[log_id.index - 1]

    def at_rest(self) -> bool:
        """Everybody alive has applied everything that is committed."""
        return all(len(s.applied) == len(self.checker.committed) for s in self.servers.values())
