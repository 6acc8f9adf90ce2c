"""Running `dengine.snapshot_writer`: one job at a time, watched, and killed when it hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from dengine.errors import DataCorruption, FatalError, StorageIO, TryAgain
from dengine.storage.environment import LMDB_SIGNALS
from dengine.storage.snapshot_jobs import (
    Check,
    Done,
    Failed,
    Fetch,
    Job,
    Progress,
    Take,
    Unpack,
    Verify,
    decode_event,
    encode_job,
)
from dengine.storage.snapshots import fetched_path

STALL_S = 30.0  # without a sign of life it is stuck
WATCH_S = 1.0  # at least so often is asked whether it may go on, whatever it says or does not say
LINE_BYTES_MAX = 65_536
DESCRIPTORS = 16  # more than a subprocess with two pipes takes while it is being started

Report = Callable[[int, int], None]
Watch = Callable[[], str | None]


class WriterProcess:
    """At most one subprocess at a time; this object owns it and nobody else signals it."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._busy = False
        self._killed_for = ""
        self._crashed: set[str] = set()  # what has ended its last reader

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def kill(self, reason: str) -> None:
        """End the job under way, if any; `run` raises TryAgain with `reason`."""
        if not self._busy:
            return
        self._killed_for = self._killed_for or reason
        if self._process is not None:
            _kill(self._process)

    async def run(self, job: Job, report: Report | None = None, watch: Watch | None = None) -> Done:
        """Carry out `job`.

        Args:
            report: told the bytes done and in all, a few times a second.
            watch: called at least once a second; what it returns, if anything, is the reason for
                which the job is killed.

        Raises:
            DataCorruption: what was read is damaged, or ended its reader twice in a row.
            StorageIO: the disk refused.
            TryAgain: it could not be started, hung, was killed, ran out of memory, or its peer
                failed.
        """
        self._busy, self._killed_for = True, ""
        try:
            ended, returncode = await self._run(job, report, watch)
        except TimeoutError:
            raise TryAgain(f"the snapshot writer gave no sign of life for {STALL_S:g} s") from None
        finally:
            self._busy = False
        if isinstance(ended, Done):
            self._crashed.discard(_read_by_lmdb(job))
            return ended
        raise self._failure(job, ended, returncode)

    async def _run(
        self, job: Job, report: Report | None, watch: Watch | None
    ) -> tuple[Done | Failed | None, int]:
        """The last event and the exit code. Raises TimeoutError; no process is left behind."""
        process = await self._start()
        self._process = process
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            if self._killed_for:  # while it was being started
                _kill(process)
            # One that is dead by now takes no job: uvloop says so by a RuntimeError.
            with suppress(ConnectionError, RuntimeError):
                process.stdin.write(encode_job(job))
                process.stdin.close()
            ended = await self._follow(process.stdout, report, watch)
            async with asyncio.timeout(STALL_S):
                return ended, await _ended(process)
        finally:
            _kill(process)
            await _ended(process)
            self._process = None

    async def _start(self) -> asyncio.subprocess.Process:
        starting = asyncio.get_running_loop().create_task(_spawn())
        try:
            return await asyncio.shield(starting)
        except OSError as error:  # it says nothing of the disk, and will not be so for ever
            raise TryAgain(
                f"the snapshot writer could not be started: {error.strerror or error}; is this "
                "node short of file descriptors or processes? Then raise LimitNOFILE or TasksMax"
            ) from error
        except asyncio.CancelledError:  # nobody else would know of it
            with suppress(OSError):
                process = await starting
                _kill(process)
                await _ended(process)
            raise

    async def _follow(
        self, events: asyncio.StreamReader, report: Report | None, watch: Watch | None
    ) -> Done | Failed | None:
        """Read events until the last one; None when the process ends without any."""
        heard = time.monotonic()
        while True:
            if watch is not None and (reason := watch()) is not None:
                self.kill(reason)
            try:
                async with asyncio.timeout(min(WATCH_S, STALL_S)):
                    line = await events.readline()
            except TimeoutError:
                if time.monotonic() - heard >= STALL_S:
                    raise
                continue
            heard = time.monotonic()
            if not line:
                return None
            try:
                event = decode_event(line)
            except msgspec.MsgspecError:
                return Failed(TryAgain.exit_code, f"the snapshot writer said {line[:200]!r}")
            if not isinstance(event, Progress):
                return event
            if report is not None:
                report(event.done_bytes, event.total_bytes)

    def _failure(self, job: Job, ended: Failed | None, returncode: int) -> FatalError:
        if self._killed_for:
            return TryAgain(self._killed_for)
        if ended is None:
            how = f"exit code {returncode}"
            if returncode < 0:
                how = f"signal {signal.Signals(-returncode).name}"
            what = _read_by_lmdb(job)
            if what and -returncode in LMDB_SIGNALS:
                if what in self._crashed:
                    self._crashed.remove(what)
                    return DataCorruption(f"{what} is damaged: LMDB cannot read it ({how})")
                self._crashed.add(what)  # one could be for want of memory
            return TryAgain(f"the snapshot writer ended with {how}")
        kinds: dict[int, type[FatalError]] = {65: DataCorruption, 74: StorageIO}
        return kinds.get(ended.exit_code, TryAgain)(ended.message)


def _read_by_lmdb(job: Job) -> str:
    """The state or the file of which LMDB reads all for `job`; empty where it reads none."""
    match job:
        case Take() | Check():
            return job.state
        case Unpack():
            return job.file
        case Fetch():
            return str(fetched_path(Path(job.directory), job.ref.sha256))
        case Verify():
            return ""


async def _ended(process: asyncio.subprocess.Process) -> int:
    """Its exit code, once it has ended. One that a dead disk holds up may take as long as that.

    The loop learns of it by SIGCHLD, which is lost when a debugger, or strace, attaches to this
    process or lets go of it just then; another one has the loop look again.
    """
    ending = asyncio.ensure_future(process.wait())
    try:
        while not (await asyncio.wait({ending}, timeout=WATCH_S))[0]:
            os.kill(os.getpid(), signal.SIGCHLD)
        return ending.result()
    finally:
        ending.cancel()


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):  # it has just ended by itself
            process.kill()


async def _spawn() -> asyncio.subprocess.Process:
    """Raises OSError.

    Not where file descriptors are short: an attempt of uvloop's that fails for want of them keeps
    those that it got, and after one the loop cannot be closed any more.
    """
    taken: list[int] = []
    try:
        while len(taken) < DESCRIPTORS:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for descriptor in taken:
            os.close(descriptor)
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "dengine.snapshot_writer",
        str(os.getpid()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_BYTES_MAX,
    )
