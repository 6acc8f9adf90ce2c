"""The conditions of the roles, from their own files, with Ansible's own filters and tests.

What a whole playbook would show in a minute: which state stops a run, and which does not.
"""

from __future__ import annotations

import functools
import hashlib
import tomllib
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible.plugins.filter import core, mathstuff
from ansible.plugins.test import core as tests
from ansible_collections.dengine.core.plugins.filter import plan
from jinja2.nativetypes import NativeEnvironment

ROLES = Path(__file__).resolve().parents[2] / (
    "ansible/collections/ansible_collections/dengine/core/roles"
)
ASSERT = "ansible.builtin.assert"


@functools.cache
def environment() -> NativeEnvironment:
    """No lazy templates and no trust: the values of these tests are plain."""
    made = NativeEnvironment(undefined=jinja2.StrictUndefined)
    for module in (core, mathstuff):  # those of Jinja itself stay: Ansible's expect its templar
        made.filters = {**module.FilterModule().filters(), **made.filters}
    made.filters.update({f"dengine.core.{n}": f for n, f in plan.FilterModule().filters().items()})
    made.tests.update(tests.TestModule().tests())
    return made


def task(role: str, file: str, name: str) -> dict[str, Any]:
    tasks = yaml.safe_load((ROLES / role / "tasks" / f"{file}.yml").read_text(encoding="utf-8"))
    (found,) = [t for t in tasks if t["name"] == name]
    return dict(found)


def value(text: Any, variables: dict[str, Any]) -> Any:
    return environment().from_string(text).render(variables) if isinstance(text, str) else text


