"""Elections: paper 5.1, 5.2, 5.4.1, 8; thesis 3.4, 4.2.1. See also test_disruption.

Whole `Ready`s are compared: what is not named must be empty.
"""

from __future__ import annotations

import pytest

from dengine.errors import InvariantBroken
from dengine.raft.membership import Membership
from dengine.raft.messages import (
    AppendRequest,
    AppendResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    PreVoteRequest,
    PreVoteResponse,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
)
from dengine.raft.raft import Transition
from dengine.raft.types import Entry, EntryKind, HardState, MemberId, Role
from tests.raft.cluster import Cluster
from tests.raft.harness import (
    A,
    B,
    C,
    D,
    Disk,
    E,
    Server,
    config,
    expect,
    leader,
    make_log,
    membership,
    noop,
    normal,
    past_grace,
    server,
)

ABC = membership(A, B, C)


# --- 5.1: terms ----------------------------------------------------------------------------------


def test_a_stale_leader_is_told_of_the_newer_term() -> None:
    """5.1: "If a server receives a request with a stale term number, it rejects the request." """
    for stale in (
        HeartbeatRequest(B, A, 2, 1, 1, 1),
        AppendRequest(B, A, 2, 1, 1, (noop(2, 2),), 1),
    ):
        node = server(A, ABC, term=5)
        node.step(stale)
        expect(node.take(), messages=[AppendResponse(A, B, 5, False, 0, 0, 0, 0)])


def test_a_leader_that_sees_a_newer_term_becomes_a_follower() -> None:
    """5.1: "If a candidate or leader discovers that its term is out of date, it immediately
    reverts to follower state." The new term is durable before anything depends on it.
    """
    node = leader(A, ABC)
    node.step(AppendResponse(B, A, 9, False, 0, 0, 0, 0))
    reason = "a higher term was seen"
    expect(
        node.take(),
        hard_state=HardState(9, None, 2),
        transitions=[Transition(Role.LEADER, Role.FOLLOWER, 9, reason)],
    )


def test_votes_of_an_older_term_do_not_elect() -> None:
    """5.1: a late answer to an earlier candidacy is ignored."""
    node = server(A, ABC)
    node.stand_for_election()
    node.stand_for_election()
    assert node.raft.term == 3
    node.step(VoteResponse(B, A, 2, True))
    expect(node.take())
    node.step(VoteResponse(B, A, 3, True))
    assert node.raft.is_leader


def test_votes_that_arrive_after_following_another_leader_do_not_elect() -> None:
    """5.2: a candidate that has followed this term's leader is out of the race, even when it
    campaigns again in the same term and the leader has changed the membership meanwhile.
    """
    node = server(A, membership(A, B, C, D, E))
    node.stand_for_election()
    node.step(VoteResponse(B, A, 2, True))
    node.step(HeartbeatRequest(E, A, 2, 1, 1, 1))
    node.settle()
    node.tick(node.config.timeout_ms_max + 1)
    node.take()
    assert node.raft.role is Role.CANDIDATE
    assert node.raft.term == 2
    node.step(VoteResponse(C, A, 2, True), VoteResponse(D, A, 2, True))
    assert not node.raft.is_leader


def test_a_restarted_candidate_does_not_count_late_votes() -> None:
    """5.2: the process that asked is gone, and with it what it had not yet written."""
    node = server(A, ABC)
    node.stand_for_election()
    node.restart()
    node.tick(node.config.timeout_ms_max + 1)
    node.take()
    node.step(VoteResponse(B, A, 2, True), VoteResponse(C, A, 2, True))
    assert not node.raft.is_leader


# --- 5.2: leader election ------------------------------------------------------------------------


def test_a_server_starts_as_follower_and_says_nothing() -> None:
    """5.2: "When servers start up, they begin as followers." """
    node = Server(A, Disk(HardState(3, B, 1), make_log(ABC, [1, 3])))
    expect(node.take(), committed_entries=node.disk.log[:1])
    assert node.raft.role is Role.FOLLOWER


