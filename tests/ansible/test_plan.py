"""The pure part of the playbooks: what an inventory may not be, what follows from what is seen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from ansible_collections.dengine.core.plugins.plugin_utils import inventory, plan, report, rows

HOSTS = ["n1", "n2", "n3"]
OPTIONS: dict[str, Any] = {"target": 3, "zones": ["az-a", "az-b", "az-c"], "secrets": {}}


def hostvars() -> dict[str, dict[str, Any]]:
    return {
        f"n{i}": {
            "dengine_node_id": i,
            "dengine_address": f"10.0.0.{i}",
            "dengine_zone": f"az-{'abc'[i - 1]}",
        }
        for i in (1, 2, 3)
    }


def problems(values: dict[str, dict[str, Any]], **options: Any) -> list[str]:
    nodes = inventory.topology(list(values), values)
    return inventory.inventory_problems(nodes, {**OPTIONS, **options})


def test_a_sound_inventory_has_no_problems_and_an_order() -> None:
    """The order is that of the node ids, whatever the hosts are called; ports follow from ids."""
    values = hostvars()
    assert problems(values) == []
    values["n0"] = {**values.pop("n3"), "dengine_node_id": "7"}
    nodes = inventory.topology(["n0", "n2", "n1"], values)
    assert [(n["host"], n["endpoint"]) for n in nodes] == [
        ("n1", "10.0.0.1:9081"),
        ("n2", "10.0.0.2:9082"),
        ("n0", "10.0.0.3:9087"),
    ]


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({}, {"limit": "n1"}, "--limit is refused"),
        ({}, {"target": 2}, "it must be odd"),
        ({}, {"target": 0}, "it must be odd"),
        ({}, {"target": "many"}, "it must be odd"),
        ({}, {"target": 5}, "only 3 hosts"),
        ({"n2": {"dengine_node_id": 1}}, {}, "both have dengine_node_id 1"),
        ({"n2": {"dengine_node_id": "two"}}, {}, "n2: dengine_node_id must be a whole number"),
        ({"n2": {"dengine_node_id": 2**32}}, {}, "n2: dengine_node_id must be a whole number"),
        ({"n2": {"dengine_address": "10.0.0.1", "dengine_port": 9081}}, {}, "both have 10.0.0.1:9"),
        ({"n2": {"dengine_address": None}}, {}, "n2: dengine_address is missing"),
        ({"n2": {"dengine_address": "0.0.0.0"}}, {}, "n2: dengine_address is a wildcard"),
        ({"n2": {"dengine_address": "127.0.0.1"}}, {}, "which no other host can reach"),
        ({"n2": {"dengine_port": 70000}}, {}, "n2: dengine_port is 70000"),
        ({"n2": {"dengine_zone": ""}}, {"zones": []}, "n2: dengine_zone is missing"),
        ({"n2": {"dengine_zone": "az-a"}}, {"zones": []}, "zone az-a has 2 of 3 voters"),
        ({}, {"zones": ["az-d"]}, "zone az-d of dengine_zones has no host"),
        ({}, {"secrets": {"token": "CHANGE-ME"}}, "dengine_token has fewer than 32 characters"),
    ],
)
def test_each_guard_of_the_gate(
    change: dict[str, dict[str, Any]], options: dict[str, Any], said: str
) -> None:
    values = hostvars()
    for host, more in change.items():
        values[host].update(more)
    assert any(said in problem for problem in problems(values, **options)), problems(values)


def test_what_is_meant_is_let_through() -> None:
    values = hostvars()
    values["n2"]["dengine_zone"] = "az-a"
    assert problems(values, zones=[], shared_zones=True, limit="all") == []
    for host in values:
        values[host].update(dengine_address="127.0.0.1", dengine_zone=host)
    assert problems(values, zones=[], local=True) == []


# --- the plan ----------------------------------------------------------------------------------


class World:
    """What three hosts say; changed by the tests."""

    def __init__(self) -> None:
        self.facts: dict[str, dict[str, Any]] = {
            h: {"process": None, "identity": {}, "data_dir": f"/var/lib/dengine/{h[1:]}"}
            for h in HOSTS
        }
        self.infos: dict[str, dict[str, Any]] = {
            h: {"cluster": {}, "nodes": {}, "message": ""} for h in HOSTS
        }

    def has(self, host: str, cluster_id: str = "c1", **more: Any) -> World:
        node_id = int(host[1:])
        self.facts[host]["identity"] = {
            "node_id": node_id, "incarnation": f"{node_id:016x}", "cluster_id": cluster_id, **more
        }  # fmt: skip
        return self

    def runs(self, host: str) -> World:
        self.facts[host]["process"] = {"pid": 10 + int(host[1:]), "started": 5}
        endpoint = f"10.0.0.{host[1:]}:908{host[1:]}"
        self.infos[host]["nodes"] = {endpoint: {"status": {"role": "follower"}, "reason": ""}}
        return self

    def sees(self, voters: tuple[int, ...], learners: tuple[int, ...] = (), **more: Any) -> World:
        members = [
            {
                "id": i,
                "address": f"10.0.0.{i}:908{i}",
                "status": "active" if i in voters else "promotable",
                "incarnation": f"{i:016x}",
                "ready": True,
                "reason": None,
            }
            for i in (*voters, *learners)
        ]
        view = {
            "cluster_id": "c1", "term": 2, "commit_index": 9, "leader": {"id": voters[0]},
            "joint": False, "members": members, **more,
        }  # fmt: skip
        for host in HOSTS:
            if self.facts[host]["process"]:
                self.infos[host]["cluster"] = copy.deepcopy(view)
        return self

    def plan(self, target: int = 3, mode: str = "expand") -> dict[str, Any]:
        nodes = inventory.topology(HOSTS, hostvars())
        return plan.expansion_plan(nodes, self.facts, self.infos, target, mode)

    def problem(self, target: int = 3) -> str:
        found = self.plan(target)["problems"]
        return "; ".join(f"{p['host']} {p['check']}: {p['measured']} -> {p['hint']}" for p in found)


def one_voter() -> World:
    return World().has("n1").runs("n1").sees((1,))


def three_voters() -> World:
    world = World()
    for host in HOSTS:
        world.has(host).runs(host)
    return world.sees((1, 2, 3))


def test_from_nothing_the_lowest_id_founds_and_the_others_join() -> None:
    found = World().plan()
    assert found["founder"] == "n1"
    assert [j["host"] for j in found["join"]] == ["n2", "n3"]
    alone = World().plan(target=1, mode="site")
    assert (alone["founder"], alone["join"], alone["members"]) == ("n1", [], ["n1"])


def test_a_founder_that_was_killed_before_it_founded_founds() -> None:
    """Its directory is there and belongs to no cluster yet."""
    assert World().has("n1", "").plan()["founder"] == "n1"
    assert World().has("n1", "").runs("n1").has("n2", "").runs("n2").plan()["founder"] == "n1"


def test_who_is_missing_joins_whatever_an_earlier_run_did() -> None:
    assert [j["id"] for j in one_voter().plan()["join"]] == [2, 3]
    waiting = World().has("n1").runs("n1").has("n2").runs("n2").sees((1,), (2,))
    assert [j["id"] for j in waiting.plan()["join"]] == [2, 3]
    assert waiting.plan()["learners"] == [2]
    two = World().has("n1").runs("n1").has("n2").runs("n2").sees((1, 2))
    assert [j["id"] for j in two.plan()["join"]] == [3]
    assert three_voters().plan()["done"]
    assert three_voters().plan(1, "site")["done"]


def test_members_that_stopped_with_their_data_are_started() -> None:
    """All of them after a power cut, one alone; nothing is founded."""
    world = World().has("n1").has("n2").has("n3")
    assert world.plan()["start"] == HOSTS
    assert world.plan()["founder"] == ""
    assert world.plan()["problems"] == []
    one = three_voters()
    one.facts["n3"]["process"] = None
    for info in one.infos.values():
        for found in info["cluster"]["members"]:
            found["ready"] = found["id"] != 3
    one.infos["n3"] = {"cluster": {}, "nodes": {}, "message": "refused"}
    assert one.plan()["start"] == ["n3"]
    assert one.plan()["problems"] == []


def test_a_lost_first_host_founds_no_second_cluster() -> None:
    """Node 1 has an empty disk, the others have the cluster: whether they run or not."""
    stopped = World().has("n2").has("n3").plan()
    assert stopped["founder"] == ""
    assert stopped["start"] == ["n2", "n3"]
    running = World().has("n2").runs("n2").has("n3").runs("n3").sees((2, 1, 3))
    assert "n1 identity: node 1 is a voter, and its directory" in running.problem()
    assert "dengine remove 1" in running.problem()


@pytest.mark.parametrize(
    ("world", "said"),
    [
        (one_voter().has("n2", "c9"), "n2 identity: /var/lib/dengine/2 belongs to cluster c9"),
        (one_voter().has("n2", node_id=5), "n2 identity: /var/lib/dengine/2 is of node 5, not 2"),
        (one_voter().has("n2", removed="by hand"), "n2 identity: /var/lib/dengine/2 was removed"),
        (one_voter().has("n2", error="it is not JSON"), "identity.json: it is not JSON"),
        (three_voters().has("n3", incarnation="f" * 15), "has another incarnation"),
        (World().has("n1", "c1").has("n2", "c2"), "2 clusters: c1: n1; c2: n2"),
        (one_voter().sees((1, 7)), "node 7 at 10.0.0.7:9087 is a member"),
        (World().has("n2").runs("n2").sees((2,)), "a cluster exists without node 1"),
        (one_voter().sees((1,), joint=True), "a change of members is under way"),
        (World().has("n1").runs("n1"), "no leader"),
    ],
)
def test_what_stops_a_run(world: World, said: str) -> None:
    assert said in world.problem()


def test_a_voter_that_does_not_answer_stops_a_run() -> None:
    world = three_voters()
    for info in world.infos.values():
        info["cluster"]["members"][1].update(ready=False, reason="it has not answered for 9 s")
    assert "n2 cluster: node 2: it has not answered for 9 s" in world.problem()
    world.infos["n2"]["nodes"] = {"10.0.0.2:9082": {"status": {}, "reason": "timed out"}}
    assert "n2 cluster: process 12 runs and does not answer: timed out" in world.problem()


def test_growing_does_not_shrink() -> None:
    assert "growing does not remove" in three_voters().problem(target=1)


# --- tables and reports --------------------------------------------------------------------------


def test_ways_are_judged_in_both_directions() -> None:
    nodes = inventory.topology(HOSTS, hostvars())
    good = {"error": "", "rtt_ms": 0.4, "rtt_p99_ms": 0.5, "offset_ms": 3}
    late = {**good, "offset_ms": -900}
    ways = {
        "n1": {"10.0.0.2:9082": {**good, "rtt_ms": 12.5}, "10.0.0.3:9083": good},
        "n2": {"10.0.0.1:9081": {"error": "timed out"}, "10.0.0.3:9083": late},
    }
    found = rows.way_rows(nodes, ways, {"rtt_ms": 10, "clock_offset_ms": 100})
    bad = {(r["host"], r["check"]) for r in rows.failures(found)}
    assert bad == {("n1", "rtt"), ("n2", "connect"), ("n2", "clock_offset")}
    skipped = rows.skipping(found, ["rtt", "connect"])
    assert {(r["host"], r["check"]) for r in rows.failures(skipped)} == {("n2", "clock_offset")}
    text = "\n".join(rows.table(rows.failures(found)))
    assert "n1 (10.0.0.1:9081) timed out" in text
    assert "-> open the port in the firewall" in text
    assert "skipped by name: rtt on n1 (12.5 ms to n2)" in rows.verdict(skipped)


def test_a_report_is_readable() -> None:
    marks = [{"name": "start", "at": 10.0}, {"name": "join", "at": 12.25}]
    text = report.markdown(
        {
            "title": "lab: expand",
            "verdict": "Verified.",
            "facts": {"cluster": "c1"},
            "phases": report.phases(marks),
            "problems": ["n2 is late"],
        }
    )
    assert text.startswith("# lab: expand\n\nVerified.\n")
    assert "| join | 2.2 |" in text
    assert "- n2 is late" in text
