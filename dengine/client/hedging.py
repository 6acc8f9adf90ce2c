"""When a request that waits for its answer is sent to a second node as well.

A hung node is only known by its silence, and so is a slow cluster. So the time that counts as
silence follows what answers take (as TCP's retransmission timer does, RFC 6298), and second
attempts come out of a budget: a cluster that is slow everywhere is not asked twice for everything.
"""

from __future__ import annotations

FIRST_S = 1.0  # before anything is known
MIN_S = 0.2
MAX_S = 3.0
BUDGET = 10.0  # second attempts that may be made in a row
EARNED = 0.1  # of one, by each answered request
ATTEMPT_MIN_S = 2.0
ATTEMPT_MAX_S = 30.0


class Hedging:
    """What is normal for one kind of requests; times in seconds."""

    def __init__(self) -> None:
        self._smoothed_s: float | None = None
        self._deviation_s = 0.0
        self._budget = BUDGET
        self._patience = 1.0

    @property
    def delay_s(self) -> float:
        """An attempt that takes longer is joined by one to another node."""
        if self._smoothed_s is None:
            return FIRST_S
        return min(max(self._smoothed_s + 4 * self._deviation_s, MIN_S), MAX_S)

    @property
    def attempt_s(self) -> float:
        """An attempt that takes longer is given up. Each that was, and told nothing about how long
        an answer takes now, doubles it: or a cluster that has become slow would never be heard.
        """
        return min(max(8 * self.delay_s, ATTEMPT_MIN_S) * self._patience, ATTEMPT_MAX_S)

    def timed_out(self) -> None:
        """An attempt was given up."""
        self._patience = min(2 * self._patience, 16.0)

    def answered(self, took_s: float) -> None:
        """A node answered, `took_s` after it was asked."""
        self._patience = 1.0
        if self._smoothed_s is None:
            self._smoothed_s, self._deviation_s = took_s, took_s / 2
        else:
            off = abs(self._smoothed_s - took_s)
            self._deviation_s += (off - self._deviation_s) / 4
            self._smoothed_s += (took_s - self._smoothed_s) / 8
        self._budget = min(self._budget + EARNED, BUDGET)

    def spend(self) -> bool:
        """May one more second attempt be made now?"""
        if self._budget < 1:
            return False
        self._budget -= 1
        return True
