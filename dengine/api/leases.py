"""Leases: `/v1/leases`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from dengine.api import params
from dengine.api.kv import DEFAULT_BARRIER, IDEMPOTENT, refusal, text_or_base64
from dengine.api.params import MAX_JSON_BYTES, BodyReader, decode_json
from dengine.api.protocol import Request, Response, json_response
from dengine.api.replies import LeaseReply
from dengine.api.routes import Body, Parameter, Route
from dengine.kv.commands import (
    TTL_S_MAX,
    Effect,
    LeaseGrant,
    LeaseKeepAlive,
    LeaseResult,
    LeaseRevoke,
    LeaseRevoked,
    Result,
)

if TYPE_CHECKING:
    from dengine.node.node import Node


class Grant(msgspec.Struct, forbid_unknown_fields=True):
    ttl: Annotated[int, msgspec.Meta(ge=1, le=TTL_S_MAX)]


class LeaseCalls:
    """The handlers of `/v1/leases` on one node."""

    def __init__(self, node: Node, bodies: BodyReader) -> None:
        self._node = node
        self._bodies = bodies
        self._loop = asyncio.get_running_loop()

    async def grant(self, request: Request) -> Response:
        body = await self._bodies.read(request, MAX_JSON_BYTES)
        command = LeaseGrant(decode_json(body, request, Grant).ttl)
        return _granted(await self._write(request, command, body))

    async def keep_alive(self, request: Request) -> Response:
        lease = _lease_id(request.tail)
        return _granted(await self._write(request, LeaseKeepAlive(lease)))

    async def revoke(self, request: Request) -> Response:
        result = await self._write(request, LeaseRevoke(_lease_id(request.tail)))
        if not isinstance(result, LeaseRevoked):
            raise refusal(result)
        return json_response(
            {"revision": result.revision, "deleted": result.deleted, "going": result.going}
        )

    async def show(self, request: Request) -> Response:
        await self._node.read_barrier(DEFAULT_BARRIER, self._deadline(request))
        seen = self._node.lifetimes.lease(_lease_id(request.tail))
        keys: list[Any] = [_shown(key) for key in seen.keys]
        return json_response(
            {"id": seen.lease, "ttl": seen.ttl_s, "remaining": seen.remaining_s, "keys": keys}
        )

    async def _write(self, request: Request, command: Effect, body: bytes = b"") -> Result:
        once = params.once_key(request, body)
        return await self._node.write(command, self._deadline(request), once)

    def _deadline(self, request: Request) -> float:
        return self._loop.time() + params.timeout_s(request)


def _granted(result: Result) -> Response:
    if not isinstance(result, LeaseResult):
        raise refusal(result)
    return json_response({"id": result.lease, "ttl": result.ttl_s})


def _lease_id(text: str) -> str:
    return params.unescape(text, "the lease").decode("utf-8", "replace")


def _shown(key: bytes) -> Any:
    """A string, or an object where the key is no text."""
    shown = text_or_base64("key", key)
    return shown.get("key", shown)


_ID = Parameter("id", "of the lease", "2f1-0-6c789e114b3c", True, "path")
_GRANTED = Body(
    "the lease, and its seconds of life from this write on, which a repetition is not",
    {"id": "2f1-0-6c789e114b3c", "ttl": 60},
)
_ERRORS = (413, 429, 503, 504, 507)


def routes(calls: LeaseCalls) -> list[Route]:
    """The calls on leases."""
    one = "/v1/leases/{id}"
    ended = Body(
        "revoked; going: it held so many keys that the others follow by themselves",
        {"revision": 9, "deleted": 2, "going": False},
    )
    seen = Body(
        "the lease; of the keys that it holds at most 1000",
        {"id": "2f1-0-6c789e114b3c", "ttl": 60, "remaining": 48, "keys": ["service/web/1"]},
        shape=LeaseReply,
    )
    return [
        Route(
            "POST",
            "/v1/leases",
            calls.grant,
            "Grant a lease",
            {200: _GRANTED},
            (IDEMPOTENT,),
            Body("seconds of life, 1 to 315360000", {"ttl": 60}, shape=Grant),
            (409, 411, 415, 422, *_ERRORS),
        ),
        Route(
            "POST",
            f"{one}/keepalive",
            calls.keep_alive,
            "Keep a lease alive",
            {200: _GRANTED},
            (_ID, IDEMPOTENT),
            errors=(409, 422, *_ERRORS),
        ),
        Route("GET", one, calls.show, "Show a lease", {200: seen}, (_ID,), errors=(503, 504)),
        Route(
            "DELETE",
            one,
            calls.revoke,
            "Revoke a lease and delete its keys",
            {200: ended},
            (_ID, IDEMPOTENT),
            errors=(409, 422, *_ERRORS),
        ),
    ]
