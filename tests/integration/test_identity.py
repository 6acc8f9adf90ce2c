"""Who is who: wiped, copied and removed nodes harm nobody, and say what to do."""

from __future__ import annotations

import shutil

from dengine.kv.commands import COMMAND_VERSION
from dengine.storage.directory import DataDirectory
from tests.cluster import (
    Cluster,
    Writer,
    config_text,
    free_port,
    guide_files,
    static_cluster,
    voters,
    wait_for,
)

TRY_AGAIN = 75  # the exit code for "a later start may succeed"
IDENTITY = 76  # the exit code for "this directory may not take part"


def incarnation(view: dict[str, object], node_id: int) -> object:
    members = view["members"]
    assert isinstance(members, list)
    return next(m["incarnation"] for m in members if m["id"] == node_id)


def joining(node_id: int, address: str) -> dict[str, object]:
    """What a node of this release asks for that wants to join."""
    version = {"command_version": COMMAND_VERSION}
    return {"id": node_id, "incarnation": "abc", "address": address, **version}


def test_a_wiped_follower_is_filled_again_by_itself(cluster: Cluster) -> None:
    """With an empty directory and its usual file, a node comes back as a new incarnation: learner
    first, then voter, with all the data, while clients write."""
    nodes = guide_files(cluster)
    for node in nodes.values():
        node.start()
    before = cluster.wait_voters(1, 2, 3)
    writers = [Writer(nodes[i], f"w{i}").start() for i in (1, 2)]
    for writer in writers:
        writer.wait_more(50)
    nodes[3].kill()
    shutil.rmtree(nodes[3].directory)
    nodes[3].start()

    def back() -> bool:
        view = nodes[1].cluster()
        same = [m["incarnation"] for m in view["members"] if m["id"] == 3]
        whole = voters(view) == {1, 2, 3} and not view["joint"]
        return whole and len(same) == 1 and same[0] != incarnation(before, 3)

    wait_for(back, "node 3 to vote again", 30)
    for writer in writers:
        assert writer.stop().failures == []
    cluster.assert_everywhere(*writers)


def test_a_wiped_founder_does_not_found_a_second_cluster(cluster: Cluster) -> None:
    """Node 1 with an empty directory and n1.toml, beside the living cluster of 2 and 3: it stops
    with code 76 and a sentence that says what to do, and acknowledges not a single write."""
    nodes = guide_files(cluster)
    for node in nodes.values():
        node.start()
    cluster.wait_voters(1, 2, 3)
    assert nodes[1].put("kept", "yes").ok
    nodes[1].kill()
    shutil.rmtree(nodes[1].directory)
    cluster.wait_leader()
    living = Writer(nodes[2], "living").start()
    living.wait_more(20)

    nodes[1].start()
    tempted = Writer(nodes[1], "tempted").start()
    assert nodes[1].wait_exit() == IDENTITY
    assert tempted.stop().acknowledged == {}
    assert "role = 3" in nodes[1].tail()
    assert living.stop().failures == []
    assert nodes[2].get("kept").body == b"yes"
    assert voters(nodes[2].cluster()) == {1, 2, 3}


def test_a_copied_configuration_file_does_not_evict_the_living_node(cluster: Cluster) -> None:
    """A second machine started with node 2's file and an empty directory stays outside: node 2
    keeps its place and no write fails."""
    nodes = guide_files(cluster)
    for node in nodes.values():
        node.start()
    before = cluster.wait_voters(1, 2, 3)
    writers = [Writer(node, f"w{i}").start() for i, node in nodes.items()]
    port = free_port()
    ports = {1: nodes[1].port, 2: port, 3: nodes[3].port}
    copy = cluster.node(2, config_text(2, ports, 3, 0), port, name="copy").start()
    wait_for(lambda: copy.request("GET", "/livez").ok, "the copy to live")
    join = joining(2, f"127.0.0.1:{port}")  # as the copy asks
    refused = nodes[1].call("POST", "/v1/cluster/members", join)
    assert refused.status == 409
    assert "node 2 is alive at" in refused.json()["message"]
    for writer in writers:
        writer.wait_more(100)
        assert writer.stop().failures == []
    after = cluster.wait_voters(1, 2, 3)
    assert incarnation(after, 2) == incarnation(before, 2)
    cluster.assert_everywhere(*writers)


