"""What is lost for good: bits that rot, and a disk that is replaced by an empty one, or by an
older copy of itself.

One machine at a time, and only where others have a quorum without it.
"""

from __future__ import annotations

import copy
import random
from typing import TYPE_CHECKING, NamedTuple

from dengine.raft.raft import Role
from dengine.raft.types import MemberId
from dengine.storage.state_records import REQUIRED
from tests.simulation.disk import Inode, SimPath
from tests.simulation.environment import Environment
from tests.simulation.machine import Machine, Process

if TYPE_CHECKING:
    from dengine.node.node import Node
    from tests.simulation.faults import Faults
    from tests.simulation.world import World

IN_KEY = 0.25  # of what rots in a log


class _Copy(NamedTuple):
    """A disk as it was, whose it was, and who voted then."""

    root: Inode
    member: MemberId
    voters: tuple[MemberId, ...]


class Damage:
    """Each act says whether it has damaged anything."""

    def __init__(self, world: World, faults: Faults) -> None:
        self._world = world
        self._faults = faults
        self._copies: dict[int, _Copy] = {}  # by machine id

    def _may_damage(self, machine: Machine) -> bool:
        faults, members = self._faults, self._world.membership
        nodes = [(p.machine, p.node) for p in self._world.processes() if p.node]
        in_force = [node.raft.membership for _, node in nodes]
        return (
            faults.nobody_is_missing()
            and len(members.voters) >= 3
            # Is the only one lost that has founded, there is no cluster (docs/correctness.md).
            and any(node.raft.log.stable_index for other, node in nodes if other is not machine)
            and not faults.operators.removing
            and all(m.voters == members.voters and not m.joint for m in in_force if m.voters)
        )

    def _is_weak(self, machine: Machine) -> bool:
        """Not a voter yet, or not up to date."""
        process = machine.process
        if process is None or process.node is None:
            return True
        raft = process.node.raft
        return (
            raft.state_lost
            or raft.me not in self._world.membership.voters
            or raft.log.stable_index < len(self._world.checker.committed) - 5
        )

    def rot(self, machine: Machine, rng: random.Random) -> bool:
        if not self._may_damage(machine):
            return False
        process = machine.process
        what = rng.choice(("log", "state", "state", "snapshot", "verdict"))
        if process is None or process.node is None or process.node.raft.state_lost:
            return False
        if what == "log":
            return self._rot_log(machine, rng)
        if what == "state":
            return self._rot_state(machine, rng)
        if what == "verdict":
            self._judge(machine, process, process.node)
            return True
        files = list(machine.path.joinpath("snapshots").glob("snapshot-*.dsnap"))
        if files:
            self._rot_file(machine, rng.choice(files), rng)
        return bool(files)

    def _rot_log(self, machine: Machine, rng: random.Random) -> bool:
        log = machine.log_file()
        if log is None or len(log.tables[b""].keys) <= 2:
            return False
        self._world.checker.damaging(machine)
        self._rot_record(log, b"", rng)
        me = machine.process.member if machine.process else None
        self._faults.mark(
            machine,
            "log rotted",
            lambda: (
                self._is_weak(machine) or machine.process is None or machine.process.member == me
            ),
        )
        if rng.random() < 0.7:  # it is found at the next start
            self._world.crash(machine, power=rng.random() < 0.5)
        return True

    def _judge(self, machine: Machine, process: Process, node: Node) -> None:
        """The leader would have found its state wrong, which here no state ever is."""
        self._faults.mark(machine, "state judged wrong", lambda: self._is_weak(machine))
        self._faults.judged.add(machine.id)
        process.run(lambda: node.snapshots.distrust("it is said to be wrong", files_too=True))

    def _rot_state(self, machine: Machine, rng: random.Random) -> bool:
        name = machine.path.joinpath("CURRENT").read_text().strip()
        node = (machine.path / name / "data.mdb")._find()
        if node is None or node.environment is None:
            return False
        name = self._any_table(node.environment, rng)
        if not self._rot_record(node.environment, name, rng):
            return False
        what = name.decode() if name in REQUIRED else "a table of the machine's"
        self._world.count(f"rot in {what}")
        self._faults.mark(machine, "state rotted", lambda: self._is_weak(machine))
        return True

    @staticmethod
    def _any_table(environment: Environment, rng: random.Random) -> bytes:
        """As often that of the keys, that of what is said of the state, and one of all others."""
        others = sorted(n for n, t in environment.tables.items() if n and t.keys)
        others = [name for name in others if name not in REQUIRED]
        return rng.choice((*REQUIRED, rng.choice(others or REQUIRED)))

    @staticmethod
    def _rot_record(environment: Environment, name: bytes, rng: random.Random) -> bool:
        """A bit of one record. Not in a key of the state: what is looked for beside such a key is
        not there, and that is answered until the state is read through (docs/correctness.md).
        """
        table = environment.tables.get(name)
        if table is None or not table.keys:
            return False
        key = rng.choice(table.keys)
        in_key = name == b"" and rng.random() < IN_KEY
        raw = bytearray(key if in_key else table.data[key])
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        if not in_key:
            table.data[key] = bytes(raw)
        elif bytes(raw) not in table.data:
            table.put(bytes(raw), table.data[key])
            table.delete(key)
        return True

    def _rot_file(self, machine: Machine, file: SimPath, rng: random.Random) -> None:
        node = file._find()
        assert node is not None
        raw = bytearray(node.content)
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        node.content = node.synced = bytes(raw)
        self._faults.mark(machine, "snapshot rotted", lambda: file._find() is node)

    def wipe(self, machine: Machine, rng: random.Random) -> bool:
        process, world = machine.process, self._world
        if process is None or process.node is None or not self._may_damage(machine):
            return False
        if process.node.raft.me not in world.membership.voters:
            return False
        world.checker.damaging(machine)
        world.note("wipe", machine.id)
        world.checker.crashed(process, power=True)
        # Who founds alone has nobody to wait for: cut off from all, it would do so again.
        machine.wipe(same_file=rng.random() < 0.3 and len(machine.founders) > 1)
        world.process_gone(process)
        world.restart_later(machine)
        self._faults.mark(machine, "disk replaced", lambda: self._is_weak(machine))
        return True

    def put_back(self, machine: Machine, rng: random.Random, *, whole: bool | None = None) -> bool:
        """A copy is made, and later put back while the machine is off: all of it, as when a virtual
        machine is set back, or the log alone. What was acknowledged and voted since is gone.

        Args:
            whole: None: it is drawn.
        """
        process = machine.process
        if process is None or process.node is None or not self._may_damage(machine):
            return False
        raft, voters = process.node.raft, self._world.membership.voters
        if raft.me not in voters or raft.state_lost or raft._restore is not None:
            return False
        known = self._copies.get(machine.id)
        if known is None or (known.member, known.voters) != (raft.me, voters):
            self._copies[machine.id] = _Copy(copy.deepcopy(machine.disk.root), raft.me, voters)
            return False
        if not self._others_know_all(process):
            return False
        self._world.checker.damaging(machine)
        if whole is None:
            whole = rng.random() < 0.6
        self._world.crash(machine, power=whole or rng.random() < 0.5)
        machine.put_back(self._copies.pop(machine.id).root, whole=whole)
        self._world.checker.forgets(machine)
        what = "disk" if whole else "log"
        self._faults.mark(machine, f"{what} rolled back", lambda: self._is_weak(machine))
        self._faults.ever_rolled_back.add(machine.id)
        return True

    def _others_know_all(self, process: Process) -> bool:
        """Is nothing lost with what this one forgets? Else no check could save what it has
        acknowledged: they follow one leader, in a term in which they stand for election no more,
        and have each entry that it has.
        """
        leader, forgets = self._world.leader(), process.node
        if leader is None or leader is process or leader.node is None or forgets is None:
            return False
        term, log = leader.node.raft.term, forgets.raft.log
        for voter in self._world.membership.voters:
            other = self._world.machines[voter.id].process
            if other is process:
                continue
            if other is None or other.node is None or other.member != voter:
                return False
            raft = other.node.raft
            if raft.term != term or raft.role not in (Role.LEADER, Role.FOLLOWER):
                return False
            if raft.state_lost or raft._restore is not None:
                return False
            if raft.log.stable_index < log.last_index:
                return False
            if raft.log.base.index <= log.last_index and not raft.log.matches(log.last_id):
                return False
        return forgets.raft.term <= term and leader.node.raft.committed_in_term
