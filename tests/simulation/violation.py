"""What ends a run: something that must always hold does not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NoReturn

from tests.linearizability.checker import Operation, Verdict, check_key, shortest_window
from tests.linearizability.models import VERSIONED
from tests.linearizability.timeline import as_text

SEARCH_S = 60.0


class Violation(AssertionError):
    """`invariant` is a short name; invariants.py lists them."""

    def __init__(self, invariant: str, text: str) -> None:
        super().__init__(f"[{invariant}] {text}")
        self.invariant = invariant


class NotLinearizable(Violation):
    """`history`: all that was done to one key, of which `window` goes together in no order."""

    def __init__(
        self, key: bytes, history: Sequence[Operation], window: Sequence[Operation]
    ) -> None:
        super().__init__("linearizability", f"key {key!r}: {as_text(window)}")
        self.key = key
        self.history = history
        self.window = window

    def shortest(self, limit_s: float = SEARCH_S) -> Sequence[Operation]:
        """The fewest operations that contradict each other; `window` where the search for them
        takes longer.
        """
        deadline = time.monotonic() + limit_s
        if check_key(self.history, VERSIONED, deadline) is not Verdict.ILLEGAL:
            return self.window
        return shortest_window(self.history, VERSIONED, deadline)


def violated(invariant: str, text: str) -> NoReturn:
    raise Violation(invariant, text)
