"""Where the simulation takes the place of the world outside of dengine.

Names in modules are replaced for the time of one run; the code itself stays as it is. What is
replaced is time, chance, threads, the subprocess, the network, the file system and LMDB, and some
limits that a short run would never reach.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

from dengine import snapshot_writer
from dengine.errors import DataCorruption
from dengine.kv import expiry, once, recorder
from dengine.node import (
    backoff,
    cycle,
    entrance,
    exchange,
    installing,
    proposals,
    reader_watch,
    room,
    snapshot_turn,
    snapshots,
    status,
    transfers,
    verifying,
    watch_hub,
)
from dengine.node import node as node_module
from dengine.raft import log as raft_log
from dengine.raft import progress
from dengine.raft import raft as raft_module
from dengine.storage import (
    directory,
    log_store,
    marks,
    recovery,
    snapshot_file,
    snapshot_frames,
    state_store,
)
from dengine.storage import environment as storage_environment
from dengine.storage import snapshots as snapshots_storage
from tests.simulation import disk, machine, network, writer
from tests.simulation.joining import join

SYNC_BYTES = 300  # of a snapshot that is written, from one sync to the next

_BUILTIN = object()  # a module has no name of its own for it, as for `open`


class _Time:
    """The part of `time` that dengine.node uses, on the clock of whoever asks."""

    CLOCK_BOOTTIME = 7

    @staticmethod
    def clock_gettime_ns(_clock: int) -> int:
        return _process().machine.clock.boottime_ns()

    @staticmethod
    def monotonic() -> float:
        return _process().loop.time()

    @staticmethod
    def time() -> float:
        return _process().machine.clock.unix_ns() / 1e9

    perf_counter = monotonic


class _Secrets:
    @staticmethod
    def randbelow(bound: int) -> int:
        return _process().machine.rng.randrange(bound)


class _BootId:
    """/proc/sys/kernel/random/boot_id"""

    @staticmethod
    def read_text(encoding: str) -> str:
        return _process().machine.boot_id


class _Metrics:
    """Nobody scrapes here."""

    registry = None
    log_write_seconds = SimpleNamespace(observe=lambda seconds: None)
    entries_written = SimpleNamespace(inc=lambda count: None)

    def __init__(self, *_: object) -> None:
        pass

    def observe_request(self, route: str, seconds: float) -> None:
        pass


def _process() -> machine.Process:
    loop: Any = asyncio.get_running_loop()
    process: machine.Process = loop.process
    return process


def _urandom(count: int) -> bytes:
    return _process().machine.rng.randbytes(count)


class _Flusher:
    """The disk of a simulated machine writes what was not synced when it likes, anyway."""

    def __init__(self, *_: object) -> None: ...

    def start(self) -> None: ...

    def stop(self, timeout_s: float) -> bool:
        return True


def _counted(begin_anew: Callable[..., Any]) -> Callable[..., Any]:
    def begin(directory: Any, state: Any, error: DataCorruption, *args: Any) -> Any:
        if "rolled back" in error.message:
            _process().machine.world.count("rolled back and seen by itself")
        return begin_anew(directory, state, error, *args)

    return begin


def _replacements(limits: dict[str, int]) -> list[tuple[Any, str, Any]]:
    synced_steps = partial(snapshot_frames.SyncedSteps, step_bytes=SYNC_BYTES)
    simulated_os = disk.SimOs(lambda: _process().machine.disk, _urandom)
    return [
        (backoff, "time", _Time),
        (backoff, "RETRY_S_MIN", 0.05),
        (backoff, "RETRY_S_MAX", 0.5),
        (cycle, "time", _Time),
        (cycle, "LogWriter", writer.LogWriter),
        (cycle, "StateFlusher", _Flusher),
        (cycle, "TICK_MS", limits["tick_ms"]),
        (expiry, "KEYS_MAX", limits["expire_keys"]),
        (recorder, "WORK_KEYS_MAX", limits["work_keys"]),
        (once, "RESULTS_MAX", limits["results"]),
        (once, "OPAQUE_MAX", limits["opaque"]),
        (watch_hub, "time", _Time),
        (watch_hub, "PROGRESS_S", 0.3),
        (watch_hub, "QUEUE_MAX", limits["watch_queue"]),
        (watch_hub, "CATCH_UP_REVISIONS", limits["watch_step"]),
        (watch_hub, "CATCH_UP_S", 0.0 if limits["watch_step"] < 100 else 0.005),
        (status, "time", _Time),
        (transfers, "time", _Time),
        (snapshots, "time", _Time),
        (room, "os", simulated_os),
        (verifying, "shutil", disk),
        (snapshots, "Path", disk.SimPath),
        (snapshots, "WriterProcess", writer.WriterProcess),
        (snapshots, "POLL_S", 0.05),
        (snapshots, "RETRY_S_MIN", 0.05),
        (snapshot_turn, "TURN_S", 0.6),
        (snapshot_turn, "WAITING_MS", 300),
        (reader_watch, "time", _Time),
        (installing, "Path", disk.SimPath),
        (installing, "shutil", disk),
        (node_module, "os", simulated_os),
        (node_module, "NodeMetrics", _Metrics),
        (exchange, "Peers", network.Peers),
        (entrance, "join", join),
        (directory, "os", simulated_os),
        (directory, "shutil", disk),
        (directory, "secrets", _Secrets),
        (directory, "sync_directory", disk.sync_directory),
        (directory, "lock_directory", lambda path: 0),
        (directory, "BOOT_ID_FILE", _BootId),
        (recovery, "os", simulated_os),
        (recovery, "_begin_anew", _counted(recovery._begin_anew)),
        (recovery, "shutil", disk),
        (recovery, "sync_directory", disk.sync_directory),
        (recovery, "probe_log", lambda path: None),
        (recovery, "probe_state", lambda path: None),  # its damage never ends a process
        (snapshot_file, "os", simulated_os),
        (snapshot_file, "open", disk.open_file),
        (snapshot_file, "lock_partial", lambda path, fd: None),
        (snapshot_file, "sync_directory", disk.sync_directory),
        (snapshot_frames, "os", simulated_os),
        (snapshot_frames, "open", disk.open_file),
        (snapshot_writer, "Path", disk.SimPath),
        (snapshot_writer, "StateReader", writer.StateReader),
        (snapshot_writer, "_Pace", writer.Pace),
        (snapshot_writer, "_pieces", writer.pieces),
        (snapshot_writer, "os", simulated_os),
        (snapshot_writer, "SyncedSteps", synced_steps),
        (snapshots_storage, "StateReader", writer.StateReader),
        (snapshots_storage, "check_state", writer.check_state),
        (snapshots_storage, "os", simulated_os),
        (snapshots_storage, "shutil", disk),
        (snapshots_storage, "sync_directory", disk.sync_directory),
        (snapshots_storage, "time", _Time),
        (snapshots_storage, "SyncedSteps", synced_steps),
        (storage_environment, "os", simulated_os),
        (storage_environment, "sync_directory", disk.sync_directory),
        (log_store, "open_environment", machine.open_environment),
        (log_store, "padded", lambda path: nullcontext()),
        (log_store, "_PURGE_STEP", limits["purge_step"]),
        (state_store, "open_environment", machine.open_environment),
        (marks, "sync_directory", disk.sync_directory),
        (state_store, "DIGEST_EVERY", limits["digest_every"]),
        (proposals, "BATCH_COMMANDS_MAX", limits["batch_commands"]),
        (progress, "INFLIGHT_MAX", limits["inflight"]),
        (raft_module, "APPEND_BYTES_MAX", limits["append_bytes"]),
        (raft_log, "TAIL_ENTRIES_KEPT", limits["tail_entries"]),
    ]


@contextmanager
def installed(limits: dict[str, int]) -> Iterator[None]:
    """dengine lives in the simulation inside of this block.

    Args:
        limits: see `Plan.limits`.
    """
    before = []
    for module, name, replacement in _replacements(limits):
        before.append((module, name, vars(module).get(name, _BUILTIN)))
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for module, name, original in before:
            if original is _BUILTIN:
                delattr(module, name)
            else:
                setattr(module, name, original)
