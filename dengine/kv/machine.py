"""The state machine: commands in, changes of a `View` and results out.

Apply is total and deterministic: any bytes give results, the same ones on every node, and nothing
is raised but what the `View` itself raises (a damaged disk is a matter of one node, never of the
cluster). So the limits are checked here too and not only where requests come in: a command that
LMDB refused would stop every node at the same entry, for ever.

An entry is: the log time moves on, what is due then ends, the commands follow in order, and the
history lets go of its oldest revisions. An entry of version 1 is its commands and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from dengine.kv import leases, once
from dengine.kv.commands import (
    Command,
    Condition,
    ConditionFailed,
    Deferred,
    Delete,
    DeleteRange,
    DeleteResult,
    Effect,
    ExpiringPut,
    Get,
    GetResult,
    Invalid,
    LeaseGrant,
    LeaseKeepAlive,
    LeaseRevoke,
    LeaseRevoked,
    NoLease,
    Once,
    Operation,
    OperationResult,
    Put,
    PutResult,
    Result,
    TooMany,
    TooMuch,
    Txn,
    TxnResult,
    batch_clock_ms,
    decode_batch,
    encode_result,
)
from dengine.kv.expiry import expire
from dengine.kv.recorder import COMMAND_KEYS_MAX, WORK_BYTES_MAX, Recorder
from dengine.kv.store import KEY_BYTES_MAX, VALUE_BYTES_MAX, Record, Rules, Totals, View
from dengine.kv.transaction import READ_BYTES_MAX, Overlay, flaw, holds

__all__ = ["KEY_BYTES_MAX", "VALUE_BYTES_MAX", "Record", "View", "apply_batch"]

_DEFAULT_RULES: Final = Rules()
_TOO_MUCH: Final = TooMuch(WORK_BYTES_MAX, COMMAND_KEYS_MAX)
_CHANGES: Final = (PutResult, DeleteResult, TxnResult, LeaseRevoked)

Records = Recorder | Overlay


def apply_batch(
    data: bytes, view: View, revision: int, rules: Rules = _DEFAULT_RULES, index: int = 0
) -> tuple[int, list[Result]]:
    """Apply one entry.

    Args:
        data: the entry's data, from `commands.encode_batch`.
        view: the store to read and change; its `totals` are made and changed here.
        revision: the store's revision before this entry.
        rules: of the settings in force at this entry.
        index: of this entry in the log.

    Returns:
        The revision afterwards (one higher per command that changed something, and one for what
        expired) and one result per command.
    """
    clock_ms = batch_clock_ms(data)
    if clock_ms is not None and view.totals is None:
        view.totals = Totals(history_first=revision + 1)
    recorder = Recorder(view, revision, rules, index)
    if clock_ms is not None and recorder.totals is not None:
        recorder.totals.clock_ms = max(recorder.totals.clock_ms, clock_ms)
        expire(recorder)
    results: list[Result] = []
    for position, command in enumerate(decode_batch(data)):
        if not recorder.begin(position) and position:  # the first one always has its turn
            results.append(Deferred())
            continue
        result = _command(command, recorder)
        if isinstance(result, once.Remembered):
            results.append(result.result)
            continue
        results.append(result)
        if isinstance(result, _CHANGES):
            recorder.close(result.revision)
    recorder.end()
    return recorder.revision, results


def _command(command: Command | Invalid, recorder: Recorder) -> Result | once.Remembered:
    if isinstance(command, Once):
        inner = command.command
        return once.carry_out(
            recorder, command, lambda: _apply(inner, recorder, once.RESULT_BYTES_MAX)
        )
    return _apply(command, recorder)


def _apply(command: Effect | Invalid, recorder: Recorder, result_max: int | None = None) -> Result:
    """Carry out a command whose result may have `result_max` bytes; None: any number."""
    revision = recorder.revision
    match command:
        case Put() | ExpiringPut():
            return _put(command, recorder, recorder, revision)
        case Delete():
            return _delete(command, recorder, revision)
        case DeleteRange():
            return _delete_range(command, recorder, recorder, revision)
        case Txn():
            return _txn(command, recorder, revision, result_max)
        case LeaseGrant():
            return leases.grant(recorder, command)
        case LeaseKeepAlive():
            return leases.keep_alive(recorder, command)
        case LeaseRevoke():
            return leases.revoke(recorder, command)
    return command


def _txn(txn: Txn, view: Recorder, revision: int, result_max: int | None) -> Result:
    """One branch, as one change: every operation is at the same revision, the one after."""
    wrong = flaw(txn)
    if wrong is not None:
        return Invalid(wrong)
    for compare in txn.compare:
        if not 1 <= len(compare.key) <= KEY_BYTES_MAX:
            return _bad_key(compare.key)
    succeeded = True
    for compare in txn.compare:
        succeeded = holds(compare, view.get(compare.key))
        if view.too_much:
            return _TOO_MUCH
        if not succeeded:
            break
    operations = txn.success if succeeded else txn.failure
    puts = _only_puts(operations)
    if puts:
        return _put_all(puts, succeeded, view, revision)
    overlay, after = Overlay(view), revision
    results: list[OperationResult] = []
    read = deleted = 0
    for operation in operations:
        result = _operate(operation, overlay, view, revision, deleted)
        if view.too_much:
            return _TOO_MUCH
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
    done = TxnResult(after, succeeded, tuple(results))
    if result_max is not None and len(encode_result(done)) > result_max:
        return Invalid(
            f"with an idempotency key, what a transaction reads has at most {result_max} bytes"
        )
    overlay.carry_out()
    return done


def _only_puts(operations: Sequence[Operation]) -> dict[bytes, Put]:
    """By key, the operations of a branch that does nothing but put, each key once, what stays, and
    without a flaw; of any other none. No such operation sees what another has done, so that they
    can be carried out all at once, which costs much less."""
    puts: dict[bytes, Put] = {}
    for operation in operations:
        if not isinstance(operation, Put) or operation.condition is not None:
            return {}
        key = operation.key
        if not 1 <= len(key) <= KEY_BYTES_MAX or len(operation.value) > VALUE_BYTES_MAX:
            return {}
        puts[key] = operation
    return puts if len(puts) == len(operations) else {}


def _put_all(puts: dict[bytes, Put], succeeded: bool, view: Recorder, revision: int) -> Result:
    """What the general way of `_txn` comes to for `_only_puts`. Such a result is never too long for
    an idempotency key: it has no values in it."""
    keys = list(puts)
    olds = view.get_many(keys)
    if view.too_much:
        return _TOO_MUCH
    now = revision + 1
    made, replaced = PutResult(now, True), PutResult(now, False)
    records = [
        Record(now, now, 1, put.value)
        if old is None
        else Record(old.create_revision, now, old.version + 1, put.value)
        for put, old in zip(puts.values(), olds, strict=True)
    ]
    view.put_many(keys, records, olds)
    return TxnResult(now, succeeded, tuple([made if o is None else replaced for o in olds]))


def _operate(
    operation: Operation, overlay: Overlay, recorder: Recorder, revision: int, deleted: int
) -> OperationResult | ConditionFailed | TooMany | TooMuch | NoLease | Invalid:
    """One operation of a transaction that has deleted so many keys so far."""
    match operation:
        case Get(key):
            if not 1 <= len(key) <= KEY_BYTES_MAX:
                return _bad_key(key)
            found = overlay.get(key)
            if found is None:
                return GetResult()
            return GetResult(
                found.mod_revision,
                found.create_revision,
                found.version,
                found.value,
                found.expires_ms,
                found.lease,
            )
        case DeleteRange(start, end, limit):
            left = DeleteRange(start, end, recorder.keys_limit(limit) - deleted)
            done = _delete_range(left, overlay, recorder, revision)
            most = max(recorder.keys_limit(limit), 0)
            return TooMany(most) if isinstance(done, TooMany) else done
        case Put() | ExpiringPut() | Delete():
            if operation.condition is not None:
                return Invalid("an operation of a transaction has no condition of its own")
            if isinstance(operation, Delete):
                return _delete(operation, overlay, revision)
            return _put(operation, overlay, recorder, revision)


def _put(
    command: Put | ExpiringPut, view: Records, recorder: Recorder, revision: int
) -> PutResult | ConditionFailed | NoLease | Invalid:
    key, value = command.key, command.value
    if not 1 <= len(key) <= KEY_BYTES_MAX:
        return _bad_key(key)
    if len(value) > VALUE_BYTES_MAX:
        return Invalid(f"a value has at most {VALUE_BYTES_MAX} bytes, this one has {len(value)}")
    expires_ms, lease = 0, ""
    if isinstance(command, ExpiringPut):
        refused = _life_flaw(command, recorder)
        if refused is not None:
            return refused
        lease = command.lease
        expires_ms = 0 if lease else leases.expires_ms(recorder, command.ttl_s)
    old = view.get(key)
    if command.condition is not None and not _holds(command.condition, old):
        return ConditionFailed(old.mod_revision if old else None)
    revision += 1
    if old is None:
        view.put(key, Record(revision, revision, 1, value, expires_ms, lease))
        return PutResult(revision, True)
    version = old.version + 1
    view.put(key, Record(old.create_revision, revision, version, value, expires_ms, lease))
    return PutResult(revision, False)


def _life_flaw(command: ExpiringPut, recorder: Recorder) -> Invalid | NoLease | None:
    """Why the value cannot be given such a life."""
    if not command.lease:
        return leases.bad_ttl(command.ttl_s)
    if command.ttl_s:
        return Invalid("a value has a TTL or a lease, not both")
    if leases.alive(recorder, command.lease) is None:
        return leases.missing(command.lease)
    return None


def _delete(
    command: Delete, view: Records, revision: int
) -> DeleteResult | ConditionFailed | Invalid:
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


def _delete_range(
    command: DeleteRange, view: Records, recorder: Recorder, revision: int
) -> DeleteResult | TooMany | TooMuch:
    limit = max(recorder.keys_limit(command.limit), 0)
    keys: list[bytes] = []
    for key in view.scan(command.start, command.end):
        if len(keys) == limit:
            return TooMany(limit)
        keys.append(key)
    if recorder.too_much:  # then these are not all
        return _TOO_MUCH
    if recorder.totals is not None:  # their values go into the history
        for key in keys:
            view.get(key)
            if recorder.too_much:
                return _TOO_MUCH
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
