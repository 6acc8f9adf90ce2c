"""What operators and machines do at the worst moment: nothing acknowledged is lost by it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.cluster import (
    Cluster,
    ServeProcess,
    Writer,
    config_text,
    free_port,
    joiner,
    static_cluster,
    voters,
    wait_for,
)

IDENTITY = 76
QUICK = "[raft.membership]\nstable_ms = 100\n"
ODD = QUICK + 'promotion = "odd"\n'


def followers(cluster: Cluster) -> list[ServeProcess]:
    leader = cluster.wait_leader()
    return [node for node in cluster.running() if node is not leader]


def write_through(nodes: Sequence[ServeProcess]) -> list[Writer]:
    writers = [Writer(node, f"w{node.node_id}").start() for node in nodes]
    for writer in writers:
        writer.wait_more(20)
    return writers


def has(node: ServeProcess, node_id: int) -> bool:
    return node_id in {m["id"] for m in node.cluster().get("members", ())}


MOMENTS: dict[str, Callable[[ServeProcess, ServeProcess], bool]] = {
    "it is a learner": lambda newcomer, other: has(other, 4),
    "it votes": lambda newcomer, other: 4 in voters(other.cluster()),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_leader_dies_during_a_join(cluster: Cluster, moment: str) -> None:
    """Whenever it dies, the newcomer becomes a voter, once, and what was acknowledged is there."""
    static_cluster(cluster, 1, 2, 3, extra=QUICK)
    leader = cluster.wait_leader()
    writers = write_through(followers(cluster))
    newcomer = joiner(cluster, 4, QUICK).start()
    wait_for(lambda: MOMENTS[moment](newcomer, writers[0].node), moment)
    leader.kill()
    view = cluster.wait_voters(1, 2, 3, 4)
    assert [m["id"] for m in view["members"]] == [1, 2, 3, 4]
    for writer in writers:
        writer.wait_more(20)
        writer.stop()
    leader.start()
    cluster.wait_voters(1, 2, 3, 4)
    cluster.assert_everywhere(*writers)


def test_a_wiped_voter_is_swapped_back_in_under_odd(cluster: Cluster) -> None:
    """Three voters, policy `odd`, one directory lost: its new self waits for no other learner,
    for the number of voters stays three."""
    static_cluster(cluster, 1, 2, 3, extra=ODD)
    wiped, other = followers(cluster)
    writers = write_through([cluster.wait_leader(), other])
    before = {m["id"]: m["incarnation"] for m in other.cluster()["members"]}
    wiped.kill()
    shutil.rmtree(wiped.directory)
    ports = {i: node.port for i, node in cluster.nodes.items()}
    wiped.config.write_text(config_text(wiped.node_id, ports, 3, 0, ODD), encoding="utf-8")
    wiped.start()

    def swapped() -> bool:
        view = other.cluster()
        now = [m["incarnation"] for m in view["members"] if m["id"] == wiped.node_id]
        return len(now) == 1 and now[0] != before[wiped.node_id] and not view["joint"]

    wait_for(swapped, "the wiped node to vote again")
    cluster.wait_voters(1, 2, 3)
    for writer in writers:
        assert writer.stop().failures == []
    cluster.assert_everywhere(*writers)


def test_a_member_is_moved_under_load(cluster: Cluster) -> None:
    """A follower goes to another address: stopped, moved by the operator, started there. No write
    through the others fails, and it stays moved although its file said otherwise."""
    static_cluster(cluster, 1, 2, 3)
    moved, other = followers(cluster)
    writers = write_through([cluster.wait_leader(), other])
    assert moved.stop() == 0
    old, new = moved.port, free_port()
    reply = other.call(
        "PUT", f"/v1/cluster/members/{moved.node_id}", {"address": f"127.0.0.1:{new}"}
    )
    assert reply.ok, reply
    text = moved.config.read_text(encoding="utf-8")
    listen = f'listen_address = "127.0.0.1:{old}"'
    assert listen in text
    moved.config.write_text(text.replace(listen, listen.replace(str(old), str(new))), "utf-8")
    moved.port = new
    moved.start()
    cluster.wait_voters(1, 2, 3)
    for writer in writers:
        writer.wait_more(50)
        assert writer.stop().failures == []
    cluster.assert_everywhere(*writers)
    address = {m["id"]: m["address"] for m in other.cluster()["members"]}[moved.node_id]
    assert address == f"127.0.0.1:{new}"


def test_five_nodes_where_leader_and_follower_freeze(cluster: Cluster) -> None:
    """SIGSTOP of the leader and of a follower, 5 s each at the same time: the other three elect a
    leader and write on; awake again both follow, and no read of theirs is from the past."""
    static_cluster(cluster, 1, 2, 3, 4, 5)
    leader = cluster.wait_leader()
    frozen = [leader, followers(cluster)[0]]
    awake = [node for node in cluster.running() if node not in frozen]
    assert leader.put("register", "old").ok
    writers = write_through(awake)
    until = time.monotonic() + 5.0
    for node in frozen:
        node.signal(signal.SIGSTOP)
    try:
        successor = cluster.wait_leader(among=awake)
        assert successor.put("register", "new").ok
        for writer in writers:
            writer.wait_more(50)
        wait_for(lambda: time.monotonic() >= until, "five seconds of sleep")
    finally:
        for node in frozen:
            node.signal(signal.SIGCONT)
    for node in frozen:
        for consistency in ("lease", "linearizable"):
            reply = node.get("register", consistency)
            assert not reply.ok or reply.body == b"new", reply
    cluster.wait_leader()
    for writer in writers:
        writer.stop()
        assert writer.longest_gap_s() < 5
    cluster.assert_everywhere(*writers)


@contextlib.contextmanager
def slow_disk(node: ServeProcess, delay_ms: int) -> Iterator[None]:
    """Every sync of `node` takes `delay_ms` longer."""
    syncs = "fdatasync,fsync,msync"
    delay = f"inject={syncs}:delay_enter={delay_ms * 1000}"
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-p", str(node.pid)]
    tracer = subprocess.Popen([*command, "-e", f"trace={syncs}", "-e", delay])
    attached = f"TracerPid:\t{tracer.pid}\n"
    status = Path(f"/proc/{node.pid}/status")
    try:
        wait_for(lambda: attached in status.read_text("utf-8"), "strace to be attached")
        yield
    finally:
        tracer.terminate()
        tracer.wait(10)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("strace") is None, reason="needs root and strace"
)
@pytest.mark.parametrize("role", ["leader", "follower"])
def test_five_nodes_of_which_one_has_a_slow_disk(cluster: Cluster, role: str) -> None:
    """Syncs of 700 ms: a leader like that steps down and is not elected again while the others can
    be; a follower like that is not waited for. No write fails, and none is lost."""
    static_cluster(cluster, 1, 2, 3, 4, 5)
    slow = cluster.wait_leader() if role == "leader" else followers(cluster)[0]
    others = [node for node in cluster.running() if node is not slow]
    writers = write_through(others)
    with slow_disk(slow, 700):
        if role == "leader":
            wait_for(lambda: leads(others), "one of the others to lead")
        for writer in writers:
            writer.wait_more(50)
        assert leads(others)
    for writer in writers:
        assert writer.stop().failures == []
        assert writer.longest_gap_s() < (4.0 if role == "leader" else 0.5)
    cluster.wait_leader()
    cluster.assert_everywhere(*writers)


def leads(nodes: Sequence[ServeProcess]) -> bool:
    return any(node.status()["role"] == "leader" for node in nodes)


def test_the_leader_of_five_is_removed_under_load(cluster: Cluster) -> None:
    """It hands over, is told, exits 76, and no write through the others fails."""
    static_cluster(cluster, 1, 2, 3, 4, 5)
    leader, rest = cluster.wait_leader(), followers(cluster)
    writers = write_through(rest)
    assert leader.call("DELETE", f"/v1/cluster/members/{leader.node_id}").ok
    assert leader.wait_exit() == IDENTITY
    cluster.wait_voters(*(node.node_id for node in rest))
    for writer in writers:
        writer.wait_more(20)
        assert writer.stop().failures == []
    cluster.assert_everywhere(*writers)


def test_all_are_killed_and_come_back_in_another_order(cluster: Cluster) -> None:
    """The last one started first, one after the other: two are enough to go on, and the third
    follows."""
    static_cluster(cluster, 1, 2, 3)
    writers = write_through(cluster.running())
    for node in cluster.nodes.values():
        node.signal(signal.SIGKILL)
    for node in cluster.nodes.values():
        node.wait_exit()
    for writer in writers:
        writer.stop()
    third, second, first = cluster.nodes[3].start(), cluster.nodes[2], cluster.nodes[1]
    wait_for(lambda: third.request("GET", "/livez").ok, "node 3 to live")
    assert not third.ready()
    second.start()
    cluster.wait_leader()
    assert third.put("after", "all").ok
    first.start()
    cluster.wait_voters(1, 2, 3)
    cluster.assert_everywhere(*writers)


def test_two_join_through_two_survivors_while_a_voter_is_down(cluster: Cluster) -> None:
    """Of three voters one is down; two nodes join at the same time, each knowing one survivor only:
    all five vote, no write fails, and the missing one comes back."""
    static_cluster(cluster, 1, 2, 3, extra=ODD)
    down = followers(cluster)[0]
    down.kill()
    survivors = cluster.running()
    writers = write_through(survivors)
    for node_id, known in zip((4, 5), survivors, strict=True):
        port = free_port()
        ports = {known.node_id: known.port, node_id: port}
        cluster.node(node_id, config_text(node_id, ports, 3, 0, ODD), port).start()
    view = cluster.wait_voters(1, 2, 3, 4, 5)
    assert len(view["members"]) == 5
    down.start()
    cluster.wait_voters(1, 2, 3, 4, 5)
    for writer in writers:
        assert writer.stop().failures == []
    cluster.assert_everywhere(*writers)


def test_two_joiners_with_one_id_at_the_same_time(cluster: Cluster) -> None:
    """One becomes a voter and stays one; the other is told that its id is taken, and waits."""
    static_cluster(cluster, 1, 2, 3, extra=QUICK)
    writers = write_through(cluster.running())
    twins = [joiner(cluster, 4, QUICK)]
    port = free_port()
    ports = {i: node.port for i, node in cluster.nodes.items()} | {4: port}
    twins.append(cluster.node(4, config_text(4, ports, 3, 0, QUICK), port, name="twin"))
    for twin in twins:
        twin.start()
    wait_for(lambda: voters(cluster.nodes[1].cluster()) == {1, 2, 3, 4}, "node 4 to vote")
    for writer in writers:
        writer.wait_more(100)
        assert writer.stop().failures == []
    promoted = ["PROMOTED TO VOTER" in twin.output() for twin in twins]
    assert sorted(promoted) == [False, True]
    winner = twins[promoted.index(True)]
    (member,) = [m for m in cluster.nodes[1].cluster()["members"] if m["id"] == 4]
    assert member["address"] == f"127.0.0.1:{winner.port}"
    assert all(twin.running for twin in twins)


def test_a_joiner_freezes_while_another_joins(cluster: Cluster) -> None:
    """SIGSTOP in the middle of joining holds nobody up; awake again it becomes a voter too."""
    static_cluster(cluster, 1, 2, 3, extra=QUICK)
    writers = write_through(cluster.running())
    node = writers[0].node
    frozen = joiner(cluster, 4, QUICK).start()
    wait_for(lambda: has(node, 4), "node 4 to be a member")
    frozen.signal(signal.SIGSTOP)
    joiner(cluster, 5, QUICK).start()
    wait_for(lambda: 5 in voters(node.cluster()), "node 5 to vote")
    frozen.signal(signal.SIGCONT)
    cluster.wait_voters(1, 2, 3, 4, 5)
    for writer in writers:
        assert writer.stop().failures == []
    cluster.assert_everywhere(*writers)
