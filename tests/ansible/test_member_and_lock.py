"""dengine_member and dengine_lock, with the action plugins that repeat and judge them."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.dengine.core.plugins.action import dengine_member as action
from ansible_collections.dengine.core.plugins.module_utils.view import FETCHING
from ansible_collections.dengine.core.plugins.plugin_utils import run_lock

from tests.ansible.answers import LOST, REFUSED, member, view
from tests.ansible.server import Answers, Asked, Say, Server, ad_hoc, run_module


def test_member_waits_for_the_clusters_own_promotion() -> None:
    before = view(member(1), member(2, "promotable"), member(3, "promotable"))
    joint = view(member(1), member(2), member(3), joint=True)
    after = view(member(1), member(2), member(3))
    with Server({"GET /v1/cluster": [before, before, joint, after]}) as server:
        result = run_module("dengine_member", endpoints=[server.endpoint], ids=[1, 2, 3])
        assert server.changes == []
    assert result["done"]
    assert result["changed"]
    assert result["diff"]["before"] == {"voters": [1], "learners": [2, 3]}
    assert result["after"] == {"voters": [1, 2, 3], "learners": []}


def test_member_promotes_both_in_one_call_when_the_cluster_does_not() -> None:
    before = view(member(1), member(2, "promotable"), member(3, "promotable"))
    answers: Answers = {"GET /v1/cluster": before}

    def promoted(_: Asked) -> Say:
        answers["GET /v1/cluster"] = view(member(1), member(2), member(3))
        return Say({"promoted": [2, 3]})

    answers["POST /v1/cluster/promote"] = promoted
    with Server(answers) as server:
        result = run_module("dengine_member", endpoints=[server.endpoint], ids=[2, 3], slice=20)
        (call,) = [a for a in server.asked if a.method == "POST"]
    assert json.loads(call.body) == {"ids": [2, 3]}
    assert result["done"]


def test_member_never_makes_the_voters_even() -> None:
    """A server does what it is told by hand; the module does not tell it that."""
    waiting = view(member(1), member(2, "promotable"))
    with Server({"GET /v1/cluster": waiting}) as server:
        result = run_module("dengine_member", endpoints=[server.endpoint], ids=[1, 2], slice=20)
        assert server.changes == []
    assert result["failed"]
    assert "to promote [1, 2] would make 2 voters, [1, 2]" in result["msg"]


def test_member_tells_why_a_promotion_is_refused_for_good() -> None:
    """409 may pass: the run goes on for the stall's time, and then says what the cluster said, even
    while the learners move on."""
    match = 12

    def moving(_: Asked) -> Say:
        nonlocal match
        match += 1
        learners = [member(i, "promotable", match=match) for i in (2, 3)]
        return view(member(1), *learners)

    answers: Answers = {"GET /v1/cluster": moving, "POST /v1/cluster/promote": REFUSED}
    with Server(answers) as server:
        ask = {"endpoints": [server.endpoint], "ids": [2, 3], "slice": 4}
        result = run_module("dengine_member", **ask)
        assert not result["done"]
        assert "not now (409)" in result["refusal"]
        said = ad_hoc("dengine_member", **ask, stall_timeout=3)
    assert "no promotion for" in said["msg"]
    assert "the cluster refuses to promote" in said["msg"]
    assert "not now (409)" in said["msg"]


def test_member_keeps_the_run_lock_fresh_while_it_waits(tmp_path: Path) -> None:
    """And ends where somebody has taken it: two runs must not go on together."""
    lock = tmp_path / "lock.json"
    with Server({"GET /v1/cluster": view(member(1))}) as server:
        ask = {"endpoints": [server.endpoint], "ids": [1], "lock": str(lock)}
        assert ad_hoc("dengine_member", **ask)["done"]
        assert time.time() - json.loads(lock.read_text())["refreshed"] < 60
        other = {"nonce": "x", "user": "alice", "controller": "c", "refreshed": time.time()}
        lock.write_text(json.dumps(other))
        assert (
            "not with this run any more, but with alice" in ad_hoc("dengine_member", **ask)["msg"]
        )
        assert json.loads(lock.read_text()) == other


def test_member_tells_percent_and_speed_and_comes_back_when_its_slice_is_over() -> None:
    transfer = {"index": 9, "percent": 43, "sent_bytes": 1, "size_bytes": 120_000_000}
    learner = member(2, "promotable", ready=False, transfer={**transfer, "bytes_per_s": 12_000_000})
    with Server({"GET /v1/cluster": view(member(1), learner)}) as server:
        result = run_module(
            "dengine_member", endpoints=[server.endpoint], ids=[2], state="ready", slice=0.3
        )
    assert not result["done"]
    assert result["progress"] == ["node 2: snapshot 43 % of 120.0 MB, 12.0 MB/s"]


SNAPSHOT_BYTES = 40_000_000  # to unpack which four seconds are given


def unpacking(joiner: Server, *, remembered: bool = True) -> dict[str, Any]:
    """A learner to which the leader has sent all of a snapshot, and may remember that."""
    transfer = {"index": 9, "percent": 100, "sent_bytes": SNAPSHOT_BYTES, "bytes_per_s": 12_000_000}
    transfer["size_bytes"] = SNAPSHOT_BYTES
    said = {"address": joiner.endpoint, "ready": False, "match": 0, "lag": 12}
    return member(2, "promotable", transfer=transfer if remembered else None, **said)


BUSY_JOINER: Answers = {
    "GET /v1/snapshots": Say({"snapshots": [], "job": f"{FETCHING} from node 1"})
}


@pytest.mark.parametrize("remembered", [True, False])
def test_member_tells_that_a_snapshot_is_unpacked(remembered: bool) -> None:
    """The leader forgets a transfer ten seconds after its end; what it sent is its newest."""
    with Server(BUSY_JOINER) as joiner:
        learner = unpacking(joiner, remembered=remembered)
        listing = Say({"snapshots": [{"size_bytes": SNAPSHOT_BYTES}], "job": None})
        answers: Answers = {
            "GET /v1/cluster": view(member(1), learner),
            "GET /v1/snapshots": listing,
        }
        with Server(answers) as server:
            ask = {"endpoints": [server.endpoint], "ids": [2], "state": "ready", "slice": 0.3}
            result = run_module("dengine_member", **ask)
            assert result["progress"] == [
                "node 2: it has the snapshot, and verifies and unpacks it"
            ]
            assert result["unpacking_bytes"] == SNAPSHOT_BYTES
            joiner.answers = {"GET /v1/snapshots": Say({"snapshots": [], "job": None})}
            result = run_module("dengine_member", **ask)
            assert result["unpacking_bytes"] == 0
            assert "verifies" not in result["progress"][0]


def test_member_gives_a_node_the_time_to_unpack_a_snapshot() -> None:
    """Nothing moves meanwhile, for a minute with some GB; with a larger one for longer."""
    with Server(BUSY_JOINER) as joiner:
        began = time.monotonic()

        def later(_: Asked) -> Say:
            ready = member(2, "promotable", address=joiner.endpoint)
            return view(member(1), ready if time.monotonic() > began + 4 else unpacking(joiner))

        with Server({"GET /v1/cluster": later}) as server:
            ask = {"endpoints": [server.endpoint], "ids": [2], "state": "ready", "slice": 0.3}
            result = ad_hoc("dengine_member", **ask, stall_timeout=1)
            assert result.get("done"), result
            began = float("inf")
            result = ad_hoc("dengine_member", **ask, stall_timeout=1)
    assert "nothing moved for" in result["msg"], "it has a limit nevertheless"


@pytest.mark.parametrize("known", [True, False])
def test_member_does_not_wait_for_a_node_that_has_ended(known: bool) -> None:
    """Member of the cluster or not: nobody listens on its port, and nothing moves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{free.getsockname()[1]}"
        learner = member(2, "promotable", address=gone, ready=False, match=0, lag=12)
        seen = view(member(1), learner) if known else view(member(1))
        with Server({"GET /v1/cluster": seen}) as server:
            ask = {"endpoints": [server.endpoint], "ids": [2], "state": "ready", "slice": 0.3}
            more = {"stall_timeout": 2, "nodes": {} if known else {"2": gone}}
            result = ad_hoc("dengine_member", **ask, **more)
    assert f"node 2 does not run: {gone}: Connection refused, for " in result["msg"]
    assert "Its log says why" in result["msg"]
    assert f"it does not answer itself: {gone}" in result["msg"]


