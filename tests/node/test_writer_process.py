"""The owner of the snapshot writer, with a subprocess that behaves badly in its place."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import uvloop

from dengine.errors import DataCorruption, FatalError, TryAgain
from dengine.node import writer_process
from dengine.node.writer_process import DESCRIPTORS, WriterProcess
from dengine.raft.types import SnapshotRef
from dengine.storage.snapshot_jobs import (
    Check,
    Done,
    Fetch,
    Job,
    Take,
    Unpack,
    Verify,
    encode_event,
)
from tests.limits import descriptors_left
from tests.node.hosts import on_loop, until

A_JOB = Verify("file", 1)
REF = SnapshotRef(7, 1, "a" * 64, 1000)


def run(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    script: str,
    job: Job = A_JOB,
    times: int = 1,
) -> FatalError:
    """What becomes of a job, tried so often, when the subprocess is this shell script, with a
    limit of 0.5 s."""
    program = tmp_path / "writer"
    program.write_text(f"#!/bin/sh\ncat > /dev/null\necho $$ > {tmp_path}/pid\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(writer_process, "STALL_S", 0.5)

    async def attempts() -> FatalError:
        writer = WriterProcess()
        for _ in range(times):
            with pytest.raises(FatalError) as caught:
                await writer.run(job)
        return caught.value

    error = asyncio.run(attempts())
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)  # neither it nor a zombie of it is left
    return error


def test_a_silent_one_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a sign of life for the limit it is killed, and the job may be tried again."""
    error = run(monkeypatch, tmp_path, "exec sleep 60")
    assert isinstance(error, TryAgain)
    assert "no sign of life" in error.message


