"""Growing 1 -> 3 and 3 -> 5 with a crash after every single step (thesis 4.3).

A step is a turn of one server, the end of one log write, or the arrival of one message. The steps
of the change are counted once; then the change is made again for every step, every server and
every kind of crash. All along `Checker` holds one leader per term, log matching, and that what was
committed is durable on a majority and never lost.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest

from dengine.raft.membership import AddLearner, Promote
from dengine.raft.types import MemberId
from tests.raft.cluster import Cluster
from tests.raft.harness import A, B, C, D, E, Server, member, membership


@dataclass(frozen=True)
class Case:
    """From `founders` to `founders` and `learners`, under one order of events."""

    founders: tuple[MemberId, ...]
    learners: tuple[MemberId, ...]
    newest_first: bool = False
    slow_disks: bool = False

    @property
    def everybody(self) -> tuple[MemberId, ...]:
        return self.founders + self.learners

    def prepare(self) -> tuple[Cluster, Server]:
        """A cluster that has taken writes and whose learners have caught up."""
        cluster = Cluster(membership(*self.founders), seed=7)
        cluster.newest_first, cluster.slow_disks = self.newest_first, self.slow_disks
        cluster.write(b"before")
        for learner in self.learners:
            cluster.add(learner)
            cluster.elect().raft.propose_membership(AddLearner(member(learner)))
            assert cluster.run(1000, cluster.at_rest)
        cluster.run(300)
        return cluster, cluster.elect()

    def grow(self, cluster: Cluster, leader: Server) -> None:
        """Promote everybody while a client writes."""
        leader.raft.propose_membership(Promote(self.learners))
        leader.raft.propose(b"during")
        cluster.settle()
        if leader.me in cluster.servers and leader.raft.is_leader:
            leader.raft.propose(b"after")
            cluster.settle()
        cluster.run(200)  # two heartbeats tell everybody what is committed

    def has_grown(self, cluster: Cluster) -> bool:
        """Has anybody alive left the joint state?"""
        return any(
            set(s.raft.membership.voters) == set(self.everybody) and not s.raft.membership.joint
            for s in cluster.servers.values()
        )


ONE_TO_THREE = Case((A,), (B, C))
THREE_TO_FIVE = Case((A, B, C), (D, E))
CASES = {
    f"{name}{order}": Case(case.founders, case.learners, *flags)
    for name, case in (("1-to-3", ONE_TO_THREE), ("3-to-5", THREE_TO_FIVE))
    for order, flags in (
        ("", (False, False)),
        ("-newest-message-first", (True, False)),
        ("-slow-disks", (False, True)),
    )
}


def steps(case: Case) -> int:
    """How many steps the change takes when nothing fails."""
    cluster, leader = case.prepare()
    before = cluster.boundaries
    case.grow(cluster, leader)
    assert case.has_grown(cluster)
    assert all(not s.raft.membership.joint for s in cluster.servers.values())
    return cluster.boundaries - before


def run_with_crashes(case: Case, crashes: dict[int, MemberId], kind: str) -> None:
    """Make the change, crash a server after each step of `crashes`, go on, heal, check the end."""
    cluster, leader = case.prepare()
    start = cluster.boundaries

    def crash() -> None:
        victim = crashes.get(cluster.boundaries - start)
        if victim is None:
            return
        cluster.crash(victim, write_survives=kind == "killed")
        if kind == "power":  # what it had sent is lost as well
            cluster.wire = [m for m in cluster.wire if m.sender != victim]
        if kind != "gone":
            cluster.restart(victim)

    cluster.at_boundary = crash
    case.grow(cluster, leader)
    assert cluster.boundaries - start >= min(crashes), "the crash never came"
    if cluster.boundaries - start < max(crashes):
        cluster.run(500)
    cluster.at_boundary = None
    if kind == "gone":
        (victim,) = crashes.values()
        survive(case, cluster, victim)
        cluster.restart(victim)
    converge(case, cluster)


def survive(case: Case, cluster: Cluster, victim: MemberId) -> None:
    """One server is gone: the others go on, unless the only voter of a half is missing."""
    if case.founders == (victim,) and not case.has_grown(cluster):
        cluster.run(4000, step_ms=100)
        assert not case.has_grown(cluster), "it grew without its only voter"
    else:
        cluster.write(b"without it")


def converge(case: Case, cluster: Cluster) -> None:
    """All are back: the cluster leads, writes, is not joint, and all hold the same."""
    cluster.write(b"finally")
    assert cluster.run(3000, cluster.at_rest), "somebody does not catch up"
    (final,) = {s.raft.membership for s in cluster.servers.values()}
    assert {s.raft.committed_membership for s in cluster.servers.values()} == {final}
    assert not final.joint
    assert set(final.voters) in (set(case.founders), set(case.everybody))


@pytest.mark.parametrize("kind", ["power", "killed", "gone"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_crash_after_any_step_of_growing_loses_nothing(case: Case, kind: str) -> None:
    """`power`: unsynced writes and sent messages are lost, then it restarts. `killed`: the write
    in flight survives and its messages arrive, then it restarts. `gone`: it stays down.
    """
    for step, victim in itertools.product(range(1, steps(case) + 1), case.everybody):
        try:
            run_with_crashes(case, {step: victim}, kind)
        except Exception as error:
            raise AssertionError(f"{kind} of {victim} after step {step}: {error}") from error


@pytest.mark.parametrize(("kind", "pauses"), [("power", (1, 3, 8, 21)), ("killed", (2, 5, 13, 34))])
def test_two_crashes_while_growing_from_one_lose_nothing(
    kind: str, pauses: tuple[int, ...]
) -> None:
    """The second crash, a few steps later, hits the recovery from the first."""
    for first, pause in itertools.product(range(1, steps(ONE_TO_THREE) + 1), pauses):
        for victims in itertools.product(ONE_TO_THREE.everybody, repeat=2):
            crashes = {first: victims[0], first + pause: victims[1]}
            try:
                run_with_crashes(ONE_TO_THREE, crashes, kind)
            except Exception as error:
                raise AssertionError(f"{kind} at {crashes}: {error}") from error


def test_growing_from_one_writes_a_joint_membership_first() -> None:
    """Thesis 4.3: {1} -> {1} and {1,2,3} -> {1,2,3}, and never {1} -> {1,2,3} in one step."""
    cluster, leader = ONE_TO_THREE.prepare()
    ONE_TO_THREE.grow(cluster, leader)
    history = [m for _, m in leader.disk.memberships()][-2:]
    assert [(m.voters, m.outgoing) for m in history] == [((A, B, C), (A,)), ((A, B, C), ())]
