"""Which watches select a key: one look-up by the key, and one by each length that a prefix has."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Selection(NamedTuple):
    """One key, or all keys that begin with `key`."""

    key: bytes
    is_prefix: bool

    def holds(self, key: bytes) -> bool:
        """Is `key` selected?"""
        return key.startswith(self.key) if self.is_prefix else key == self.key


class WatchIndex(Generic[T]):
    """Things by what they select, in the order in which they came."""

    def __init__(self) -> None:
        self._empty()

    def _empty(self) -> None:
        self._by_key: dict[bytes, dict[T, None]] = {}
        self._by_prefix: dict[bytes, dict[T, None]] = {}
        self._lengths: list[int] = []  # of the prefixes there are, ascending
        self._of_length: dict[int, int] = {}  # how many prefixes have it
        self._count = 0

    def __bool__(self) -> bool:
        return self._count > 0

    def __iter__(self) -> Iterator[T]:
        for table in (self._by_key, self._by_prefix):
            for things in table.values():
                yield from things

    def add(self, selection: Selection, thing: T) -> None:
        """`thing`, which is not in here, selects this."""
        table = self._by_prefix if selection.is_prefix else self._by_key
        things = table.get(selection.key)
        if things is None:
            things = table[selection.key] = {}
            if selection.is_prefix:
                self._came(len(selection.key))
        things[thing] = None
        self._count += 1

    def discard(self, selection: Selection, thing: T) -> None:
        """`thing` goes, if it is in here."""
        table = self._by_prefix if selection.is_prefix else self._by_key
        things = table.get(selection.key)
        if things is None or thing not in things:
            return
        del things[thing]
        self._count -= 1
        if not things:
            del table[selection.key]
            if selection.is_prefix:
                self._went(len(selection.key))

    def clear(self) -> list[T]:
        """Everything goes; what there was."""
        gone = list(self)
        self._empty()
        return gone

    def find(self, key: bytes) -> Iterator[T]:
        """Whatever selects `key`."""
        things = self._by_key.get(key)
        if things is not None:
            yield from things
        for length in self._lengths:
            if length > len(key):
                return
            things = self._by_prefix.get(key[:length])
            if things is not None:
                yield from things

    def _came(self, length: int) -> None:
        count = self._of_length.get(length, 0)
        self._of_length[length] = count + 1
        if not count:
            insort(self._lengths, length)

    def _went(self, length: int) -> None:
        self._of_length[length] -= 1
        if not self._of_length[length]:
            del self._of_length[length]
            self._lengths.remove(length)
