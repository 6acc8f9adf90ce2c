"""What a node says of a cluster whose voters do not answer: to operators, probes and its log."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dengine.config import read
from dengine.errors import ClusterUnavailable
from dengine.node.node import REPORT_MS, Node
from dengine.node.promotion import Promotion, PromotionRules
from dengine.node.status import Status
from dengine.node.transfers import Transfers
from dengine.node.view import ClusterView, _advice
from dengine.raft.membership import AddLearner, Member, apply_change
from dengine.raft.membership import Status as MemberStatus
from dengine.raft.raft import Raft
from dengine.raft.types import MemberId
from tests.cluster import config_text
from tests.node.hosts import on_loop
from tests.raft.harness import A, B, C, Server, leader, membership, server

ABC = membership(A, B, C)


def view_of(raft: Raft) -> dict[str, Any]:
    promotion = Promotion(PromotionRules(100, 1000, 100, 1000))
    status = cast(Status, SimpleNamespace(no_leader=lambda: "no leader; node 2 refused"))
    return ClusterView(raft, status, lambda: promotion, Transfers()).now()


def ready(view: dict[str, Any]) -> dict[int, bool | None]:
    return {m["id"]: m["ready"] for m in view["members"]}


def test_a_new_leader_counts_on_nobody_who_has_not_answered_it() -> None:
    """Right after a failure the dead voter must not be counted as one that may still fail."""
    node = server(A, ABC)
    sent = node.lead()
    assert ready(view_of(node.raft)) == {1: True, 2: False, 3: False}
    node.answer_heartbeats(sent, B)
    view = view_of(node.raft)
    assert (ready(view), view["fault_tolerance"]) == ({1: True, 2: True, 3: False}, 0)
    assert view["advice"] == "bring back what does not answer: node 3"
    assert view["members"][2]["reason"] == "it has not answered this leader yet"
    node.answer_heartbeats(sent, C)
    view = view_of(node.raft)
    assert (view["fault_tolerance"], view["advice"]) == (1, "")


@pytest.mark.parametrize(
    ("voters", "learners", "says"),
    [
        (1, [], "join two more"),
        (1, [MemberStatus.PROMOTABLE] * 2, ""),
        (1, [MemberStatus.READ_ONLY] * 2, "join two more"),
        (2, [], "join one more"),
        (2, [MemberStatus.PROMOTABLE], ""),
        (2, [MemberStatus.READ_ONLY], "join one more"),
        (3, [], ""),
    ],
)
def test_advice_counts_on_learners_that_will_vote(
    voters: int, learners: list[MemberStatus], says: str
) -> None:
    """Nodes that only read never make a cluster safer."""
    who = [A, B, C, MemberId(4, 44)]
    content = membership(*who[:voters])
    for member, status in zip(who[voters:], learners, strict=False):
        newcomer = Member(member, f"10.0.0.{member.id}:9081", "", status)
        content = apply_change(content, AddLearner(newcomer))
    advice = _advice(content, [])
    assert (says in advice) if says else not advice


def test_a_voter_that_falls_silent_is_not_counted_any_more() -> None:
    node = leader(A, ABC)
    assert view_of(node.raft)["fault_tolerance"] == 1
    for _ in range(11):
        node.tick(100)
        node.answer_heartbeats(node.settle(), B)
    view = view_of(node.raft)
    assert (ready(view)[3], view["fault_tolerance"]) == (False, 0)
    assert "it has not answered for" in view["members"][2]["reason"]


def test_without_a_leader_nothing_may_fail_and_the_reason_is_said() -> None:
    view = view_of(server(A, ABC).raft)
    assert (view["leader"], view["fault_tolerance"]) == (None, 0)
    assert view["advice"] == "no leader; node 2 refused"


def test_a_follower_does_not_guess_who_is_alive() -> None:
    """Its own view, as its event stream shows it; GET /v1/cluster asks the leader."""
    node = server(B, ABC)
    hear_of_a_leader(node)
    view = view_of(node.raft)
    assert (view["leader"]["id"], view["fault_tolerance"], view["advice"]) == (1, None, "")


def hear_of_a_leader(node: Server) -> None:
    for message in server(A, ABC).lead():
        if message.to == node.me:
            node.step(message)
    node.settle()


def test_a_node_of_no_cluster_has_no_view() -> None:
    with pytest.raises(ClusterUnavailable):
        view_of(server(A, membership()).raft)


@pytest.mark.parametrize("voters", [2, 3])
def test_without_a_quorum_a_line_every_ten_seconds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, voters: int
) -> None:
    """It names the missing voters and why each fails; of two voters neither can be
    spared, so the line says what is left when one is lost for good."""
    ports = {node_id: 9080 + node_id for node_id in range(1, voters + 1)}
    file = tmp_path / "n1.toml"
    text = config_text(1, ports, 0, 2).replace("./db", str(tmp_path / "db"))
    file.write_text(text, encoding="utf-8")

    async def scenario() -> None:
        node = Node(read(file, {}))
        await node.open()
        node.raft.bootstrap(membership(*(A, B, C)[:voters]))
        due_ms = node._report_due_ms
        with caplog.at_level(logging.WARNING, "dengine.node"):
            for now_ms in range(due_ms - REPORT_MS, due_ms + 2 * REPORT_MS + 1, 500):
                node.ticked(now_ms)
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 3
        for missing in range(2, voters + 1):
            assert f"node {missing} has not been heard of" in lines[0]
        assert ("`dengine repair --config FILE`" in lines[0]) == (voters == 2)
        readiness = node.readiness()
        assert not readiness.ready
        await node.stop()

    on_loop(scenario)
