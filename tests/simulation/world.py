"""A whole cluster in one thread: real nodes over simulated clocks, disks and network.

Each machine runs the real `dengine.node.node.Node`, and with it the real cycle, Raft, state
machine, codec, handshake, forwarding, promotion, snapshot policy, installing and recovery, on an
asyncio loop with virtual time. Only what lies outside of the process is simulated (patches.py): the
streams' transport, the HTTP between joiner and cluster and for snapshot files, the thread that
writes the log, the subprocess that writes snapshots, the file system and LMDB. This was chosen over
a model that drives `Raft` in the order of the cycle's steps (tests/raft/cluster.py has one) because
most defects of the past were between those parts, and because it is fast enough: what a node does
per message is the same code either way.

    Plan     what the seed draws
    World    machines, network, clients, checker; runs, and gives the verdict
    Faults   what goes wrong meanwhile (faults.py)
    Ending   what must be so once nothing goes wrong any more (ending.py)

What nothing in the plan explains is a failure: an error that nobody was told of, a process that
ends for the sake of a disk that did what it was asked.
"""

from __future__ import annotations

import gc
import logging
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import lmdb

from dengine.errors import DataCorruption, IdentityError, StorageIO, TryAgain
from dengine.raft.membership import Membership
from tests.simulation.attempts import Attempts
from tests.simulation.clients import Clients
from tests.simulation.durability import Durability
from tests.simulation.ending import Ending
from tests.simulation.faults import Faults
from tests.simulation.invariants import Checker
from tests.simulation.loop import MS, SECOND, Scheduler
from tests.simulation.machine import Machine, Process
from tests.simulation.network import Habits, Network
from tests.simulation.patches import installed
from tests.simulation.plan import Plan
from tests.simulation.sessions import Sessions
from tests.simulation.violation import Violation
from tests.simulation.watchers import Watchers
from tests.simulation.words import told

RESTART_MS = (20, 400)
FAR_US = 8000  # one way, beside heartbeats every 10 or 20 ms