def test_a_copied_data_directory_does_not_disturb_the_living_node(cluster: Cluster) -> None:
    """A copy of node 2's whole directory, started elsewhere while node 2 lives: node 2 keeps its
    place, no write fails, and the copy ends with 76 without having acknowledged anything."""
    nodes = guide_files(cluster)
    for node in nodes.values():
        node.start()
    cluster.wait_voters(1, 2, 3)
    assert nodes[2].stop() == 0
    port = free_port()
    ports = {1: nodes[1].port, 2: port, 3: nodes[3].port}
    copy = cluster.node(2, config_text(2, ports, 3, 0), port, name="copy")
    shutil.copytree(nodes[2].directory, copy.directory)
    nodes[2].start()
    before = cluster.wait_voters(1, 2, 3)
    wait_for(nodes[2].ready, "node 2 to be back")
    writers = [Writer(node, f"w{i}").start() for i, node in nodes.items()]
    copy.start()
    tempted = Writer(copy, "tempted").start()
    for writer in writers:
        writer.wait_more(300)
        assert writer.stop().failures == []
    assert copy.wait_exit(30) == IDENTITY
    assert "from a copy of this directory" in copy.tail()
    assert tempted.stop().acknowledged == {}
    after = cluster.wait_voters(1, 2, 3)
    assert incarnation(after, 2) == incarnation(before, 2)
    assert nodes[2].running
    cluster.assert_everywhere(*writers)


def test_a_joiner_of_another_cluster_is_refused_before_anything_changes(
    cluster: Cluster,
) -> None:
    """A joiner stopped half-way: its directory knows its cluster and nothing else. With a file
    that leads to another cluster it is refused there, and no membership ever names it."""
    port, other_port = free_port(), free_port()
    other = cluster.node(1, config_text(1, {1: other_port}, 2, 2), other_port).start()
    wait_for(other.ready, "the other cluster to be ready")
    half_way = cluster.node(2, config_text(2, {1: other_port, 2: port}, 3, 0), port)
    directory = DataDirectory.open(half_way.directory.parent, 2)
    directory.set_cluster_id("0123456789abcdef0123456789abcdef")
    directory.close()
    half_way.start()

    def asked() -> bool:
        return b'route="POST /v1/cluster/members"' in other.request("GET", "/metrics").body

    wait_for(asked, "node 2 to ask")
    assert [m["id"] for m in other.cluster()["members"]] == [1]
    assert half_way.running
    body = joining(3, f"127.0.0.1:{port}") | {"cluster_id": "feed"}
    refused = other.call("POST", "/v1/cluster/members", body)
    assert (refused.status, refused.json()["error"]) == (409, "join_error")
    assert "foreign cluster" in refused.json()["message"]
    assert other.cluster()["term"] == other.status()["term"]
    assert [m["id"] for m in other.cluster()["members"]] == [1]


def test_a_joiner_with_another_address_before_it_was_answered(cluster: Cluster) -> None:
    """Its first request got through and it never heard of it; started again elsewhere, its next
    request corrects the address. A repeated request changes nothing."""
    port = free_port()
    node = cluster.node(1, config_text(1, {1: port}, 2, 2), port).start()
    wait_for(node.ready, "node 1 to be ready")

    def join(address: str) -> str:
        reply = node.call("POST", "/v1/cluster/members", joining(2, address))
        assert reply.ok, reply
        return str(next(m["address"] for m in reply.json()["members"] if m["id"] == 2))

    assert join("127.0.0.1:30001") == "127.0.0.1:30001"
    assert join("127.0.0.1:30002") == "127.0.0.1:30002"
    before = node.status()["last_index"]
    assert join("127.0.0.1:30002") == "127.0.0.1:30002"
    assert node.status()["last_index"] == before


