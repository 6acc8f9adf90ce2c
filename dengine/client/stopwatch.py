"""Time that goes on while the machine sleeps: leases end meanwhile, and results are forgotten."""

from __future__ import annotations

import time
from collections.abc import Callable


class Stopwatch:
    """Runs from when it is made.

    Args:
        clock: seconds, for where the machine does not sleep: the loop's, or a monotonic one.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began, self._boot_began = clock(), boot_time()

    def elapsed_s(self) -> float:
        return max(self._clock() - self._began, boot_time() - self._boot_began)


def boot_time() -> float:
    """Seconds since the machine was started, asleep or not; 0 where the system does not say."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else 0.0
