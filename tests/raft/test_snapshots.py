"""Snapshots: paper 7, thesis 5 (5.1.1-5.1.3, 5.3); purging, offering, installing, lost states.

What a leader says about snapshots is here too; see test_snapshot_installs for the durable steps.
Whole `Ready`s are compared: what is not named must be empty.
"""

from __future__ import annotations

import pytest

from dengine.errors import Conflict, InvariantBroken
from dengine.raft.log import TAIL_ENTRIES_KEPT, RaftLog
from dengine.raft.membership import AddLearner
from dengine.raft.messages import (
    AppendRequest,
    AppendResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    InstallSnapshotRequest,
    Message,
    PreVoteRequest,
    PreVoteResponse,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
)
from dengine.raft.progress import Progress, ProgressState
from dengine.raft.raft import Transition
from dengine.raft.types import HardState, LogId, MemberId, Role, SnapshotRef
from tests.raft.harness import (
    A,
    B,
    C,
    Disk,
    Server,
    config,
    expect,
    leader,
    make_log,
    member,
    membership,
    noop,
    normal,
    past_grace,
    server,
    snapshot_of,
)

ABC = membership(A, B, C)


def ack(sender: MemberId, to: MemberId, term: int, index: int, index_term: int) -> AppendResponse:
    return AppendResponse(sender, to, term, True, index, index_term, index, index_term)


def refusal(sender: MemberId, prev_index: int, hint: LogId, term: int = 2) -> AppendResponse:
    return AppendResponse(sender, A, term, False, prev_index, 0, hint.index, hint.term)


def to(member: MemberId, messages: list[Message]) -> list[Message]:
    return [m for m in messages if m.to == member]


def offers(messages: list[Message]) -> list[InstallSnapshotRequest]:
    return [m for m in messages if isinstance(m, InstallSnapshotRequest)]


def purged_leader(*, keep_file: bool = True) -> tuple[Server, SnapshotRef]:
    """A leads ABC in term 2 with 1..6 committed; 1..5 are in its snapshot, and purged. B is slow:
    it has acknowledged nothing but the no-op, 2.
    """
    node = leader(A, ABC)
    for _ in range(3):
        node.raft.propose(b"x")
    node.settle()
    node.acknowledge(C)
    node.settle()
    ref = node.take_snapshot()
    node.raft.propose(b"y")
    node.settle()
    node.acknowledge(C)
    node.settle()
    node.purge(5)
    assert node.raft.log.base == ref.log_id == LogId(5, 2)
    if not keep_file:
        node.lose_file(ref)
    return node, ref


def awaiting(node: Server) -> None:
    """The stream to B broke: what was in flight is lost, and 3 cannot be sent again."""
    node.raft.report_unreachable(B)


# --- the leader offers (paper 7) -----------------------------------------------------------------


def test_a_leader_offers_a_snapshot_when_the_next_entry_is_purged() -> None:
    """7: "when the leader has already discarded the next log entry that it needs to send." """
    node, ref = purged_leader()
    awaiting(node)
    expect(node.take(), messages=[InstallSnapshotRequest(A, B, 2, ref)])
    assert node.raft.progress[B].state is ProgressState.SNAPSHOT
    assert node.raft.offered_snapshots() == {B: ref}
    assert not node.raft.snapshot_wanted


def test_an_offer_is_repeated_with_every_periodic_heartbeat_and_no_entry_is_sent() -> None:
    """7: entries do not help; any message may be lost, so the offer comes again."""
    node, ref = purged_leader()
    awaiting(node)
    node.settle()
    for number in (2, 3, 4):
        node.tick(100)
        assert to(B, node.settle()) == [
            HeartbeatRequest(A, B, 2, number, 0, 0),
            InstallSnapshotRequest(A, B, 2, ref),
        ]
        node.step(HeartbeatResponse(B, A, 2, number, 1000), HeartbeatResponse(C, A, 2, number, 99))
        node.raft.propose(b"z")
        assert to(B, node.settle()) == []