def test_patience_with_a_node_that_ended_is_shorter_than_with_one_that_stands_still() -> None:
    now = time.monotonic()
    patience = action._Patience(3600.0, 60.0)
    seen = {"mark": [1], "ended": ["node 2 does not run: refused"], "progress": []}
    assert patience.ends(seen) == ""
    patience._moved = patience._ended = now - 21
    assert "node 2 does not run: refused, for 21 s" in patience.ends(seen)
    assert patience.ends({**seen, "ended": []}) == ""


def test_the_job_of_a_node_that_gets_a_snapshot_is_called_as_the_module_expects() -> None:
    node = Path(__file__).resolve().parents[2] / "dengine" / "node" / "snapshots.py"
    assert f'self.job = f"{FETCHING} from node ' in node.read_text(encoding="utf-8")


def test_member_looks_again_when_nobody_knows_what_became_of_a_promotion() -> None:
    """It took place, and the answer was lost."""
    before = view(member(1), member(2, "promotable"), member(3, "promotable"))
    answers: Answers = {"GET /v1/cluster": before}

    def promoted(_: Asked) -> Say:
        answers["GET /v1/cluster"] = view(member(1), member(2), member(3))
        return LOST

    answers["POST /v1/cluster/promote"] = promoted
    with Server(answers) as server:
        result = run_module("dengine_member", endpoints=[server.endpoint], ids=[2, 3], slice=20)
        assert server.changes == ["POST /v1/cluster/promote"]
    assert result["done"], result


