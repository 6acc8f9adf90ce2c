"""Transactions: `POST /v1/txn`. JSON in, one command, JSON out."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from dengine.api import params
from dengine.api.kv import refusal, row
from dengine.api.params import BodyReader, decode_json
from dengine.api.protocol import Request, Response, json_response
from dengine.api.routes import Body, Route
from dengine.errors import InvalidRequest
from dengine.kv.commands import (
    Compare,
    Delete,
    DeleteRange,
    DeleteResult,
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
from dengine.kv.machine import KEY_BYTES_MAX, Record
from dengine.kv.transaction import flaw

if TYPE_CHECKING:
    from dengine.config import Config
    from dengine.node.node import Node

BODY_BYTES_MAX = 4 * 1024 * 1024

# --- the JSON -------------------------------------------------------------------------------------


class _Key(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    key: str | None = None
    key_base64: str | None = None

    def bytes(self, where: str) -> bytes:
        key = _either(self.key, self.key_base64, "key", where)
        if not 1 <= len(key) <= KEY_BYTES_MAX:
            raise InvalidRequest(f"{where}: a key has 1 to {KEY_BYTES_MAX} bytes, not {len(key)}")
        return key


class CompareJson(_Key, kw_only=True, rename={"relation": "op"}):
    target: Target
    relation: Relation
    operand: int | bool | str | None = None
    operand_base64: str | None = None

    def command(self, where: str) -> Compare:
        asked = self.operand
        operand: int | bool | bytes
        if self.target == "value":
            if asked is not None and not isinstance(asked, str):
                raise InvalidRequest(f"{where}: value is compared with a string")
            operand = _either(asked, self.operand_base64, "operand", where)
        elif self.operand_base64 is not None or asked is None or isinstance(asked, str):
            kind = "true or false" if self.target == "exists" else "a whole number"
            raise InvalidRequest(f"{where}: {self.target} is compared with {kind} in operand")
        else:
            operand = asked
        return Compare(self.bytes(where), self.target, self.relation, operand)


class PutJson(_Key, tag_field="op", tag="put", kw_only=True):
    value: str | None = None
    value_base64: str | None = None

    def command(self, where: str, limit: int) -> Put:
        return Put(self.bytes(where), _either(self.value, self.value_base64, "value", where))


class GetJson(_Key, tag_field="op", tag="get", kw_only=True):
    def command(self, where: str, limit: int) -> Get:
        return Get(self.bytes(where))


class DeleteJson(_Key, tag_field="op", tag="delete", kw_only=True):
    def command(self, where: str, limit: int) -> Delete:
        return Delete(self.bytes(where))


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

    def command(self, where: str, limit: int) -> DeleteRange:
        prefix = _optional(self.prefix, self.prefix_base64, "prefix", where)
        start = _optional(self.start, self.start_base64, "start", where)
        end = _optional(self.end, self.end_base64, "end", where)
        if prefix is not None and (start is not None or end is not None):
            raise InvalidRequest(f"{where}: use either prefix, or start and end")
        first = prefix if prefix is not None else start or b""
        last = prefix_end(prefix) if prefix else end or None
        if len(first) > KEY_BYTES_MAX or len(last or b"") > KEY_BYTES_MAX:
            raise InvalidRequest(f"{where}: a key has at most {KEY_BYTES_MAX} bytes")
        if not first and last is None and not self.all:
            raise InvalidRequest(
                f"{where} would delete every key: name a prefix or a start and end, "
                'or add "all": true if that is what you mean'
            )
        return DeleteRange(first, last, limit)


OperationJson = PutJson | GetJson | DeleteJson | DeleteRangeJson


class TxnJson(msgspec.Struct, forbid_unknown_fields=True):
    compare: list[CompareJson] = []
    success: list[OperationJson] = []
    failure: list[OperationJson] = []


def _optional(text: str | None, encoded: str | None, name: str, where: str) -> bytes | None:
    """The bytes that one of the two fields gives; None where neither is there."""
    if text is not None and encoded is not None:
        raise InvalidRequest(f"{where}: give {name} or {name}_base64, not both")
    if encoded is not None:
        return params.unbase64(encoded.encode(), f"{where}: {name}_base64")
    return None if text is None else text.encode()


def _either(text: str | None, encoded: str | None, name: str, where: str) -> bytes:
    found = _optional(text, encoded, name, where)
    if found is None:
        raise InvalidRequest(f"{where}: {name} is missing; give {name} or {name}_base64")
    return found


# --- the call -------------------------------------------------------------------------------------


class TxnCalls:
    """The handler of `/v1/txn` on one node."""

    def __init__(self, node: Node, config: Config, bodies: BodyReader) -> None:
        self._node = node
        self._range_delete = config.limits.range_delete
        self._bodies = bodies
        self._loop = asyncio.get_running_loop()

    async def txn(self, request: Request) -> Response:
        timeout_s = params.timeout_s(request)
        body = await self._bodies.read(request, BODY_BYTES_MAX)
        txn = self._command(decode_json(body, request, TxnJson))
        result = await self._node.write(txn, self._loop.time() + timeout_s)
        if not isinstance(result, TxnResult):
            raise refusal(result)
        done = txn.success if result.succeeded else txn.failure
        results = [_answer(o, r) for o, r in zip(done, result.results, strict=True)]
        return json_response(
            {"revision": result.revision, "succeeded": result.succeeded, "results": results}
        )

    def _command(self, asked: TxnJson) -> Txn:
        txn = Txn(
            tuple(c.command(f"compare[{n}]") for n, c in enumerate(asked.compare)),
            self._branch("success", asked.success),
            self._branch("failure", asked.failure),
        )
        wrong = flaw(txn)
        if wrong is not None:
            raise InvalidRequest(wrong)
        return txn

    def _branch(self, name: str, asked: list[OperationJson]) -> tuple[Operation, ...]:
        limit = self._range_delete
        return tuple(o.command(f"{name}[{n}]", limit) for n, o in enumerate(asked))


def _answer(operation: Operation, result: OperationResult) -> dict[str, Any]:
    if isinstance(result, PutResult):
        return {"op": "put", "created": result.created}
    if isinstance(result, DeleteResult):
        name = "delete" if isinstance(operation, Delete) else "delete_range"
        return {"op": name, "deleted": result.deleted}
    return {"op": "get", "item": _item(operation, result)}


def _item(operation: Operation, found: GetResult) -> dict[str, Any] | None:
    if not found.mod_revision or not isinstance(operation, Get):
        return None
    record = Record(found.create_revision, found.mod_revision, found.version, found.value)
    return row(operation.key, record)


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
    """The call of DESIGN 8 for several keys at once."""
    return [
        Route(
            "POST",
            "/v1/txn",
            calls.txn,
            "Compare, then change several keys at once",
            {200: Body("one branch was carried out, as one change", _DONE)},
            body=Body(
                "comparisons, and at most 128 operations for each outcome: put, get, delete, "
                "delete_range. A key that does not exist has mod_revision and version 0.",
                _EXAMPLE,
            ),
            errors=(411, 413, 415, 429, 503, 504, 507),
        )
    ]