def test_a_member_that_has_what_was_offered_gets_the_entries_after_it() -> None:
    """7: "the follower ... accepts log entries that follow it." """
    node, ref = purged_leader()
    awaiting(node)
    node.settle()
    assert node.raft.helped_by_snapshots() == {}
    node.step(ack(B, A, 2, 5, 2))
    expect(node.take(), messages=[AppendRequest(A, B, 2, 5, 2, (normal(6, 2, b"y"),), 6)])
    assert node.raft.progress[B].state is ProgressState.REPLICATE
    assert node.raft.offered_snapshots() == {}
    assert node.raft.helped_by_snapshots() == {B: (ref, 5)}, "the log after it is still needed"
    node.step(ack(B, A, 2, 6, 2))
    assert node.raft.helped_by_snapshots() == {}, "it has caught up, and is like any other"


def test_late_answers_do_not_end_the_wait_for_a_snapshot() -> None:
    """7: acknowledgements of purged entries and old refusals change nothing."""
    node, ref = purged_leader()
    awaiting(node)
    node.settle()
    node.step(ack(B, A, 2, 2, 2), ack(B, A, 2, 4, 2), ack(B, A, 2, 0, 0))
    node.step(refusal(B, 5, LogId(1, 1)), refusal(B, 1, LogId(0, 0)), refusal(B, 6, LogId(5, 2)))
    expect(node.take())
    assert node.raft.progress[B].state is ProgressState.SNAPSHOT
    assert node.raft.offered_snapshots() == {B: ref}


def test_a_late_acknowledgement_may_show_that_no_snapshot_is_needed() -> None:
    """7: what it has is durable, and the log goes on from there."""
    node, _ = purged_leader()
    awaiting(node)
    node.settle()
    node.step(ack(B, A, 2, 6, 2))
    node.raft.propose(b"z")
    assert to(B, node.settle()) == [AppendRequest(A, B, 2, 6, 2, (normal(7, 2, b"z"),), 6)]
    assert node.raft.offered_snapshots() == {}


def test_a_leader_without_a_file_wants_one_and_offers_it_at_once() -> None:
    """5.1.2: the owner decides when to write one; here it is told that somebody needs it."""
    node, _ = purged_leader(keep_file=False)
    assert not node.raft.snapshot_wanted
    awaiting(node)
    expect(node.take())
    assert node.raft.snapshot_wanted
    assert node.raft.offered_snapshots() == {}
    ref = node.take_snapshot()
    expect(node.take(), messages=[InstallSnapshotRequest(A, B, 2, ref)])
    assert not node.raft.snapshot_wanted


def test_a_file_older_than_the_purged_log_is_not_offered() -> None:
    """7: the log must go on where the snapshot ends."""
    node, ref = purged_leader()
    node.purge(6)
    awaiting(node)
    expect(node.take())
    assert node.raft.snapshot_wanted
    assert ref not in node.raft.offered_snapshots().values()


def test_a_transfer_goes_on_with_its_file_while_that_exists() -> None:
    """A newer file does not start a long transfer again; a deleted one does."""
    node, old = purged_leader()
    awaiting(node)
    node.settle()
    new = node.take_snapshot()
    expect(node.take())
    node.tick(100)
    assert offers(to(B, node.settle())) == [InstallSnapshotRequest(A, B, 2, old)]
    node.lose_file(old)
    expect(node.take(), messages=[InstallSnapshotRequest(A, B, 2, new)])
    assert node.raft.offered_snapshots() == {B: new}
    node.lose_file(new)
    assert node.raft.offered_snapshots() == {}
    assert node.raft.snapshot_wanted


def test_a_new_leader_offers_its_own_newest_file() -> None:
    """5.1.3: any leader may serve it: what is committed is the same in every file."""
    log = make_log(ABC, [1, 1, 1, 1])
    disk = Disk(HardState(2, None, 5), log)
    for file in (snapshot_of(log[:3], "old"), snapshot_of(log[:5], "new")):
        disk.snapshots[file.ref] = file
    disk.purge(3)
    node = Server(A, disk)
    node.lead()
    node.step(refusal(B, 5, LogId(1, 1), term=3))
    newest = disk.refs()[-1]
    expect(node.take(), messages=[InstallSnapshotRequest(A, B, 3, newest)])
    node.raft.step_down("a test")
    assert node.raft.offered_snapshots() == {}
    assert not node.raft.snapshot_wanted


def test_a_member_below_the_log_is_not_flooded_with_commit_messages() -> None:
    """The term at its last acknowledgement is purged: there is no commit index to tell it."""
    node, _ = purged_leader()
    assert node.raft.progress[B].match_index == 2
    node.tick(1)
    node.settle()
    node.tick(1)
    expect(node.take())