def test_one_that_is_stopped_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SIGSTOP looks like silence, and SIGKILL ends a stopped process as well."""
    assert "no sign of life" in run(monkeypatch, tmp_path, "kill -STOP $$").message


def test_one_that_cannot_be_started_may_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A node that has no file descriptor left goes on without snapshots, and takes them again when
    it has some."""
    program = tmp_path / "writer"
    program.write_text("#!/bin/sh\ncat > /dev/null\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))

    async def attempt() -> str:
        with pytest.raises(TryAgain) as caught:
            await WriterProcess().run(A_JOB)
        return caught.value.message

    async def attempts() -> None:
        assert "exit code 0" in await attempt()  # the first one sets things up for good
        before = len(os.listdir("/proc/self/fd"))
        for spare in range(24):
            with descriptors_left(spare):
                said = await attempt()
            assert ("LimitNOFILE" in said) == (spare < DESCRIPTORS)
            assert len(os.listdir("/proc/self/fd")) <= before, "an attempt keeps what it got"
        assert "exit code 0" in await attempt()

    uvloop.run(attempts())  # ends, unlike after a failed attempt by uvloop itself


def test_an_end_that_nobody_was_told_of_is_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A SIGCHLD can be lost, as when a debugger lets go of the node: it would wait for ever."""
    program = tmp_path / "writer"
    program.write_text("#!/bin/sh\nwhile ! [ -e go ]; do sleep 0.01; done\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(writer_process, "WATCH_S", 0.05)
    monkeypatch.chdir(tmp_path)
    libc, of_the_loop = ctypes.CDLL(None), ctypes.create_string_buffer(256)  # a struct sigaction
    writer = WriterProcess()

    async def attempt() -> None:
        job = asyncio.create_task(writer.run(A_JOB))
        await until(lambda: writer.pid is not None, "the writer")
        libc.sigaction(signal.SIGCHLD, None, of_the_loop)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        child = psutil.Process(writer.pid)
        (tmp_path / "go").touch()
        await until(lambda: child.status() == psutil.STATUS_ZOMBIE, "its end")
        libc.sigaction(signal.SIGCHLD, of_the_loop, None)
        with pytest.raises(TryAgain, match="exit code 0"):
            async with asyncio.timeout(10):
                await job

    uvloop.run(attempt())


def test_one_that_says_nothing_is_watched_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whether it may go on is asked all the time, not only when it reports something."""
    program = tmp_path / "writer"
    program.write_text("#!/bin/sh\ncat > /dev/null\nkill -STOP $$\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(writer_process, "WATCH_S", 0.01)
    reasons = iter([None, None, "it costs too much"])

    async def attempt() -> None:
        with pytest.raises(TryAgain, match="it costs too much"):
            await WriterProcess().run(A_JOB, watch=lambda: next(reasons, None))

    started = time.monotonic()
    asyncio.run(attempt())
    assert time.monotonic() - started < writer_process.STALL_S


def test_one_that_says_it_is_done_and_stays_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its last word does not make it hold anything for ever."""
    failed = '{"type":"Failed","exit_code":65,"message":"rotten"}'
    error = run(monkeypatch, tmp_path, f"echo '{failed}'\nexec sleep 60")
    assert "no sign of life" in error.message


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("kill -KILL $$", TryAgain, "signal SIGKILL"),
        ("exit 3", TryAgain, "exit code 3"),
        ("echo nonsense", TryAgain, "nonsense"),
        ('echo \'{"type":"Failed","exit_code":65,"message":"rotten"}\'', DataCorruption, "rotten"),
    ],
)
def test_every_bad_end_has_a_reason(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    script: str,
    kind: type[FatalError],
    message: str,
) -> None:
    """The error says how it ended, and its class whether another attempt helps."""
    error = run(monkeypatch, tmp_path, script)
    assert isinstance(error, kind)
    assert message in error.message


@pytest.mark.parametrize("signal", ["ABRT", "SEGV", "BUS"])
def test_a_state_that_ends_its_reader_twice_is_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, signal: str
) -> None:
    """LMDB ends a process that reads some kinds of damage. Once could be for want of memory."""
    script, check = f"kill -{signal} $$", Check("db/state-1")
    assert isinstance(run(monkeypatch, tmp_path, script, check), TryAgain)
    error = run(monkeypatch, tmp_path, script, check, times=2)
    assert isinstance(error, DataCorruption)
    assert "db/state-1 is damaged" in error.message
    assert isinstance(run(monkeypatch, tmp_path, script, times=3), TryAgain), "that read a file"


@pytest.mark.parametrize(
    ("job", "named"),
    [
        (Unpack("snapshots/snapshot-1-7.dsnap", "state-2"), "snapshots/snapshot-1-7.dsnap"),
        (Fetch("host:1", REF, 3, "c-1", "snapshots", "state-2"), f"fetch-{'a' * 64}.partial"),
    ],
)
def test_a_snapshot_whose_state_ends_its_reader_twice_is_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: Job, named: str
) -> None:
    """As a state is: else it would be unpacked again for ever."""
    script = "kill -ABRT $$"
    assert isinstance(run(monkeypatch, tmp_path, script, job), TryAgain)
    error = run(monkeypatch, tmp_path, script, job, times=2)
    assert isinstance(error, DataCorruption)
    assert f"{named} is damaged" in error.message


def test_what_ended_its_reader_once_has_nothing_to_do_with_the_next_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two that die in a row, over different things, say of neither that it is damaged; and one
    that was read in full since does not count any more."""
    program = tmp_path / "writer"
    program.touch(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    done = encode_event(Done("file", REF, 0)).decode()
    ends = {"dies": "kill -SEGV $$", "is done": f"echo '{done}'"}

    async def attempt(writer: WriterProcess, job: Job, how: str) -> type[FatalError] | None:
        program.write_text(f"#!/bin/sh\ncat > /dev/null\n{ends[how]}\n")
        try:
            await writer.run(job)
        except FatalError as error:
            return type(error)
        return None

    async def attempts() -> None:
        writer = WriterProcess()
        unpack, take = Unpack("file", "state-2"), Take("state-1", "snapshots", 1, 4096, 1)
        assert await attempt(writer, unpack, "dies") is TryAgain
        assert await attempt(writer, take, "dies") is TryAgain
        assert await attempt(writer, unpack, "is done") is None
        assert await attempt(writer, unpack, "dies") is TryAgain
        assert await attempt(writer, Check("state-1"), "dies") is DataCorruption

    asyncio.run(attempts())


def test_one_that_is_just_being_started_is_ended_too() -> None:
    """A node that stops in that very moment leaves no process behind."""

    async def test() -> None:
        others = psutil.Process().children()  # of other tests
        for steps in range(5):
            running = asyncio.create_task(WriterProcess().run(A_JOB))
            for _ in range(steps):
                await asyncio.sleep(0)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert psutil.Process().children() == others

    on_loop(test)


def test_one_that_dies_while_it_is_started_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """When memory runs out it may go before it has been given its job: only that job fails."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    start = WriterProcess._start

    async def start_and_see_it_end(self: WriterProcess) -> asyncio.subprocess.Process:
        process = await start(self)
        await process.wait()
        return process

    monkeypatch.setattr(WriterProcess, "_start", start_and_see_it_end)

    async def test() -> None:
        with pytest.raises(TryAgain, match="ended with exit code 1"):
            await WriterProcess().run(A_JOB)

    on_loop(test)


@pytest.mark.parametrize("cause", ["no interpreter", "no descriptors"])
def test_one_that_cannot_be_started_is_reported(
    monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    """What it takes to start a process may be lacking for a while: the node goes on, and nothing
    is held that the next attempt needs."""

    async def test() -> None:
        writer, executable = WriterProcess(), sys.executable

        async def one_that_starts() -> None:
            monkeypatch.setattr(sys, "executable", "/bin/false")
            with pytest.raises(TryAgain, match="exit code 1"):
                await writer.run(A_JOB)
            monkeypatch.setattr(sys, "executable", executable)

        await one_that_starts()  # the loop gets what it needs for any
        held = len(os.listdir("/proc/self/fd"))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if cause == "no interpreter":
            monkeypatch.setattr(sys, "executable", "/nowhere/python")
        else:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            for _ in range(5):
                with pytest.raises(TryAgain, match="could not be started: "):
                    await writer.run(A_JOB)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await until(lambda: len(os.listdir("/proc/self/fd")) <= held, "nothing to be held")
        await one_that_starts()

    on_loop(test)


def test_a_node_that_stops_does_not_wait_for_one_that_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever was told to end ends, and does not take that failure for one to be tried again."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")

    async def test() -> None:
        for steps in range(3):
            running = asyncio.create_task(WriterProcess().run(A_JOB))
            for _ in range(steps):
                await asyncio.sleep(0)
            if not running.done():
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running

    on_loop(test)