@pytest.mark.parametrize(
    ("arguments", "call", "body"),
    [
        ({"ids": [2], "state": "absent"}, "DELETE /v1/cluster/members/2", b""),
        (
            {"ids": [2], "state": "present", "zone": "az-b"},
            "PUT /v1/cluster/members/2",
            b'{"zone": "az-b"}',
        ),
    ],
)
def test_member_removes_and_changes_with_one_call_and_none_in_check_mode(
    arguments: dict[str, Any], call: str, body: bytes
) -> None:
    answers: Answers = {
        "GET /v1/cluster": [view(member(1), member(2)), view(member(1))],
        call: Say({"id": 2}),
    }
    with Server(answers) as server:
        result = run_module("dengine_member", endpoints=[server.endpoint], **arguments)
        assert result["changed"]
        assert [(a.line, a.body) for a in server.asked if a.method != "GET"] == [(call, body)]
    with Server({"GET /v1/cluster": view(member(1), member(2))}) as server:
        result = run_module("dengine_member", check=True, endpoints=[server.endpoint], **arguments)
        assert result["changed"]
        assert result["diff"]["before"] != result["diff"]["after"]
        assert server.changes == []


def test_member_refuses_another_cluster() -> None:
    with Server({"GET /v1/cluster": view(member(1))}) as server:
        result = run_module(
            "dengine_member", endpoints=[server.endpoint], ids=[1], expect_cluster_id="c2"
        )
    assert "this is cluster c1, not c2" in result["msg"]


def test_lock_has_one_holder_who_says_how_long_it_may_be_silent(tmp_path: Path) -> None:
    """Nobody else decides how long that is: another's ttl counts for nothing."""
    path = str(tmp_path / "lock" / "l.json")
    first, second = {"nonce": "a"}, {"nonce": "b"}
    assert run_module("dengine_lock", check=True, path=path, owner=first)["held"]
    assert run_module("dengine_lock", state="released", path=path, owner=first)["held"]
    assert not (tmp_path / "lock").exists()
    assert run_module("dengine_lock", path=path, owner=first)["held"]
    assert run_module("dengine_lock", path=path, owner=first)["held"]
    for ttl in (900, 0):
        refused = run_module("dengine_lock", path=path, owner=second, ttl=ttl)
        assert (refused["held"], refused["stale"]) == (False, False)
        assert refused["holder"]["nonce"] == "a"
    run_module("dengine_lock", path=path, owner=second, state="released")
    assert not run_module("dengine_lock", path=path, owner=second)["held"], "it is not b's to give"
    assert run_module("dengine_lock", path=path, owner=first, ttl=0)["held"]
    silent = run_module("dengine_lock", path=path, owner=second)
    assert (silent["held"], silent["stale"]) == (False, True)
    assert not run_module("dengine_lock", path=path, owner=second, take_from="z")["held"]
    assert run_module("dengine_lock", path=path, owner=second, take_from="a")["held"]
    assert not run_module("dengine_lock", path=path, owner=first, take_from="a")["held"]
    assert run_module("dengine_lock", path=path, owner=second, state="released")["held"]
    assert run_module("dengine_lock", path=path, owner=first)["held"]


@pytest.mark.parametrize(
    ("holder", "silent", "held"),
    [
        ("alive", True, False),
        ("ended", False, True),
        ("elsewhere", False, False),
        ("elsewhere", True, True),
    ],
)
def test_lock_is_taken_from_who_has_ended_or_is_silent_elsewhere(
    holder: str, silent: bool, held: bool, tmp_path: Path
) -> None:
    """A run of this controller that goes on keeps it however long it says nothing. One elsewhere,
    which a CI job under a new name every time is as well, loses it after its own time to live."""
    lock = tmp_path / "lock.json"
    other = run_lock.owner(os.getpid())
    if holder == "ended":
        other["started"] = "1"
    elif holder == "elsewhere":
        other.update(controller="ci-1234", place="another boot")
    then = time.time() - (1000 if silent else 0)
    lock.write_text(json.dumps({**other, "nonce": "x", "refreshed": then, "ttl": 900}))
    result = ad_hoc("dengine_lock", path=str(lock))
    assert result["held"] is held, result
    assert (json.loads(lock.read_text())["nonce"] != "x") is held
    assert held or "is changing this cluster" in result["msg"]
