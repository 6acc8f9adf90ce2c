"""Snapshots on real nodes: taken, sent, installed, and the log behind them purged."""

from __future__ import annotations

import json
from typing import Any

from tests.cluster import (
    Cluster,
    ServeProcess,
    Writer,
    config_text,
    free_port,
    joiner,
    static_cluster,
    wait_for,
)

# Snapshots every few hundred entries, so that a test of seconds sees what a day brings.
SMALL = """
[raft.snapshot]
entries = 200
retained_log_entries = 50
chunk_bytes = 4096
"""


def snapshots(node: ServeProcess) -> dict[str, Any]:
    """GET /v1/snapshots."""
    reply = node.call("GET", "/v1/snapshots")
    assert reply.ok, reply
    view: dict[str, Any] = reply.json()
    return view


def single(cluster: Cluster, extra: str = SMALL) -> ServeProcess:
    """A cluster of one that has a leader."""
    port = free_port()
    node = cluster.node(1, config_text(1, {1: port}, 2, 2, extra), port).start()
    cluster.wait_leader()
    return node


def purged(node: ServeProcess, beyond: int = 0) -> int:
    """Wait until the log begins behind entry `beyond`; the purged index."""
    return wait_for(
        lambda: index if (index := snapshots(node)["purged_index"]) > beyond else 0,
        f"a log purged beyond {beyond}",
        30,
    )


def test_a_snapshot_on_request_is_complete_and_described(cluster: Cluster) -> None:
    """POST /v1/snapshots answers with a verified file of everything applied."""
    node = single(cluster)
    assert node.put("color", "blue").ok
    reply = node.call("POST", "/v1/snapshots")
    assert reply.status == 200, reply
    taken = reply.json()["snapshot"]
    assert taken["index"] == node.status()["last_applied"]
    listed = snapshots(node)["snapshots"]
    assert [s["sha256"] for s in listed] == [taken["sha256"]]
    whole = node.request("GET", "/v1/snapshots/latest")
    assert whole.status == 200
    assert len(whole.body) == taken["size_bytes"]
    assert whole.headers["etag"] == json.dumps(taken["sha256"])
    part = node.request(
        "GET", f"/v1/snapshots/{taken['sha256']}", headers={"Range": "bytes=100-199"}
    )
    assert (part.status, part.body) == (206, whole.body[100:200])


def test_the_log_is_purged_and_a_joiner_gets_there_by_snapshot(cluster: Cluster) -> None:
    """A node that joins a cluster whose log is purged gets a snapshot while writers go on."""
    first = single(cluster)
    writer = Writer(first, "w", pause_s=0.0).start()
    purged(first)
    second = joiner(cluster, 2, SMALL).start()
    third = joiner(cluster, 3, SMALL).start()
    cluster.wait_voters(1, 2, 3, deadline_s=60)
    writer.wait_more(50)
    writer.stop()
    assert not writer.failures
    for node in (second, third):
        assert "snapshot up to entry" in node.output()
    cluster.assert_everywhere(writer)


def test_a_restart_continues_from_a_purged_log(cluster: Cluster) -> None:
    """kill -9 of a node whose log is purged loses nothing, with and without its state."""
    node = single(cluster)
    writer = Writer(node, "w", pause_s=0.0).start()
    purged(node, 300)
    node.kill()
    writer.stop()
    node.start()
    cluster.wait_leader()
    cluster.assert_everywhere(writer)
    node.kill()
    (node.directory / "RUN").unlink()  # as after a power loss: the state cannot be trusted
    node.start()
    cluster.wait_leader()
    assert "the state is rebuilt from snapshot-" in node.output()
    cluster.assert_everywhere(writer)


def test_a_follower_that_slept_too_long_comes_back_by_snapshot(cluster: Cluster) -> None:
    """A voter whose next entries were purged while it was down is brought up to date."""
    static_cluster(cluster, 1, 2, 3, extra=SMALL)
    leader = cluster.wait_leader()
    sleeper = next(n for n in cluster.nodes.values() if n is not leader)
    sleeper.kill()
    behind = leader.status()["last_index"]
    writer = Writer(leader, "w", pause_s=0.0).start()
    purged(leader, behind + 100)
    sleeper.start()
    wait_for(lambda: "snapshot up to entry" in sleeper.output(), "an installed snapshot", 30)
    writer.wait_more(20)
    writer.stop()
    assert not writer.failures
    cluster.assert_everywhere(writer)
