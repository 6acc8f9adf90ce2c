"""The time that the log counts, in milliseconds: by it TTLs and leases end.

Each leader's clock runs on from what it knows when it begins, so the time that passes under leaders
is counted, and hardly anything else. Every member keeps a register for that: a log time it has
learned of, when, and from the leader of which term. It runs on with the member's own monotonic
clock: always one base and one difference, never a sum of rounded steps. A leader begins at what its
register shows, or at the last entry of its log if that is later.

A later term's word replaces an earlier one's, also where it is less. A leader that knew less than
the one before it has begun anew from there, and whatever was written under it counts from there: to
go on from the older word would end that early. (Whoever can be elected holds all that was committed
under that leader, so it has heard of its time.) Within a term the later time is the newer one, and
it replaces what the register shows, also where that is more: no two clocks run alike, and in a
leader's time of months a faster one would get minutes ahead of what that leader writes.

Readings are whole milliseconds, rounded down, so one more may lie between two of them than has
passed. Within one leader's time that is one millisecond (a TTL is given one more); but each
register that takes over would add another. So a register counts from the reading after the one at
which it has learned of a time.

So nothing ends early: by induction over the terms, a leader's clock never shows more than an
entry's time plus what has truly passed since that entry was written. A member that was frozen or
suspended leads nobody with what it counts, for what it proposes must still be committed.
"""

from __future__ import annotations


class LogClock:
    """The register. All arguments called `now_ms` are readings of one clock that never goes back.

    It stands at 0 until it is started, or the first time is learned.
    """

    def __init__(self) -> None:
        self._heard = (0, 0)  # the last word: term and time
        self._base_ms = 0
        self._base_at_ms = 0

    def at(self, now_ms: int) -> int:
        """The log time."""
        return self._base_ms + max(now_ms - self._base_at_ms, 0) if self._base_ms else 0

    def start(self, at_least_ms: int, now_ms: int) -> None:
        """We lead, and an entry that is committed carries `at_least_ms`. Where nobody has known a
        time before, it begins."""
        at_least_ms = max(at_least_ms, 1)
        if at_least_ms > self.at(now_ms):
            self._count_from(at_least_ms, now_ms)

    def learn(self, term: int, clock_ms: int, now_ms: int) -> None:
        """It is `clock_ms` at least, as the leader of `term` has said: in a heartbeat, or by an
        entry, perhaps long ago. 0 says nothing, and neither does what was said before the last
        word that was heard."""
        if clock_ms and (term, clock_ms) > self._heard:
            self._heard = (term, clock_ms)
            self._count_from(clock_ms, now_ms)

    def _count_from(self, clock_ms: int, now_ms: int) -> None:
        self._base_ms, self._base_at_ms = clock_ms, now_ms + 1
