"""Faults at exactly one system call of a real process, injected by strace.

strace counts occurrences per thread, and a subprocess that is started again counts from one again;
so whoever wants a fault once detaches strace as soon as the fault has shown.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster import POLL_S, wait_for


class Fault(enum.Enum):
    """What happens at a point. The kills come right after the call, the errors instead of it."""

    NODE_KILLED = "node killed"
    WRITER_KILLED = "writer killed"
    EIO = "EIO"
    ENOSPC = "ENOSPC"

    @property
    def is_error(self) -> bool:
        return self in (Fault.EIO, Fault.ENOSPC)


@dataclass
class Injection:
    """strace with one fault armed: at call number `occurrence` of `syscalls` on one of `paths`.

    A kill is a SIGSTOP by strace, which freezes the whole process right after the call, and a
    SIGKILL by the test: so the node can be killed while the subprocess is at the point.
    """

    log: Path
    syscalls: str
    paths: Sequence[Path]
    fault: Fault
    occurrence: int
    children: bool  # watch what the node starts; else only the threads that the node has now
    _attached: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def _options(self) -> list[str]:
        effect = "signal=STOP" if not self.fault.is_error else f"error={self.fault.value}"
        # An I/O error passes, as after fsync; a full disk stays full.
        when = f"{self.occurrence}{'+' if self.fault is Fault.ENOSPC else ''}"
        inject = f"inject={self.syscalls}:{effect}:when={when}"
        only = [option for path in self.paths for option in ("-P", str(path))]
        follow = ["-f"] if self.children else []
        output = ["-qq", "-o", str(self.log)]
        return [*follow, *output, "-e", f"trace={self.syscalls}", *only, "-e", inject]

    @property
    def prefix(self) -> list[str]:
        """A command that runs a node under it from the start. -D: the node keeps its own pid."""
        return ["strace", "-D", *self._options()]

    def attach(self, pid: int) -> None:
        """Watch a running node, which may be stopped."""
        watched = [pid] if self.children else _threads(pid)
        pids = [option for thread in watched for option in ("-p", str(thread))]
        self._attached = subprocess.Popen(
            ["strace", *self._options(), *pids],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

        wait_for(
            lambda: all(_tracer(thread) for thread in _threads(pid)),
            "strace to have attached to every thread",
        )

    def seen(self, node: int) -> int:
        """The thread in which the fault has happened; 0 as long as it has not."""
        mark = (
            "(INJECTED)"
            if self.fault.is_error
            else "--- SIGSTOP {si_signo=SIGSTOP, si_code=SI_KERNEL"
        )
        with contextlib.suppress(FileNotFoundError):
            for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
                if mark in line:
                    first = line.split(None, 1)[0]
                    return int(first) if first.isdigit() else node  # it watches one thread only
        return 0

    def detach(self, pid: int) -> None:
        """End strace, wherever it came from; the processes it watched go on by themselves."""
        if self._attached is None:
            if tracer := _tracer(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(tracer, signal.SIGKILL)
                wait_for(lambda: not _tracer(pid), "strace to be gone")
        else:
            self._attached.kill()
            self._attached.communicate()
            self._attached = None


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
