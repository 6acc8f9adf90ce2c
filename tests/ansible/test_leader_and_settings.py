"""dengine_leader and dengine_settings: one call, and a look at the cluster where nobody knows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.ansible.answers import BUSY, LOST, member, view
from tests.ansible.server import Answers, Say, Server, run_module


def test_settings_change_what_differs_and_nothing_else() -> None:
    answers: Answers = {
        "GET /v1/cluster": view(member(1)),
        "PUT /v1/cluster/settings": Say({"settings": {"promotion": "odd"}}),
    }
    wanted = {"promotion": "odd", "history_revisions": 10}
    with Server(answers) as server:
        result = run_module("dengine_settings", endpoints=[server.endpoint], settings=wanted)
        assert result["changed"]
        assert json.loads(server.asked[-1].body) == {"promotion": "odd"}
        count = len(server.asked)
        dry = run_module("dengine_settings", True, endpoints=[server.endpoint], settings=wanted)
        assert dry["diff"]["after"]["promotion"] == "odd"
        assert [a.method for a in server.asked[count:]] == ["GET"]


def test_leader_is_moved_to_who_is_named_or_away_to_the_best() -> None:
    led_by_two = Say({**view(member(1), member(2)).body, "leader": {"id": 2}})
    answers: Answers = {
        "GET /v1/cluster": [view(member(1), member(2)), led_by_two],
        "POST /v1/cluster/leader": Say({"leader": 2}),
    }
    with Server(answers) as server:
        result = run_module("dengine_leader", endpoints=[server.endpoint], node_id=2)
        assert result["changed"]
        assert json.loads(server.asked[1].body) == {"id": 2}
        again = run_module("dengine_leader", endpoints=[server.endpoint], node_id=2)
        assert not again["changed"]
    three = view(member(1), member(2, lag=40), member(3))
    with Server({"GET /v1/cluster": three}) as server:
        result = run_module("dengine_leader", True, endpoints=[server.endpoint], not_node_id=1)
        assert result["leader"] == 3
        assert server.changes == []
    with Server({"GET /v1/cluster": view(member(1))}) as server:
        result = run_module("dengine_leader", endpoints=[server.endpoint], not_node_id=1)
        assert "no other voter is alive" in result["msg"]


def led_by(leader: int | None, **two: Any) -> Say:
    told = {"leader": {"id": leader} if leader else None}
    return Say({**view(member(1), member(2, **two)).body, **told})


FAILED = Say(
    {"error": "propose_failed", "message": "it did not", "outcome": "none", "retryable": True}, 503
)


@pytest.mark.parametrize(
    ("answer", "views", "asked", "said"),
    [
        (FAILED, [led_by(1)], 2, "it did not (503)"),
        (LOST, [led_by(1)], 2, "who knows (504)"),
        (LOST, [led_by(1), led_by(None), led_by(None), led_by(2)], 1, ""),
        ([FAILED, Say({"leader": 2})], [led_by(1), led_by(1), led_by(2)], 2, ""),
        ([BUSY, BUSY, BUSY, Say({"leader": 2})], [led_by(1)] * 4 + [led_by(2)], 4, ""),
    ],
)
def test_leader_is_asked_to_move_twice_at_most_and_who_leads_counts(
    answer: Say | list[Say], views: list[Say], asked: int, said: str
) -> None:
    """Each attempt stops all writes for a while; one that nobody began is no attempt."""
    answers: Answers = {"GET /v1/cluster": list(views), "POST /v1/cluster/leader": answer}
    with Server(answers) as server:
        result = run_module("dengine_leader", endpoints=[server.endpoint], node_id=2)
        assert len(server.changes) == asked, server.lines
    assert said in result.get("msg", "")
    assert bool(said) == bool(result.get("failed")), result


def test_leader_is_not_moved_to_who_is_far_behind() -> None:
    for ask in ({"node_id": 2}, {"not_node_id": 1}):
        for check in (True, False):
            with Server({"GET /v1/cluster": led_by(1, lag=5000)}) as server:
                result = run_module("dengine_leader", check, endpoints=[server.endpoint], **ask)
                assert server.changes == []
            assert "node 2 is 5000 entries behind, and may be 1000" in result["msg"]
    answers: Answers = {
        "GET /v1/cluster": [led_by(1, lag=5000), led_by(2)],
        "POST /v1/cluster/leader": Say({"leader": 2}),
    }
    with Server(answers) as server:
        ask = {"endpoints": [server.endpoint], "node_id": 2, "max_lag": 9999}
        assert run_module("dengine_leader", **ask)["changed"]


def test_settings_are_looked_at_when_nobody_knows_what_became_of_them() -> None:
    odd = Say({**view(member(1)).body, "settings": {"promotion": "odd"}})
    ask = {"settings": {"promotion": "odd"}, "patience": 1}
    answers: Answers = {"GET /v1/cluster": [view(member(1)), odd], "PUT /v1/cluster/settings": LOST}
    with Server(answers) as server:
        result = run_module("dengine_settings", endpoints=[server.endpoint], **ask)
        assert result["settings"]["promotion"] == "odd"
        assert server.changes == ["PUT /v1/cluster/settings"]
        answers["GET /v1/cluster"] = view(member(1))
        result = run_module("dengine_settings", endpoints=[server.endpoint], **ask)
    assert (result["failed"], result["outcome"]) == (True, "unknown")
