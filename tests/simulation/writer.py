"""What a node leaves to a thread and to a process of its own: log writes, and snapshot files.

The jobs are those of dengine.snapshot_writer, step by step and effect by effect, on the simulated
disk. What is simulated is LMDB, of which a copy is the bytes of `environment.packed`, and the HTTP
that brings the bytes of a file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from zlib import crc32

from dengine import snapshot_writer
from dengine.errors import DataCorruption, FatalError, StorageIO, TryAgain
from dengine.node.log_writer import Written
from dengine.raft.membership import decode_membership
from dengine.raft.raft import Ready
from dengine.storage.environment import CRC_BYTES, CRC_RESIDUE, DATA_FILE
from dengine.storage.snapshot_jobs import Check, Done, Fetch, Job
from dengine.storage.state_records import (
    APPLIED_KEY,
    DATABASES,
    MEMBERSHIP_KEY,
    read_applied,
    record_hash,
    sum_bytes,
)
from tests.simulation.disk import SimPath
from tests.simulation.environment import Table, packed, unpacked
from tests.simulation.loop import MS, Crash, WriterDied

if TYPE_CHECKING:
    from tests.simulation.machine import Process

PURGE_EVERY_NS = 20 * MS
PIECES_MAX = 4  # in which a file arrives
DIES = 0.08  # how often the writer does, in the midst of a job
FAILS = 0.4  # how often a file that has come cannot be synced, nor removed after that
CUT = 0.05  # how often the connection breaks before one of them


class LogWriter:
    """Takes the place of dengine.node.log_writer.LogWriter: the same calls, without a thread.

    A write takes effect at its end, as a whole; a crash before that may still let it happen.
    """

    def __init__(
        self,
        store: Any,
        restore: Callable[[Ready], None],
        loop: Any,
        written: Written,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._store = store
        self._restore = restore
        self._process: Process = loop.process
        self._process.log_writer = self
        self._durability = self._process.machine.world.durability
        self._written = written
        self._failed = failed
        self._pending: Ready | None = None
        self._purge_due = False
        self._look_for_purges()

    def submit(self, ready: Ready) -> None:
        self._pending = ready
        machine = self._process.machine
        times = 1 if ready.snapshot is None else 30
        machine.world.scheduler.after(times * machine.write_ns(), self._wait_for_disk)

    def stop(self, timeout_s: float) -> bool:
        if self._pending is not None:
            if self._process.machine.stalled_until > self._process.machine.world.scheduler.now:
                return False
            self._finish()
        self._pending = None
        return True

    def crash(self) -> None:
        """What was being written reaches the disk, or a part of it, or nothing."""
        ready, self._pending = self._pending, None
        machine = self._process.machine
        if ready is None or machine.rng.random() < 0.4:
            return
        machine.disk.fuse = machine.rng.choice((0, 1, 2, 3, 5, 1000))
        try:
            self._save(ready)
            machine.world.count("write survived unheard")
        except (Crash, FatalError):
            pass

    def _save(self, ready: Ready) -> None:
        machine = self._process.machine
        if ready.snapshot is not None:
            self._durability.installing(machine, ready.snapshot.log_id)
            self._restore(ready)
        else:
            self._store.save(ready.hard_state, ready.entries)
        self._durability.log_changed(machine)

    def _wait_for_disk(self) -> None:
        machine, scheduler = self._process.machine, self._process.machine.world.scheduler
        if self._process.loop.dead or self._pending is None:
            return
        if machine.stalled_until > scheduler.now:
            machine.world.count_quietly(f"write stalled by {machine.stalled_by}")
            scheduler.at(machine.stalled_until, self._wait_for_disk)
        else:
            self._process.run(self._finish)

    def _finish(self) -> None:
        ready, self._pending = self._pending, None
        if ready is None:
            return
        machine = self._process.machine
        installs = ready.snapshot is not None and "fuse" in machine.world.plan.faults
        if installs and machine.rng.random() < 0.3:  # between two steps of it
            machine.disk.fuse = machine.rng.randint(0, 20)
        error: BaseException | None = None
        try:
            self._save(ready)
        except Crash:
            if ready.snapshot is not None:
                machine.world.count("install crashed")
            raise
        except BaseException as caught:  # as the real one: carried to the loop
            error = caught
        if ready.snapshot is not None and error is None:
            machine.world.count("snapshot installed")
        self._written(ready, error, 0.001)

    def _look_for_purges(self) -> None:
        process = self._process
        if not process.loop.dead:
            process.machine.world.scheduler.after(PURGE_EVERY_NS, self._look_for_purges)
            if self._pending is None and self._store.purge_pending:
                process.run(self._purge)

    def _purge(self) -> None:
        try:
            self._store.purge_step()
            self._durability.log_changed(self._process.machine)
            self._process.machine.world.count("log purged")
        except Crash:
            raise
        except BaseException as error:
            self._failed(error)


class WriterProcess:
    """Takes the place of dengine.node.writer_process.WriterProcess."""

    def __init__(self) -> None:
        loop: Any = asyncio.get_running_loop()
        self._process: Process = loop.process
        self._busy = False
        self._killed_for = ""
        self.pid = None

    def kill(self, reason: str) -> None:
        if self._busy:
            self._killed_for = self._killed_for or reason

    async def run(
        self,
        job: Job,
        report: Callable[[int, int], None] | None = None,
        watch: Callable[[], str | None] | None = None,
    ) -> Done:
        self._busy, self._killed_for = True, ""
        process, name = self._process, type(job).__name__
        process.job = name
        rng = process.machine.rng
        try:
            steps = rng.randint(1, 6)
            for step in range(steps):
                await asyncio.sleep(rng.random() * 0.04)
                if report is not None:
                    report(step, steps)
                reason = (watch() if watch is not None else None) or self._killed_for
                if reason:
                    raise TryAgain(reason)
            return self._at_once(job, name.lower())
        finally:
            self._busy = False
            process.job = ""

    def _at_once(self, job: Job, name: str) -> Done:
        """All of it, unless the node or the writer alone dies between two of its effects."""
        machine = self._process.machine
        count, disk = machine.world.count, machine.disk
        if "fuse" in machine.world.plan.faults and machine.rng.random() < DIES:
            disk.writer_fuse = machine.rng.randint(0, 12)
        fails = machine.world.faults.on and "eio" in machine.world.plan.faults
        if isinstance(job, Fetch) and fails and machine.rng.random() < FAILS:
            disk.eio, disk.eio_kind, disk.eio_times = 0, "file sync", machine.rng.choice((1, 3))
        try:
            done = self._carry_out(job)
        except WriterDied:
            count(f"writer died in a {name}")
            raise TryAgain("the snapshot writer ended with signal SIGKILL") from None
        except Crash:
            count(f"{name} crashed")
            raise
        finally:
            disk.writer_fuse = None
        count(f"{name} done")
        return done

    @staticmethod
    def _carry_out(job: Job) -> Done:
        """As dengine.snapshot_writer.main."""
        try:
            if isinstance(job, Check):
                return snapshot_writer._check(job)
            return snapshot_writer._done(snapshot_writer._carry_out(job))
        except OSError as error:
            raise StorageIO(f"{error.filename}: {error.strerror or error}") from error


class Pace:
    """Takes the place of dengine.snapshot_writer._Pace: a job takes no time of its own."""

    def __init__(self, max_bytes_per_s: int | None = None) -> None:
        pass

    def report(self, done: int, total: int) -> None:
        pass

    def lives(self, _: int) -> None:
        pass


def pieces(job: Fetch, have: int) -> Iterator[tuple[int, bytes]]:
    """As dengine.snapshot_writer._pieces."""
    loop: Any = asyncio.get_running_loop()
    process: Process = loop.process
    world, me, rng = process.machine.world, process.machine.id, process.machine.rng
    if have >= job.ref.size_bytes:
        return
    machine = world.machine_at(job.address)
    source = None if machine is None else machine.process
    if machine is None or source is None or not source.serves:
        world.count("snapshot cut")
        raise TryAgain("the source of the snapshot is gone")
    network = world.network
    if not (network.up(me, machine.id) and network.up(machine.id, me)):
        world.count("snapshot cut")
        raise TryAgain("the connection to the source of the snapshot broke")
    content = source.serve_snapshot(job.ref, me, have)
    if content is None:
        raise TryAgain("the source has no such snapshot any more")
    if have:
        world.count("fetch resumed")
    step = max(1, len(content) // rng.randint(1, PIECES_MAX))
    for start in range(have, len(content), step):
        if rng.random() < CUT:
            world.count("snapshot cut")
            raise TryAgain("the connection to the source of the snapshot broke")
        data = content[start : start + step]
        source.sent_snapshot(me, len(data))
        yield start, data


class StateReader:
    """As dengine.storage.state_reader.StateReader."""

    def __init__(self, path: SimPath) -> None:
        self._file = file = path / DATA_FILE
        node, self.tables = file._find(), dict[bytes, Table]()
        if node is not None and node.environment is not None:
            if not node.environment.unreadable:
                self.tables = {n: t for n, t in node.environment.tables.items() if n}
        elif node is not None:
            image = unpacked(node.content) or {}
            self.tables = {name: Table(data) for name, data in image.items() if name}
        self.records = sum(len(table.keys) for table in self.tables.values())
        self.data_bytes = 4096 + 64 * self.records
        meta = self.tables[b"meta"].data if b"meta" in self.tables else {}
        found = read_applied(meta.get(APPLIED_KEY, b"0000"))
        if found is None:
            raise self._damaged("it does not say what it has applied")
        self.applied, self.digest = found
        raw = meta.get(MEMBERSHIP_KEY)
        if raw is None or crc32(raw, crc32(MEMBERSHIP_KEY)) != CRC_RESIDUE:
            raise self._damaged("its membership is missing or fails its CRC")
        self.membership = decode_membership(raw[:-CRC_BYTES])

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check(self, progress: Callable[[int], None] | None = None) -> None:
        total = 0
        for name, table in sorted(self.tables.items()):
            for key, raw in table.data.items():
                if crc32(raw, crc32(key)) != CRC_RESIDUE:
                    raise self._damaged(f"the record of {key!r} fails its CRC")
                if name != b"meta" or key != APPLIED_KEY:
                    total += record_hash(DATABASES[name], key, raw)
        if sum_bytes(total) != self.digest.state_hash:
            raise self._damaged("its records do not add up to its state hash")

    def copy(self, write: Callable[[bytes], object]) -> None:
        write(packed(self.tables))

    def _damaged(self, what: str) -> DataCorruption:
        return DataCorruption(f"{self._file} is damaged: {what}", file=str(self._file))


def check_state(path: SimPath, progress: Callable[[int], None] | None = None) -> StateReader:
    """As dengine.storage.state_reader.check_state."""
    with StateReader(path) as reader:
        reader.check(progress)
    return reader
