"""A cluster grows while clients write, and never rests on a number of voters it should not have."""

from __future__ import annotations

import random

from dengine.storage.log_store import LogStore
from tests.cluster import (
    Cluster,
    EventStream,
    ServeProcess,
    Writer,
    config_text,
    free_port,
    guide_files,
    joiner,
    static_cluster,
    voters,
    wait_for,
)

ODD = '[raft.membership]\npromotion = "odd"\n'


def test_no_write_fails_while_one_node_grows_to_three(cluster: Cluster) -> None:
    """Clients write through node 1 all the time, and through nodes 2 and 3 from the moment these
    say they are ready: no write fails, and every acknowledged key is on every node."""
    nodes = guide_files(cluster)
    writers = []
    for node in nodes.values():
        node.start()
        wait_for(node.ready, f"node {node.node_id} to be ready")
        writers.append(Writer(node, f"w{node.node_id}").start())
        writers[-1].wait_more(20)
    cluster.wait_voters(1, 2, 3)
    for writer in writers:
        writer.wait_more(100)
    for writer in writers:
        assert writer.stop().failures == []
    cluster.assert_everywhere(*writers)


def founder(cluster: Cluster, extra: str) -> ServeProcess:
    port = free_port()
    node = cluster.node(1, config_text(1, {1: port}, 2, 2, extra), port).start()
    wait_for(node.ready, "the founder to be ready")
    return node


def voter_counts_in_log(node: ServeProcess) -> set[int]:
    """How many voters each membership in the stopped node's log has."""
    store = LogStore(node.directory / "log")
    try:
        _, memberships = store.load()
        return {len(membership.voters) for _, membership in memberships}
    finally:
        store.close()


def assert_never(count: int, cluster: Cluster, watches: list[EventStream]) -> None:
    """No announced and no logged membership ever had `count` voters."""
    for watch in watches:
        assert count not in {len(voters(view)) for view in watch.events}, watch.events
    for node in cluster.nodes.values():
        assert node.stop() == 0
        assert count not in voter_counts_in_log(node)


def test_odd_promotion_goes_from_one_voter_to_three_and_never_shows_two(cluster: Cluster) -> None:
    """Under `odd` the first joiner waits as a learner, with a reason a person understands, until a
    second one is ready; then both become voters at once. No write fails meanwhile."""
    first = founder(cluster, ODD)
    watches = [EventStream(first, "/v1/cluster/watch").start()]
    writer = Writer(first, "load").start()
    second = joiner(cluster, 2).start()
    watches.append(EventStream(wait_ready(second), "/v1/cluster/watch").start())

    def waits() -> bool:
        reasons = {m["id"]: m["reason"] or "" for m in first.cluster()["members"]}
        return "waiting for one more learner" in reasons.get(2, "")

    wait_for(waits, "node 2 to wait for one more learner")
    third = joiner(cluster, 3).start()
    watches.append(EventStream(wait_ready(third), "/v1/cluster/watch").start())
    cluster.wait_voters(1, 2, 3)
    wait_for(lambda: voters(watches[0].events[-1]) == {1, 2, 3}, "the watch to show three voters")
    assert writer.stop().failures == []
    cluster.assert_everywhere(writer)
    assert_never(2, cluster, watches)


def wait_ready(node: ServeProcess) -> ServeProcess:
    wait_for(node.ready, f"node {node.node_id} to be ready")
    return node


def test_odd_promotion_goes_from_three_voters_to_five_and_never_shows_four(
    cluster: Cluster,
) -> None:
    """Under `odd` nodes 4 and 5 become voters together, and two of five may then die."""
    static_cluster(cluster, 1, 2, 3, extra=ODD)
    watches = [EventStream(cluster.nodes[1], "/v1/cluster/watch").start()]
    writer = Writer(cluster.nodes[1], "load").start()
    for node_id in (4, 5):
        wait_ready(joiner(cluster, node_id).start())
    cluster.wait_voters(1, 2, 3, 4, 5)
    wait_for(lambda: cluster.nodes[1].cluster()["fault_tolerance"] == 2, "all to have answered")
    assert writer.stop().failures == []

    leader = cluster.wait_leader()
    lost = [leader, next(node for node in cluster.running() if node is not leader)]
    for node in lost:
        node.kill()
    cluster.wait_leader()
    assert cluster.running()[0].put("two of five", "are gone").ok
    for node in lost:
        node.start()
    cluster.wait_voters(1, 2, 3, 4, 5)
    cluster.assert_everywhere(writer)
    assert_never(4, cluster, watches)


def test_joining_again_and_through_a_follower_changes_nothing_twice(cluster: Cluster) -> None:
    """A joiner that knows only a follower joins too, and a restart in the middle of the joining
    does no harm."""
    static_cluster(cluster, 1, 2, 3)
    leader = cluster.wait_leader()
    follower = next(node for node in cluster.running() if node is not leader)
    port = free_port()
    text = config_text(4, {follower.node_id: follower.port, 4: port}, 3, 0)
    newcomer = cluster.node(4, text, port).start()
    wait_for(lambda: newcomer.request("GET", "/livez").ok, "node 4 to live")
    newcomer.kill()
    newcomer.start()
    view = cluster.wait_voters(1, 2, 3, 4)
    assert [m["id"] for m in view["members"]].count(4) == 1


def test_reads_at_every_level_on_every_node(cluster: Cluster, rng: random.Random) -> None:
    """A linearizable or lease read through any node sees what any other node acknowledged before;
    an eventual read gets there."""
    static_cluster(cluster, 1, 2, 3)
    nodes = list(cluster.nodes.values())
    for number in range(100):
        value = f"value {number}"
        assert rng.choice(nodes).put("register", value).ok
        for consistency in ("linearizable", "lease"):
            reply = rng.choice(nodes).get("register", consistency)
            assert reply.status == 200, reply
            assert reply.body.decode() == value, f"stale {consistency} read in round {number}"

    def settled() -> bool:
        return all(node.get("register", "eventual").body == b"value 99" for node in nodes)

    wait_for(settled, "eventual reads to show the last value")
    for node in nodes:
        for consistency in ("linearizable", "lease", "eventual"):
            assert node.get("never written", consistency).status == 404
