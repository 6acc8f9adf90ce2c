"""What `dengine lock` and `elect` do around COMMAND: its end, its signals, its orphans, and what is
said of a lock that is waited for or lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.client.fake_server import ClusterThread, cluster_thread
from tests.test_cli_coordination import WAIT_S, Commands, alive, hang, heal, queued, until

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(name="served")
def fake_cluster_of_three() -> Iterator[ClusterThread]:
    with cluster_thread(3) as thread:
        yield thread


@pytest.fixture(name="commands")
def processes(served: ClusterThread) -> Iterator[Commands]:
    commands = Commands(served)
    yield commands
    commands.end()


@pytest.fixture
def full_pipe() -> Iterator[tuple[int, int]]:
    """Its ends, to read and to write; nothing more goes into it."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writing, True)
    yield reading, writing
    os.close(reading)
    os.close(writing)


def pid_in(file: Path) -> int:
    """The process id that a command writes there as it begins."""
    until(lambda: file.exists() and file.read_text().endswith("\n"), "the command")
    return int(file.read_text())


def proc_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return {name: value.strip() for name, _, value in (text.partition(":") for text in lines)}


# --- its command


def test_a_command_that_cannot_be_run_is_told_as_shells_do(
    commands: Commands, tmp_path: Path
) -> None:
    """Before any lock is waited for; a mere name is looked for on the PATH, as ever."""
    (tmp_path / "script").write_text("#!/bin/sh\n")
    for there in (tmp_path / "script", tmp_path):
        done = commands.run("lock", "job", "--", str(there))
        assert (done.returncode, done.stderr) == (126, f"dengine: {there}: is not executable\n")
    for name in ("no-such-command-here", "tests", str(tmp_path / "nothing")):
        done = commands.run("lock", "job", "--", name)
        assert (done.returncode, done.stderr) == (
            127,
            f"dengine: {name}: there is no such command\n",
        )


