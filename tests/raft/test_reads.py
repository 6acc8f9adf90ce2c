"""Reads: thesis 6.4 (read index) and 6.4.1 (lease). Whole `Ready`s are compared."""

from __future__ import annotations

import pytest

from dengine.raft.membership import AddLearner, Promote, Remove
from dengine.raft.messages import (
    AppendResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    ReadIndexRequest,
    ReadIndexResponse,
)
from dengine.raft.raft import ASKED_READS_MAX, Transition
from dengine.raft.types import HardState, MemberId, ReadNonce, ReadState, Role
from tests.raft.cluster import Cluster
from tests.raft.harness import (
    A,
    B,
    C,
    D,
    E,
    Server,
    expect,
    leader,
    member,
    membership,
    server,
)

ABC = membership(A, B, C)


def nonce(counter: int, asker: MemberId = A) -> ReadNonce:
    return ReadNonce(asker, 77, counter)


def read(node: Server, counter: int, *, lease: bool = False) -> None:
    node.raft.read_index(nonce(counter, node.me), lease=lease)


def heartbeat_round(number: int, *followers: MemberId, commit: int = 2) -> list[HeartbeatRequest]:
    return [HeartbeatRequest(A, m, 2, number, commit, 2) for m in followers]


def answer(sender: MemberId, number: int, term: int = 2) -> HeartbeatResponse:
    return HeartbeatResponse(sender, A, term, number, 1000)


# --- 6.4: a round of heartbeats per batch of reads -----------------------------------------------


def test_a_read_waits_for_a_round_of_heartbeats_of_its_own() -> None:
    """6.4: "The leader needs to make sure it hasn't been superseded": it notes its commit index,
    a majority answers, and the read may be served once that index is applied.
    """
    node = leader(A, ABC)
    read(node, 1)
    expect(node.take(), messages=heartbeat_round(2, B, C))
    node.step(answer(B, 2))
    expect(node.take(), read_states=[ReadState(nonce(1), 2)])


def test_reads_that_arrive_while_a_round_is_out_share_the_next() -> None:
    """6.4: "amortized over any number of read-only queries"; none joins a round that has left."""
    node = leader(A, ABC)
    read(node, 1)
    node.take()
    read(node, 2)
    read(node, 3)
    expect(node.take())
    node.step(answer(B, 2))
    expect(node.take(), messages=heartbeat_round(3, B, C), read_states=[ReadState(nonce(1), 2)])
    node.step(answer(C, 2))
    expect(node.take())
    node.step(answer(C, 3))
    states = [ReadState(nonce(2), 2), ReadState(nonce(3), 2)]
    expect(node.take(), read_states=states)


def test_stale_and_repeated_answers_confirm_nothing() -> None:
    """6.4 (etcd #20418): an answer proves leadership only up to when its heartbeat was sent."""
    node = leader(A, ABC)
    node.tick(100)
    node.take()  # round 2, periodic
    read(node, 1)
    node.take()
    node.step(answer(B, 1), answer(B, 2), answer(B, 2), answer(C, 1), answer(C, 2))
    assert not node.take().read_states
    node.step(answer(C, 3, term=1))
    assert not node.take().read_states
    node.step(answer(C, 3))
    assert node.take().read_states == [ReadState(nonce(1), 2)]


def test_a_read_waits_for_what_was_committed_when_it_came() -> None:
    """6.4: the index is the leader's commit index, which the leader itself may not have applied."""
    node = leader(A, ABC)
    node.raft.propose(b"x")
    node.take()
    node.step(AppendResponse(B, A, 2, True, 3, 2, 3, 2), AppendResponse(C, A, 2, True, 3, 2, 3, 2))
    read(node, 1)
    node.take()
    node.step(answer(B, 2))
    expect(node.take(), read_states=[ReadState(nonce(1), 3)])
    assert node.raft.log.applied_index == 2


def test_a_later_round_confirms_an_earlier_one() -> None:
    """6.4: whoever answers what was sent later had not left at the earlier time either."""
    node = leader(A, ABC)
    read(node, 1)
    node.take()
    node.tick(100)
    node.take()
    node.step(answer(B, 3))
    assert node.take().read_states == [ReadState(nonce(1), 2)]


