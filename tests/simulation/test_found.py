"""Defects that the simulator has found, each in the smallest world (tests/BUGS.md)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from dengine.config import Snapshot
from dengine.node.forwarding import Forwarding
from dengine.node.node import Node
from dengine.node.wire import ForwardReply, ForwardRequest, Frame
from dengine.raft.types import MemberId
from tests.simulation.damage import Damage
from tests.simulation.loop import SECOND
from tests.simulation.machine import Machine, Process
from tests.simulation.plan import FAULTS, Plan
from tests.simulation.world import World

LEADER = MemberId(1, 16)


@pytest.mark.parametrize("seed", range(12))
def test_a_power_cut_takes_no_data_directory_away(seed: int) -> None:
    """A node whose whole directory was gone came back without its votes."""
    world = World(Plan(seed, tuple(FAULTS)))
    with world.alive():
        founders = [m for m in world.machines.values() if m.id in m.founders]
        for machine in founders:
            world.start(machine)
        world.scheduler.run_until(2 * SECOND)
        before = {m.id: m.process.member for m in founders if m.process}
        for machine in founders:
            world.crash(machine, power=True)
        world.scheduler.run_until(4 * SECOND)
        assert {m.id: m.process.member for m in founders if m.process} == before


def test_a_snapshot_is_fetched_from_a_leader_newer_than_our_log() -> None:
    """A member that slept while the cluster grew did not know where the new leader was."""
    plan = Plan(0, tuple(FAULTS))
    plan.shape, plan.founders, plan.joiners = "3->5", 3, 2
    plan.snapshot = Snapshot(entries=20, retained_log_entries=0, keep=2, hold_bytes=0)
    world = World(plan)
    with world.alive():
        for node_id in (1, 2, 3):
            world.start(world.machines[node_id])
        until(world, lambda: len(world.checker.committed) > 1)
        sleeper = world.machines[3]
        sleeper.crash()  # until it is started below
        slept_at = len(world.checker.committed)
        world.clients.start()
        for node_id in (4, 5):
            world.start(world.machines[node_id])
        until(world, lambda: len(world.membership.voters) == 5)
        rng = random.Random(0)

        def leads(process: Process | None) -> bool:
            return process is not None and process.machine.id == 4

        while not leads(world.leader()):
            world.faults.operators.ask(rng, lambda node, by: node.transfer_leader(4, by))
            world.scheduler.run_until(world.scheduler.now + SECOND // 2)
            assert world.scheduler.now < 60 * SECOND
        until(world, lambda: world.checker.purged(world.machines[4]) > slept_at + 20)
        world.start(sleeper)
        until(world, lambda: sleeper.process is not None and is_up_to_date(world, sleeper.process))
        assert world.counts["snapshot installed"]


def test_a_founding_is_finished_by_who_was_told_of_it() -> None:
    """One of three founders has founded when its disk is lost. The other ones only waited for the
    log that nobody had any more, and so no cluster ever came to be."""
    with three_founders() as (world, machines):
        for machine in machines:
            world.start(machine)
        until(world, lambda: any(map(has_founded, machines)), SECOND // 10_000)
        first = next(filter(has_founded, machines))
        told, late = (machine for machine in machines if machine is not first)
        assert not has_founded(told), "or another seed is needed"
        assert not has_founded(late), "or another seed is needed"
        told.crash()  # and with them what they had heard of each other
        late.crash()
        world.start(told)
        until(world, lambda: belongs(told), SECOND // 10_000)
        assert Damage(world, world.faults).wipe(first, world.rng)  # and started, some time later
        world.start(late)
        until(world, lambda: set(world.membership.voters) == members(machines))


def test_no_two_clusters_come_of_one_list() -> None:
    """A founder remembered one that it had met, and with a new disk of the third founded another
    cluster than those two had: both of them acknowledged writes."""
    with three_founders() as (world, machines):
        one, two, three = machines
        world.start(one)
        world.start(two)
        until(world, lambda: has_met(one, 2) and has_met(two, 1), SECOND // 10_000)
        cut(world, (1, 2), (2, 3))
        world.start(three)
        until(world, lambda: has_met(one, 3) and has_met(three, 1), SECOND // 10_000)
        world.scheduler.run_until(world.scheduler.now + SECOND)
        assert not any(map(belongs, machines)), "who is cut off may found another one later"

        empty(world, three)
        cut(world, (1, 3))
        mend(world, (2, 3))
        world.start(three)
        until(world, lambda: has_met(two, 3) and has_met(three, 2), SECOND // 10_000)
        world.scheduler.run_until(world.scheduler.now + SECOND)
        mend(world, (1, 2), (1, 3))
        world.scheduler.run_until(world.scheduler.now + SECOND)
        assert not any(map(belongs, machines)), "node 1 may have founded with the lost disk"

        empty(world, one)  # which is what they say that somebody has to do
        world.start(one)
        until(world, lambda: set(world.membership.voters) == members(machines))
        assert len({cluster_id(machine) for machine in machines}) == 1


def test_nothing_vouches_for_a_state_while_the_disk_is_asked_about_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It refuses a page once. Whoever was killed right then had told nobody, and the next process
    of that boot read an older page (seed 30003384)."""
    with three_founders() as (world, machines):
        for machine in machines:
            world.start(machine)
        until(world, lambda: len(world.checker.committed) > 1)
        node, process = node_of(machines[0]), machines[0].process
        run_mark, sync, vouched = ("data", "1", "RUN"), node.state.sync, []
        assert machines[0].disk.find(run_mark) is not None

        def asked() -> None:
            vouched.append(machines[0].disk.find(run_mark) is not None)
            sync()

        monkeypatch.setattr(node.state, "sync", asked)
        assert process is not None
        process.stop()
        until(world, lambda: machines[0].process is not process)
        assert vouched == [False]