def test_purging_below_a_slow_follower_does_not_disturb_what_is_in_flight() -> None:
    """5.1: the follower has the entries already; only its answers are late."""
    node, _ = purged_leader()
    expect(node.take())
    node.step(ack(B, A, 2, 6, 2))
    node.raft.propose(b"z")
    assert to(B, node.settle()) == [AppendRequest(A, B, 2, 6, 2, (normal(7, 2, b"z"),), 6)]


def test_a_new_member_of_a_purged_log_starts_from_a_snapshot() -> None:
    """7, 4.2.1: it has nothing, and says so."""
    node, ref = purged_leader()
    newcomer = MemberId(4, 0xA4)
    node.raft.propose_membership(AddLearner(member(newcomer)))
    (probe,) = to(newcomer, node.settle())
    assert isinstance(probe, AppendRequest)
    node.step(refusal(newcomer, probe.prev_index, LogId(0, 0)))
    assert node.settle() == [InstallSnapshotRequest(A, newcomer, 2, ref)]


# --- a member that has lost its state ------------------------------------------------------------


def test_a_member_without_state_is_offered_a_snapshot_beside_its_entries() -> None:
    """Its log is sound, so it counts and is replicated to like any other."""
    node, ref = purged_leader()
    node.acknowledge(B)
    node.tick(100)
    node.answer_heartbeats(node.settle(), B, needs_snapshot=3)
    expect(node.take(), messages=[InstallSnapshotRequest(A, B, 2, ref)])
    node.raft.propose(b"z")
    append = AppendRequest(A, B, 2, 6, 2, (normal(7, 2, b"z"),), 6)
    assert to(B, node.settle()) == [append]
    node.acknowledge(B)
    assert node.raft.log.commit_index == 7
    node.tick(100)
    sent = node.settle()
    assert offers(to(B, sent)) == [InstallSnapshotRequest(A, B, 2, ref)]
    node.answer_heartbeats(sent, B, needs_snapshot=3)
    expect(node.take())
    node.tick(100)
    node.answer_heartbeats(node.settle(), B)
    assert node.raft.offered_snapshots() == {}
    node.step(HeartbeatResponse(B, A, 2, 2, 1000, 3))
    assert node.raft.progress[B].needs_snapshot is None, "an old answer came late"


def test_a_member_without_state_needs_a_file_that_its_own_log_goes_on_from() -> None:
    """`needs_snapshot` is what precedes its first entry."""
    node, _ = purged_leader()
    node.acknowledge(B)
    node.tick(100)
    node.answer_heartbeats(node.settle(), B, needs_snapshot=6)
    expect(node.take())
    assert node.raft.snapshot_wanted
    ref = node.take_snapshot()
    assert offers(node.settle()) == [InstallSnapshotRequest(A, B, 2, ref)]


def test_leadership_is_not_handed_to_a_member_without_state() -> None:
    """3.10: it would not campaign."""
    node, _ = purged_leader()
    node.acknowledge(B)
    node.tick(100)
    node.answer_heartbeats(node.settle(), B, needs_snapshot=3)
    with pytest.raises(Conflict, match="waits for a snapshot"):
        node.raft.transfer_leadership(B)


def test_a_member_with_a_wrong_state_neither_leads_nor_campaigns() -> None:
    """Whatever the disk makes of throwing it away: until then it is none that others may follow.
    It votes and acknowledges as before, and a TimeoutNow (3.10) does not make it lead.
    """
    node = leader(A, ABC)
    node.settle()
    node.raft.distrust_state()
    assert (node.raft.role, node.raft.state_wrong) == (Role.FOLLOWER, True)
    node.settle()
    for _ in range(50):
        node.tick(1000)
        assert not any(isinstance(m, VoteRequest | PreVoteRequest) for m in node.settle())
    node.step(TimeoutNow(B, A, node.raft.term))
    node.settle()
    assert node.raft.role is Role.FOLLOWER
    node.lose_state()
    assert not node.raft.state_wrong
    node.tick(10_000)
    assert any(isinstance(m, PreVoteRequest) for m in node.settle()), "the log has it all"


