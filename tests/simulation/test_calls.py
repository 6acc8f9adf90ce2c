"""What a caller of one node is told, where the simulator's clients never ask, or wait so long."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from itertools import permutations
from typing import Any

import pytest

from dengine.config import Election
from dengine.errors import DengineError
from dengine.kv.commands import Put
from dengine.node.node import Node
from tests.simulation.loop import MS, SECOND
from tests.simulation.machine import Process
from tests.simulation.plan import FAULTS, Plan
from tests.simulation.test_found import until
from tests.simulation.world import World


def cluster_of(size: int) -> World:
    plan = Plan(size, tuple(FAULTS))
    plan.shape, plan.founders, plan.joiners = str(size), size, 0
    return World(plan)


def start(world: World) -> Process:
    """All machines; returns the leader."""
    for machine in world.machines.values():
        world.start(machine)
    until(world, lambda: any(p.node and p.node.raft.committed_in_term for p in world.processes()))
    until(world, lambda: len(world.membership.voters) == len(world.machines))
    leader = world.leader()
    assert leader is not None
    return leader


def call(
    process: Process, make: Callable[[Node, float], Awaitable[Any]], timeout_s: float
) -> list[Any]:
    """What comes of it, once it has."""
    node = process.node
    assert node is not None
    answers: list[Any] = []

    async def ask() -> None:
        try:
            answers.append(await make(node, process.loop.time() + timeout_s))
        except DengineError as error:
            answers.append(error)

    process.run(lambda: process.loop.create_task(ask()))
    return answers


@pytest.mark.parametrize("level", ["linearizable", "lease"])
def test_a_follower_that_is_far_away_answers_reads(level: str) -> None:
    """Two round trips of 600 ms, with the timeouts that dengine has by default: what came after a
    second was thrown away and asked for anew, for ever."""
    world = cluster_of(3)
    world.plan.election, world.plan.lease_ms = Election(), 500
    for pair in permutations(world.machines, 2):
        world.network.slow[pair] = 300 * MS
    with world.alive():
        leader = start(world)
        world.scheduler.run_until(world.scheduler.now + 3 * SECOND)
        follower = next(p for p in world.processes() if p is not leader)
        answers = call(follower, lambda node, by: node.read_barrier(level, by), 10)
        until(world, lambda: bool(answers))
        assert answers == [None]


def test_a_removal_is_answered_when_it_is_committed() -> None:
    """Who asks a second time was told at once that it had happened. It was rolled back, and what is
    done to a removed machine would have been done to a voter."""
    world = cluster_of(5)
    with world.alive():
        leader = start(world)
        others = [m.id for m in world.machines.values() if m is not leader.machine]
        victim = random.Random(0).choice(others)
        pairs = [(leader.machine.id, other) for other in others]
        for pair in pairs:
            world.network.cut([pair])  # its packets do not get out any more
        answers = [
            call(leader, lambda node, by: node.remove_member(victim, by), 5) for _ in range(2)
        ]
        until(world, lambda: all(answers))
        assert all(isinstance(answer, DengineError) for (answer,) in answers)
        assert {answer.outcome for (answer,) in answers} == {"unknown"}
        for pair in pairs:
            world.network.mend([pair])
        until(world, lambda: world.leader() is not None)
        assert len(world.membership.voters) == 5


@pytest.mark.parametrize("one_way_ms", [20, 60, 150])
def test_who_is_far_away_catches_up_after_a_restart(one_way_ms: int) -> None:
    """Where an answer took longer than the time between two heartbeats, none of them was one to the
    newest; what had been lost was never sent again, and nothing was committed any more."""
    world = cluster_of(3)
    world.plan.election, world.plan.lease_ms = Election(), 500
    with world.alive():
        leader = start(world)
        world.scheduler.run_until(world.scheduler.now + 3 * SECOND)
        for pair in permutations(world.machines, 2):
            world.network.slow[pair] = one_way_ms * MS
        others = [m for m in world.machines.values() if m is not leader.machine]

        def write(value: bytes) -> list[Any]:
            return call(leader, lambda node, by: node.write(Put(b"k", value, None), by), 5)

        for machine in others:
            machine.crash()
        waiting = [write(b"%d" % number) for number in range(3)]
        world.scheduler.run_until(world.scheduler.now + SECOND // 10)
        for machine in others:
            world.start(machine)
        world.scheduler.run_until(world.scheduler.now + 3 * SECOND)
        waiting.append(write(b"last"))
        until(world, lambda: all(waiting))
        assert not isinstance(waiting[-1][0], DengineError), waiting[-1]
        assert leader.node is not None
        last = leader.node.raft.log.last_index
        nodes = [m.process.node for m in others if m.process is not None]
        until(world, lambda: all(n is not None and n.raft.log.last_index >= last for n in nodes))
