"""Membership changes: paper 6; thesis 4.1-4.3. See also test_joint_crashes."""

from __future__ import annotations

import msgspec
import pytest

from dengine.errors import ClusterUnavailable, Conflict, JoinError, LeaderChanged, NotLeader
from dengine.raft.membership import (
    AddLearner,
    Change,
    LeaveJoint,
    Membership,
    Promote,
    Remove,
    Settings,
    Status,
    UpdateMember,
    UpdateSettings,
    apply_change,
    decode_membership,
    found,
)
from dengine.raft.messages import (
    AppendRequest,
    AppendResponse,
    HeartbeatRequest,
    PreVoteResponse,
    TimeoutNow,
    VoteResponse,
)
from dengine.raft.types import HardState, LogId, MemberId, Role
from tests.raft.cluster import Cluster
from tests.raft.harness import (
    A,
    B,
    C,
    D,
    E,
    Server,
    config,
    expect,
    leader,
    member,
    membership,
    noop,
    server,
)

ABC = membership(A, B, C)
WIPED_B = MemberId(B.id, B.incarnation + 1)


def change(node: Server, wanted: Change) -> Membership:
    """Propose `wanted`; the membership that is in force afterwards."""
    assert node.raft.propose_membership(wanted) is not None
    return node.raft.membership


def commit_everywhere(node: Server) -> None:
    """Everybody acknowledges whatever the leader appends, until it rests."""
    for _ in range(10):
        node.settle()
        if node.raft.is_leader:
            node.acknowledge(*(m for m in node.raft.progress if m != node.me))


# --- 4.1: safety ---------------------------------------------------------------------------------


def test_a_change_is_in_force_as_soon_as_it_is_appended() -> None:
    """4.1: "The new configuration takes effect on each server as soon as it is added to that
    server's log", on the leader and on followers alike.
    """
    node = leader(A, ABC)
    new = change(node, AddLearner(member(D)))
    assert new.learners == (D,)
    assert node.raft.committed_membership == ABC
    entry = config(3, 2, new)
    expect(
        node.take(),
        messages=[AppendRequest(A, m, 2, 2, 2, (entry,), 2) for m in (B, C, D)],
        hard_state=HardState(2, A, 2),
        entries=[entry],
    )
    follower = server(B, ABC)
    follower.step(AppendRequest(A, B, 2, 1, 1, (noop(2, 2), entry), 1))
    assert follower.raft.membership == new
    assert follower.raft.committed_membership == ABC


def test_a_change_that_is_truncated_is_rolled_back() -> None:
    """4.1: "a server must be prepared to fall back to the previous configuration in its log".
    Also when the truncation reaches the disk before a restart.
    """
    node = server(B, ABC)
    new = apply_change(ABC, Remove(C.id))
    node.step(AppendRequest(A, B, 2, 1, 1, (noop(2, 2), config(3, 2, new)), 1))
    node.settle()
    assert node.raft.membership == new
    node.step(AppendRequest(C, B, 3, 1, 1, (noop(2, 3),), 1))
    assert node.raft.membership == ABC
    node.settle()
    node.restart()
    assert node.raft.membership == ABC


def test_a_membership_survives_a_restart_committed_or_not() -> None:
    """4.1: "a server always uses the latest configuration in its log, regardless of whether the
    entry is committed."
    """
    node = leader(A, ABC)
    new = change(node, AddLearner(member(D)))
    node.settle()
    node.restart()
    assert node.raft.membership == new


def test_one_change_at_a_time() -> None:
    """4.1: "the leader ... must not begin a new change until the last one is committed." """
    node = leader(A, ABC)
    change(node, AddLearner(member(D)))
    with pytest.raises(Conflict, match="not committed yet"):
        node.raft.propose_membership(AddLearner(member(E)))
    node.settle()
    node.acknowledge(B)
    assert change(node, AddLearner(member(E))).learners == (D, E)


