"""A lock over real processes: who was stopped or is late never writes over a later holder."""

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
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, ServeProcess, node_environment, static_cluster, wait_for
from tests.integration.lock_holder import TTL_S

pytestmark = pytest.mark.timeout(600)
HOLDERS = 8
ROUNDS = 2
SCRIPT = Path(__file__).with_name("lock_holder.py")


class Holders:
    """Processes that contend; the kernel ends them with this one."""

    def __init__(self, cluster: Cluster) -> None:
        self._endpoints = [f"{node.host}:{node.port}" for node in cluster.nodes.values()]
        self._made = 0
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._made += 1
        guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        command = [*guard, sys.executable, str(SCRIPT), f"holder-{self._made}", *self._endpoints]
        self.running.append(subprocess.Popen(command, env=node_environment()))

    def kill(self, number: int) -> None:
        process = self.running.pop(number)
        process.kill()
        process.wait()

    @contextlib.contextmanager
    def contending(self) -> Iterator[None]:
        for _ in range(HOLDERS):
            self.start()
        try:
            yield
            assert all(process.poll() is None for process in self.running)
        finally:
            while self.running:
                self.kill(0)


def test_tokens_of_writes_never_fall(cluster: Cluster, rng: random.Random) -> None:
    """Eight contend while holders and leaders are killed, and stopped for longer than a lease. In
    the order in which writes happened their tokens only grow, and no token has two owners."""
    static_cluster(cluster, 1, 2, 3)
    holders = Holders(cluster)
    with holders.contending():
        wait_tokens(cluster, 3)
        for _ in range(ROUNDS):
            for disturb in rng.sample((kill_holder, stop_holders, kill_node, stop_node), 4):
                disturb(cluster, holders, rng)
                wait_tokens(cluster, 2)
    owners = written(cluster)
    tokens = [token for token, _ in owners]
    assert tokens == sorted(tokens)
    assert len(dict(owners)) == len(set(owners)), "a token with two owners"
    assert len(set(tokens)) >= ROUNDS * 4
    assert len(owners) > len(set(owners)), "holders wrote more than once"


def kill_holder(cluster: Cluster, holders: Holders, rng: random.Random) -> None:
    holders.kill(rng.randrange(HOLDERS))
    holders.start()


def stop_holders(cluster: Cluster, holders: Holders, rng: random.Random) -> None:
    """Half of them at once: the one that holds the lock is among them every other time."""
    stopped = rng.sample(holders.running, HOLDERS // 2)
    pause([process.pid for process in stopped])


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
