"""One round of load: wrk against the leader of a system, CPU and memory of its nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from processes import BenchError
from systems import Load, System

SCRIPT = Path(__file__).with_name("requests.lua")
KEYS = 10_000
PRELOAD_CONNECTIONS = 64
PRELOAD_MAX_S = 120
WHILE_MAX_S = 300


@dataclass(frozen=True)
class Round:
    """What one round of wrk saw. `failed` counts non-2xx answers, socket errors and timeouts."""

    ops_per_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    requests: int
    failed: int
    cpu_percent: list[float]  # of one core; the leader first
    rss_mib: list[float]  # the leader first
    others_percent: float  # CPU that neither these nodes nor wrk used, of one core


def run_round(
    system: System, load: Load, connections: int, seconds: int, keys: int = KEYS
) -> Round:
    """Send `load` over `connections` connections for `seconds`; `BenchError` when wrk breaks."""
    leader = system.leader()
    nodes = [leader, *(node for node in system.nodes if node is not leader)]
    before = [node.process.cpu_s() for node in nodes]
    machine_before_s, wrk_before_s = _machine_cpu_s(), _children_cpu_s()
    arguments = [*system.wrk_arguments(load), str(keys)]
    seen = _wrk(f"http://{leader.address}", arguments, connections, seconds)
    duration_s = seen["duration_us"] / 1e6
    used = [node.process.cpu_s() - b for node, b in zip(nodes, before, strict=True)]
    ours_s = sum(used) + _children_cpu_s() - wrk_before_s
    others_s = _machine_cpu_s() - machine_before_s - ours_s
    failed = seen["status_errors"] + seen["socket_errors"] + seen["timeouts"]
    return Round(
        ops_per_s=(seen["requests"] - seen["status_errors"]) * load.operations / duration_s,
        p50_ms=seen["p50_us"] / 1000,
        p99_ms=seen["p99_us"] / 1000,
        max_ms=seen["max_us"] / 1000,
        requests=seen["requests"],
        failed=failed,
        cpu_percent=[100 * cpu_s / duration_s for cpu_s in used],
        rss_mib=[node.process.rss_mib() for node in nodes],
        others_percent=max(0.0, 100 * others_s / duration_s),
    )


def _machine_cpu_s() -> float:
    """CPU seconds all processes have used; time stolen by other virtual machines included."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.steal)


def _children_cpu_s() -> float:
    """CPU seconds of our children that have ended and been waited for: within a round, wrk's."""
    times = os.times()
    return times.children_user + times.children_system


def _wrk(url: str, arguments: list[str], connections: int, seconds: int) -> dict[str, int]:
    # One thread: its counter walks all keys, and the second core stays with the servers.
    options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s"]
    argv = ["wrk", *options, "-s", str(SCRIPT), url, "--", *arguments]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds + 60)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{' '.join(argv)}: still running after {error.timeout:g} s") from error
    return _result(argv, done.stdout, f"exit {done.returncode}:\n{done.stderr}")


def wrk_while(
    address: str, arguments: list[str], connections: int, going_on: Callable[[], bool]
) -> dict[str, int]:
    """Load that lasts as long as `going_on` says; what wrk saw in that time."""
    options = ["-t1", f"-c{connections}", f"-d{WHILE_MAX_S}s", "--timeout", "10s"]
    argv = ["wrk", *options, "-s", str(SCRIPT), f"http://{address}", "--", *arguments, str(KEYS)]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while going_on() and child.poll() is None:
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)  # wrk ends then, and says what it has seen so far
        output, _ = child.communicate(timeout=30)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{' '.join(argv)}: does not end") from error
    finally:
        if child.poll() is None:
            child.kill()
            child.wait(10)
    return _result(argv, output, f"exit {child.returncode}:\n{output}")


def _result(argv: list[str], output: str, otherwise: str) -> dict[str, int]:
    """The line of JSON that requests.lua prints."""
    for line in output.splitlines():
        if line.startswith("{"):
            seen: dict[str, int] = json.loads(line)
            return seen
    raise BenchError(f"{' '.join(argv)}: no result, {otherwise}")


def preload(system: System) -> None:
    """Write every key once, so that the reads of the rounds find it; also the warm-up."""
    seconds = 2
    while seconds <= PRELOAD_MAX_S:
        loaded = run_round(system, Load.PUT, PRELOAD_CONNECTIONS, seconds)
        # The requests that were cut off at the end are not counted, hence the margin.
        if loaded.failed == 0 and loaded.requests >= KEYS + PRELOAD_CONNECTIONS:
            _check_reads(system)
            return
        seconds *= 2
    raise BenchError(
        f"{system.name}: could not write {KEYS} keys without an error in {PRELOAD_MAX_S} s "
        f"({loaded.requests} written, {loaded.failed} failed); "
        f"its logs are in {system.nodes[0].log_path.parent}"
    )


def _check_reads(system: System) -> None:
    """One short round of reads: a system that answers with errors is not worth measuring."""
    checked = run_round(system, Load.GET_LINEARIZABLE, 1, 1)
    if checked.failed or not checked.requests:
        raise BenchError(
            f"{system.name}: {checked.failed} of {checked.requests} reads of the keys just "
            f"written failed; its logs are in {system.nodes[0].log_path.parent}"
        )
