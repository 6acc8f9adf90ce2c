"""Addresses of real machines, as the guide (examples/single-node-expansion/README.md) has them:
three machines, played by three network namespaces.
"""

from __future__ import annotations

import signal

from tests.cluster import (
    GUIDE_CONFIGS,
    Cluster,
    ServeProcess,
    Writer,
    config_text,
    free_port,
    static_cluster,
    wait_for,
)
from tests.namespaces import inside, machines, needs_namespaces

HOSTS = {1: "192.168.1.10", 2: "192.168.1.11", 3: "192.168.1.12"}
CLIENT = "192.168.1.100"


def production_text(node_id: int) -> str:
    """Node 1 keeps the file of step 1; 2 and 3 have those of "On three machines"."""
    text = (GUIDE_CONFIGS / f"n{node_id}.toml").read_text(encoding="utf-8")
    if node_id == 1:
        return text
    for other, host in HOSTS.items():
        text = text.replace(f"0.0.0.0:908{other}", f"{host}:908{other}")
    return text


def node_on(cluster: Cluster, node_id: int, namespace: str) -> ServeProcess:
    node = cluster.node(node_id, production_text(node_id), 9080 + node_id)
    node.host = HOSTS[node_id]
    node.prefix = ("ip", "netns", "exec", namespace)
    return node


def test_everybody_moved_while_the_cluster_was_down(cluster: Cluster) -> None:
    """All three nodes come back under other addresses, which only their files know: they find each
    other by these, elect a leader, and the cluster learns where everyone is."""
    static_cluster(cluster, 1, 2, 3)
    assert cluster.nodes[1].put("kept", "yes").ok
    ports = {node_id: free_port() for node_id in cluster.nodes}
    for node in cluster.nodes.values():
        node.signal(signal.SIGTERM)
    for node_id, node in cluster.nodes.items():
        assert node.wait_exit() == 0
        node.port = ports[node_id]
        node.config.write_text(config_text(node_id, ports, 0, 2), encoding="utf-8")
    for node in cluster.nodes.values():
        node.start()
    cluster.wait_leader()

    def addresses() -> dict[int, str]:
        return {m["id"]: m["address"] for m in cluster.nodes[1].cluster()["members"]}

    right = {node_id: f"127.0.0.1:{port}" for node_id, port in ports.items()}
    wait_for(lambda: addresses() == right, f"the committed addresses to be {right}")
    assert cluster.nodes[2].get("kept").body == b"yes"


@needs_namespaces
def test_production_addresses_with_node_1_on_its_wildcard(cluster: Cluster) -> None:
    """Node 1 was started with 0.0.0.0 and is never restarted; the others reach it at 192.168.1.10
    and the cluster learns that address. Growth fails no write, the leader's loss is survived, and
    node 1 comes back with n1.toml."""
    with machines(HOSTS, CLIENT) as namespaces, inside(namespaces[0]):
        nodes = {node_id: node_on(cluster, node_id, namespaces[node_id]) for node_id in HOSTS}
        wait_for(nodes[1].start().ready, "node 1 to be ready")
        writers = [Writer(nodes[1], "w1").start()]
        for node_id in (2, 3):
            wait_for(nodes[node_id].start().ready, f"node {node_id} to be ready")
            writers.append(Writer(nodes[node_id], f"w{node_id}").start())
        cluster.wait_voters(1, 2, 3)

        def addresses() -> dict[int, str]:
            return {m["id"]: m["address"] for m in nodes[2].cluster()["members"]}

        right = {node_id: f"{host}:908{node_id}" for node_id, host in HOSTS.items()}
        wait_for(lambda: addresses() == right, f"the committed addresses to be {right}")
        for writer in writers:
            writer.wait_more(20)
            assert writer.stop().failures == []

        nodes[1].kill()
        cluster.wait_leader()
        assert nodes[3].put("without node 1", "yes").ok
        wait_for(nodes[1].start().ready, "node 1 to be back")
        assert nodes[1].get("without node 1").body == b"yes"
        cluster.wait_voters(1, 2, 3)
        cluster.assert_everywhere(*writers)
        for node in nodes.values():
            node.kill()


def test_the_advertised_address_is_the_one_that_everybody_dials(cluster: Cluster) -> None:
    """`advertise_address` of founder and joiners is what the cluster commits and clients are told,
    though the files name other addresses. One of the joiners is read_only: it stays a learner also
    while another one is promoted and at an operator's word, and serves reads at every level."""
    ports = {node_id: free_port() for node_id in (1, 2, 3)}
    advertised = {node_id: f"127.0.0.{10 + node_id}:{port}" for node_id, port in ports.items()}
    for node_id, (role, status) in {1: (2, 2), 2: (3, 1), 3: (3, 0)}.items():
        known = {i: ports[i] for i in {1, node_id}}
        extra = f'advertise_address = "{advertised[node_id]}"\nfounding_wait_ms = 100\n'
        text = config_text(node_id, known, role, status, extra)
        text = text.replace('listen_address = "127.0.0.1', 'listen_address = "0.0.0.0')
        node = cluster.node(node_id, text, ports[node_id]).start()
        wait_for(node.ready, f"node {node_id} to be ready")
    cluster.wait_voters(1, 3)  # node 2 was ready before node 3
    first, reader, _ = cluster.nodes.values()
    members = {m["id"]: m for m in first.cluster()["members"]}
    assert {i: m["address"] for i, m in members.items()} == advertised
    assert first.cluster()["leader"]["address"] == advertised[1]

    wanted = ("learner", "read_only", "read_only: it is never promoted")
    assert tuple(members[2][name] for name in ("role", "status", "reason")) == wanted
    refused = first.call("POST", "/v1/cluster/promote", {"ids": [2]})
    assert refused.status == 409
    assert "read_only" in refused.json()["message"]
    for number, consistency in enumerate(("linearizable", "lease")):
        assert reader.put("key", str(number)).ok, "it forwards what it cannot do"
        assert reader.get("key", consistency).body == str(number).encode()
    wait_for(lambda: reader.get("key", "eventual").body == b"1", "its own state to have it")
    reader.kill()
    wait_for(reader.start().ready, "the reader to be back")
    assert reader.status()["role"] == "learner"
    assert reader.get("key").body == b"1"
    cluster.nodes[3].kill()
    dialled = f"node 3 at {advertised[3]}: refused"
    wait_for(lambda: dialled in first.output(), "node 1 to dial node 3 where it said it is")
