"""Two drills: how long writes stop when the leader dies, and growing from 1 to 3 under load."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import BenchError, free_ports, http_request, wait_until
from systems import REPOSITORY, START_S, Cluster, Node, is_dengine_leader, start_dengine, stop

ATTEMPT_S = 0.25  # one write attempt; bounds what an attempt stuck at a dead leader adds to a gap
RETRY_S = 0.01
GAP_MAX_S = 30.0
RECOVERY_MAX_S = 60.0
# A restarted node grants no vote for its first timeout_ms_min (1 s); the drill measures a settled
# cluster, so the next kill waits until that is over.
SETTLE_S = 2.5

GROWTH_WRITERS = 8
GROWTH_WRITE_MAX_S = 5.0
GROWTH_MAX_S = 60.0
GROWTH_MARGIN_S = 2.0  # of writing before the first join and after the last promotion
GUIDE_CONFIGS = REPOSITORY / "examples" / "single-node-expansion" / "config"


@contextmanager
def running(writers: Sequence[threading.Thread], stopping: threading.Event) -> Iterator[None]:
    """Run `writers` inside the block; they watch `stopping` and have ended when it is left."""
    for writer in writers:
        writer.start()
    try:
        yield
    finally:
        stopping.set()
        for writer in writers:
            writer.join(GROWTH_WRITE_MAX_S + 1)


def failover_gap_s(cluster: Cluster) -> float:
    """Kill the leader with SIGKILL under writes; seconds until a survivor acknowledges a new write.

    Afterwards the killed node is started again and the cluster is whole and settled.
    """
    victim = cluster.leader()
    acks: list[tuple[float, float]] = []  # (sent, acknowledged)
    stopping = threading.Event()

    def write(survivor: Node) -> None:
        while not stopping.is_set():
            sent = time.monotonic()
            if cluster.put(survivor, "failover", str(sent), ATTEMPT_S):
                acks.append((sent, time.monotonic()))
            else:
                stopping.wait(RETRY_S)

    writers = [
        threading.Thread(target=write, args=(node,)) for node in cluster.nodes if node is not victim
    ]
    with running(writers, stopping):
        wait_until(lambda: len(acks) >= 10, f"writes to {cluster.name} before the kill", GAP_MAX_S)
        killed = time.monotonic()
        victim.process.kill()
        dead = time.monotonic()
        # Only writes sent after the death count: earlier ones may be the old leader's work.
        wait_until(
            lambda: acks[-1][0] >= dead, f"a write to {cluster.name} after the kill", GAP_MAX_S
        )
        gap_s = min(acknowledged for sent, acknowledged in acks if sent >= dead) - killed
    _restart(cluster, victim)
    return gap_s


def _restart(cluster: Cluster, node: Node) -> None:
    node.restart()
    wait_until(
        lambda: all(cluster.caught_up(each) for each in cluster.nodes),
        f"{cluster.name} to be whole after the restart of {node.name}",
        RECOVERY_MAX_S,
        [each.process for each in cluster.nodes],
    )
    time.sleep(SETTLE_S)


@dataclass
class Growth:
    """Writes through node 1 while nodes 2 and 3 join; only an answer 200 within 5 s counts."""

    acknowledged: int = 0
    failures: list[str] = field(default_factory=list)
    longest_ms: float = 0.0
    three_voters_after_s: float = 0.0


def grow_under_load(directory: Path) -> Growth:
    """Start node 1 from the example's n1.toml, join 2 and 3 under raw writers; count failures."""
    ports = free_ports(3)
    nodes = [start_guide_node(1, ports, directory)]
    try:
        first = nodes[0]
        wait_until(lambda: is_dengine_leader(first), "node 1 to lead", START_S, [first.process])
        growth = Growth()
        stopping = threading.Event()
        writers = [
            threading.Thread(target=write_raw, args=(first.address, f"w{i}", growth, stopping))
            for i in range(GROWTH_WRITERS)
        ]
        with running(writers, stopping):
            time.sleep(GROWTH_MARGIN_S)
            started = time.monotonic()
            nodes.append(start_guide_node(2, ports, directory))
            nodes.append(start_guide_node(3, ports, directory))
            wait_until(
                lambda: dengine_voters(first) == 3,
                "three voters",
                GROWTH_MAX_S,
                [node.process for node in nodes],
            )
            growth.three_voters_after_s = time.monotonic() - started
            time.sleep(GROWTH_MARGIN_S)
        if not first.process.alive:
            raise BenchError(f"node 1 ended during the growth:\n{first.process.log_tail()}")
        return growth
    finally:
        stop(nodes)


def start_guide_node(number: int, ports: Sequence[int], directory: Path) -> Node:
    """Start node `number` of the example on other ports, with its data in `directory`/grown."""
    source = GUIDE_CONFIGS / f"n{number}.toml"
    try:
        text = source.read_text("utf-8")
    except OSError as error:
        raise BenchError(f"{source}: {error.strerror}; its files are needed") from error
    text = re.sub(r"\b908([123])\b", lambda found: str(ports[int(found[1]) - 1]), text)
    text = re.sub(r'"\./db[^"]*"', f'"{directory / "grown"}"', text)
    config = directory / f"grown{number}.toml"
    config.write_text(text)
    return start_dengine(f"grown{number}", f"127.0.0.1:{ports[number - 1]}", config, directory)


def write_raw(address: str, prefix: str, growth: Growth, stopping: threading.Event) -> None:
    """Write one key after the other, each once; anything but 200 within 5 s is a failure."""
    host, port = address.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=GROWTH_WRITE_MAX_S)
    number = 0
    while not stopping.is_set():
        number += 1
        started = time.monotonic()
        try:
            connection.request("PUT", f"/v1/kv/{prefix}-{number}", b"x" * 256)
            response = connection.getresponse()
            body = response.read()
            failure = None if response.status == 200 else f"{response.status} {body!r}"
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            failure = repr(error)
        took_ms = (time.monotonic() - started) * 1000
        growth.longest_ms = max(growth.longest_ms, took_ms)
        if failure is None and took_ms <= GROWTH_WRITE_MAX_S * 1000:
            growth.acknowledged += 1
        else:
            growth.failures.append(f"{prefix}-{number} after {took_ms:.0f} ms: {failure or 'late'}")
    connection.close()


def dengine_voters(node: Node) -> int:
    """Number of voters as `node` knows it; 0 while it is joint or does not answer."""
    answer = http_request(node.address, "GET", "/v1/cluster", timeout_s=2)
    if answer is None or answer[0] != 200:
        return 0
    view: dict[str, Any] = json.loads(answer[1])
    if view["joint"]:
        return 0
    return sum(member["role"] != "learner" for member in view["members"])


def repeat_failover(
    clusters: Sequence[Cluster],
    rounds: int,
    gaps_s: dict[str, list[float]],
    report: Callable[[str], None],
) -> None:
    """`rounds` failovers of each cluster, in turn; fills `gaps_s` by cluster name as it goes."""
    for number in range(1, rounds + 1):
        for cluster in clusters:
            gap_s = failover_gap_s(cluster)
            gaps_s.setdefault(cluster.name, []).append(gap_s)
            report(f"failover {number}/{rounds} {cluster.name}: {gap_s:.2f} s")
