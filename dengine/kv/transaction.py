"""What a transaction needs beside its operations: comparisons, and a store to try them on."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from heapq import merge
from typing import TYPE_CHECKING, Any, Final

from dengine.kv.commands import Compare, Relation, Txn

if TYPE_CHECKING:
    from dengine.kv.recorder import Recorder
    from dengine.kv.store import Record

OPERATIONS_MAX: Final = 1024  # in a branch, and comparisons; a node's limits.txn_ops is never more
READ_BYTES_MAX: Final = 4 * 1024 * 1024  # of all values that one transaction reads

_RELATIONS: Final[dict[Relation, Callable[[Any, Any], bool]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def flaw(txn: Txn) -> str | None:
    """What is wrong with a transaction whatever the store holds, as a sentence; else None."""
    for name in ("compare", "success", "failure"):
        count = len(getattr(txn, name))
        if count > OPERATIONS_MAX:
            return f"{name} has {count} items; at most {OPERATIONS_MAX} are allowed"
    for compare in txn.compare:
        wanted, words = _OPERANDS[compare.target]
        if type(compare.operand) is not wanted:
            return f"{compare.target} is compared with {words}"
        if wanted is bool and compare.relation not in ("=", "!="):
            return "exists is compared with = or !="
    return None


_OPERANDS: Final[dict[str, tuple[type, str]]] = {
    "mod_revision": (int, "a whole number"),
    "version": (int, "a whole number"),
    "value": (bytes, "a value"),
    "exists": (bool, "true or false"),
}


def holds(compare: Compare, record: Record | None) -> bool:
    """Does the key, which holds `record` now, satisfy a comparison without `flaw`?"""
    actual: int | bytes
    if compare.target == "exists":
        actual = record is not None
    elif compare.target == "value":
        if record is None:
            return False
        actual = record.value
    elif record is None:
        actual = 0
    else:
        actual = record.version if compare.target == "version" else record.mod_revision
    return _RELATIONS[compare.relation](actual, compare.operand)


class Overlay:
    """Records whose changes stay here until `carry_out`: all of them happen, or none."""

    def __init__(self, view: Recorder) -> None:
        self._view = view
        self._changes: dict[bytes, Record | None] = {}  # None: deleted
        self._found: dict[bytes, Record | None] = {}  # in the store
        self._made: set[bytes] = set()  # what was put, and not deleted again: never many

    def get(self, key: bytes) -> Record | None:
        if key in self._changes:
            return self._changes[key]
        found = self._found[key] = self._view.get(key)
        return found

    def put(self, key: bytes, record: Record) -> None:
        self._changes[key] = record
        self._made.add(key)

    def delete(self, key: bytes) -> None:
        self._changes[key] = None
        self._made.discard(key)

    def scan(self, start: bytes, end: bytes | None) -> Iterator[bytes]:
        own = sorted(k for k in self._made if k >= start and (end is None or k < end))
        last = None
        for key in merge(self._view.scan(start, end), own):
            if key != last and self._changes.get(key, True) is not None:
                yield key
            last = key

    def carry_out(self) -> None:
        """Change the store."""
        for key, record in self._changes.items():
            if record is not None:
                if key in self._found:
                    self._view.recall(key, self._found[key])
                self._view.put(key, record)
            elif self._view.get(key) is not None:  # else it was made and deleted on the way
                self._view.delete(key)
