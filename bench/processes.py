"""Child processes, ports and plain HTTP for the benchmark: small, synchronous, always bounded."""

from __future__ import annotations

import http.client
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

LOG_TAIL_LINES = 15


class BenchError(Exception):
    """The run itself broke; the message says what, where and what to do."""


class Process:
    """One child: started by the constructor, output in `log_path`, ended by its pid only."""

    def __init__(
        self,
        argv: Sequence[str],
        log_path: Path,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Start `argv`; output is appended to `log_path`; `environ` is added to ours."""
        self.argv = list(argv)
        self.log_path = log_path
        with log_path.open("ab") as log:
            self._child = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environ or {})},
            )
        self._stats = psutil.Process(self._child.pid)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether the child still runs."""
        return self._child.poll() is None

    def cpu_s(self) -> float:
        """CPU seconds used so far, user and system, all threads."""
        times = self._stats.cpu_times()
        return float(times.user + times.system)

    def rss_mib(self) -> float:
        """Resident memory in MiB."""
        return float(self._stats.memory_info().rss) / 2**20

    def kill(self) -> None:
        """SIGKILL, and wait until the kernel has taken the process away."""
        self._child.kill()
        self._child.wait(timeout=10)

    def stop(self, grace_s: float = 10.0) -> None:
        """SIGTERM, then SIGKILL when it is not gone within `grace_s` seconds."""
        if not self.alive:
            return
        self._child.send_signal(signal.SIGTERM)
        try:
            self._child.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def log_tail(self) -> str:
        """The last lines the child printed."""
        lines = self.log_path.read_text("utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])


def wait_until(
    condition: Callable[[], bool],
    what: str,
    within_s: float,
    processes: Sequence[Process] = (),
    every_s: float = 0.02,
) -> None:
    """Poll `condition`; `BenchError` after `within_s` or when one of `processes` ends."""
    deadline = time.monotonic() + within_s
    while not condition():
        for process in processes:
            if not process.alive:
                raise BenchError(
                    f"{' '.join(process.argv)}: ended while waiting for {what}; its last lines:\n"
                    f"{process.log_tail()}"
                )
        if time.monotonic() > deadline:
            tails = "\n".join(f"--- {p.log_path}\n{p.log_tail()}" for p in processes)
            raise BenchError(f"{what}: not within {within_s:g} s\n{tails}")
        time.sleep(every_s)


def free_ports(count: int) -> list[int]:
    """`count` free TCP ports below the ephemeral range.

    A port of the ephemeral range could become some connection's source while its node is down in
    the failover drill, and the node could then not come back.
    """
    found: list[int] = []
    for port in random.sample(range(20000, 32000), 2000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise BenchError(f"no {count} free TCP ports between 20000 and 32000: close something there")


def http_request(
    address: str,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 5.0,
) -> tuple[int, bytes] | None:
    """One request on its own connection: (status, body), or None when the link failed in between.

    `timeout_s` bounds each socket operation, so a healthy peer that answers late is given up too.
    """
    host, port = address.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=timeout_s)
    try:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