def test_a_single_voter_confirms_at_once() -> None:
    """6.4: a majority of one; what learners answer is of no interest."""
    node = leader(A, membership(A, learners=[B]))
    read(node, 1)
    assert node.take().read_states == [ReadState(nonce(1), 2)]


def test_learners_and_strangers_confirm_nothing() -> None:
    """6.4 and 4.2.1; neither does another incarnation of a voter."""
    node = leader(A, membership(A, B, C, learners=[D, E]))
    read(node, 1)
    expect(node.take(), messages=heartbeat_round(2, B, C))
    node.step(answer(D, 2), answer(E, 2), answer(MemberId(B.id, 99), 2))
    expect(node.take())


def test_a_joint_state_confirms_by_both_halves() -> None:
    """4.3 and 6.4."""
    node = leader(A, membership(A, B, C, learners=[D, E]))
    for follower in (B, C, D, E):
        node.step(AppendResponse(follower, A, 2, True, 2, 2, 2, 2))
    node.raft.propose_membership(Promote((D, E)))
    node.take()
    read(node, 1)
    expect(node.take(), messages=heartbeat_round(2, B, C, D, E))
    node.step(answer(D, 2), answer(E, 2))
    assert not node.take().read_states, "a majority of the new half only"
    node.step(answer(C, 2))
    assert node.take().read_states == [ReadState(nonce(1), 2)]


def test_a_new_leader_serves_no_read_before_its_no_op_is_committed() -> None:
    """6.4: "it needs to commit a blank no-op entry": before that it may not know of everything
    that was committed (etcd #7331).
    """
    node = server(A, ABC, [1, 1])
    node.lead()
    read(node, 1)
    node.tick(100)
    node.answer_heartbeats(node.settle(), B, C)
    assert not node.take().read_states
    node.step(AppendResponse(B, A, 2, True, 4, 2, 4, 2))
    sent = node.settle()
    assert [(m.round, m.commit_index) for m in sent if isinstance(m, HeartbeatRequest)] == [
        (3, 4),
        (3, 0),
    ]
    node.answer_heartbeats(sent, C)
    assert node.take().read_states == [ReadState(nonce(1), 4)]


def test_a_change_of_leader_fails_the_reads_that_wait() -> None:
    """They can be tried again, but never served after a failed wait."""
    node = leader(A, ABC)
    read(node, 1)
    node.take()
    read(node, 2)
    node.take()
    node.step(HeartbeatRequest(B, A, 3, 1, 2, 1))
    expect(
        node.take(),
        hard_state=HardState(3, None, 2),
        messages_after_sync=[HeartbeatResponse(A, B, 3, 1, 1000)],
        read_states=[ReadState(nonce(1), None), ReadState(nonce(2), None)],
        transitions=[Transition(Role.LEADER, Role.FOLLOWER, 3, "a higher term was seen")],
    )
    node.step(answer(B, 2), answer(C, 2))
    assert not node.take().read_states


# --- 6.4: reads on followers ---------------------------------------------------------------------


def follower_of_a() -> Server:
    node = server(B, ABC)
    node.step(HeartbeatRequest(A, B, 1, 1, 1, 1))
    node.settle()
    return node


def test_a_follower_asks_the_leader_for_the_index() -> None:
    """6.4: "Followers could ... issue a request to the leader that just asks for a current
    readIndex"; then the follower waits until it has applied that much.
    """
    node = follower_of_a()
    read(node, 1)
    expect(node.take(), messages=[ReadIndexRequest(B, A, 1, nonce(1, B), False)])
    node.step(ReadIndexResponse(A, B, 1, nonce(1, B), 7, 1, 1))
    expect(node.take(), read_states=[ReadState(nonce(1, B), 7)])
    node.step(ReadIndexResponse(A, B, 1, nonce(1, B), 9, 1, 1))
    expect(node.take())  # answered already


def test_the_leader_confirms_before_it_answers_a_follower() -> None:
    """6.4: the same round that its own reads take; the answer tells the follower's commit index."""
    node = leader(A, ABC)
    node.step(ReadIndexRequest(B, A, 2, nonce(1, B), False))
    expect(node.take(), messages=heartbeat_round(2, B, C))
    node.step(answer(C, 2))
    expect(node.take(), messages=[ReadIndexResponse(A, B, 2, nonce(1, B), 2, 2, 2)])


