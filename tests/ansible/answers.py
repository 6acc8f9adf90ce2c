"""What a cluster says, in the words of its API, for the modules' tests."""

from __future__ import annotations

from typing import Any

from tests.ansible.server import Answers, Say


def member(node_id: int, status: str = "active", **more: Any) -> dict[str, Any]:
    return {
        "id": node_id,
        "address": f"10.0.0.{node_id}:9081",
        "zone": "az-a",
        "role": "follower",
        "status": status,
        "incarnation": f"{node_id:016x}",
        "match": 12,
        "lag": 0,
        "ready": True,
        "reason": None,
        "transfer": None,
        **more,
    }


def view(*members: dict[str, Any], joint: bool = False) -> Say:
    return Say(
        {
            "cluster_id": "c1",
            "leader": {"id": 1, "address": "10.0.0.1:9081"},
            "term": 2,
            "commit_index": 12,
            "applied_index": 12,
            "revision": 3,
            "settings": {"promotion": "immediate", "history_revisions": 10},
            "members": list(members),
            "joint": joint,
            "fault_tolerance": (len(members) - 1) // 2,
            "advice": "",
        }
    )


def healthy(*members: dict[str, Any]) -> Answers:
    """A node that serves, with these members."""
    return {
        "GET /v1/status": Say({"node_id": 1}),
        "GET /readyz": Say({"status": "ok"}),
        "GET /v1/cluster": view(*members),
    }


REFUSED = Say(
    {"error": "conflict", "message": "not now", "outcome": "none", "retryable": False}, 409
)
BUSY = Say({"error": "not_leader", "message": "not me", "outcome": "none", "retryable": True}, 503)
LOST = Say(
    {"error": "timeout", "message": "who knows", "outcome": "unknown", "retryable": True}, 504
)