def stateless(commit: int = 4) -> Server:
    """A follows nobody yet in term 1: entries 1..5, of which 1..3 are purged, and no state."""
    disk = Disk(HardState(1, None, commit), make_log(ABC, [1, 1, 1, 1]))
    disk.purge(3)
    disk.snapshots.clear()
    node = Server(A, disk)
    assert node.raft.state_lost
    return node


def test_a_state_that_ends_before_the_log_begins_is_lost() -> None:
    """7: what is between them is purged. It starts, applies nothing, and what is purged counts as
    committed although the hard state lags.
    """
    node = stateless(commit=1)
    expect(node.take())
    assert (node.raft.log.commit_index, node.raft.log.applied_index) == (3, 0)
    assert node.raft.membership == ABC


def test_a_member_without_state_acknowledges_and_says_what_it_needs() -> None:
    """Its log and its promises are intact: it counts in every quorum."""
    node = stateless()
    node.step(AppendRequest(B, A, 1, 5, 1, (normal(6, 1),), 6), HeartbeatRequest(B, A, 1, 1, 5, 1))
    expect(
        node.take(),
        messages=[HeartbeatResponse(A, B, 1, 1, 1000, 3)],
        hard_state=HardState(1, None, 6),
        entries=[normal(6, 1)],
        messages_after_sync=[ack(A, B, 1, 6, 1)],
    )
    node.finish_write()
    expect(node.take())


def test_a_member_without_state_votes() -> None:
    """5.2: its vote is as good as ever."""
    node = past_grace(stateless())
    node.step(VoteRequest(B, A, 2, 5, 1, False))
    assert node.settle() == [VoteResponse(A, B, 2, True)]


def test_a_member_without_state_never_campaigns() -> None:
    """Nor when leadership is handed to it (3.10): it could not serve a single read."""
    node = stateless()
    for _ in range(20):
        node.tick(1000)
        expect(node.take())
    node.step(TimeoutNow(B, A, 1))
    expect(node.take())


def test_a_sole_voter_without_state_does_not_campaign() -> None:
    """Nobody could bring its state back: its owner must end."""
    alone = membership(A)
    disk = Disk(HardState(1, None, 3), make_log(alone, [1, 1]))
    disk.purge(2)
    disk.snapshots.clear()
    node = Server(A, disk)
    for _ in range(5):
        node.tick(1000)
        expect(node.take())


def test_a_leader_that_loses_its_state_steps_down() -> None:
    """One whose state is sound must lead."""
    node, _ = purged_leader()
    node.lose_state()
    reason = "its state is wrong"
    expect(node.take(), transitions=[Transition(Role.LEADER, Role.FOLLOWER, 2, reason)])
    assert node.raft.state_lost
    node.tick(5000)
    expect(node.take())


def test_a_candidate_that_loses_its_state_gives_up() -> None:
    """Votes that arrive later do not count."""
    node = server(A, ABC, [1, 1])
    node.step(HeartbeatRequest(B, A, 1, 1, 3, 1))
    node.settle()
    node.purge(2)
    node.stand_for_election()
    node.lose_state()
    node.step(VoteResponse(B, A, 2, True))
    assert node.raft.role is Role.FOLLOWER


def test_with_its_whole_log_a_member_rebuilds_its_state() -> None:
    """Nothing is lost: it is applied again from entry 1, and the member may campaign."""
    node = server(A, ABC, [1, 1], commit=3)
    node.lose_state()
    assert not node.raft.state_lost
    expect(node.take(), committed_entries=make_log(ABC, [1, 1]))
    node.lose_state()
    node.tick(2001)
    assert node.take().messages


def test_a_log_that_nobody_applies_does_not_fill_the_memory() -> None:
    """A member without state goes on appending; what is durable leaves memory all the same, and
    is applied from the disk once there is a state again.
    """
    node = stateless()
    count = 3 * TAIL_ENTRIES_KEPT
    for first in range(6, 6 + count, 512):
        entries = tuple(normal(i, 1) for i in range(first, first + 512))
        node.step(AppendRequest(B, A, 1, first - 1, 1, entries, first + 511))
        node.settle()
    last = node.raft.log.last_index
    assert last >= count
    assert len(node.raft.log._tail) <= TAIL_ENTRIES_KEPT
    node.install(snapshot_of([*make_log(ABC, [1, 1, 1, 1])]))
    assert [e.index for e in node.applied] == list(range(1, last + 1))


