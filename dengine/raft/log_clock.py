"""The time that the log counts, in milliseconds: by it TTLs and leases end.

Each leader's clock runs on from what it knows when it begins, so the time that passes under leaders
is counted, and hardly anything else. Every member keeps two registers for that, a log time and when
it has learned of it, which run on with its own monotonic clock: always one base and one difference,
never a sum of rounded steps.

- What the leader has last said in a heartbeat. It counts while our log ends in that leader's term,
  for then all of it is in that leader's log as well (5.3). An entry that a leader lacks may have
  been written by one that knew less, and may be committed after all: by that leader's time it would
  end early.
  Within a term the later word is the newer one and replaces what the register shows, also where
  that is more: no two clocks run alike, and in a leader's time of months a faster one would get
  minutes ahead of what that leader writes.
- The last entry of our log that carries a time. It counts for as long as it is there. A word that
  is older counts no more, for by a clock that is faster than that leader's it shows more than the
  entry does.

A leader begins at the later of the two, or at what is committed if that is later still. So nothing
ends early: by induction over the terms, a leader's clock never shows more than the time of any
entry in its log plus what has truly passed since that entry was written. A member that was frozen
or suspended leads nobody with what it counts, for what it proposes must still be committed.

Readings are whole milliseconds, rounded down, so one more may lie between two of them than has
passed. Within one leader's time that is one millisecond (a TTL is given one more); but each
register that takes over would add another. So a register counts from the reading after the one at
which it has learned of a time.
"""

from __future__ import annotations

from typing import NamedTuple

from dengine.raft.types import LogId


class _Register(NamedTuple):
    """It stood at `base_ms` when our clock read `since_ms`; at 0 nothing is known."""

    base_ms: int = 0
    since_ms: int = 0

    def at(self, now_ms: int) -> int:
        return self.base_ms + max(now_ms - self.since_ms, 0) if self.base_ms else 0


def _from(clock_ms: int, now_ms: int) -> _Register:
    return _Register(clock_ms, now_ms + 1)


class LogClock:
    """Both registers. All arguments called `now_ms` are readings of one clock that never goes back.

    It stands at 0 until it is started, or the first time is learned.
    """

    def __init__(self) -> None:
        self._heard = (0, 0)  # term and time of the last word, or of an entry after it
        self._word = _Register()
        self._entry_index = 0  # of the last entry that carries a time
        self._entry = _Register()

    def at(self, now_ms: int) -> int:
        """The log time: a leader's own, and what anybody else would guess."""
        return max(self._word.at(now_ms), self._entry.at(now_ms))

    def hear(self, term: int, clock_ms: int, last_term: int, now_ms: int) -> None:
        """It is `clock_ms` at least, as the leader of `term` says in a heartbeat, perhaps late. 0
        says nothing, and neither does what was said before the last word that was heard.

        Args:
            last_term: in which our log ends.
        """
        if clock_ms and term == last_term and (term, clock_ms) > self._heard:
            self._heard = (term, clock_ms)
            self._word = _from(clock_ms, now_ms)

    def learn(self, log_id: LogId, clock_ms: int, now_ms: int) -> None:
        """The last entry of our log that carries a time is that at `log_id`, with `clock_ms`."""
        self._entry_index, self._entry = log_id.index, _from(clock_ms, now_ms)
        if (log_id.term, clock_ms) >= self._heard:
            self._heard = (log_id.term, clock_ms)
            self._word = _Register()

    def truncated(self, index: int) -> None:
        """Our log has lost its entries from `index` on."""
        if index <= self._entry_index:
            self._entry = _Register()

    def lead(self, term: int, last_term: int, now_ms: int) -> None:
        """We lead in `term`, with a log that has ended in `last_term` so far."""
        if self._heard[0] != last_term:
            self._word = _Register()
        self._word = max(self._word, self._entry, key=lambda register: register.at(now_ms))
        self._heard = (term, 0)

    def start(self, at_least_ms: int, now_ms: int) -> None:
        """We lead, and an entry that is committed carries `at_least_ms`. Where nobody has known a
        time before, it begins."""
        at_least_ms = max(at_least_ms, 1)
        if at_least_ms > self.at(now_ms):
            self._word = _from(at_least_ms, now_ms)