def test_a_new_leader_changes_nothing_before_its_no_op_is_committed() -> None:
    """4.1 with Ongaro's erratum of 2015: else two changes of different terms may
    both go through, with majorities that do not meet.
    """
    node = server(A, ABC)
    node.lead()
    with pytest.raises(ClusterUnavailable, match="has not committed an entry of its term"):
        node.raft.propose_membership(AddLearner(member(D)))
    node.acknowledge(B)
    change(node, AddLearner(member(D)))


def test_a_follower_changes_nothing() -> None:
    """3.3: only leaders append."""
    with pytest.raises(NotLeader):
        server(A, ABC).raft.propose_membership(AddLearner(member(D)))


def test_a_change_that_changes_nothing_appends_nothing() -> None:
    """Joining is idempotent."""
    node = leader(A, membership(A, B, C, learners=[D]))
    assert node.raft.propose_membership(AddLearner(member(D))) is None
    assert node.raft.propose_membership(Remove(77)) is None
    expect(node.take())


def test_each_change_of_who_votes_is_counted() -> None:
    """So that of two memberships anybody can tell the newer one, and what an old copy of the only
    voter has changed alone makes its own none."""
    old = membership(A, learners=[B, C])
    joint = apply_change(old, Promote((B, C)))
    done = apply_change(joint, LeaveJoint())
    assert [m.version for m in (old, joint, done)] == [0, 1, 2]
    assert apply_change(done, UpdateSettings(done.settings)) is done
    settings = msgspec.structs.replace(done.settings, promotion="odd")
    assert apply_change(done, UpdateSettings(settings)).version == 2
    assert apply_change(done, AddLearner(member(D))).version == 2
    assert apply_change(done, Remove(C.id)).version == 3
    assert decode_membership(done.encode()).version == 2


def test_a_single_voter_more_or_less_needs_no_joint_state() -> None:
    """4.1: majorities of memberships that differ in one server overlap."""
    grown = apply_change(membership(A, B, C, learners=[D]), Promote((D,)))
    assert (grown.voters, grown.outgoing) == ((A, B, C, D), ())
    shrunk = apply_change(ABC, Remove(C.id))
    assert (shrunk.voters, shrunk.outgoing) == ((A, B), ())


# --- 4.2.1: catching up --------------------------------------------------------------------------


def test_progress_and_activity_survive_promotion() -> None:
    """4.2.1: what the learner has acknowledged counts at once, and CheckQuorum knows it lives."""
    cluster = Cluster(membership(A))
    cluster.elect()
    cluster.add(B)
    node = cluster.servers[A]
    change(node, AddLearner(member(B)))
    cluster.run(5000)
    before = node.raft.progress[B]
    change(node, Promote((B,)))
    assert node.raft.progress[B] is before
    cluster.run(3000)
    assert node.raft.is_leader
    assert cluster.servers[B].raft.committed_membership.voters == (A, B)


def test_no_promotion_that_leaves_no_live_quorum() -> None:
    """A voter that does not answer would take the whole cluster with it. A
    learner that was just added is not alive until it has said something.
    """
    node = leader(A, membership(A))
    change(node, AddLearner(member(B)))
    node.settle()
    with pytest.raises(ClusterUnavailable, match="not heard from node 2 yet"):
        node.raft.propose_membership(Promote((B,)))
    node.tick(node.config.timeout_ms_min + 1)
    with pytest.raises(Conflict, match="2 did not answer lately"):
        node.raft.propose_membership(Promote((B,)))
    node.step(AppendResponse(B, A, 2, False, 2, 0, 0, 0))
    assert change(node, Promote((B,))).voters == (A, B)


def test_no_removal_that_leaves_no_live_quorum() -> None:
    """Of {1,2,3} with 3 dead, removing 2 would leave {1,3} without a majority. A
    leader so new that it cannot know asks for patience, which is retried, and never agrees.
    """
    node = server(A, ABC)
    node.lead()
    node.acknowledge(B)
    with pytest.raises(ClusterUnavailable, match="not heard from node 3 yet"):
        node.raft.propose_membership(Remove(B.id))
    for _ in range(2):
        node.tick(node.config.timeout_ms_min - 1)
        node.acknowledge(B)
    with pytest.raises(Conflict, match="3 did not answer lately"):
        node.raft.propose_membership(Remove(B.id))
    assert change(node, Remove(C.id)).voters == (A, B)


