"""What `dengine lock` and `elect` do around COMMAND: its end, its signals, its orphans, and what is
said of a lock that is waited for or lost."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.fake_server import ClusterThread, cluster_thread
from tests.test_cli_coordination import WAIT_S, Commands, alive, hang, heal, until

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
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


# --- a lock that is lost


def test_a_command_ends_with_its_lock_also_where_nobody_reads_stderr(
    served: ClusterThread, commands: Commands, tmp_path: Path, full_pipe: tuple[int, int]
) -> None:
    """As behind a pager, or after Ctrl-S. What there is to say is said when it is read."""
    reading, writing = full_pipe
    script = f"echo $$ > {tmp_path}/pid; exec sleep 1000"
    lock = ("lock", "job", "--ttl", "2", "--", "sh", "-c", script)
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
