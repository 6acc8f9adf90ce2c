"""A machine with a disk and a clock, and the process of a real `Node` that runs on it."""

from __future__ import annotations

import asyncio
import random
import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dengine import config as settings
from dengine.errors import StorageIO
from dengine.node import node as node_module
from dengine.raft.membership import Status
from dengine.raft.types import MemberId, SnapshotRef
from dengine.storage import recovery
from dengine.storage.environment import DATA_FILE, damaged
from tests.simulation.disk import Disk, Inode, SimPath
from tests.simulation.environment import Environment, Handle, unpacked
from tests.simulation.loop import MS, Clock, EventLoop

if TYPE_CHECKING:
    from tests.simulation.network import Peers
    from tests.simulation.world import World
    from tests.simulation.writer import LogWriter

PORT = 9081
# A start is one event, so what died in it is told by the functions that were under way.
RECOVERY = {
    "_begin_anew": "a new beginning",
    "_finish_install": "the rest of an install",
    "_rebuilt_state": "a rebuilding",
    "open_stores": "recovery",
}
SKEWED = 0.01  # a clock that goes wrong by more makes leases and timeouts differ
BUSY_NS_MIN, BUSY_NS = 10_000, 600_000  # until a process looks at what has arrived


class Machine:
    """One node id: its disk, its clock, its configuration, and its process while that runs.

    Attributes:
        founders: node ids of `initial_cluster` with it; a machine that is not among them joins.
        retired: it was removed from the cluster, and stays off.
        stalled_until, stalled_by: no write ends before then, and by which fault.
    """

    def __init__(self, world: World, node_id: int, founders: tuple[int, ...]) -> None:
        self.world = world
        self.id = node_id
        self.host = f"10.0.0.{node_id}"
        self.address = f"{self.host}:{PORT}"
        self.rng = random.Random(f"{world.seed} machine {node_id}")
        plan = world.plan
        offset_ns = self.rng.randint(1, 10**6) * MS * 1000 + self.rng.randrange(MS)
        rate = self.rng.uniform(0.9, 1.1) if plan.skewed_clocks else 1.0
        self.clock = Clock(world.scheduler, offset_ns, rate)
        self.founders = founders
        self.founding_wait_ms = 50
        self.process: Process | None = None
        self.retired = False
        self.stalled_until = 0
        self.stalled_by = ""
        self.boot_id = f"boot-{node_id}-0"
        self.starts = 0
        self.disk = self._new_disk()

    def _new_disk(self) -> Disk:
        disk = Disk(f"n{self.id}", self.rng)
        disk.burnt = self._burnt
        disk.hit = self.world.count
        SimPath.disks[disk.name] = disk
        return disk

    def stall(self, until: int, by: str) -> None:
        if until > self.stalled_until:
            self.stalled_until, self.stalled_by = until, by

    def write_ns(self) -> int:
        """How long the next fsync takes."""
        return int(self.rng.expovariate(1.0) * self.world.plan.fsync_us * 1000) + 20_000

    @property
    def path(self) -> SimPath:
        return SimPath(f"/n{self.id}/data/{self.id}")

    def log_file(self) -> Environment | None:
        """What is on the disk as the log, whether a process runs or not."""
        node = self.disk.find(("data", str(self.id), "log", DATA_FILE))
        return None if node is None else node.environment

    # --- life -------------------------------------------------------------------------------------

    def start(self) -> None:
        if self.process is None and not self.retired:
            self.starts += 1
            if abs(self.clock.rate - 1) > SKEWED:
                self.world.count_quietly("fault: skew")
            self.disk.dead = False
            self.world.faults.starting(self)
            self.process = Process(self)
            self.process.start()

    def crash(self, *, power: bool = False) -> None:
        """The process is gone at once; with `power` also what the kernel had not written."""
        process, self.process = self.process, None
        if process is None:
            return
        self.world.checker.crashed(process, power=power)
        process.end(silent=power)
        self.disk.dead = False
        self.disk.fuse = self.disk.eio = None
        self.disk.process_ended()
        if power:
            self.reboot()

    def reboot(self) -> None:
        """The power goes while no process runs."""
        assert self.process is None
        self.boot_id = f"boot-{self.id}-{self.starts}"
        self.disk.lose_power()

    def wipe(self, *, same_file: bool = False) -> None:
        """The disk is replaced by an empty one; the node has to join again.

        Args:
            same_file: nobody tells it so.
        """
        self.crash()
        self.disk = self._new_disk()
        if not same_file:
            self.has_to_join()

    def has_to_join(self) -> None:
        members = self.world.membership.members
        self.founders = tuple(m.id.id for m in members if m.id.id != self.id)

    def put_back(self, root: Inode, *, whole: bool) -> None:
        """While no process runs: the disk is what it was when `root` was copied from it, or, unless
        `whole`, its log is. What had not been synced by then is lost as when the power goes.
        """
        assert self.process is None
        now, self.disk.root = self.disk.root, root
        self.disk.lose_power()
        if whole:
            self.reboot()
        else:
            older, self.disk.root = self.log_file(), now
            self.disk.need(self.path / "log" / DATA_FILE).environment = older

    def _burnt(self) -> None:
        """The fuse has: the rest follows when the event under way has unwound."""
        step = _recovery_step()
        self.world.count(f"crashed in {step}" if step else "crashed in the middle")
        if self.process is not None:
            self.process.loop.dead = True
            self.world.scheduler.after(0, self.world.fell_over, self, self.process)

    def config(self) -> settings.Config:
        plan = self.world.plan
        joins = self.id not in self.founders
        entries = [_entry(i, settings.InitialRole.FOLLOWER) for i in self.founders]
        if joins:
            entries.append(_entry(self.id, settings.InitialRole.LEARNER))
        return settings.Config(
            source="simulation",
            cluster=settings.Cluster(
                node_id=self.id,
                listen_address=self.address,
                initial_cluster=tuple(entries),
                db_root_dir=SimPath(f"/n{self.id}/data"),  # type: ignore[arg-type]
                founding_wait_ms=self.founding_wait_ms,
            ),
            election=plan.election,
            membership=plan.membership,
            snapshot=plan.snapshot,
            read=settings.Read(lease_ms=plan.lease_ms),
            kv=settings.Kv(
                history_revisions=plan.history_revisions, idempotency_window_s=plan.window_s
            ),
            limits=settings.Limits(reserve_bytes=1000),
            log=settings.Log(),
            security=settings.Security(),
        )


