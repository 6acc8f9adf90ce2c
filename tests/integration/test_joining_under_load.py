"""A node that joins a cluster with a purged log, while clients write as fast as they can.

The transfer is cut, the joiner dies, the leader dies: it gets there all the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

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

# A snapshot every hundred entries, and a transfer of seconds although the state is small.
BUSY = """
[raft.snapshot]
entries = 100
retained_log_entries = 50
chunk_bytes = 4096
max_bytes_per_s = 1048576
"""
VALUE = "x" * 2000
KEYS = 300


def fill(node: ServeProcess) -> None:
    for key in range(KEYS):
        assert node.put(f"filled/{key}", VALUE).ok


def purged(node: ServeProcess) -> None:
    wait_for(
        lambda: node.call("GET", "/v1/snapshots").json()["purged_index"] > KEYS / 2,
        "a purged log",
        60,
    )


def partials(node: ServeProcess) -> list[Path]:
    """What has come of a snapshot so far, if any of it has."""
    found = (node.directory / "snapshots").glob("fetch-*.partial")
    return [path for path in found if path.stat().st_size]


def in_mid_transfer(node: ServeProcess) -> None:
    wait_for(lambda: partials(node), "a transfer under way", 60)


def shows_its_progress(leader: ServeProcess, receiver: ServeProcess) -> None:
    """A transfer, under way or just cut, is seen in `/v1/cluster`, in metrics and in both logs."""
    transfer = wait_for(lambda: sent(leader, receiver.node_id), "a transfer in /v1/cluster")
    assert 0 < transfer["sent_bytes"] <= transfer["size_bytes"]
    assert transfer["percent"] == transfer["sent_bytes"] * 100 // transfer["size_bytes"]
    assert transfer["bytes_per_s"] > 0
    metrics = leader.request("GET", "/metrics").body.decode()
    counted = re.search(
        rf'^dengine_snapshot_sent_bytes{{peer="{receiver.node_id}"}} ([\d.e+]+)$', metrics, re.M
    )
    assert counted is not None, metrics
    assert float(counted[1]) >= transfer["sent_bytes"]
    rate = r": \d+ %, [\d.]+ [KM]?B/s"
    sending = rf"sending snapshot \d+-{transfer['index']} to node {receiver.node_id}" + rate
    receiving = rf"receiving snapshot \d+-{transfer['index']} from node {leader.node_id}" + rate
    assert re.search(sending, leader.output()), leader.tail()
    assert re.search(receiving, receiver.output()), receiver.tail()


def sent(leader: ServeProcess, receiver: int) -> dict[str, Any] | None:
    """What `/v1/cluster` says of a transfer that has begun."""
    for member in leader.cluster()["members"]:
        if member["id"] == receiver and member["transfer"] and member["transfer"]["sent_bytes"]:
            found: dict[str, Any] = member["transfer"]
            return found
    return None


@pytest.mark.timeout(240)
def test_a_joiner_that_dies_in_mid_transfer_gets_there(cluster: Cluster) -> None:
    """The joiner is killed while the file comes, and again when it has come back. No write of the
    four clients fails, and in the end it votes and holds everything."""
    port = free_port()
    first = cluster.node(1, config_text(1, {1: port}, 2, 2, BUSY), port).start()
    cluster.wait_leader()
    fill(first)
    writers = [Writer(first, f"w{n}", pause_s=0.0).start() for n in range(4)]
    purged(first)
    second = joiner(cluster, 2, BUSY).start()
    for _ in range(2):
        in_mid_transfer(second)
        shows_its_progress(first, second)
        second.kill()
        second.start()
    cluster.wait_voters(1, 2, deadline_s=90)
    for writer in writers:
        writer.wait_more(20)
        assert not writer.stop().failures
    assert "snapshot up to entry" in second.output()
    cluster.assert_everywhere(*writers)


@pytest.mark.timeout(240)
def test_a_leader_that_dies_in_mid_transfer_is_replaced_by_the_next(cluster: Cluster) -> None:
    """The sender is killed while the joiner fetches: the next leader offers its own file, and what
    came of the other is never mixed into it."""
    static_cluster(cluster, 1, 2, 3, extra=BUSY)
    leader = cluster.wait_leader()
    fill(leader)
    others = [node for node in cluster.running() if node is not leader]
    writers = [Writer(node, f"w{node.node_id}", pause_s=0.0).start() for node in others]
    for node in cluster.running():
        purged(node)
    fourth = joiner(cluster, 4, BUSY).start()
    in_mid_transfer(fourth)
    leader.kill()
    successor = cluster.wait_leader(among=others)
    wait_for(
        lambda: (
            f"from node {successor.node_id}: done" in fourth.output()
            or f"from node {successor.node_id} (" in fourth.output()
        ),
        "the file of the next leader",
        90,
    )
    leader.start()
    cluster.wait_voters(1, 2, 3, 4, deadline_s=90)
    for writer in writers:
        writer.wait_more(20)
        writer.stop()
    cluster.assert_everywhere(*writers)
