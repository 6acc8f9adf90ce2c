"""Counters whose replies are lost, whose leaders die, whose nodes start over: each is exact."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from tests.cluster import Cluster, ServeProcess, static_cluster, wait_for
from tests.integration.retrying import Retrying

FULL = bool(os.environ.get("DENGINE_CRASH_SWEEP"))  # make crash-sweep
INCREMENTS = 100_000 if FULL else 1_000
QUICK = "[raft.snapshot]\nentries = 200\nretained_log_entries = 20\n"
LOST = 0.2  # of all replies
INSTALLED = "installed"

pytestmark = pytest.mark.timeout(3600 if FULL else 600)


@dataclass
class Counting:
    """Threads that count; each increment is one request, sent until it is answered."""

    nodes: Sequence[ServeProcess]
    seed: int
    each: int
    done: dict[str, int] = field(default_factory=dict)  # increments, by worker
    repeated: int = 0
    failures: list[BaseException] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        for name, increment in (
            ("cas/1", by_condition),
            ("cas/2", by_condition),
            ("txn/1", by_transaction),
            ("txn/2", by_transaction),
        ):
            thread = threading.Thread(target=self._run, args=(name, increment), daemon=True)
            thread.start()
            self.threads.append(thread)

    def _run(self, name: str, increment: Callable[[Retrying, str], None]) -> None:
        # Two workers share each counter; one of the two has numbered keys, the other opaque ones.
        counter, number = name.split("/")
        rng = random.Random(f"{self.seed} {name}")
        client = Retrying(self.nodes, f"{name}.{self.seed}", rng, numbered=number == "1", drop=LOST)
        try:
            for count in range(1, self.each + 1):
                increment(client, counter)
                self.done[name] = count
        except BaseException as error:
            self.failures.append(error)
        finally:
            self.repeated += client.repeated
            client.close()

    @property
    def total(self) -> int:
        return sum(self.done.values())

    def reach(self, part: float) -> None:
        """Wait until this part of all increments is done."""
        goal = int(part * self.each * 4)

        def there() -> bool:
            assert not self.failures, self.failures
            return self.total >= goal

        wait_for(there, f"{goal} increments", 3000 if FULL else 300)

    def join(self) -> None:
        for thread in self.threads:
            thread.join(300)
        assert not self.failures, self.failures


def by_condition(client: Retrying, counter: str) -> None:
    """Read, then write what follows if nobody has written meanwhile."""
    while True:
        found = client.read(f"/v1/kv/{counter}")
        if found.status == 404:
            value, condition = 0, {"If-None-Match": "*"}
        else:
            value, condition = int(found.body), {"If-Match": found.headers["etag"]}
        written = client.write("PUT", f"/v1/kv/{counter}", b"%d" % (value + 1), condition)
        if written.status == 200:
            return
        assert written.status == 412, written


def by_transaction(client: Retrying, counter: str) -> None:
    """The same as one transaction, which brings the value where it was another one."""
    value: str | None = None
    while True:
        compare = {"key": counter, "target": "value", "op": "=", "operand": value}
        if value is None:
            compare = {"key": counter, "target": "exists", "op": "=", "operand": False}
        following = str(int(value or 0) + 1)
        body = {
            "compare": [compare],
            "success": [{"op": "put", "key": counter, "value": following}],
            "failure": [{"op": "get", "key": counter}],
        }
        head = {"Content-Type": "application/json"}
        reply = client.write("POST", "/v1/txn", json.dumps(body).encode(), head)
        assert reply.status == 200, reply
        answer = reply.json()
        if answer["succeeded"]:
            return
        value = answer["results"][0]["item"]["value"]


def test_counters_are_exact(cluster: Cluster, rng: random.Random) -> None:
    """A fifth of the replies is lost, before or after the commit, and the request is sent again,
    mostly to another node. Leaders are killed, a node comes back by a snapshot, and all of them
    are killed and stopped at once."""
    static_cluster(cluster, 1, 2, 3, extra=QUICK)
    nodes = list(cluster.nodes.values())
    counting = Counting(nodes, rng.randrange(2**32), INCREMENTS // 4)
    counting.start()
    for round_ in range(5 if FULL else 1):
        at = round_ / (5 if FULL else 1)

        def reach(part: float, at: float = at) -> None:
            counting.reach(at + part / (5 if FULL else 1))

        reach(0.1)
        kill_leader(cluster)
        reach(0.25)
        return_by_snapshot(cluster, rng, lambda: reach(0.5))
        reach(0.6)
        for node in nodes:
            node.kill()
        restart(cluster)
        reach(0.75)
        for node in nodes:
            assert node.stop() == 0
        restart(cluster)
        reach(0.85)
        kill_leader(cluster)
    counting.join()
    assert counting.repeated > counting.total * LOST / 2  # else this shows nothing
    cluster.wait_applied()
    for node in nodes:
        for counter in ("cas", "txn"):
            done = sum(n for name, n in counting.done.items() if name.startswith(counter))
            assert int(node.get(counter).body) == done == INCREMENTS // 2


def kill_leader(cluster: Cluster) -> None:
    leader = cluster.wait_leader()
    leader.kill()
    cluster.wait_leader()
    leader.start()
    cluster.wait_leader()


def restart(cluster: Cluster) -> None:
    for node in cluster.nodes.values():
        node.start()
    cluster.wait_leader()


def return_by_snapshot(cluster: Cluster, rng: random.Random, meanwhile: Callable[[], None]) -> None:
    """A follower is away until the log has been purged beyond where it was."""
    leader = cluster.wait_leader()
    away = rng.choice([node for node in cluster.nodes.values() if node is not leader])
    before = away.output().count(INSTALLED)
    index = away.status()["last_index"]
    away.kill()
    meanwhile()

    def purged() -> bool:
        for node in cluster.running():  # the counters may be done before the snapshots
            node.call("POST", "/v1/snapshots")
        lists = [node.call("GET", "/v1/snapshots").json() for node in cluster.running()]
        return all(view["purged_index"] > index for view in lists)

    wait_for(purged, "the log to be purged", 120)
    away.start()
    wait_for(lambda: away.output().count(INSTALLED) > before, "an install", 120)
