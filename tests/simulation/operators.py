"""What operators do to a cluster meanwhile: add, promote and remove members, hand over, change
settings. Their answers do not matter; what the cluster makes of it does.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dengine.errors import DengineError
from tests.simulation.loop import MS
from tests.simulation.machine import Machine, Process

if TYPE_CHECKING:
    from tests.simulation.faults import Faults
    from tests.simulation.world import World

NODES_MAX = 7


class Operators:
    """`removing`: removals that may be under way."""

    def __init__(self, world: World, faults: Faults) -> None:
        self.world = world
        self.removing = 0
        self._faults = faults

    def ask(
        self,
        rng: random.Random,
        make: Callable[[Any, float], Any],
        process: Process | None = None,
        done: str = "",
    ) -> bool:
        """Have a node carry out an operation, and never mind the answer. False: none is there.

        Args:
            done: what is counted when it was.
        """
        processes = self.world.processes()
        if process is None and processes:
            process = rng.choice(processes)
        if process is None:
            return False

        async def ask() -> None:
            try:
                assert process.node is not None
                await make(process.node, process.loop.time() + 1.0)
                if done:
                    self.world.count(done)
            except DengineError as error:
                self.world.note("operator", error.name, error.message)
                self.world.clients.expected(error)

        process.run(lambda: process.loop.create_task(ask()))
        return True

    def transfer(self, rng: random.Random) -> bool:
        voters = self.world.membership.voters
        if not voters:
            return False
        target = rng.choice(voters).id
        return self.ask(
            rng, lambda node, deadline: node.transfer_leader(target, deadline), done="transferred"
        )

    def churn(self, rng: random.Random) -> bool:
        """A newcomer, a removal, a promotion or new settings."""
        members, dice = self.world.membership, rng.random()
        if dice < 0.35 and len(self.world.machines) < NODES_MAX and members.voters:
            node_id = len(self.world.machines) + 1
            founders = tuple(v.id for v in members.voters)
            self.world.machines[node_id] = machine = Machine(self.world, node_id, founders)
            self.world.start(machine)
            self.world.count("newcomer")
            return True
        if dice < 0.6 and len(members.voters) > 3 and self._faults.nobody_is_missing():
            self.remove(rng.choice(members.members).id.id, rng)
            return True
        if dice < 0.8 and members.learners:
            ids = [m.id for m in members.learners]
            return self.ask(
                rng, lambda node, deadline: node.promote(ids, deadline), done="promoted by hand"
            )
        settings = {"history_revisions": rng.randint(1, 1000)}
        return self.ask(
            rng,
            lambda node, deadline: node.change_settings(settings, deadline),
            done="settings changed",
        )

    def remove(self, node_id: int, rng: random.Random) -> None:
        """Never while another disk is not made good for: two voters less may be a quorum less."""
        after = self.world.scheduler.after
        if not self._faults.nobody_is_missing():
            if self._faults.on:
                after(300 * MS, self.remove, node_id, rng)
            return
        self.removing += 1
        after(3000 * MS, self._removed)
        self.ask_removal(node_id, rng)

    def ask_removal(self, node_id: int, rng: random.Random) -> None:
        self.world.count("removal asked")
        self.ask(
            rng, lambda node, deadline: node.remove_member(node_id, deadline), done="member removed"
        )

    def _removed(self) -> None:
        self.removing -= 1
