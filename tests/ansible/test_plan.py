"""The pure part of the playbooks: what an inventory may not be, what follows from what is seen."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import pytest
from ansible_collections.dengine.core.plugins.plugin_utils import inventory, plan, report, rows

HOSTS = ["n1", "n2", "n3"]
OPTIONS: dict[str, Any] = {"target": 3, "zones": ["az-a", "az-b", "az-c"], "secrets": {}}


def hostvars(count: int = 3) -> dict[str, dict[str, Any]]:
    return {
        f"n{i}": {
            "dengine_node_id": i,
            "dengine_address": f"10.0.0.{i}",
            "dengine_zone": f"az-{'abc'[(i - 1) % 3]}",
        }
        for i in range(1, count + 1)
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
        ({}, {"target": -1}, "it must be odd"),
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
        (
            {},
            {"paths": {"dengine_db_root": ["/data", "/var/lib/dengine"]}},
            "dengine_db_root is /data",
        ),
        ({}, {"config": {"cluster": {"node_id": 7}}}, "dengine_config sets cluster.node_id"),
        ({}, {"secrets": {"token": "CHANGE-ME"}}, "dengine_token has fewer than 32 characters"),
        ({}, {"secrets_file": ["s.json", 0o640]}, "s.json has mode 0640"),
        ({}, {"secrets_file": ["s.json", 0o604]}, "Run: chmod 0600 s.json"),
    ],
)
def test_each_guard_of_the_gate(
    change: dict[str, dict[str, Any]], options: dict[str, Any], said: str
) -> None:
    values = hostvars()
    for host, more in change.items():
        values[host].update(more)
    assert any(said in problem for problem in problems(values, **options)), problems(values)


def test_a_short_secret_is_refused() -> None:
    """Whatever it is, and not only those of the examples."""
    for length, refused in ((31, True), (32, False)):
        assert bool(problems(hostvars(), secrets={"token": "x" * length})) is refused


def test_secrets_that_are_the_same_are_refused_before_they_are_written() -> None:
    one, other = "x" * 32, "y" * 32
    (said,) = problems(hostvars(), secrets={"peer_secret": one, "token": one})
    assert "are the same" in said
    assert one not in said
    assert len(problems(hostvars(), secrets={"peer_secret": f"{one}\n", "token": one})) == 1
    assert problems(hostvars(), secrets={"peer_secret": one, "token": other}) == []
    for bad in (f"{one} {one}", f"{one}\n", "ä" * 32):
        assert "visible ASCII" in "".join(problems(hostvars(), secrets={"token": bad}))
    assert problems(hostvars(), secrets={"peer_secret": "", "token": ""}) == []


@pytest.mark.parametrize("value", [12345678901234567890123456789012, 1e31, True, 0, None])
def test_a_secret_that_yaml_takes_for_something_else_is_to_be_quoted(value: Any) -> None:
    (said,) = problems(hostvars(), secrets={"peer_secret": "p" * 32, "token": value})
    assert 'Quote it: dengine_token: "..."' in said
    assert str(value) not in said


def test_what_is_meant_is_let_through() -> None:
    values = hostvars()
    values["n2"]["dengine_zone"] = "az-a"
    assert problems(values, zones=[], shared_zones=True, limit="all") == []
    paths = {"dengine_db_root": ["/var/lib/dengine/", "/var/lib/dengine"]}
    assert problems(hostvars(4), target=None, paths=paths) == [], "no target, nothing to be odd"
    for host in values:
        values[host].update(dengine_address="127.0.0.1", dengine_zone=host)
    assert problems(values, zones=[], local=True) == []
    for mode in (0o600, 0o400, None):
        assert problems(hostvars(), secrets_file=["s.json", mode]) == []


# --- the plan ----------------------------------------------------------------------------------


class World:
    """What the hosts, three or more, say; changed by the tests."""

    def __init__(self, count: int = 3) -> None:
        self.values = hostvars(count)
        self.facts: dict[str, dict[str, Any]] = {
            h: {"process": None, "identity": {}, "data_dir": f"/var/lib/dengine/{h[1:]}"}
            for h in self.values
        }
        self.infos: dict[str, dict[str, Any]] = {
            h: {"cluster": {}, "nodes": {}, "message": ""} for h in self.values
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

    def sees(
        self,
        voters: tuple[int, ...],
        learners: tuple[int, ...] = (),
        readers: tuple[int, ...] = (),
        **more: Any,
    ) -> World:
        status = dict.fromkeys(voters, "active") | dict.fromkeys(readers, "read_only")
        members = [
            {
                "id": i,
                "address": f"10.0.0.{i}:908{i}",
                "status": status.get(i, "promotable"),
                "incarnation": f"{i:016x}",
                "ready": True,
                "reason": None,
            }
            for i in (*voters, *learners, *readers)
        ]
        view = {
            "cluster_id": "c1", "term": 2, "commit_index": 9, "leader": {"id": voters[0]},
            "joint": False, "members": members, **more,
        }  # fmt: skip
        for host in self.values:
            if self.facts[host]["process"]:
                self.infos[host]["cluster"] = copy.deepcopy(view)
        return self

    def plan(self, target: int = 3, mode: str = "expand", **options: Any) -> dict[str, Any]:
        nodes = inventory.topology(list(self.values), self.values)
        return plan.expansion_plan(nodes, self.facts, self.infos, target, mode, options)

    def problem(self, target: int = 3, mode: str = "expand", **options: Any) -> str:
        found = self.plan(target, mode, **options)
        rows = found["problems"] + found["goal_problems"]
        return "; ".join(f"{p['host']} {p['check']}: {p['measured']} -> {p['hint']}" for p in rows)


def one_voter() -> World:
    return World().has("n1").runs("n1").sees((1,))


def three_voters(count: int = 3) -> World:
    world = World(count)
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


def with_learners(*learners: int, count: int = 3) -> World:
    """One voter, and what a killed expand.yml left beside it."""
    world = World(count).has("n1").runs("n1")
    for i in learners:
        world.has(f"n{i}").runs(f"n{i}")
    return world.sees((1,), learners)


@pytest.mark.parametrize(("target", "mode"), [(1, "site"), (1, "expand")])
@pytest.mark.parametrize("learners", [(2,), (2, 3)])
def test_learners_become_voters_only_where_the_target_has_room(
    target: int, mode: str, learners: tuple[int, ...]
) -> None:
    """site.yml, and expand.yml to one voter, leave what a killed run left alone: to promote it
    would make two voters, or three that nobody asked for."""
    found = with_learners(*learners).plan(target, mode)
    assert (found["target"], found["join"], found["start"]) == ([1], [], [])
    assert found["members"] == ["n1"]
    assert found["done"]
    stopped = with_learners(*learners)
    stopped.facts["n2"]["process"] = None
    assert stopped.plan(target, mode)["start"] == []


def test_a_learner_is_taken_before_a_host_that_is_no_member() -> None:
    world = with_learners(4, count=5)
    assert world.plan(3)["target"] == [1, 2, 4]
    assert world.plan(5)["target"] == [1, 2, 3, 4, 5]
    assert [j["id"] for j in world.plan(3)["join"]] == [2, 4]


def test_an_even_number_of_voters_is_never_the_target() -> None:
    """Whatever the reason, here voters made by hand and a host too few."""
    world = World(3).has("n1").runs("n1").has("n2").runs("n2").sees((1, 2))
    assert "2 voters are an even number" in world.problem(1, "site")
    assert world.plan(1, "site")["problems"] == []
    assert world.problem(3) == ""


def test_a_read_only_member_neither_joins_nor_votes() -> None:
    world = World(4)
    for host in ("n1", "n2", "n3"):
        world.has(host).runs(host)
    world.sees((1,), (), (2, 3))
    assert world.plan(1)["done"]
    assert "only 2 of 4 hosts can vote, for n2, n3 are read_only" in world.problem(3)
    full = three_voters(4).has("n4").runs("n4").sees((1, 2, 3), (), (4,))
    assert full.plan(3)["done"]
    assert full.plan(3)["target"] == [1, 2, 3]
    assert full.problem(3) == ""
    full.facts["n4"]["process"] = None
    assert full.plan(3)["start"] == ["n4"]


def test_the_zones_of_the_chosen_nodes_count_whatever_is_to_spare() -> None:
    world = World(4)
    for host in ("n1", "n2", "n3"):
        world.values[host]["dengine_zone"] = "az-a"
    assert "zone az-a has 3 of 3 voters (n1, n2, n3)" in world.problem(3)
    assert world.problem(3, shared_zones=True) == ""
    assert world.problem(1, "site") == ""
    grown = three_voters(4)
    grown.values = world.values
    assert grown.problem(1, "site") == "", "what is there already stops no other playbook"


def test_a_follower_that_runs_makes_the_backup() -> None:
    """Never the leader where it can be helped, and never a node that is stopped."""
    assert one_voter().plan()["backup_host"] == "n1"
    assert three_voters().plan()["backup_host"] == "n2"
    world = three_voters(5)
    world.facts["n2"]["process"] = None
    assert world.plan(5)["backup_host"] == "n3"
    world.facts["n3"]["process"] = None
    assert world.plan(5)["backup_host"] == "n1"


def test_a_host_that_cannot_be_reached_is_a_row_and_decides_nothing() -> None:
    world = three_voters()
    world.facts["n1"] = {"unreachable": "Connection refused"}
    world.infos["n1"] = {"cluster": {}, "nodes": {}, "message": ""}
    assert world.problem() == (
        "n1 unreachable: Connection refused -> repair the connection, or take the host out of the "
        "inventory"
    )
    found = world.plan()
    assert found["unreachable"] == ["n1"]
    assert found["coordinator"] == "n2"
    assert found["backup_host"] == "n2"
    blank = World()
    blank.facts["n3"] = {"unreachable": "Connection refused"}
    assert blank.plan()["founder"] == "", "who cannot be seen may have the cluster"
    said = inventory.observed(
        inventory.topology(HOSTS, hostvars()),
        {
            "n1": {"discover_probe": {"facts": {"process": None}}, "discover_info": {"nodes": {}}},
            "n2": {"discover_probe": {"unreachable": True, "msg": "no route"}},
            "n3": {},
        },
    )
    assert said["facts"]["n1"] == {"process": None}
    assert said["facts"]["n2"] == {"unreachable": "no route"}
    assert said["infos"]["n2"]["cluster"] == {}
    assert said["unreachable"] == ["n2", "n3"]


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
    unread = World().runs("n1").sees((1,))
    assert unread.plan()["founder"] == "", "a cluster that answers is one, whatever the disks say"


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


def test_another_node_at_an_address_stops_a_run() -> None:
    """Swapped addresses are not written into files that take effect at the next restart."""
    world = three_voters()
    for i, said in ((1, 1), (2, 3), (3, 2)):
        world.infos[f"n{i}"]["nodes"][f"10.0.0.{i}:908{i}"]["status"]["node_id"] = said
    found = [r for r in world.plan()["problems"] if r["check"] == "identity"]
    assert [r["host"] for r in found] == ["n2", "n3"]
    assert "10.0.0.2:9082 is node 3, the inventory says 2: swapped addresses?" in world.problem()


def test_a_directory_that_is_not_to_be_used_is_not_started() -> None:
    """An old copy, or states that disagree: HALTED in it says why, and so does the row."""
    world = three_voters()
    world.facts["n1"].update(process=None, halted="76 the others know more; empty it, and join")
    world.infos["n1"] = {"cluster": {}, "nodes": {}, "message": "refused"}
    assert world.plan()["start"] == []
    said = world.problem()
    assert "n1 identity: /var/lib/dengine/1 is not to be used (exit code 76): the others" in said
    assert "role = 3" in said
    alone = World().has("n1")
    alone.facts["n1"]["halted"] = "76 the others know more"
    found = alone.plan()
    assert (found["start"], found["founder"]) == ([], "")
    assert "n1 identity" in alone.problem()


def test_a_node_that_ended_right_after_its_start_is_a_row() -> None:
    world = World().has("n1")
    assert world.problem() == ""
    said = world.problem(started=["n1", ""])
    assert "n1 cluster: node 1 was started, and has ended again -> see its log" in said
    assert one_voter().problem(started=["n1"]) == ""


def test_growing_does_not_shrink() -> None:
    assert "growing does not remove" in three_voters().problem(target=1)


def test_a_cluster_that_is_as_it_should_be_is_left_alone() -> None:
    found = three_voters().plan()
    assert (found["founder"], found["start"], found["join"]) == ("", [], [])
    assert found["problems"] + found["goal_problems"] == []
    assert found["done"]


def test_an_earlier_cluster_whose_data_are_gone_is_not_replaced_by_a_new_one() -> None:
    """A lost disk, or one that is not mounted, on whichever host: no second cluster without a word.
    A directory that a killed first run left has no such trace."""
    for host in HOSTS:
        world = World()
        world.facts[host]["trace"] = "dengine.service is enabled"
        said = world.problem()
        assert f"{host} identity: a cluster was at work here" in said
        assert "mount its disk" in said
    running = one_voter()
    running.facts["n1"]["trace"] = "dengine.service is enabled"
    assert running.problem() == ""


def test_another_cluster_than_the_verified_one_is_not_taken_for_it() -> None:
    """Whether it answers, lies there stopped, or is that of the other hosts."""
    marker = {"verified": "c0", "marker": "/etc/dengine/secrets/cluster.json"}
    founded = one_voter()
    founded.facts["n1"].update(marker)
    said = founded.problem()
    assert "n1 identity: this host was verified in cluster c0, and c1 answers" in said
    assert "rm /etc/dengine/secrets/cluster.json on n1" in said
    stopped = World().has("n1")
    stopped.facts["n1"].update(marker)
    assert "verified in cluster c0, and c1 answers" in stopped.problem()
    empty = one_voter()
    empty.facts["n2"].update(marker)
    assert "n2 identity: this host was verified in cluster c0, and the others" in empty.problem()
    for host in HOSTS:
        empty.facts[host]["verified"] = "c1"
    assert empty.problem() == ""


def test_secrets_that_only_the_hosts_have_are_not_replaced() -> None:
    """Whether the nodes run or not; nothing is said where no host has any."""
    assert World().problem(secrets=False) == ""
    for world in (World(), World().has("n2"), three_voters()):
        world.facts["n2"].update(secrets=True, secrets_dir="/etc/dengine/secrets")
        assert world.problem(secrets=True) == ""
        said = world.problem(secrets=False, secrets_file="/c/secrets.json")
        assert "n2 secrets: the cluster has secrets, and this controller has none" in said
        assert "/c/secrets.json" in said
        assert "/etc/dengine/secrets on n2" in said
    stopped = World().has("n3")
    assert "n3 secrets" in stopped.problem(secrets=False)
    shut = three_voters()  # nobody answers because of that, so one row says all
    for i in (1, 2, 3):
        silent = {"status": {}, "reason": "unauthorized"}
        shut.infos[f"n{i}"]["nodes"] = {f"10.0.0.{i}:908{i}": silent}
    assert [r["check"] for r in shut.plan(secrets=False)["problems"]] == ["secrets"]


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


def test_only_a_failure_is_skipped() -> None:
    good, bad = {"check": "rtt", "status": "ok"}, {"check": "rtt", "status": "FAILED"}
    assert [r["status"] for r in rows.skipping([good, bad], ["rtt"])] == ["ok", "skipped"]


def test_who_is_reached_by_all_others_has_no_firewall_in_the_way() -> None:
    """Rules are hard to read, and the way was tried. Where it was not, or in vain, they count."""
    nodes = inventory.topology(HOSTS, hostvars())
    bad = {"check": "firewall", "status": "FAILED", "measured": "drops", "limit": "", "hint": "h"}
    found: dict[str, list[dict[str, Any]]] = {h: [bad, {**bad, "check": "port"}] for h in HOSTS}

    def failing(ways: dict[str, Any]) -> set[str]:
        made = rows.failures(rows.host_rows(found, nodes, ways))
        assert {r["host"] for r in made if r["check"] == "port"} == set(HOSTS)
        return {r["host"] for r in made if r["check"] == "firewall"}

    good = {"error": ""}
    ways = {
        "n1": {"10.0.0.2:9082": good, "10.0.0.3:9083": good},
        "n2": {"10.0.0.1:9081": good, "10.0.0.3:9083": {"error": "timed out"}},
    }
    assert failing(ways) == {"n3"}
    assert failing({"n1": {}}) == set(HOSTS)
    made = rows.host_rows(found, nodes, ways)
    assert made[0]["measured"] == "drops; the others reach it"


def test_the_plan_tells_what_the_data_of_the_largest_member_take() -> None:
    world = three_voters()
    assert world.plan()["data_bytes"] == 0
    world.facts["n2"]["data_bytes"] = 7_000_000_000
    world.facts["n1"]["data_bytes"] = 6_000_000_000
    assert world.plan()["data_bytes"] == 7_000_000_000


def test_an_ipv6_address_may_stand_in_brackets_or_not() -> None:
    for address in ("2001:db8::1", "[2001:db8::1]"):
        values = hostvars()
        values["n1"]["dengine_address"] = address
        (first, *_) = inventory.topology(HOSTS, values)
        assert (first["address"], first["endpoint"]) == ("2001:db8::1", "[2001:db8::1]:9081")
        values["n2"].update(dengine_address="[2001:db8::1]", dengine_port=9081)
        assert any("both have [2001:db8::1]:9081" in said for said in problems(values))


def test_a_joiner_gets_the_release_of_the_members() -> None:
    there = "/opt/dengine/releases/1.2.0-0123abcd"
    found = rows.release_rows({"n1": there, "n2": ""}, "1.3.0")
    (bad,) = rows.failures(found)
    assert (bad["host"], bad["measured"]) == ("n2", "would get 1.3.0")
    assert "1.2.0, as on n1" in bad["limit"]
    assert rows.failures(rows.skipping(found, ["release"])) == []
    assert rows.failures(rows.release_rows({"n1": there, "n2": ""}, "1.2.0")) == []
    left = {"n1": there, "n2": "/opt/dengine/releases/1.1.0-fedc"}
    assert [r["host"] for r in rows.failures(rows.release_rows(left, "1.2.0"))] == ["n2"]
    assert rows.release_rows({"n1": "", "n2": ""}, "1.2.0") == []
    assert [r["host"] for r in rows.release_rows({"n1": there, "n2": ""}, "")] == ["n1"]


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


def test_secrets_of_another_run_are_a_failure_and_missing_ones_are_not() -> None:
    a, b, x = (hashlib.sha256(f"{secret}\n".encode()).hexdigest() for secret in "abx")
    found = {"n1": [a, b], "n2": [a, x], "n3": ["", ""], "n4": ["", b]}
    facts: dict[str, dict[str, Any]] = {h: {"process": {"pid": 7}, "identity": {}} for h in found}
    judged = rows.secret_rows(found, ["a", "b"], facts)
    assert {r["host"]: r["status"] for r in judged} == {"n1": "ok", "n2": "FAILED", "n4": "ok"}
    assert judged[1]["measured"] == "another token"
    assert "stop all nodes and replace the files on all hosts" in judged[1]["hint"]


def test_secrets_that_no_node_has_read_are_written_over() -> None:
    """A first install that was refused has left them: no node ran with them, and none has data."""
    facts: dict[str, dict[str, Any]] = {
        "n1": {"process": None, "identity": {}},
        "n2": {"process": None, "identity": {"node_id": 2}},
        "n3": {"process": {"pid": 7}, "identity": {}},
    }
    judged = rows.secret_rows({host: ["x", "x"] for host in facts}, ["a", "b"], facts)
    assert [r["host"] for r in rows.failures(judged)] == ["n2", "n3"]


def test_security_of_a_running_node_is_neither_switched_on_nor_off() -> None:
    """One that does not run is started with what is written now, like all others."""
    facts: dict[str, dict[str, Any]] = {
        "n1": {"process": {"pid": 7}, "security": True},
        "n2": {"process": {"pid": 7}, "security": False},
        "n3": {"process": None, "security": False},
        "n4": {"process": {"pid": 7}, "security": None},
    }
    for wanted, host in ((True, "n2"), (False, "n1")):
        (failure,) = rows.failures(judged := rows.security_rows(facts, wanted))
        assert len(judged) == 2
        assert failure["host"] == host
        assert "stop all, then expand.yml" in failure["hint"]


def test_configuration_that_follows_from_the_inventory_is_refused() -> None:
    """Everything else may be added, to the sections that the template writes too."""
    good = {"cluster": {"founding_wait_ms": 5}, "raft.snapshot": {"entries": 1}}
    assert inventory._config_problems(good) == []
    (problem,) = inventory._config_problems({"cluster": {"node_id": 7, "founding_wait_ms": 5}})
    assert "cluster.node_id" in problem
    assert "leave it out" in problem
    (problem,) = inventory._config_problems({"limits": 3})
    assert "each a dictionary" in problem
    (problem,) = inventory._config_problems([1])
    assert "each a dictionary" in problem
