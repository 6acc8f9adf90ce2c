"""The book of a node's processes: when each began, what may end it, what has to, and how it ended.

Every start is one entry, and so is every reason that a fault gives for an end. An end is explained
when a reason that was open at that moment names its exit code; an end that is owed has to come in
time. Nothing else decides whether a process ended well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

FOREVER = float("inf")
LENIENT_S = 1.0  # an end is noticed a moment after it came
KILLED = -9


@dataclass
class Reason:
    """Why processes of a node may end, and how.

    Attributes:
        codes: exit codes; signals are negative.
        process: number of the one that it is about; 0: whichever runs.
        asked: somebody sent the signal for it; else it is what a fault may lead to.
        owed_by: by then the process has to have ended; FOREVER: it may go on.
        saying: what its last line has to contain.
    """

    codes: tuple[int, ...]
    why: str
    since: float
    until: float = FOREVER
    process: int = 0
    asked: bool = False
    owed_by: float = FOREVER
    saying: str = ""

    def explains(self, life: Life) -> bool:
        return (
            self.process in (0, life.number)
            and life.code in self.codes
            and self.since <= life.ended <= self.until + LENIENT_S
            and self.saying in life.said
        )


@dataclass
class Life:
    """One process, the `number`-th of its node. Times are time.monotonic()."""

    number: int
    began: float
    ended: float = FOREVER
    code: int | None = None
    said: str = ""  # its last line


@dataclass
class Book:
    """Of one node."""

    node_id: int
    lives: list[Life] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)

    def begin(self, now: float) -> Life:
        """A process was started; the one before has ended, and that was noted."""
        assert self.running is None, f"node {self.node_id} already runs"
        life = Life(len(self.lives) + 1, now)
        self.lives.append(life)
        return life

    @property
    def running(self) -> Life | None:
        """The process that has begun and, as far as is known, not ended."""
        return self.lives[-1] if self.lives and self.lives[-1].code is None else None

    def end(self, code: int, now: float, said: str = "") -> Life:
        """The process that ran has ended."""
        life = self.running
        assert life is not None, f"no process of node {self.node_id} is known to run"
        life.ended, life.code, life.said = now, code, said
        return life

    def may_end(
        self,
        codes: tuple[int, ...],
        why: str,
        now: float,
        *,
        life: Life | None = None,
        asked: bool = False,
        owed_by: float = FOREVER,
        saying: str = "",
    ) -> Reason:
        """From now on, until the reason is closed, a process may end like this; one that is given
        as `life` and nobody else."""
        assert life is not None or owed_by == FOREVER, "nobody in particular owes nothing"
        number = life.number if life is not None else 0
        reason = Reason(codes, why, now, FOREVER, number, asked, owed_by, saying)
        self.reasons.append(reason)
        return reason

    def explained(self, life: Life) -> bool:
        return any(reason.explains(life) for reason in self.reasons)

    def asked(self, life: Life) -> bool:
        """Did it end because somebody sent it a signal for that?"""
        return any(reason.asked and reason.explains(life) for reason in self.reasons)

    def open_codes(self, now: float) -> set[int]:
        """How a process may end now, other than by a signal that somebody sends it."""
        return {
            code
            for reason in self.reasons
            if not reason.asked and reason.since <= now <= reason.until + LENIENT_S
            for code in reason.codes
        }

    def findings(self) -> list[str]:
        """Ends that nothing explains, and ends that were owed and did not come in time."""
        found = [
            f"no fault explains that {self.describe(life)}"
            for life in self.lives
            if life.code is not None and not self.explained(life)
        ]
        for reason in self.reasons:
            if reason.owed_by == FOREVER:
                continue
            life = self.lives[reason.process - 1]
            if life.ended > reason.owed_by + LENIENT_S:
                late = "goes on" if life.code is None else f"ended only with {life.code}, too late"
                found.append(
                    f"process {life.number} of node {self.node_id} has to end with "
                    f"{' or '.join(map(str, reason.codes))} ({reason.why}), and {late}"
                )
        return found

    def describe(self, life: Life) -> str:
        took_s = life.ended - life.began
        return (
            f"process {life.number} of node {self.node_id} ended with {life.code} after "
            f"{took_s:.1f} s: {life.said}"
        )


@contextlib.contextmanager
def closing(reason: Reason, clock: Callable[[], float]) -> Iterator[Reason]:
    """Within, the reason is open; `clock` is asked for the time at which it is closed."""
    try:
        yield reason
    finally:
        reason.until = clock()
