"""The end of a run: everything works again, and so must the cluster, each clause in its time.

one leader                                       ten election timeouts
an answer to every call                          ten
the shape that was asked for                     SETTLE_NS, for somebody may need a snapshot
equal states on all members                      ten, and the pause before a fetch is tried again
a write and a read of each level at each member  ten
the end of all that has a time                   ten, and the longest time
every change, to all who follow it               SETTLE_NS, for some catch up one by one
equal states again                               ten
and then every record is read through: states, logs, snapshots
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from zlib import crc32

from dengine.errors import DataCorruption
from dengine.raft.membership import Membership
from dengine.storage.environment import CRC_RESIDUE
from dengine.storage.log_store import ENTRY, ENTRY_KEY
from dengine.storage.snapshot_file import verify
from tests.simulation.clients import LEVELS
from tests.simulation.loop import MS, SECOND
from tests.simulation.machine import Machine, Process
from tests.simulation.violation import violated
from tests.simulation.writer import check_state

if TYPE_CHECKING:
    from tests.simulation.world import World

TIMEOUTS = 10  # election timeouts
SETTLE_NS = 20 * SECOND
PAUSE_NS = 4 * SECOND  # the third one of node/backoff.py; a seed is too short for a fourth
LONGEST_NS = int(2.5 * SECOND)  # of all times to live, by the slowest clock
NUDGE_NS = 200 * MS  # an operator, or a client, tries again after that
WRITE = ""  # beside LEVELS


class Ending:
    """Use `run`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._timeouts_ns = TIMEOUTS * world.plan.election.timeout_ms_max * MS
        self._owed: dict[tuple[int, str], None] = {}  # machine id and what it has to answer yet
        self._asked: set[tuple[int, str]] = set()

    def run(self) -> None:
        """All of it. Raises Violation."""
        self._heal()
        self._wait("one leader", self._timeouts_ns, self._leaderless)
        self._world.clients.stopped = True
        self._wait("an answer to every call", self._timeouts_ns, self._unanswered)
        self._wait("the shape that was asked for", SETTLE_NS, self._unsettled, self._insist)
        self._wait("equal states", self._timeouts_ns + PAUSE_NS, self._differing)
        # A leader that takes its disk for full makes no entry that only ends things: until it has
        # noticed, the log's last entry may tell an old time.
        self._wait("the room on every disk noticed", SETTLE_NS, self._short_of_room)
        self._world.checker.promises.calm_since = self._log_time_ms()
        self._owed = {(m.id, kind): None for m in self._present() for kind in (WRITE, *LEVELS)}
        self._wait("answers of every member", self._timeouts_ns, self._owing, self._ask)
        limit_ns = self._timeouts_ns + LONGEST_NS
        self._wait("the end of all that has a time", limit_ns, self._world.checker.promises.lasting)
        self._wait("all changes shown", SETTLE_NS, self._world.watchers.lacking)
        self._wait("equal states after that", self._timeouts_ns, self._differing)
        for machine in self._present():
            self._read_through(machine)

    def _short_of_room(self) -> str:
        nodes = {m.id: m.process.node for m in self._present() if m.process is not None}
        short = [i for i, node in nodes.items() if node is not None and not node._cycle.may_tick]
        return f"members {short} take their disks for full" if short else ""

    def _log_time_ms(self) -> int:
        """What an entry would say now, not what the last one has said."""
        nodes = [m.process.node for m in self._present() if m.process is not None]
        clocks = [
            n.raft.proposal_clock_ms(n.state.clock_ms)
            for n in nodes
            if n is not None and n.raft.is_leader
        ]
        return max([self._world.checker.promises.clock_ms, *clocks])

    def _heal(self) -> None:
        world = self._world
        world.note("heal")
        world.faults.stop()
        world.network.heal()
        for machine in world.machines.values():
            machine.stalled_until = 0
            machine.disk.room = machine.disk.fuse = machine.disk.eio = None
            if machine.process is not None:
                machine.process.loop.frozen_until = 0
            self._correct_file(machine)
            world.start(machine)

    def _correct_file(self, machine: Machine) -> None:
        """The operator does so where a joiner knows nobody but who has been removed meanwhile. It
        may be a member by then, and not have been told."""
        world, process = self._world, machine.process
        node = None if process is None else process.node
        belongs = node is not None and node._directory.identity.cluster_id
        if not belongs and all(world.machines[i].retired for i in machine.founders):
            machine.founders = tuple(member.id for member in world.membership.voters)
            world.crash(machine)

    def _wait(
        self,
        what: str,
        limit_ns: int,
        lacking: Callable[[], str],
        nudge: Callable[[], None] = lambda: None,
    ) -> None:
        """Until `lacking` has nothing to say, `limit_ns` at most."""
        world = self._world
        began = nudged = world.scheduler.now
        nudge()
        while why := lacking():
            if world.scheduler.now >= began + limit_ns:
                violated(
                    "liveness",
                    f"not {what} after {limit_ns / SECOND:.1f} s: {why}; {world.situation()}",
                )
            if world.scheduler.now >= nudged + NUDGE_NS:
                nudged = world.scheduler.now
                nudge()
            world.scheduler.run_until(world.scheduler.now + 10 * MS)
        world.note(what, "after", (world.scheduler.now - began) // MS, "ms")

    def _present(self) -> list[Machine]:
        return [m for m in self._world.machines.values() if not m.retired]

    def _leaderless(self) -> str:
        leaders = [p for p in self._world.processes() if p.leads]
        if len(leaders) != 1:
            return f"{len(leaders)} lead"
        node = leaders[0].node
        assert node is not None
        return "" if node.raft.committed_in_term else "the leader has committed nothing in its term"

    def _unanswered(self) -> str:
        count = len(self._world.clients.pending) + self._world.sessions.waiting
        return f"{count} wait" if count else ""

    # --- the shape --------------------------------------------------------------------------------

    def _insist(self) -> None:
        """The operator who wants a member replaced asks until it is gone."""
        faults = self._world.faults
        if faults.to_remove is not None and self._world.membership.find(faults.to_remove):
            faults.operators.ask_removal(faults.to_remove, faults.rngs["join"])

    def _unsettled(self) -> str:
        """What the membership still lacks; empty when nothing more is to come."""
        world, members = self._world, self._world.membership
        if members.joint:
            return "the membership is joint"
        for machine in self._present():
            process = machine.process
            if process is None or not process.serves:
                return f"node {machine.id} is not up"
            if members.get(process.member) is None:
                return f"{process.member} is no member"
        for member in members.members:
            process = world.machines[member.id.id].process
            if process is None or process.member != member.id:
                return f"{member.id} is a member and is not there"
        return self._missing_voters(members)

    def _missing_voters(self, members: Membership) -> str:
        """A learner that could be a voter, or another number of voters than was planned.

        With promotion "odd" one learner waits for a second. What operators did beside the plan
        ("churn") changes the number, but never that rule.
        """
        waits = members.settings.promotion == "odd" and len(members.voters) % 2
        if len(members.learners) > (1 if waits else 0):
            return f"{len(members.learners)} learners beside {len(members.voters)} voters"
        plan, faults = self._world.plan, self._world.faults
        if faults.to_remove is not None and members.find(faults.to_remove):
            return f"node {faults.to_remove} is still a member"
        if "churn" not in plan.faults:
            wanted = set(range(1, plan.founders + plan.joiners + 1)) - {faults.to_remove}
            if {voter.id for voter in members.voters} != wanted:
                return f"the voters should be {sorted(wanted)}"
        return ""

    # --- equal states -----------------------------------------------------------------------------

    def _differing(self) -> str:
        leader = self._world.leader()
        if leader is None or leader.node is None:
            return "nobody leads"
        raft, digest = leader.node.raft, leader.node.state.digest
        if not digest.index == raft.log.commit_index == raft.log.last_index:
            return "the leader has not applied all of its log"
        for member in raft.committed_membership.members:
            process = self._world.machines[member.id.id].process
            if process is None or process.node is None or process.member != member.id:
                return f"{member.id} is not there"
            node = process.node
            if node.raft.state_lost or node.state.digest != digest:
                return f"{member.id} has applied {node.state.digest.index} of {digest.index}"
            if node.raft.committed_membership != raft.committed_membership:
                return f"{member.id} goes by another membership"
        return ""

    # --- everybody works --------------------------------------------------------------------------

    def _ask(self) -> None:
        for key in self._owed:
            process = self._world.machines[key[0]].process
            if key not in self._asked and process is not None and process.serves:
                self._asked.add(key)
                self._world.clients.ask(process, key[1], self._teller(key))

    def _teller(self, key: tuple[int, str]) -> Callable[[bool], None]:
        def told(well: bool) -> None:
            self._asked.discard(key)
            if well:
                del self._owed[key]

        return told

    def _owing(self) -> str:
        """Of those that are members still: a removal that was asked for before may have been
        carried out only now."""
        machines = self._world.machines
        owing = [(i, kind) for i, kind in self._owed if not machines[i].retired]
        return ", ".join(f"node {i} owes a {kind or 'write'}" for i, kind in owing)

    # --- the disks --------------------------------------------------------------------------------

    def _read_through(self, machine: Machine) -> None:
        """Each record of the state and the log, each byte of the snapshots. What the plan has let
        rot here may not have been found yet.
        """
        process = machine.process
        assert process is not None
        try:
            self._check_files(process)
        except DataCorruption as error:
            if machine.id not in self._world.faults.ever_damaged:
                violated("0 no surprise", f"node {machine.id}: {error.message}")
            self._world.count("rot not found yet")

    def _check_files(self, process: Process) -> None:
        node, machine, committed = process.node, process.machine, self._world.checker.committed
        assert node is not None
        check_state(node.state.path)  # type: ignore[arg-type]
        for _, file in node.snapshots.files:
            verify(file)
        log = machine.log_file()
        assert log is not None
        for key, raw in log.tables[b""].data.items():
            if crc32(raw, crc32(key)) != CRC_RESIDUE:
                raise DataCorruption(f"the log's record of {key!r} fails its CRC")
            if key[:1] == b"e":
                index = ENTRY_KEY.unpack(key)[1]
                entry = committed[index - 1]
                if (ENTRY.unpack_from(raw)[0], raw[ENTRY.size : -4]) != (entry.term, entry.data):
                    violated("4 committed", f"node {machine.id}: another entry {index} on the disk")
