"""Installing a snapshot: paper 7 (figure 13), thesis 5; every durable step, and crashes between.

Whole `Ready`s are compared: what is not named must be empty.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dengine.errors import InvariantBroken
from dengine.raft.membership import AddLearner, Promote
from dengine.raft.messages import (
    AppendRequest,
    AppendResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    InstallSnapshotRequest,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
)
from dengine.raft.progress import ProgressState
from dengine.raft.raft import Restore, Transition
from dengine.raft.types import Entry, HardState, LogId, MemberId, Role
from tests.raft.cluster import Cluster
from tests.raft.harness import (
    A,
    B,
    C,
    Disk,
    Server,
    Snapshot,
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


def follower(terms: list[int], *, commit: int = 1, term: int | None = None) -> Server:
    """A follows B."""
    node = server(A, ABC, terms, commit=commit, term=term)
    node.step(HeartbeatRequest(B, A, node.raft.term, 0, 0, 0))
    node.settle()
    return node


def file(terms: list[int]) -> Snapshot:
    return snapshot_of(make_log(ABC, terms), "B")


def stateless(terms: list[int], purged: int, *, commit: int = 1) -> Server:
    """A follows B; its log begins after `purged`, and its state is gone."""
    disk = Disk(HardState(max([1, *terms]), None, commit), make_log(ABC, terms))
    disk.purge(purged)
    disk.snapshots.clear()
    node = Server(A, disk)
    node.step(HeartbeatRequest(B, A, node.raft.term, 0, 0, 0))
    node.settle()
    assert node.raft.state_lost
    return node


# --- the write -----------------------------------------------------------------------------------


def test_a_snapshot_beyond_the_log_replaces_state_and_log_in_one_write() -> None:
    """7, figure 13: "Discard the entire log; Reset state machine using snapshot contents (and load
    snapshot's cluster configuration)." The acknowledgement leaves when all that is durable.
    """
    node = follower([1, 1])
    assert node.receive(file([1] * 8))
    expect(
        node.take(),
        hard_state=HardState(1, None, 9),
        snapshot=Restore(LogId(9, 1), ABC, True),
        messages_after_sync=[ack(A, B, 1, 9, 1)],
    )
    assert node.finish_write() == [ack(A, B, 1, 9, 1)]
    expect(node.take())
    log = node.raft.log
    assert (log.base, log.applied_index, log.commit_index) == (LogId(9, 1), 9, 9)
    assert (log.stable_index, log.last_id) == (9, LogId(9, 1))
    assert node.applied == make_log(ABC, [1] * 8)
    node.step(AppendRequest(B, A, 1, 9, 1, (normal(10, 1),), 10))
    assert node.settle() == [ack(A, B, 1, 10, 1)]
    assert node.applied[9:] == [normal(10, 1)]


def test_what_follows_the_snapshot_in_the_log_is_kept() -> None:
    """7: "If instead the follower receives a snapshot that describes a prefix of its log, then log
    entries covered by the snapshot are deleted but entries following the snapshot are still valid
    and must be retained."
    """
    node = follower([1] * 5)
    assert node.receive(file([1, 1]))
    expect(
        node.take(),
        hard_state=HardState(1, None, 3),
        snapshot=Restore(LogId(3, 1), ABC, False),
        messages_after_sync=[ack(A, B, 1, 3, 1)],
    )
    node.finish_write()
    assert node.raft.log.last_id == LogId(6, 1)
    assert node.applied == make_log(ABC, [1, 1])
    node.step(HeartbeatRequest(B, A, 1, 0, 6, 1))
    expect(node.take(), committed_entries=[normal(i, 1) for i in (4, 5, 6)])


def test_a_log_that_contradicts_the_snapshot_is_dropped() -> None:
    """Figure 13: only an "existing log entry [that] has same index and term as snapshot's last
    included entry" lets the log survive. What conflicts with it is not committed and never will be.
    """
    node = follower([1, 2, 2, 2, 2])
    assert node.receive(file([1, 1]))
    ready = node.take()
    assert ready.snapshot == Restore(LogId(3, 1), ABC, True)
    node.finish_write()
    assert node.raft.log.last_id == LogId(3, 1)
    assert (node.disk.purged, node.disk.log) == (LogId(3, 1), [])


def test_a_snapshot_of_what_is_committed_is_ignored() -> None:
    """Figure 13 and 7: retransmitted or late; a state never goes back."""
    node = follower([1, 1, 1], commit=3)
    assert not node.receive(file([1]))
    assert not node.receive(file([1, 1]))
    expect(node.take())


def test_a_leader_ignores_snapshots() -> None:
    """5.4.3: it has everything that is committed."""
    node = leader(A, ABC)
    assert not node.receive(file([1] * 8))
    expect(node.take())


def test_one_snapshot_is_installed_at_a_time() -> None:
    """The second, newer or not, is not wanted while the first is on its way."""
    node = follower([1])
    assert node.receive(file([1] * 4))
    assert not node.raft.restore(LogId(9, 1), ABC)
    node.take()
    assert not node.raft.restore(LogId(9, 1), ABC)
    node.finish_write()
    assert node.receive(file([1] * 8))


def test_a_snapshot_of_a_higher_term_raises_the_term() -> None:
    """5.1: a log never ends in a term that its server has not entered."""
    node = follower([1, 1])
    assert node.receive(file([1, 1, 3]))
    ready = node.take()
    assert ready.hard_state == HardState(3, None, 4)
    assert not ready.messages_after_sync, "no leader of term 3 is known"


def test_a_snapshot_that_contradicts_what_is_committed_stops_the_server() -> None:
    """5.4.3, State Machine Safety: that cannot be; going on would make it worse."""
    node = stateless([1, 1, 1, 1], 2, commit=4)
    with pytest.raises(InvariantBroken, match="committed here"):
        node.raft.restore(LogId(4, 7), ABC)
    with pytest.raises(InvariantBroken, match="another membership"):
        node.raft.restore(LogId(4, 1), membership(A, B))


# --- what may not happen meanwhile ---------------------------------------------------------------


def test_nothing_is_applied_or_appended_while_a_snapshot_is_installed() -> None:
    """The state and the log are about to be replaced; the leader sends again."""
    node = follower([1, 1])
    assert node.receive(file([1] * 4))
    node.step(HeartbeatRequest(B, A, 1, 7, 3, 1))  # commits 2 and 3 of the old log
    ready = node.take()
    assert (ready.committed_entries, ready.entries) == ((), ())
    assert ready.messages == [HeartbeatResponse(A, B, 1, 7, 1000)]
    node.step(AppendRequest(B, A, 1, 5, 1, (normal(6, 1),), 6))
    node.step(InstallSnapshotRequest(B, A, 1, file([1] * 9).ref))
    expect(node.take())
    assert node.finish_write() == [ack(A, B, 1, 5, 1)]
    expect(node.take())
    assert node.applied == make_log(ABC, [1] * 4)


def test_no_election_is_started_while_a_snapshot_is_installed() -> None:
    """Its log is being replaced; nor when leadership is handed to it (3.10)."""
    node = follower([1, 1])
    assert node.receive(file([1] * 4))
    node.take()
    for _ in range(20):
        node.tick(1000)
        node.step(TimeoutNow(B, A, 1))
        expect(node.take())
    node.finish_write()
    node.tick(2001)
    assert node.take().messages


def test_a_candidate_that_installs_a_snapshot_gives_up() -> None:
    """5.4.1: it asked for votes for another log."""
    node = server(A, ABC, [1, 1])
    node.stand_for_election()
    assert node.receive(file([1] * 4))
    node.step(VoteResponse(B, A, 2, True), VoteResponse(C, A, 2, True))
    reason = "a snapshot was installed"
    assert node.take().transitions == [Transition(Role.CANDIDATE, Role.FOLLOWER, 2, reason)]


def test_an_older_write_is_waited_for_and_does_not_touch_the_new_log() -> None:
    """Append ABA: entries 4 and 5 of term 1 are still being written when a snapshot replaces them
    by others; neither their write nor the answers that wait for more of them say anything about
    the new log.
    """
    node = follower([1, 1])
    node.step(AppendRequest(B, A, 1, 3, 1, (normal(4, 1), normal(5, 1)), 1))
    node.take()
    node.step(AppendRequest(B, A, 1, 5, 1, (normal(6, 1),), 1))
    node.step(HeartbeatRequest(C, A, 2, 0, 0, 0))  # another leads, with another entry 4
    assert node.receive(file([1, 1, 2]))
    expect(node.take())
    assert node.finish_write() == [ack(A, B, 1, 5, 1)], "true when it was sent, and B is deposed"
    assert node.raft.log.stable_index == 5
    expect(
        node.take(),
        hard_state=HardState(2, None, 4),
        snapshot=Restore(LogId(4, 2), ABC, True),
        messages_after_sync=[ack(A, C, 2, 4, 2)],
    )
    node.finish_write()
    assert (node.raft.log.stable_index, node.raft.log.last_id) == (4, LogId(4, 2))
    node.step(AppendRequest(C, A, 2, 4, 2, (normal(5, 2),), 4))
    expect(
        node.take(),
        hard_state=HardState(2, None, 4),
        entries=[normal(5, 2)],
        messages_after_sync=[ack(A, C, 2, 5, 2)],
    )


def test_acknowledgements_of_dropped_entries_never_leave() -> None:
    """Figure 2: they will not be durable; votes that wait for the same write do leave."""
    node = past_grace(server(A, ABC, [1, 1]))
    node.step(VoteRequest(C, A, 2, 3, 1, False))
    node.step(AppendRequest(C, A, 2, 3, 1, (noop(4, 2), normal(5, 2)), 1))
    assert node.receive(file([1, 1, 2, 3]))
    ready = node.take()
    assert ready.snapshot is not None
    assert ready.messages_after_sync == [], "its vote was for a term that is over"
    assert node.raft.term == 3

    node = past_grace(server(A, ABC, [1, 1], term=3))
    node.step(VoteRequest(C, A, 4, 3, 1, False))
    node.step(AppendRequest(C, A, 4, 3, 1, (noop(4, 4), normal(5, 4)), 1))
    assert node.receive(file([1, 1, 2, 3]))
    assert node.take().messages_after_sync == [VoteResponse(A, C, 4, True), ack(A, C, 4, 5, 3)]


def test_a_snapshot_within_the_log_waits_until_the_log_is_durable() -> None:
    """The state must never be ahead of the log on the disk, nor an acknowledgement."""
    node = follower([1])
    node.step(AppendRequest(B, A, 1, 2, 1, (normal(3, 1), normal(4, 1)), 1))
    node.take()
    node.step(AppendRequest(B, A, 1, 4, 1, (normal(5, 1),), 1))
    assert node.receive(file([1, 1]))
    expect(node.take())
    assert node.finish_write() == [ack(A, B, 1, 4, 1)]
    expect(
        node.take(),
        hard_state=HardState(1, None, 1),
        entries=[normal(5, 1)],
        messages_after_sync=[ack(A, B, 1, 5, 1)],
    )
    node.finish_write()
    expect(
        node.take(),
        hard_state=HardState(1, None, 3),
        snapshot=Restore(LogId(3, 1), ABC, False),
        messages_after_sync=[ack(A, B, 1, 3, 1)],
    )


def test_the_leader_may_change_while_a_snapshot_is_installed() -> None:
    """The acknowledgement goes to whoever leads when the write starts; another one asks."""
    node = follower([1, 1])
    assert node.receive(file([1] * 4))
    node.take()
    node.step(HeartbeatRequest(C, A, 2, 1, 0, 0))
    assert node.finish_write() == [ack(A, B, 1, 5, 1)]
    node.settle()
    node.step(InstallSnapshotRequest(C, A, 2, file([1] * 4).ref))
    assert node.settle() == [ack(A, C, 2, 5, 1)]


# --- lost states ---------------------------------------------------------------------------------


def test_a_lost_state_is_replaced_by_a_snapshot_older_than_the_commit_index() -> None:
    """The log goes on from it: entries 4.. are applied from there, and the log is kept."""
    node = stateless([1] * 5, 2, commit=5)
    assert not node.receive(file([]))
    assert node.receive(file([1, 1]))
    expect(
        node.take(),
        hard_state=HardState(1, None, 5),
        snapshot=Restore(LogId(3, 1), ABC, False),
        messages_after_sync=[ack(A, B, 1, 3, 1)],
    )
    node.finish_write()
    assert not node.raft.state_lost
    expect(node.take(), committed_entries=[normal(4, 1), normal(5, 1)])
    node.tick(2001)
    assert node.take().messages, "it may campaign again"


def test_a_lost_state_is_replaced_by_a_snapshot_of_exactly_what_was_purged() -> None:
    """7: the first entry that is left follows the snapshot's last."""
    node = stateless([1] * 3, 2)
    node.install(file([1]))
    assert not node.raft.state_lost
    assert node.raft.log.last_id == LogId(4, 1)