class World:
    """One run. `run` raises Violation."""

    def __init__(self, plan: Plan, trace: Callable[[str], None] | None = None) -> None:
        self.plan = plan
        self.seed = plan.seed
        self.trace = trace
        self.scheduler = Scheduler()
        self.rng = random.Random(f"{plan.seed} world")
        self.counts: Counter[str] = Counter()
        self.digest = 0
        self.membership = Membership()  # as committed last
        self.graveyard: list[Process] = []  # what a dead process still holds must not run
        habits = self._habits()
        self.network = Network(self, random.Random(f"{plan.seed} network"), habits)
        self.attempts = Attempts()
        self.checker = Checker(self)
        self.durability = Durability(self)
        self.machines: dict[int, Machine] = {}
        founders = tuple(range(1, plan.founders + 1))
        for node_id in range(1, plan.founders + plan.joiners + 1):
            self.machines[node_id] = Machine(self, node_id, founders)
        self.clients = Clients(self)
        self.sessions = Sessions(self)
        self.watchers = Watchers(self)
        self.faults = Faults(self)

    def _habits(self) -> Habits:
        rng, faults = random.Random(f"{self.seed} habits"), self.plan.faults
        loss, repeat, tail = rng.choice((0.01, 0.1, 0.3)), rng.choice((0.02, 0.2)), rng.random()
        return Habits(
            loss=loss if "loss" in faults else 0.0,
            repeat=repeat if "repeat" in faults else 0.0,
            tail=0.03 * tail if "tail" in faults else 0.0,
            tail_ms=2 * self.plan.election.timeout_ms_max,
            slow_us=FAR_US if self.plan.far else rng.choice((100, 400, 2000)),
            ordered="reorder" not in faults,
        )

    # --- what happened ----------------------------------------------------------------------------

    def count(self, what: str) -> None:
        """Something rare took place."""
        self.counts[what] += 1
        self.note("count", what)

    def count_quietly(self, what: str) -> None:
        """The same of what is not rare, and would fill the trace."""
        self.counts[what] += 1

    def note(self, *what: object) -> None:
        """Part of the trace; two runs of a seed have the same."""
        text = f"{self.scheduler.now} {what}"
        self.digest = crc32(text.encode(), self.digest)
        if self.trace is not None:
            self.trace(f"{self.scheduler.now / 1e6:12.3f} ms  {' '.join(map(str, what))}")

    def saw(self, sender: int, to: int, data: bytes) -> None:
        """A message arrived; as `note`, without the cost."""
        self.digest = crc32(data, self.digest ^ (self.scheduler.now & 0xFFFFFFFF))
        if self.trace is not None:
            self.trace(f"{self.scheduler.now / 1e6:12.3f} ms  {sender} -> {to}  {told(data)}")

    @property
    def disks_refused(self) -> bool:
        """Has any disk not done what it was asked?"""
        return any(machine.disk.refusals for machine in self.machines.values())

    def machine_at(self, address: str) -> Machine | None:
        host = address.rpartition(":")[0]
        return self.machines.get(int(host.rpartition(".")[2]))

    # --- the life of processes --------------------------------------------------------------------

    def start(self, machine: Machine) -> None:
        self.note("start", machine.id)
        machine.start()

    def crash(self, machine: Machine, *, power: bool = False) -> None:
        """At any moment; it comes back by itself after a while."""
        process = machine.process
        if process is None:
            return
        self.note("power cut" if power else "kill", machine.id)
        machine.crash(power=power)
        self.process_gone(process)
        self.restart_later(machine)

    def process_gone(self, process: Process) -> None:
        """Whoever was connected to it sees that break."""
        for whoever in (self.clients, self.sessions, self.watchers):
            whoever.process_gone(process)

    def restart_later(self, machine: Machine) -> None:
        pause_ns = machine.rng.randint(*RESTART_MS) * MS
        self.scheduler.after(pause_ns, self.start, machine)

    def fell_over(self, machine: Machine, process: Process) -> None:
        """It died in the middle of a turn."""
        if machine.process is process:
            self.crash(machine, power="power" in self.plan.faults and machine.rng.random() < 0.5)

    def process_ended(
        self, machine: Machine, process: Process, error: BaseException | None
    ) -> None:
        """It ended by itself; what systemd would do, or a defect."""
        if machine.process is not process:
            return
        self.note("exit", machine.id, type(error).__name__, error)
        machine.crash()
        self.process_gone(process)
        cause = error.__cause__ if error is not None else None
        if isinstance(cause, Violation):  # noticed inside of a turn
            raise cause
        if isinstance(error, IdentityError) and self._was_removed(process):
            self.count("removed node stopped")
            machine.retired = True
            return
        if isinstance(error, IdentityError) and self._founds_again(machine):
            self.count("told to join")
            machine.has_to_join()
            self.restart_later(machine)
            return
        if isinstance(error, DataCorruption) and self.faults.damaged is machine:
            self.count("operator replaced a disk")  # it stopped, as it must, and said why
            self.checker.damaging(machine)
            machine.wipe()
            self.restart_later(machine)
            return
        if self._is_told_to_be_old(machine, error):
            self.count("rolled back and told so")
        elif error is not None and not self._is_for_the_disk(process, error):
            raise self._died(machine, error)
        self.count("exit 75" if isinstance(error, TryAgain) else "exit 74" if error else "exit 0")
        if "power" in self.plan.faults and machine.rng.random() < (0.3 if error else 0.7):
            self.count("power lost while down")
            machine.reboot()
        self.restart_later(machine)

    def _is_told_to_be_old(self, machine: Machine, error: BaseException | None) -> bool:
        told = type(error) is TryAgain and "joins as a new learner" in error.message
        return told and machine.id in self.faults.ever_rolled_back

    def _is_for_the_disk(self, process: Process, error: BaseException) -> bool:
        """It said so, and this very disk has refused something to this very process, or has let
        what was on it rot.
        """
        machine, cause = process.machine, error.__cause__
        if type(error) is TryAgain and not isinstance(cause, OSError | lmdb.Error | StorageIO):
            return False
        if not isinstance(error, TryAgain | StorageIO):
            return False
        rotten = isinstance(cause, DataCorruption) and machine.id in self.faults.ever_damaged
        return rotten or machine.disk.refusals > process.refusals_before

    def _was_removed(self, process: Process) -> bool:
        node_id = process.machine.id
        return self.membership.was_removed(node_id) or not self.membership.find(node_id)

    def _founds_again(self, machine: Machine) -> bool:
        """Its disk is empty, and its file says that it founds."""
        return machine.id in machine.founders and machine.id in self.faults.ever_damaged

    @staticmethod
    def _died(machine: Machine, error: BaseException | None) -> Violation:
        if isinstance(error, Violation):
            return error
        violation = Violation(
            "0 no surprise", f"node {machine.id} ended by itself: {type(error).__name__}: {error}"
        )
        violation.__cause__ = error
        return violation

    # --- the run ----------------------------------------------------------------------------------

    def run(self) -> None:
        """All of it. Raises Violation."""
        with self.alive():
            try:
                self._run()
            except Violation:
                raise
            except Exception as error:  # in a callback of a node, or in here
                what = f"{type(error).__name__}: {error}"
                raise Violation("0 no surprise", what) from error

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Nodes can run inside of this block; afterwards nothing of them is left."""
        logging.disable(logging.CRITICAL)
        gc.disable()
        try:
            with installed(self.plan.limits):
                try:
                    yield
                finally:
                    self._clear_away()
        finally:
            gc.enable()
            logging.disable(logging.NOTSET)

    def _run(self) -> None:
        for machine in self.machines.values():
            if machine.id in machine.founders:
                self.start(machine)
        if not self.plan.calm_start:
            self.faults.start()
        timeout_ns = self.plan.election.timeout_ms_max * MS
        self.scheduler.run_until(3 * timeout_ns)
        self.clients.start()
        self.sessions.start()
        self.watchers.start()
        if self.plan.calm_start:
            self.faults.start()
        self.scheduler.run_until(self.scheduler.now + int(self.plan.seconds * SECOND))
        Ending(self).run()
        self.clients.verify()
        gc.collect()  # what hung on to itself is heard of now
        if self.scheduler.unheard is not None:
            raise self.scheduler.unheard

    def processes(self) -> list[Process]:
        return [m.process for m in self.machines.values() if m.process and m.process.serves]

    def leader(self) -> Process | None:
        """The one of the highest term."""
        leaders = [p for p in self.processes() if p.node and p.node.raft.is_leader]
        return max(leaders, key=lambda p: p.node.raft.term, default=None)  # type: ignore[union-attr]

    def situation(self) -> str:
        """Who is where, for a person."""
        lines = [f"membership {_short(self.membership)}"]
        for machine in self.machines.values():
            process = machine.process
            if process is None or process.node is None:
                lines.append(f"node {machine.id}: {'retired' if machine.retired else 'down'}")
                continue
            raft = process.node.raft
            log = raft.log
            lines.append(
                f"node {process.member}: {raft.role} of {raft.term} follows {raft.leader}, "
                f"log {log.first_index}..{log.last_index}, commit {log.commit_index}, applied "
                f"{log.applied_index}, {_short(raft.membership)}, "
                f"job {process.node.snapshots.job!r}, {process.node.snapshots.last_error}"
            )
        return "\n  ".join(lines)

    def _clear_away(self) -> None:
        """Let go of what dead processes hold, without a word about what they had not finished."""
        hook, sys.unraisablehook = sys.unraisablehook, _ignore
        try:
            for machine in self.machines.values():
                if machine.process is not None:
                    machine.process.loop.dead = True
                    self.graveyard.append(machine.process)
                machine.process = None
                machine.disk.dead = True
            for process in self.graveyard:
                process.loop.clear_away()
            self.graveyard.clear()
            self.scheduler.close()
            gc.collect()
        finally:
            sys.unraisablehook = hook


def _short(members: Membership) -> str:
    voters = ",".join(str(v.id) for v in members.voters)
    outgoing = ",".join(str(v.id) for v in members.outgoing)
    learners = ",".join(str(v.id) for v in members.learners)
    return f"[{voters}|{outgoing}|{learners}]"


def _ignore(_: Any) -> None:
    pass
