"""A lock over real processes: who was stopped, cut off or late never writes over a later holder."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.cluster import (
    Cluster,
    ServeProcess,
    config_text,
    node_environment,
    static_cluster,
    wait_for,
)
from tests.integration.lock_holder import TTL_S
from tests.namespaces import cut_off, inside, machines, needs_namespaces

pytestmark = pytest.mark.timeout(600)
HOLDERS = 8
FULL = bool(os.environ.get("DENGINE_CRASH_SWEEP"))  # make crash-sweep
ROUNDS = 4 if FULL else 1
TOO_LATE_S = 120.0
NODES = (1, 2, 3)
MACHINES = {number: f"10.78.0.{number}" for number in range(1, len(NODES) + HOLDERS + 1)}
CLIENT = "10.78.0.100"
SCRIPT = Path(__file__).with_name("lock_holder.py")


class Holders:
    """Processes that contend; the kernel ends them with this one.

    Args:
        namespaces: of each, or none.
    """

    def __init__(self, cluster: Cluster, namespaces: Sequence[str] = ()) -> None:
        self._endpoints = [f"{node.host}:{node.port}" for node in cluster.nodes.values()]
        self._made = 0
        self.namespaces = namespaces
        self.names: dict[int, str] = {}
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, number: int) -> None:
        self._made += 1
        guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        where = ["ip", "netns", "exec", self.namespaces[number]] if self.namespaces else []
        name = self.names[number] = f"holder-{self._made}"
        command = [*guard, *where, sys.executable, str(SCRIPT), name]
        self.running[number] = subprocess.Popen(
            [*command, *self._endpoints], env=node_environment()
        )

    def kill(self, number: int) -> None:
        process = self.running.pop(number)
        process.kill()
        process.wait()

    @contextlib.contextmanager
    def contending(self) -> Iterator[None]:
        try:
            for number in range(HOLDERS):
                self.start(number)
            yield
            assert all(process.poll() is None for process in self.running.values())
        finally:
            for number in list(self.running):
                self.kill(number)


Disturb = Callable[[Cluster, Holders, random.Random], None]


def test_tokens_of_writes_never_fall(cluster: Cluster, rng: random.Random) -> None:
    """Eight contend while holders and leaders are killed, and stopped for longer than a lease."""
    static_cluster(cluster, 1, 2, 3)
    contend(cluster, Holders(cluster), rng, (stop_holders, kill_holder, kill_node, stop_node))


@needs_namespaces
def test_tokens_never_fall_when_machines_are_cut_off(cluster: Cluster, rng: random.Random) -> None:
    """Holders and leaders, each a machine, lose their network for longer than a lease: they go on
    as if nothing was, and when they are back they have missed their end."""
    with machines(MACHINES, CLIENT) as namespaces, inside(namespaces[0]):
        ports = {number: 9080 + number for number in NODES}
        for number, port in ports.items():
            text = config_text(number, ports, 0, 2)
            for other in NODES:
                text = text.replace(
                    f"127.0.0.1:{ports[other]}", f"{MACHINES[other]}:{ports[other]}"
                )
            node = cluster.node(number, text, port)
            node.host, node.prefix = MACHINES[number], ("ip", "netns", "exec", namespaces[number])
            node.start()
        cluster.wait_voters(*NODES)
        holders = Holders(
            cluster, [namespaces[number] for number in MACHINES if number not in NODES]
        )
        contend(cluster, holders, rng, (cut_holders, cut_leader))


def contend(
    cluster: Cluster, holders: Holders, rng: random.Random, disturbances: Sequence[Disturb]
) -> None:
    """Whatever is done to them: in the order in which writes happened their tokens only grow, and
    no token has two owners. The first disturbance goes on until somebody has written too late."""
    with holders.contending():
        wait_tokens(cluster, 3)
        for _ in range(ROUNDS):
            for disturb in rng.sample(disturbances, len(disturbances)):
                disturb(cluster, holders, rng)
                wait_tokens(cluster, 2)
        end = time.monotonic() + TOO_LATE_S
        while not some_node(cluster).items("refused/"):
            assert time.monotonic() < end, "nobody has written too late"
            disturbances[0](cluster, holders, rng)
    owners = written(cluster)
    tokens = [token for token, _ in owners]
    assert tokens == sorted(tokens)
    assert len(dict(owners)) == len(set(owners)), "a token with two owners"
    assert len(set(tokens)) >= ROUNDS * len(disturbances)
    assert len(owners) > len(set(owners)), "holders wrote more than once"


def kill_holder(cluster: Cluster, holders: Holders, rng: random.Random) -> None:
    number = rng.randrange(HOLDERS)
    holders.kill(number)
    holders.start(number)


def stop_holders(cluster: Cluster, holders: Holders, rng: random.Random) -> None:
    pause([holders.running[number].pid for number in half(cluster, holders, rng)])


def cut_holders(cluster: Cluster, holders: Holders, rng: random.Random) -> None:
    with cut_off(*[holders.namespaces[number] for number in half(cluster, holders, rng)]):
        time.sleep(2 * TTL_S)


def cut_leader(cluster: Cluster, holders: Holders, rng: random.Random) -> None:
    leader = cluster.wait_leader()
    with cut_off(leader.prefix[-1]):
        cluster.wait_leader(among=[node for node in cluster.running() if node is not leader])
        time.sleep(2 * TTL_S)


def half(cluster: Cluster, holders: Holders, rng: random.Random) -> list[int]:
    """Of the holders, with the one that has written last: it may hold the lock still."""
    last = some_node(cluster).get("resource", "eventual").body.decode().split()[-1]
    order = rng.sample(range(HOLDERS), HOLDERS)
    return sorted(order, key=lambda number: holders.names[number] != last)[: HOLDERS // 2]


def kill_node(cluster: Cluster, holders: Holders, rng: random.Random) -> None:
    leader = cluster.wait_leader()
    leader.kill()
    cluster.wait_leader()
    leader.start()


def stop_node(cluster: Cluster, holders: Holders, rng: random.Random) -> None:
    pause([cluster.wait_leader().pid])


def pause(pids: list[int]) -> None:
    """SIGSTOP for twice as long as a lease lives."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2 * TTL_S)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def wait_tokens(cluster: Cluster, count: int) -> None:
    """Wait until that many further holders have written."""
    node = some_node(cluster)
    before = token(node)
    seen: set[int] = set()

    def more() -> bool:
        seen.add(token(node))
        return len(seen - {before}) >= count

    wait_for(more, f"{count} more holders", 60)


def some_node(cluster: Cluster) -> ServeProcess:
    cluster.wait_leader()
    return cluster.running()[0]


def token(node: ServeProcess) -> int:
    reply = node.get("resource", "eventual")
    return int(reply.body.split()[0]) if reply.ok else 0


def written(cluster: Cluster) -> list[tuple[int, str]]:
    """Token and owner of all writes, in their order, from the history."""
    node = some_node(cluster)
    last = node.cluster()["revision"]
    found: list[tuple[int, str]] = []
    with contextlib.closing(node.connect(30)) as link:
        link.request("GET", "/v1/watch?key=resource&from_revision=1")
        event = ""
        for line in link.getresponse():
            name, _, value = line.decode().rstrip().partition(": ")
            if name == "event":
                event = value
            elif name == "data":
                data = json.loads(value)
                for change in data["events"] if event == "change" else []:
                    number, owner = change["value"].split()
                    found.append((int(number), owner))
                if event == "progress" and data["revision"] >= last:
                    return found
    raise AssertionError("the stream has ended")