def test_the_last_voter_cannot_be_removed() -> None:
    """Refused, and nothing is appended."""
    node = leader(A, membership(A, learners=[B]))
    with pytest.raises(Conflict, match="last voter"):
        node.raft.propose_membership(Remove(A.id))
    expect(node.take())


# --- 4.2.2: removing the leader ------------------------------------------------------------------


def test_a_removed_leader_leads_until_that_is_committed_and_hands_over() -> None:
    """4.2.2: "the leader ... steps down once the C_new entry is committed"; meanwhile "it does
    not count itself in majorities". The best follower takes over without waiting.
    """
    node = leader(A, ABC)
    change(node, Remove(A.id))
    node.settle()
    assert not node.raft.may_propose
    with pytest.raises(LeaderChanged, match="not a voter"):
        node.raft.propose(b"its answer would be lost")
    node.acknowledge(B)
    assert node.raft.log.commit_index == 2, "its own copy must not count"
    node.acknowledge(C)
    ready = node.take()
    assert list(ready.messages) == [HeartbeatRequest(A, B, 2, 0, 3, 2), TimeoutNow(A, B, 2)]
    assert [t.new for t in ready.transitions] == [Role.FOLLOWER]
    node.settle()
    node.tick(60_000)
    expect(node.take())  # and never campaigns again


def test_a_cluster_goes_on_when_its_leader_is_removed() -> None:
    """4.2.2, end to end: the successor leads within a moment, not after an election timeout."""
    cluster = Cluster(ABC)
    old = cluster.elect()
    change(old, Remove(old.me.id))
    assert cluster.run(200, lambda: cluster.leader not in (None, old))
    cluster.write(b"x")
    assert cluster.elect().raft.committed_membership.tombstones == (old.me,)


def test_a_voter_campaigns_until_its_removal_is_committed() -> None:
    """4.2.2, figure 4.6: "a server that is not part of its own latest configuration should still
    start new elections": B holds too short a log to win, and A's is the only longer one.
    """
    cluster = Cluster(membership(A, B))
    cluster.elect()
    cluster.run(300)
    first = cluster.elect()
    other = B if first.me == A else A
    change(first, Remove(first.me.id))
    cluster.isolate(other)
    cluster.settle()
    cluster.crash(first.me)
    cluster.heal()
    again = cluster.restart(first.me)
    assert first.me not in again.raft.membership.voters
    assert cluster.run(10_000, lambda: cluster.servers[other].raft.is_leader)
    cluster.write(b"x")


# --- 4.2.3: disruptive servers -------------------------------------------------------------------


def test_a_removed_server_that_was_not_told_disturbs_nobody() -> None:
    """4.2.3: it no longer gets heartbeats, times out, and asks in vain."""
    cluster = Cluster(ABC)
    first = cluster.elect()
    cluster.run(300)
    gone = next(m for m in (A, B, C) if m != first.me)
    change(first, Remove(gone.id))
    cluster.run(60_000, step_ms=50)
    assert cluster.leader is first
    assert first.raft.membership.voters == tuple(m for m in (A, B, C) if m != gone)
    assert cluster.servers[gone].raft.term == first.raft.term


# --- 4.3: joint consensus ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("voters", "learners"), [((A,), (B, C)), ((A, B, C), (D, E))], ids=["1-to-3", "3-to-5"]
)
def test_larger_changes_go_through_a_joint_state(
    voters: tuple[MemberId, ...], learners: tuple[MemberId, ...]
) -> None:
    """4.3: C_old,new first; once that is committed the leader appends C_new by itself."""
    node = leader(A, membership(*voters, learners=learners))
    joint = change(node, Promote(learners))
    assert (joint.voters, joint.outgoing, joint.learners) == ((*voters, *learners), voters, ())
    with pytest.raises(Conflict):
        node.raft.propose_membership(AddLearner(member(MemberId(9, 9))))
    commit_everywhere(node)
    final = node.raft.committed_membership
    assert (final.voters, final.outgoing, final.tombstones) == ((*voters, *learners), (), ())
    assert node.raft.log.last_index == 4


