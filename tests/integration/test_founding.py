"""Three voters founded together from one static list."""

from __future__ import annotations

import json
import random
import time

import pytest

from dengine.storage.environment import open_environment
from tests.cluster import (
    ROOT,
    Cluster,
    Writer,
    config_text,
    free_port,
    static_cluster,
    voters,
    wait_for,
)


def test_three_nodes_found_one_cluster_from_one_list(cluster: Cluster) -> None:
    """The files of examples/three-nodes-standalone make one cluster of three voters."""
    ports = {node_id: free_port() for node_id in (1, 2, 3)}
    for node_id, own in ports.items():
        file = ROOT / "examples" / "three-nodes-standalone" / "config" / f"n{node_id}.toml"
        text = file.read_text(encoding="utf-8")
        for other, port in ports.items():
            text = text.replace(f":908{other}", f":{port}")
        cluster.node(node_id, text, own).start()
    cluster.wait_voters(1, 2, 3)
    wait_for(lambda: cluster.nodes[1].cluster()["fault_tolerance"] == 1, "all to have answered")
    assert len({node.status()["cluster_id"] for node in cluster.running()}) == 1
    assert cluster.wait_leader().put("key", "value").ok
    cluster.wait_applied()
    assert all(node.get("key", "eventual").body == b"value" for node in cluster.running())


def test_two_of_three_founders_wait_for_the_third(cluster: Cluster) -> None:
    """No cluster is founded, and nothing acknowledged, before all listed nodes agree."""
    ports = {node_id: free_port() for node_id in (1, 2, 3)}
    for node_id in (1, 2):
        cluster.node(node_id, config_text(node_id, ports, 0, 2), ports[node_id]).start()
    first = cluster.nodes[1]
    wait_for(lambda: first.request("GET", "/livez").ok, "node 1 to live")
    tempted = Writer(first, "tempted").start()
    wait_for(lambda: tempted.failures, "a write to be refused")
    cluster.node(3, config_text(3, ports, 0, 2), ports[3])
    assert not first.ready()
    for path in ("/v1/cluster", "/v1/cluster/watch"):
        refused = first.call("GET", path)
        assert (refused.status, refused.json()["error"]) == (503, "cluster_unavailable")
        assert refused.json()["message"] == "this node does not belong to a cluster yet"
    assert tempted.acknowledged == {}
    cluster.nodes[3].start()
    cluster.wait_voters(1, 2, 3)
    tempted.wait_more(10)
    tempted.stop()
    cluster.assert_everywhere(tempted)


def test_a_founder_wiped_later_is_told_to_join(cluster: Cluster) -> None:
    """A listed node with an empty directory beside the cluster it once founded founds nothing."""
    static_cluster(cluster, 1, 2, 3)
    wiped = cluster.nodes[3]
    wiped.kill()
    for path in sorted(wiped.directory.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert wiped.start().wait_exit() == 76
    assert "role = 3" in wiped.tail()
    assert voters(cluster.nodes[1].cluster()) == {1, 2, 3}


def test_who_would_found_beside_a_cluster_is_told_to_join(cluster: Cluster) -> None:
    """A newcomer whose own entry lacks role = 3 stops and says what to change, and after that it
    joins; the cluster that is there notices nothing."""
    ports = {node_id: free_port() for node_id in (1, 2)}
    alone = config_text(1, {1: ports[1]}, 2, 2)
    first = cluster.node(1, alone, ports[1]).start()
    wait_for(first.ready, "node 1 to lead")
    second = cluster.node(2, config_text(2, ports, 0, 2), ports[2])
    assert second.start().wait_exit() == 76
    assert "set role = 3 to join" in second.tail()
    assert voters(first.cluster()) == {1}
    second.config.write_text(config_text(2, ports, 3, 0), encoding="utf-8")
    second.start()
    cluster.wait_voters(1, 2)


def test_a_node_killed_while_its_founding_write_hangs_founds_at_the_next_start(
    cluster: Cluster,
) -> None:
    """The identity names the cluster only once the log holds its first entry: kill -9 between the
    two would leave a single node that waits for ever for somebody to fill its log."""
    port = free_port()
    node = cluster.node(1, config_text(1, {1: port}, 2, 2), port).start()
    wait_for(lambda: node.request("GET", "/livez").ok, "node 1 to live")
    log = open_environment(node.directory / "log", durable=True, remedy="")
    with log.begin(write=True):  # LMDB has one writer: the node's own write waits for this one
        wait_for(lambda: "→ Candidate" in node.output(), "node 1 to found")
        assert node.request("GET", "/livez").ok
        node.kill()
    log.close()
    node.start()
    wait_for(lambda: node.put("key", "value").ok, "node 1 to lead")


@pytest.mark.parametrize("attempt", range(3))
def test_founders_that_die_in_the_midst_of_it_found_one_cluster(
    cluster: Cluster, rng: random.Random, attempt: int
) -> None:
    """Whatever they have agreed on until then, they go on from there, and nobody is left out."""
    ports = {node_id: free_port() for node_id in (1, 2, 3)}
    for node_id in ports:
        cluster.node(node_id, config_text(node_id, ports, 0, 2), ports[node_id]).start()
    for _ in range(3):
        listening = time.monotonic() + rng.uniform(0, 1.0)  # a start takes half a second
        wait_for(lambda end=listening: time.monotonic() >= end, "the moment to strike")
        for node_id in rng.sample(sorted(ports), rng.randint(1, 3)):
            cluster.nodes[node_id].kill()
            cluster.nodes[node_id].start()
    cluster.wait_voters(1, 2, 3)
    assert len({node.status()["cluster_id"] for node in cluster.running()}) == 1
    assert cluster.wait_leader().put("key", "value").ok
    for node in cluster.running():
        identity = json.loads((node.directory / "identity.json").read_text(encoding="utf-8"))
        assert identity["cluster_id"] == node.status()["cluster_id"]
        assert "pledge" not in identity


def test_founders_with_different_lists_are_told_so(cluster: Cluster) -> None:
    """They belong to no cluster yet, so "foreign cluster" would send a person the wrong way."""
    ports = {node_id: free_port() for node_id in (1, 2, 3)}
    short = {node_id: ports[node_id] for node_id in (1, 2)}
    cluster.node(1, config_text(1, ports, 0, 2), ports[1]).start()
    cluster.node(2, config_text(2, short, 0, 2), ports[2]).start()
    for node_id, other in ((1, 2), (2, 1)):
        said = f"node {other} at 127.0.0.1:{ports[other]}: different lists"
        node = cluster.nodes[node_id]
        wait_for(lambda node=node, said=said: said in node.output(), said)
