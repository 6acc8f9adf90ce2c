"""A state of some size: writes go on as before while it is written, sent and installed."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

from tests.cluster import (
    Cluster,
    ServeProcess,
    Writer,
    config_text,
    exchange,
    free_port,
    joiner,
    wait_for,
)

STATE_BYTES = 64 * 1024 * 1024
VALUE_BYTES = 64 * 1024
LOADERS = 4
SLOWEST_S = 1.0  # of a write; on a busy machine too
# The default but for what lets the log go early. The pace is half of it: a take lasts seconds.
CONFIG = """
[raft.snapshot]
retained_log_entries = 100
max_bytes_per_s = 33554432
"""


def fill(node: ServeProcess) -> None:
    """Write `STATE_BYTES` of values over a few connections."""
    failures: list[str] = []

    def load(first: int) -> None:
        with contextlib.closing(node.connect()) as connection:
            value = os.urandom(VALUE_BYTES)
            for number in range(first, STATE_BYTES // VALUE_BYTES, LOADERS):
                reply = exchange(connection, "PUT", f"/v1/kv/large/{number}", value)
                if not reply.ok:
                    failures.append(str(reply))

    loaders = [threading.Thread(target=load, args=(n,), daemon=True) for n in range(LOADERS)]
    for loader in loaders:
        loader.start()
    for loader in loaders:
        loader.join(60)
    assert not failures
    assert not any(loader.is_alive() for loader in loaders)


def snapshots(node: ServeProcess) -> dict[str, Any]:
    """GET /v1/snapshots."""
    view: dict[str, Any] = node.call("GET", "/v1/snapshots").json()
    return view


def take(node: ServeProcess) -> None:
    """Ask for a snapshot and wait until it is there."""
    taken = snapshots(node)["taken"]
    assert node.request("POST", "/v1/snapshots", b"", timeout_s=30).status in (200, 202)
    wait_for(lambda: snapshots(node)["taken"] > taken, "a snapshot", 60)


def test_writes_go_on_while_a_large_state_is_written_sent_and_installed(cluster: Cluster) -> None:
    """Taking a snapshot, and joining by one, cost no write more than a moment, and no election."""
    port = free_port()
    first = cluster.node(1, config_text(1, {1: port}, 2, 2, CONFIG), port).start()
    cluster.wait_leader()
    fill(first)
    term = first.status()["term"]
    writers = [Writer(first, f"w{n}").start() for n in range(4)]
    take(first)
    writers[0].wait_more(200)
    take(first)
    wait_for(lambda: snapshots(first)["purged_index"] > 0, "a purged log", 30)
    joiners = [joiner(cluster, number, CONFIG).start() for number in (2, 3)]
    cluster.wait_voters(1, 2, 3, deadline_s=90)
    for writer in writers:
        writer.wait_more(50)
        writer.stop()
    for node in joiners:
        assert "snapshot up to entry" in node.output()
    assert not any(writer.failures for writer in writers)
    assert max(writer.longest_gap_s() for writer in writers) < SLOWEST_S
    assert first.status()["term"] == term
    cluster.assert_everywhere(*writers)
