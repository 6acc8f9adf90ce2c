"""Invariant 11 for whoever is told that a write did not happen: no entry may carry it out then.

A write under an idempotency key is sent again, and each time may be answered otherwise. Which of
its attempts an entry is of nobody can tell, for all of them are the same command; but each makes
one entry at most, so there are never more entries than attempts that were not refused.
"""

from __future__ import annotations

from collections import Counter

from tests.simulation.violation import violated


class Attempts:
    """Counted by the mark of a command (see model.py)."""

    def __init__(self) -> None:
        self._sent: Counter[bytes] = Counter()
        self._refused: Counter[bytes] = Counter()  # with the outcome "none"
        self._carried_out: Counter[bytes] = Counter()  # entries that did more than put it off

    def sent(self, mark: bytes) -> None:
        """A node has it from here on."""
        self._sent[mark] += 1

    def refused(self, mark: bytes) -> None:
        """Somebody is told that this attempt did not happen, and never will."""
        self._refused[mark] += 1
        self._judge(mark, "was refused, although it is committed")

    def carried_out(self, mark: bytes, index: int) -> None:
        """By the committed entry `index`."""
        self._carried_out[mark] += 1
        self._judge(mark, f"was refused, and is committed: {index}")

    def _judge(self, mark: bytes, what: str) -> None:
        sent, refused = self._sent[mark], self._refused[mark]
        if refused and refused + self._carried_out[mark] > sent:
            violated("11 outcome", f"{mark!r} {what} ({refused} of {sent} attempts were refused)")
