"""What ends a run: something that must always hold does not."""

from __future__ import annotations

from typing import NoReturn


class Violation(AssertionError):
    """`invariant` is a short name; invariants.py lists them."""

    def __init__(self, invariant: str, text: str) -> None:
        super().__init__(f"[{invariant}] {text}")
        self.invariant = invariant


def violated(invariant: str, text: str) -> NoReturn:
    raise Violation(invariant, text)
