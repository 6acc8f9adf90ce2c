"""Raft: every state transition of the protocol lives in this file.

`Raft` is a synchronous object with a single owner. Time and randomness come in from outside, so
the same inputs always give the same outputs. The owner's loop is:

    raft.tick(now_ms); raft.step(message) ...; raft.propose(data)
    ready = raft.ready()
    send ready.messages
    write ready.hard_state and ready.entries in one durable transaction     (may take its time:
    apply ready.committed_entries, then raft.applied_to(index)               go on meanwhile)
    when the write is durable: raft.advance(ready), then send ready.messages_after_sync

Snapshots (7): the owner makes, sends and fetches the files. Raft says which file to offer to whom
and which to fetch, and when a state that was unpacked takes the place of the old one:

    raft.snapshots_changed(refs); raft.purge(index)       when files came or went
    ready.fetch                                           get that file, unpack it, make it durable
    raft.restore(log_id, membership)                      then a later `ready.snapshot` is part of
                                                          a durable write like any other

Section numbers refer to Ongaro's thesis "Consensus: Bridging Theory and Practice" (3.x, 4.x, 6.x,
9.x, 10.x) and to the Raft paper (5.x).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dengine.errors import (
    ClusterUnavailable,
    Conflict,
    InvariantBroken,
    LeaderChanged,
    NotLeader,
)
from dengine.raft.log import RaftLog
from dengine.raft.log_clock import LogClock
from dengine.raft.membership import (
    Change,
    LeaveJoint,
    Membership,
    apply_change,
    decode_membership,
)
from dengine.raft.messages import (
    AppendRequest,
    AppendResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    InstallSnapshotRequest,
    Message,
    PreVoteRequest,
    PreVoteResponse,
    ReadIndexRequest,
    ReadIndexResponse,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
)
from dengine.raft.progress import APPEND_BYTES_MAX, Progress, ProgressState
from dengine.raft.quorum import VoteResult, joint_value, joint_vote, majority_vote
from dengine.raft.read_index import PendingRead, ReadRounds
from dengine.raft.storage import LogReader
from dengine.raft.types import (
    Entry,
    EntryKind,
    HardState,
    LogId,
    MemberId,
    ReadNonce,
    ReadState,
    Role,
    SnapshotRef,
)

RETRY_MS_MIN, RETRY_MS_MAX = 100, 300  # pause before an election that failed is tried again
BROKEN_MS_MIN, BROKEN_MS_MAX = 25, 250  # after stickiness ends, when the stream has broken
ASKED_READS_MAX = 10_000  # reads that wait for the leader's answer
AFTER_SYNC_MAX = 4096  # messages that wait for the disk; one that hangs must not fill the memory


@dataclass(frozen=True, slots=True)
class RaftConfig:
    """This node's own timing; members may differ in it.

    `timeout_ms_min` is also the time for which a voter refuses to depose a leader it hears (4.2.3)
    and without a quorum's answers after which a leader steps down (6.2).
    `start_stickiness_ms`: the same time after a start, where the node promised more before it.
    `sole_voter_wait_ms`: for so long a node that starts as the only voter lets others tell it that
    its disk is an older copy, before it leads.
    """

    me: MemberId
    timeout_ms_min: int = 1000
    timeout_ms_max: int = 2000
    heartbeat_ms: int = 100
    lease_ms: int = 500
    start_stickiness_ms: int = 0
    sole_voter_wait_ms: int = 0


class Transition(NamedTuple):
    """A change of role, for the people who watch. `term` is the term it happened in."""

    old: Role
    new: Role
    term: int
    reason: str


class Restore(NamedTuple):
    """A snapshot takes the place of the state, and of the log unless that goes on from it."""

    log_id: LogId  # the last entry it includes
    membership: Membership  # in force there
    reset_log: bool  # else the log stays as it is: the snapshot's last entry is in it (7)


@dataclass(frozen=True, slots=True)
class Ready:
    """What the owner must do now; the fields spell the durability order."""

    number: int  # of the write; 0 when there is nothing to write
    messages: Sequence[Message]  # may leave at once
    hard_state: HardState | None  # with `entries`: one durable transaction
    entries: Sequence[Entry]  # replace everything in the log from entries[0].index on
    messages_after_sync: Sequence[Message]  # only after that transaction
    committed_entries: Sequence[Entry]  # apply in order, then applied_to(the last one's index)
    read_states: Sequence[ReadState]  # serve these once applied
    transitions: Sequence[Transition]
    snapshot: Restore | None = None  # with `hard_state`, in the same transaction; no entries then
    fetch: tuple[MemberId, SnapshotRef] | None = None  # get this file from that member


@dataclass(slots=True)
class _Write:
    number: int
    started_ms: int


@dataclass(slots=True)
class _Outbox:
    messages: list[Message] = field(default_factory=list)
    after_sync: list[Message] = field(default_factory=list)
    read_states: list[ReadState] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)
    fetch: tuple[MemberId, SnapshotRef] | None = None


class Raft:
    """One member of the cluster.

    Args:
        config: identity and timing.
        storage: reads of the durable log.
        hard_state: as last written.
        memberships: (index, membership) of every CONFIG entry in the log, ascending, and before
            them the one that was in force where the log begins.
        applied_index: of the state machine.
        rng: for election timeouts.
        now_ms: the clock's reading; every later `tick` brings a newer one.
    """

    def __init__(
        self,
        config: RaftConfig,
        storage: LogReader,
        hard_state: HardState,
        memberships: Sequence[tuple[int, Membership]],
        applied_index: int,
        rng: random.Random,
        now_ms: int,
    ) -> None:
        self.config = config
        self.me = config.me
        self.log = RaftLog(storage, hard_state.commit_index, applied_index)
        self.term = hard_state.term
        if self.log.last_term > self.term:
            raise InvariantBroken(
                f"the log ends in term {self.log.last_term}, which this member has not entered: "
                f"its term is {self.term}"
            )
        self.voted_for = hard_state.voted_for
        self.role = Role.FOLLOWER
        self.leader: MemberId | None = None
        self.progress: dict[MemberId, Progress] = {}  # filled only while leader
        self.saw_lost_entries = False  # the leader counts on entries that this log does not have
        self.clock = LogClock()  # heartbeats carry it; the owner puts it into entries

        self._rng = rng
        self._now_ms = now_ms
        self._started_ms = now_ms
        self._durable = hard_state
        self._memberships: list[tuple[int, Membership]] = [(0, Membership()), *memberships]
        self._forget_old_memberships()
        self._out = _Outbox()
        self._write: _Write | None = None
        self._write_count = 0
        self._snapshots: tuple[SnapshotRef, ...] = ()  # files on this node, oldest first
        self._restore: Restore | None = None  # accepted, and not yet durable
        self.state_wrong = False  # the applied state, which has yet to be replaced

        self._leader_contact_ms: int | None = None
        self._counted_as_voter = False  # by a candidate whose log is too old for our vote
        self._pre_votes: dict[MemberId, bool] = {}
        self._votes: dict[MemberId, bool] = {}
        self._candidate_term = 0  # the term whose votes count for us; 0: none
        self._asked_reads: dict[ReadNonce, int] = {}  # and when each was asked

        self._noop_index = 0
        self._rounds = ReadRounds()
        self._heartbeat_due_ms = now_ms
        self._transfer: tuple[MemberId, int] | None = None  # (target, deadline)
        self._lease_given_up = False
        self._election_due_ms = 0
        self._reset_election_timer()
        if self.membership.is_sole_voter(self.me):
            # Nobody else could lead: no other reason to wait.
            self._election_due_ms = now_ms + config.sole_voter_wait_ms

    # --- what others may read -------------------------------------------------------------

    @property
    def membership(self) -> Membership:
        """The membership in force: the newest in the log, committed or not (4.1)."""
        return self._memberships[-1][1]

    @property
    def membership_index(self) -> int:
        return self._memberships[-1][0]

    @property
    def committed_membership(self) -> Membership:
        return self._memberships[0][1]

    @property
    def hard_state(self) -> HardState:
        return HardState(self.term, self.voted_for, self.log.commit_index)

    @property
    def is_leader(self) -> bool:
        return self.role is Role.LEADER

    @property
    def clock_ms(self) -> int:
        """The log time at the last `tick`."""
        return self.clock.at(self._now_ms)

    def proposal_clock_ms(self, at_least_ms: int) -> int:
        """The log time for an entry that this leader is about to propose, and not less than that of
        an entry which is committed already."""
        self.clock.start(at_least_ms, self._now_ms)
        return self.clock_ms

    def learn_clock(self, log_id: LogId, clock_ms: int) -> None:
        """The last entry of this log that carries a log time is that at `log_id`, or a state that
        ends there: what entries hold is the owner's business. Not for what this leader proposed."""
        self.clock.learn(log_id, clock_ms, self._now_ms)

    @property
    def may_propose(self) -> bool:
        """Leading, and not about to hand over."""
        return self.role is Role.LEADER and self._transfer is None and not self._leaving

    @property
    def committed_in_term(self) -> bool:
        """Has this leader committed an entry of its own term (5.4.2, 6.4)?"""
        return self.role is Role.LEADER and self.log.commit_index >= self._noop_index

    @property
    def writing(self) -> bool:
        return self._write is not None

    @property
    def state_lost(self) -> bool:
        """The log alone cannot rebuild the state: until a snapshot is restored this member never
        campaigns and applies nothing. It does append, acknowledge and vote, for its log and its
        promises are intact. (Also while a log is being reset for a snapshot.)
        """
        return self.log.state_lost

    @property
    def snapshot_wanted(self) -> bool:
        """A leader whose files help somebody not at all: the owner should take a snapshot."""
        return any(
            progress.wants_snapshot and self._choose_snapshot(progress) is None
            for progress in self.progress.values()
        )

    def offered_snapshots(self) -> dict[MemberId, SnapshotRef]:
        """Leader only: the offers under way. Their files, and the log after them, are needed."""
        return {m: p.offered for m, p in self.progress.items() if p.offered is not None}

    def helped_by_snapshots(self) -> dict[MemberId, tuple[SnapshotRef, int]]:
        """Leader only: who has come by a file of ours and does not have all yet that is committed:
        which file, and how far it has got since."""
        return {
            m: (p.helped_by, p.match_index)
            for m, p in self.progress.items()
            if p.helped_by is not None
        }

    def heard_within(self, member: MemberId, ms: int) -> bool:
        """Leader only: has `member` answered anything during the last `ms`?"""
        if member == self.me:
            return True
        progress = self.progress.get(member)
        return progress is not None and self._now_ms - progress.heard_ms <= ms

    def is_live(self, member: MemberId) -> bool:
        """Proof of life, unlike `heard_within`: a leader starts by believing that all are there."""
        progress = self.progress.get(member)
        answered = member == self.me or (progress is not None and progress.answered)
        return answered and self.heard_within(member, self.config.timeout_ms_min)

    def stored_by(self, member: MemberId) -> int:
        """Up to which entry the leader knows the log of `member` to be durable."""
        progress = self.progress.get(member)
        return 0 if progress is None else progress.match_index

    # --- inputs -----------------------------------------------------------------------------

    def bootstrap(self, membership: Membership) -> None:
        """Found a cluster: `membership` is entry 1 of term 1, equal and committed on every founder.

        No vote can be asked for or given before it is durable: both wait for the same write.
        """
        if self.log.last_index or self.term != 1 or self.role is not Role.FOLLOWER:
            raise InvariantBroken("only an empty log can be founded")
        self._append(EntryKind.CONFIG, membership.encode())
        self._commit_to(1)
        if membership.is_sole_voter(self.me):
            self._election_due_ms = self._now_ms

    def tick(self, now_ms: int) -> None:
        """Time has passed; `now_ms` never goes back. Call it before `step` and `propose`."""
        if now_ms < self._now_ms:
            raise InvariantBroken(f"the clock went back from {self._now_ms} to {now_ms} ms")
        self._now_ms = now_ms
        if self.role is Role.LEADER:
            self._tick_leader()
            return
        self._fail_asked_reads(now_ms - self.config.timeout_ms_max)  # the answer was lost
        if now_ms >= self._election_due_ms:
            self._election_timeout()

    def step(self, m: Message) -> None:
        """Take in one message from another member."""
        if m.to != self.me:
            return  # meant for an earlier incarnation of this directory
        if m.term > self.term:
            match m:
                case PreVoteRequest() | PreVoteResponse(granted=True):
                    pass  # speak about a term that nobody has entered yet (9.6)
                case VoteRequest(transfer=False) if self._is_sticky():
                    return  # 4.2.3: whoever hears a leader does not let others depose it
                case _:
                    self._become_follower(m.term, "a higher term was seen")
        elif m.term < self.term:
            self._answer_stale(m)
            return
        self._dispatch(m)

    def propose(self, data: bytes) -> LogId:
        """Append a batch of commands to the log. The outcome shows when the entry is applied.

        Raises:
            NotLeader, LeaderChanged: nothing was appended.
        """
        self._require_leader()
        return self._append(EntryKind.NORMAL, data)

    def propose_membership(self, change: Change) -> LogId | None:
        """Append a changed membership; None when `change` would change nothing.

        Raises:
            NotLeader, LeaderChanged, ClusterUnavailable: not now; nothing was appended.
            Conflict, JoinError: refused, the message says why.
        """
        self._require_leader()
        if not self.committed_in_term:  # Ongaro's 2015 erratum to 4.1
            raise ClusterUnavailable("the new leader has not committed an entry of its term yet")
        if self.membership_index > self.log.commit_index:
            raise Conflict("another membership change is not committed yet; try again in a moment")
        new = apply_change(self.membership, change)
        if new == self.membership:
            return None
        if new.voters != self.membership.voters:
            self._require_live_quorum(new)
        return self._append(EntryKind.CONFIG, new.encode())

    def transfer_leadership(self, to: MemberId) -> None:
        """Hand over to `to` (3.10); given up after one election timeout.

        Raises:
            NotLeader, LeaderChanged, ClusterUnavailable: not leading, not now.
            Conflict: `to` is not a live voter.
        """
        self._require_leader()
        if to == self.me:
            return
        if to not in self.membership.voters:
            raise Conflict(f"node {to.id} is not a voter: it cannot lead")
        if self._may_yet_answer(to):
            raise ClusterUnavailable(f"this leader has not heard from node {to.id} yet")
        if not self.is_live(to):
            raise Conflict(f"node {to.id} has not answered lately: it cannot take over")
        if self.progress[to].needs_snapshot is not None:
            raise Conflict(f"node {to.id} waits for a snapshot: it cannot take over yet")
        self._transfer = (to, self._now_ms + self.config.timeout_ms_min)
        self._hand_over_if_caught_up(to)

    def read_index(self, nonce: ReadNonce, *, lease: bool = False) -> None:
        """Ask for the index that reads filed under `nonce` must wait for (6.4).

        The answer is a `ReadState` in a later `ready()`; its index is None when there is no leader
        or leadership changed. With `lease` a leader that holds one answers alone.
        """
        if self.role is Role.LEADER:
            self._file_read(PendingRead(self.me, nonce), lease)
        elif self.leader is None or len(self._asked_reads) >= ASKED_READS_MAX:
            self._out.read_states.append(ReadState(nonce, None))
        else:
            self._asked_reads[nonce] = self._now_ms
            self._send(ReadIndexRequest(self.me, self.leader, self.term, nonce, lease))

    def report_unreachable(self, member: MemberId) -> None:
        """The stream to `member` broke.

        A leader feels its way again, for what was in flight may be lost. A follower that lost its
        leader need not wait as long as one that hears nothing: it asks for pre-votes as soon as
        the others may grant them, and those tell whether the leader is gone for them too.
        """
        if member == self.leader and self.role is Role.FOLLOWER:
            contact_ms = self._leader_contact_ms or self._now_ms
            pause_ms = self._rng.randint(BROKEN_MS_MIN, BROKEN_MS_MAX)
            due_ms = contact_ms + self.config.timeout_ms_min + pause_ms
            self._election_due_ms = min(self._election_due_ms, due_ms)
        progress = self.progress.get(member)
        if progress is not None and progress.state is ProgressState.REPLICATE:
            progress.probe(progress.match_index + 1)

    def step_down(self, reason: str) -> None:
        """Stop leading without a higher term having been seen."""
        if self.role is Role.LEADER:
            self._become_follower(self.term, reason)

    # --- snapshots: inputs (7) ----------------------------------------------------------------

    def snapshots_changed(self, refs: Sequence[SnapshotRef]) -> None:
        """The verified snapshots on this node are now `refs`, oldest first."""
        self._snapshots = tuple(refs)
        for member, progress in self.progress.items():
            self._offer_snapshot(member, progress, again=False)

    def purge(self, index: int) -> None:
        """The owner may drop the log up to `index` at any time from now on: it is not read again.

        The membership in force there survives: what is purged is committed, and the committed
        membership is always kept.
        """
        self.log.purge(index)

    def snapshot_helps(self, log_id: LogId) -> bool:
        """Is a snapshot up to there newer than what is committed here? Of a member without state:
        does its log go on from there?
        """
        if self.state_lost:
            return log_id.index >= self.log.base.index
        return log_id.index > self.log.commit_index

    def restore(self, log_id: LogId, membership: Membership) -> bool:
        """A verified snapshot up to `log_id` is unpacked and durable on this node: use it.

        True: a later `ready()` installs it; until that write is durable nothing is applied or
        appended. False: not wanted, for the state is as new or another one is being installed; a
        leader, which holds all that is committed, never wants one.
        """
        if self.is_leader or self._restore is not None or not self.snapshot_helps(log_id):
            return False
        if log_id.term > self.term:
            self._become_follower(log_id.term, "a snapshot of a higher term was installed")
        elif self.role is Role.CANDIDATE:  # its requests for votes speak of another log
            self._become_follower(self.term, "a snapshot was installed")
        kept = self.log.matches(log_id)
        if kept:
            self._check_membership_at(log_id.index, membership)
        elif log_id.index <= self.log.commit_index:
            raise InvariantBroken(
                f"a snapshot ends with {log_id}, but entry {log_id.index} is committed here with "
                f"term {self.log.term(log_id.index)}"
            )
        self._restore = Restore(log_id, membership, reset_log=not kept)
        return True

    def distrust_state(self) -> None:
        """The owner found the applied state wrong, and has yet to replace it, which may take long
        on a bad disk: until it has, this member leads nobody, and campaigns only where its log is
        needed (`_may_campaign`). All else it does.
        """
        self.state_wrong = True
        if self.role is not Role.FOLLOWER:
            self._become_follower(self.term, "its state is wrong")

    def forget_state(self) -> None:
        """The owner found the applied state wrong and threw it away.

        While the whole log is there nothing is lost: it is applied again from entry 1, and the
        member may campaign meanwhile (reads wait until the state has caught up). Either way a
        leader makes room for one whose state is sound.
        """
        self.distrust_state()
        self.log.forget_state()
        self.state_wrong = False

    # --- outputs ----------------------------------------------------------------------------

    def ready(self) -> Ready:
        """What is to be done now. Apply `committed_entries` before the next call.

        While a write is under way (handed out and not yet advanced) no other is handed out, and
        messages that need durability wait with it.
        """
        if self.role is Role.LEADER:
            self._start_read_round()
            self._replicate()
        number = 0
        hard_state: HardState | None = None
        entries: Sequence[Entry] = ()
        snapshot: Restore | None = None
        after_sync: Sequence[Message] = ()
        if self._write is None:
            snapshot = self._begin_restore()
            if snapshot is None:
                entries = self.log.unstable()
            if snapshot or entries or not self._term_and_vote_durable():
                hard_state = self.hard_state
                self._write_count += 1
                number = self._write_count
                self._write = _Write(number, self._now_ms)
                after_sync, self._out.after_sync = self._out.after_sync, []
            else:  # everything that these answers promise is durable already
                self._out.messages += self._out.after_sync
                self._out.after_sync = []
        out, self._out = self._out, _Outbox(after_sync=self._out.after_sync)
        if self._restore is None:
            self.log.check()
        return Ready(
            number=number,
            messages=out.messages,
            hard_state=hard_state,
            entries=entries,
            messages_after_sync=after_sync,
            committed_entries=() if self._restore is not None else self.log.to_apply(),
            read_states=out.read_states,
            transitions=out.transitions,
            snapshot=snapshot,
            fetch=out.fetch,
        )

    def advance(self, ready: Ready) -> None:
        """The write that `ready` asked for is durable; with a `snapshot`, that is the state now."""
        if self._write is None or ready.number != self._write.number or ready.hard_state is None:
            raise InvariantBroken(f"write {ready.number} is not the one that is under way")
        self._write = None
        self._durable = ready.hard_state
        if ready.entries:
            self.log.stable_to(ready.entries[-1].log_id)
        if ready.snapshot is not None:
            self.log.restored(ready.snapshot.log_id)
            self._restore = None
            self.state_wrong = False
        if self.role is Role.LEADER:
            # 10.2.1: a leader writes in parallel, but counts itself only now
            self.progress[self.me].acknowledged(self.log.stable_index)
            self._advance_commit()
        elif self._stands_for_election() and self._term_and_vote_durable():
            self._record_vote(self.me, granted=True)

    def applied_to(self, index: int) -> None:
        """The state machine has applied everything up to `index`."""
        self.log.applied_to(index)

    # --- elections (3.4, 4.2.3, 9.6) ----------------------------------------------------------

    def _election_timeout(self) -> None:
        self._reset_election_timer()
        if not self._may_campaign() or self._keeps_old_promise():
            return
        if self._write is not None and (self._write_overdue() or self.role is Role.CANDIDATE):
            # Our own vote could not become durable: asking others would only raise terms.
            self._retry_election()
            return
        self._pre_campaign()

    def _keeps_old_promise(self) -> bool:
        """To vote for itself would break what it promised a leader before it was started."""
        promised_ms = self.config.start_stickiness_ms
        alone = self.membership.is_sole_voter(self.me)
        return not alone and self._now_ms - self._started_ms < promised_ms

    def _may_campaign(self) -> bool:
        """Learners and the removed campaign only where an election can be won by nobody else
        (4.2.2, figure 4.6: "a server that is not part of its own latest configuration should still
        start new elections"): a voter whose removal is not committed, and whoever a candidate
        counts as a voter in vain, because its log is the better one. The same holds for a voter
        without its state, or with a wrong one: it could not serve, but others may lack what is in
        its log. Such a leader commits what it holds and hands over (`_leave`).
        """
        if self._restore is not None:
            return False  # the log is being replaced
        if self._counted_as_voter:
            return True
        return not self._has_no_state and any(
            self.me in membership.all_voters for _, membership in self._memberships
        )

    @property
    def _has_no_state(self) -> bool:
        """It is lost or known to be wrong, and another one has yet to take its place."""
        return self.state_lost or self.state_wrong

    def _pre_campaign(self) -> None:
        """Ask whether an election could be won before disturbing anybody's term (9.6)."""
        self._set_role(Role.CANDIDATE, "no leader was heard")
        self.leader = None
        self._fail_asked_reads()
        self._pre_votes = {self.me: True}
        last = self.log.last_id
        for voter in sorted(self.membership.all_voters - {self.me}):
            self._send(PreVoteRequest(self.me, voter, self.term + 1, last.index, last.term))
        self._retry_election()
        self._count_pre_votes()

    def _count_pre_votes(self) -> None:
        membership = self.membership
        result = joint_vote(membership.voters, membership.outgoing, self._pre_votes)
        if result is VoteResult.WON:
            self._campaign(transfer=False)
        elif result is VoteResult.LOST:
            self._pre_votes = {}

    def _campaign(self, *, transfer: bool) -> None:
        """Stand for election in the next term. Requests leave once term and own vote are durable:
        a candidate that crashed and came back must not collect votes for a log it has lost.
        """
        self._enter_term(self.term + 1)
        self.voted_for = self.me
        self._candidate_term = self.term
        self._pre_votes, self._votes = {}, {}
        last = self.log.last_id
        for voter in sorted(self.membership.all_voters - {self.me}):
            self._send_after_sync(
                VoteRequest(self.me, voter, self.term, last.index, last.term, transfer)
            )
        self._retry_election()

    def _stands_for_election(self) -> bool:
        """Candidate of this very term. Late votes never count: neither for an older term, nor
        for one whose leader we have followed since, perhaps into another membership.
        """
        return self.role is Role.CANDIDATE and self._candidate_term == self.term

    def _record_vote(self, voter: MemberId, *, granted: bool) -> None:
        self._votes.setdefault(voter, granted)
        membership = self.membership
        result = joint_vote(membership.voters, membership.outgoing, self._votes)
        if result is VoteResult.WON:
            self._become_leader()
        elif result is VoteResult.LOST:
            self._retry_election()

    def _on_pre_vote_request(self, m: PreVoteRequest) -> None:
        """A refusal for the log alone lets who else would not stand for election do so: a voter
        without its state, or a learner that a promotion has made a voter for the sender, who may
        not win without it.
        """
        may_grant = m.term > self.term and not self._is_sticky()
        granted = may_grant and self.log.is_up_to_date(LogId(m.last_index, m.last_term))
        if may_grant and not granted:
            self._counted_as_voter = True
        self._send(PreVoteResponse(self.me, m.sender, m.term if granted else self.term, granted))

    def _on_pre_vote_response(self, m: PreVoteResponse) -> None:
        if self.role is not Role.CANDIDATE or not self._pre_votes:
            return
        if m.granted and m.term != self.term + 1:
            return  # answers a question asked in an earlier term
        self._pre_votes.setdefault(m.sender, m.granted)
        self._count_pre_votes()

    def _on_vote_request(self, m: VoteRequest) -> None:
        """5.2, 5.4.1. Learners answer too: their own view of the membership may be old."""
        can_vote = self.voted_for in (None, m.sender) and self.leader is None
        granted = (
            can_vote
            and (m.transfer or not self._is_sticky())
            and self.log.is_up_to_date(LogId(m.last_index, m.last_term))
        )
        if granted:
            self.voted_for = m.sender
            self._reset_election_timer()
        self._send_after_sync(VoteResponse(self.me, m.sender, self.term, granted))

    def _on_vote_response(self, m: VoteResponse) -> None:
        if self._stands_for_election():
            self._record_vote(m.sender, granted=m.granted)

    def _on_timeout_now(self, m: TimeoutNow) -> None:
        if self.role is not Role.LEADER and self._may_campaign():
            self._set_role(Role.CANDIDATE, f"node {m.sender.id} hands over leadership")
            self.leader = None
            self._fail_asked_reads()
            self._campaign(transfer=True)

    def _is_sticky(self) -> bool:
        """Would a vote now depose a leader that is alive, or break a promise made before a start?

        4.2.3, and the lease rests on it (6.4.1): for `timeout_ms_min` after hearing a leader, or
        after a start that made us forget whom we heard, no vote and no pre-vote is granted.
        """
        if self.role is Role.LEADER:
            return True
        since, config = self._leader_contact_ms, self.config
        if since is not None and self._now_ms - since < config.timeout_ms_min:
            return True
        if since is None and self.membership.is_sole_voter(self.me):
            return False
        promised_ms = max(config.start_stickiness_ms, config.timeout_ms_min if since is None else 0)
        return self._now_ms - self._started_ms < promised_ms

    # --- changes of role ---------------------------------------------------------------------

    def _enter_term(self, term: int) -> None:
        if term <= self.term:
            raise InvariantBroken(f"term {self.term} cannot be followed by {term}")
        self.term = term
        self.voted_for = None
        self._out.after_sync.clear()  # answers in an older term concern nobody any more

    def _become_follower(self, term: int, reason: str) -> None:
        if self.role is Role.LEADER:
            self._stop_leading()
        if term > self.term:
            self._enter_term(term)
        self._set_role(Role.FOLLOWER, reason)
        self.leader = None
        self._candidate_term = 0
        # Requests for votes that still wait for the disk speak of a log that may change now.
        self._out.after_sync = [m for m in self._out.after_sync if not isinstance(m, VoteRequest)]
        self._pre_votes, self._votes = {}, {}
        self._fail_asked_reads()
        self._reset_election_timer()

    def _stop_leading(self) -> None:
        for read in self._rounds.drain():
            self._answer_read(read, None)
        self.progress = {}
        self._transfer = None

    def _become_leader(self) -> None:
        self._set_role(Role.LEADER, "elected")
        self.leader = self.me
        self._votes = {}
        self._rounds = ReadRounds()
        self._transfer = None
        self._lease_given_up = False
        self.progress = {}
        self._sync_progress(self.log.last_index + 1)
        self.progress[self.me].acknowledged(self.log.stable_index)
        self.clock.lead(self.term, self.log.last_term, self._now_ms)
        self._noop_index = self._append(EntryKind.NOOP, b"").index
        self._broadcast_heartbeat()

    def _follow(self, leader: MemberId) -> None:
        """`leader` spoke in our term, so it is the leader of this term (5.2)."""
        if self.role is Role.LEADER:
            raise InvariantBroken(f"node {leader.id} also leads in term {self.term}")
        if self.role is Role.CANDIDATE:
            self._become_follower(self.term, f"node {leader.id} leads")
        if self.leader != leader:
            self._fail_asked_reads()
            self.leader = leader
        self._leader_contact_ms = self._now_ms
        self._counted_as_voter = False
        self._reset_election_timer()

    def _set_role(self, role: Role, reason: str) -> None:
        if role is not self.role:
            self._out.transitions.append(Transition(self.role, role, self.term, reason))
            self.role = role

    # --- leading: time ------------------------------------------------------------------------

    def _tick_leader(self) -> None:
        timeout_ms = self.config.timeout_ms_min
        membership = self.membership
        heard = {m: p.heard_ms for m, p in self.progress.items()}
        heard[self.me] = self._now_ms
        quorum_heard_ms = joint_value(membership.voters, membership.outgoing, heard)
        if self._now_ms - quorum_heard_ms > timeout_ms:  # CheckQuorum (6.2)
            self.step_down(f"no majority answered for {timeout_ms} ms")
            return
        if self._write_overdue():  # heartbeats would go on while nothing can be committed here
            self.step_down(f"the disk has not finished a log write for {timeout_ms // 2} ms")
            return
        if self._transfer is not None and self._now_ms >= self._transfer[1]:
            self._transfer = None  # 3.10: the target did not take over; lead on
        if self._now_ms >= self._heartbeat_due_ms:
            self._broadcast_heartbeat()
        for member, progress in self.progress.items():
            commit = min(progress.match_index, self.log.commit_index)
            if member != self.me and progress.commit_sent < commit:
                self._send_heartbeat(member, 0)

    def _write_overdue(self) -> bool:
        return (
            self._write is not None
            and self._now_ms - self._write.started_ms > self.config.timeout_ms_min // 2
        )

    def _broadcast_heartbeat(self) -> None:
        number = self._open_round(list(self.progress))
        for member, progress in self.progress.items():
            progress.asked_round = progress.asked_round or number
            self._offer_snapshot(member, progress, again=True)
        self._heartbeat_due_ms = self._now_ms + self.config.heartbeat_ms

    def _open_round(self, members: Sequence[MemberId]) -> int:
        commit = self.log.commit_index
        number = self._rounds.start(commit if self.committed_in_term else None, self._now_ms)
        for member in members:
            if member == self.me:
                continue
            self._send_heartbeat(member, number)
        self.progress[self.me].acked_round = number
        self._confirm_rounds()
        return number

    def _send_heartbeat(self, member: MemberId, number: int) -> None:
        commit, progress = self._commit_known_to(member), self.progress[member]
        progress.commit_sent = min(progress.match_index, self.log.commit_index)
        self._send(
            HeartbeatRequest(
                self.me,
                member,
                self.term,
                number,
                commit.index,
                commit.term,
                self.clock.at(self._now_ms),
            )
        )

    def _commit_known_to(self, member: MemberId) -> LogId:
        """How far `member` may commit without a check of its log: what it has acknowledged."""
        progress = self.progress.get(member)
        index = min(progress.match_index, self.log.commit_index) if progress is not None else 0
        term = self.log.term(index)
        return LogId(index, term) if term is not None else LogId(0, 0)

    # --- leading: replication (5.3) -----------------------------------------------------------

    def _append(self, kind: EntryKind, data: bytes) -> LogId:
        entry = Entry(self.log.last_index + 1, self.term, kind, data)
        self.log.append(entry)
        if kind is EntryKind.CONFIG:
            self._adopt_membership(entry)
        return entry.log_id

    def _replicate(self) -> None:
        for member, progress in self.progress.items():
            if member == self.me:
                continue
            while not progress.paused and progress.next_index <= self.log.last_index:
                self._send_append(member, progress)

    def _send_append(self, member: MemberId, progress: Progress, *, empty: bool = False) -> None:
        prev_index = progress.next_index - 1
        prev_term = self.log.term(prev_index)
        if prev_term is None or progress.next_index < self.log.first_index:
            progress.await_snapshot()
            self._offer_snapshot(member, progress, again=True)
            return
        entries: Sequence[Entry] = ()
        if not empty:
            entries = self.log.entries(
                progress.next_index, self.log.last_index + 1, APPEND_BYTES_MAX
            )
            progress.sent(entries[-1].index)
        commit = self.log.commit_index
        progress.commit_sent = max(progress.commit_sent, min(commit, prev_index + len(entries)))
        self._send(
            AppendRequest(self.me, member, self.term, prev_index, prev_term, tuple(entries), commit)
        )

    def _on_append_response(self, m: AppendResponse) -> None:
        progress = self.progress.get(m.sender)
        if self.role is not Role.LEADER or progress is None:
            return
        progress.heard(self._now_ms)
        if m.granted:
            if not self.log.matches(LogId(m.index, m.index_term)):
                return  # speaks about an entry that was replaced since (append ABA)
            if progress.acknowledged(m.index, self.log.first_index):
                self._advance_commit()
                if self._transfer is not None:
                    self._hand_over_if_caught_up(self._transfer[0])
            if progress.helped_by is not None and progress.match_index >= self.log.commit_index:
                progress.helped_by = None  # it follows by now, and is held on to like any other
        else:
            agreed = self.log.last_not_above(m.hint_index, m.hint_term)
            progress.refused(m.index, self.log.base.index if agreed is None else agreed.index + 1)

    def _advance_commit(self) -> None:
        """5.4.2: only an entry of the current term is committed by counting; what came before it
        is committed with it. Learners are in nobody's quorum.
        """
        matches = {m: p.match_index for m, p in self.progress.items()}
        membership = self.membership
        index = joint_value(membership.voters, membership.outgoing, matches)
        if index <= self.log.commit_index or self.log.term(index) != self.term:
            return
        self._commit_to(index)
        if self.membership_index > index:
            return
        if membership.joint:  # whoever leads finishes a joint state it finds (4.3)
            self._append(EntryKind.CONFIG, apply_change(membership, LeaveJoint()).encode())
        elif self.me not in membership.voters or self._has_no_state:
            self._leave(membership)

    def _leave(self, membership: Membership) -> None:
        """4.2.2: a leader that is not a voter steps down once that is committed, and so does one
        that cannot serve.
        """
        heirs = [
            v
            for v in membership.voters
            if v != self.me and v in self.progress and self.progress[v].needs_snapshot is None
        ]
        if heirs:
            heir = max(heirs, key=lambda v: (self.progress[v].match_index, -v.id))
            self._send_heartbeat(heir, 0)
            self._send(TimeoutNow(self.me, heir, self.term))
        self.step_down(f"it {self._why_leaving}")

    def _hand_over_if_caught_up(self, to: MemberId) -> None:
        progress = self.progress.get(to)
        if progress is not None and progress.match_index == self.log.last_index:
            self._lease_given_up = True  # 6.4.1: the target may win before our lease ends
            self._send(TimeoutNow(self.me, to, self.term))

    def _require_leader(self) -> None:
        if self.role is not Role.LEADER:
            raise NotLeader("this node does not lead")
        if self._transfer is not None:
            raise LeaderChanged("leadership is being handed over; try again in a moment")
        if self._leaving:
            raise LeaderChanged(
                f"this leader {self._why_leaving} and hands over; try again in a moment"
            )

    @property
    def _leaving(self) -> bool:
        """4.2.2: a voter whose removal is in its log, or who never was one, or has no state.
        Nothing is appended behind that: it may be committed when we do not lead any more, or are
        not even there to hear of it, and whoever waits would never know.
        """
        return self.me not in self.membership.all_voters or self._has_no_state

    @property
    def _why_leaving(self) -> str:
        return "has no state" if self._has_no_state else "is not a voter"

    def _require_live_quorum(self, new: Membership) -> None:
        votes = {v: self.is_live(v) for v in new.voters}
        if majority_vote(new.voters, votes) is not VoteResult.WON:
            silent = ", ".join(str(v.id) for v, alive in sorted(votes.items()) if not alive)
            hoped = {v: alive or self._may_yet_answer(v) for v, alive in votes.items()}
            if majority_vote(new.voters, hoped) is VoteResult.WON:
                raise ClusterUnavailable(f"this leader has not heard from node {silent} yet")
            raise Conflict(
                f"refused: of the {len(new.voters)} voters this would leave, {silent} did not "
                "answer lately, so the cluster could not commit anything any more"
            )

    def _may_yet_answer(self, member: MemberId) -> bool:
        """We have led for so short a time that its silence says nothing."""
        progress = self.progress.get(member)
        return (
            progress is not None
            and not progress.answered
            and self.heard_within(member, self.config.timeout_ms_min)
        )

    # --- leading: snapshots (7) -----------------------------------------------------------------

    def _choose_snapshot(self, progress: Progress) -> SnapshotRef | None:
        """The file for a member that needs one. A transfer under way goes on with its file while
        that exists and still helps; everybody else gets the newest.
        """
        lowest = max(self.log.base.index, progress.needs_snapshot or 0)
        if progress.state is ProgressState.SNAPSHOT:
            lowest = max(lowest, progress.match_index + 1)
        for ref in (progress.offered, *self._snapshots[-1:]):
            if ref is not None and ref in self._snapshots and ref.index >= lowest:
                return ref
        return None

    def _offer_snapshot(self, member: MemberId, progress: Progress, *, again: bool) -> None:
        """Tell `member` which file to fetch, when that is news or `again` is set."""
        if not progress.wants_snapshot:
            return
        before, progress.offered = progress.offered, self._choose_snapshot(progress)
        if progress.offered is not None and (again or progress.offered != before):
            self._send(InstallSnapshotRequest(self.me, member, self.term, progress.offered))

    def _learn_snapshot_need(self, m: HeartbeatResponse, progress: Progress) -> None:
        """A member has lost its state, or has it back. An older answer that comes late says
        nothing: rounds grow.
        """
        if m.round < progress.acked_round:
            return
        progress.needs_snapshot = m.needs_snapshot
        if progress.wants_snapshot:
            self._offer_snapshot(m.sender, progress, again=False)
        else:
            progress.withdraw()

    # --- leading: heartbeats and reads (6.4) ----------------------------------------------------

    def _on_heartbeat_response(self, m: HeartbeatResponse) -> None:
        progress = self.progress.get(m.sender)
        if self.role is not Role.LEADER or progress is None:
            return
        progress.heard(self._now_ms)
        progress.timeout_ms_min = m.timeout_ms_min
        self._learn_snapshot_need(m, progress)
        if m.round > progress.acked_round:
            progress.acked_round = m.round
            progress.acked_sent_ms = max(progress.acked_sent_ms, self._rounds.sent_ms(m.round))
            self._confirm_rounds()
        if progress.asked_round and m.round >= progress.asked_round:
            progress.asked_round = 0
            self._find_lost(m.sender, progress)

    def _find_lost(self, member: MemberId, progress: Progress) -> None:
        """It is there, a heartbeat interval or a round trip after it was last asked so: what it has
        not acknowledged by now may have been lost. An empty append finds out.
        """
        if progress.match_index < self.log.last_index:
            progress.probe_sent = False
            if progress.inflight:
                self._send_append(member, progress, empty=True)

    def _file_read(self, read: PendingRead, lease: bool) -> None:
        if lease and self.committed_in_term and self._holds_lease():
            self._answer_read(read, self.log.commit_index)
        else:
            self._rounds.arrived.append(read)

    def _start_read_round(self) -> None:
        """One round at a time: reads that arrive meanwhile share the next."""
        rounds = self._rounds
        if rounds.arrived and not rounds.outstanding and self.committed_in_term:
            voters = self.membership.all_voters
            self._open_round([m for m in self.progress if m in voters])

    def _confirm_rounds(self) -> None:
        acked = {m: p.acked_round for m, p in self.progress.items()}
        membership = self.membership
        confirmed = joint_value(membership.voters, membership.outgoing, acked)
        for read, index in self._rounds.confirm(confirmed):
            self._answer_read(read, index)

    def _answer_read(self, read: PendingRead, index: int | None) -> None:
        if read.requester == self.me:
            self._out.read_states.append(ReadState(read.nonce, index))
            return
        commit = self._commit_known_to(read.requester)
        self._send(
            ReadIndexResponse(
                self.me, read.requester, self.term, read.nonce, index, commit.index, commit.term
            )
        )

    def _holds_lease(self) -> bool:
        """6.4.1: a quorum answered heartbeats SENT so recently that none of its members can have
        voted for anybody else yet.
        """
        if self._lease_given_up or self.me not in self.membership.voters:
            return False  # the last voter that remains may lead at once, without any grace
        timeouts = [
            p.timeout_ms_min
            for m, p in self.progress.items()
            if p.timeout_ms_min and m in self.membership.all_voters
        ]
        window_ms = min(self.config.lease_ms, min(timeouts, default=2**31) // 2)
        sent = {m: p.acked_sent_ms for m, p in self.progress.items()}
        sent[self.me] = self._now_ms
        since_ms = joint_value(self.membership.voters, self.membership.outgoing, sent)
        return since_ms > 0 and self._now_ms - since_ms < window_ms

    # --- following --------------------------------------------------------------------------------

    def _on_append_request(self, m: AppendRequest) -> None:
        known = m.entries[: max(self.log.commit_index - m.prev_index, 0)]
        if any(self.log.term(e.index) not in (None, e.term) for e in known):
            return  # one of the two goes by an older copy of its disk: nothing to agree on
        self._follow(m.sender)
        if self._restore is not None:
            return  # this log is about to be replaced; the leader sends again
        prev, entries = LogId(m.prev_index, m.prev_term), m.entries
        commit = self.log.commit_index
        if m.prev_index < commit:  # late or repeated: what is committed matches by definition
            prev = LogId(commit, self.log.term(commit) or 0)
            entries = tuple(e for e in entries if e.index > commit)
        elif not self.log.matches(prev):
            hint = self.log.last_not_above(m.prev_index, m.prev_term) or self.log.base
            self._out.messages.append(
                AppendResponse(
                    self.me, m.sender, self.term, False, m.prev_index, 0, hint.index, hint.term
                )
            )
            return
        truncated = self.log.merge(entries)
        if truncated is not None:
            self._drop_memberships(truncated)
            self.clock.truncated(truncated)
        for entry in entries:
            if entry.kind is EntryKind.CONFIG and entry.index > self.membership_index:
                self._adopt_membership(entry)
        last = entries[-1].log_id if entries else prev
        self._commit_to(min(m.commit_index, last.index))
        self._acknowledge(m.sender, last)

    def _acknowledgement(self, leader: MemberId, last: LogId) -> AppendResponse:
        return AppendResponse(
            self.me, leader, self.term, True, last.index, last.term, last.index, last.term
        )

    def _acknowledge(self, leader: MemberId, last: LogId) -> None:
        response = self._acknowledgement(leader, last)
        if last.index <= self.log.stable_index and self._term_and_vote_durable():
            self._send(response)
        else:
            self._send_after_sync(response)

    def _on_install_snapshot_request(self, m: InstallSnapshotRequest) -> None:
        """Fetch what the leader offers, or say that it is not needed: the acknowledgement of what
        is committed here lets the leader go on with entries.
        """
        self._follow(m.sender)
        if self._restore is not None:
            return  # acknowledged once that is installed
        if self.snapshot_helps(m.snapshot.log_id):
            self._out.fetch = (m.sender, m.snapshot)
        elif not self.state_lost:
            commit = self.log.commit_index
            self._acknowledge(m.sender, LogId(commit, self.log.term(commit) or 0))

    def _on_heartbeat_request(self, m: HeartbeatRequest) -> None:
        self._follow(m.sender)
        self.clock.hear(m.term, m.clock_ms, self.log.last_term, self._now_ms)
        self._learn_commit(LogId(m.commit_index, m.commit_term))
        if m.round == 0:
            return
        needs = self.log.base.index if self.state_lost and self._restore is None else None
        response = HeartbeatResponse(
            self.me, m.sender, self.term, m.round, self.config.timeout_ms_min, needs
        )
        if self._term_and_vote_durable():
            self._send(response)  # says nothing about the log, so it need not wait for the disk
        else:
            self._send_after_sync(response)

    def _learn_commit(self, commit: LogId) -> None:
        """The leader names a committed entry that it knows we have acknowledged."""
        if commit.index <= self.log.commit_index:
            return
        if self.log.matches(commit):
            self._commit_to(commit.index)
        else:
            self.saw_lost_entries = True  # acknowledged and gone: this directory is an old copy

    def _on_read_index_request(self, m: ReadIndexRequest) -> None:
        if self.role is Role.LEADER:
            self._file_read(PendingRead(m.sender, m.nonce), m.lease)
        else:
            self._send(ReadIndexResponse(self.me, m.sender, self.term, m.nonce, None, 0, 0))

    def _on_read_index_response(self, m: ReadIndexResponse) -> None:
        if m.nonce in self._asked_reads:
            del self._asked_reads[m.nonce]
            self._learn_commit(LogId(m.commit_index, m.commit_term))
            self._out.read_states.append(ReadState(m.nonce, m.index))

    def _answer_stale(self, m: Message) -> None:
        """A message from an older term. Its sender must learn of ours where it could get stuck:
        a leader that nobody follows any more, a pre-candidate that lags (9.6).
        """
        match m:
            case AppendRequest() | HeartbeatRequest() | InstallSnapshotRequest():
                self._send_after_sync(
                    AppendResponse(self.me, m.sender, self.term, False, 0, 0, 0, 0)
                )
            case PreVoteRequest():
                self._send(PreVoteResponse(self.me, m.sender, self.term, False))

    # --- installing a snapshot (7) -------------------------------------------------------------

    def _begin_restore(self) -> Restore | None:
        """The snapshot to install now: log and memberships in memory become what the durable
        write will make of those on disk. No other write is in flight here, and none starts, so
        none can bring back or make durable what the reset drops (append ABA).

        A reset loses nothing that a quorum may count on (7). Everything up to the snapshot's last
        entry is in the snapshot. Whatever this log holds beyond it, or instead of it, is not
        preceded by that entry, which is committed; so by log matching and leader completeness it
        is not committed and never will be, whoever has been told that it is durable here.
        """
        restore = self._restore
        if restore is None:
            return None
        if restore.reset_log:
            self.log.reset(restore.log_id)
            self._memberships = [(restore.log_id.index, restore.membership)]
            self._drop_waiting_acknowledgements()
        elif self.log.unstable():
            return None  # the snapshot's last entry and what waits with it must be durable first
        else:
            self._commit_to(restore.log_id.index)
        if self.leader is not None:
            self._send_after_sync(self._acknowledgement(self.leader, restore.log_id))
        return restore

    def _drop_waiting_acknowledgements(self) -> None:
        """They speak of entries that will never be durable here."""
        self._out.after_sync = [
            m for m in self._out.after_sync if not isinstance(m, AppendResponse) or not m.granted
        ]

    def _check_membership_at(self, index: int, membership: Membership) -> None:
        """State Machine Safety: a log and a snapshot that share an entry share what led to it."""
        known = [m for i, m in self._memberships if i <= index]
        if known and known[-1] != membership:
            raise InvariantBroken(f"the snapshot up to {index} has another membership than the log")

    # --- membership (4.1, 4.3) -----------------------------------------------------------------

    def _adopt_membership(self, entry: Entry) -> None:
        """In force from now on, committed or not (4.1)."""
        self._memberships.append((entry.index, decode_membership(entry.data)))
        if self.role is Role.LEADER:
            self._sync_progress(entry.index)

    def _drop_memberships(self, index: int) -> None:
        """Entries from `index` on were truncated: fall back to the membership before (4.1)."""
        self._memberships = [(i, m) for i, m in self._memberships if i < index]

    def _forget_old_memberships(self) -> None:
        """Keep the committed one and whatever is newer."""
        while len(self._memberships) > 1 and self._memberships[1][0] <= self.log.commit_index:
            del self._memberships[0]

    def _sync_progress(self, next_index: int) -> None:
        """One Progress per member, new ones starting at `next_index`.

        Those of members that stay survive, activity included: a fresh one would look silent, and
        CheckQuorum would depose the leader.
        """
        wanted = {m.id for m in self.membership.members} | {self.me}
        for member in [m for m in self.progress if m not in wanted]:
            del self.progress[member]
        for member in sorted(wanted - set(self.progress)):
            self.progress[member] = Progress(next_index, self._now_ms)

    def _commit_to(self, index: int) -> None:
        if index > self.log.commit_index:
            self.log.commit_to(index)
            self._forget_old_memberships()

    # --- small things ---------------------------------------------------------------------------

    def _dispatch(self, m: Message) -> None:
        match m:
            case AppendResponse():
                self._on_append_response(m)
            case AppendRequest():
                self._on_append_request(m)
            case HeartbeatResponse():
                self._on_heartbeat_response(m)
            case HeartbeatRequest():
                self._on_heartbeat_request(m)
            case InstallSnapshotRequest():
                self._on_install_snapshot_request(m)
            case ReadIndexRequest():
                self._on_read_index_request(m)
            case ReadIndexResponse():
                self._on_read_index_response(m)
            case VoteRequest():
                self._on_vote_request(m)
            case VoteResponse():
                self._on_vote_response(m)
            case PreVoteRequest():
                self._on_pre_vote_request(m)
            case PreVoteResponse():
                self._on_pre_vote_response(m)
            case TimeoutNow():
                self._on_timeout_now(m)

    def _send(self, message: Message) -> None:
        self._out.messages.append(message)

    def _send_after_sync(self, message: Message) -> None:
        """With the next durable write. Any message may be lost, so the oldest makes room."""
        waiting = self._out.after_sync
        if len(waiting) >= AFTER_SYNC_MAX:
            del waiting[0]
        waiting.append(message)

    def _term_and_vote_durable(self) -> bool:
        return (self._durable.term, self._durable.voted_for) == (self.term, self.voted_for)

    def _fail_asked_reads(self, until_ms: int | None = None) -> None:
        """Those asked up to `until_ms`, or all."""
        for nonce, asked_ms in list(self._asked_reads.items()):
            if until_ms is not None and asked_ms > until_ms:
                return  # in the order in which they were asked
            del self._asked_reads[nonce]
            self._out.read_states.append(ReadState(nonce, None))

    def _reset_election_timer(self) -> None:
        timeout_ms = self._rng.randint(self.config.timeout_ms_min, self.config.timeout_ms_max)
        self._election_due_ms = self._now_ms + timeout_ms

    def _retry_election(self) -> None:
        self._election_due_ms = self._now_ms + self._rng.randint(RETRY_MS_MIN, RETRY_MS_MAX)
