"""Who may depose whom: thesis 4.2.3, 6.2, 9.6. Whole `Ready`s are compared."""

from __future__ import annotations

from dengine.raft.messages import (
    HeartbeatRequest,
    PreVoteRequest,
    PreVoteResponse,
    VoteRequest,
    VoteResponse,
)
from dengine.raft.raft import Transition
from dengine.raft.types import HardState, Role
from tests.raft.cluster import Cluster
from tests.raft.harness import (
    A,
    B,
    C,
    D,
    E,
    expect,
    leader,
    membership,
    noop,
    past_grace,
    server,
)

ABC = membership(A, B, C)


# --- 9.6: pre-vote -------------------------------------------------------------------------------


def test_a_pre_vote_changes_nothing_and_needs_no_disk() -> None:
    """9.6: "a server asks ... without incrementing its term." """
    node = past_grace(server(A, ABC))
    node.step(PreVoteRequest(B, A, 2, 1, 1), PreVoteRequest(C, A, 2, 1, 1))
    expect(node.take(), messages=[PreVoteResponse(A, m, 2, True) for m in (B, C)])
    assert node.raft.hard_state == HardState(1, None, 1)


def test_a_pre_candidate_that_lags_learns_the_term() -> None:
    """9.6: else a server behind in terms would ask for an old term for ever."""
    node = past_grace(server(A, ABC, term=7))
    node.step(PreVoteRequest(B, A, 3, 9, 2))
    expect(node.take(), messages=[PreVoteResponse(A, B, 7, False)])
    lagging = server(B, ABC, term=2)
    lagging.tick(2001)
    lagging.take()
    lagging.step(PreVoteResponse(A, B, 7, False))
    reason = "a higher term was seen"
    expect(
        lagging.take(),
        hard_state=HardState(7, None, 1),
        transitions=[Transition(Role.CANDIDATE, Role.FOLLOWER, 7, reason)],
    )


def test_a_pre_vote_is_refused_for_a_term_that_was_entered_already() -> None:
    """9.6: the vote itself may be given away in it, so this one would promise too much."""
    node = past_grace(server(A, ABC, term=7))
    node.step(PreVoteRequest(B, A, 7, 9, 2))
    expect(node.take(), messages=[PreVoteResponse(A, B, 7, False)])


def test_an_isolated_server_does_not_inflate_its_term() -> None:
    """9.6: an hour alone, and its return disturbs nobody."""
    cluster = Cluster(ABC)
    first = cluster.elect()
    (lost,) = [m for m in (B, C) if m != first.me][:1]
    term = first.raft.term
    cluster.isolate(lost)
    cluster.run(3_600_000, step_ms=500)
    assert cluster.servers[lost].raft.term == term
    cluster.heal()
    cluster.run(3000)
    assert cluster.leader is first
    assert first.raft.term == term


def test_a_server_that_cannot_hear_the_leader_does_not_depose_it() -> None:
    """9.6 and 4.2.3: in a partial mesh the third hears both, and refuses."""
    cluster = Cluster(ABC)
    first = cluster.elect()
    deaf = next(m for m in (A, B, C) if m != first.me)
    for cut in ({(first.me, deaf)}, {(first.me, deaf), (deaf, first.me)}):
        cluster.cut = cut
        cluster.run(60_000, step_ms=50)
        assert cluster.leader is first
    cluster.heal()
    cluster.run(2000)
    assert [s.raft.term for s in cluster.servers.values()] == [first.raft.term] * 3


# --- 4.2.3: stickiness; the grace after a start --------------------------------------------------


def test_who_hears_a_leader_lets_nobody_depose_it() -> None:
    """4.2.3: "if a server receives a RequestVote within the minimum election timeout of hearing
    from a current leader, it does not update its term or grant its vote."
    """
    node = past_grace(server(A, ABC))
    node.step(HeartbeatRequest(B, A, 1, 1, 1, 1))
    node.settle()
    node.tick(999)
    node.step(VoteRequest(C, A, 9, 5, 5, False), PreVoteRequest(C, A, 9, 5, 5))
    expect(node.take(), messages=[PreVoteResponse(A, C, 1, False)])
    node.tick(1)
    node.step(PreVoteRequest(C, A, 9, 5, 5))
    expect(node.take(), messages=[PreVoteResponse(A, C, 9, True)])


def test_a_leader_ignores_requests_for_votes() -> None:
    """4.2.3: it hears itself; CheckQuorum is what ends a leadership that nobody follows."""
    node = leader(A, ABC)
    node.step(VoteRequest(C, A, 9, 5, 5, False), PreVoteRequest(C, A, 9, 5, 5))
    expect(node.take(), messages=[PreVoteResponse(A, C, 2, False)])
    assert node.raft.is_leader