def test_a_file_that_the_kernel_cannot_start_is_told_and_the_lock_given_back(
    commands: Commands, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    program.write_text("of no format\n")
    program.chmod(0o755)
    for _ in range(2):  # without waiting for the end of the first one's lease
        done = commands.run("lock", "unstartable", "--", str(program))
        assert (done.returncode, done.stderr) == (126, f"dengine: {program}: Exec format error\n")


@pytest.mark.parametrize(
    "words", [("lock", "job"), ("lock", "job", "sleep", "1"), ("elect", "job", "me", "ls", "-l")]
)
def test_a_command_without_its_dashes_is_told_of_them(
    commands: Commands, words: tuple[str, ...]
) -> None:
    done = commands.run(*words)
    assert done.returncode == 2
    assert "-- COMMAND" in done.stderr.splitlines()[-1]
    misspelt = commands.run(*words[:2], "--no-such-option", "--", "true")
    assert misspelt.returncode == 2
    assert misspelt.stderr.endswith("unrecognized arguments: --no-such-option\n")


def test_help_says_what_goes_on_without_the_lock(commands: Commands) -> None:
    assert "After a normal end of COMMAND" in commands.run("lock", "--help").stdout


# --- a lock that is lost


def test_a_command_ends_with_its_lock_also_where_nobody_reads_stderr(
    served: ClusterThread, commands: Commands, tmp_path: Path, full_pipe: tuple[int, int]
) -> None:
    """As behind a pager, or after Ctrl-S. What there is to say is said when it is read."""
    reading, writing = full_pipe
    script = f"echo $$ > {tmp_path}/pid; exec sleep 1000"
    lock = ("lock", "job", "--ttl", "3", "--", "sh", "-c", script)
    holding = commands.start(*lock, stderr=writing)
    pid = pid_in(tmp_path / "pid")
    served.do(hang)
    until(lambda: not alive(pid), "the command to end")
    assert holding.poll() is None, "it waits for its reader"
    os.set_blocking(reading, False)
    said = b""

    def drained() -> bool:
        nonlocal said
        with contextlib.suppress(BlockingIOError):
            said += os.read(reading, 1 << 20)
        return b"is LOST" in said

    until(drained, "the message")
    assert holding.wait(WAIT_S) == 1
    served.do(heal)


def ended_for(holding: subprocess.Popen[str]) -> str:
    """What is said of a lock that is lost."""
    _, err = holding.communicate(timeout=WAIT_S)
    assert holding.returncode == 1
    return err


def test_how_a_lock_was_lost_is_said(
    served: ClusterThread, commands: Commands, tmp_path: Path
) -> None:
    """Somebody deleted its key, or the cluster was silent; nobody looks for the one where it was
    the other.
    """

    def held(file: Path) -> subprocess.Popen[str]:
        script = f"echo $$ > {file}; exec sleep 1000"
        holding = commands.start("lock", "job", "--ttl", "3", "--", "sh", "-c", script)
        pid_in(file)
        return holding

    holding = held(tmp_path / "first")
    commands.run("delete", "--prefix", "_lock/job/")
    assert "LOST: its key is gone: it was deleted, or its lease has ended" in ended_for(holding)
    holding = held(tmp_path / "second")
    served.do(hang)
    assert "it was not renewed for 3 s" in ended_for(holding)
    served.do(heal)


def test_a_holder_that_was_stopped_does_not_blame_the_cluster(
    served: ClusterThread, commands: Commands, tmp_path: Path
) -> None:
    script = f"echo $$ > {tmp_path}/pid; exec sleep 1000"
    holding = commands.start("lock", "job", "--ttl", "3", "--", "sh", "-c", script)
    pid = pid_in(tmp_path / "pid")
    holding.send_signal(signal.SIGSTOP)
    until(lambda: queued(served, "job") == 0, "the lease to end")
    holding.send_signal(signal.SIGCONT)
    said = ended_for(holding)
    assert "it was not renewed for 3 s" in said or "its lease has ended" in said
    assert not alive(pid)


# --- a lock that is waited for


def line_with(text: str, stream: IO[str] | None) -> str:
    """The first line that has `text` in it."""
    assert stream is not None
    return next(line for line in stream if text in line).rstrip("\n")


def test_a_cluster_that_is_out_of_reach_is_named(commands: Commands) -> None:
    """Not the lock: nobody has looked at it."""
    nowhere = ("lock", "job", "--endpoint", "127.0.0.1:1")
    failed = commands.run(*nowhere, "--wait", "1", "--", "true")
    assert failed.returncode == 1
    assert "could not be had within 1 s: no answer within" in failed.stderr
    assert "127.0.0.1:1: refused" in failed.stderr
    waiting = commands.start(*nowhere, "--timeout", "1", "--", "true")
    said = line_with("no answer within", waiting.stderr)
    assert said.startswith("dengine: waiting for lock 'job': ")
    assert "127.0.0.1:1: refused" in said


def test_waiting_is_told_only_to_who_listens(
    served: ClusterThread, commands: Commands, tmp_path: Path, full_pipe: tuple[int, int]
) -> None:
    """Nobody hears the first waiter, who gets the lock in his turn all the same."""
    holder = commands.start("lock", "job", "--", "sleep", "1000")
    until(lambda: queued(served, "job") == 1, "the holder")
    unheard = commands.start("lock", "job", "--", "touch", f"{tmp_path}/had", stderr=full_pipe[1])
    until(lambda: queued(served, "job") == 2, "the first waiter")
    heard = commands.start("lock", "job", "--", "true")
    said = line_with("another holds it", heard.stderr)
    assert said == "dengine: waiting for lock 'job': another holds it"
    holder.terminate()
    assert [unheard.wait(WAIT_S), heard.wait(WAIT_S)] == [0, 0]
    assert (tmp_path / "had").exists()


# --- its signals


@pytest.mark.parametrize(
    ("number", "through"),
    [
        (signal.SIGHUP, ("nohup",)),
        (signal.SIGINT, ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")),
    ],
)
def test_an_ignored_signal_stays_ignored(
    commands: Commands, tmp_path: Path, number: signal.Signals, through: tuple[str, ...]
) -> None:
    """By the command too: `nohup dengine lock` goes on when its terminal is gone, and what a script
    starts with & hears no Ctrl-C."""
    script = f"echo $$ > {tmp_path}/pid; exec sleep 1000"
    holding = commands.start("lock", "job", "--", "sh", "-c", script, through=through)
    pid = pid_in(tmp_path / "pid")
    for one in (pid, holding.pid):
        assert int(proc_status(one)["SigIgn"], 16) & 1 << (number - 1)
        os.kill(one, number)
    holding.terminate()  # handled after what came before
    assert holding.wait(WAIT_S) == 128 + signal.SIGTERM


# --- its orphans


def test_what_the_command_leaves_behind_leaves_no_zombies(
    commands: Commands, tmp_path: Path
) -> None:
    """A daemon that starts others for weeks would fill the table of processes. The command's own
    exit code is told as ever.
    """
    orphans = "for n in $(seq 20); do (sh -c 'exit 3' &); done"
    script = f"{orphans}; echo $$ > {tmp_path}/pid; read line < {tmp_path}/go; exit 7"
    os.mkfifo(tmp_path / "go")
    holding = commands.start("lock", "job", "--", "sh", "-c", script)
    pid = pid_in(tmp_path / "pid")
    children = Path(f"/proc/{holding.pid}/task/{holding.pid}/children")
    until(lambda: children.read_text().split() == [str(pid)], "the orphans to be gone")
    (tmp_path / "go").write_text("\n")
    assert holding.wait(WAIT_S) == 7
