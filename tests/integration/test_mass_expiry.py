"""A hundred thousand keys that go at once, on three real nodes."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest

from tests.cluster import Cluster, ServeProcess, Writer, static_cluster, wait_for

pytestmark = pytest.mark.timeout(300)
KEYS = 100_000
PER_TXN = 125
TTL_S = 10


def test_a_hundred_thousand_keys_that_go_at_once_stop_nobody(cluster: Cluster) -> None:
    """Expiry goes in pieces: nobody stands for election, writes go on, and in the end all is gone
    everywhere alike."""
    static_cluster(cluster, 1, 2, 3)
    leader = cluster.wait_leader()
    fill(leader)
    term, writer = leader.status()["term"], Writer(leader, "meanwhile").start()
    writer.wait_more(10)
    assert left(leader) == KEYS

    wait_for(lambda: left(leader) < KEYS, "the first keys to go", 2 * TTL_S)
    began = time.monotonic()
    wait_for(lambda: left(leader) == 0, "the last key to go", 2 * TTL_S)
    took_s = time.monotonic() - began
    writer.wait_more(10)
    writer.stop()

    gap_s = writer.longest_gap_s()
    print(f"{KEYS} keys went in {took_s:.1f} s; longest time without a write {gap_s * 1000:.0f} ms")
    assert not writer.failures
    cluster.wait_applied()
    for node in cluster.running():
        assert node.status()["term"] == term
        assert left(node) == 0
    assert gap_s < 0.5  # half of the shortest election timeout, from the beginning to the end
    cluster.assert_everywhere(writer)


def fill(node: ServeProcess) -> None:
    """KEYS keys of one lease that nobody keeps alive any more."""
    with contextlib.closing(node.connect(30)) as link:

        def post(path: str, body: object) -> Any:
            link.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            reply = link.getresponse()
            assert reply.status == 200, reply.read()
            return json.load(reply)

        lease = post("/v1/leases", {"ttl": TTL_S})["id"]
        for first in range(0, KEYS, PER_TXN):
            puts = [
                {"op": "put", "key": f"going/{number:06}", "value": "v", "lease": lease}
                for number in range(first, first + PER_TXN)
            ]
            post("/v1/txn", {"compare": [], "success": puts, "failure": []})
            post(f"/v1/leases/{lease}/keepalive", {})


def left(node: ServeProcess) -> int:
    """How many of the keys are there."""
    return int(node.call("GET", "/v1/kv?prefix=going/&count_only=true").json()["count"])