def test_a_follower_that_hears_nothing_asks_for_pre_votes() -> None:
    """5.2 and 9.6: after an election timeout it asks first, without touching anybody's term."""
    node = server(A, ABC, [1, 1])
    node.tick(node.config.timeout_ms_max + 1)
    expect(
        node.take(),
        messages=[PreVoteRequest(A, B, 2, 3, 1), PreVoteRequest(A, C, 2, 3, 1)],
        transitions=[Transition(Role.FOLLOWER, Role.CANDIDATE, 1, "no leader was heard")],
    )
    assert node.raft.hard_state == HardState(1, None, 1)


def test_the_election_timeout_is_random_within_its_bounds() -> None:
    """5.2: "election timeouts are chosen randomly from a fixed interval." """
    due = []
    for seed in range(50):
        node, elapsed = server(A, ABC, seed=seed), 0
        while not node.take().messages:
            node.tick(10)
            elapsed += 10
        due.append(elapsed)
    assert 1000 <= min(due) < 1100
    assert 1900 < max(due) <= 2000
    assert len(set(due)) > 25, "hardly random"


def test_a_heartbeat_keeps_a_follower_quiet() -> None:
    """5.2: "A server remains in follower state as long as it receives valid RPCs." """
    node = server(A, ABC)
    for number in range(1, 100):
        node.tick(900)
        node.step(HeartbeatRequest(B, A, 1, number, 1, 1))
        expect(node.take(), messages=[HeartbeatResponse(A, B, 1, number, 1000)])


def test_a_candidate_asks_for_votes_once_its_own_vote_is_durable() -> None:
    """5.2: "increments its current term", "votes for itself", and only then asks (figure 2)."""
    node = server(A, ABC, [1])
    node.tick(node.config.timeout_ms_max + 1)
    node.take()
    node.step(PreVoteResponse(B, A, 2, True))
    requests = [VoteRequest(A, B, 2, 2, 1, False), VoteRequest(A, C, 2, 2, 1, False)]
    expect(node.take(), hard_state=HardState(2, A, 1), messages_after_sync=requests)
    node.finish_write()
    assert node.disk.hard_state == HardState(2, A, 1)


def test_the_own_vote_counts_only_once_durable() -> None:
    """5.2: here even the other voter's answer cannot overtake the disk."""
    node = server(A, ABC)
    node.tick(node.config.timeout_ms_max + 1)
    node.step(PreVoteResponse(B, A, 2, True))
    node.take()
    node.step(VoteResponse(B, A, 2, True))
    assert not node.raft.is_leader
    node.finish_write()
    assert node.raft.is_leader


def test_a_majority_of_votes_makes_a_leader_that_announces_itself() -> None:
    """5.2: "it then sends heartbeat messages to all of the other servers"; 8: and a no-op."""
    node = server(A, ABC, [1])
    node.stand_for_election()
    node.step(VoteResponse(B, A, 2, True))
    append = [AppendRequest(A, m, 2, 2, 1, (noop(3, 2),), 1) for m in (B, C)]
    expect(
        node.take(),
        messages=[HeartbeatRequest(A, B, 2, 1, 0, 0), HeartbeatRequest(A, C, 2, 1, 0, 0), *append],
        hard_state=HardState(2, A, 1),
        entries=[noop(3, 2)],
        transitions=[Transition(Role.CANDIDATE, Role.LEADER, 2, "elected")],
    )


def test_a_minority_of_votes_does_not() -> None:
    """5.2: "A candidate wins an election if it receives votes from a majority." """
    node = server(A, membership(A, B, C, D, E))
    node.stand_for_election()
    node.step(VoteResponse(B, A, 2, True), VoteResponse(B, A, 2, True))
    assert not node.raft.is_leader
    node.step(VoteResponse(C, A, 2, True))
    assert node.raft.is_leader


