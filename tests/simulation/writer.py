"""What a node leaves to a thread and to a process of its own: log writes, and snapshot files.

A simulated snapshot file is the content of the state's LMDB file and a header, in msgpack, with a
CRC. Taking, verifying and unpacking check what the real ones check (dengine/storage/snapshots.py).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import msgspec

from dengine.errors import DataCorruption, FatalError, StorageIO, TryAgain
from dengine.node.log_writer import Written
from dengine.raft.membership import Membership, decode_membership
from dengine.raft.raft import Ready
from dengine.raft.types import LogId, SnapshotRef
from dengine.storage.directory import UNPACKED_MARK
from dengine.storage.environment import CRC_BYTES, CRC_RESIDUE, DATA_FILE
from dengine.storage.snapshot_file import SnapshotHeader, parse_name, snapshot_name
from dengine.storage.snapshot_jobs import Check, Done, Fetch, Job, Take, Unpack, Verify
from dengine.storage.state_records import (
    APPLIED_KEY,
    DATABASES,
    MEMBERSHIP_KEY,
    StateDigest,
    read_applied,
    record_hash,
    sum_bytes,
)
from tests.simulation.disk import SimPath, rmtree, sync_directory
from tests.simulation.environment import Environment
from tests.simulation.loop import MS, Crash

if TYPE_CHECKING:
    from tests.simulation.machine import Process

PURGE_EVERY_NS = 20 * MS


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
        if ready.snapshot is not None:
            self._restore(ready)
        else:
            self._store.save(ready.hard_state, ready.entries)

    def _wait_for_disk(self) -> None:
        machine, scheduler = self._process.machine, self._process.machine.world.scheduler
        if self._process.loop.dead or self._pending is None:
            return
        if machine.stalled_until > scheduler.now:
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
            raise
        except BaseException as caught:  # as the real one: carried to the loop
            error = caught
        if ready.snapshot is not None:
            self._process.machine.world.count("snapshot installed")
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
        self._process.job = type(job).__name__
        rng = self._process.machine.rng
        try:
            steps = rng.randint(1, 6)
            for step in range(steps):
                await asyncio.sleep(rng.random() * 0.04)
                if report is not None:
                    report(step, steps)
                reason = (watch() if watch is not None else None) or self._killed_for
                if reason:
                    raise TryAgain(reason)
            done = self._carry_out(job)
            self._process.machine.world.count(f"{type(job).__name__.lower()} done")
            return done
        finally:
            self._busy = False
            self._process.job = ""

    def _carry_out(self, job: Job) -> Done:
        match job:
            case Take(state=state, directory=directory, node_id=node_id):
                return _done(take(SimPath(state), SimPath(directory), node_id), self._process)
            case Verify(file=file):
                info = read_snapshot(SimPath(file))
                return _done(info, self._process)
            case Check(state=state):
                header = check_state(SimPath(state))[0]
                return Done(state, SnapshotRef(header.index, header.term, "", 0), 0)
            case Unpack(file=file, state=state):
                return _done(unpack(SimPath(file), SimPath(state), _ignore), self._process)
            case Fetch():
                return self._fetch(job)
        raise AssertionError(job)

    def _fetch(self, job: Fetch) -> Done:
        world, me = self._process.machine.world, self._process.machine.id
        source = world.machine_at(job.address)
        if source is None or source.process is None or not source.process.serves:
            world.count("snapshot cut")
            raise TryAgain("the source of the snapshot is gone")
        network = world.network
        if not (network.up(me, source.id) and network.up(source.id, me)):
            world.count("snapshot cut")
            raise TryAgain("the connection to the source of the snapshot broke")
        content = source.process.serve_snapshot(job.ref, me)
        if content is None:
            raise TryAgain("the source has no such snapshot any more")
        directory = SimPath(job.directory)
        _make_directory(directory)
        received = directory / "received.partial"
        received.write(content)
        info = read_snapshot(received, TryAgain)
        if info.ref != job.ref:
            received.unlink()
            raise TryAgain("what was received is not the file that was offered")
        file = directory / f"fetch-{job.ref.sha256}.partial"
        received.rename(file)
        done = unpack(file, SimPath(job.state), _ignore)
        return _done(done, self._process)


class Snapshot(NamedTuple):
    """A sound file, as dengine.storage.snapshot_file.SnapshotInfo describes one."""

    path: SimPath
    header: SnapshotHeader
    ref: SnapshotRef
    tables: dict[str, list[tuple[bytes, bytes]]]


class _Content(msgspec.Struct):
    header: SnapshotHeader
    tables: dict[str, list[tuple[bytes, bytes]]]


_decoder = msgspec.msgpack.Decoder(_Content)


def _ignore(done: int, total: int) -> None:
    pass


def _done(info: Snapshot, process: Process) -> Done:
    return Done(str(info.path), info.ref, info.header.taken_at_s)


def _damaged(path: SimPath, what: str) -> DataCorruption:
    return DataCorruption(f"{path} is damaged: {what}", file=str(path))


def check_state(path: SimPath) -> tuple[SnapshotHeader, Environment]:
    """Every record of a state, against their CRCs and the state hash. Raises DataCorruption."""
    file = path / DATA_FILE
    node = file._find()
    if node is None or node.environment is None or node.environment.unreadable:
        raise _damaged(file, "it is no state")
    tables = {name: table.data for name, table in node.environment.tables.items() if name}
    total, records = 0, 0
    for name, data in sorted(tables.items()):
        for key, raw in data.items():
            if crc32(raw, crc32(key)) != CRC_RESIDUE:
                raise _damaged(file, f"the record of {key!r} fails its CRC")
            if name != b"meta" or key != APPLIED_KEY:
                total += record_hash(DATABASES[name], key, raw)
            records += 1
    found = read_applied(tables.get(b"meta", {}).get(APPLIED_KEY, b"0000"))
    if found is None:
        raise _damaged(file, "what it has applied is unreadable")
    applied, digest = found
    if digest != StateDigest(applied.index, digest.revision, sum_bytes(total)):
        raise _damaged(file, "its records do not have its hash")
    raw = tables[b"meta"].get(MEMBERSHIP_KEY)
    membership = decode_membership(raw[:-CRC_BYTES]) if raw is not None else Membership()
    header = SnapshotHeader(
        membership.cluster_id,
        0,
        applied.index,
        applied.term,
        digest.revision,
        digest.state_hash,
        membership,
        records,
        0,
    )
    return header, node.environment


def take(state: SimPath, directory: SimPath, node_id: int) -> Snapshot:
    """As dengine.storage.snapshots.take. Raises DataCorruption, StorageIO."""
    header, environment = check_state(state)
    header = msgspec.structs.replace(header, node_id=node_id)
    tables = {
        name.decode(): sorted(table.data.items())
        for name, table in environment.tables.items()
        if name
    }
    body = msgspec.msgpack.encode(_Content(header, tables))
    file = directory / snapshot_name(header.log_id)
    _make_directory(directory)
    if directory.disk.full:
        raise StorageIO(f"cannot write {file}: No space left on device")
    partial = file.with_name(file.name + ".partial")
    partial.write(body + crc32(body).to_bytes(4, "big"))
    partial.rename(file)
    sync_directory(directory)
    return read_snapshot(file)


def read_snapshot(file: SimPath, error: type[FatalError] = DataCorruption) -> Snapshot:
    """A whole file, checked. Raises `error`."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise error(f"{file} is gone", file=str(file)) from None
    body, crc = content[:-4], content[-4:]
    if crc32(body).to_bytes(4, "big") != crc:
        raise error(f"{file} is damaged: it fails its CRC", file=str(file))
    found = _decoder.decode(body)
    header, sha256 = found.header, hashlib.sha256(content).hexdigest()
    ref = SnapshotRef(header.index, header.term, sha256, len(content))
    return Snapshot(file, header, ref, found.tables)


