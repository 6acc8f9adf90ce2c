"""Leadership transfer: thesis 3.10, 4.2.3, 6.4.1. Whole `Ready`s are compared."""

from __future__ import annotations

import pytest

from dengine.errors import ClusterUnavailable, Conflict, LeaderChanged, NotLeader
from dengine.raft.messages import (
    AppendResponse,
    HeartbeatRequest,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
)
from dengine.raft.raft import Transition
from dengine.raft.types import HardState, MemberId, ReadNonce, ReadState, Role
from tests.raft.cluster import Cluster
from tests.raft.harness import A, B, C, D, expect, leader, membership, server

ABC = membership(A, B, C)


def test_a_target_that_has_caught_up_is_told_at_once() -> None:
    """3.10: "it sends a TimeoutNow request to the target server." """
    node = leader(A, ABC)
    node.raft.transfer_leadership(B)
    expect(node.take(), messages=[TimeoutNow(A, B, 2)])


def test_a_target_that_lags_is_brought_up_to_date_first() -> None:
    """3.10: "The prior leader fully updates the target server's log to match its own." """
    node = leader(A, ABC)
    node.raft.propose(b"x")
    node.settle()
    node.raft.transfer_leadership(B)
    expect(node.take())
    node.step(AppendResponse(C, A, 2, True, 3, 2, 3, 2))
    assert node.take().messages == []
    node.step(AppendResponse(B, A, 2, True, 3, 2, 3, 2))
    assert node.take().messages == [TimeoutNow(A, B, 2)]


def test_the_target_campaigns_at_once_and_without_pre_vote() -> None:
    """3.10: "has the same effect as the target server's election timer firing"; its requests say
    that the leader wants it, so that stickiness does not apply (4.2.3).
    """
    node = server(B, ABC, [1])
    node.step(TimeoutNow(A, B, 1))
    expect(
        node.take(),
        hard_state=HardState(2, B, 1),
        messages_after_sync=[VoteRequest(B, m, 2, 2, 1, True) for m in (A, C)],
        transitions=[Transition(Role.FOLLOWER, Role.CANDIDATE, 1, "node 1 hands over leadership")],
    )


def test_voters_that_hear_the_leader_vote_for_its_successor() -> None:
    """4.2.3: "the leader's permission to disrupt it" rides in the request."""
    node = server(C, ABC)
    node.step(HeartbeatRequest(A, C, 1, 1, 1, 1), VoteRequest(B, C, 2, 1, 1, True))
    assert VoteResponse(C, B, 2, True) in node.settle()


def test_the_log_still_decides_about_a_successor() -> None:
    """3.10 with 5.4.1: a transfer is no excuse for a log that lacks committed entries."""
    node = server(C, ABC, [1, 1])
    node.step(VoteRequest(B, C, 2, 1, 1, True))
    assert node.settle() == [VoteResponse(C, B, 2, False)]


def test_nothing_is_proposed_meanwhile() -> None:
    """3.10: "The prior leader stops accepting new client requests." """
    node = leader(A, ABC)
    node.raft.transfer_leadership(B)
    assert not node.raft.may_propose
    with pytest.raises(LeaderChanged):
        node.raft.propose(b"x")
    with pytest.raises(LeaderChanged):
        node.raft.transfer_leadership(C)


def test_a_transfer_is_given_up_after_an_election_timeout() -> None:
    """3.10: "If leadership transfer does not complete after about an election timeout, the prior
    leader aborts the transfer and resumes accepting client requests."
    """
    node = leader(A, ABC)
    node.raft.transfer_leadership(B)
    for _ in range(10):
        assert not node.raft.may_propose
        node.answer_heartbeats(node.settle(), B, C)
        node.tick(100)
    assert node.raft.may_propose
    node.raft.propose(b"x")


def test_no_lease_for_the_rest_of_the_term() -> None:
    """6.4.1: the target may be elected before our lease ends, and TimeoutNow cannot be recalled;
    the lease is gone even when the transfer was given up.
    """
    node = leader(A, ABC)
    node.raft.read_index(ReadNonce(A, 1, 1), lease=True)
    expect(node.take(), read_states=[ReadState(ReadNonce(A, 1, 1), 2)])
    node.raft.transfer_leadership(B)
    for counter in range(2, 30):
        node.answer_heartbeats(node.settle(), B, C)
        node.raft.read_index(ReadNonce(A, 1, counter), lease=True)
        ready = node.take()
        assert not ready.read_states, "answered alone"
        node.answer_heartbeats(ready.messages, B, C)
        expect(node.take(), read_states=[ReadState(ReadNonce(A, 1, counter), 2)])
        node.tick(100)
    assert node.raft.may_propose


@pytest.mark.parametrize(("to", "message"), [(D, "not a voter"), (C, "has not answered lately")])
def test_only_a_live_voter_can_take_over(to: MemberId, message: str) -> None:
    """Refused with the reason, and leadership goes on."""
    node = leader(A, membership(A, B, C, learners=[D]))
    for _ in range(11):
        node.tick(100)
        node.answer_heartbeats(node.settle(), B)
    with pytest.raises(Conflict, match=message):
        node.raft.transfer_leadership(to)
    assert node.raft.may_propose


def test_a_new_leader_does_not_call_a_voter_silent_that_had_no_time_to_answer() -> None:
    """Asked for in the first moments of a leadership it is "not yet", which is retried."""
    node = server(A, ABC)
    node.lead()
    node.acknowledge(B)
    with pytest.raises(ClusterUnavailable, match="not heard from node 3 yet"):
        node.raft.transfer_leadership(C)
    node.acknowledge(C)
    node.raft.transfer_leadership(C)
    assert not node.raft.may_propose


def test_a_transfer_to_oneself_is_done() -> None:
    """Nothing has to happen."""
    node = leader(A, ABC)
    node.raft.transfer_leadership(A)
    expect(node.take())
    assert node.raft.may_propose


def test_a_follower_hands_over_nothing() -> None:
    """3.10: only a leader can."""
    with pytest.raises(NotLeader):
        server(A, ABC).raft.transfer_leadership(B)


@pytest.mark.parametrize("member", [B, D])
def test_who_is_no_voter_ignores_the_invitation(member: MemberId) -> None:
    """4.2.1: a learner cannot lead; neither can a leader be invited twice."""
    node = leader(B, ABC) if member == B else server(D, membership(A, B, C, learners=[D]))
    node.step(TimeoutNow(A, node.me, node.raft.term))
    expect(node.take())


def test_a_stale_invitation_is_ignored() -> None:
    """3.10: it was for a term that is over."""
    node = server(B, ABC, term=5)
    node.step(TimeoutNow(A, B, 4))
    expect(node.take())


def test_leadership_moves_under_load_within_a_few_messages() -> None:
    """3.10, end to end: no election timeout passes, nothing that was committed is lost."""
    cluster = Cluster(ABC)
    for _ in range(9):
        old = cluster.elect()
        old.raft.propose(b"before")
        to = next(m for m in (A, B, C) if m != old.me)
        cluster.run(100)
        old.raft.transfer_leadership(to)
        cluster.settle()
        assert cluster.leader is cluster.servers[to]
        cluster.write(b"after")


def test_a_target_that_dies_costs_one_election_timeout() -> None:
    """3.10: the leader leads on, or the others elect one."""
    cluster = Cluster(ABC)
    old = cluster.elect()
    cluster.run(300)
    to = next(m for m in (A, B, C) if m != old.me)
    old.raft.transfer_leadership(to)
    cluster.crash(to)
    assert cluster.run(1100, lambda: old.raft.may_propose)
    cluster.write(b"x")
