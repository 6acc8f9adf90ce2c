"""Three hosts under systemd: they grow from one, and a stop hands leadership over."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.cluster import UNREACHABLE, wait_for
from tests.lab.machines import ADDRESSES, ZONES, Machine


@pytest.fixture
def three(machines: dict[int, Machine]) -> Iterator[dict[int, Machine]]:
    """Three hosts without any data; nothing is left of them for other tests."""
    try:
        for machine in machines.values():
            machine.wipe()
        yield machines
    finally:
        for machine in machines.values():
            print(machine.run("journalctl --quiet --no-pager -u dengine --lines=40"))
            machine.wipe()


def test_growth_and_a_stop_of_the_leader(three: dict[int, Machine]) -> None:
    """Node 1 keeps its process while two hosts join; stopping the leader costs no election."""
    n1, n2, n3 = three[1], three[2], three[3]
    n1.start()
    pid = n1.pid
    for joiner in (n2, n3):
        joiner.run("systemctl start dengine")
    for machine in three.values():
        wait_for(lambda m=machine: voters(m) == [1, 2, 3], f"three voters at {machine.name}", 60)
    assert n1.pid == pid
    members = n1.json("/v1/cluster")["members"]
    assert {m["id"]: m["zone"] for m in members} == ZONES
    assert {m["id"]: m["address"] for m in members} == {
        i: f"{address}:{9080 + i}" for i, address in ADDRESSES.items()
    }
    for machine in three.values():
        assert machine.request("PUT", f"/v1/kv/from/{machine.name}", b"here").ok

    before = n2.json("/v1/status")
    assert before["leader"]["id"] == 1
    cursor = n1.journal_cursor()
    began = time.monotonic()
    n1.run("systemctl stop dengine", timeout_s=30)
    assert time.monotonic() - began < 8
    unit = n1.unit()
    assert (unit["Result"], unit["ExecMainStatus"]) == ("success", "0")
    assert "was not handed over" not in n1.journal(cursor)
    assert n2.request("PUT", "/v1/kv/after", b"written").ok
    after = n2.json("/v1/status")
    assert after["leader"]["id"] in (2, 3)
    assert after["term"] == before["term"] + 1, "one transfer, no election by timeout"
    n1.start()
    assert n1.request("GET", "/v1/kv/after").body == b"written"


def voters(machine: Machine) -> list[int]:
    """As this node sees it; empty while it cannot say, or a change is under way."""
    try:
        view = machine.json("/v1/cluster")
    except UNREACHABLE:
        return []
    if view["joint"]:
        return []
    return sorted(m["id"] for m in view["members"] if m["role"] in ("leader", "follower"))