def with_its_own(found: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
    """The variables, and those of the task, which may name each other in any order."""
    made, left = dict(variables), dict(found.get("vars", {}))
    while left:
        before = len(left)
        for name, text in list(left.items()):
            try:
                made[name] = value(text, made)
            except jinja2.UndefinedError:
                continue
            del left[name]
        assert len(left) < before, f"what do {sorted(left)} need?"
    return made


def true(conditions: Any, variables: dict[str, Any]) -> bool:
    given = conditions if isinstance(conditions, list) else [conditions]
    return all(value("{{ " + c + " }}" if isinstance(c, str) else c, variables) for c in given)


def stops(role: str, file: str, name: str, **variables: Any) -> bool:
    """Would this `assert` end the run?"""
    found = task(role, file, name)
    if not true(found.get("when", True), variables):
        return False
    return not true(found[ASSERT]["that"], with_its_own(found, variables))


def gate(**more: Any) -> bool:
    nodes = [
        {"host": f"n{i}", "id": i, "address": f"10.0.0.{i}", "port": 9080 + i, "zone": f"az-{i}",
         "endpoint": f"10.0.0.{i}:908{i}"}
        for i in (1, 2, 3)
    ]  # fmt: skip
    sound = {
        "dengine_nodes": nodes, "gate_target": 3, "ansible_limit": "", "dengine_zones": [],
        "dengine_shared_zones": False, "dengine_config": {}, "dengine_is_process": False,
        "gate_paths": {}, "dengine_peer_secret": "", "dengine_token": "",
        "dengine_secrets_file": "/nowhere/secrets.json",
    }  # fmt: skip
    return stops("gate", "main", "The inventory is right", **{**sound, **more})


def test_an_older_ansible_is_refused() -> None:
    for version, refused in (("2.16.14", True), ("2.17.0", False), ("2.19.2", False)):
        name = "This ansible-core is new enough"
        assert stops("gate", "main", name, ansible_version={"full": version}) is refused


@pytest.mark.parametrize(
    "wrong",
    [
        {"gate_target": 2},
        {"ansible_limit": "n1"},
        {"dengine_zones": ["az-9"]},
        {"dengine_config": {"cluster": {"node_id": 7}}},
        {"gate_paths": {"dengine_db_root": ["/data", "/var/lib/dengine"]}},
        {"dengine_peer_secret": "short"},
        {"dengine_peer_secret": "s" * 32, "dengine_token": "s" * 32},
        {"dengine_token": "short"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_gate_asks_for_everything_that_may_be_wrong(wrong: dict[str, Any]) -> None:
    assert not gate()
    assert gate(**wrong)


def test_the_gate_looks_at_the_file_of_the_secrets(tmp_path: Path) -> None:
    file = tmp_path / "secrets.json"
    file.touch()
    for mode, refused in ((0o600, False), (0o644, True)):
        file.chmod(mode)
        assert gate(dengine_secrets_file=str(file)) is refused


def test_only_who_has_the_run_lock_goes_on() -> None:
    ask = {"gate_lock_host": "n1", "inventory_hostname": "n1"}
    name = "Nobody else changes this cluster now"
    assert stops("gate", "hold", name, **ask, gate_locked={"held": False})
    assert stops("gate", "hold", name, **ask, gate_locked={"unreachable": True})
    assert not stops("gate", "hold", name, **ask, gate_locked={"held": True})
    locked = task("gate", "main", name)
    assert true(locked["when"], {"gate_lock": True})


# --- preflight -----------------------------------------------------------------------------------


def bad(check: str) -> dict[str, Any]:
    return {"host": "n1", "check": check, "status": "FAILED", "measured": "", "limit": "",
            "hint": "", "name": check}  # fmt: skip


def digest(secret: str) -> dict[str, Any]:
    return {"stat": {"checksum": hashlib.sha256(f"{secret}\n".encode()).hexdigest()}}


def test_every_kind_of_row_is_collected_and_one_failure_is_enough() -> None:
    far = {"error": "", "rtt_ms": 99.0, "offset_ms": None}
    hostvars = {
        h: {
            "preflight_host": {"rows": [{k: v for k, v in bad("memory").items() if k != "host"}]},
            "preflight_ways": {"ways": {e: far}},
            "discover_probe": {
                "facts": {"release": release, "process": {"pid": 7}, "security": False}
            },
            "preflight_secrets": {"results": [digest("x"), {"stat": {}}]},
        }
        for h, e, release in (
            ("n1", "10.0.0.2:9082", "/opt/dengine/releases/1.2.0-01"),
            ("n2", "10.0.0.1:9081", ""),
        )
    }
    found = task("preflight", "main", "Collect all rows")
    variables = {
        "discover_plan": {"problems": [bad("identity")], "goal_problems": [bad("cluster")]},
        "preflight_hosts": ["n1", "n2"],
        "preflight_release": "1.3.0",
        "hostvars": hostvars,
        "dengine_nodes": [
            {"host": "n1", "endpoint": "10.0.0.1:9081"},
            {"host": "n2", "endpoint": "10.0.0.2:9082"},
        ],
        "dengine_rtt_limit_ms": 10,
        "dengine_clock_offset_limit_ms": 100,
        "dengine_release_enabled": True,
        "dengine_security_enabled": "true",
        "dengine_peer_secret": "a",
        "dengine_token": "b",
        "dengine_skipped_checks": [],
    }
    names = {"identity", "cluster", "memory", "rtt", "release", "security", "secrets"}

    def rows(**more: Any) -> list[dict[str, Any]]:
        own = with_its_own(found, {**variables, **more})
        made: list[dict[str, Any]] = value(found["ansible.builtin.set_fact"]["preflight_rows"], own)
        return made

    assert {r["check"] for r in rows() if r["status"] == "FAILED"} == names
    ask = {"dengine_nodes": variables["dengine_nodes"], "inventory_hostname": "n1"}
    for name in names:
        left = rows(dengine_skipped_checks=sorted(names - {name}))
        assert {r["check"] for r in left if r["status"] == "FAILED"} == {name}
        assert stops("preflight", "main", "Every check passes", **ask, preflight_rows=left)
    none = rows(dengine_skipped_checks=sorted(names))
    assert not stops("preflight", "main", "Every check passes", **ask, preflight_rows=none)


# --- the steps of a rollout ----------------------------------------------------------------------


def test_no_step_is_left_out() -> None:
    def left_out(expected: int, *marks: str) -> bool:
        noted = [{"name": name, "at": 1.0} for name in marks]
        ask = {"rollout_expected": expected, "rollout_marks": noted}
        return stops("rollout", "guard", "No step was left out", **ask)

    assert not left_out(2, "start", "gate, discover, preflight")
    assert left_out(2, "start")
    assert left_out(3, "start", "gate, discover, preflight")
    assert left_out(3, "start", "backup", "gate, discover, preflight")


@pytest.mark.parametrize(
    ("file", "expected"),
    [("backup", 2), ("install", 3), ("begin", 4), ("join", 5), ("finish", 6)],
)
def test_each_step_begins_with_a_look_at_those_before(file: str, expected: int) -> None:
    (first, *_) = yaml.safe_load((ROLES / "rollout/tasks" / f"{file}.yml").read_text("utf-8"))
    assert first["ansible.builtin.import_tasks"] == "guard.yml"
    assert first["vars"] == {"rollout_expected": expected}
    assert "when" not in first


def test_a_backup_comes_before_voters_get_company() -> None:
    when = task("rollout", "backup", "Backup")["when"]
    for join, voters, made in (([2], [1], True), ([2], [], False), ([], [1], False)):
        assert true(when, {"discover_plan": {"join": join, "voters": voters}}) is made


def test_voters_that_were_stopped_are_backed_up_once_they_run() -> None:
    """What this run founded, or has a backup of already, is not."""
    defaults = yaml.safe_load((ROLES / "rollout" / "defaults" / "main.yml").read_text())
    for voters, founder, now, join, due in (
        ([], "", [1], [2], True),
        ([1], "", [1], [2], False),
        ([], "n1", [1], [2], False),
        ([], "", [1], [], False),
        ([], "", [], [2], False),
    ):
        found = {
            "rollout_first": {"voters": voters, "founder": founder},
            "discover_plan": {"voters": now, "join": join},
        }
        found["rollout_backup_due"] = value(defaults["rollout_backup_due"], found)
        assert found["rollout_backup_due"] is due
        step = task("rollout", "begin", "Backup of voters that were stopped")
        assert true(step["when"], found) is due


def test_a_backup_is_not_on_the_disk_that_it_is_of() -> None:
    def refused(machine: str, device: int, same: Any = False) -> bool:
        return stops(
            "backup",
            "main",
            "The destination is outside the data disk",
            inventory_hostname="n2",
            backup_host="n2",
            dengine_backup_same_disk=same,
            backup_destination={"facts": {"machine": machine, "data_device": device}},
            discover_probe={"facts": {"machine": "m2", "data_device": 8}},
        )

    assert refused("m2", 8)
    assert not refused("m2", 9)
    assert not refused("m1", 8), "another machine has another disk"
    assert not refused("m2", 8, same="true")
    assert refused("m2", 8, same="false")


@pytest.mark.parametrize("kind", ["problems", "goal_problems"])
def test_what_is_seen_after_the_start_is_judged_again(kind: str) -> None:
    def stopped(skip: list[str], **found: Any) -> bool:
        plan = {"problems": [], "goal_problems": [], **found}
        name = "What it shows is sound"
        ask = {"discover_plan": plan, "dengine_skipped_checks": skip}
        return stops("rollout", "begin", name, **ask)

    assert not stopped([])
    assert stopped([], **{kind: [bad("identity")]})
    assert not stopped(["identity"], **{kind: [bad("identity")]})


def test_a_start_without_a_leader_ends_the_run() -> None:
    """Where nothing else was found; who did not ask has nothing to say."""
    for said, ends in (({"message": "no leader"}, True), ({"message": ""}, False), ({}, False)):
        assert stops("rollout", "begin", "There is a leader", rollout_leader=said) is ends


def test_the_voters_to_be_are_never_even() -> None:
    def refused(target: list[int], join: list[int], voters: list[int]) -> bool:
        plan = {"target": target, "join": join, "voters": voters}
        name = "The voters are to be an odd number"
        return stops("rollout", "join", name, discover_plan=plan)

    assert refused([1, 2], [2], [1])
    assert not refused([1, 2, 3], [2, 3], [1])
    assert not refused([1, 2], [], [1, 2]), "what is there already stops no run that adds nothing"


def test_a_node_that_ran_is_the_same_process_at_the_end() -> None:
    def stopped(before: Any, after: Any) -> bool:
        return stops(
            "rollout",
            "finish",
            "Node 1 was left alone",
            inventory_hostname="n1",
            rollout_first={"processes": {"n1": before}},
            rollout_after={"facts": {"process": after}},
        )

    process = {"pid": 10, "started": 5}
    assert not stopped(process, dict(process))
    assert not stopped(None, process)
    for other in ({"pid": 11, "started": 5}, {"pid": 10, "started": 6}, None):
        assert stopped(process, other)


def test_the_note_of_another_cluster_is_not_overwritten() -> None:
    """Not even where check `identity` is skipped: it is the only proof."""
    when = task("rollout", "finish", "Note that the cluster is at work here")["when"]
    for verified, written in (("", True), ("c1", True), ("c0", False)):
        ask = {
            "ansible_check_mode": False, "inventory_hostname": "n1",
            "discover_plan": {"members": ["n1"], "cluster_id": "c1"},
            "discover_probe": {"facts": {"verified": verified}},
        }  # fmt: skip
        assert true(when, ask) is written


def test_a_problem_of_the_verification_ends_the_run() -> None:
    def stopped(host: str, **result: Any) -> bool:
        ask = {"verify_host": "n1", "inventory_hostname": host, "verify_result": result}
        return stops("verify", "verdict", "The cluster is as it should be", **ask)

    assert stopped("n1", problems=["n2 differs"])
    assert not stopped("n1", problems=[])
    assert not stopped("n1", skipped=True), "check mode"
    assert not stopped("n2", problems=["n2 differs"])


def test_configuration_that_would_change_is_drift() -> None:
    drift = task("node", "drift", "The configuration is that of the inventory")
    assert drift["check_mode"] is True
    assert true(drift["failed_when"], {"node_drift": {"changed": True}})
    assert not true(drift["failed_when"], {"node_drift": {"changed": False}})


@pytest.mark.parametrize(
    ("count", "host", "founder", "roles"),
    [
        (3, "n1", "n1", [2, 3, 3]),
        (3, "n2", "n1", [3, 3, 3]),
        (3, "n1", "", [3, 3, 3]),
        (1, "n1", "", [2]),
    ],
)
def test_only_who_founds_has_a_file_that_founds(
    count: int, host: str, founder: str, roles: list[int]
) -> None:
    """And only then: with the file that stays, an empty directory joins. Alone in the inventory
    there is nobody to join, and such a file would be refused."""
    ours = environment()
    plain = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)
    plain.filters, plain.tests = ours.filters, ours.tests
    nodes = [{"host": f"n{i}", "id": i, "endpoint": f"10.0.0.{i}:908{i}"} for i in (1, 2, 3)]
    text = (ROLES / "node" / "templates" / "dengine.toml.j2").read_text(encoding="utf-8")
    made = plain.from_string(text).render(
        dengine_nodes=nodes[:count], inventory_hostname=host, node_founder=founder,
        dengine_config={}, dengine_node_id=host[1:], dengine_listen_address="10.0.0.1:9081",
        dengine_endpoint="10.0.0.1:9081", dengine_db_root="/var/lib/dengine", dengine_zone="a",
        dengine_security_enabled=False,
    )  # fmt: skip
    entries = tomllib.loads(made)["cluster"]["initial_cluster"]
    assert [e["role"] for e in entries] == roles
    assert [e["status"] for e in entries] == [2 if role == 2 else 0 for role in roles]


# --- the command on the path ---------------------------------------------------------------------


def test_the_command_takes_nobodys_place_on_the_path() -> None:
    when = task("release", "main", "The command is on the path")["when"]
    for process, exists, made in ((False, False, True), (False, True, False), (True, False, False)):
        found = {"stat": {"exists": exists}}
        assert true(when, {"dengine_is_process": process, "release_link": found}) is made


def test_destroy_takes_only_its_own_command_from_the_path() -> None:
    when = task("destroy", "remove", "Remove our command from the path")["when"]
    ours = {"exists": True, "lnk_target": "/opt/dengine/current/bin/dengine"}
    for process, stat, removed in (
        (False, ours, True),
        (True, ours, False),
        (False, {"exists": True, "lnk_target": "/home/anna/bin/dengine"}, False),
        (False, {"exists": True}, False),
        (False, {"exists": False}, False),
    ):
        ask = {"dengine_opt_dir": "/opt/dengine", "destroy_link": {"stat": stat}}
        assert true(when, {"dengine_is_process": process, **ask}) is removed


# --- what the playbooks of every day say ---------------------------------------------------------


def switchover_says(wanted: int | None, **more: Any) -> list[str]:
    """Why leadership is not moved; nothing where it is."""
    play = yaml.safe_load((ROLES.parent / "playbooks" / "switchover.yml").read_text())[0]
    (found,) = [t for t in play["tasks"][0]["block"] if t["name"] == "Who takes over is well"]
    members = [
        {"id": i, "status": "active" if i < 4 else "read_only", "ready": ready}
        for i, ready in ((1, True), (2, True), (3, False), (4, True))
    ]
    view = {"leader": {"id": 1}, "joint": False, "members": members, **more}
    variables: dict[str, Any] = {
        "switchover_before": {"cluster": view},
        "discover_plan": {"problems": [], "leader": 1},
        **({} if wanted is None else {"dengine_leader": str(wanted)}),
    }
    own = with_its_own(found, variables)
    if true(found[ASSERT]["that"], own):
        return []
    said: list[str] = value(found[ASSERT]["fail_msg"], own)
    return said[:-1]  # the last is what the voters are like


def test_switchover_says_why_it_refuses() -> None:
    assert switchover_says(None) == []
    assert switchover_says(2) == []
    for nobody in (4, 9):
        said = f"node {nobody} is no voter; the voters are [1, 2, 3]"
        assert switchover_says(nobody) == [said]
    assert switchover_says(3) == ["node 3 is a voter, and not ready to lead"]
    assert switchover_says(None, members=[]) == ["no other voter is ready to lead"]
    said = ["no node leads", "a change of members is under way"]
    assert switchover_says(2, leader=None, joint=True) == said


def test_a_single_voter_is_told_what_a_restart_would_cost_and_nothing_else() -> None:
    found = task("rolling", "main", "The cluster can spare one node")

    def says(voters: list[int], problems: list[dict[str, Any]]) -> list[str]:
        plan = {"problems": problems, "voters": voters}
        ask = {"discover_plan": plan, "rolling_allow_downtime": False}
        assert stops("rolling", "main", found["name"], **ask)
        said: list[str] = value(
            found[ASSERT]["fail_msg"], {**ask, "rolling_advice": ["A single voter"]}
        )
        return said

    assert says([1], []) == ["A single voter"]
    assert len(says([1, 2, 3], [bad("identity")])) > 1
    assert "A single voter" not in says([1, 2, 3], [bad("identity")])


@pytest.mark.parametrize(
    ("role", "name"), [("diagnose", "Where it is"), ("switchover", "Who leads")]
)
def test_check_mode_says_what_would_be(role: str, name: str) -> None:
    if role == "diagnose":
        found = task(role, "main", name)
    else:
        play = yaml.safe_load((ROLES.parent / "playbooks" / "switchover.yml").read_text())[0]
        (found,) = [t for t in play["tasks"][0]["block"] if t["name"] == name]
    for check, would in ((True, True), (False, False)):
        own = with_its_own(
            found,
            {
                "ansible_check_mode": check,
                "diagnose_dir": "d",
                "inventory_hostname": "n1",
                "diagnose_cluster": {},
                "switchover_result": {"leader": 2},
                "discover_plan": {"leader": 1},
            },
        )
        assert (" would " in value(found["ansible.builtin.debug"]["msg"], own)) is would


def test_all_playbooks_go_through_their_tasks_host_by_host() -> None:
    """Whatever an ansible.cfg says: a step looks at what all hosts have registered."""
    plays = [
        play
        for file in sorted((ROLES.parent / "playbooks").glob("*.yml"))
        for play in yaml.safe_load(file.read_text())
    ]
    assert len(plays) == 8
    assert {play["strategy"] for play in plays} == {"ansible.builtin.linear"}
