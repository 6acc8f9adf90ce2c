"""A dumb twin of the state machine: one dict, no shortcuts. Tests compare the real one with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec

from dengine.kv.commands import (
    Command,
    Compare,
    Condition,
    ConditionFailed,
    Delete,
    DeleteRange,
    DeleteResult,
    ExpiringPut,
    Get,
    GetResult,
    Invalid,
    NoLease,
    Operation,
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
        return iter(_between(self.records, start, end))

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
    can be written down. What time and leases end, and what is done once, is not in it.

    Attributes:
        keys_max: how many keys a command may delete, whatever it says itself.
        alive: says of a lease whether keys can be attached to it.
        clock_ms: the log time.
    """

    def __init__(
        self,
        keys_max: int = 10_000,
        alive: Callable[[str], bool] = lambda lease: False,
    ) -> None:
        self.records: dict[bytes, Record] = {}
        self.revision = 0
        self.keys_max = keys_max
        self.alive = alive
        self.clock_ms = 0

    def apply(self, command: Command) -> Result:
        """`records` is another dict afterwards if the command has changed it."""
        records = dict(self.records)
        if isinstance(command, Txn):
            result, changed = self._txn(command, records)
        else:
            result = self._apply(command, records)
            changed = records != self.records
        if changed:
            self.records = records
            self.revision += 1
        return result

    def keys(self, start: bytes, end: bytes | None) -> list[bytes]:
        return _between(self.records, start, end)

    def _apply(self, command: Command | Operation, records: dict[bytes, Record]) -> Any:
        """Changes `records`, at the revision after this one."""
        if isinstance(command, DeleteRange):
            doomed = _between(records, command.start, command.end)
            most = max(min(command.limit, self.keys_max), 0)
            if len(doomed) > most:
                return TooMany(most)
            for key in doomed:
                del records[key]
            return DeleteResult(self.revision + bool(doomed), len(doomed))
        if len(command.key) == 0 or len(command.key) > 511:
            return Invalid(f"a key has 1 to 511 bytes, this one has {len(command.key)}")
        old = records.get(command.key)
        if isinstance(command, Get):
            if old is None:
                return GetResult()
            made, changed, version, value, expires_ms, lease = msgspec.structs.astuple(old)
            return GetResult(changed, made, version, value, expires_ms, lease)
        if not isinstance(command, Delete) and len(command.value) > 2**20:
            return Invalid(f"a value has at most 1048576 bytes, this one has {len(command.value)}")
        expires_ms, lease = 0, ""
        if isinstance(command, ExpiringPut):
            lease = command.lease
            if lease and not self.alive(lease):
                return NoLease(lease)
            expires_ms = 0 if lease else self.clock_ms + command.ttl_s * 1000 + 1
        if not self._allowed(command.condition, old):
            return ConditionFailed(None if old is None else old.mod_revision)
        if isinstance(command, Delete):
            records.pop(command.key, None)
            return DeleteResult(self.revision + (old is not None), int(old is not None))
        now = self.revision + 1
        created = now if old is None else old.create_revision
        version = 1 if old is None else old.version + 1
        records[command.key] = Record(created, now, version, command.value, expires_ms, lease)
        return PutResult(now, old is None)

    def _txn(self, txn: Txn, records: dict[bytes, Record]) -> tuple[Result, bool]:
        """And whether it is a change."""
        for compare in txn.compare:
            number, is_flag = type(compare.operand) is int, type(compare.operand) is bool
            fits = {"value": type(compare.operand) is bytes, "exists": is_flag}
            if not fits.get(compare.target, number):
                return Invalid("any words"), False
            if is_flag and compare.relation not in ("=", "!="):
                return Invalid("any words"), False
            if len(compare.key) == 0 or len(compare.key) > 511:
                return Invalid("any words"), False
        succeeded = all(self._true(compare) for compare in txn.compare)
        results, deleted, changed = [], 0, False
        for operation in txn.success if succeeded else txn.failure:
            if isinstance(operation, DeleteRange):
                most = min(operation.limit, self.keys_max)
                left = DeleteRange(operation.start, operation.end, most - deleted)
                result = self._apply(left, records)
                if isinstance(result, TooMany):
                    return TooMany(max(most, 0)), False
            elif not isinstance(operation, Get) and operation.condition is not None:
                return Invalid("any words"), False
            else:
                result = self._apply(operation, records)
            if isinstance(result, Invalid | NoLease):
                return result, False
            if isinstance(result, DeleteResult):
                deleted += result.deleted
            changed = changed or isinstance(result, PutResult) or bool(deleted)
            results.append(result)
        return TxnResult(self.revision + changed, succeeded, tuple(results)), changed

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


def _between(records: Iterable[bytes], start: bytes, end: bytes | None) -> list[bytes]:
    return sorted(key for key in records if key >= start and (end is None or key < end))
