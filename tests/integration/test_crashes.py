"""What was acknowledged survives kill -9 of anyone, pauses, and changes of the leader."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import resource
import signal
import time

import pytest

from tests.cluster import (
    Cluster,
    ServeProcess,
    Writer,
    config_text,
    free_port,
    static_cluster,
    wait_for,
)
from tests.crash_sweep.strace import Fault, Injection, Strace, needs_strace

IO_ERROR = 74  # the exit code for a disk that refused

FULL = "20" if os.environ.get("DENGINE_CRASH_SWEEP") else "6"  # two of each kind
ROUNDS = int(os.environ.get("DENGINE_CRASH_ROUNDS", FULL))


def writers_on_all(cluster: Cluster) -> list[Writer]:
    return [Writer(node, f"w{i}").start() for i, node in cluster.nodes.items()]


@pytest.mark.timeout(300)
def test_kill_9_under_load_loses_nothing_acknowledged(cluster: Cluster, rng: random.Random) -> None:
    """Round after round the leader, a follower or all three are killed while clients write through
    every node. The cluster goes on by itself, the killed come back with the same command, and at
    the end every acknowledged key is on every node."""
    static_cluster(cluster, 1, 2, 3)
    writers = writers_on_all(cluster)
    for number in range(ROUNDS):
        leader = cluster.wait_leader()
        followers = [node for node in cluster.running() if node is not leader]
        kind = ("leader", "follower", "all")[number % 3]
        victims = {"leader": [leader], "follower": [rng.choice(followers)]}.get(
            kind, cluster.running()
        )
        print(f"round {number}: kill {kind}: {[v.node_id for v in victims]}")
        for writer in writers:
            writer.wait_more(rng.randrange(1, 50))
        for victim in victims:
            victim.signal(signal.SIGKILL)
        for victim in victims:
            victim.wait_exit()
        for writer in writers:
            if writer.node not in victims:
                writer.wait_more(5)
        for victim in victims:
            victim.start()
        for writer in writers:
            writer.wait_more(5)
    for writer in writers:
        writer.stop()
    cluster.assert_everywhere(*writers)


def test_a_leader_that_freezes_for_five_seconds_never_answers_from_the_past(
    cluster: Cluster,
) -> None:
    """The others elect a new leader meanwhile. The old one, awake again, follows; no read it
    answers, at any level that promises it, shows the value from before its sleep."""
    static_cluster(cluster, 1, 2, 3)
    frozen = cluster.wait_leader()
    others = [node for node in cluster.running() if node is not frozen]
    assert frozen.put("register", "old").ok
    writers = [Writer(node, f"w{node.node_id}").start() for node in others]
    for writer in writers:
        writer.wait_more(20)
    until = time.monotonic() + 5.0
    frozen.signal(signal.SIGSTOP)
    try:
        successor = cluster.wait_leader(among=others)
        assert successor is not frozen
        assert successor.put("register", "new").ok
        for writer in writers:
            writer.wait_more(20)
        wait_for(lambda: time.monotonic() >= until, "five seconds of sleep")
    finally:
        frozen.signal(signal.SIGCONT)
    assert_never_stale(frozen)
    assert cluster.wait_leader() is not None
    wait_for(lambda: frozen.status()["role"] == "follower", "the old leader to follow")
    for writer in writers:
        writer.stop()
    cluster.assert_everywhere(*writers)


def assert_never_stale(node: ServeProcess) -> None:
    """From its first answer on, `node` shows "new" or an error, until it shows "new" at both."""
    seen: dict[str, bytes] = {}

    def both_new() -> bool:
        for consistency in ("lease", "linearizable"):
            reply = node.get("register", consistency)
            assert not reply.ok or reply.body == b"new", f"stale {consistency} read: {reply}"
            seen[consistency] = reply.body
        return set(seen.values()) == {b"new"}

    wait_for(both_new, "the old leader to answer with the new value")


def test_leadership_moves_on_request_under_load(cluster: Cluster) -> None:
    """An operator moves leadership to every node in turn while clients write through all of them:
    it arrives where it was sent, writes go on within a second or so, and none is lost."""
    static_cluster(cluster, 1, 2, 3)
    writers = writers_on_all(cluster)
    for target in (1, 2, 3, 1):
        for writer in writers:
            writer.wait_more(20)
        reply = cluster.nodes[target].call("POST", "/v1/cluster/leader", {"id": target})
        assert reply.ok, reply
        assert cluster.wait_leader().node_id == target
    for writer in writers:
        writer.wait_more(20)
        assert writer.stop().longest_gap_s() < 2.0
    cluster.assert_everywhere(*writers)


def test_a_graceful_stop_of_the_leader_hands_over_and_exits_0(cluster: Cluster) -> None:
    """SIGTERM moves leadership away before the process ends, so the others hardly notice."""
    static_cluster(cluster, 1, 2, 3)
    leader = cluster.wait_leader()
    others = [node for node in cluster.running() if node is not leader]
    writers = [Writer(node, f"w{node.node_id}").start() for node in others]
    for writer in writers:
        writer.wait_more(20)
    assert leader.stop() == 0
    for writer in writers:
        writer.wait_more(20)
        assert writer.stop().longest_gap_s() < 2.0
    leader.start()
    cluster.wait_leader()
    cluster.assert_everywhere(*writers)


def test_without_a_majority_nothing_is_acknowledged(cluster: Cluster) -> None:
    """One of three alone takes no write, serves no linearizable read, and says whom it misses."""
    static_cluster(cluster, 1, 2, 3)
    alone, *others = cluster.running()
    assert alone.put("key", "value").ok
    cluster.wait_applied()
    for node in others:
        node.kill()
    wait_for(lambda: not alone.ready(), "node 1 to say that it is not ready")
    assert alone.request("GET", "/livez").ok
    soon = {"Dengine-Timeout-Ms": "1000"}
    assert alone.request("PUT", "/v1/kv/key", b"lost", soon).status in (503, 504)
    assert alone.request("GET", "/v1/kv/key", headers=soon).status in (503, 504)
    assert alone.get("key", "eventual").ok
    for node in others:
        node.start()
    cluster.wait_leader()
    assert alone.put("key", "kept").ok


def test_a_refused_disk_write_ends_the_process_and_a_restart_goes_on(cluster: Cluster) -> None:
    """An I/O error of log or state is never retried: the node ends with code 74 though a request
    waits, and the next start has everything that was acknowledged."""
    port = free_port()
    node = cluster.node(1, config_text(1, {1: port}, 2, 2, "founding_wait_ms = 0\n"), port)
    node.start()
    wait_for(node.ready, "node 1 to lead")
    assert node.put("before", "kept").ok
    limit = (node.directory / "log" / "data.mdb").stat().st_size + 8192
    resource.prlimit(node.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    acknowledged = ["before"]
    with contextlib.suppress(OSError, http.client.HTTPException):
        for number in range(100):
            if node.put(f"key{number}", "x" * 4096).ok:
                acknowledged.append(f"key{number}")
    assert node.wait_exit() == IO_ERROR
    assert "data.mdb" in node.output()
    assert "Traceback" not in node.output()
    node.start()
    wait_for(node.ready, "node 1 to lead again")
    assert [key for key in acknowledged if not node.get(key).ok] == []


@needs_strace
def test_a_refused_page_of_the_state_ends_the_process_and_is_rebuilt(cluster: Cluster) -> None:
    """Nobody waits for the state to reach the disk, yet what does not is noticed within seconds:
    the kernel would go on with the page as if it were there, until it has to read it again."""
    port = free_port()
    node = cluster.node(1, config_text(1, {1: port}, 2, 2, "founding_wait_ms = 0\n"), port)
    node.start()
    wait_for(node.ready, "node 1 to lead")
    data = node.directory / "state-1" / "data.mdb"
    trace = node.directory.parent / "trace"
    injection = Injection(trace, "sync_file_range", [data], Fault.EIO, 1, children=True)
    injection.attach(node.pid)
    try:
        assert node.put("key", "kept").ok
        assert node.wait_exit() == IO_ERROR
    finally:
        injection.detach(node.pid)
    assert "state-1/data.mdb: Input/output error" in node.output()
    node.start()
    wait_for(node.ready, "node 1 to lead again")
    assert "rebuilding it" in node.output()
    assert node.get("key").body == b"kept"


@needs_strace
def test_a_stop_that_is_killed_as_the_disk_refuses_has_its_state_rebuilt(cluster: Cluster) -> None:
    """Only the process that asked was told that the disk refused a page: whoever reads it next in
    this boot may be given an older one."""
    port = free_port()
    node = cluster.node(1, config_text(1, {1: port}, 2, 2, "founding_wait_ms = 0\n"), port)
    node.start()
    wait_for(node.ready, "node 1 to lead")
    assert node.put("key", "kept").ok
    only = ["-P", str(node.directory / "state-1" / "data.mdb")]
    refused = ["-e", "inject=fdatasync:error=EIO:signal=KILL:when=1"]
    options = ["-e", "trace=fdatasync", *only, *refused]
    strace = Strace(node.directory.parent / "trace", options, children=True)
    strace.attach(node.pid)
    try:
        node.signal(signal.SIGTERM)
        assert node.wait_exit() == -signal.SIGKILL
    finally:
        strace.detach(node.pid)
    node.start()
    wait_for(node.ready, "node 1 to lead again")
    assert "rebuilding it" in node.output()
    assert node.get("key").body == b"kept"
