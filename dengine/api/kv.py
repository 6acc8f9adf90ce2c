"""Keys and values: `/v1/kv`."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dengine.api import params
from dengine.api.params import BodyReader
from dengine.api.protocol import Request, Response, json_response
from dengine.api.replies import PageReply
from dengine.api.routes import Body, Parameter, Route
from dengine.errors import (
    IdempotencyMismatch,
    InvalidRequest,
    KeyNotFound,
    NotFound,
    PreconditionFailed,
    ProposeFailed,
    RateLimited,
    RequestTimeout,
    StaleRequest,
    TooLarge,
)
from dengine.kv.commands import (
    TTL_S_MAX,
    ConditionFailed,
    Delete,
    DeleteRange,
    DeleteResult,
    ExpiringPut,
    Full,
    Invalid,
    Mismatch,
    NoLease,
    Put,
    PutResult,
    Result,
    Stale,
    TooMany,
    TooMuch,
    prefix_end,
)

if TYPE_CHECKING:
    from dengine.config import Config
    from dengine.kv.store import Record
    from dengine.node.node import Node

CONSISTENCY_LEVELS = ("linearizable", "lease", "eventual")
DEFAULT_BARRIER = CONSISTENCY_LEVELS[0]

_VALUE_HEADERS = (
    b'Content-Type: application/octet-stream\r\nETag: "%d"\r\n'
    b"Dengine-Revision: %d\r\nX-Content-Type-Options: nosniff\r\n"
)


class KvCalls:
    """The handlers of `/v1/kv` on one node."""

    def __init__(self, node: Node, config: Config, bodies: BodyReader) -> None:
        self._node = node
        self._limits = config.limits
        self.page_max = config.limits.page
        self._default_consistency = config.read.default
        self._bodies = bodies
        self._loop = asyncio.get_running_loop()

    async def put(self, request: Request) -> Response:
        key = self._key(request)
        condition = params.write_condition(request)
        timeout_s = params.timeout_s(request)
        limit = self._limits.value_bytes
        value = self._bodies.ready(request, limit)
        if value is None:
            value = await self._bodies.read(request, limit)
        life = params.expiry(request.params) if request.params else None
        command: Put | ExpiringPut = Put(key, value, condition)
        if life is not None:
            command = ExpiringPut(key, value, condition, *life)
        once = params.once_key(request, value)
        result = await self._node.write(command, self._loop.time() + timeout_s, once)
        if type(result) is not PutResult:
            raise refusal(result)
        revision = result.revision
        return Response(
            200,
            b'{"revision":%d,"created":%b}' % (revision, b"true" if result.created else b"false"),
            b'Content-Type: application/json\r\nETag: "%d"\r\n' % revision,
        )

    async def get(self, request: Request) -> Response:
        key = self._key(request)
        await self._read_barrier(request)
        state = self._node.state
        record = state.get(key)
        if record is None:
            raise KeyNotFound("there is no such key")
        headers = _VALUE_HEADERS % (record.mod_revision, state.revision)
        ttl_s = self._node.lifetimes.remaining_s(record)
        if ttl_s is not None:
            headers += b"Dengine-TTL: %d\r\n" % ttl_s
        status = _evaluate(request, record)
        return Response(status, record.value if status == 200 else b"", headers)

    async def delete(self, request: Request) -> Response:
        key = self._key(request)
        return await self._write(request, Delete(key, params.write_condition(request)))

    async def list_keys(self, request: Request) -> Response:
        """A page of keys, the number of keys, or with key_base64 one value."""
        query = request.params
        if "key_base64" in query:
            _only(query, "key_base64", "consistency")
            return await self.get(request)
        start, end = self._selection(query)
        limit = params.integer(query, "limit", self._limits.page, 1, self._limits.page)
        if "after" in query:
            start = self._resume_at(query["after"], start)
        keys_only = params.flag(query, "keys_only")
        if params.flag(query, "count_only"):
            return await self._count(request, start, end)
        await self._read_barrier(request)
        return json_response(self._page(start, end, limit, keys_only))

    async def delete_range(self, request: Request) -> Response:
        """Delete every key of a selection, or with key_base64 one key."""
        query = request.params
        if "key_base64" in query:
            _only(query, "key_base64")
            return await self.delete(request)
        start, end = self._selection(query)
        everything = params.flag(query, "all")  # also where it is not needed: it may be malformed
        if start == b"" and end is None and not everything:
            raise InvalidRequest(
                "this would delete every key: name a prefix or a start and end, "
                "or add all=true if that is what you mean"
            )
        if params.write_condition(request) is not None:
            raise InvalidRequest("If-Match and If-None-Match apply to a single key only")
        return await self._write(request, DeleteRange(start, end, self._limits.range_delete))

    async def _write(self, request: Request, command: Delete | DeleteRange) -> Response:
        deadline = self._loop.time() + params.timeout_s(request)
        result = await self._node.write(command, deadline, params.once_key(request, b""))
        if not isinstance(result, DeleteResult):
            raise refusal(result)
        return json_response({"revision": result.revision, "deleted": result.deleted})

    def _key(self, request: Request) -> bytes:
        """The key a request names, by path or by key_base64."""
        encoded = request.params.get("key_base64")
        if encoded is not None:
            key = params.unbase64(encoded, "query parameter key_base64")
        elif request.tail:
            key = params.unescape(request.tail, "the key")
        elif request.message.path.startswith("/v1/kv/"):
            key = b""
        else:
            raise InvalidRequest("name a key: /v1/kv/KEY or /v1/kv?key_base64=KEY")
        if not key:
            raise InvalidRequest("the key is empty: a key has 1 to 511 bytes")
        if len(key) > self._limits.key_bytes:
            raise TooLarge(
                f"the key has {len(key)} bytes; at most {self._limits.key_bytes} are allowed"
            )
        return key

    async def _read_barrier(self, request: Request) -> None:
        consistency = self._default_consistency
        wanted = request.params.get("consistency")
        if wanted is not None:
            consistency = wanted.decode("ascii", "replace")
            if consistency not in CONSISTENCY_LEVELS:
                raise InvalidRequest(
                    f"query parameter consistency must be one of {', '.join(CONSISTENCY_LEVELS)}"
                )
        deadline = self._loop.time() + params.timeout_s(request)
        await self._node.read_barrier(consistency, deadline)

    def _selection(self, query: dict[str, bytes]) -> tuple[bytes, bytes | None]:
        """The half-open range of `prefix`, or of `start` and `end`; None ends at the last key."""
        if "prefix" in query:
            if "start" in query or "end" in query:
                raise InvalidRequest("use either prefix, or start and end")
            prefix = query["prefix"]
            self._check_bound(prefix, "prefix")
            return prefix, prefix_end(prefix) if prefix else None
        start, end = query.get("start", b""), query.get("end", b"")
        self._check_bound(start, "start")
        self._check_bound(end, "end")
        return start, end or None

    def _check_bound(self, bound: bytes, name: str) -> None:
        if len(bound) > self._limits.key_bytes:
            raise TooLarge(f"{name} has {len(bound)} bytes; a key has at most 511")

    def _resume_at(self, token: bytes, start: bytes) -> bytes:
        """Where the page behind `token` begins; tokens are opaque to clients."""
        key = params.unbase64(token, "query parameter after")
        if not start <= key or not 0 < len(key) <= self._limits.key_bytes:
            raise InvalidRequest("query parameter after is not a token of this listing")
        return key

    def _page(self, start: bytes, end: bytes | None, limit: int, keys_only: bool) -> dict[str, Any]:
        """One page; it may hold fewer rows than `limit` (the store bounds its size in bytes)."""
        page = self._node.state.page(start, end, limit, keys_only)
        remaining_s = self._node.lifetimes.remaining_s
        rows = [row(key, record, remaining_s(record), keys_only) for key, record in page.items]
        token = None if page.next is None else base64.urlsafe_b64encode(page.next).decode()
        return {"revision": page.revision, "items": rows, "count": len(rows), "next": token}

    async def _count(self, request: Request, start: bytes, end: bytes | None) -> Response:
        deadline = self._loop.time() + params.timeout_s(request)
        await self._read_barrier(request)
        state = self._node.state
        revision, total = state.revision, 0
        for counted in state.count(start, end):  # all of it as of `revision`
            total = counted
            await asyncio.sleep(0)  # other requests get their turn every 1000 rows
            if self._loop.time() > deadline:
                raise RequestTimeout(
                    f"counted {total} keys in time and there are more: count in smaller ranges",
                    outcome="none",
                )
        return json_response({"revision": revision, "items": [], "count": total, "next": None})


def _evaluate(request: Request, record: Record) -> int:
    """200, or 304 when the client already has this revision (RFC 9110 13.2.2).

    Raises:
        PreconditionFailed: If-Match names other revisions only.
    """
    current = str(record.mod_revision)
    wanted = params.entity_tags(request, params.IF_MATCH)
    if wanted and (False, current) not in wanted:
        raise PreconditionFailed(
            f"the key is at revision {current}", current_revision=record.mod_revision
        )
    known = params.entity_tags(request, params.IF_NONE_MATCH)
    if known is None:
        return 200
    return 304 if not known or any(tag == current for _, tag in known) else 200


def row(key: bytes, record: Record, ttl_s: int | None, keys_only: bool = False) -> dict[str, Any]:
    """A key as listings and transactions show it; `ttl_s` as `Lifetimes.remaining_s` has it."""
    shown = text_or_base64("key", key)
    if not keys_only:
        shown |= text_or_base64("value", record.value)
    shown["mod_revision"] = record.mod_revision
    shown["create_revision"] = record.create_revision
    shown["version"] = record.version
    shown["ttl"] = ttl_s
    shown["lease"] = record.lease or None
    return shown


def text_or_base64(name: str, data: bytes) -> dict[str, Any]:
    """`data` as JSON has it: a string where it is UTF-8, else under another name."""
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode()}


def _only(query: dict[str, bytes], *allowed: str) -> None:
    extra = [name for name in query if name not in allowed]
    if extra:
        raise InvalidRequest(f"query parameter {extra[0]} cannot be combined with key_base64")


def refusal(result: Result) -> Exception:
    """The error that a result other than success stands for."""
    match result:
        case ConditionFailed(current_revision):
            state = "does not exist" if current_revision is None else f"is at {current_revision}"
            return PreconditionFailed(
                f"the condition does not hold: the key {state}", current_revision=current_revision
            )
        case TooMany(limit):
            return TooLarge(
                f"more than {limit} keys match and nothing was deleted: delete in smaller ranges"
            )
        case TooMuch(limit_bytes, limit_keys):
            return TooLarge(
                f"the values that this reads, replaces or deletes have more than {limit_bytes} "
                f"bytes, or it looks at more than {limit_keys} keys (at one as often as an "
                "operation meets it), and nothing was changed: do it in smaller parts"
            )
        case NoLease(lease):
            return NotFound(f"there is no lease {lease[:64]}: it never was, or it has ended")
        case Stale(forgotten):
            return StaleRequest(
                f"results of this client are kept for its newest 1000 requests, and those up to "
                f"number {forgotten} are forgotten: whether this one was ever carried out is not "
                "known"
            )
        case Mismatch():
            return IdempotencyMismatch(
                "another request came with this Idempotency-Key: a key is for one request and its "
                "repetitions"
            )
        case Full(what):
            return RateLimited(
                f"no more {what} can be remembered for exactly-once: try again later, or without "
                "an Idempotency-Key",
                full=what,
            )
        case Invalid(message):
            return InvalidRequest(message)
    return ProposeFailed(f"unexpected result {type(result).__name__}", outcome="unknown")


_KEY = Parameter(
    "key", "1 to 511 bytes (longer: 413), percent-decoded once", "config/color", True, "path"
)
_KEY_BASE64 = Parameter("key_base64", "the key in base64: addresses any key at all", "Y29uZmln")
_CONSISTENCY = Parameter(
    "consistency",
    "what a read sees; else read.default of the configuration",
    "linearizable",
    values=("linearizable", "lease", "eventual"),
)
_IF_MATCH = Parameter("If-Match", "revisions that may be current, or *", '"7"', place="header")
_ABSENT = Parameter(
    "If-None-Match", "*: only if the key does not exist", "*", place="header", values=("*",)
)
_KNOWN = Parameter("If-None-Match", "tags the client already has", '"7"', place="header")
_TTL = Parameter("ttl", "seconds until the key expires", 60, minimum=1, maximum=TTL_S_MAX)
_LEASE = Parameter("lease", "or the lease that it is attached to", "2f1-0-6c789e114b3c")
IDEMPOTENT = Parameter(
    "Idempotency-Key",
    "1 to 128 visible ASCII characters, or CLIENT:N with a number that grows: however often the "
    "request comes with it, it is carried out once, and its first answer comes back",
    "4f9c2a:17",
    place="header",
)
_PREFIX = Parameter("prefix", "keys that begin with this", "config/")
_START = Parameter("start", "first key of a range", "config/a")
_END = Parameter("end", "first key behind the range", "config/n")

_VALUE = Body(
    "any bytes, up to 1 MiB, with their number in Content-Length",
    "blue",
    "application/octet-stream",
)
_FOUND = Body(
    "the value; Dengine-TTL is there where it expires",
    "blue",
    "application/octet-stream",
    ("ETag", "Dengine-Revision", "Dengine-TTL"),
)
_WRITTEN = Body("stored", {"revision": 7, "created": True}, headers=("ETag",))
_DELETED = Body("deleted", {"revision": 8, "deleted": 1})
_PAGE = Body(
    "one page, or with count_only the number of keys; with key_base64 the raw value",
    {
        "revision": 7,
        "items": [
            {
                "key": "config/color",
                "value": "blue",
                "mod_revision": 7,
                "create_revision": 7,
                "version": 1,
                "ttl": None,
                "lease": None,
            }
        ],
        "count": 1,
        "next": None,
    },
    shape=PageReply,
)
_WRITE_ERRORS = (409, 411, 412, 413, 415, 422, 429, 503, 504, 507)
_DELETE_ERRORS = (409, 412, 413, 422, 429, 503, 504, 507)


def routes(calls: KvCalls) -> list[Route]:
    """The calls on keys."""
    return [*_single_key(calls), *_many_keys(calls)]


def _single_key(calls: KvCalls) -> list[Route]:
    path = "/v1/kv/{key}"
    return [
        Route(
            "PUT",
            path,
            calls.put,
            "Store a value",
            {200: _WRITTEN},
            (_KEY, _TTL, _LEASE, _IF_MATCH, _ABSENT, IDEMPOTENT),
            _VALUE,
            _WRITE_ERRORS,
        ),
        Route(
            "GET",
            path,
            calls.get,
            "Read a value",
            {200: _FOUND, 304: Body("the client has it already")},
            (_KEY, _CONSISTENCY, _IF_MATCH, _KNOWN),
            errors=(412, 413, 503, 504),
        ),
        Route(
            "DELETE",
            path,
            calls.delete,
            "Delete a key",
            {200: _DELETED},
            (_KEY, _IF_MATCH, _ABSENT, IDEMPOTENT),
            errors=_DELETE_ERRORS,
        ),
    ]


def _many_keys(calls: KvCalls) -> list[Route]:
    path = "/v1/kv"
    page = (
        Parameter("limit", "rows per page", 100, minimum=1, maximum=calls.page_max),
        Parameter("after", "the `next` of the page before", "Y29uZmlnL2M"),
        Parameter("keys_only", "leave the values out", True),
        Parameter("count_only", "count all keys of the selection, list none", True),
    )
    return [
        Route(
            "GET",
            path,
            calls.list_keys,
            "List keys, or with key_base64 read one value",
            {
                200: replace(_PAGE, otherwise=_FOUND),
                304: Body("with key_base64: the client has it already"),
            },
            (_PREFIX, _START, _END, *page, _KEY_BASE64, _CONSISTENCY, _IF_MATCH, _KNOWN),
            errors=(412, 413, 503, 504),
        ),
        Route(
            "PUT",
            path,
            calls.put,
            "Store a value under any key",
            {200: _WRITTEN},
            (
                replace(_KEY_BASE64, required=True),
                _TTL,
                _LEASE,
                _IF_MATCH,
                _ABSENT,
                IDEMPOTENT,
            ),
            _VALUE,
            _WRITE_ERRORS,
        ),
        Route(
            "DELETE",
            path,
            calls.delete_range,
            "Delete all keys of a selection",
            {200: _DELETED},
            (
                _PREFIX,
                _START,
                _END,
                Parameter("all", "needed to delete every key", True),
                _KEY_BASE64,
                _IF_MATCH,
                _ABSENT,
                IDEMPOTENT,
            ),
            errors=_DELETE_ERRORS,
        ),
    ]