def test_a_follower_without_a_leader_fails_the_read() -> None:
    """At once; the client can try again."""
    node = server(B, ABC)
    read(node, 1)
    expect(node.take(), read_states=[ReadState(nonce(1, B), None)])


def test_whoever_does_not_lead_says_so() -> None:
    """6.4: the question went to a leader that has stepped down."""
    node = follower_of_a()
    node.step(ReadIndexRequest(C, B, 1, nonce(1, C), False))
    expect(node.take(), messages=[ReadIndexResponse(B, C, 1, nonce(1, C), None, 0, 0)])
    node.step(ReadIndexResponse(A, B, 1, nonce(9, B), 5, 1, 1))
    expect(node.take())  # never asked


def test_a_leader_that_steps_down_tells_the_followers_that_wait() -> None:
    """A change of leader fails waiting reads, wherever they were asked."""
    node = leader(A, ABC)
    node.step(ReadIndexRequest(B, A, 2, nonce(1, B), False))
    node.take()
    node.raft.step_down("a test")
    assert list(node.take().messages) == [ReadIndexResponse(A, B, 2, nonce(1, B), None, 2, 2)]


@pytest.mark.parametrize("other", [HeartbeatRequest(C, B, 2, 1, 1, 1), None])
def test_a_follower_that_loses_its_leader_fails_what_it_asked(
    other: HeartbeatRequest | None,
) -> None:
    """Another leader appears, or none is heard any more."""
    node = follower_of_a()
    read(node, 1)
    node.take()
    if other is not None:
        node.step(other)
    else:
        node.tick(2001)
    assert node.take().read_states == [ReadState(nonce(1, B), None)]


def test_a_question_that_was_lost_is_given_up() -> None:
    """The leader is well and answers other things: what was lost must not be kept for ever."""
    node = follower_of_a()
    read(node, 1)
    node.take()
    states = []
    for number in range(2, 30):
        node.tick(100)
        node.step(HeartbeatRequest(A, B, 1, number, 1, 1))
        states += node.take().read_states
    assert states == [ReadState(nonce(1, B), None)]


def test_questions_that_wait_for_the_leader_are_bounded() -> None:
    """Every queue has a bound; beyond it a read fails at once and can be tried again."""
    node = follower_of_a()
    for counter in range(ASKED_READS_MAX):
        read(node, counter)
    assert not node.take().read_states
    read(node, ASKED_READS_MAX)
    assert node.take().read_states == [ReadState(nonce(ASKED_READS_MAX, B), None)]


# --- 6.4.1: lease --------------------------------------------------------------------------------


def test_a_leader_that_holds_a_lease_answers_alone() -> None:
    """6.4.1: "the leader can reply to read-only queries without communication." """
    node = leader(A, ABC)
    read(node, 1, lease=True)
    node.step(ReadIndexRequest(B, A, 2, nonce(2, B), True))
    expect(
        node.take(),
        messages=[ReadIndexResponse(A, B, 2, nonce(2, B), 2, 2, 2)],
        read_states=[ReadState(nonce(1), 2)],
    )


def lease_length(answered_after_ms: int, **options: int) -> int:
    """How long a lease lasts from the moment its heartbeats were SENT."""
    follower_timeout = options.pop("follower_timeout", 1000)
    node = leader(A, ABC, **options)
    node.tick(100)
    sent = node.take().messages
    node.tick(answered_after_ms)
    node.answer_heartbeats(sent, B, timeout_ms_min=follower_timeout)
    for elapsed in range(answered_after_ms, 2000):
        read(node, elapsed, lease=True)
        if not node.take().read_states:
            return elapsed
        node.tick(1)
    raise AssertionError("a lease without end")


@pytest.mark.parametrize("answered_after_ms", [0, 50, 90])
def test_a_lease_runs_from_when_the_heartbeat_was_sent(answered_after_ms: int) -> None:
    """6.4.1: however late the answer, the voter heard no later than it answered."""
    assert lease_length(answered_after_ms) == 500


