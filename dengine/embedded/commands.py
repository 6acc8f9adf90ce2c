"""From the client library's operations to commands, and from what those come to to its results.

What is checked here is what `node/writes.py` does not: it looks at every key and value itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never, get_args

from dengine.api.txn import checked
from dengine.client import types
from dengine.client.encoding import Match, as_key, as_seconds, as_value, matched, selection
from dengine.config import Limits
from dengine.errors import InvalidRequest, TooLarge
from dengine.kv.commands import (
    TTL_S_MAX,
    Compare,
    Condition,
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
    encode_command,
    prefix_end,
)
from dengine.kv.store import Record
from dengine.node.lifetimes import Lifetimes
from dengine.node.watch_hub import Selection

# --- what is asked --------------------------------------------------------------------------------


def checked_key(key: str | bytes, limits: Limits) -> bytes:
    """The bytes of a key that is to be read. Raises TypeError, InvalidRequest, TooLarge."""
    data = as_key(key)
    if not data:
        raise InvalidRequest("the key is empty: a key has 1 to 511 bytes")
    if len(data) > limits.key_bytes:
        raise TooLarge(f"the key has {len(data)} bytes; at most {limits.key_bytes} are allowed")
    return data


def checked_seconds(ttl_s: float, what: str) -> int:
    """A TTL. Raises ValueError, and InvalidRequest for more than ten years."""
    seconds = as_seconds(ttl_s, what)
    if seconds > TTL_S_MAX:
        raise InvalidRequest(f"{what} is at most {TTL_S_MAX} seconds, not {seconds}")
    return seconds


def span(
    prefix: str | bytes | None, start: str | bytes | None, end: str | bytes | None, limits: Limits
) -> tuple[bytes, bytes | None]:
    """The first key of a range and the first behind it, None where that is none.

    Raises:
        ValueError: a prefix and bounds.
        TooLarge: no key is that long.
    """
    chosen = selection(prefix, start, end)
    for name, bound in chosen.items():
        if len(bound) > limits.key_bytes:
            raise TooLarge(f"{name} has {len(bound)} bytes; a key has at most {limits.key_bytes}")
    if "prefix" in chosen:
        first = chosen["prefix"]
        return first, prefix_end(first) if first else None
    return chosen.get("start", b""), chosen.get("end") or None


def delete_range(
    prefix: str | bytes | None,
    start: str | bytes | None,
    end: str | bytes | None,
    all: bool,
    limits: Limits,
) -> DeleteRange:
    """Raises as `span`, and InvalidRequest for what would delete every key without `all`."""
    first, last = span(prefix, start, end, limits)
    if not first and last is None and not all:
        raise InvalidRequest(
            "this would delete every key: give a prefix or a start and end, or all=True if that "
            "is what you mean"
        )
    return DeleteRange(first, last, limits.range_delete)


def delete(
    key: str | bytes | None,
    bounds: tuple[str | bytes | None, str | bytes | None, str | bytes | None],
    all: bool,
    if_match: Match | None,
    limits: Limits,
) -> Delete | DeleteRange:
    """Of a key, or of a range; `bounds`: a prefix, or start and end. Raises as `delete_range`."""
    bounded = bounds != (None, None, None)
    if key is not None:
        if bounded:
            raise ValueError("delete takes a key, or a prefix, or start and end")
        return Delete(as_key(key), condition(if_match, False))
    if not bounded and not all:
        raise ValueError("delete takes a key, or a prefix, or start and end")
    if if_match is not None:
        raise InvalidRequest("if_match applies to a single key only")
    return delete_range(*bounds, all, limits)


def watched(key: str | bytes | None, prefix: str | bytes | None, limits: Limits) -> Selection:
    """What a watch follows. Raises TypeError, ValueError, InvalidRequest, TooLarge."""
    if (key is None) == (prefix is None):
        raise ValueError("watch takes a key or a prefix")
    if key is not None:
        return Selection(checked_key(key, limits), False)
    return Selection(span(prefix, None, None, limits)[0], True)


def condition(if_match: Match | None, if_none_match: bool) -> Condition | None:
    """The condition of a write, None when it has none. Raises InvalidRequest."""
    if if_match is None:
        return Condition(None, True) if if_none_match else None
    # What can be no revision never matches, and does not fit into a command.
    revisions = tuple(r if 0 < r < 2**63 else 0 for r in matched(if_match))
    return Condition(revisions, if_none_match)


def put(
    key: str | bytes,
    value: bytes,
    condition: Condition | None,
    ttl_s: float | None,
    lease: types.HasId | str | None,
) -> Put | ExpiringPut:
    """Raises TypeError, ValueError, InvalidRequest."""
    if ttl_s is not None and lease is not None:
        raise ValueError("a value ends with ttl_s or with a lease: give one of them")
    if ttl_s is not None:
        seconds = checked_seconds(ttl_s, "ttl_s")
        return ExpiringPut(as_key(key), as_value(value), condition, seconds, "")
    if lease is not None:
        return ExpiringPut(as_key(key), as_value(value), condition, 0, types.lease_id(lease))
    return Put(as_key(key), as_value(value), condition)


def txn(
    compare: Sequence[types.Compare],
    success: Sequence[types.Operation],
    failure: Sequence[types.Operation],
    limits: Limits,
) -> Txn:
    """Raises TypeError, ValueError, InvalidRequest, TooLarge."""
    parts = types.txn_parts(compare, success, failure)
    for name, part in parts.items():
        if len(part) > limits.txn_ops:
            raise TooLarge(f"{name} has {len(part)} items; at most {limits.txn_ops} are allowed")
    made = checked(
        Txn(
            tuple(_compare(item) for item in parts["compare"]),
            tuple(_operation(item, limits) for item in parts["success"]),
            tuple(_operation(item, limits) for item in parts["failure"]),
        )
    )
    size = len(encode_command(made))
    if size > limits.txn_bytes:
        raise TooLarge(
            f"the transaction has {size} bytes; at most {limits.txn_bytes} are allowed: split it"
        )
    return made


def _compare(asked: types.Compare) -> Compare:
    if asked.target not in get_args(Target) or asked.relation not in get_args(Relation):
        raise InvalidRequest(
            f"a comparison is of {', '.join(get_args(Target))} by {' '.join(get_args(Relation))}, "
            f"not of {asked.target!r} by {asked.relation!r}"
        )
    return Compare(as_key(asked.key), asked.target, asked.relation, asked.sound_operand())


def _operation(asked: types.Operation, limits: Limits) -> Operation:
    match asked:
        case types.Put(key, value, ttl_s, lease):
            return put(key, value, None, ttl_s, lease)
        case types.Get(key):
            return Get(as_key(key))
        case types.Delete(key):
            return Delete(as_key(key))
        case types.DeleteRange(prefix, start, end, all):
            return delete_range(prefix, start, end, all, limits)
    assert_never(asked)  # txn_parts lets none through


# --- what it came to ------------------------------------------------------------------------------


def txn_result(done: Txn, result: TxnResult, lifetimes: Lifetimes) -> types.TxnResult:
    """What `done` came to, operation by operation of the branch that was carried out."""
    branch = done.success if result.succeeded else done.failure
    told = [
        _operation_result(operation, outcome, lifetimes)
        for operation, outcome in zip(branch, result.results, strict=True)
    ]
    return types.TxnResult(result.revision, result.succeeded, tuple(told))


def _operation_result(
    operation: Operation, outcome: OperationResult, lifetimes: Lifetimes
) -> types.OperationResult:
    match outcome:
        case PutResult():
            return types.OperationResult("put", created=outcome.created)
        case DeleteResult():
            name = "delete" if isinstance(operation, Delete) else "delete_range"
            return types.OperationResult(name, deleted=outcome.deleted)
        case GetResult():
            found = None
            if outcome.mod_revision and isinstance(operation, Get):
                found = _item_of(operation.key, outcome, lifetimes)
            return types.OperationResult("get", item=found)


def _item_of(key: bytes, found: GetResult, lifetimes: Lifetimes) -> types.Item:
    record = Record(
        found.create_revision,
        found.mod_revision,
        found.version,
        found.value,
        found.expires_ms,
        found.lease,
    )
    return item(key, record, lifetimes)


def item(key: bytes, record: Record, lifetimes: Lifetimes) -> types.Item:
    """A key as listings and transactions show it."""
    return types.Item(
        key,
        record.value,
        record.mod_revision,
        record.create_revision,
        record.version,
        lifetimes.remaining_s(record),
        record.lease or None,
    )
