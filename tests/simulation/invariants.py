"""What must hold after every event, whatever happened; each check costs no more than what changed.

Named by number: 0 nothing unexpected, 1 election safety, 2 leader append-only,
3 log matching, 4 state machine safety, 5 leader completeness, 6 commit by a durable quorum of
voters, 7 one vote per term, by whom stays who it is, 8 membership changes, 9 order of the log's
positions, and a durable snapshot behind what is purged (durability.py), 10 equal states, 11
acknowledged means committed, 12 reads of what the log says, and fresh ones (clients.py), 13 nothing
happens twice, however often it is asked for (promises.py), and each revision is of one command or
of time (model.py), 14 watches show each change that they select once, in order (watchers.py), 15
what has a time is there for all of it, and no longer (promises.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

from dengine.kv.commands import Deferred, Once
from dengine.raft.membership import Membership, decode_membership
from dengine.raft.messages import (
    AppendResponse,
    HeartbeatResponse,
    InstallSnapshotRequest,
    Message,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
)
from dengine.raft.raft import Raft
from dengine.raft.types import Entry, EntryKind, LogId, MemberId
from dengine.storage.environment import CRC_RESIDUE
from dengine.storage.log_store import ENTRY, ENTRY_KEY, HEAD, HEAD_KEY
from tests.simulation.environment import Environment
from tests.simulation.model import Model, Step
from tests.simulation.promises import Promises
from tests.simulation.violation import violated

if TYPE_CHECKING:
    from tests.simulation.machine import Machine, Process
    from tests.simulation.world import World


HEAD_SEED = crc32(HEAD_KEY)


class _Head:
    """The durable head of a log, decoded once for each content."""

    __slots__ = ("purged", "raw", "term", "voted_for")

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        fields = HEAD.unpack_from(raw)
        self.purged = fields[2]
        self.term, voted = fields[6], fields[7]
        self.voted_for = MemberId(fields[8], fields[9]) if voted else None


class _Seen:
    """What was seen of one process last."""

    __slots__ = ("acked", "applied", "commit", "key", "led_from", "role", "terms")

    def __init__(self) -> None:
        self.key: tuple[object, ...] = ()
        self.role: tuple[int, str] = (0, "")  # and its term
        self.terms: list[int] = [0]  # of the entries in its log, by index
        self.commit = 0
        self.applied = 0
        self.acked = 0  # so far its acknowledgements were compared with its disk
        self.led_from: tuple[int, int] | None = None  # (term, last index) while it leads


class Checker:
    """Remembers everything that was ever promised."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.leaders: dict[int, MemberId] = {}
        self.committed: list[Entry] = []
        self.committed_in: list[int] = []
        self.committed_at: list[int] = []
        self.committed_term = 0
        self.model = Model()
        self.promises = Promises(world)
        self._entries: dict[tuple[int, int], tuple[Entry, int]] = {}
        self._made_at: dict[tuple[int, int], int] = {}
        self._seen: dict[Process, _Seen] = {}
        self._new_memberships: list[Entry] = []
        self._votes: dict[tuple[MemberId, int], MemberId] = {}
        self._promised: dict[MemberId, int] = {}
        self._digests: dict[int, tuple[int, bytes]] = {}
        self._heads: dict[int, _Head] = {}
        self._damaged_logs: dict[int, Environment] = {}  # of the heads above, by machine id
        self._once_held: dict[MemberId, dict[int, int]] = {}  # before its disk was damaged
        self._owner: dict[int, MemberId] = {}
        self._kept: dict[MemberId, int] = {}  # committed and durable there, as it knew
        self._configs: list[tuple[int, Membership]] = []  # committed ones, by index

    # --- the life of processes --------------------------------------------------------------------

    def started(self, process: Process) -> None:
        """Invariant 7: a start has forgotten no term that it had promised, and no vote."""
        assert process.node is not None
        me, raft = process.member, process.node.raft
        before = self._owner.get(me.id)
        if before is not None and before != me:
            self.world.count("reincarnated")
            if me.id not in self.world.faults.ever_damaged:
                violated("0 no surprise", f"{before} gave itself up without having lost anything")
        self._owner[me.id] = me
        self._seen[process] = _Seen()
        self.world.durability.log_changed(process.machine)
        if raft.term < self._promised.get(me, 0):
            violated("7 votes", f"{me} came back in term {raft.term} from {self._promised[me]}")
        vote = self._votes.get((me, raft.term))
        if vote is not None and vote != raft.voted_for:
            violated("7 votes", f"{me} voted for {vote} in term {raft.term}, and does not know it")
        kept = self._kept.get(me, 0)
        if kept > raft.log.base.index and (raft.log.term(kept) != self.committed[kept - 1].term):
            violated(
                "6 durable ack", f"{me} came back without entry {kept}, which it had committed"
            )
        self.look(process)

    def crashed(self, process: Process, *, power: bool) -> None:
        """The rare moments in which a crash is worth most."""
        count = self.world.count
        count("power lost" if power else "killed")
        node = process.node
        if node is None:
            return
        if node.raft.membership.joint:
            count("joint state crashed")
        if node.raft._restore is not None:
            count("crashed before an install")
        if node.raft.is_leader:
            count("leader crashed")
        if node.raft.writing:
            count("write crashed")
        self._seen.pop(process, None)

    def damaging(self, machine: Machine) -> None:
        """A disk is about to lose something: what it held counts as what was once acknowledged."""
        member, log = self._owner.get(machine.id), machine.log_file()
        if member is not None and log is not None:
            held = self._once_held.setdefault(member, {})
            for key, raw in log.tables[b""].data.items():
                if key[:1] == b"e" and crc32(raw, crc32(key)) == CRC_RESIDUE:  # not rotted before
                    held[ENTRY_KEY.unpack(key)[1]] = ENTRY.unpack_from(raw)[0]
            head = self._head(log, machine.id)
            self._damaged_logs[machine.id] = log
            for index in range(1, head.purged + 1 if head else 1):
                held[index] = self.committed[index - 1].term

    def forgets(self, machine: Machine) -> None:
        """An older copy has taken the place of its disk: what it promised since is not counted on,
        for the others make up for it.
        """
        member = self._owner.get(machine.id)
        if member is not None:
            self._promised.pop(member, None)
            self._kept.pop(member, None)
            for key in [key for key in self._votes if key[0] == member]:
                del self._votes[key]

    # --- after every event ------------------------------------------------------------------------

    def look(self, process: Process) -> None:
        seen, node = self._seen.get(process), process.node
        if seen is None or node is None:
            return
        raft = node.raft
        log = raft.log
        key = (
            raft.term,
            raft.role,
            log.last_index,
            log.last_term,
            log.commit_index,
            log.applied_index,
            log.base.index,
            node.state.applied.index,
        )
        if key == seen.key:
            return
        seen.key = key
        me = process.member
        if seen.role != (raft.term, raft.role):
            seen.role = (raft.term, raft.role)
            self.world.note("node", me.id, "is", raft.role, "of term", raft.term)
        self._order(me, raft)
        self._log_matching(me, raft, seen)
        self._commitment(me, raft, seen)
        if raft._restore is None:
            self._membership_in_force(me, raft)
        for entry in self._new_memberships:
            self._membership_change(me, raft, entry)
        self._new_memberships.clear()
        self._leadership(me, raft, seen)
        if node.state.applied.index != seen.applied:
            seen.applied = node.state.applied.index
            self._application(process, raft)

    def _order(self, me: MemberId, raft: Raft) -> None:
        log = raft.log
        if not log.base.index <= log.commit_index <= log.last_index:
            violated("9 order", f"{me}: {log.base} {log.commit_index} {log.last_index}")
        counts = raft._restore is None and log.applied_index
        if counts and not log.base.index <= log.applied_index <= log.commit_index:
            violated("9 order", f"{me}: {log.base} {log.applied_index} {log.commit_index}")
        base = log.base
        if base.index and base.index <= len(self.committed):
            if self.committed[base.index - 1].term != base.term:
                violated("4 committed", f"{me}: the log begins after {base}, not what is committed")
        elif base.index:
            violated("4 committed", f"{me}: purged {base}, which nobody has committed")

    def _log_matching(self, me: MemberId, raft: Raft, seen: _Seen) -> None:
        """An (index, term) names one entry, with one predecessor, for ever."""
        log, terms = raft.log, seen.terms
        base = log.base.index
        if base and (base >= len(terms) or terms[base] != log.base.term):
            terms[:] = [0, *(entry.term for entry in self.committed[:base])]
        last = start = log.last_index
        while start > base and (start >= len(terms) or log.term(start) != terms[start]):
            start -= 1
        if start + 1 < len(terms):
            self.world.count("log truncated")
            if raft.is_leader and seen.led_from is not None and seen.led_from[0] == raft.term:
                violated("2 append-only", f"leader {me} replaced or dropped entry {start + 1}")
            del terms[start + 1 :]
            seen.acked = min(seen.acked, start)
        if start == last:
            return
        entries = log.entries(start + 1, last + 1, 1 << 40)
        while entries[-1].index < last:  # the first came from the disk
            entries = [*entries, *log.entries(entries[-1].index + 1, last + 1, 1 << 40)]
        known = self._entries
        for entry in entries:
            place = (entry.index, entry.term)
            found = known.get(place)
            if found is None:
                known[place] = (entry, terms[-1])
                self._made_at[place] = self.world.scheduler.now
                if entry.kind is EntryKind.CONFIG and entry.index > 1:
                    self._new_memberships.append(entry)
            elif found != (entry, terms[-1]):
                violated("3 log matching", f"{me}: two entries {entry.log_id}")
            terms.append(entry.term)

    def _membership_change(self, me: MemberId, raft: Raft, entry: Entry) -> None:
        """Seen first where it was appended: on the leader of its term."""
        if not (raft.is_leader and raft.term == entry.term):
            return
        older = [pair for pair in raft._memberships if pair[0] < entry.index]
        index, old = older[-1]
        new = decode_membership(entry.data)
        if index > raft.log.commit_index:
            violated("8 membership", f"{me}: two changes uncommitted, {index} and {entry.index}")
        if self.committed_term < raft.term:
            violated("8 membership", f"{me}: a change before an entry of term {raft.term}")
        overlap = len(set(old.voters) ^ set(new.voters)) <= 1
        fine = (
            (not new.joint and new.voters == old.voters)
            if old.joint
            else (new.outgoing == old.voters if new.joint else overlap)
        )
        if not fine:
            violated("8 membership", f"{me}: from {old.voters} straight to {new.voters}")
        if set(new.learners) & new.all_voters:
            violated("8 membership", f"{me}: a learner that votes: {new}")
        if new.joint:
            self.world.count("joint state")
            self.world.faults.becomes_joint(me.id)
        if len(new.voters) > len(old.voters):
            self.world.count("promoted")
        if len(new.tombstones) > len(old.tombstones):
            self.world.count("buried")

    def _commitment(self, me: MemberId, raft: Raft, seen: _Seen) -> None:
        commit, before = raft.log.commit_index, seen.commit
        if commit < before:
            violated("4 committed", f"{me}: commit went back from {before} to {commit}")
        seen.commit = commit
        # Until an install is durable the disk holds the log from before, whose tail may be another.
        kept = min(commit, raft.log.stable_index)
        if kept >= raft.log.base.index and kept > self._kept.get(me, 0):
            self._kept[me] = kept
        if commit == before:
            return
        committed, log = self.committed, raft.log
        for index in range(max(before, log.base.index) + 1, min(commit, len(committed)) + 1):
            if log.term(index) != committed[index - 1].term:
                violated("4 committed", f"{me}: another entry {index} than the committed one")
        if commit <= len(committed):
            return
        if raft.is_leader and commit > 1 and log.term(commit) != raft.term:
            violated("6 commit rule", f"{me} committed {commit} of an older term by counting")
        while len(committed) < commit:  # as they came into its log; they may have rotted there
            index = len(committed) + 1
            self._commit(me, raft, self._entries[(index, seen.terms[index])][0])

    def _membership_in_force(self, me: MemberId, raft: Raft) -> None:
        """What a member takes for the committed membership is that."""
        commit, configs = raft.log.commit_index, self._configs
        place = len(configs) - 1
        while place >= 0 and configs[place][0] > commit:
            place -= 1
        if place >= 0 and raft.committed_membership != configs[place][1]:
            violated("8 membership", f"{me} at {commit} goes by an old membership, or another one")

    def _commit(self, me: MemberId, raft: Raft, entry: Entry) -> None:
        """The first time that anybody takes `entry` for committed."""
        if entry.index > 1 and not self._durable(entry.log_id, raft):
            violated(
                "6 commit rule", f"{me}: {entry.log_id} is committed, and on no durable quorum"
            )
        self.committed.append(entry)
        self.committed_in.append(raft.term)
        self.committed_at.append(self.world.scheduler.now)
        self.committed_term = max(self.committed_term, entry.term)
        step = self.model.committed(entry)
        if step is not None:
            self._carried_out(step)
            self.promises.follow(step, self._made_at[(entry.index, entry.term)])
        if entry.kind is EntryKind.CONFIG:
            self.world.membership = decode_membership(entry.data)
            self._configs.append((entry.index, self.world.membership))

    def _carried_out(self, step: Step) -> None:
        model = self.model
        for outcome in step.outcomes:
            mark = outcome.mark
            if not isinstance(outcome.result, Deferred):
                if mark in model.index_of and not isinstance(outcome.command, Once):
                    violated("13 once", f"{mark!r} is committed twice")
                self.world.attempts.carried_out(mark, step.index)
            model.take_in(outcome, step.index)

    def _durable(self, log_id: LogId, raft: Raft) -> bool:
        """By the membership in force where the entry stands, or by a newer one that counts it."""
        held: dict[MemberId, bool] = {}

        def quorum(half: tuple[MemberId, ...]) -> bool:
            for voter in half:
                if voter not in held:
                    held[voter] = self.holds(voter, log_id)
            return sum(held[voter] for voter in half) > len(half) // 2

        def counted(members: Membership) -> bool:
            return quorum(members.voters) and (not members.outgoing or quorum(members.outgoing))

        return any(counted(m) for _, m in reversed(raft._memberships) if m.voters)

    def holds(self, member: MemberId, log_id: LogId) -> bool:
        """Is the entry on the disk of `member`, or was it before that was damaged?"""
        machine = self.world.machines.get(member.id)
        if machine is not None and self._owner.get(member.id) == member:
            log = machine.log_file()
            if log is not None:
                raw = log.durable_record(ENTRY_KEY.pack(b"e", log_id.index))
                if raw is not None and ENTRY.unpack_from(raw)[0] == log_id.term:
                    return True
                head = self._head(log, member.id)
                if head is not None and log_id.index <= head.purged:
                    return self.committed[log_id.index - 1].term == log_id.term
        return self._once_held.get(member, {}).get(log_id.index) == log_id.term

    def _leadership(self, me: MemberId, raft: Raft, seen: _Seen) -> None:
        if not raft.is_leader:
            seen.led_from = None
            return
        term = raft.term
        if seen.led_from is not None and seen.led_from[0] == term:
            if raft.log.last_index < seen.led_from[1]:
                violated("2 append-only", f"leader {me} of term {term} dropped entries")
            seen.led_from = (term, raft.log.last_index)
            return
        seen.led_from = (term, raft.log.last_index)
        other = self.leaders.setdefault(term, me)
        if other != me:
            violated("1 election safety", f"term {term} has two leaders: {other} and {me}")
        self.world.faults.leads(me.id)
        for position in range(len(self.committed) - 1, -1, -1):
            if self.committed_in[position] < term:
                entry = self.committed[position]
                if entry.index > raft.log.base.index and not raft.log.matches(entry.log_id):
                    violated("5 completeness", f"leader {me} of {term} lacks {entry.log_id}")
                break

    def _application(self, process: Process, raft: Raft) -> None:
        assert process.node is not None
        me, digest = process.member, process.node.state.digest
        if digest.index > len(self.committed):
            violated("4 applied", f"{me} applied {digest.index} before anybody committed it")
        found = (digest.revision, digest.state_hash)
        known = self._digests.setdefault(digest.index, found)
        if known != found:
            violated("10 state hash", f"{me}: another state after entry {digest.index}")

    # --- what leaves a node -----------------------------------------------------------------------

    def sent(self, process: Process, m: Message) -> None:
        """Nothing leaves before what it promises is durable on the sender's disk."""
        kind = type(m)
        if kind is HeartbeatResponse:
            self._promise(process, m)
        elif kind is AppendResponse:
            if m.granted:  # type: ignore[union-attr]
                self._promise(process, m)
                log_id = LogId(m.index, m.index_term)  # type: ignore[union-attr]
                if log_id.index and not self.holds(process.member, log_id):
                    violated("6 durable ack", f"{m.sender} acknowledges {log_id} too early")
                self._acknowledged_before(process, log_id)
        elif kind is VoteResponse:
            if m.granted:  # type: ignore[union-attr]
                self._vote(process, m, m.to)
        elif kind is VoteRequest:
            self._vote(process, m, m.sender)
            last = LogId(m.last_index, m.last_term)  # type: ignore[union-attr]
            head = self._promise(process, m)
            if head.term == m.term and last.index and not self.holds(process.member, last):
                violated("5 durable log", f"{m.sender} stands for election with a log it may lose")
        elif kind is TimeoutNow:
            self.world.faults.hands_over(process)
        elif kind is InstallSnapshotRequest:
            ref = m.snapshot  # type: ignore[union-attr]
            if self.committed[ref.index - 1].log_id != ref.log_id:
                violated("4 committed", f"{m.sender} offers a snapshot of {ref.log_id}")

    def _acknowledged_before(self, process: Process, last: LogId) -> None:
        """An acknowledgement speaks of everything up to its entry."""
        seen, node = self._seen.get(process), process.node
        if seen is None or node is None:
            return
        log, index = node.raft.log, last.index
        if log.term(index) != last.term:
            return  # the next leader's entries wait to be written over those that were just synced
        for earlier in range(max(seen.acked, log.base.index) + 1, index):
            term = log.term(earlier)
            if term is not None and not self.holds(process.member, LogId(earlier, term)):
                violated("6 durable ack", f"{process.member} acknowledges {earlier} with {index}")
        seen.acked = max(seen.acked, index)

    def _promise(self, process: Process, m: Message) -> _Head:
        """Its term is durable."""
        log = process.machine.log_file()
        head = None if log is None else self._head(log, process.machine.id)
        if head is None or head.term < m.term:
            violated("7 votes", f"{m.sender} promises {type(m).__name__} in a term it may forget")
        if self._promised.get(m.sender, 0) < m.term:
            self._promised[m.sender] = m.term
        return head

    def _vote(self, process: Process, m: Message, candidate: MemberId) -> None:
        head = self._promise(process, m)
        if head.term == m.term and head.voted_for != candidate:
            violated("7 votes", f"{m.sender} voted for {candidate} and may forget it")
        known = self._votes.setdefault((m.sender, m.term), candidate)
        if known != candidate:
            violated("7 votes", f"{m.sender} voted twice in term {m.term}")

    def _head(self, log: Environment, machine_id: int) -> _Head | None:
        """What is durable there; of one that has rotted, what it was before (see `damaging`)."""
        raw = log.durable_record(HEAD_KEY)
        if raw is None:  # never written yet, or its very key has rotted
            return (
                self._heads.get(machine_id) if log is self._damaged_logs.get(machine_id) else None
            )
        known = self._heads.get(machine_id)
        if (known is None or known.raw is not raw) and crc32(raw, HEAD_SEED) == CRC_RESIDUE:
            known = self._heads[machine_id] = _Head(raw)
        return known

    def purged(self, machine: Machine) -> int:
        """Up to which entry the durable log of `machine` has lost its beginning."""
        log = machine.log_file()
        head = None if log is None else self._head(log, machine.id)
        return head.purged if head is not None else 0

    def digest(self) -> int:
        """Of everything committed, for comparing two runs."""
        value = 0
        for entry in self.committed:
            value = crc32(entry.data, crc32(b"%d %d" % (entry.index, entry.term), value))
        return value