def test_no_vote_within_timeout_ms_min_of_a_start() -> None:
    """4.2.3 and 6.4.1: a restart forgets whom it heard, and a lease may rest on that."""
    node = server(A, ABC)
    node.tick(999)
    node.step(PreVoteRequest(B, A, 2, 1, 1), VoteRequest(B, A, 2, 1, 1, False))
    expect(node.take(), messages=[PreVoteResponse(A, B, 1, False)])
    node.tick(1)
    node.step(VoteRequest(B, A, 2, 1, 1, False))
    assert node.settle() == [VoteResponse(A, B, 2, True)]


def test_a_sole_voter_needs_no_grace() -> None:
    """It can have promised nothing to anybody else."""
    node = server(A, membership(A, learners=[B]))
    node.step(PreVoteRequest(B, A, 2, 1, 1))
    assert node.take().messages == [PreVoteResponse(A, B, 2, True)]


def test_a_persisted_single_voter_leads_at_once() -> None:
    """The first tick after a start is enough, with two log writes."""
    node = server(A, membership(A), [1, 1])
    node.tick()
    ready = node.take()
    assert ready.hard_state == HardState(2, A, 1)
    assert ready.transitions == [
        Transition(Role.FOLLOWER, Role.CANDIDATE, 1, "no leader was heard")
    ]
    node.finish_write()
    expect(
        node.take(),
        hard_state=HardState(2, A, 1),
        entries=[noop(4, 2)],
        transitions=[Transition(Role.CANDIDATE, Role.LEADER, 2, "elected")],
    )
    node.finish_write()
    assert node.raft.committed_in_term


def test_a_voter_of_two_does_not_lead_alone() -> None:
    """5.2: neither at once nor later."""
    node = server(A, membership(A, B))
    for _ in range(100):
        node.tick(100)
        node.settle()
    assert node.raft.hard_state == HardState(1, None, 1)


# --- 6.2: CheckQuorum ----------------------------------------------------------------------------


def test_a_leader_that_no_majority_answers_steps_down() -> None:
    """6.2: "a leader steps down if an election timeout elapses without a successful round of
    heartbeats to a majority of its cluster."
    """
    node = leader(A, membership(A, B, C, D, E))
    node.tick(900)
    sent = node.settle()
    node.answer_heartbeats(sent, B)
    node.tick(100)
    node.settle()
    assert node.raft.is_leader
    node.tick(1)
    reason = "no majority answered for 1000 ms"
    expect(node.take(), transitions=[Transition(Role.LEADER, Role.FOLLOWER, 2, reason)])


def test_a_leader_that_is_answered_goes_on() -> None:
    """6.2: one of two followers is a majority of three with the leader itself."""
    node = leader(A, ABC)
    for _ in range(200):
        node.tick(100)
        node.answer_heartbeats(node.settle(), B)
    assert node.raft.is_leader


def test_the_answers_of_learners_keep_no_leader_in_place() -> None:
    """6.2 and 4.2.1."""
    node = leader(A, membership(A, B, C, learners=[D, E]))
    for _ in range(11):
        node.tick(100)
        node.answer_heartbeats(node.settle(), D, E)
    assert not node.raft.is_leader


def test_a_leader_that_can_send_but_not_hear_makes_room() -> None:
    """6.2: its heartbeats would keep the others quiet for ever."""
    cluster = Cluster(ABC)
    mute = cluster.elect()
    cluster.cut = {(m, mute.me) for m in (A, B, C) if m != mute.me}
    assert cluster.run(5000, lambda: cluster.leader is not None and cluster.leader is not mute)
    assert not mute.raft.is_leader


def test_a_leader_that_slept_steps_down_before_anything_else() -> None:
    """6.2: SIGSTOP for five seconds; the clock tells before a single message is looked at."""
    node = leader(A, ABC)
    node.tick(5000)
    assert not node.raft.is_leader


# --- a broken stream -----------------------------------------------------------------------------


def test_a_follower_whose_stream_to_the_leader_broke_asks_early_but_never_too_early() -> None:
    """Soon after stickiness ends (4.2.3), when the others may have lost it as well."""
    asked = []
    for seed in range(50):
        node = server(A, ABC, seed=seed)
        node.step(HeartbeatRequest(B, A, 1, 1, 1, 1))
        node.settle()
        node.raft.report_unreachable(B)
        elapsed = 0
        while not node.take().messages:
            node.tick(5)
            elapsed += 5
        asked.append(elapsed)
    assert min(asked) >= 1000
    assert max(asked) <= 1255


def test_a_broken_stream_deposes_no_leader_that_others_hear() -> None:
    """4.2.3 and 9.6: the early question is refused, and changes nobody's term."""
    cluster = Cluster(ABC)
    first = cluster.elect()
    cluster.run(300)
    deaf = next(s for s in cluster.servers.values() if s is not first)
    cluster.cut = {(first.me, deaf.me), (deaf.me, first.me)}
    deaf.raft.report_unreachable(first.me)
    cluster.run(10_000)
    assert cluster.leader is first
    assert deaf.raft.term == first.raft.term