def test_a_lost_state_is_replaced_by_a_snapshot_beyond_the_log() -> None:
    """Figure 13: then the log is of no use either."""
    node = stateless([1] * 3, 2)
    node.install(file([1] * 6))
    assert node.raft.log.base == LogId(7, 1)
    assert (node.raft.state_lost, len(node.applied)) == (False, 7)


def test_the_need_for_a_snapshot_is_over_once_one_is_accepted() -> None:
    """The leader need not offer it again."""
    node = stateless([1] * 3, 2)
    node.step(HeartbeatRequest(B, A, 1, 5, 0, 0))
    expect(node.take(), messages=[HeartbeatResponse(A, B, 1, 5, 1000, 2)])
    assert node.receive(file([1, 1]))
    node.step(HeartbeatRequest(B, A, 1, 6, 0, 0))
    assert node.take().messages == [HeartbeatResponse(A, B, 1, 6, 1000)]


# --- crashes -------------------------------------------------------------------------------------


def _before_the_file(node: Server, new: Snapshot) -> None:
    pass


def _after_the_file(node: Server, new: Snapshot) -> None:
    node.keep_file(new)


def _accepted(node: Server, new: Snapshot) -> None:
    assert node.receive(new)


def _handed_out(node: Server, new: Snapshot) -> None:
    _accepted(node, new)
    assert node.take().snapshot is not None