def test_a_vote_is_durable_before_it_is_given() -> None:
    """5.2 and figure 2: the answer waits for term and vote, written as one record."""
    node = past_grace(server(A, ABC))
    node.step(VoteRequest(B, A, 2, 1, 1, False))
    expect(
        node.take(),
        hard_state=HardState(2, B, 1),
        messages_after_sync=[VoteResponse(A, B, 2, True)],
    )
    node.restart()
    past_grace(node)
    node.step(VoteRequest(C, A, 2, 1, 1, False))  # the unsynced vote was never given
    expect(
        node.take(),
        hard_state=HardState(2, C, 1),
        messages_after_sync=[VoteResponse(A, C, 2, True)],
    )


def test_one_vote_per_term_for_ever() -> None:
    """5.2: "Each server will vote for at most one candidate in a given term", also after kill -9;
    the same candidate gets the same answer again.
    """
    node = past_grace(server(A, ABC))
    node.step(VoteRequest(B, A, 2, 1, 1, False))
    node.settle()
    node.restart()
    past_grace(node)
    node.step(VoteRequest(C, A, 2, 9, 2, False), VoteRequest(B, A, 2, 1, 1, False))
    answers = [VoteResponse(A, C, 2, False), VoteResponse(A, B, 2, True)]
    expect(node.take(), messages=answers)


def test_a_vote_resets_the_election_timer() -> None:
    """Figure 2: no election without "granting vote to candidate" having run out too."""
    node = past_grace(server(A, ABC))
    node.step(VoteRequest(B, A, 2, 1, 1, False))
    node.settle()
    node.tick(999)
    expect(node.take())


def test_a_candidate_that_hears_the_leader_of_its_term_follows_it() -> None:
    """5.2: "the candidate recognizes the leader as legitimate and returns to follower state",
    and takes over a conflicting log.
    """
    node = server(A, ABC, [1, 1])
    node.stand_for_election()
    node.step(AppendRequest(B, A, 2, 2, 1, (noop(3, 2),), 1))
    last = (3, 2)
    expect(
        node.take(),
        hard_state=HardState(2, A, 1),
        entries=[noop(3, 2)],
        messages_after_sync=[AppendResponse(A, B, 2, True, *last, *last)],
        transitions=[Transition(Role.CANDIDATE, Role.FOLLOWER, 2, "node 2 leads")],
    )


def test_requests_for_votes_that_waited_for_the_disk_leave_with_the_candidacy() -> None:
    """5.2, 5.4.1: they describe a log that the leader of the term may have replaced meanwhile."""
    node = server(A, ABC, [1, 1])
    node.step(AppendRequest(C, A, 1, 3, 1, (normal(4, 1),), 1))
    node.take()
    node.step(TimeoutNow(C, A, 1))  # the requests wait: a write is under way
    node.take()
    node.step(AppendRequest(B, A, 2, 2, 1, (noop(3, 2),), 1))
    node.take()
    node.finish_write()
    ready = node.take()
    expect(
        ready,
        hard_state=HardState(2, A, 1),
        entries=[noop(3, 2)],
        messages_after_sync=[AppendResponse(A, B, 2, True, 3, 2, 3, 2)],
    )


def test_a_split_vote_is_tried_again_after_a_short_random_pause() -> None:
    """5.2: randomised timeouts resolve split votes; the pause is 100 to 300 ms here."""
    pauses = []
    for seed in range(30):
        node = server(A, ABC, seed=seed)
        node.stand_for_election()
        node.step(VoteResponse(B, A, 2, False), VoteResponse(C, A, 2, False))
        elapsed = 0
        while not (ready := node.take()).messages:
            node.tick(10)
            elapsed += 10
        assert ready.messages == [PreVoteRequest(A, B, 3, 1, 1), PreVoteRequest(A, C, 3, 1, 1)]
        pauses.append(elapsed)
    assert min(pauses) >= 100
    assert max(pauses) <= 310
    assert len(set(pauses)) > 5


