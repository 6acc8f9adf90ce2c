"""Three leaders fight over one entry, and it comes back after all (the paper's figure 8).

Of five voters one leads, `first`; each step lets exactly those hear each other that it needs:

    append     first appends entries that nobody but `keeper` hears
    overwrite  the other three elect `second`, whose entry takes their place on `first`'s disk, and
               which dies before that is committed
    again      first leads again, with the votes of the two that know of nothing, and appends new
               entries where the old ones stood: those have left its log for good
    commit     the keeper, and with it the old entries, wins over the two that know of nothing

So whoever was told in between that such a write did not happen was told wrong. It takes the first
leader to lead again in the same process, for only that one has clients who wait.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tests.simulation.loop import MS
from tests.simulation.machine import Process

if TYPE_CHECKING:
    from tests.simulation.faults import Faults
    from tests.simulation.world import World

VOTERS = 5
ENTRIES = 9  # that the first leader appends; some must lie behind all that follows
WRITE_EVERY_NS = 8 * MS
POLL_NS = 3 * MS
PATIENCE = 3  # election timeouts, for each step
ALONE = 0.6  # how often no other fault begins meanwhile
CLIENT_S = 4.0  # who waits for the old entries waits for long


class Displaced:
    """Begun now and then, and given up when anything goes another way."""

    def __init__(self, world: World, faults: Faults) -> None:
        self._world = world
        self._faults = faults
        self._rng = random.Random()
        self._step = ""
        self._round = 0  # so that a look that is late concerns nothing newer
        self._cuts: set[tuple[int, int]] = set()
        self._until = self._write_due = self._at = self._last = self._term = 0
        self._keeper = self._second = 0
        self._rest: list[int] = []  # the three that hear nothing of the first leader's entries
        self._first: Process | None = None

    def begin(self, rng: random.Random) -> bool:
        """False: this is no moment for it."""
        world, leader = self._world, self._world.leader()
        voters = [v.id for v in world.membership.voters]
        if self._step or leader is None or leader.node is None or world.membership.joint:
            return False
        me = leader.machine.id
        if me not in voters or len(voters) != VOTERS or not leader.node.raft.committed_in_term:
            return False
        if not all((p := world.machines[i].process) and p.serves for i in voters):
            return False
        self._rng, self._first, self._term = rng, leader, leader.node.raft.term
        self._keeper = rng.choice([i for i in voters if i != me])
        self._second, self._at = 0, leader.node.raft.log.last_index + 1
        self._rest = [i for i in voters if i not in (me, self._keeper)]
        self._write_due = world.scheduler.now
        self._faults.quiet = rng.random() < ALONE
        self._round += 1
        self._go("append", [me, self._keeper], self._rest)
        self._look(self._round)
        return True

    def end(self) -> None:
        """Let everybody hear everybody, as far as this fault is concerned."""
        if self._step:
            self._world.note("displaced ends in step", self._step)
            self._step, self._first = "", None
            self._hear()
            self._faults.quiet = False

    def _go(self, step: str, *groups: list[int]) -> None:
        world = self._world
        world.note("displaced:", step, "by", groups)
        self._step = step
        self._until = world.scheduler.now + PATIENCE * world.plan.election.timeout_ms_max * MS
        self._hear(*groups)

    def _hear(self, *groups: list[int]) -> None:
        """Only within a group can anybody hear anybody; without any group all can."""
        ids, cuts = list(self._world.machines), set[tuple[int, int]]()
        if groups:
            together = {(i, j) for group in groups for i in group for j in group}
            cuts = {(i, j) for i in ids for j in ids if i != j and (i, j) not in together}
        self._world.network.cut(sorted(cuts - self._cuts), "displaced")
        self._world.network.mend(sorted(self._cuts - cuts), "displaced")
        self._cuts = cuts

    def leads(self, node_id: int) -> None:
        """This very moment it is seen that a node leads: what it has sent is still on its way."""
        first = self._first
        if first is None:
            return
        me = first.machine.id
        if self._step == "append" and node_id in self._rest:
            second = self._world.machines[node_id].process
            assert second is not None
            assert second.node is not None
            self._second, self._at = node_id, second.node.raft._noop_index
            self._go("overwrite", [node_id, me])
        elif self._step == "again" and node_id == me:
            self._go("displace", [me])
            self._world.clients.burst(first, 1, self._rng, CLIENT_S)

    def _look(self, number: int) -> None:
        """How far it is."""
        if not self._step or number != self._round:
            return
        world, first = self._world, self._first
        keeper = world.machines[self._keeper].process
        if first is None or first.node is None or first.loop.dead:
            return self.end()
        if world.scheduler.now > self._until or keeper is None or keeper.node is None:
            return self.end()
        log, kept = first.node.raft.log, keeper.node.raft.log
        if self._step == "append":
            self._append(first)
        elif self._step == "overwrite" and self._is_overwritten(first):
            if kept.last_term != self._term or kept.last_index < self._at + 3:
                return self.end()
            self._last = kept.last_index
            self._go("again", [first.machine.id, *(i for i in self._rest if i != self._second)])
            if self._rng.random() < 0.5:
                world.crash(world.machines[self._second])
        elif self._step == "displace" and log.last_index > first.node.raft._noop_index:
            if log.last_index > self._last:
                return self.end()
            self._go("commit", [self._keeper, *(i for i in self._rest if i != self._second)])
        elif self._step == "commit" and len(world.checker.committed) >= self._last:
            if world.checker.committed[self._last - 1].term == self._term:
                world.count("displaced entry committed")
            return self.end()
        world.scheduler.after(POLL_NS, self._look, number)

    def _append(self, first: Process) -> None:
        node, now = first.node, self._world.scheduler.now
        assert node is not None
        wants_more = node.raft.is_leader and node.raft.log.last_index < self._at + ENTRIES
        if wants_more and now >= self._write_due:
            self._write_due = now + WRITE_EVERY_NS
            self._world.clients.burst(first, 1, self._rng, CLIENT_S)

    def _is_overwritten(self, first: Process) -> bool:
        assert first.node is not None
        log = first.node.raft.log
        return log.stable_index >= self._at and (log.term(self._at) or 0) > self._term