# --- what is purged -----------------------------------------------------------------------------


def test_only_what_is_applied_may_be_purged() -> None:
    """7, figure 12: "the snapshot ... replaces the committed entries"; the rest is still needed."""
    node = server(A, ABC, [1, 1, 1], commit=3)
    with pytest.raises(InvariantBroken, match="cannot be purged"):
        node.raft.purge(4)
    node.purge(3)
    assert (node.raft.log.first_index, node.raft.log.base) == (4, LogId(3, 1))
    node.purge(2)
    assert node.raft.log.base == LogId(3, 1)


def test_nothing_is_purged_without_a_state() -> None:
    """The log is all that is left."""
    with pytest.raises(InvariantBroken, match="cannot be purged"):
        stateless().raft.purge(4)


def test_what_is_purged_is_never_read_again() -> None:
    """The disk may drop it at any moment; the term of the last purged entry stays known (7)."""
    node = server(A, ABC, [1, 1, 2], commit=3)
    node.purge(3, durably=False)
    log = node.raft.log
    assert [log.term(index) for index in range(6)] == [None, None, None, 1, 2, None]
    with pytest.raises(InvariantBroken, match="purged"):
        log.entries(3, 5, 1000)
    assert log.last_not_above(4, 1) == LogId(3, 1)
    assert log.last_not_above(2, 1) is None
    assert log.last_not_above(4, 0) is None


def test_a_purged_log_goes_on_accepting_entries() -> None:
    """5.3, 7: the consistency check of the entry after the last purged one needs its term; an
    append from before it matches by definition, for what is purged is committed.
    """
    node = server(A, ABC, [1, 1], commit=3)
    node.purge(3)
    node.step(AppendRequest(B, A, 1, 3, 1, (normal(4, 1),), 3))
    assert node.settle() == [ack(A, B, 1, 4, 1)]
    node.step(AppendRequest(B, A, 1, 1, 1, (normal(2, 1), normal(3, 1)), 3))
    assert node.settle() == [ack(A, B, 1, 3, 1)]
    node.step(AppendRequest(B, A, 1, 1, 1, tuple(normal(i, 1) for i in range(2, 6)), 3))
    assert node.settle() == [ack(A, B, 1, 5, 1)]


def test_a_conflict_right_after_the_purged_log_is_replaced() -> None:
    """5.3: only the term of the last purged entry is left to compare with."""
    node = server(A, ABC, [1, 1, 1], commit=3)
    node.purge(3)
    node.step(AppendRequest(B, A, 2, 4, 2, (normal(5, 2),), 3))
    assert node.settle() == [AppendResponse(A, B, 2, False, 4, 0, 4, 1)]
    node.step(AppendRequest(B, A, 2, 3, 1, (noop(4, 2),), 3))
    assert node.settle() == [ack(A, B, 2, 4, 2)]
    assert node.disk.log == [noop(4, 2)]
    assert node.raft.log.last_id == LogId(4, 2)


def test_a_heartbeat_about_a_purged_entry_betrays_no_old_copy() -> None:
    """It was committed here: nothing is missing."""
    node = server(A, ABC, [1, 1], commit=3)
    node.purge(3)
    node.step(HeartbeatRequest(B, A, 1, 1, 2, 1), HeartbeatRequest(B, A, 1, 2, 3, 1))
    assert not node.raft.saw_lost_entries


def test_the_membership_survives_the_purge_of_its_entry() -> None:
    """4.1, 7: "the snapshot also includes the latest configuration." """
    four = membership(A, B, C, learners=[MemberId(4, 0xA4)])
    log = [config(1, 1, ABC), config(2, 1, four), normal(3, 1)]
    node = Server(A, Disk(HardState(1, None, 3), log))
    node.settle()
    node.purge(3)
    assert (node.raft.membership, node.raft.committed_membership) == (four, four)
    node.restart()
    assert (node.raft.membership, node.raft.membership_index) == (four, 2)


def test_a_log_beyond_its_own_term_does_not_start() -> None:
    """Figure 2: a term is durable before anything of it is."""
    with pytest.raises(InvariantBroken, match="has not entered"):
        Server(A, Disk(HardState(1, None, 1), make_log(ABC, [2])))


# --- the follower is offered something -----------------------------------------------------------


