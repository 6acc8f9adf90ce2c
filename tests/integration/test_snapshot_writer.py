"""The subprocess that writes snapshots, attacked while clients write: only that snapshot fails."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import lmdb
import psutil
import pytest

from dengine.node.writer_process import STALL_S
from tests.cluster import Cluster, ServeProcess, Writer, static_cluster, wait_for

VALUE = "x" * 2000
KEYS = 600
KEYS_AT_ONCE = 100
# Slow, so that there is time to attack: a megabyte takes several seconds. The history holds what
# was overwritten last, and so takes as much room each time.
SLOW = f"""
[raft.snapshot]
chunk_bytes = 4096
max_bytes_per_s = 262144

[kv]
history_revisions = {KEYS // KEYS_AT_ONCE}
"""


class Stage:
    """Three nodes under load, whose leader takes a snapshot, slowly."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = static_cluster(cluster, 1, 2, 3, extra=SLOW)
        overwrite(cluster.wait_leader())
        self.writers = [
            Writer(node, f"w{i}", pause_s=0.02).start() for i, node in cluster.nodes.items()
        ]
        for writer in self.writers:
            writer.wait_more(10)
        self.subprocess = self.take()

    def take(self) -> psutil.Process:
        """Have the leader begin; the subprocess, once it writes."""
        self.leader = node = self.cluster.wait_leader()
        self.term = node.status()["term"]
        self.before = snapshots(node)
        reply = node.request("POST", "/v1/snapshots", b"", {"Dengine-Timeout-Ms": "100"})
        assert reply.status == 202, reply
        wait_for(lambda: list(partials(node)), "a partial file")
        wait_for(lambda: next(iter(partials(node))).stat().st_size, "some of it on disk")
        (child,) = psutil.Process(node.pid).children()
        return child

    def lost(self) -> None:
        """One snapshot failed and is counted, and nothing of its subprocess is left."""
        dead, failures = self.subprocess.pid, self.before["failures"]
        wait_for(lambda: snapshots(self.leader)["failures"] > failures, "the failure to be counted")
        wait_for(lambda: not psutil.pid_exists(dead), "no zombie")
        wait_for(lambda: not list(partials(self.leader)), "the partial file to be removed")
        wait_for(lambda: str(dead) not in readers(self.leader), "its reader to be released")

    def survived(self) -> None:
        """No election, no failed write, nothing left over; the next snapshot succeeds."""
        self.lost()
        for writer in self.writers:
            writer.wait_more(20)
        term, taken = self.term, self.before["taken"]
        self.take()
        wait_for(lambda: snapshots(self.leader)["taken"] > taken, "the next snapshot", 90)
        assert {node.status()["term"] for node in self.cluster.running()} == {term}
        assert not any(writer.failures for writer in self.writers)

    def end(self) -> None:
        for writer in self.writers:
            assert not writer.stop().failures
        self.cluster.assert_everywhere(*self.writers)
        assert "Traceback" not in self.leader.output()


def overwrite(node: ServeProcess) -> None:
    """About a megabyte, always under the same keys."""
    for first in range(0, KEYS, KEYS_AT_ONCE):
        puts = [
            {"op": "put", "key": f"filled/{key}", "value": VALUE}
            for key in range(first, first + KEYS_AT_ONCE)
        ]
        reply = node.call("POST", "/v1/txn", {"success": puts})
        assert reply.ok, reply


def partials(node: ServeProcess) -> list[Path]:
    return list((node.directory / "snapshots").glob("*.partial"))


def snapshots(node: ServeProcess) -> dict[str, Any]:
    view: dict[str, Any] = node.call("GET", "/v1/snapshots").json()
    return view


def readers(node: ServeProcess) -> list[str]:
    """The processes that LMDB keeps pages of the state for."""
    current = (node.directory / "CURRENT").read_text(encoding="utf-8").strip()
    path = str(node.directory / current)
    with lmdb.open(path, readonly=True, map_size=1 << 40) as state:
        return [line.split()[0] for line in state.readers().splitlines()[1:] if line.split()]


def kill(process: psutil.Process) -> None:
    process.kill()


def starve(process: psutil.Process) -> None:
    """No further page of memory for it."""
    resource.prlimit(process.pid, resource.RLIMIT_AS, (1, 1))


@pytest.mark.timeout(240)
def test_a_killed_or_starved_writer_costs_one_snapshot(cluster: Cluster) -> None:
    """kill -9 of the subprocess, then no memory for the next one, while clients write through every
    node."""
    stage = Stage(cluster)
    kill(stage.subprocess)
    stage.survived()
    stage.subprocess = stage.take()
    starve(stage.subprocess)
    stage.survived()
    stage.end()


@pytest.mark.full  # takes as long as the real limit
@pytest.mark.timeout(240)
def test_a_writer_that_stands_still_is_noticed(cluster: Cluster) -> None:
    """A stopped subprocess holds pages of the state: it is ended after the limit."""
    stage = Stage(cluster)
    stage.subprocess.suspend()
    wait_for(
        lambda: "gave no sign of life" in stage.leader.output(), "the limit to pass", STALL_S + 15
    )
    stage.survived()
    stage.end()


@pytest.mark.timeout(180)
def test_the_writer_dies_with_its_node(cluster: Cluster) -> None:
    """kill -9 of the node ends the subprocess too, even one that is stopped."""
    stage = Stage(cluster)
    for stopped in (False, True):
        if stopped:
            stage.subprocess = stage.take()
            stage.subprocess.suspend()
        stage.leader.kill()
        wait_for(lambda: ended(stage.subprocess), "the subprocess to be gone", 5)
        stage.leader.start()
        wait_for(lambda: not partials(stage.leader), "the partial file to be removed")
        stage.cluster.wait_leader()
    for writer in stage.writers:
        writer.stop()
    cluster.assert_everywhere(*stage.writers)


def ended(process: psutil.Process) -> bool:
    """Gone, or waiting for whoever adopted it."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.mark.timeout(180)
def test_a_killed_writer_does_not_make_the_state_grow(cluster: Cluster) -> None:
    """LMDB keeps what a reader can see; once it is dead, overwriting the same keys reuses it. The
    first rounds find the room for what the history holds of the one before."""
    stage = Stage(cluster)
    for writer in stage.writers:
        writer.stop()
    kill(stage.subprocess)
    stage.lost()
    sizes = []
    for _ in range(6):
        overwrite(stage.leader)
        sizes.append(state_file(stage.leader).stat().st_size)
    assert sizes[-1] <= sizes[2] + 1024 * 1024, sizes  # three more rounds would be three times that


def state_file(node: ServeProcess) -> Path:
    current = (node.directory / "CURRENT").read_text(encoding="utf-8").strip()
    return node.directory / current / "data.mdb"
