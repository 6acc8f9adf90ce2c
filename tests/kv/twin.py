"""A dumb twin of the state machine: one dict, no shortcuts. Tests compare the real one with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

from dengine.kv.commands import (
    Command,
    Compare,
    Condition,
    ConditionFailed,
    Delete,
    DeleteRange,
    DeleteResult,
    Get,
    GetResult,
    Invalid,
    Put,
    PutResult,
    Result,
    TooMany,
    Txn,
    TxnResult,
)
from dengine.kv.store import TABLES, Event, Record, Table, Totals


class DictView:
    """A `View` over a dict, in plain sight."""

    def __init__(self) -> None:
        self.records: dict[bytes, Record] = {}
        self.tables: dict[Table, dict[bytes, bytes]] = {name: {} for name in TABLES}
        self.appended: dict[Table, bytes] = {}  # the last key
        self.totals: Totals | None = None
        self.changes: list[tuple[int, list[Event]]] = []

    def get(self, key: bytes) -> Record | None:
        return self.records.get(key)

    def put(self, key: bytes, record: Record) -> None:
        assert 1 <= len(key) <= 511, "LMDB would refuse this key"
        self.records[key] = record

    def get_many(self, keys: Sequence[bytes], size: int | None) -> list[Record | None]:
        found: list[Record | None] = []
        for key in keys:
            found.append(self.get(key))
            if size is not None and sum(len(r.value) for r in found if r) > size:
                break
        return found

    def put_many(self, keys: Sequence[bytes], records: Sequence[Record]) -> None:
        for key, record in zip(keys, records, strict=True):
            self.put(key, record)

    def delete(self, key: bytes) -> None:
        del self.records[key]

    def scan(self, start: bytes, end: bytes | None) -> Iterator[bytes]:
        return iter([k for k in sorted(self.records) if k >= start and (end is None or k < end)])

    def read(self, table: Table, key: bytes) -> bytes | None:
        return self.tables[table].get(key)

    def write(self, table: Table, key: bytes, data: bytes) -> None:
        assert 1 <= len(key) <= 511, "LMDB would refuse this key"
        self.tables[table][key] = data

    def append(self, table: Table, key: bytes, data: bytes) -> None:
        assert key > self.appended.get(table, b"")
        self.appended[table] = key
        self.write(table, key, data)

    def remove(self, table: Table, key: bytes) -> bytes | None:
        return self.tables[table].pop(key, None)

    def first(self, table: Table, start: bytes) -> tuple[bytes, bytes] | None:
        found = min((k for k in self.tables[table] if k >= start), default=None)
        return None if found is None else (found, self.tables[table][found])

    def changed(self, revision: int, events: Sequence[Event]) -> None:
        self.changes.append((revision, list(events)))


class Twin:
    """One command after the other, as simply as the rules in ARCHITECTURE.md, "The state machine",
    can be written down."""

    def __init__(self) -> None:
        self.records: dict[bytes, Record] = {}
        self.revision = 0

    def apply(self, command: Command) -> Result:
        if isinstance(command, Txn):
            return self._txn(command)
        before = copy.copy(self.records)
        result = self._apply(command)
        if self.records != before:
            self.revision += 1
        return result

    def _apply(self, command: Command) -> Result:
        if isinstance(command, DeleteRange):
            doomed = [
                key
                for key in self.records
                if key >= command.start and (command.end is None or key < command.end)
            ]
            if len(doomed) > max(command.limit, 0):
                return TooMany(max(command.limit, 0))
            for key in doomed:
                del self.records[key]
            return DeleteResult(self.revision + bool(doomed), len(doomed))
        if len(command.key) == 0 or len(command.key) > 511:
            return Invalid(f"a key has 1 to 511 bytes, this one has {len(command.key)}")
        if isinstance(command, Put) and len(command.value) > 2**20:
            return Invalid(f"a value has at most 1048576 bytes, this one has {len(command.value)}")
        old = self.records.get(command.key)
        if not self._allowed(command.condition, old):
            return ConditionFailed(None if old is None else old.mod_revision)
        if isinstance(command, Delete):
            self.records.pop(command.key, None)
            return DeleteResult(self.revision + (old is not None), int(old is not None))
        now = self.revision + 1
        created = now if old is None else old.create_revision
        version = 1 if old is None else old.version + 1
        self.records[command.key] = Record(created, now, version, command.value)
        return PutResult(now, old is None)

    def _txn(self, txn: Txn) -> Result:
        for compare in txn.compare:
            number, is_flag = type(compare.operand) is int, type(compare.operand) is bool
            fits = {"value": type(compare.operand) is bytes, "exists": is_flag}
            if not fits.get(compare.target, number):
                return Invalid("any words")
            if is_flag and compare.relation not in ("=", "!="):
                return Invalid("any words")
            if len(compare.key) == 0 or len(compare.key) > 511:
                return Invalid("any words")
        succeeded = all(self._true(compare) for compare in txn.compare)
        records, results, deleted, changed = dict(self.records), [], 0, False
        for operation in txn.success if succeeded else txn.failure:
            trial = Twin()
            trial.records, trial.revision = records, self.revision
            if isinstance(operation, Get):
                if len(operation.key) == 0 or len(operation.key) > 511:
                    return Invalid("any words")
                found = records.get(operation.key)
                result: Result | GetResult = GetResult()
                if found:
                    result = GetResult(
                        found.mod_revision, found.create_revision, found.version, found.value
                    )
            elif isinstance(operation, DeleteRange):
                left = operation.limit - deleted
                result = trial._apply(DeleteRange(operation.start, operation.end, left))
            elif operation.condition is not None:
                return Invalid("any words")
            else:
                result = trial._apply(operation)
            if isinstance(result, TooMany):
                return TooMany(max(operation.limit, 0))
            if isinstance(result, Invalid):
                return result
            if isinstance(result, DeleteResult):
                deleted += result.deleted
            changed = changed or isinstance(result, PutResult) or bool(deleted)
            results.append(result)
        self.records, self.revision = records, self.revision + changed
        return TxnResult(self.revision, succeeded, tuple(results))

    def _true(self, compare: Compare) -> bool:
        old = self.records.get(compare.key)
        if compare.target == "value" and old is None:
            return False
        actual = {
            "exists": old is not None,
            "value": old.value if old else b"",
            "version": old.version if old else 0,
            "mod_revision": old.mod_revision if old else 0,
        }[compare.target]
        below, same = actual < compare.operand, actual == compare.operand
        return {
            "=": same,
            "!=": not same,
            "<": below,
            "<=": below or same,
            ">": not below and not same,
            ">=": not below,
        }[compare.relation]

    @staticmethod
    def _allowed(condition: Condition | None, old: Record | None) -> bool:
        if condition is None:
            return True
        if condition.if_none_match and old:
            return False
        if condition.if_match is None:
            return True
        if old is None:
            return False
        return condition.if_match == () or old.mod_revision in condition.if_match
