"""Members that hold different states find out, and the wrong ones start over or stop."""

from __future__ import annotations

import http.client
import random
from typing import Any
from zlib import crc32

import lmdb
import pytest

from dengine.storage.state_records import (
    APPLIED_KEY,
    DATABASES_MAX,
    REQUIRED,
    StateDigest,
    read_applied,
    record_hash,
)
from dengine.storage.state_store import DIGEST_EVERY
from tests.cluster import Cluster, ServeProcess, Writer, static_cluster, wait_for
from tests.crash_sweep.strace import Fault, Injection, needs_strace

SLOW = "max_bytes_per_s = 1048576\n"
MANY_MB = 6  # as many seconds of a download
QUICK = "[raft.snapshot]\nentries = 300\nretained_log_entries = 50\n"


def falsify(node: ServeProcess, key: bytes, value: bytes) -> None:
    """Change a record of a stopped node so that nothing on this node alone can notice: with a
    right CRC, and a state hash that agrees. Only the other members know better."""
    path = next(node.directory.glob("state-*"))
    with lmdb.open(str(path), map_size=1 << 40, max_dbs=DATABASES_MAX) as environment:
        keys, meta = (environment.open_db(name) for name in REQUIRED)
        with environment.begin(write=True) as txn:
            old = txn.get(key, db=keys)
            body = old[:25] + value
            new = body + crc32(body, crc32(key)).to_bytes(4, "little")
            txn.put(key, new, db=keys)
            raw = txn.get(APPLIED_KEY, db=meta)
            _, digest = read_applied(raw)
            assert isinstance(digest, StateDigest)
            wrong = int.from_bytes(digest.state_hash, "big")
            wrong += record_hash(0, key, new) - record_hash(0, key, old)
            data = raw[:24] + (wrong % 2**128).to_bytes(16, "big")
            txn.put(
                APPLIED_KEY, data + crc32(data, crc32(APPLIED_KEY)).to_bytes(4, "little"), db=meta
            )


def founded(cluster: Cluster, extra: str = QUICK) -> dict[int, ServeProcess]:
    static_cluster(cluster, 1, 2, 3, extra=extra)
    assert cluster.nodes[1].put("color", "blue").ok
    cluster.wait_applied()
    return cluster.nodes


def falsified(cluster: Cluster, *nodes: ServeProcess, value: bytes = b"FALSE") -> None:
    for number, node in enumerate(nodes):
        assert node.stop() == 0, node.tail()
        falsify(node, b"color", value + b"%d" % number)
        node.start()
    cluster.wait_leader()


def eventual(node: ServeProcess) -> Any:
    return node.get("color", "eventual").body


def test_a_follower_that_differs_gets_another_state(cluster: Cluster) -> None:
    """It stops serving what it held, says so, and holds the majority's state a moment later."""
    founded(cluster)
    leader = cluster.wait_leader()
    wrong = next(n for n in cluster.nodes.values() if n is not leader)
    falsified(cluster, wrong)
    wait_for(lambda: eventual(wrong) == b"FALSE0", "the false value, while nobody compares")
    writer = Writer(cluster.wait_leader(), "w", pause_s=0.0).start()
    wait_for(lambda: "differs from that of the majority" in wrong.output(), "the verdict", 30)
    wait_for(lambda: eventual(wrong) == b"blue", "the right value", 30)
    writer.stop()
    assert not writer.failures
    cluster.assert_everywhere(writer)


def test_a_leader_that_differs_steps_down_first(cluster: Cluster) -> None:
    """No answer comes from it any more: another leads, and it gets that one's state."""
    nodes = founded(cluster)
    falsified(cluster, nodes[1])
    leader = cluster.wait_leader()
    if leader is not nodes[1]:
        assert leader.call("POST", "/v1/cluster/leader", {"id": 1}).ok
    writer = Writer(nodes[2], "w", pause_s=0.0).start()
    wait_for(lambda: "differs from that of the majority" in nodes[1].output(), "the verdict", 30)
    wait_for(lambda: eventual(nodes[1]) == b"blue", "the right value", 30)
    writer.stop()
    cluster.assert_everywhere(writer)


@needs_strace
def test_a_wrong_leader_whose_disk_refuses_serves_nobody(cluster: Cluster) -> None:
    """It cannot put its snapshot aside, which may be wrong too, and so cannot throw its state away.
    It says so, another leads, a download of that snapshot ends in the middle, and once the disk is
    well again it gets the other one's state."""
    nodes = founded(cluster, QUICK + SLOW)
    for number in range(MANY_MB):
        assert nodes[1].put(f"large{number}", random.randbytes(500_000).hex()).ok
    cluster.wait_applied()
    falsified(cluster, nodes[1])
    soon = {"Dengine-Timeout-Ms": "100"}
    assert nodes[1].request("POST", "/v1/snapshots", b"", soon).ok
    leader = cluster.wait_leader()
    if leader is not nodes[1]:
        assert leader.call("POST", "/v1/cluster/leader", {"id": 1}).ok
    files = nodes[1].directory / "snapshots"
    (file,) = wait_for(lambda: list(files.glob("*.dsnap")), "a snapshot", 60)
    wait_for(lambda: nodes[1].request("HEAD", "/v1/snapshots/latest").ok, "it to be offered")
    name = file.relative_to(nodes[1].config.parent)  # as the node, which works there, calls it
    trace = nodes[1].config.parent / "trace"
    injection = Injection(
        trace, "rename,renameat,renameat2", [name], Fault.ENOSPC, 1, children=True
    )
    injection.attach(nodes[1].pid)
    while nodes[1].status()["last_applied"] % DIGEST_EVERY < DIGEST_EVERY - 20:
        assert nodes[2].put("near", "the next comparison").ok
    download = nodes[1].connect()
    download.request("GET", "/v1/snapshots/latest")
    answer = download.getresponse()
    answer.read(1000)
    writer = Writer(nodes[2], "w", pause_s=0.0).start()
    try:
        wait_for(lambda: injection.seen(nodes[1].pid), "the disk to refuse", 30)
        assert cluster.wait_leader(among=[nodes[2], nodes[3]]) is not nodes[1]
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            answer.read()
        ready = nodes[1].request("GET", "/readyz")
        assert ready.status == 503
        assert b"its state is wrong" in ready.body
        reply = nodes[1].get("color")
        assert (reply.status, b"FALSE" in reply.body) == (503, False)
    finally:
        download.close()
        injection.detach(nodes[1].pid)
        writer.stop()
    wait_for(lambda: eventual(nodes[1]) == b"blue", "the right value", 90)
    # What was under way when it stepped down it cannot tell: its result is one of the wrong state.
    assert [each for each in writer.failures if '"unknown"' not in each] == []
    cluster.assert_everywhere(writer)


def test_without_a_majority_all_stop(cluster: Cluster) -> None:
    """Three different states: nobody knows the right one, so nobody answers."""
    nodes = founded(cluster)
    for number, node_id in enumerate((1, 2)):
        falsified(cluster, nodes[node_id], value=b"FALSE %d" % number)
    writer = Writer(cluster.wait_leader(), "w", pause_s=0.0).start()
    for node in nodes.values():
        assert node.wait_exit(30) == 65, node.tail()
        assert "no majority agrees" in node.tail()
    writer.stop()