def test_an_offer_that_helps_is_fetched() -> None:
    """7: "if it contains information not already in the recipient's log." Repeated offers repeat
    the wish; the owner knows what it is fetching.
    """
    node = server(A, ABC, [1, 1], commit=2)
    ref = snapshot_of(make_log(ABC, [1] * 8)).ref
    for _ in range(2):
        node.step(InstallSnapshotRequest(B, A, 1, ref))
        expect(node.take(), fetch=(B, ref))
    assert node.raft.leader == B


def test_an_offer_of_what_is_committed_is_answered_with_the_commit_index() -> None:
    """7: the leader's view is old; the acknowledgement lets it go on with entries."""
    node = server(A, ABC, [1, 1, 1], commit=3)
    ref = snapshot_of(make_log(ABC, [1, 1])).ref
    node.step(InstallSnapshotRequest(B, A, 1, ref))
    expect(node.take(), messages=[ack(A, B, 1, 3, 1)])


def test_that_acknowledgement_waits_for_the_disk_too() -> None:
    """Figure 2: what it acknowledges must be durable, committed or not."""
    node = server(A, ABC)
    node.step(AppendRequest(B, A, 1, 1, 1, (normal(2, 1), normal(3, 1)), 3))
    node.take()
    node.step(InstallSnapshotRequest(B, A, 1, snapshot_of(make_log(ABC, [1, 1])).ref))
    expect(node.take())
    assert node.finish_write() == [ack(A, B, 1, 3, 1)]
    expect(
        node.take(),
        messages=[ack(A, B, 1, 3, 1)],
        committed_entries=[normal(2, 1), normal(3, 1)],
    )


def test_an_offer_in_an_old_term_teaches_the_sender_the_new_one() -> None:
    """5.1: "If a server receives a request with a stale term number, it rejects the request." """
    node = server(A, ABC, term=4)
    node.step(InstallSnapshotRequest(B, A, 3, snapshot_of(make_log(ABC, [1, 1])).ref))
    expect(node.take(), messages=[AppendResponse(A, B, 4, False, 0, 0, 0, 0)])


def test_an_offer_in_a_newer_term_makes_a_candidate_follow() -> None:
    """5.2: whoever leads a term says so with its first message."""
    node = server(A, ABC)
    node.stand_for_election()
    ref = snapshot_of(make_log(ABC, [1, 1])).ref
    node.step(InstallSnapshotRequest(B, A, 3, ref))
    ready = node.take()
    assert (ready.fetch, node.raft.role, node.raft.leader) == ((B, ref), Role.FOLLOWER, B)
    node.step(PreVoteResponse(C, A, 3, True), VoteResponse(C, A, 2, True))
    assert node.raft.role is Role.FOLLOWER


def test_without_state_only_a_file_that_the_log_goes_on_from_is_fetched() -> None:
    """Even one older than what is committed; but not one from before the log begins."""
    node = stateless(commit=5)
    entries = make_log(ABC, [1, 1, 1, 1])
    node.step(InstallSnapshotRequest(B, A, 1, snapshot_of(entries[:2]).ref))
    expect(node.take())
    for count in (3, 4, 5):
        ref = snapshot_of(entries[:count]).ref
        node.step(InstallSnapshotRequest(B, A, 1, ref))
        expect(node.take(), fetch=(B, ref))


# --- Progress and RaftLog alone ------------------------------------------------------------------


def test_progress_stays_in_snapshot_until_the_log_goes_on_from_its_match() -> None:
    """7: neither what is purged again nor an old refusal brings entries back."""
    progress = Progress(5, 0)
    progress.await_snapshot()
    progress.acknowledged(3, first_index=10)
    assert not progress.refused(4, 2)
    assert (progress.state, progress.paused) == (ProgressState.SNAPSHOT, True)
    progress.acknowledged(9, first_index=10)
    assert (progress.state, progress.next_index) == (ProgressState.REPLICATE, 10)


def test_a_state_from_before_the_log_counts_as_nothing() -> None:
    """7: it cannot be continued, and nobody may read it."""
    disk = Disk(HardState(1, None, 4), make_log(ABC, [1, 1, 1, 1]))
    disk.purge(3)
    log = RaftLog(disk, 4, 2)
    assert (log.state_lost, log.applied_index, log.commit_index) == (True, 0, 4)
