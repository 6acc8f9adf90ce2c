"""What goes wrong during a run: each kind by itself, on a schedule of its own.

Leaving one kind out does not move the others, so a failing seed is shrunk by dropping faults. What
is lost for good (damage.py) stays within a budget: one machine at a time, and a quorum of sound
ones beside it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from tests.simulation.damage import Damage
from tests.simulation.disk import OPERATIONS
from tests.simulation.displaced import Displaced
from tests.simulation.loop import MS, SECOND
from tests.simulation.machine import Machine, Process
from tests.simulation.operators import Operators

if TYPE_CHECKING:
    from tests.simulation.world import World

STALE = "stale leader"
ROOM = (0, 50, 200, 1000, 3000)  # bytes that a disk has left when it begins to fill


class Faults:
    """Schedules every kind that the plan has on, until `stop`.

    Attributes:
        over: none begins any more.
        quiet: one fault is under way that no other may disturb.
        to_remove: node id of the member that the plan wants replaced.
        damaged: the machine that has lost something last.
        ever_damaged: ids of all that have.
        ever_rolled_back: ids of those whose disk or log was replaced by an older copy.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.on = self.over = self.quiet = False
        self.to_remove: int | None = None
        self.rngs = {
            kind: random.Random(f"{world.seed} fault {kind}")
            for kind in (*world.plan.faults, "join")
        }
        self._handing_over: Process | None = None
        self._usurped: tuple[int, int] = (0, 0)  # a leader's machine id, and until when it is alone
        self.operators = Operators(world, self)
        self._displaced = Displaced(world, self)
        self.damaged: Machine | None = None
        self.ever_damaged: set[int] = set()
        self.judged: set[int] = set()  # machines whose states were said to be wrong
        self.ever_rolled_back: set[int] = set()
        self._still_damaged: Callable[[], bool] = lambda: False
        # kind -> (mean pause in ms, what is done); which says whether it found where to take hold
        self._acts: dict[str, tuple[int, Callable[[random.Random], bool]]] = {
            "mesh": (1000, self._mesh),
            "usurp": (1000, self._usurp),
            STALE: (300, self._stale_leader),
            "slow": (800, self._slow),
            "burst": (500, self._burst),
            "blackout": (2000, self._blackout),
            "transfer": (500, self.operators.transfer),
            "churn": (600, self.operators.churn),
            "displaced": (500, self._displaced.begin),
        }
        damage = Damage(world, self)
        to_one: dict[str, tuple[int, Callable[[Machine, random.Random], bool]]] = {
            "one-way cut": (700, self._one_way),
            "isolate": (900, self._isolate),
            "lag": (1500, self._lag),
            "kill": (600, self._kill),
            "power": (900, self._power),
            "fuse": (300, self._fuse),
            "stop": (1200, self._stop),
            "pause": (600, self._pause),
            "suspend": (900, self._suspend),
            "jump": (700, self._jump),
            "stall": (700, self._stall),
            "eio": (900, self._eio),
            "full": (1500, self._full),
            "rot": (900, damage.rot),
            "wipe": (1200, damage.wipe),
            "rollback": (60, damage.put_back),
        }
        for kind, (mean_ms, act) in to_one.items():
            self._acts[kind] = mean_ms, partial(self._to_one, act)

    def start(self) -> None:
        self.on = True
        for kind in self.world.plan.faults:
            if kind in self._acts:
                self._plan(kind)
        plan, rng = self.world.plan, self.rngs["join"]
        for node_id in range(plan.founders + 1, plan.founders + plan.joiners + 1):
            when = rng.randint(0, int(plan.seconds * 400)) * MS
            self.world.scheduler.after(when, self.world.start, self.world.machines[node_id])
        if plan.shape == "replace":
            self.to_remove = rng.randint(1, plan.founders)
            when = rng.randint(int(plan.seconds * 300), int(plan.seconds * 600)) * MS
            self.world.scheduler.after(when, self.operators.remove, self.to_remove, rng)

    def stop(self) -> None:
        self.on, self.over = False, True
        self._displaced.end()

    def _plan(self, kind: str) -> None:
        mean_ms, act = self._acts[kind]
        pause_ns = int(self.rngs[kind].expovariate(1 / mean_ms) * self.world.plan.calm * MS)
        self.world.scheduler.after(pause_ns, self._act, kind, act)

    def _act(self, kind: str, act: Callable[[random.Random], bool]) -> None:
        if self.on:
            if not self.quiet and act(self.rngs[kind]):
                self.world.count(f"fault: {kind}")
            self._plan(kind)

    def _to_one(self, act: Callable[[Machine, random.Random], bool], rng: random.Random) -> bool:
        machine = self._any(rng)
        return machine is not None and act(machine, rng)

    def starting(self, machine: Machine) -> None:
        """This very moment it starts. All that it finds and mends on its disk is one event, in
        which nothing else can strike.
        """
        rng = self.rngs.get("fuse")
        often = 0.8 if machine is self.damaged else 0.4
        if rng and not (self.over or self.quiet) and rng.random() < often:
            machine.disk.fuse = rng.randint(0, 25)

    def becomes_joint(self, node_id: int) -> None:
        """This very moment `node_id` has appended a joint membership: that does not last long, and
        most come only when the faults are over.
        """
        rng = self.rngs.get("fuse")
        if rng and self.on and not self.quiet:
            self.world.machines[node_id].disk.fuse = rng.randint(0, 10)

    def leads(self, node_id: int) -> None:
        """This very moment it is seen that `node_id` leads a new term."""
        leader, until = self._usurped
        if self.world.scheduler.now < until and node_id != leader:
            self.world.count("usurped")
            self._usurped = (0, 0)
        self._displaced.leads(node_id)

    # --- who --------------------------------------------------------------------------------------

    def _running(self) -> list[Machine]:
        return [m for m in self.world.machines.values() if m.process is not None]

    def _any(self, rng: random.Random) -> Machine | None:
        """Often the leader, and often one whose moment is delicate."""
        running = self._running()
        if not running:
            return None
        leader = self.world.leader()
        dice = rng.random()
        if leader is not None and dice < 0.35:
            return leader.machine
        delicate = [m for m in running if m.process and self._is_delicate(m.process)]
        if delicate and dice < 0.6:
            return rng.choice(delicate)
        return rng.choice(running)

    @staticmethod
    def _is_delicate(process: Process) -> bool:
        node = process.node
        return node is None or bool(
            process.job or node.raft._restore is not None or node.raft.membership.joint
        )

    # --- the network ------------------------------------------------------------------------------

    def _cut(
        self, by: str, pairs: set[tuple[int, int]], rng: random.Random, lasting_ms: int = 0
    ) -> bool:
        links = sorted(pairs)
        self.world.note("cut", links)
        self.world.network.cut(links, by)
        for one, other in links:
            process = self.world.machines[one].process
            if process is not None and process.serves:
                process.peers.cut(other)
        lasting_ms = lasting_ms or int(rng.choice((0.3, 0.6, 1.2)) * self._timeout_max_ms)
        self.world.scheduler.after(lasting_ms * MS, self.world.network.mend, links, by)
        return bool(links)

    def _one_way(self, machine: Machine, rng: random.Random) -> bool:
        others = [i for i in self.world.machines if i != machine.id]
        if not others:
            return False
        other = rng.choice(others)
        link = (machine.id, other) if rng.random() < 0.5 else (other, machine.id)
        return self._cut("one-way cut", {link}, rng)

    def _isolate(self, machine: Machine, rng: random.Random) -> bool:
        others = [i for i in self.world.machines if i != machine.id]
        side = [machine.id, *rng.sample(others, rng.randint(0, len(others) // 2))]
        rest = [i for i in others if i not in side]
        pairs = set(itertools.product(side, rest))
        if rng.random() < 0.7:
            pairs |= set(itertools.product(rest, side))
        return self._cut("isolate", pairs, rng)

    def _lag(self, machine: Machine, rng: random.Random) -> bool:
        """It hears nothing for so long that it will need a snapshot."""
        others = [i for i in self.world.machines if i != machine.id]
        pairs = {p for i in others for p in ((i, machine.id), (machine.id, i))}
        return self._cut("lag", pairs, rng, 1200)

    def _mesh(self, rng: random.Random) -> bool:
        """Some pairs cannot talk, though both reach others."""
        every = list(itertools.combinations(self.world.machines, 2))
        some = rng.sample(every, rng.randint(0, len(every) // 2)) if every else []
        pairs = {p for one, other in some for p in ((one, other), (other, one))}
        return self._cut("mesh", pairs, rng)

    def _usurp(self, rng: random.Random) -> bool:
        """The leader goes on alone, with clients that write to it, until another one leads."""
        leader = self.world.leader()
        if leader is None:
            return False
        me = leader.machine.id
        others = [i for i in self.world.machines if i != me]
        with_it = rng.sample(others, rng.choice((0, 0, len(others) // 3)))
        rest = [i for i in others if i not in with_it]
        side = [me, *with_it]
        self.world.scheduler.after(
            rng.randint(0, 20) * MS, self.world.clients.burst, leader, rng.randint(0, 6), rng
        )
        pairs = {p for one in side for i in rest for p in ((one, i), (i, one))}
        lasting_ms = int(rng.uniform(0.8, 2.5) * self._timeout_max_ms)
        if rng.random() < 0.3:  # what it appends is still being written when it is replaced
            leader.machine.stall(self.world.scheduler.now + (lasting_ms + 100) * MS, "usurp")
        if rng.random() < 0.4:  # a membership that will never be committed
            settings = {"history_revisions": rng.randint(1, 1000)}
            self.operators.ask(rng, lambda node, by: node.change_settings(settings, by), leader)
        self._usurped = (me, self.world.scheduler.now + lasting_ms * MS)
        return self._cut("usurp", pairs, rng, lasting_ms)

    def _stale_leader(self, rng: random.Random) -> bool:
        """Answers reach the leader later and later, and it learns late that it does not lead any
        more: because nobody hears it, one follower does not hear it, or it hands over.
        """
        leader = self.world.leader()
        if leader is None or leader.node is None:
            return False
        me, after, timeout_ms = leader.machine.id, self.world.scheduler.after, self._timeout_ms
        others = [i for i in self.world.machines if i != me]
        links = {(i, me) for i in others}
        heirs = [v.id for v in self.world.membership.voters if v.id != me]
        if not heirs:
            return False
        heir, node, way = rng.choice(heirs), leader.node, rng.choice(("deaf", "handover", "one"))
        if way == "handover":
            self._handing_over = leader
            self.operators.ask(
                rng, lambda _, deadline: node.transfer_leader(heir, deadline), leader
            )
        elif way == "one":
            self._slow_down(STALE, links, int(rng.uniform(0.15, 0.45) * timeout_ms))
            self._cut(STALE, {(me, heir), (heir, me)}, rng, 4 * timeout_ms)
            self._read_often(leader, 3 * timeout_ms, rng)
        else:
            steps = rng.randint(1, 6)
            for step in range(steps):
                lag_ms = int(0.4 * timeout_ms * (step + 1))
                after(step * timeout_ms // 2 * MS, self._slow_down, STALE, links, lag_ms)
            after(steps * timeout_ms // 2 * MS, self._deafen, leader, others, rng)
        return True

    def _deafen(self, leader: Process, others: list[int], rng: random.Random) -> None:
        if self.over:
            return
        self._cut(STALE, {(leader.machine.id, i) for i in others}, rng, 4 * self._timeout_ms)
        self._read_often(leader, 4 * self._timeout_ms, rng)

    def hands_over(self, process: Process) -> None:
        """This very moment `process` tells another member to take over."""
        self.world.count("handed over")
        if self._handing_over is process:
            self._handing_over = None
            self.world.count("handed over and deaf")
            me = process.machine.id
            links = {(i, me) for i in self.world.machines if i != me}
            self._slow_down(STALE, links, 2 * self._timeout_ms)
            self._read_often(process, self._timeout_ms, self.rngs[STALE])

    def _read_often(self, process: Process, ms: int, rng: random.Random) -> None:
        for _ in range(60):
            when = int(rng.random() * ms * MS)
            self.world.scheduler.after(when, self.world.clients.read_once, process, rng)

    def _burst(self, rng: random.Random) -> bool:
        """Many writes at once, and perhaps the end of the leader that has just taken them."""
        leader = self.world.leader()
        if leader is None:
            return False
        self.world.clients.burst(leader, rng.randint(2, 12), rng)
        if rng.random() < 0.4:
            leader.machine.disk.fuse = rng.randint(0, 30)
        return True

    def _slow(self, rng: random.Random) -> bool:
        ids = list(self.world.machines)
        if len(ids) < 2:
            return False
        one, other = rng.sample(ids, 2)
        lag_ms = int(rng.uniform(0.1, 1.5) * self._timeout_max_ms)
        self._slow_down("slow", {(one, other)}, lag_ms)
        return True

    def _slow_down(self, by: str, links: set[tuple[int, int]], lag_ms: int) -> None:
        if self.over:
            return  # a step of what began before the healing
        self.world.note("slow", sorted(links), lag_ms)
        for link in sorted(links):
            self.world.network.slow[link] = lag_ms * MS
            self.world.network.slow_by[link] = by
        self.world.scheduler.after(3 * self._timeout_max_ms * MS, self._hurry, links)

    def _hurry(self, links: set[tuple[int, int]]) -> None:
        for link in sorted(links):
            self.world.network.slow.pop(link, None)

    # --- processes and machines -------------------------------------------------------------------

    def _kill(self, machine: Machine, rng: random.Random) -> bool:
        self.world.crash(machine)
        return True

    def _power(self, machine: Machine, rng: random.Random) -> bool:
        self.world.crash(machine, power=True)
        return True

    def _blackout(self, rng: random.Random) -> bool:
        """All at once, or nearly."""
        power, running = rng.random() < 0.5, self._running()
        for machine in running:
            self.world.crash(machine, power=power)
        return bool(running)

    def _fuse(self, machine: Machine, rng: random.Random) -> bool:
        """A crash at the boundary of two effects: sends, syncs, renames, commits."""
        machine.disk.fuse = rng.choice((0, 1, 2, 3, 5, 8, 13, 30))
        self.world.note("fuse of", machine.id, "is", machine.disk.fuse)
        return True

    def _stop(self, machine: Machine, rng: random.Random) -> bool:
        """As systemd would: leadership is handed over, the state is synced."""
        if machine.process is None or not machine.process.serves:
            return False
        self.world.note("stop", machine.id)
        machine.process.stop()
        return True

    def _freeze(self, by: str, machine: Machine, ms: int) -> int:
        process = machine.process
        until = self.world.scheduler.now + ms * MS
        self.world.note("freeze", machine.id, "for", ms, "ms")
        if process is not None and until > process.loop.frozen_until:
            process.loop.frozen_until, process.loop.frozen_by = until, by
        return until

    def _pause(self, machine: Machine, rng: random.Random) -> bool:
        self._freeze("pause", machine, int(rng.uniform(0.2, 3) * self._timeout_ms))
        return True

    def _suspend(self, machine: Machine, rng: random.Random) -> bool:
        """Of the machine: its monotonic clock stands still."""
        ms = int(rng.uniform(0.2, 3) * self._timeout_ms)
        process = machine.process
        if process is None or process.loop.frozen_until > self.world.scheduler.now:
            return False
        until = self._freeze("suspend", machine, ms)
        machine.clock.suspended_ns += int(ms * MS * machine.clock.rate)
        machine.stall(until, "suspend")
        return True

    def _jump(self, machine: Machine, rng: random.Random) -> bool:
        """Somebody sets the time of day, by up to a day, and the clock by which a node counts its
        deadlines may leap ahead. CLOCK_BOOTTIME, on which leases and votes rest, never does.
        """
        wrong_s, ahead_ms = rng.randint(-86400, 86400), rng.choice((0, 10, 1000))
        self.world.note("clock of", machine.id, "set by", wrong_s, "s, ahead", ahead_ms, "ms")
        machine.clock.wrong_ns += wrong_s * SECOND
        machine.clock.suspended_ns -= ahead_ms * MS
        return True

    @property
    def _timeout_ms(self) -> int:
        return self.world.plan.election.timeout_ms_min

    @property
    def _timeout_max_ms(self) -> int:
        return self.world.plan.election.timeout_ms_max

    # --- disks ------------------------------------------------------------------------------------

    def _stall(self, machine: Machine, rng: random.Random) -> bool:
        ms = int(rng.uniform(0.1, 4) * self._timeout_ms)
        self.world.note("disk of", machine.id, "stalls for", ms, "ms")
        machine.stall(self.world.scheduler.now + ms * MS, "stall")
        return True

    def _eio(self, machine: Machine, rng: random.Random) -> bool:
        """At one of the next operations, or the next of a kind, for nearly all are commits; and at
        whatever is tried right after it, such as the removal of a file that could not be synced.
        """
        disk = machine.disk
        disk.eio_kind = rng.choice(("", "", "", *OPERATIONS))
        disk.eio = rng.choice((0, 0, 1, 2) if disk.eio_kind else (0, 0, 1, 2, 4, 8, 16))
        disk.eio_times = rng.choice((1, 1, 1, 2, 4))
        what = disk.eio_kind or "operation"
        times = disk.eio_times
        self.world.note(
            "disk of", machine.id, "fails", times, "times at a", what, "after", disk.eio
        )
        return True

    def _full(self, machine: Machine, rng: random.Random) -> bool:
        machine.disk.room = rng.choice(ROOM)
        self.world.note("disk of", machine.id, "has room for", machine.disk.room, "bytes")
        self.world.scheduler.after(rng.randint(100, 1500) * MS, self._free, machine)
        return True

    @staticmethod
    def _free(machine: Machine) -> None:
        machine.disk.room = None

    def mark(self, machine: Machine, what: str, lasts: Callable[[], bool]) -> None:
        """It has lost something, and is not to be counted on for as long as `lasts` says so."""
        self.world.count(what)
        self.damaged, self._still_damaged = machine, lasts
        self.ever_damaged.add(machine.id)

    def nobody_is_missing(self) -> bool:
        return not (self.damaged and self._still_damaged())
