"""What `dengine_verify` must not overlook: keys that are no text, zones that are shared."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from ansible_collections.dengine.core.plugins.modules import dengine_verify

from tests.ansible.server import Answers, Say, Server, run_module
from tests.ansible.test_modules import member, view

BINARY = base64.b64encode(b"\xff\xfe+/").decode()
LISTING = "GET /v1/kv?limit=1000&keys_only=true"


def cluster(*zones: str) -> Say:
    """A view with a voter in each of these zones."""
    return view(*(member(i, zone=zone) for i, zone in enumerate(zones, 1)))


def holding(revision: int) -> Answers:
    """A node of three with one key that is not UTF-8 among others."""
    items = [
        {"key": "\U0001f600", "mod_revision": 1},
        {"key_base64": BINARY, "mod_revision": revision},
    ]
    return {
        "GET /v1/cluster": cluster("a", "b", "c"),
        LISTING: Say({"items": items, "next": None}),
        "GET /v1/kv?key_base64=%2F%2F4rLw%3D%3D": Say(b"x", headers={"ETag": f'"{revision}"'}),
    }


def problems(answers: Answers, **more: Any) -> list[str]:
    """What is found where a single endpoint says all."""
    ask = {"voters": [1, 2, 3], "max_keys": 0, "canary_prefix": "", **more}
    with Server(answers) as server:
        found: list[str] = run_module("dengine_verify", endpoints=[server.endpoint], **ask)[
            "problems"
        ]
    return found


def test_a_key_that_is_not_text_is_compared_as_well() -> None:
    with Server(holding(5)) as one, Server(holding(6)) as other:
        ask = {"endpoints": [one.endpoint, other.endpoint], "voters": [1, 2, 3]}
        (problem,) = run_module("dengine_verify", canary_prefix="", **ask)["problems"]
    assert r"differ at key '\\xff\\xfe+/'" in problem


def test_many_keys_that_differ_take_one_connection() -> None:
    """To look a key up again takes three reads: thousands of them must not use up the ports."""

    def all_at(revision: int) -> Answers:
        keys = [f"k{i}" for i in range(50)]
        items = [{"key": key, "mod_revision": revision} for key in keys]
        return {
            "GET /v1/cluster": cluster("a", "b", "c"),
            LISTING: Say({"items": items, "next": None}),
            **{f"GET /v1/kv/{key}": Say(b"x", headers={"ETag": '"7"'}) for key in keys},
        }

    with Server(all_at(5)) as one, Server(all_at(6)) as other:
        ask = {"endpoints": [one.endpoint, other.endpoint], "voters": [1, 2, 3]}
        assert run_module("dengine_verify", canary_prefix="", **ask)["problems"] == []
        assert len(other.asked) > 50
        assert one.connections <= 2
        assert other.connections <= 2


def test_a_key_that_is_not_text_and_missing_is_found() -> None:
    """Listed by one node, unknown to the other."""
    lacking = {**holding(5), LISTING: Say({"items": [], "next": None})}
    del lacking["GET /v1/kv?key_base64=%2F%2F4rLw%3D%3D"]
    with Server(holding(5)) as one, Server(lacking) as other:
        ask = {"endpoints": [one.endpoint, other.endpoint], "voters": [1, 2, 3]}
        found = run_module("dengine_verify", canary_prefix="", **ask)["problems"]
    assert any(r"\\xff" in problem for problem in found), found


@pytest.mark.parametrize(
    ("zones", "bad"),
    [
        ("abc", ""),
        ("aab", "zone 'a' has 2 of 3 voters ([1, 2])"),
        ("aabbc", ""),
        ("aaabc", "zone 'a' has 3 of 5 voters ([1, 2, 3])"),
        ("a", ""),
    ],
)
def test_voters_are_spread_over_zones(zones: str, bad: str) -> None:
    """The inventory agrees with the cluster in each case, so only the distribution is judged."""
    said = {str(i): zone for i, zone in enumerate(zones, 1)}
    answers: Answers = {"GET /v1/cluster": cluster(*zones)}
    ask = {"voters": [int(i) for i in said], "zones": said}
    found = problems(answers, **ask)
    assert len(found) == bool(bad)
    assert bad in "".join(found)
    assert problems(answers, shared_zones=True, **ask) == []


def test_an_even_number_of_voters_is_a_problem_even_when_it_was_asked_for() -> None:
    found = problems({"GET /v1/cluster": cluster("a", "b")}, voters=[1, 2])
    assert found == ["2 voters: an even number tolerates no more failures than one less"]


def membership(*members: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "cluster_id": "c1", "members": list(members), "joint": False,
        "fault_tolerance": (len(members) - 1) // 2, **more,
    }  # fmt: skip


THREE = [member(i, zone=f"az-{i}") for i in (1, 2, 3)]
SOUND = membership(*THREE)
SILENT = {**THREE[2], "ready": False, "reason": "it does not answer"}


@pytest.mark.parametrize(
    ("views", "wanted", "said"),
    [
        ([SOUND, SOUND], [1, 2, 3], None),
        ([SOUND, {**SOUND, "cluster_id": "c2"}], [1, 2, 3], "e2 belongs to cluster c2, not c1"),
        ([SOUND, membership(*THREE[:2], fault_tolerance=1)], [1, 2, 3], "e2 sees the voters [1, 2"),
        ([SOUND, {**SOUND, "joint": True}], [1, 2, 3], "e2 sees a change of members under way"),
        ([membership(*THREE[:2], SILENT)], [1, 2, 3], "node 3: it does not answer"),
        ([{**SOUND, "fault_tolerance": 0}], [1, 2, 3], "only 0 more voters may fail, not 1"),
        ([membership(*THREE[:2])], [1, 2], "2 voters: an even number"),
    ],
)
def test_each_fault_of_the_membership_is_a_problem(
    views: list[dict[str, Any]], wanted: list[int], said: str | None
) -> None:
    found = dengine_verify.view_problems({f"e{i}": v for i, v in enumerate(views, 1)}, wanted)
    assert len(found) == bool(said), found
    assert (said or "") in "".join(found)


def test_each_fault_of_the_zones_is_a_problem() -> None:
    said = {str(i): f"az-{i}" for i in (1, 2, 3)}
    assert dengine_verify.zone_problems(SOUND, said, False) == []
    (problem,) = dengine_verify.zone_problems(SOUND, {**said, "2": "az-9"}, False)
    assert "node 2 is in zone 'az-2', the inventory says 'az-9'" in problem
    crowded = membership(*[{**m, "zone": "az-1"} for m in THREE])
    (problem,) = dengine_verify.zone_problems(crowded, dict.fromkeys(said, "az-1"), False)
    assert "zone 'az-1' has 3 of 3 voters" in problem
    assert dengine_verify.zone_problems(crowded, dict.fromkeys(said, "az-1"), True) == []


def test_another_node_at_an_address_is_a_problem() -> None:
    """Two endpoints, swapped in the inventory; without one there is nothing to compare."""
    answers = [{**holding(5), "GET /v1/status": Say({"node_id": i})} for i in (1, 2)]
    with Server(answers[0]) as one, Server(answers[1]) as other:
        ask = {"endpoints": [one.endpoint, other.endpoint], "voters": [1, 2, 3]}
        right = {one.endpoint: 1, other.endpoint: "2"}
        for ids in ({}, right):
            assert run_module("dengine_verify", canary_prefix="", ids=ids, **ask)["problems"] == []
        swapped = {one.endpoint: 2, other.endpoint: 1}
        found = run_module("dengine_verify", canary_prefix="", ids=swapped, **ask)["problems"]
    assert f"{one.endpoint} is node 1, the inventory says 2: swapped addresses?" in found
    assert len(found) == 2


def test_check_mode_compares_and_writes_nothing() -> None:
    """Everything but the canaries, which are the only thing that it ever writes."""
    with Server(holding(5)) as one, Server(holding(5)) as other:
        ask = {"endpoints": [one.endpoint, other.endpoint], "voters": [1, 2, 3]}
        result = run_module("dengine_verify", check=True, **ask)
        assert result["compared_keys"] == 2
        assert result["problems"] == []
        assert one.changes == other.changes == []
