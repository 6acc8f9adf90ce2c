"""A dumb twin of the state machine: one dict, no shortcuts. Tests compare the real one with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from dengine.kv.commands import (
    Command,
    Condition,
    ConditionFailed,
    Delete,
    DeleteRange,
    DeleteResult,
    Invalid,
    Put,
    PutResult,
    Result,
    TooMany,
)
from dengine.kv.machine import Record


class DictView:
    """A `View` over a dict, in plain sight."""

    def __init__(self) -> None:
        self.records: dict[bytes, Record] = {}

    def get(self, key: bytes) -> Record | None:
        return self.records.get(key)

    def put(self, key: bytes, record: Record) -> None:
        assert 1 <= len(key) <= 511, "LMDB would refuse this key"
        self.records[key] = record

    def delete(self, key: bytes) -> None:
        del self.records[key]

    def scan(self, start: bytes, end: bytes | None) -> Iterator[bytes]:
        return iter([k for k in sorted(self.records) if k >= start and (end is None or k < end)])


class Twin:
    """Applies one command after the other as DESIGN's paragraph "State machine" reads."""

    def __init__(self) -> None:
        self.records: dict[bytes, Record] = {}
        self.revision = 0

    def apply(self, command: Command) -> Result:
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
