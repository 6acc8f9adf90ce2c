"""Log replication: paper 5.3, 7; thesis 10.2.1. See also test_commitment.

Whole `Ready`s are compared: what is not named must be empty.
"""

from __future__ import annotations

import pytest

from dengine.errors import InvariantBroken
from dengine.raft.messages import (
    AppendRequest,
    AppendResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    InstallSnapshotRequest,
)
from dengine.raft.progress import INFLIGHT_MAX, ProgressState
from dengine.raft.types import HardState, LogId, MemberId
from tests.raft.harness import (
    A,
    B,
    C,
    D,
    Disk,
    Server,
    expect,
    leader,
    make_log,
    membership,
    noop,
    normal,
    server,
)

ABC = membership(A, B, C)


def ack(sender: MemberId, to: MemberId, term: int, index: int, index_term: int) -> AppendResponse:
    return AppendResponse(sender, to, term, True, index, index_term, index, index_term)


# --- 5.3: the leader -----------------------------------------------------------------------------


def test_a_leader_appends_and_sends_while_it_writes() -> None:
    """5.3 and 10.2.1: "appends the command to its log", sends in parallel, commits nothing."""
    node = leader(A, ABC)
    assert node.raft.propose(b"x") == LogId(3, 2)
    entry = normal(3, 2, b"x")
    expect(
        node.take(),
        messages=[AppendRequest(A, m, 2, 2, 2, (entry,), 2) for m in (B, C)],
        hard_state=HardState(2, A, 2),
        entries=[entry],
    )


def test_an_entry_is_committed_once_a_majority_has_it_and_then_applied() -> None:
    """5.3: "A log entry is committed once the leader ... has replicated it on a majority"; the
    followers learn of it with the next tick.
    """
    node = leader(A, ABC)
    node.raft.propose(b"x")
    node.settle()
    node.step(ack(B, A, 2, 3, 2))
    expect(node.take(), committed_entries=[normal(3, 2, b"x")])
    node.tick(1)
    expect(node.take(), messages=[HeartbeatRequest(A, B, 2, 0, 3, 2)])
    node.step(ack(C, A, 2, 3, 2))
    node.tick(1)
    expect(node.take(), messages=[HeartbeatRequest(A, C, 2, 0, 3, 2)])


def test_a_leader_counts_itself_only_after_its_own_fsync() -> None:
    """10.2.1: one follower and an unsynced leader are no majority."""
    node = leader(A, ABC)
    node.raft.propose(b"x")
    node.take()
    node.step(ack(B, A, 2, 3, 2))
    expect(node.take())
    assert node.raft.log.commit_index == 2
    node.finish_write()
    expect(node.take(), committed_entries=[normal(3, 2, b"x")])


def test_an_entry_may_commit_before_the_leader_has_it_on_disk_but_is_not_applied() -> None:
    """10.2.1: "the leader may even commit an entry before it has been written to its own disk." """
    node = leader(A, ABC)
    node.raft.propose(b"x")
    node.take()
    node.step(ack(B, A, 2, 3, 2), ack(C, A, 2, 3, 2))
    expect(node.take())
    assert node.raft.log.commit_index == 3
    node.finish_write()
    expect(node.take(), committed_entries=[normal(3, 2, b"x")])


def test_while_one_write_is_under_way_only_writes_wait() -> None:
    """Messages leave, and what is proposed meanwhile shares the next write."""
    node = leader(A, ABC)
    node.raft.propose(b"x")
    node.take()
    node.raft.propose(b"y")
    node.raft.propose(b"z")
    later = [normal(4, 2, b"y"), normal(5, 2, b"z")]
    append = [AppendRequest(A, m, 2, 3, 2, tuple(later), 2) for m in (B, C)]
    expect(node.take(), messages=append)
    node.finish_write()
    expect(node.take(), hard_state=HardState(2, A, 2), entries=later)


def test_learners_get_everything_and_count_for_nothing() -> None:
    """4.2.1: "replicates log entries to it, but it is not yet counted towards majorities." """
    node = leader(A, membership(A, B, C, learners=[D]))
    node.raft.propose(b"x")
    assert [m.to for m in node.settle()] == [B, C, D]
    node.step(ack(D, A, 2, 3, 2))
    assert node.raft.log.commit_index == 2


def test_the_acknowledgement_of_another_incarnation_does_not_count() -> None:
    """The wiped directory no longer holds what the old one had acknowledged."""
    node = leader(A, ABC)
    node.raft.propose(b"x")
    node.settle()
    node.step(ack(MemberId(B.id, 99), A, 2, 3, 2))
    assert node.raft.log.commit_index == 2


# --- 5.3: the follower ---------------------------------------------------------------------------