def test_a_voter_without_its_state_leads_until_another_one_can() -> None:
    """The leader is lost for good with an entry that one voter has, which has just thrown its state
    away, and the other one has not. The first one stood for no election, and gave the second no
    vote."""
    with three_founders() as (world, machines):
        for machine in machines:
            world.start(machine)
        until(world, lambda: len(world.membership.voters) == 3 and world.leader() is not None)
        world.clients.start()
        until(world, lambda: all(node_of(m).raft.log.base.index > 20 for m in machines))
        leader = next(m for m in machines if m.process and m.process.leads)
        holds, lags = (m for m in machines if m is not leader)
        cut(world, (lags.id, leader.id), (lags.id, holds.id))
        before = len(world.checker.committed)
        until(world, lambda: len(world.checker.committed) > before + 3, SECOND // 1000)
        assert holds.process is not None
        snapshots = node_of(holds).snapshots
        world.faults.mark(holds, "state rotted", lambda: False)
        holds.process.run(lambda: snapshots.distrust("it differs", files_too=True))
        until(world, lambda: node_of(holds).raft.state_lost, SECOND // 10_000)
        leader.crash(power=True)  # and never comes back
        assert node_of(holds).raft.log.last_index > node_of(lags).raft.log.last_index
        mend(world, (lags.id, leader.id), (lags.id, holds.id))
        committed = len(world.checker.committed)
        until(world, lambda: len(world.checker.committed) > committed + 10)
        assert world.leader() is lags.process
        until(world, lambda: not node_of(holds).raft.state_lost)


def node_of(machine: Machine) -> Node:
    assert machine.process is not None
    assert machine.process.node is not None
    return machine.process.node


@contextmanager
def three_founders() -> Iterator[tuple[World, list[Machine]]]:
    plan = Plan(0, tuple(FAULTS))
    plan.shape, plan.founders, plan.joiners = "3", 3, 0
    world = World(plan)
    with world.alive():
        yield world, list(world.machines.values())


def empty(world: World, machine: Machine) -> None:
    """It gets a new disk, and nobody changes its file."""
    world.checker.damaging(machine)
    machine.wipe(same_file=True)
    world.faults.mark(machine, "disk replaced", lambda: False)


def cut(world: World, *pairs: tuple[int, int]) -> None:
    """Nothing gets from the one to the other any more, nor back."""
    for pair in pairs:
        world.network.cut((pair, pair[::-1]))
        for machine_id, other in (pair, pair[::-1]):
            process = world.machines[machine_id].process
            if process is not None and process.serves:
                process.peers.cut(other)


def mend(world: World, *pairs: tuple[int, int]) -> None:
    for pair in pairs:
        world.network.mend((pair, pair[::-1]))


def has_met(machine: Machine, other: int) -> bool:
    node = machine.process and machine.process.node
    return bool(node and node.peers.connected(other))


def has_founded(machine: Machine) -> bool:
    process = machine.process
    return process is not None and process.node is not None and process.node.raft.log.last_index > 0


def cluster_id(machine: Machine) -> str:
    """Which cluster its disk names; empty: none."""
    node = machine.process and machine.process.node
    return node._directory.identity.cluster_id if node else ""


def belongs(machine: Machine) -> bool:
    return cluster_id(machine) != ""


def members(machines: list[Machine]) -> set[MemberId]:
    return {machine.process.member for machine in machines if machine.process}


def is_up_to_date(world: World, process: Process) -> bool:
    node = process.node
    return node is not None and node.raft.log.applied_index > len(world.checker.committed) - 5


def until(world: World, condition: Callable[[], bool], step: int = SECOND // 50) -> None:
    """Lets time pass in the world, `step` nanoseconds at once; a minute at most."""
    end = world.scheduler.now + 60 * SECOND
    while not condition():
        assert world.scheduler.now < end, world.situation()
        world.scheduler.run_until(world.scheduler.now + step)


def test_an_answer_to_the_process_before_is_not_ours() -> None:
    """It told a client that a write had happened, which was that of somebody else."""

    async def ask_twice() -> None:
        sent: list[Frame] = []

        def send(to: MemberId, frame: Frame) -> bool:
            sent.append(frame)
            return True

        deadline = asyncio.get_running_loop().time() + 60
        before = Forwarding(send, boot=11)
        old = asyncio.ensure_future(before.ask(LEADER, "write", b"old", deadline))
        await asyncio.sleep(0)
        old.cancel()
        ours = Forwarding(send, boot=22)
        new = asyncio.ensure_future(ours.ask(LEADER, "write", b"new", deadline))
        await asyncio.sleep(0)
        asked = [frame.id for frame in sent if isinstance(frame, ForwardRequest)]
        ours.replied(ForwardReply(asked[0], True, b"of the old one"))
        assert not new.done()
        ours.replied(ForwardReply(asked[1], True, b"of the new one"))
        assert await new == b"of the new one"

    asyncio.run(ask_twice())
