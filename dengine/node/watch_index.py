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


class Bucket(Generic[T]):
    """All things that select the same, in the order in which they came."""

    __slots__ = ("things",)

    def __init__(self) -> None:
        self.things: dict[T, None] = {}


class WatchIndex(Generic[T]):
    """Things by what they select."""

    def __init__(self) -> None:
        self._empty()

    def _empty(self) -> None:
        self._by_key: dict[bytes, Bucket[T]] = {}
        self._by_prefix: dict[bytes, Bucket[T]] = {}
        self._lengths: list[int] = []  # of the prefixes there are, ascending
        self._of_length: dict[int, int] = {}  # how many prefixes have it
        self._count = 0

    def __bool__(self) -> bool:
        return self._count > 0

    def __iter__(self) -> Iterator[T]:
        for table in (self._by_key, self._by_prefix):
            for bucket in table.values():
                yield from bucket.things

    def add(self, selection: Selection, thing: T) -> None:
        """`thing`, which is not in here, selects this."""
        table = self._by_prefix if selection.is_prefix else self._by_key
        bucket = table.get(selection.key)
        if bucket is None:
            bucket = table[selection.key] = Bucket()
            if selection.is_prefix:
                self._came(len(selection.key))
        bucket.things[thing] = None
        self._count += 1

    def discard(self, selection: Selection, thing: T) -> None:
        """`thing` goes, if it is in here."""
        table = self._by_prefix if selection.is_prefix else self._by_key
        bucket = table.get(selection.key)
        if bucket is None or thing not in bucket.things:
            return
        del bucket.things[thing]
        self._count -= 1
        if not bucket.things:
            del table[selection.key]
            if selection.is_prefix:
                self._went(len(selection.key))

    def clear(self) -> list[T]:
        """Everything goes; what there was."""
        gone = list(self)
        self._empty()
        return gone

    def find(self, key: bytes) -> Iterator[Bucket[T]]:
        """Whatever selects `key`: one bucket for each selection, however many things are in it."""
        bucket = self._by_key.get(key)
        if bucket is not None:
            yield bucket
        for length in self._lengths:
            if length > len(key):
                return
            bucket = self._by_prefix.get(key[:length])
            if bucket is not None:
                yield bucket

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