def test_an_append_is_acknowledged_only_after_the_write() -> None:
    """5.3 and figure 2: "Updated on stable storage before responding to RPCs." """
    node = server(A, ABC)
    node.step(AppendRequest(B, A, 1, 1, 1, (normal(2, 1), normal(3, 1)), 2))
    expect(
        node.take(),
        hard_state=HardState(1, None, 2),
        entries=[normal(2, 1), normal(3, 1)],
        messages_after_sync=[ack(A, B, 1, 3, 1)],
    )
    expect(node.take())  # committed, but not durable here yet: not applied
    node.finish_write()
    expect(node.take(), committed_entries=[normal(2, 1)])


def test_an_acknowledgement_waits_for_a_second_write_when_the_first_does_not_cover_it() -> None:
    """5.3: what is durable is what the finished write held, and no more."""
    node = server(A, ABC)
    node.step(AppendRequest(B, A, 1, 1, 1, (normal(2, 1),), 1))
    node.take()
    node.step(AppendRequest(B, A, 1, 2, 1, (normal(3, 1),), 1))
    expect(node.take())
    assert list(node.finish_write()) == [ack(A, B, 1, 2, 1)]
    expect(
        node.take(),
        hard_state=HardState(1, None, 1),
        entries=[normal(3, 1)],
        messages_after_sync=[ack(A, B, 1, 3, 1)],
    )


def test_the_answer_to_a_heartbeat_does_not_wait_for_entries() -> None:
    """A slow disk must not look like a dead server; the answer says nothing about the log."""
    node = server(A, ABC)
    node.step(AppendRequest(B, A, 1, 1, 1, (normal(2, 1),), 1))
    node.take()
    node.step(HeartbeatRequest(B, A, 1, 7, 1, 1))
    expect(node.take(), messages=[HeartbeatResponse(A, B, 1, 7, 1000)])


def test_the_answer_to_a_heartbeat_waits_for_a_new_term() -> None:
    """Figure 2: the answer speaks in a term, so that term must be durable."""
    node = server(A, ABC)
    node.step(HeartbeatRequest(B, A, 5, 7, 1, 1))
    expect(
        node.take(),
        hard_state=HardState(5, None, 1),
        messages_after_sync=[HeartbeatResponse(A, B, 5, 7, 1000)],
    )


def test_the_commit_index_never_passes_what_the_message_covers() -> None:
    """Figure 2: "commitIndex = min(leaderCommit, index of last new entry)": entries after that
    may still be in conflict.
    """
    node = server(A, ABC, [1, 1, 1])
    node.step(AppendRequest(B, A, 1, 2, 1, (normal(3, 1),), 4))
    assert node.raft.log.commit_index == 3


def test_a_missing_predecessor_is_refused_with_a_hint() -> None:
    """5.3: "If the follower does not find an entry in its log with the same index and term, then
    it refuses the new entries." Nothing is written.
    """
    node = server(A, ABC, [1, 1, 2, 2], term=3)
    node.step(AppendRequest(B, A, 3, 9, 3, (normal(10, 3),), 1))
    expect(node.take(), messages=[AppendResponse(A, B, 3, False, 9, 0, 5, 2)])
    node.step(AppendRequest(B, A, 3, 5, 1, (normal(6, 3),), 1))
    expect(node.take(), messages=[AppendResponse(A, B, 3, False, 5, 0, 3, 1)])


def test_a_conflicting_tail_is_replaced() -> None:
    """5.3: "delete the existing entry and all that follow it", in the same write as the new."""
    node = server(A, ABC, [1, 2, 2, 2], term=3)
    node.step(AppendRequest(B, A, 3, 2, 1, (noop(3, 3),), 1))
    expect(
        node.take(),
        hard_state=HardState(3, None, 1),
        entries=[noop(3, 3)],
        messages_after_sync=[ack(A, B, 3, 3, 3)],
    )
    node.finish_write()
    assert node.disk.log == [*make_log(ABC, [1]), noop(3, 3)]


@pytest.mark.parametrize("first", [1, 2, 3])
def test_late_repeated_or_reordered_appends_never_remove_anything(first: int) -> None:
    """5.3: "if an existing entry conflicts"; one that agrees is no reason to cut."""
    node = server(A, ABC, [1, 1, 1, 1])
    late = AppendRequest(B, A, 1, first, 1, (normal(first + 1, 1),), 1)
    node.step(late, late)
    expect(node.take(), messages=[ack(A, B, 1, first + 1, 1)] * 2)
    assert node.raft.log.last_id == LogId(5, 1)


