"""For load balancers, supervisors and people: is this node alive, ready, the leader?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import generate_latest

from dengine import __version__
from dengine.api import params
from dengine.api.protocol import Request, Response, json_response
from dengine.api.replies import ReadyReply, StatusReply
from dengine.api.routes import Body, Handler, Parameter, Route
from dengine.errors import ClusterUnavailable, NotLeader

if TYPE_CHECKING:
    from dengine.node.node import Node

MAX_LAG = 2**63 - 1
_OK: dict[str, Any] = {"status": "ok"}


class HealthCalls:
    """The handlers of the health endpoints; none of them waits for anything."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def livez(self, request: Request) -> Response:
        """The event loop turns: that is all this says."""
        return json_response(_OK)

    async def readyz(self, request: Request) -> Response:
        readiness = self._node.readiness()
        verbose = params.flag(request.params, "verbose")
        details: dict[str, Any] = {"checks": readiness.checks} if verbose else {}
        if readiness.ready:
            return json_response(_OK | details)
        raise ClusterUnavailable(
            "not ready: " + ("; ".join(readiness.reasons) or "still starting"),
            reasons=readiness.reasons,
            **details,
        )

    async def leader(self, request: Request) -> Response:
        if self._node.is_leader:
            return json_response(_OK)
        raise NotLeader("this node is not the leader")

    async def replica(self, request: Request) -> Response:
        """200 on a node that follows a leader, with `lag` only when no further behind it."""
        allowed = params.integer(request.params, "lag", MAX_LAG, 0, MAX_LAG)
        if self._node.is_leader:
            raise ClusterUnavailable("this node is the leader, not a replica")
        lag = self._node.lag
        if self._node.leader is None or lag is None:
            raise ClusterUnavailable("this node knows no leader to follow")
        if lag > allowed:
            raise ClusterUnavailable(f"this node is {lag} entries behind, more than {allowed}")
        return json_response(_OK | {"lag": lag})

    async def metrics(self, request: Request) -> Response:
        text = generate_latest(self._node.metrics)
        return Response(200, text, b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n")

    async def status(self, request: Request) -> Response:
        return json_response(self._node.local_status())


_STATUS = {
    "node_id": 1,
    "incarnation": "1f3a5c7e9b2d4f60",
    "cluster_id": "6c789e114b3c0c52701eaefa5361b817",
    "version": __version__,
    "role": "leader",
    "term": 2,
    "leader": {"id": 1, "address": "127.0.0.1:9081"},
    "commit_index": 12,
    "last_applied": 12,
    "last_index": 12,
    "first_index": 1,
    "revision": 7,
    "compact_revision": 0,
    "log_time_ms": 90_500,
    "leases": 0,
    "voters": [1],
    "learners": [],
    "proposals": 9,
    "pending_writes": 0,
    "watchers": 0,
    "uptime_s": 93.25,
}


def routes(calls: HealthCalls) -> list[Route]:
    """What supervisors, load balancers and metrics ask."""
    ok = Body("yes", _OK)
    ready = Body("yes", _OK, shape=ReadyReply)
    behind = Body("yes, and how many entries it is behind", _OK | {"lag": 0})
    verbose = Parameter("verbose", "name every check", True)
    lag = Parameter("lag", "most entries it may be behind", 100, minimum=0, maximum=MAX_LAG)
    status = Body("its state", _STATUS, shape=StatusReply)
    metrics = Body("Prometheus text", "dengine_term 2.0\n", "text/plain")
    return [
        _open("/livez", calls.livez, "Is the process alive?", ok),
        _open("/readyz", calls.readyz, "Can it serve?", ready, (verbose,), (503,)),
        _open("/leader", calls.leader, "Is it the leader?", ok, errors=(503,)),
        _open("/replica", calls.replica, "A replica?", behind, (lag,), (503,)),
        Route("GET", "/metrics", calls.metrics, "Metrics", {200: metrics}),
        Route("GET", "/v1/status", calls.status, "This node", {200: status}),
    ]


def _open(
    path: str,
    handler: Handler,
    summary: str,
    reply: Body,
    parameters: tuple[Parameter, ...] = (),
    errors: tuple[int, ...] = (),
) -> Route:
    """A call for load balancers and supervisors, which have no token."""
    return Route(
        "GET", path, handler, summary, {200: reply}, parameters, None, errors, access="open"
    )