@pytest.mark.parametrize(
    ("lease_ms", "follower_timeout", "length"),
    [(500, 1000, 500), (200, 1000, 200), (500, 300, 150)],
)
def test_a_lease_is_at_most_half_of_the_shortest_timeout(
    lease_ms: int, follower_timeout: int, length: int
) -> None:
    """The lesser of lease_ms and half the smallest timeout_ms_min that a voter announces."""
    assert lease_length(0, lease_ms=lease_ms, follower_timeout=follower_timeout) == length


def test_a_lease_is_lost_in_sleep() -> None:
    """6.4.1: the clock has gone on, and leadership may have."""
    for slept_ms in (500, 900):
        node = leader(A, ABC)
        node.tick(slept_ms)
        read(node, 1, lease=True)
        assert not node.take().read_states


def test_old_answers_do_not_renew_a_lease() -> None:
    """6.4.1: repeated or late, they speak of when they were asked."""
    node = leader(A, ABC)
    for _ in range(5):
        node.tick(100)
        node.take()
        node.step(answer(B, 1), answer(C, 1))
    node.step(answer(B, 2))  # sent at 100 ms, answered at 500
    node.tick(99)
    read(node, 1, lease=True)
    assert node.take().read_states
    node.tick(1)
    read(node, 2, lease=True)
    assert not node.take().read_states


def test_a_lease_needs_a_majority_of_voters() -> None:
    """6.4.1 and 4.2.1: learners do not vote, so they can promise nothing."""
    node = leader(A, membership(A, B, C, learners=[D, E]))
    for _ in range(6):
        node.tick(100)
        node.answer_heartbeats(node.settle(), D, E)
    read(node, 1, lease=True)
    assert not node.take().read_states


def test_a_new_leader_has_no_lease_before_its_no_op_is_committed() -> None:
    """6.4: whatever the lease says, its commit index may be old."""
    node = server(A, ABC, [1])
    node.answer_heartbeats(node.lead(), B, C)
    read(node, 1, lease=True)
    assert not node.take().read_states


def test_a_leader_that_is_no_voter_has_no_lease() -> None:
    """4.2.2: the one voter that remains leads at once after a restart, and owes it nothing."""
    node = leader(A, membership(A, B))
    node.raft.propose_membership(Remove(A.id))
    read(node, 1, lease=True)
    assert not node.take().read_states


def test_a_lease_and_a_grown_membership() -> None:
    """4.3: in a joint state both halves must have answered lately."""
    node = leader(A, membership(A))
    for newcomer in (B, C):
        node.raft.propose_membership(AddLearner(member(newcomer)))
        node.settle()
        node.acknowledge(newcomer)
    node.raft.propose_membership(Promote((B, C)))
    read(node, 1, lease=True)
    ready = node.take()
    assert not ready.read_states
    node.answer_heartbeats(ready.messages, B)
    read(node, 2, lease=True)
    assert [s.nonce for s in node.take().read_states] == [nonce(1), nonce(2)]


def test_a_lease_in_a_joint_state_needs_the_outgoing_half_too() -> None:
    """4.3: who lacks the joint entry elects by the old membership."""
    node = leader(A, membership(A, B, C, learners=[D, E]))
    node.raft.propose_membership(Promote((D, E)))
    for _ in range(9):
        node.tick(100)
        node.answer_heartbeats(node.settle(), D, E)
    read(node, 1, lease=True)
    assert not node.take().read_states
    node.tick(100)
    node.answer_heartbeats(node.settle(), B, D, E)
    assert [s.nonce for s in node.take().read_states] == [nonce(1)]


def test_a_deposed_leader_serves_no_stale_read() -> None:
    """6.4 and 6.4.1, end to end: cut off, it answers from its lease at most as long
    as nobody else can lead, and not at all by read index.
    """
    for seed in range(20):
        cluster = Cluster(ABC, seed=seed)
        old = cluster.elect()
        cluster.run(300)
        cluster.isolate(old.me)
        for counter in range(400):
            cluster.run(10, step_ms=10)
            others = [s for s in cluster.servers.values() if s is not old]
            new = next((s for s in others if s.raft.is_leader), None)
            served = len([s for s in old.read_states if s.index is not None])
            read(old, 2 * counter)
            read(old, 2 * counter + 1, lease=True)
            cluster.settle()
            if new is not None:
                assert len([s for s in old.read_states if s.index is not None]) == served
        assert cluster.leader is not old
