"""The state machine: commands in, changes of a `View` and results out.

Apply is total and deterministic: any bytes give results, the same ones on every node, and nothing
is raised but what the `View` itself raises (a damaged disk is a matter of one node, never of the
cluster). So the limits are checked here too and not only where requests come in: a command that
LMDB refused would stop every node at the same entry, for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

import msgspec

from dengine.kv.commands import (
    Command,
    Condition,
    ConditionFailed,
    Delete,
    DeleteRange,
    DeleteResult,
    Get,
    GetResult,
    Invalid,
    Operation,
    OperationResult,
    Put,
    PutResult,
    Result,
    TooMany,
    Txn,
    TxnResult,
    decode_batch,
)
from dengine.kv.transaction import READ_BYTES_MAX, Overlay, flaw, holds

KEY_BYTES_MAX: Final = 511
VALUE_BYTES_MAX: Final = 1024 * 1024


class Record(msgspec.Struct, frozen=True, gc=False):
    """What the store holds for a key. All numbers are at least 1."""

    create_revision: int  # revision of the put that made the key
    mod_revision: int  # revision of the last put
    version: int  # puts since the key was made
    value: bytes


class View(Protocol):
    """The store as one entry sees it: its own changes are visible at once."""

    def get(self, key: bytes) -> Record | None: ...

    def put(self, key: bytes, record: Record) -> None: ...

    def delete(self, key: bytes) -> None:
        """Removes `key`, which exists."""
        ...

    def scan(self, start: bytes, end: bytes | None) -> Iterator[bytes]:
        """Keys with `start <= key < end` in ascending order; `end` None: to the last key."""
        ...


def apply_batch(data: bytes, view: View, revision: int) -> tuple[int, list[Result]]:
    """Apply the commands of one entry in order.

    Args:
        data: the entry's data, from `commands.encode_batch`.
        view: the store to read and change.
        revision: the store's revision before this entry.

    Returns:
        The revision afterwards (one higher per command that changed something) and one result
        per command.
    """
    results: list[Result] = []
    for command in decode_batch(data):
        result = _apply(command, view, revision)
        results.append(result)
        if isinstance(result, (PutResult, DeleteResult, TxnResult)):
            revision = result.revision
    return revision, results


def _apply(command: Command | Invalid, view: View, revision: int) -> Result:
    if isinstance(command, Put):
        return _put(command, view, revision)
    if isinstance(command, Delete):
        return _delete(command, view, revision)
    if isinstance(command, DeleteRange):
        return _delete_range(command, view, revision)
    if isinstance(command, Txn):
        return _txn(command, view, revision)
    return command


def _txn(txn: Txn, view: View, revision: int) -> Result:
    """One branch, as one change: every operation is at the same revision, the one after."""
    wrong = flaw(txn)
    if wrong is not None:
        return Invalid(wrong)
    for compare in txn.compare:
        if not 1 <= len(compare.key) <= KEY_BYTES_MAX:
            return _bad_key(compare.key)
    succeeded = all(holds(compare, view.get(compare.key)) for compare in txn.compare)
    overlay, after = Overlay(view), revision
    results: list[OperationResult] = []
    read = deleted = 0
    for operation in txn.success if succeeded else txn.failure:
        result = _operate(operation, overlay, revision, deleted)
        if isinstance(result, GetResult):
            read += len(result.value)
            if read > READ_BYTES_MAX:
                return Invalid(
                    f"the values that this transaction reads have more than {READ_BYTES_MAX} bytes"
                )
        elif isinstance(result, PutResult | DeleteResult):
            deleted += result.deleted if isinstance(result, DeleteResult) else 0
            after = max(after, result.revision)
        else:
            return result
        results.append(result)
    overlay.carry_out()
    return TxnResult(after, succeeded, tuple(results))


def _operate(
    operation: Operation, overlay: Overlay, revision: int, deleted: int
) -> OperationResult | ConditionFailed | TooMany | Invalid:
    """One operation of a transaction that has deleted so many keys so far."""
    match operation:
        case Get(key):
            if not 1 <= len(key) <= KEY_BYTES_MAX:
                return _bad_key(key)
            found = overlay.get(key)
            if found is None:
                return GetResult()
            return GetResult(found.mod_revision, found.create_revision, found.version, found.value)
        case DeleteRange(start, end, limit):
            done = _delete_range(DeleteRange(start, end, limit - deleted), overlay, revision)
            return TooMany(max(limit, 0)) if isinstance(done, TooMany) else done
        case Put() | Delete():
            if operation.condition is not None:
                return Invalid("an operation of a transaction has no condition of its own")
            if isinstance(operation, Put):
                return _put(operation, overlay, revision)
            return _delete(operation, overlay, revision)


def _put(command: Put, view: View, revision: int) -> PutResult | ConditionFailed | Invalid:
    key, value = command.key, command.value
    if not 1 <= len(key) <= KEY_BYTES_MAX:
        return _bad_key(key)
    if len(value) > VALUE_BYTES_MAX:
        return Invalid(f"a value has at most {VALUE_BYTES_MAX} bytes, this one has {len(value)}")
    old = view.get(key)
    if command.condition is not None and not _holds(command.condition, old):
        return ConditionFailed(old.mod_revision if old else None)
    revision += 1
    if old is None:
        view.put(key, Record(revision, revision, 1, value))
        return PutResult(revision, True)
    view.put(key, Record(old.create_revision, revision, old.version + 1, value))
    return PutResult(revision, False)


def _delete(command: Delete, view: View, revision: int) -> DeleteResult | ConditionFailed | Invalid:
    key = command.key
    if not 1 <= len(key) <= KEY_BYTES_MAX:
        return _bad_key(key)
    old = view.get(key)
    if command.condition is not None and not _holds(command.condition, old):
        return ConditionFailed(old.mod_revision if old else None)
    if old is None:
        return DeleteResult(revision, 0)
    view.delete(key)
    return DeleteResult(revision + 1, 1)


def _delete_range(command: DeleteRange, view: View, revision: int) -> DeleteResult | TooMany:
    limit = max(command.limit, 0)
    keys: list[bytes] = []
    for key in view.scan(command.start, command.end):
        if len(keys) == limit:
            return TooMany(limit)
        keys.append(key)
    for key in keys:
        view.delete(key)
    return DeleteResult(revision + 1 if keys else revision, len(keys))


def _holds(condition: Condition, old: Record | None) -> bool:
    if condition.if_none_match and old is not None:
        return False
    if condition.if_match is None:
        return True
    return old is not None and (not condition.if_match or old.mod_revision in condition.if_match)


def _bad_key(key: bytes) -> Invalid:
    return Invalid(f"a key has 1 to {KEY_BYTES_MAX} bytes, this one has {len(key)}")
