"""Faults at exactly one system call of a real process, injected by strace.

strace counts occurrences per thread, and a subprocess that is started again counts from one again;
so whoever wants a fault once detaches strace as soon as the fault has shown.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import POLL_S, wait_for

# On Debian 12 as root, where it has to be there, a skipped test is a failure (conftest.py).
needs_strace = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("strace") is None, reason="needs root and strace"
)


class Fault(enum.Enum):
    """What happens at a point. The kills come right after the call, the errors instead of it."""

    NODE_KILLED = "node killed"
    WRITER_KILLED = "writer killed"
    EIO = "EIO"
    ENOSPC = "ENOSPC"

    @property
    def is_error(self) -> bool:
        return self in (Fault.EIO, Fault.ENOSPC)


class Strace:
    """strace on one node. `children`: also on what it starts, else only on the threads it has.

    Args:
        log: what strace writes.
        options: what to trace, and what to do then.
    """

    def __init__(self, log: Path, options: Sequence[str], *, children: bool) -> None:
        self.log = log
        self._children = children
        follow = ["-f"] if children else []
        self._command = ["strace", *follow, "-qq", "-o", str(log), *options]
        self._attached: subprocess.Popen[bytes] | None = None

    @property
    def prefix(self) -> list[str]:
        """A command that runs a node under it from the start. -D: the node keeps its own pid."""
        return [*self._command, "-D"]

    def attach(self, pid: int) -> None:
        """Watch a running node, which may be stopped."""
        watched = [pid] if self._children else _threads(pid)
        self._attached = subprocess.Popen(
            [*self._command, *(option for thread in watched for option in ("-p", str(thread)))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # with what it starts to find out what the kernel can do
        )
        wait_for(
            lambda: all(_tracer(thread) for thread in _threads(pid)),
            "strace to have attached to every thread",
        )

    def detach(self, pid: int) -> None:
        """End strace, wherever it came from; the processes it watched go on by themselves."""
        if self._attached is None:
            if tracer := _tracer(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(tracer, signal.SIGKILL)
                wait_for(lambda: not _tracer(pid), "strace to be gone")
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._attached.pid, signal.SIGKILL)
            self._attached.wait()
            self._attached = None


class Injection(Strace):
    """One fault, armed: at call number `occurrence` of `syscalls` on one of `paths`.

    A kill is a SIGSTOP by strace, which freezes the whole process right after the call, and a
    SIGKILL by the test: so the node can be killed while the subprocess is at the point.
    """

    def __init__(
        self,
        log: Path,
        syscalls: str,
        paths: Sequence[Path],
        fault: Fault,
        occurrence: int,
        *,
        children: bool,
    ) -> None:
        effect = f"error={fault.value}" if fault.is_error else "signal=STOP"
        # An I/O error passes, as after fsync; a full disk stays full.
        when = f"{occurrence}{'+' if fault is Fault.ENOSPC else ''}"
        only = [option for path in paths for option in ("-P", str(path))]
        inject = ["-e", f"inject={syscalls}:{effect}:when={when}"]
        super().__init__(log, ["-e", f"trace={syscalls}", *only, *inject], children=children)
        stopped = "--- SIGSTOP {si_signo=SIGSTOP, si_code=SI_KERNEL"  # by strace, not by the test
        self._mark = "(INJECTED)" if fault.is_error else stopped

    def seen(self, node: int) -> int:
        """The thread in which the fault has happened; 0 as long as it has not."""
        with contextlib.suppress(FileNotFoundError):
            for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
                if self._mark in line:
                    first = line.split(None, 1)[0]
                    return int(first) if first.isdigit() else node  # it watches one thread only
        return 0


def process_of(thread: int) -> int:
    """The process that a thread belongs to; 0 when it is gone."""
    return _field(thread, "Tgid")


def wait_gone(pid: int, deadline_s: float = 5.0) -> None:
    """Wait until a process that is not ours to reap has ended."""
    end = time.monotonic() + deadline_s
    while process_of(pid) and _state(pid) != "Z":
        assert time.monotonic() < end, f"process {pid} still runs after {deadline_s} s"
        time.sleep(POLL_S)


def _threads(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(thread.name) for thread in Path(f"/proc/{pid}/task").iterdir()]
    return []


def _tracer(thread: int) -> int:
    return _field(thread, "TracerPid")


def _field(pid: int, name: str) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1])
    return 0


def _state(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        return stat.rpartition(")")[2].split()[0]
    return ""


# pid, name, then a descriptor with its path, a string, or a directory and a string.
_CALL = re.compile(
    r'\d+ +(?P<name>\w+)\((?:(?:\d+|AT_FDCWD)<(?P<fd>[^>]*)>(?:, )?)?(?:"(?P<text>[^"]*)")?'
)


@dataclass
class Call:
    """A call that strace has recorded: which, and on which file."""

    name: str
    path: Path
    creates: bool


def recorded(log: Path, cwd: Path) -> list[Call]:
    """The calls in a log that was written with `-f -y` by processes with the working directory
    `cwd`. Of a rename the old name counts."""
    calls = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        found = _CALL.match(line)
        if found is None:
            continue
        base = Path(found["fd"]) if found["fd"] else cwd
        text = "" if found["fd"] and not found["name"].endswith("at") else found["text"]
        path = base / text if text else base
        calls.append(Call(found["name"], path, "O_CREAT" in line))
    return calls
