"""The time that the log counts: milliseconds in which the cluster had a leader.

Every member keeps a register: a log time it has learned of, and when. It runs on with the member's
own monotonic clock, and jumps ahead when it learns of a later time: from an entry in its log, or
from the leader's heartbeats. So a new leader begins where the old one was last heard, plus what has
passed since, and neither resets nor skips. Always one base and one difference, never a sum of
rounded steps: ten leader changes lose nothing but the time until the first heartbeat of each.

No register is ever ahead of the others' by more than has truly passed: each adds only what its own
clock has counted since it heard from another. A member that was frozen or suspended is behind when
it comes back, or has counted what passed; it leads nobody with that, for what it proposes must
still be committed.
"""

from __future__ import annotations


class LogClock:
    """The register. All arguments called `now_ms` are readings of one clock that never goes back.

    It stands at 0 until the first time is learned, which is what starts it.
    """

    def __init__(self) -> None:
        self._base_ms = 0
        self._base_at_ms = 0

    def at(self, now_ms: int) -> int:
        """The log time."""
        return self._base_ms + now_ms - self._base_at_ms if self._base_ms else 0

    def learn(self, clock_ms: int, now_ms: int) -> None:
        """The log time is `clock_ms` at least: somebody who may say so has said so."""
        if clock_ms > self.at(now_ms):
            self._base_ms, self._base_at_ms = clock_ms, now_ms
