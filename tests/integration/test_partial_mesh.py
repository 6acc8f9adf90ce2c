"""Links that carry one way only, between real processes: terms hardly grow, and writes go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import POLL_S, Cluster, ServeProcess, Writer, config_text, wait_for
from tests.namespaces import needs_namespaces
from tests.nemesis.machines import PORT, Machines, host, own_tag

IDS = (1, 2, 3)
DEAF_S = 8.0  # four of the longest election timeouts
WRITES = 200
TERMS = 2  # that may pass: one hand-over, and an attempt that came to nothing


@pytest.fixture
def machines(cluster: Cluster, tmp_path: Path) -> Iterator[Machines]:
    """Three voters, each on a machine of its own, and a leader."""
    with Machines(IDS, tmp_path / own_tag(), proxied=False) as made:
        ports = dict.fromkeys(IDS, PORT)
        for number in IDS:
            rows = config_text(number, ports, 0, 2).splitlines()
            for other in IDS:
                rows = [
                    row.replace("127.0.0.1", host(other))
                    if f"id = {other}," in row or (other == number and "listen" in row)
                    else row
                    for row in rows
                ]
            node = cluster.node(number, "\n".join(rows), PORT)
            node.host, node.prefix = host(number), made.prefix(number)
            node.start()
        cluster.wait_voters(*IDS)
        yield made


def term(node: ServeProcess) -> int:
    found: int = node.status()["term"]
    return found


def leader_of(node: ServeProcess) -> int | None:
    found: int | None = (node.status()["leader"] or {}).get("id")
    return found


@needs_namespaces
@pytest.mark.parametrize("ways", [1, 2])
def test_a_voter_that_cannot_hear_the_leader_costs_no_leader(
    cluster: Cluster, machines: Machines, ways: int
) -> None:
    """The third hears both, and deposes nobody whom it hears. Nothing is written at first: else the
    log of who does not hear would be too short to win anyway."""
    leader = cluster.wait_leader()
    deaf = next(node for node in cluster.nodes.values() if node is not leader)
    cluster.wait_applied()
    before, dropped = term(leader), machines.dropped(IDS)
    pairs = [(leader.node_id, deaf.node_id), (deaf.node_id, leader.node_id)]
    with machines.cut(pairs[:ways]):
        wait_for(lambda: leader_of(deaf) is None, "it to miss the leader")
        end = time.monotonic() + DEAF_S
        while time.monotonic() < end:
            assert (leader.status()["role"], term(leader)) == ("leader", before)
            time.sleep(POLL_S)
        writer = Writer(leader, "mesh").start()
        writer.wait_more(WRITES)
    assert machines.dropped(IDS) > dropped
    wait_for(lambda: leader_of(deaf) == leader.node_id, "it to follow again")
    assert term(leader) == before
    assert not writer.stop().failures
    cluster.assert_everywhere(writer)


@needs_namespaces
def test_a_leader_that_hears_nobody_makes_room_once(cluster: Cluster, machines: Machines) -> None:
    """What it sends still arrives, until its streams break; it ends its reign by itself, and its
    attempts to win another one leave no trace when it is back."""
    leader = cluster.wait_leader()
    others = [node for node in cluster.nodes.values() if node is not leader]
    before = term(leader)
    with machines.cut([(other.node_id, leader.node_id) for other in others]):
        next_leader = cluster.wait_leader(among=others)
        writer = Writer(next_leader, "mesh").start()
        writer.wait_more(WRITES)
        assert term(next_leader) <= before + TERMS
        assert not writer.stop().failures
    wait_for(lambda: leader_of(leader) == leader_of(next_leader), "it to follow")
    assert term(next_leader) <= before + TERMS
    cluster.assert_everywhere(writer)