def _recovery_step() -> str:
    """Which of RECOVERY is under way; empty where none is."""
    frame = sys._getframe()
    names = set[str]()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == recovery.__name__:
            names.add(frame.f_code.co_name)
    return next((what for name, what in RECOVERY.items() if name in names), "")


def _entry(node_id: int, role: settings.InitialRole) -> settings.InitialMember:
    is_learner = role is settings.InitialRole.LEARNER
    return settings.InitialMember(
        id=node_id,
        address=f"10.0.0.{node_id}:{PORT}",
        role=role,
        status=Status.PROMOTABLE if is_learner else Status.ACTIVE,
    )


class Process:
    """One start of a node, from `Node.open` to its end.

    Attributes:
        serves: it has opened its port.
        member: who it is.
        job: what its snapshot writer is doing.
        refusals_before: of its disk, when it started.
    """

    peers: Peers
    log_writer: LogWriter | None = None

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.loop = EventLoop(machine.world.scheduler, machine.clock, self._ran)
        self.loop.process = self  # type: ignore[attr-defined]
        self.loop.hit = machine.world.count_quietly
        self.node: node_module.Node | None = None
        self.serves = False
        self.member = MemberId(machine.id, 0)
        self.job = ""
        self.refusals_before = machine.disk.refusals
        self._inbox: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._life: Any = None
        self._told_to_stop: Any = None
        self._random = machine.world.rng.random

    def start(self) -> None:
        self.run(self._begin)

    def _begin(self) -> None:
        self._life = self.loop.create_task(self._live())
        self._life.add_done_callback(self._ended)

    async def _live(self) -> None:
        """As dengine.cli.serve."""
        node = node_module.Node(self.machine.config())
        await node.open()
        self.node = node
        self.member = node.raft.me
        self.serves = True
        self.machine.world.checker.started(self)
        self._told_to_stop = self.loop.create_future()
        running = self.loop.create_task(node.run(), name="node")
        ends: set[Any] = {running, self._told_to_stop}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            await node.stop()
        await running

    def stop(self) -> None:
        """As `systemctl stop` does."""
        if self._told_to_stop is not None:
            self.run(self._be_told_to_stop)

    def _be_told_to_stop(self) -> None:
        if not self._told_to_stop.done():  # else somebody has said so while it was frozen
            self._told_to_stop.set_result(None)

    def _ended(self, life: Any) -> None:
        if not self.loop.dead and not life.cancelled():
            error = life.exception()
            self.machine.world.scheduler.after(
                0, self.machine.world.process_ended, self.machine, self, error
            )

    def end(self, *, silent: bool) -> None:
        """Nothing of this process runs any more."""
        self.loop.dead = True
        self.serves = False
        if self.log_writer is not None:
            with_loop(self.loop, self.log_writer.crash)
        if self.node is not None:
            self.peers.reset(silent=silent)
        self.machine.world.graveyard.append(self)

    def run(self, fn: Callable[..., Any], *args: Any) -> None:
        """One event of this process."""
        self.loop.run(fn, *args)

    def arrived(self, fn: Callable[..., Any], *args: Any) -> None:
        """Something came from the network: handled with whatever else comes in the meantime."""
        if self.loop.dead:
            return
        self._inbox.append((fn, args))
        if len(self._inbox) == 1:
            busy_ns = BUSY_NS_MIN + int(self._random() * BUSY_NS)
            self.machine.world.scheduler.after(busy_ns, self.loop.run, self._take_in)

    def _take_in(self) -> None:
        inbox, self._inbox = self._inbox, deque()
        for fn, args in inbox:
            if not self.loop.dead:
                fn(*args)

    @property
    def leads(self) -> bool:
        return self.node is not None and self.node.raft.is_leader

    def _ran(self) -> None:
        if self.serves:
            self.machine.world.checker.look(self)

    def serve_snapshot(self, ref: SnapshotRef, receiver: int, have: int) -> bytes | None:
        """The bytes of a snapshot for another member, which has the first `have` of them, as the
        API gives them out.
        """
        assert self.node is not None
        snapshots = self.node.snapshots
        file: Any = snapshots.files.get(ref)
        if file is None or not file.exists():
            return None
        content: bytes = file.read_bytes()
        again = with_loop(self.loop, snapshots.files.transfers.began, receiver, ref, have)
        if again:
            self.arrived(snapshots.suspect, ref)
        return content

    def sent_snapshot(self, receiver: int, count: int) -> None:
        """So many bytes more of it have left."""
        assert self.node is not None
        with_loop(self.loop, self.node.snapshots.files.transfers.sent, receiver, count)