def joint_leader() -> Server:
    """Leads {A,B,C} with outgoing {A}: the joint entry is durable on A alone."""
    node = leader(A, membership(A, learners=[B, C]))
    change(node, Promote((B, C)))
    node.settle()
    assert node.raft.log.commit_index == 2
    return node


def test_a_joint_state_commits_by_majorities_of_both_halves() -> None:
    """4.3: "agreement ... requires separate majorities from both the old and new configurations";
    the only old voter is not enough, and neither are both new ones without its disk.
    """
    node = joint_leader()
    node.acknowledge(B)
    assert node.raft.log.commit_index == 3
    node = leader(A, membership(A, learners=[B, C]))
    change(node, Promote((B, C)))
    node.take()  # not durable on A
    node.acknowledge(B, C)
    assert node.raft.log.commit_index == 2
    node.finish_write()
    assert node.raft.log.commit_index == 3


def test_an_election_in_a_joint_state_needs_both_halves() -> None:
    """4.3: B and C together are a majority of the new half, and powerless without A."""
    joint = apply_change(membership(A, learners=[B, C]), Promote((B, C)))
    node = server(B, joint)
    node.tick(2001)
    node.take()
    node.step(PreVoteResponse(C, B, 2, True))
    assert node.raft.term == 1
    node.step(PreVoteResponse(A, B, 2, True))
    node.settle()
    node.step(VoteResponse(C, B, 2, True))
    assert not node.raft.is_leader
    node.step(VoteResponse(A, B, 2, True))
    assert node.raft.is_leader


def test_a_leader_finishes_a_joint_state_it_finds() -> None:
    """4.3: its no-op commits the joint entry, and C_new follows."""
    joint = apply_change(membership(A, learners=[B, C]), Promote((B, C)))
    node = server(B, joint)
    node.lead()
    node.acknowledge(A, C)
    assert node.raft.membership == msgspec.structs.replace(membership(A, B, C), version=2)
    assert node.raft.membership_index == 3


def test_proposals_go_on_in_a_joint_state() -> None:
    """4.3: "the cluster can continue servicing client requests throughout." """
    node = joint_leader()
    assert node.raft.propose(b"x") == LogId(4, 2)
    commit_everywhere(node)
    assert b"x" in [e.data for e in node.applied]
    assert not node.raft.membership.joint


# --- incarnations --------------------------------------------------------------------------------


def test_a_wiped_voter_joins_as_a_learner_and_one_change_swaps_it_in() -> None:
    """Until then its old self counts as a dead voter. The swap is a change of two
    voters, so it is joint, and the old self is buried.
    """
    node = leader(A, ABC)
    both = change(node, AddLearner(member(WIPED_B)))
    assert (both.voters, both.learners) == ((A, B, C), (WIPED_B,))
    node.settle()
    node.acknowledge(WIPED_B)
    assert node.raft.log.commit_index == 2, "the old self is dead, the new one no voter"
    node.acknowledge(C)
    assert node.raft.log.commit_index == 3
    joint = change(node, Promote((WIPED_B,)))
    assert (joint.voters, joint.outgoing) == ((A, WIPED_B, C), (A, B, C))
    commit_everywhere(node)
    final = node.raft.committed_membership
    assert (final.voters, final.learners, final.tombstones) == ((A, WIPED_B, C), (), (B,))
    assert [m.id for m in final.find(B.id)] == [WIPED_B]


def test_a_learner_wiped_again_replaces_its_former_self() -> None:
    """No vote was ever its own, so nothing has to be swapped."""
    members = apply_change(membership(A, learners=[B]), AddLearner(member(WIPED_B)))
    assert (members.learners, members.tombstones) == ((WIPED_B,), (B,))


