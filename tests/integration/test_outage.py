"""A cluster that loses its voters one after the other: what is said, and what callers are told."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator

from tests.cluster import Cluster, Reply, ServeProcess, joiner, static_cluster, wait_for

PATIENT = "[raft.election]\ntimeout_ms_min = 2000\ntimeout_ms_max = 3000\n"
SOON = {"Dengine-Timeout-Ms": "500"}  # before anybody can notice that the others are frozen


@contextlib.contextmanager
def frozen(*nodes: ServeProcess) -> Iterator[None]:
    for node in nodes:
        node.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for node in nodes:
            node.signal(signal.SIGCONT)


def put(node: ServeProcess) -> Reply:
    return node.request("PUT", "/v1/kv/key", b"value", SOON)


def assert_timed_out(reply: Reply) -> None:
    error = reply.json()
    assert reply.status == 504, reply
    assert (error["error"], error["code"]) == ("timeout", 1001)
    assert (error["retryable"], error["outcome"]) == (True, "unknown")


def test_a_write_that_nobody_answers_in_time_may_have_happened(cluster: Cluster) -> None:
    """On the leader, whose followers are frozen, and on a follower that forwarded it to a frozen
    leader: 504, and the outcome is unknown."""
    static_cluster(cluster, 1, 2, 3, extra=PATIENT)
    leader = cluster.wait_leader()
    followers = [node for node in cluster.running() if node is not leader]
    assert all(put(node).ok for node in cluster.running())
    with frozen(*followers):
        assert_timed_out(put(leader))
    assert cluster.wait_leader().put("key", "again").ok
    leader = cluster.wait_leader()
    follower = next(node for node in cluster.running() if node is not leader)
    assert put(follower).ok
    with frozen(leader):
        assert_timed_out(put(follower))


def test_what_is_said_while_one_voter_after_the_other_is_lost(cluster: Cluster) -> None:
    """Without one of three nothing more may fail, as the new leader knows from its first answer
    on. Without two of three the last one names both and why each fails: to operators, to probes,
    and in its log."""
    static_cluster(cluster, 1, 2, 3)
    assert wait_for(lambda: cluster.nodes[1].cluster()["fault_tolerance"], "all to answer") == 1
    leader = cluster.wait_leader()
    survivor, second = (node for node in cluster.running() if node is not leader)
    leader.kill()

    def led_by_another() -> list[dict[str, object]]:
        views = [node.cluster() for node in (survivor, second)]
        assert all(view.get("fault_tolerance", 0) == 0 for view in views), views
        return [v for v in views if v and v["leader"] and v["leader"]["id"] != leader.node_id]

    (view, *_) = wait_for(led_by_another, "a new leader")
    assert view["advice"]
    wait_for(lambda: leader.node_id in silent(survivor), "the dead one to be known as dead")
    advice = survivor.cluster()["advice"]
    assert advice == f"bring back what does not answer: node {leader.node_id}"

    second.kill()
    wait_for(lambda: survivor.cluster()["leader"] is None, "the last one to have no leader")
    wait_for(lambda: survivor.cluster()["advice"].count(" refused") == 2, "both reasons")
    view = survivor.cluster()
    assert view["fault_tolerance"] == 0
    expected = "no leader; " + "; ".join(
        f"node {node.node_id} (127.0.0.1:{node.port}) refused"
        for node in sorted((leader, second), key=lambda node: node.node_id)
    )
    assert view["advice"] == expected
    newcomer = joiner(cluster, 4).start()
    probe = survivor.call("GET", "/readyz?verbose")
    assert probe.status == 503
    assert probe.json()["reasons"] == [expected]
    assert probe.json()["checks"]["leader"] is False
    wait_for(
        lambda: re.search(rf"WARNING .*{re.escape(expected)}$", survivor.output(), re.M), "the line"
    )
    reasons = {"cannot join yet; ", f" 127.0.0.1:{survivor.port}: no leader; "}
    reasons |= {f" 127.0.0.1:{node.port}: refused" for node in (leader, second)}
    wait_for(
        lambda: any(all(r in line for r in reasons) for line in newcomer.lines()),
        "the newcomer to say why it cannot join",
    )


def silent(node: ServeProcess) -> set[int]:
    return {m["id"] for m in node.cluster()["members"] if m["ready"] is False}
