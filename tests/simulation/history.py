"""What an answer says of each key, in the words of those who judge histories.

What a transaction or a range delete has changed stands at the revision that its client was told;
which keys those are, the log says (keys.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dengine.kv.commands import (
    ConditionFailed,
    Delete,
    DeleteRange,
    DeleteResult,
    Effect,
    Get,
    GetResult,
    OperationResult,
    Put,
    PutResult,
    Result,
    Txn,
    TxnResult,
)
from dengine.kv.store import Record
from tests.linearizability.checker import Operation
from tests.simulation.keys import Keys, Rows

NOTHING = (0, None)  # what a read says of a key that is not there

Shown = tuple[int, bytes | None]  # mod_revision and value


def shown(record: Record | None) -> Shown:
    return NOTHING if record is None else (record.mod_revision, record.value)


class History:
    """What clients were told of `keys`, which nothing but their commands changes.

    Attributes:
        by_key: what each key was asked, and has answered.
        views: of several keys at one moment (see by_revision.check).
    """

    def __init__(self, keys: Sequence[bytes], log: Keys) -> None:
        self.by_key: dict[bytes, list[Operation]] = {}
        self.views: list[Operation] = []
        self._keys = keys
        self._log = log

    def copy(self) -> History:
        other = History(self._keys, self._log)
        other.by_key = {key: list(operations) for key, operations in self.by_key.items()}
        other.views = list(self.views)
        return other

    def read(self, op: Operation, key: bytes, record: Record | None) -> None:
        """`op` says who asked, and when; here and below."""
        if key in self._keys:
            self._add(key, op._replace(name="read", result=shown(record)))

    def listed(
        self, op: Operation, revision: int, rows: Rows, start: bytes, end: bytes | None
    ) -> None:
        """All that is there from `start` to `end`."""
        found = dict(rows)
        self._saw(op, revision, {key: shown(found.get(key)) for key in self._in(start, end)})

    def written(self, op: Operation, command: Effect, result: Result) -> None:
        """Nothing for what was refused as a whole."""
        if isinstance(command, Put | Delete):
            self._add(command.key, _single(op, command, result))
        elif isinstance(command, DeleteRange) and isinstance(result, DeleteResult):
            if result.deleted:
                self._changed(op, result.revision)
            else:
                none = dict.fromkeys(self._in(command.start, command.end), NOTHING)
                self._saw(op, result.revision, none)
        elif isinstance(command, Txn) and isinstance(result, TxnResult):
            changed = is_change(result)
            self._saw(op, result.revision - changed, self._seen_first(command, result))
            if changed:
                self._changed(op, result.revision)

    def _in(self, start: bytes, end: bytes | None) -> list[bytes]:
        return [key for key in self._keys if key >= start and (end is None or key < end)]

    def _add(self, key: bytes, op: Operation) -> None:
        self.by_key.setdefault(key, []).append(op)

    def _saw(self, op: Operation, revision: int, seen: dict[bytes, Shown]) -> None:
        self.views.append(op._replace(name="view", result=(revision, seen)))
        for key, what in seen.items():
            self._add(key, op._replace(name="read", result=what))

    def _changed(self, op: Operation, revision: int) -> None:
        for key, record in self._log.changed_by(revision).items():
            name = "delete" if record is None else "write"
            value = None if record is None else record.value
            self._add(key, op._replace(name=name, argument=value, result=revision))

    def _seen_first(self, txn: Txn, result: TxnResult) -> dict[bytes, Shown]:
        """Of the keys that the transaction had not changed itself by then."""
        seen: dict[bytes, Shown] = {}
        changed: set[bytes] = set()
        operations = txn.success if result.succeeded else txn.failure
        for operation, done in zip(operations, result.results, strict=True):
            if isinstance(operation, DeleteRange):
                changed.update(self._in(operation.start, operation.end))
                continue
            key = operation.key
            if isinstance(done, GetResult) and key not in changed:
                seen[key] = (done.mod_revision, done.value) if done.mod_revision else NOTHING
            elif _found_nothing(done) and key not in changed:
                seen[key] = NOTHING
            if not isinstance(operation, Get):
                changed.add(key)
        return seen


def is_change(result: Result | OperationResult) -> bool:
    """Has a command that came to this changed anything?"""
    if isinstance(result, TxnResult):
        return any(map(is_change, result.results))
    return isinstance(result, PutResult) or (
        isinstance(result, DeleteResult) and result.deleted > 0
    )


def _found_nothing(done: OperationResult) -> bool:
    return (isinstance(done, PutResult) and done.created) or (
        isinstance(done, DeleteResult) and not done.deleted
    )


def _single(op: Operation, command: Put | Delete, result: Result) -> Operation:
    """What changes a key as a whole is a write; on a condition it is a swap, with nothing for a
    deletion."""
    value = command.value if isinstance(command, Put) else None
    condition = command.condition
    seen: Any = ("is", result.current_revision) if isinstance(result, ConditionFailed) else None
    if isinstance(result, PutResult | DeleteResult):
        seen = result.revision
    if condition is None:
        return op._replace(name="write", argument=value, result=seen)
    expected = condition.if_match[0] if condition.if_match else None
    return op._replace(name="cas", argument=(expected, value), result=seen)