def test_an_append_below_the_commit_index_is_acknowledged_up_to_it() -> None:
    """5.3: what is committed agrees with every later leader, so it need not be compared."""
    node = server(A, ABC, [1, 1, 1], commit=4)
    node.step(AppendRequest(B, A, 2, 1, 1, (normal(2, 1),), 1))
    expect(
        node.take(),
        hard_state=HardState(2, None, 4),
        messages_after_sync=[ack(A, B, 2, 4, 1)],
    )


def test_a_committed_entry_is_never_replaced() -> None:
    """5.4.3: a leader that wants that has broken the protocol, and stopping is all that is safe."""
    node = server(A, ABC, [1, 1, 1], commit=3)
    with pytest.raises(InvariantBroken, match="committed entry 3"):
        node.raft.log.merge([noop(3, 2)])


def test_two_leaders_in_one_term_stop_the_server() -> None:
    """5.2, election safety, as an assertion that stays on in production."""
    node = leader(A, ABC)
    with pytest.raises(InvariantBroken, match="also leads in term 2"):
        node.step(HeartbeatRequest(B, A, 2, 1, 1, 1))


def test_a_leader_never_overwrites_its_own_log() -> None:
    """5.3, leader append-only: a new leader keeps what it has, in whatever term it was made."""
    node = leader(A, ABC, [1, 1])
    assert [(e.index, e.term) for e in node.disk.log] == [(1, 1), (2, 1), (3, 1), (4, 2)]


# --- 5.3: finding the point of agreement ---------------------------------------------------------


def test_a_refused_probe_goes_back_to_where_the_logs_can_agree() -> None:
    """5.3: "the leader decrements nextIndex and retries", by whole terms."""
    node = server(A, ABC, [1, 1, 1])
    assert AppendRequest(A, B, 2, 4, 1, (noop(5, 2),), 1) in node.lead()
    node.step(AppendResponse(B, A, 2, False, 4, 0, 2, 1))
    entries = (normal(3, 1), normal(4, 1))  # from the disk; the no-op in memory follows
    expect(node.take(), messages=[AppendRequest(A, B, 2, 2, 1, entries, 1)])


def converge(chief: Server, follower: Server) -> int:
    """Elect `chief` and let it bring `follower` up to date; returns the round trips it took."""
    trips, sent = 0, chief.lead()
    while chief.raft.progress[follower.me].match_index < chief.raft.log.last_index:
        trips += 1
        assert trips < 1000, "no progress"
        follower.step(*(m for m in sent if m.to == follower.me))
        chief.step(*follower.settle())
        sent = chief.settle()
    return trips


@pytest.mark.parametrize(
    ("leader_terms", "follower_terms", "most"),
    [
        ([1] * 10, [1] * 10 + [2] * 50_000, 4),  # a long tail nobody else has
        ([1] * 10 + [3] * 50_000, [1] * 10 + [2] * 50_000, 5),  # two long tails
        ([1] * 50_000, [1], 4),  # far behind
        ([t for t in range(1, 11) for _ in range(500)], [1] * 5000, 6),
        (
            [t for t in range(1, 40, 2) for _ in range(100)],
            [t for t in range(2, 41, 2) for _ in range(100)],
            24,  # twenty terms each, all different
        ),
    ],
)
def test_divergent_logs_agree_after_a_round_trip_per_term(
    leader_terms: list[int], follower_terms: list[int], most: int
) -> None:
    """5.3: "one AppendEntries RPC will be required for each term with conflicting
    entries, rather than one RPC per entry."
    """
    term = max(leader_terms + follower_terms)
    chief = server(A, ABC, leader_terms, term=term)
    follower = server(B, ABC, follower_terms, term=term)
    assert converge(chief, follower) <= most
    assert follower.disk.log == chief.disk.log


def test_a_probe_is_sent_once_until_it_is_answered_or_a_heartbeat_is() -> None:
    """5.3: nothing is gained by sending ahead while it is unknown where the logs agree."""
    node = server(A, ABC)
    node.lead()
    node.raft.propose(b"x")
    node.raft.propose(b"y")
    assert [m for m in node.settle() if m.to == B] == []  # the no-op is the probe
    node.tick(100)
    heartbeats = node.settle()
    node.answer_heartbeats(heartbeats, B)
    entries = (noop(2, 2), normal(3, 2, b"x"), normal(4, 2, b"y"))
    expect(node.take(), messages=[AppendRequest(A, B, 2, 1, 1, entries, 1)])


# --- 5.3: flow and loss --------------------------------------------------------------------------


def propose_each(node: Server, count: int) -> list[list[AppendRequest]]:
    """Propose one by one; what was sent to B each time."""
    sent = []
    for number in range(count):
        node.raft.propose(b"%d" % number)
        sent.append([m for m in node.settle() if isinstance(m, AppendRequest) and m.to == B])
    return sent