# --- 5.4.1: election restriction -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "granted"),
    [
        ((4, 2), True),  # the same log
        ((5, 2), True),  # longer
        ((3, 2), False),  # shorter
        ((2, 3), True),  # shorter, but a later last term
        ((9, 1), False),  # longer, but an earlier last term
    ],
)
def test_the_voter_denies_its_vote_to_a_log_that_is_behind_its_own(
    last: tuple[int, int], granted: bool
) -> None:
    """5.4.1: "the voter denies its vote if its own log is more up-to-date." """
    node = past_grace(server(A, ABC, [1, 2, 2], term=3))
    node.step(PreVoteRequest(B, A, 4, *last))
    expect(node.take(), messages=[PreVoteResponse(A, B, 4 if granted else 3, granted)])
    node.step(VoteRequest(B, A, 4, *last, False))
    expect(
        node.take(),
        hard_state=HardState(4, B if granted else None, 1),
        messages_after_sync=[VoteResponse(A, B, 4, granted)],
    )


# --- learners, incarnations ----------------------------------------------------------------------


def test_a_learner_never_campaigns() -> None:
    """4.2.1: non-voting members do not stand for election."""
    node = server(C, membership(A, B, learners=[C]))
    for _ in range(100):
        node.tick(100)
        expect(node.take())


def promotion_that_learners_lack(promoted: tuple[MemberId, ...]) -> Cluster:
    """B has promoted `promoted`, and nobody else knows. C has led next, sent its no-op to those
    learners alone, and is gone for good. Of every membership a majority is there.
    """
    before = membership(A, B, C, learners=promoted)
    after = membership(A, B, C, *promoted, outgoing=(A, B, C) if len(promoted) > 1 else ())
    common = [config(1, 1, before), noop(2, 2)]
    logs: dict[MemberId, list[Entry]] = {
        A: common,
        B: [*common, config(3, 2, after)],
        **{learner: [*common, noop(3, 3)] for learner in promoted},
    }
    cluster = Cluster(membership())
    cluster.disks = {m: Disk(HardState(3, None, 2), log) for m, log in logs.items()}
    for m, disk in cluster.disks.items():
        cluster.add(m, disk)
    return cluster


@pytest.mark.parametrize("promoted", [(D,), (D, E)], ids=["3-to-4", "3-to-5"])
def test_a_learner_whose_vote_is_needed_leads_until_it_can_hand_over(
    promoted: tuple[MemberId, ...],
) -> None:
    """4.2.2: B cannot win without a vote of them, and theirs are the better logs."""
    cluster = promotion_that_learners_lack(promoted)
    voter = cluster.elect()
    assert voter.me in (A, B)
    assert {m for _, m in sorted(cluster.checker.leaders.items())[:-1]} <= set(promoted)
    assert voter.raft.membership == membership(A, B, C, learners=promoted)
    cluster.write(b"x")


def test_a_learner_that_was_needed_once_is_quiet_again_under_a_leader() -> None:
    learner = past_grace(server(D, membership(A, B, C, learners=[D]), terms=[2], term=2))
    learner.step(PreVoteRequest(B, D, 3, 1, 1))
    learner.step(HeartbeatRequest(A, D, 3, 1, 0, 0))
    learner.settle()
    learner.tick(60_000)
    expect(learner.take())


def test_a_voter_without_its_state_stands_where_nobody_can_win_without_it() -> None:
    """B's log is the shorter one, and the third voter is gone for good: the entries that are
    committed are in this log alone."""
    voter = past_grace(server(C, membership(A, B, C), terms=[2], term=2))
    voter.raft.distrust_state()
    voter.tick(60_000)
    voter.settle()
    assert voter.raft.role is Role.FOLLOWER, "it would serve nobody, and others may"
    voter.step(PreVoteRequest(B, C, 3, 1, 1))
    voter.settle()
    voter.tick(60_000)
    voter.settle()
    assert voter.raft.role is Role.CANDIDATE


def test_a_voter_keeps_what_it_promised_before_it_was_started_with_other_timeouts() -> None:
    """6.4.1: a leader that heard it before counts on its vote for as long as it said then."""
    voter = server(B, membership(A, B, C), terms=[2], term=2, start_stickiness_ms=10_000)
    for passes_ms, answer in ((9_999, (2, False)), (1, (3, True))):
        voter.tick(passes_ms)
        voter.step(PreVoteRequest(C, B, 3, 2, 2))
        assert PreVoteResponse(B, C, *answer) in voter.settle()


