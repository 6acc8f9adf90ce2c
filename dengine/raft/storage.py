"""What the core reads from the durable log. Writes are the caller's, as `Ready` asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dengine.raft.types import Entry


class LogReader(Protocol):
    """Entries `first_index .. last_index` exist; `term(first_index - 1)` is known too."""

    def first_index(self) -> int:
        """Index of the oldest entry kept: 1 until a prefix has been purged."""
        ...

    def last_index(self) -> int:
        """Index of the newest durable entry; `first_index() - 1` when there is none."""
        ...

    def term(self, index: int) -> int:
        """Term of the entry at `index`, 0 for index 0."""
        ...

    def entries(self, low: int, high: int, max_bytes: int) -> Sequence[Entry]:
        """Entries with `low <= index < high`, cut after `max_bytes` of data but never empty."""
        ...