def test_an_address_that_leads_back_to_the_leader_does_not_end_it(cluster: Cluster) -> None:
    """A joiner, or `dengine move`, may name the leader's own address under another name: the leader
    meets itself there, and must not take that for a copy of its directory, which would end it."""
    port = free_port()
    node = cluster.node(1, config_text(1, {1: port}, 2, 2), port).start()
    wait_for(node.ready, "node 1 to be ready")
    assert node.call("POST", "/v1/cluster/members", joining(2, f"localhost:{port}")).ok
    met = f"node 2 at localhost:{port}: this node itself"
    wait_for(lambda: met in node.output(), "the leader to meet itself")
    assert "duplicate" not in node.output()


def test_a_removed_node_stops_and_never_comes_back(cluster: Cluster) -> None:
    """The removed node is told, exits 76, and refuses to start again; its id stays used up even
    with an empty directory, while the rest goes on without it."""
    static_cluster(cluster, 1, 2, 3)
    leader = cluster.wait_leader()
    removed = next(node for node in cluster.running() if node is not leader)
    rest = [node for node in cluster.running() if node is not removed]
    assert rest[0].call("DELETE", f"/v1/cluster/members/{removed.node_id}").ok
    assert removed.wait_exit() == IDENTITY
    cluster.wait_voters(*(node.node_id for node in rest))
    assert rest[1].put("key", "value").ok
    assert removed.start().wait_exit() == IDENTITY
    assert "removed" in removed.tail()

    shutil.rmtree(removed.directory)
    ports = {i: node.port for i, node in cluster.nodes.items()}
    removed.config.write_text(config_text(removed.node_id, ports, 3, 0), encoding="utf-8")
    removed.start()
    wait_for(lambda: "never reused" in removed.output(), "it to be told that its id is used up")
    assert voters(rest[0].cluster()) == {node.node_id for node in rest}


def test_the_leader_can_be_removed_through_any_node(cluster: Cluster) -> None:
    """The one who asks gets the answer although the node that leads is the one that goes; it exits
    76, and the other two elect a leader and go on."""
    static_cluster(cluster, 1, 2, 3)
    leader = cluster.wait_leader()
    rest = [node for node in cluster.running() if node is not leader]
    reply = rest[0].call("DELETE", f"/v1/cluster/members/{leader.node_id}")
    assert reply.ok, reply
    assert leader.wait_exit() == IDENTITY
    cluster.wait_voters(*(node.node_id for node in rest))
    cluster.wait_leader()
    assert rest[1].put("key", "value").ok


def test_the_last_voter_cannot_be_removed(cluster: Cluster) -> None:
    """409 with a sentence; the node stays what it was."""
    node = guide_files(cluster)[1].start()
    wait_for(node.ready, "node 1 to be ready")
    reply = node.call("DELETE", "/v1/cluster/members/1")
    assert reply.status == 409
    assert "last voter" in reply.json()["message"]
    assert node.put("key", "value").ok


def test_an_old_copy_of_a_directory_goes_on_as_a_new_incarnation(cluster: Cluster) -> None:
    """A backup of node 3's directory, put back, has forgotten what it acknowledged: node 3 says so,
    ends with code 75, and the next start joins as a new learner and votes again."""
    nodes = guide_files(cluster)
    for node in nodes.values():
        node.start()
    before = cluster.wait_voters(1, 2, 3)
    cluster.wait_applied()
    assert nodes[3].stop() == 0
    copy = nodes[3].directory.with_name("copy")
    shutil.copytree(nodes[3].directory, copy)
    nodes[3].start()
    for number in range(20):
        assert nodes[1].put(f"later{number}", "x").ok
    cluster.wait_applied()
    nodes[3].kill()
    shutil.rmtree(nodes[3].directory)
    copy.rename(nodes[3].directory)
    nodes[3].start()
    assert nodes[3].wait_exit() == TRY_AGAIN
    assert "old copy" in nodes[3].output()
    nodes[3].start()

    def back() -> bool:
        view = nodes[1].cluster()
        same = [m for m in view["members"] if m["id"] == 3]
        whole = voters(view) == {1, 2, 3} and not view["joint"]
        return whole and len(same) == 1 and same[0]["incarnation"] != incarnation(before, 3)

    wait_for(back, "node 3 to vote again", 30)
    assert nodes[3].get("later19").ok