def _state_swapped(node: Server, new: Snapshot) -> None:
    _handed_out(node, new)
    assert node.in_flight is not None
    node.write(node.in_flight, only_swap=True)


def _log_reset(node: Server, new: Snapshot) -> None:
    _handed_out(node, new)
    assert node.in_flight is not None
    node.write(node.in_flight)


def _acknowledged(node: Server, new: Snapshot) -> None:
    node.install(new)


STEPS = [
    _before_the_file,
    _after_the_file,
    _accepted,
    _handed_out,
    _state_swapped,
    _log_reset,
    _acknowledged,
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("terms", [[1] * 9, [1] * 4, [1, 2, 2, 2, 2, 2, 2]])
def test_a_crash_at_any_step_of_an_install_is_healed(
    terms: list[int], step: Callable[[Server, Snapshot], None]
) -> None:
    """Kept, shorter and contradicting logs: whatever was reached, the server starts, takes the
    offer again or has no need to, and ends with the state and the log of its leader.
    """
    entries: list[Entry] = [*make_log(ABC, [1] * 5), noop(7, 3), normal(8, 3)]
    new = snapshot_of(entries[:6], "B")
    node = follower(terms, term=3)
    before = list(node.disk.log)
    step(node, new)
    node.restart()
    done = step in (_state_swapped, _log_reset, _acknowledged)
    kept = terms == [1] * 9
    assert (len(node.applied) == 6) == (done or (kept and step is not _before_the_file))
    if kept or not done:
        assert node.disk.log == before, "nothing of the old log may be missing yet"
    node.step(InstallSnapshotRequest(B, A, 3, new.ref))
    ready = node.take()
    if ready.fetch is not None:
        node.install(new)
    node.step(AppendRequest(B, A, 3, 6, 1, tuple(entries[6:]), 8))
    assert node.settle()[-1] == ack(A, B, 3, 8, 3)
    assert node.applied == entries
    assert node.raft.membership == ABC
    node.restart()
    node.settle()
    assert node.raft.log.last_id == LogId(8, 3)


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_at_any_step_of_an_install_without_state_is_healed(
    step: Callable[[Server, Snapshot], None],
) -> None:
    """The log is never touched: its entries may be what a majority rests on."""
    node = stateless([1] * 5, 2, commit=5)
    before = list(node.disk.log)
    new = file([1, 1])
    step(node, new)
    node.restart()
    assert node.raft.state_lost == (step is _before_the_file)
    if node.raft.state_lost:
        node.install(new)
    node.settle()
    assert node.disk.log == before
    assert node.applied == make_log(ABC, [1] * 4)


# --- membership ----------------------------------------------------------------------------------


def test_a_learner_learns_the_voters_from_its_snapshot() -> None:
    """7: "each snapshot must also include the latest configuration"; an empty server knows nobody,
    and does not campaign.
    """
    joined = membership(A, B, learners=[C])
    node = Server(C, Disk())
    node.step(HeartbeatRequest(A, C, 3, 1, 0, 0))
    node.settle()
    log = [config(1, 1, membership(A, B)), config(2, 1, joined), normal(3, 2)]
    node.install(snapshot_of(log))
    assert (node.raft.membership, node.raft.committed_membership) == (joined, joined)
    assert node.raft.membership_index == 3
    node.tick(5000)
    expect(node.take())
    node.restart()
    assert node.raft.membership == joined


def test_a_membership_after_the_snapshot_is_kept_with_its_entry() -> None:
    """4.1, 7: it is in force, committed or not, and truncation falls back to the snapshot's."""
    joined = membership(A, B, C, learners=[MemberId(4, 0xA4)])
    disk = Disk(HardState(1, None, 1), [*make_log(ABC, [1, 1]), config(4, 1, joined)])
    node = Server(A, disk)
    node.step(HeartbeatRequest(B, A, 1, 0, 0, 0))
    node.settle()
    node.install(file([1, 1]))
    assert (node.raft.membership, node.raft.committed_membership) == (joined, ABC)
    node.step(AppendRequest(C, A, 2, 3, 1, (noop(4, 2),), 3))
    node.settle()
    assert node.raft.membership == ABC


def test_a_membership_dropped_with_its_log_is_not_in_force() -> None:
    """Figure 13: "load snapshot's cluster configuration"."""
    joined = membership(A, B, C, learners=[MemberId(4, 0xA4)])
    disk = Disk(HardState(2, None, 1), [*make_log(ABC, [1]), config(3, 2, joined)])
    node = Server(A, disk)
    node.settle()
    assert node.raft.membership == joined
    node.install(file([1, 1, 1]))
    assert node.raft.membership == ABC


# --- the whole -----------------------------------------------------------------------------------


def grow_behind_a_purged_log() -> Cluster:
    """One voter that has purged what came before its snapshot; B and C are empty."""
    cluster = Cluster(membership(A), seed=3)
    for number in range(5):
        cluster.write(b"%d" % number)
    first = cluster.servers[A]
    first.take_snapshot()
    first.purge(first.raft.log.applied_index)
    for newcomer in (B, C):
        cluster.add(newcomer)
        cluster.elect().raft.propose_membership(AddLearner(member(newcomer)))
        assert cluster.run(2000, cluster.at_rest)
    return cluster


def test_learners_that_start_from_a_snapshot_become_voters() -> None:
    """7, 4.2.1, 4.3: 1 -> 3 behind a purged log; then the first one is not needed any more."""
    cluster = grow_behind_a_purged_log()
    assert cluster.servers[B].raft.log.first_index > 1
    cluster.elect().raft.propose_membership(Promote((B, C)))
    cluster.run(1000)
    assert {s.raft.committed_membership.voters for s in cluster.servers.values()} == {(A, B, C)}
    cluster.crash(A)
    cluster.write(b"without the founder")


@pytest.mark.parametrize("victim", [B, C])
def test_a_snapshot_of_a_joint_membership_is_installed_in_the_joint_state(victim: MemberId) -> None:
    """4.3, 7: {1} joint {1,2,3} is committed and in the snapshot; whoever starts from that counts
    by both halves.
    """
    cluster = grow_behind_a_purged_log()
    cluster.isolate(victim)
    chief = cluster.elect()
    other = B if victim == C else C
    joint_index = chief.raft.propose_membership(Promote((B, C)))
    assert joint_index is not None
    while chief.raft.log.commit_index < joint_index.index:
        cluster.pump(chief.me)
        for node in (chief, cluster.servers[other]):
            if node.in_flight is not None:
                cluster.finish_write(node.me)
        if cluster.wire:
            cluster.deliver()
        elif not chief.in_flight:
            cluster.pump(other)
    joint = chief.raft.committed_membership
    cluster.pump(chief.me)
    if len(chief.applied) < joint_index.index:
        cluster.finish_write(chief.me)
        cluster.pump(chief.me)
    assert joint.joint
    assert len(chief.applied) == joint_index.index, "the final membership is not committed yet"
    snapshot = chief.disk.snapshots[chief.take_snapshot()]
    assert snapshot.membership == joint
    chief.purge(joint_index.index)
    late = cluster.servers[victim]
    late.install(snapshot)
    assert late.raft.membership == joint
    cluster.heal()
    assert cluster.run(3000, cluster.at_rest)
    assert late.raft.committed_membership.voters == (A, B, C)
    assert not late.raft.committed_membership.joint


def cut_off(cluster: Cluster, victim: MemberId) -> None:
    """The others go on without `victim` and purge what it misses."""
    cluster.isolate(victim)
    for number in range(4):
        cluster.write(b"%d" % number)
    cluster.run(200)
    for node in cluster.servers.values():
        if node.me != victim:
            node.take_snapshot()
            node.purge(node.raft.log.applied_index)


def follower_of(cluster: Cluster) -> MemberId:
    chief = cluster.elect()
    return next(m for m in (A, B, C) if m != chief.me)


def test_a_slow_follower_catches_up_by_a_snapshot_and_goes_on_with_entries() -> None:
    """7: "used ... to bring slow followers up-to-date by sending them a snapshot"."""
    cluster = Cluster(ABC, seed=5)
    victim = follower_of(cluster)
    cut_off(cluster, victim)
    cluster.heal()
    cluster.write(b"after")
    assert cluster.run(2000, cluster.at_rest)
    assert cluster.servers[victim].raft.log.first_index > 5
    assert cluster.elect().raft.progress[victim].state is ProgressState.REPLICATE
    assert cluster.elect().raft.offered_snapshots() == {}


def test_the_leader_may_change_in_the_middle_of_a_transfer() -> None:
    """5.1.3: the file of the old leader is of no use then; the new one offers its own."""
    cluster = Cluster(ABC, seed=5)
    victim = follower_of(cluster)
    cut_off(cluster, victim)
    cluster.heal()
    old, late = cluster.elect(), cluster.servers[victim]
    for _ in range(200):
        if late.fetching is not None:
            break
        cluster.tick(10)
        for me in (A, B, C):
            cluster.pump(me)
            if cluster.servers[me].in_flight is not None:
                cluster.finish_write(me)
        while cluster.wire:
            cluster.deliver()
    assert late.fetching is not None
    assert late.fetching[0] == old.me
    cluster.crash(old.me)
    assert cluster.run(10_000, lambda: late.raft.log.applied_index >= 5)
    assert late.raft.leader not in (None, old.me)
    cluster.write(b"after")
    cluster.restart(old.me)
    assert cluster.run(2000, cluster.at_rest)


def test_a_member_that_lost_its_state_gets_it_back_while_writes_go_on() -> None:
    """It counts in every quorum meanwhile: with the third one down, its log is what commits."""
    cluster = Cluster(ABC, seed=6)
    victim = follower_of(cluster)
    cluster.write(b"before")
    cluster.run(200)
    for node in cluster.servers.values():
        node.take_snapshot()
        node.purge(node.raft.log.applied_index)
    chief = cluster.elect()
    third = next(m for m in (A, B, C) if m not in (victim, chief.me))
    cluster.crash(third)
    cluster.servers[victim].lose_state()
    assert cluster.servers[victim].raft.state_lost
    cluster.write(b"during")
    assert cluster.run(2000, cluster.at_rest)
    assert not cluster.servers[victim].raft.state_lost
    cluster.run(200)  # its answer to the next heartbeat says so
    assert cluster.elect().raft.offered_snapshots() == {}
