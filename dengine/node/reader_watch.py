"""How long another process may read the state that this node goes on writing."""

from __future__ import annotations

import time

from dengine.node.transfers import format_bytes
from dengine.storage.state_store import StateStore

GROWTH_BYTES_MIN = 1024 * 1024 * 1024  # by so much even the smallest state may grow meanwhile
AGE_S_MIN = 120.0  # so old may the reader of even the smallest state become


class ReaderWatch:
    """Bounds a job that reads the state in time and in what it costs: LMDB keeps every page that
    its reader can see, so the state grows with each write until the job is done.

    Call it now and then: it says why the job must end, or None.

    Args:
        max_bytes_per_s: at most so fast is the state read.
    """

    def __init__(self, state: StateStore, max_bytes_per_s: int) -> None:
        self._state = state
        self._size = state.data_bytes()
        self._growth_bytes = max(GROWTH_BYTES_MIN, self._size)
        self._age_s = AGE_S_MIN + 4 * self._size / max_bytes_per_s
        self._started = time.monotonic()

    def __call__(self) -> str | None:
        if time.monotonic() - self._started > self._age_s:
            return f"the state was not read within {self._age_s:.0f} s"
        if self._state.data_bytes() - self._size > self._growth_bytes:
            return f"the state grew by more than {format_bytes(self._growth_bytes)} meanwhile"
        return None
