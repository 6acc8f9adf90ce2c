"""The cluster: who is in it, and changing that. `/v1/cluster*` and the peers' entrance."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import msgspec
import orjson
from aiohttp import web

from dengine.api import params
from dengine.api.params import MAX_JSON_BYTES, BodyReader, decode_json
from dengine.api.protocol import Request, Response, json_response
from dengine.api.replies import ClusterReply, JoinReply
from dengine.api.routes import Body, Handler, Parameter, Route
from dengine.api.sse import stream
from dengine.config import IDEMPOTENCY_WINDOW_MIN_S, MAX_ZONE, parse_address
from dengine.errors import InvalidRequest, Unauthorized, WatchOverflow
from dengine.kv.commands import COMMAND_VERSION

if TYPE_CHECKING:
    from dengine.config import Config
    from dengine.node.node import Node

_CANCELLED = b'event: cancelled\ndata: {"reason":"too slow, or the node is stopping"}\n\n'

NodeId = Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
StatusName = Literal["promotable", "read_only", "active"]
Zone = Annotated[str, msgspec.Meta(max_length=MAX_ZONE)]
Address = Annotated[str, msgspec.Meta(max_length=261)]


class Join(msgspec.Struct, forbid_unknown_fields=True):
    id: NodeId
    incarnation: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{1,16}$")]
    address: Address
    zone: Zone = ""
    status: StatusName = "promotable"
    command_version: Count = 1
    cluster_id: Annotated[str, msgspec.Meta(max_length=64)] = ""  # "": belongs to none yet


class MemberUpdate(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    address: Address | None = None
    zone: Zone | None = None
    status: StatusName | None = None


class Promote(msgspec.Struct, forbid_unknown_fields=True):
    ids: Annotated[list[NodeId], msgspec.Meta(min_length=1, max_length=64)]


class Leader(msgspec.Struct, forbid_unknown_fields=True):
    id: NodeId


class SettingsUpdate(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    promotion: Literal["immediate", "odd"] | None = None
    # The same ranges as those of [kv] in the configuration.
    history_revisions: Annotated[int, msgspec.Meta(ge=0, le=10**12)] | None = None
    history_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**50)] | None = None
    idempotency_window_s: (
        Annotated[int, msgspec.Meta(ge=IDEMPOTENCY_WINDOW_MIN_S, le=86_400)] | None
    ) = None


class ClusterCalls:
    """The handlers of `/v1/cluster*` and `/v1/peer` on one node.

    Args:
        closing: resolved when the server stops, which ends event streams.
    """

    def __init__(
        self, node: Node, config: Config, bodies: BodyReader, closing: asyncio.Future[None]
    ) -> None:
        self._node = node
        self._bodies = bodies
        self._closing = closing
        self._max_watchers = config.limits.watchers
        self._watchers = 0
        self._loop = asyncio.get_running_loop()

    async def show(self, request: Request) -> Response:
        return json_response(await self._node.cluster_view(self._deadline(request)))

    async def join(self, request: Request) -> Response:
        text = await self._bodies.read(request, MAX_JSON_BYTES)
        if request.proof is not None and not request.proof.covers(text):
            raise Unauthorized("not authenticated: the body is not the one that was proved")
        body = decode_json(text, request, Join)
        _check_address(body.address)
        view = await self._node.join(
            msgspec.to_builtins(body), request.remote, self._deadline(request)
        )
        return json_response(view)

    async def update_member(self, request: Request) -> Response:
        node_id = _node_id(request.tail)
        body = await self._body(request, MemberUpdate)
        if body.address is not None:
            _check_address(body.address)
        change = _some(msgspec.to_builtins(body))
        return json_response(
            await self._node.update_member(node_id, change, self._deadline(request))
        )

    async def remove_member(self, request: Request) -> Response:
        node_id = _node_id(request.tail)
        return json_response(await self._node.remove_member(node_id, self._deadline(request)))

    async def promote(self, request: Request) -> Response:
        body = await self._body(request, Promote)
        if len(set(body.ids)) != len(body.ids):
            raise InvalidRequest("ids names a node twice")
        return json_response(await self._node.promote(body.ids, self._deadline(request)))

    async def transfer_leader(self, request: Request) -> Response:
        body = await self._body(request, Leader)
        return json_response(await self._node.transfer_leader(body.id, self._deadline(request)))

    async def change_settings(self, request: Request) -> Response:
        change = _some(msgspec.to_builtins(await self._body(request, SettingsUpdate)))
        return json_response(await self._node.change_settings(change, self._deadline(request)))

    async def watch(self, request: Request) -> Response:
        """Event stream of the membership: now, then after every committed change."""
        if self._watchers >= self._max_watchers:
            raise WatchOverflow(f"{self._max_watchers} watchers are connected already")
        self._node.view_here()  # what it raises is an answer now, and would break a stream later
        following = _Following(self._node.membership_events(), self._closing)
        self._watchers += 1
        try:
            return await stream(request, following.next, following.end)
        finally:
            self._watchers -= 1

    async def peer(self, request: Request) -> Response:
        """Hand the connection over to the peers, which speak WebSocket on it from here on."""
        if not request.message.upgrade:
            raise InvalidRequest("this is the nodes' own entrance: it needs a WebSocket upgrade")
        request.until_left()  # as for a stream: a node that sends no more is not a peer
        aiohttp_request = request.as_aiohttp()
        try:
            response = await self._node.peers.accept(aiohttp_request)
        except web.HTTPException as error:
            raise InvalidRequest(f"not a WebSocket handshake: {error.text}") from None
        return cast(Response, response)

    async def _body(self, request: Request, shape: type[params.T]) -> params.T:
        return decode_json(await self._bodies.read(request, MAX_JSON_BYTES), request, shape)

    def _deadline(self, request: Request) -> float:
        return self._loop.time() + params.timeout_s(request)


class _Following:
    """The views of the membership as events, until all is over."""

    def __init__(self, views: AsyncIterator[dict[str, Any]], closing: asyncio.Future[None]) -> None:
        self._views = views
        self._next: asyncio.Task[dict[str, Any] | None] | None = None
        self._left: asyncio.Future[None] = closing.get_loop().create_future()
        self._ends = (self._left, closing)

    async def next(self) -> bytes:
        """See `stream`. What has been waited for outlives a cancelled wait: an iterator that is
        cancelled has ended.
        """
        if any(end.done() for end in self._ends):
            raise StopAsyncIteration
        if self._next is None:
            self._next = asyncio.ensure_future(_next(self._views))
        waiting: set[asyncio.Future[Any]] = {self._next, *self._ends}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not self._next.done():
            raise StopAsyncIteration
        view, self._next = self._next.result(), None
        if view is None:
            self.end()
            return _CANCELLED
        return b"event: membership\ndata: %b\n\n" % orjson.dumps(view)

    def end(self) -> None:
        if not self._left.done():
            self._left.set_result(None)
        if self._next is not None:
            self._next.cancel()


async def _next(views: AsyncIterator[dict[str, Any]]) -> dict[str, Any] | None:
    return await anext(views, None)


def _node_id(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:11]) < 2**32:
        raise InvalidRequest("a node id is an integer from 1 to 4294967295")
    return int(text)


def _check_address(address: str) -> None:
    try:
        parse_address(address)
    except ValueError as error:
        raise InvalidRequest(f"address {error}") from None


def _some(change: dict[str, Any]) -> dict[str, Any]:
    """`change`, unless it is empty."""
    if not change:
        raise InvalidRequest("the body changes nothing: name at least one field")
    return change


_ID = Parameter("id", "node id", 2, True, "path", minimum=1, maximum=2**32 - 1)
_VIEW = Body(
    "the cluster as its leader sees it",
    {
        "cluster_id": "6c789e114b3c0c52701eaefa5361b817",
        "leader": {"id": 1, "address": "127.0.0.1:9081"},
        "term": 2,
        "commit_index": 12,
        "applied_index": 12,
        "revision": 7,
        "settings": {
            "promotion": "immediate",
            "history_revisions": 100_000,
            "history_bytes": 268_435_456,
            "idempotency_window_s": 600,
        },
        "members": [
            {
                "id": 1,
                "address": "127.0.0.1:9081",
                "zone": "",
                "role": "leader",
                "status": "active",
                "incarnation": "1f3a5c7e9b2d4f60",
                "match": 12,
                "lag": 0,
                "ready": True,
                "reason": None,
                "transfer": None,
            }
        ],
        "joint": False,
        "fault_tolerance": 0,
        "advice": "one voter tolerates no failure: join two more nodes",
    },
    shape=ClusterReply,
)
_JOINED: dict[str, Any] = {
    "cluster_id": "6c789e114b3c0c52701eaefa5361b817",
    "leader": {"id": 1, "address": "127.0.0.1:9081"},
    "members": [{"id": 1, "address": "127.0.0.1:9081"}, {"id": 2, "address": "127.0.0.1:9082"}],
}
_REMOVED = Body("done", {"id": 2, "removed": True})
_STREAM = Body(
    "server-sent events",
    'event: membership\ndata: {"members":[]}\n\n',
    "text/event-stream",
)
_BODY_ERRORS = (411, 413, 415)
_CHANGE_ERRORS = (409, 503, 504)


def routes(calls: ClusterCalls) -> list[Route]:
    """The calls on the cluster, its members and its settings."""
    return [
        Route(
            "GET", "/v1/cluster", calls.show, "Show the cluster", {200: _VIEW}, errors=(503, 504)
        ),
        Route(
            "GET",
            "/v1/cluster/watch",
            calls.watch,
            "Follow the membership",
            {200: _STREAM},
            errors=(429, 503),
            streams=True,
        ),
        *_changes(calls),
        Route(
            "GET",
            "/v1/peer",
            calls.peer,
            "Peer stream (WebSocket, between nodes only)",
            {101: Body("switching protocols")},
            errors=(503,),
            streams=True,
            access="open",  # with a challenge of its own
        ),
    ]


def _takes(shape: type, example: dict[str, Any]) -> Body:
    return Body("JSON object", example, shape=shape)


def _done(example: dict[str, Any], shape: type | None = None) -> Body:
    return Body("done", example, shape=shape)


def _changes(calls: ClusterCalls) -> list[Route]:
    member = "/v1/cluster/members/{id}"
    join = {
        "id": 2,
        "incarnation": "1f3a5c7e9b2d4f60",
        "address": "127.0.0.1:9082",
        "zone": "az-b",
        "status": "promotable",
        "command_version": COMMAND_VERSION,
    }
    moved = {"id": 2, "address": "127.0.0.1:9092", "zone": "az-b", "status": "active"}
    promoted = {"promoted": [2, 3], "voters": [1, 2, 3]}
    settings = {"settings": {**_VIEW.example["settings"], "promotion": "odd"}}
    table: list[tuple[str, str, Handler, str, Body | None, Body]] = [
        (
            "POST",
            "/v1/cluster/members",
            calls.join,
            "Join as a learner",
            _takes(Join, join),
            _done(_JOINED, JoinReply),
        ),
        (
            "PUT",
            member,
            calls.update_member,
            "Change a member",
            _takes(MemberUpdate, {"address": moved["address"]}),
            _done(moved),
        ),
        ("DELETE", member, calls.remove_member, "Remove a member for good", None, _REMOVED),
        (
            "POST",
            "/v1/cluster/promote",
            calls.promote,
            "Promote learners",
            _takes(Promote, {"ids": [2, 3]}),
            _done(promoted),
        ),
        (
            "POST",
            "/v1/cluster/leader",
            calls.transfer_leader,
            "Transfer leadership",
            _takes(Leader, {"id": 2}),
            _done({"leader": 2}),
        ),
        (
            "PUT",
            "/v1/cluster/settings",
            calls.change_settings,
            "Change replicated settings",
            _takes(SettingsUpdate, {"promotion": "odd"}),
            _done(settings),
        ),
    ]
    return [
        Route(
            method,
            path,
            handler,
            summary,
            {200: reply},
            (_ID,) if path is member else (),
            body,
            _CHANGE_ERRORS if body is None else (*_BODY_ERRORS, *_CHANGE_ERRORS),
            access="join" if handler == calls.join else "token",
        )
        for method, path, handler, summary, body, reply in table
    ]
