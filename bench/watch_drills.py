"""Many watchers on one node: how soon each learns of a change, and what they cost."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from load import Round, preload, run_round
from processes import BenchError
from state_drills import resident_mib
from systems import Dengine, Load, Node, dengine_status, stop

SCRIPT = Path(__file__).with_name("watchers.py")
WATCHERS = 1000  # limits.watchers
STALLED = 10
CONNECTIONS = 64
CHANGES_PER_S = 10
PADDING = "x" * 1000
STALLED_VALUE = "x" * 65536  # beside each change: it soon fills the buffers between
DROPPED_S = 90.0  # for readers that take nothing to be given up; the node says 20 to 30
PUT_S = 5.0
SETTLE_S = 2.0  # for the last events to arrive


@dataclass
class Watched:
    """Watchers on the leader of three nodes, of which `stalled` read nothing, until they go."""

    watchers: int
    stalled: int
    changes: int = 0
    events: int = 0  # that arrived
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    max_ms: float = 0.0
    dropped_s: float = 0.0  # until the node had given up all that are stalled
    before_mib: float = 0.0  # resident, of the leader
    during_mib: list[float] = field(default_factory=list)
    # Rounds of PUT, in turn without watchers and with as many idle ones.
    without: list[Round] = field(default_factory=list)
    idle: list[Round] = field(default_factory=list)

    @property
    def idle_ratio(self) -> float | None:
        """PUT beside idle watchers against PUT without any: the median over the rounds."""
        pairs = zip(self.idle, self.without, strict=True)
        ratios = [idle.ops_per_s / none.ops_per_s for idle, none in pairs if none.ops_per_s]
        return statistics.median(ratios) if ratios else None


def watch_under_load(
    directory: Path, result: Watched, rounds: int, seconds: int, say: Callable[[str], None]
) -> None:
    """Three nodes: first idle watchers beside PUT, then a few changes that all have to get."""
    directory.mkdir()
    cluster = Dengine(directory)
    try:
        preload(cluster)
        leader = cluster.leader()
        for _ in range(rounds):
            result.without.append(run_round(cluster, Load.PUT, CONNECTIONS, seconds))
            with _watching(leader.address, "prefix=idle-NUMBER/", result.watchers, 0):
                result.idle.append(run_round(cluster, Load.PUT, CONNECTIONS, seconds))
        say(f"PUT beside {result.watchers} idle watchers: {result.idle_ratio or 0:.2f} x")
        result.before_mib = resident_mib(leader)[0]
        reading = result.watchers - result.stalled
        with (
            _watching(leader.address, "prefix=stalled/", 0, result.stalled),
            _watching(leader.address, "prefix=seen/", reading, 0) as told,
        ):
            began = time.monotonic()
            while not result.dropped_s or time.monotonic() < began + seconds * rounds:
                _change(cluster, leader, result)
                if not result.dropped_s and _watchers(leader) == reading:
                    result.dropped_s = time.monotonic() - began
                if time.monotonic() > began + DROPPED_S:
                    raise BenchError(
                        f"{_watchers(leader) - reading} readers that took nothing for "
                        f"{DROPPED_S:g} s are still served"
                    )
            time.sleep(SETTLE_S)
        for name, figure in told.items():
            setattr(result, name, figure)
        expected = result.changes * reading
        if result.events != expected:
            raise BenchError(f"{result.events} events have arrived, and not {expected}")
        say(
            f"{result.changes} changes to {reading} watchers: p99 {result.p99_ms:.1f} ms; "
            f"{result.stalled} more took nothing and were dropped after {result.dropped_s:.0f} s"
        )
    finally:
        stop(cluster.nodes)


def _change(cluster: Dengine, leader: Node, result: Watched) -> None:
    """One change for those who read, and one for those who do not."""
    for key, value in (
        ("stalled/key", STALLED_VALUE),
        ("seen/key", f"{time.monotonic_ns()} {PADDING}"),
    ):
        if not cluster.put(leader, key, value, PUT_S):
            raise BenchError("a PUT failed beside the watchers")
    result.changes += 1
    result.during_mib.append(resident_mib(leader)[0])
    time.sleep(1 / CHANGES_PER_S)


def _watchers(node: Node) -> int:
    status = dengine_status(node)
    if status is None:
        raise BenchError(f"{node.address} does not answer beside the watchers")
    return int(status["watchers"])


@contextmanager
def _watching(address: str, query: str, reading: int, stalled: int) -> Iterator[dict[str, Any]]:
    """Watchers for as long as the block; what they have seen is there behind it."""
    argv = [sys.executable, str(SCRIPT), address, "--query", query]
    argv += ["--count", str(reading + stalled), "--stalled", str(stalled)]
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    told: dict[str, Any] = {}
    try:
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            raise BenchError(f"{' '.join(argv)}: the watchers are not there")
        yield told
        output, _ = child.communicate(timeout=30)
        told |= json.loads(output)
    except (subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        raise BenchError(f"{' '.join(argv)}: {error}") from error
    finally:
        if child.poll() is None:
            child.kill()
        child.wait(10)