def with_loop(loop: EventLoop, fn: Callable[..., Any], *args: Any) -> Any:
    """`fn` as if called on `loop`, without being an event of its own."""
    from asyncio.events import _get_running_loop, _set_running_loop  # type: ignore[attr-defined]

    before = _get_running_loop()
    _set_running_loop(loop)
    try:
        return fn(*args)
    finally:
        _set_running_loop(before)


def open_environment(path: SimPath, *, durable: bool, remedy: str, databases: int = 0) -> Handle:
    """As dengine.storage.environment.open_environment. Raises DataCorruption, StorageIO."""
    disk, file = path.disk, path / DATA_FILE
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        node = file._find() or disk.make(file)
    except OSError as error:
        raise StorageIO(f"cannot open {path}: {error.strerror}") from error
    if node.environment is None:
        image = unpacked(node.content) if node.content else {}
        if image is None:
            raise damaged(file, "it is no environment", remedy)  # type: ignore[arg-type]
        node.environment = Environment(durable)
        node.environment.load({b"": {}} | image)
        if node.content and node.synced == node.content:
            node.environment.synced = node.environment.copy()
    if node.environment.unreadable:
        raise damaged(file, "MDB_INVALID", remedy)  # type: ignore[arg-type]
    try:
        for directory in (path, path.parent):
            disk.sync(disk.need(directory))
    except OSError as error:
        raise StorageIO(f"cannot open {path}: {error.strerror}") from error
    return Handle(node.environment, disk.operation)