def test_unanswered_appends_are_bounded() -> None:
    """A follower that does not answer costs a bounded amount of memory."""
    node = leader(A, ABC)
    sent = propose_each(node, INFLIGHT_MAX + 5)
    assert [len(s) for s in sent] == [1] * INFLIGHT_MAX + [0] * 5
    node.step(ack(B, A, 2, 3, 2))
    (request,) = [m for m in node.settle() if m.to == B]
    assert [e.index for e in request.entries] == list(range(INFLIGHT_MAX + 3, INFLIGHT_MAX + 8))


def test_a_lost_append_is_found_by_the_next_heartbeat() -> None:
    """5.3: "the leader retries indefinitely": the answer to a heartbeat makes it ask."""
    node = leader(A, ABC)
    node.raft.propose(b"x")
    node.settle()  # lost
    node.tick(100)
    node.answer_heartbeats(node.settle(), B)
    expect(node.take(), messages=[AppendRequest(A, B, 2, 3, 2, (), 2)])
    node.step(AppendResponse(B, A, 2, False, 3, 0, 2, 2))
    again = AppendRequest(A, B, 2, 2, 2, (normal(3, 2, b"x"),), 2)
    expect(node.take(), messages=[again])


def test_a_lost_acknowledgement_is_found_by_the_next_heartbeat() -> None:
    """5.3: the follower has everything and says so again."""
    node, follower = leader(A, ABC), server(B, ABC, term=2)
    follower.step(AppendRequest(A, B, 2, 1, 1, (noop(2, 2),), 1))
    follower.settle()
    node.raft.propose(b"x")
    follower.step(*(m for m in node.settle() if m.to == B))
    follower.settle()  # its answer is lost
    node.tick(100)
    node.answer_heartbeats(node.settle(), B)
    follower.step(*node.settle())
    assert follower.settle() == [ack(B, A, 2, 3, 2)]


def test_a_broken_stream_makes_the_leader_feel_its_way() -> None:
    """What was in flight may be lost: it is sent again from the last acknowledged entry on."""
    node = leader(A, ABC)
    propose_each(node, 3)
    node.raft.report_unreachable(B)
    (request,) = node.settle()
    assert (request.to, request.prev_index, len(request.entries)) == (B, 2, 3)


def test_a_refusal_of_what_was_acknowledged_is_ignored() -> None:
    """A late message, or a server that lost its log: it must not start a storm of retries."""
    node = leader(A, ABC)
    node.raft.propose(b"x")
    node.settle()
    node.raft.report_unreachable(B)
    node.settle()
    node.step(AppendResponse(B, A, 2, False, 2, 0, 0, 0))
    expect(node.take())


def test_a_match_index_never_goes_back() -> None:
    """5.3: acknowledgements may arrive in any order, any number of times."""
    node = leader(A, ABC)
    propose_each(node, 4)
    node.step(ack(B, A, 2, 6, 2), ack(B, A, 2, 6, 2), ack(B, A, 2, 5, 2), ack(B, A, 2, 3, 2))
    assert node.raft.progress[B].match_index == 6
    assert node.raft.log.commit_index == 6


def test_a_follower_that_needs_purged_entries_waits_for_a_snapshot() -> None:
    """7: "when the leader has already discarded the next log entry that it needs to send." """
    disk = Disk(HardState(2, None, 5), make_log(ABC, [1, 1, 1, 1]))
    disk.purge(3)
    node = Server(A, disk)
    node.lead()
    node.step(AppendResponse(B, A, 3, False, 5, 0, 3, 1))
    assert AppendRequest(A, B, 3, 3, 1, tuple(disk.log[:2]), 5) in node.settle()
    node.step(AppendResponse(B, A, 3, False, 3, 0, 1, 1))
    expect(node.take(), messages=[InstallSnapshotRequest(A, B, 3, disk.refs()[0])])
    assert node.raft.progress[B].state is ProgressState.SNAPSHOT


def test_a_heartbeat_beyond_the_log_betrays_an_old_copy() -> None:
    """The leader counts on entries that were acknowledged and are gone."""
    node = server(A, ABC, [1, 1])
    node.step(HeartbeatRequest(B, A, 1, 1, 3, 1))
    assert not node.raft.saw_lost_entries
    node.step(HeartbeatRequest(B, A, 1, 2, 9, 1))
    assert node.raft.saw_lost_entries
    assert node.raft.log.commit_index == 3


def test_a_heartbeat_that_names_another_entry_betrays_an_old_copy() -> None:
    """An old copy may be long enough and end differently; its tail is not committed."""
    node = server(A, ABC, [1, 1])
    before = node.raft.log.commit_index
    node.step(HeartbeatRequest(B, A, 2, 1, 3, 2))
    assert node.raft.saw_lost_entries
    assert node.raft.log.commit_index == before