def test_a_removed_member_never_comes_back() -> None:
    """Its id never returns, neither with the same directory nor with a new one."""
    members = apply_change(ABC, Remove(C.id))
    assert members.tombstones == (C,)
    assert members.was_removed(C.id)
    for newcomer in (C, MemberId(C.id, 4711)):
        with pytest.raises(JoinError, match="ids are never reused"):
            apply_change(members, AddLearner(member(newcomer)))


def test_removing_a_wiped_voter_removes_all_of_it() -> None:
    """The node leaves, whatever its directories are called."""
    both = apply_change(ABC, AddLearner(member(WIPED_B)))
    members = apply_change(both, Remove(B.id))
    assert (members.voters, members.learners) == ((A, C), ())
    assert members.tombstones == (B, WIPED_B)


# --- the pure function ---------------------------------------------------------------------------


def test_founders_are_voters() -> None:
    """Every founder is active from the first entry on."""
    members = found("test", [member(B), member(A)], Settings())
    assert members == membership(A, B)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Promote(()), "at least one"),
        (Promote((E,)), "not a learner"),
        (Promote((A,)), "not a learner"),
        (UpdateMember(member(E)), "not a member"),
        (UpdateMember(member(A)), "is a voter"),
        (UpdateMember(msgspec.structs.replace(member(D), status=Status.ACTIVE)), "is a learner"),
        (UpdateMember(msgspec.structs.replace(member(D), address="n1-a1:1")), "already belongs"),
    ],
)
def test_changes_that_make_no_sense_are_refused(wanted: Change, message: str) -> None:
    """409 with the reason; nothing is appended."""
    with pytest.raises(Conflict, match=message):
        apply_change(membership(A, learners=[D]), wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"address": "n1-a1:1"}, "already belongs to node 1"),
        ({"status": Status.ACTIVE}, "joins as a learner"),
    ],
)
def test_newcomers_that_make_no_sense_are_refused(changes: dict[str, str], message: str) -> None:
    """Never two members at one address, never a voter at once."""
    newcomer = msgspec.structs.replace(member(B), **changes)
    with pytest.raises(JoinError, match=message):
        apply_change(membership(A), AddLearner(newcomer))


def test_read_only_learners_are_never_promoted() -> None:
    """An operator makes them promotable first."""
    shy = msgspec.structs.replace(member(B), status=Status.READ_ONLY)
    members = apply_change(membership(A), AddLearner(shy))
    with pytest.raises(Conflict, match="read_only"):
        apply_change(members, Promote((B,)))
    members = apply_change(members, UpdateMember(member(B)))
    assert apply_change(members, Promote((B,))).voters == (A, B)


def test_naming_a_learner_twice_makes_it_one_voter() -> None:
    """A list with a repetition must not inflate the majority."""
    assert apply_change(membership(A, learners=[B]), Promote((B, B))).voters == (A, B)


def test_a_new_address_keeps_the_role() -> None:
    """Also for a member that moved while it was down (etcd #21694)."""
    moved = msgspec.structs.replace(member(D), address="elsewhere:1")
    for wanted in (UpdateMember(moved), AddLearner(moved)):
        members = apply_change(membership(A, learners=[D]), wanted)
        assert members.learners == (D,)
        assert members.find(D.id) == (moved,)


def test_settings_are_replicated_like_members() -> None:
    """What steers promotion is the same on every node."""
    node = leader(A, ABC)
    new = change(node, UpdateSettings(Settings(promotion="odd")))
    assert new.settings.promotion == "odd"
    assert decode_membership(new.encode()) == new


def test_no_change_while_leadership_is_handed_over() -> None:
    """3.10: the target must be able to catch up for good."""
    node = leader(A, ABC)
    node.raft.transfer_leadership(B)
    with pytest.raises(LeaderChanged):
        node.raft.propose_membership(AddLearner(member(D)))
