"""From a seed that fails to what a person can work with: a whole trace, and the fewest faults."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

Fails = Callable[[tuple[str, ...]], str | None]


def shrink(
    faults: Sequence[str],
    fails: Fails,
    without: tuple[str, ...] = (),
    *,
    limit_s: float = float("inf"),
    say: Callable[[str], None] = print,
) -> tuple[str, ...]:
    """The faults that may be left out while it still fails for the same reason.

    One pass tries to leave out each by itself. What could not go may go once others are gone, so
    passes are repeated until one of them drops nothing.

    Args:
        fails: why it fails without these faults; None when it does not.
        limit_s: begin no further trial after that.
    """
    reason, end = fails(without), time.monotonic() + limit_s
    if reason is None:
        raise ValueError("it does not fail")
    dropped = True
    while dropped:
        dropped = False
        for fault in [fault for fault in faults if fault not in without]:
            if time.monotonic() > end:
                say("  no time to try the rest")
                return without
            if fails((*without, fault)) == reason:
                without, dropped = (*without, fault), True
                say(f"  also without {fault}: {reason}")
    return without


def write_trace(path: Path, run: Callable[[Callable[[str], None]], str]) -> None:
    """Write to `path` all that `run` tells, and last the verdict that it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:

        def tell(line: str) -> None:
            file.write(line + "\n")

        tell(run(tell))
