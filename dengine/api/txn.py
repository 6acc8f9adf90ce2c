"""Transactions: `POST /v1/txn`. JSON in, one command, JSON out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Final, Protocol, TypeVar

import msgspec

from dengine.api import params
from dengine.api.kv import IDEMPOTENT, refusal, row
from dengine.api.params import BodyReader, decode_json
from dengine.api.protocol import Request, Response, json_response
from dengine.api.replies import TxnReply
from dengine.api.routes import Body, Route
from dengine.errors import InvalidRequest, TooLarge
from dengine.kv.commands import (
    TTL_S_MAX,
    Compare,
    Delete,
    DeleteRange,
    DeleteResult,
    ExpiringPut,
    Get,
    GetResult,
    Operation,
    OperationResult,
    Put,
    PutResult,
    Relation,
    Target,
    Txn,
    TxnResult,
    prefix_end,
)
from dengine.kv.store import Record
from dengine.kv.transaction import flaw

if TYPE_CHECKING:
    from dengine.config import Config, Limits
    from dengine.node.node import Node

T = TypeVar("T", covariant=True)

_CREATED: Final = {"op": "put", "created": True}
_REPLACED: Final = {"op": "put", "created": False}

# --- the JSON -------------------------------------------------------------------------------------


class _Asked(Protocol[T]):
    """A part of a request, from which its `command` is made. Raises InvalidRequest, TooLarge."""

    def command(self, limits: Limits) -> T: ...


class _Key(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    key: str | None = None
    key_base64: str | None = None

    def bytes(self, limits: Limits) -> bytes:
        key = _either(self.key, self.key_base64, "key")
        if not key:
            raise InvalidRequest("the key is empty: a key has 1 to 511 bytes")
        _fits(key, limits.key_bytes, "the key")
        return key


class CompareJson(_Key, kw_only=True, rename={"relation": "op"}):
    target: Target
    relation: Relation
    operand: int | bool | str | None = None
    operand_base64: str | None = None

    def command(self, limits: Limits) -> Compare:
        asked = self.operand
        operand: int | bool | bytes
        if self.target == "value":
            if asked is not None and not isinstance(asked, str):
                raise InvalidRequest("value is compared with a string")
            operand = _either(asked, self.operand_base64, "operand")
        elif self.operand_base64 is not None or asked is None or isinstance(asked, str):
            kind = "true or false" if self.target == "exists" else "a whole number"
            raise InvalidRequest(f"{self.target} is compared with {kind} in operand")
        else:
            operand = asked
        return Compare(self.bytes(limits), self.target, self.relation, operand)


class PutJson(_Key, tag_field="op", tag="put", kw_only=True):
    value: str | None = None
    value_base64: str | None = None
    ttl: Annotated[int, msgspec.Meta(ge=1, le=TTL_S_MAX)] | None = None
    lease: str | None = None

    def command(self, limits: Limits) -> Put | ExpiringPut:
        value = _either(self.value, self.value_base64, "value")
        _fits(value, limits.value_bytes, "the value")
        key = self.bytes(limits)
        if self.ttl is None and self.lease is None:
            return Put(key, value)
        if self.ttl is not None and self.lease is not None:
            raise InvalidRequest("give ttl or lease, not both")
        if self.lease == "":
            raise InvalidRequest("lease is empty: it is the id of a lease")
        return ExpiringPut(key, value, None, self.ttl or 0, self.lease or "")


class GetJson(_Key, tag_field="op", tag="get", kw_only=True):
    def command(self, limits: Limits) -> Get:
        return Get(self.bytes(limits))


class DeleteJson(_Key, tag_field="op", tag="delete", kw_only=True):
    def command(self, limits: Limits) -> Delete:
        return Delete(self.bytes(limits))


class DeleteRangeJson(
    msgspec.Struct, forbid_unknown_fields=True, tag_field="op", tag="delete_range", kw_only=True
):
    prefix: str | None = None
    prefix_base64: str | None = None
    start: str | None = None
    start_base64: str | None = None
    end: str | None = None
    end_base64: str | None = None
    all: bool = False

    def command(self, limits: Limits) -> DeleteRange:
        prefix = _optional(self.prefix, self.prefix_base64, "prefix")
        start = _optional(self.start, self.start_base64, "start")
        end = _optional(self.end, self.end_base64, "end")
        if prefix is not None and (start is not None or end is not None):
            raise InvalidRequest("use either prefix, or start and end")
        first = prefix if prefix is not None else start or b""
        last = prefix_end(prefix) if prefix else end or None
        for bound in (first, last or b""):
            _fits(bound, limits.key_bytes, "the end of a range")
        if not first and last is None and not self.all:
            raise InvalidRequest(
                "this would delete every key: name a prefix or a start and end, "
                'or add "all": true if that is what you mean'
            )
        return DeleteRange(first, last, limits.range_delete)


OperationJson = PutJson | GetJson | DeleteJson | DeleteRangeJson


class TxnJson(msgspec.Struct, forbid_unknown_fields=True):
    compare: list[CompareJson] = []
    success: list[OperationJson] = []
    failure: list[OperationJson] = []


def _fits(data: bytes, limit: int, what: str) -> None:
    if len(data) > limit:
        raise TooLarge(f"{what} has {len(data)} bytes; at most {limit} are allowed")


def _optional(text: str | None, encoded: str | None, name: str) -> bytes | None:
    """The bytes that one of the two fields gives; None where neither is there."""
    if text is not None and encoded is not None:
        raise InvalidRequest(f"give {name} or {name}_base64, not both")
    if encoded is not None:
        return params.unbase64(encoded.encode(), f"{name}_base64")
    return None if text is None else text.encode()


def _either(text: str | None, encoded: str | None, name: str) -> bytes:
    if encoded is None and text is not None:  # nearly always
        return text.encode()
    found = _optional(text, encoded, name)
    if found is None:
        raise InvalidRequest(f"{name} is missing; give {name} or {name}_base64")
    return found


def _commands(name: str, asked: Iterable[_Asked[T]], limits: Limits) -> tuple[T, ...]:
    """The commands of the list `name`; what is wrong with one of them says which it is."""
    made: list[T] = []
    try:
        for each in asked:
            made.append(each.command(limits))
    except (InvalidRequest, TooLarge) as error:
        raise type(error)(f"{name}[{len(made)}]: {error.message}") from None
    return tuple(made)


def checked(txn: Txn) -> Txn:
    """`txn`, which may enter a log. Raises InvalidRequest.

    How large a number may be is decided here and not by the state machine, which knows no others:
    a command is encoded with 64 bits.
    """
    wrong = flaw(txn)
    if wrong is not None:
        raise InvalidRequest(wrong)
    for number, compare in enumerate(txn.compare):
        operand = compare.operand
        if isinstance(operand, int) and not -(2**63) <= operand < 2**63:
            raise InvalidRequest(
                f"compare[{number}]: {compare.target} is compared with a number from -2^63 to "
                "2^63-1"
            )
    return txn


# --- the call -------------------------------------------------------------------------------------


class TxnCalls:
    """The handler of `/v1/txn` on one node."""

    def __init__(self, node: Node, config: Config, bodies: BodyReader) -> None:
        self._node = node
        self._limits = config.limits
        self._bodies = bodies
        self._loop = asyncio.get_running_loop()

    async def txn(self, request: Request) -> Response:
        timeout_s = params.timeout_s(request)
        body = await self._bodies.read(request, self._limits.txn_bytes)
        if params.write_condition(request) is not None:
            raise InvalidRequest(
                "If-Match and If-None-Match apply to a single key only: a transaction has compare"
            )
        txn = self._command(decode_json(body, request, TxnJson))
        once = params.once_key(request, body)
        result = await self._node.write(txn, self._loop.time() + timeout_s, once)
        if not isinstance(result, TxnResult):
            raise refusal(result)
        done = txn.success if result.succeeded else txn.failure
        results = [self._answer(o, r) for o, r in zip(done, result.results, strict=True)]
        return json_response(
            {"revision": result.revision, "succeeded": result.succeeded, "results": results}
        )

    def _command(self, asked: TxnJson) -> Txn:
        limits = self._limits
        for name in ("compare", "success", "failure"):
            if (count := len(getattr(asked, name))) > limits.txn_ops:
                raise TooLarge(f"{name} has {count} items; at most {limits.txn_ops} are allowed")
        txn = Txn(
            _commands("compare", asked.compare, limits),
            _commands("success", asked.success, limits),
            _commands("failure", asked.failure, limits),
        )
        return checked(txn)

    def _answer(self, operation: Operation, result: OperationResult) -> dict[str, Any]:
        if isinstance(result, PutResult):
            return _CREATED if result.created else _REPLACED
        if isinstance(result, DeleteResult):
            name = "delete" if isinstance(operation, Delete) else "delete_range"
            return {"op": name, "deleted": result.deleted}
        return {"op": "get", "item": self._item(operation, result)}

    def _item(self, operation: Operation, found: GetResult) -> dict[str, Any] | None:
        if not found.mod_revision or not isinstance(operation, Get):
            return None
        record = Record(
            found.create_revision,
            found.mod_revision,
            found.version,
            found.value,
            found.expires_ms,
            found.lease,
        )
        return row(operation.key, record, self._node.lifetimes.remaining_s(record))


_EXAMPLE = {
    "compare": [{"key": "accounts/a", "target": "value", "op": "=", "operand": "5"}],
    "success": [
        {"op": "put", "key": "accounts/a", "value": "3"},
        {"op": "put", "key": "accounts/b", "value": "2"},
    ],
    "failure": [{"op": "get", "key": "accounts/a"}],
}
_DONE = {
    "revision": 9,
    "succeeded": True,
    "results": [{"op": "put", "created": False}, {"op": "put", "created": True}],
}


def routes(calls: TxnCalls) -> list[Route]:
    """The call for several keys at once."""
    return [
        Route(
            "POST",
            "/v1/txn",
            calls.txn,
            "Compare, then change several keys at once",
            {200: Body("one branch was carried out, as one change", _DONE, shape=TxnReply)},
            (IDEMPOTENT,),
            body=Body(
                "comparisons, and operations for each outcome: put, get, delete, delete_range. A "
                "list has at most 128 of them (limits.txn_ops), else 413. "
                "A key that does not exist has mod_revision and version 0, and no value: whatever "
                "is compared with that does not hold, != neither. "
                "What it reads has at most 4 MiB, and 64 KiB with an Idempotency-Key.",
                _EXAMPLE,
                shape=TxnJson,
            ),
            errors=(409, 411, 413, 415, 422, 429, 503, 504, 507),
        )
    ]