def name_durably(file: SimPath, name: str) -> SimPath:
    """As dengine.storage.snapshot_file.name_durably."""
    file.rename(file.with_name(name))
    sync_directory(file.parent)
    return file.with_name(name)


def read_header(file: SimPath) -> SnapshotHeader:
    return read_snapshot(file).header


def unpack(file: SimPath, state: SimPath, progress: Callable[[int, int], None]) -> Snapshot:
    """As dengine.storage.snapshots.unpack. Raises DataCorruption."""
    rmtree(state, ignore_errors=True)
    info = read_snapshot(file)
    state.mkdir(mode=0o700)
    node = state.disk.make(state / DATA_FILE)
    node.environment = Environment(durable=False)
    node.environment.load({b"": {}} | {n.encode(): dict(rows) for n, rows in info.tables.items()})
    node.environment.synced = node.environment.copy()
    header, _ = check_state(state)
    assert header.state_hash == info.header.state_hash
    (state / UNPACKED_MARK).touch(mode=0o600)
    sync_directory(state)
    sync_directory(state.parent)
    return info


def _make_directory(directory: SimPath) -> None:
    if not directory.exists():
        directory.mkdir(mode=0o700)
        sync_directory(directory.parent)


def log_id_of(file: SimPath) -> LogId | None:
    return parse_name(file.name)