def test_who_keeps_an_old_promise_does_not_vote_for_itself_either() -> None:
    """A leader counts on that vote whoever would get it."""
    voter = server(B, membership(A, B, C), terms=[2], term=2, start_stickiness_ms=10_000)
    voter.tick(9_999)
    voter.settle()
    assert voter.raft.role is Role.FOLLOWER
    voter.tick(60_000)
    voter.settle()
    assert voter.raft.role is Role.CANDIDATE


def test_a_learner_that_hears_a_leader_does_not_stand_whoever_asks_it() -> None:
    """4.2.3: neither would a voter."""
    learner = past_grace(server(D, membership(A, B, C, learners=[D]), terms=[2], term=2))
    learner.step(HeartbeatRequest(A, D, 2, 1, 0, 0), PreVoteRequest(B, D, 3, 1, 1))
    learner.settle()
    learner.tick(60_000)
    expect(learner.take())


def test_a_learner_answers_requests_for_votes_by_its_log() -> None:
    """4.2.1: the candidate may know of its promotion before it does."""
    node = past_grace(server(C, membership(A, B, learners=[C])))
    node.step(PreVoteRequest(A, C, 2, 1, 1))
    node.step(VoteRequest(A, C, 2, 1, 1, False))
    assert node.settle() == [PreVoteResponse(C, A, 2, True), VoteResponse(C, A, 2, True)]


def test_the_votes_of_learners_and_strangers_do_not_count() -> None:
    """4.2.1: "not counted toward voting majorities"."""
    node = server(A, membership(A, B, C, learners=[D]))
    node.stand_for_election()
    node.step(VoteResponse(D, A, 2, True), VoteResponse(E, A, 2, True))
    assert not node.raft.is_leader


def test_the_votes_of_another_incarnation_do_not_count() -> None:
    """A wiped voter has forgotten what it promised."""
    wiped = MemberId(B.id, B.incarnation + 1)
    node = server(A, ABC)
    node.stand_for_election()
    node.step(VoteResponse(wiped, A, 2, True))
    assert not node.raft.is_leader


def test_messages_for_an_older_incarnation_are_ignored() -> None:
    """Whatever they say was meant for a directory that is gone."""
    wiped = MemberId(A.id, A.incarnation + 1)
    node = Server(wiped, Disk())
    node.tick(1000)
    node.step(VoteRequest(B, A, 5, 5, 5, False), HeartbeatRequest(B, A, 5, 1, 1, 1))
    expect(node.take())
    assert node.raft.term == 1


def test_a_no_op_is_the_first_entry_of_a_term() -> None:
    """8: "each leader commits a blank no-op entry at the start of its term." """
    node = leader(A, ABC, [1])
    assert node.disk.log[-1] == noop(3, 2)
    assert node.applied[-1].kind is EntryKind.NOOP


# --- founding ------------------------------------------------------------------------------------


def test_a_founder_writes_the_membership_before_it_says_anything() -> None:
    """Entry 1 of term 1 on every founder, in the same write as a first vote."""
    node = Server(A, Disk())
    node.settle()
    node.raft.bootstrap(ABC)
    node.tick(1000)
    node.step(VoteRequest(B, A, 2, 1, 1, False))
    expect(
        node.take(),
        hard_state=HardState(2, B, 1),
        entries=make_log(ABC, []),
        messages_after_sync=[VoteResponse(A, B, 2, True)],
    )
    node.restart()
    assert node.raft.membership == Membership()  # nothing was durable, and nothing was said


def test_a_single_founder_leads_at_once() -> None:
    """After three log writes it takes traffic."""
    node = Server(A, Disk())
    node.settle()
    node.raft.bootstrap(membership(A))
    node.tick()
    node.settle()
    assert node.raft.committed_in_term
    assert node.raft.committed_membership == membership(A)


def test_a_server_that_has_a_log_founds_nothing() -> None:
    """The persisted membership always wins."""
    with pytest.raises(InvariantBroken, match="only an empty log can be founded"):
        server(A, ABC).raft.bootstrap(membership(A))
