"""What a run has come to."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from tests.nemesis.faults import Band
from tests.nemesis.histories import Searched
from tests.nemesis.plan import Plan
from tests.nemesis.resting import NOTHING, Usage

OK, FAILED, BROKEN_OFF = "ok", "FAILED", "broken off"


@dataclass
class Outcome:
    """Times are seconds since the clients began.

    Attributes:
        folder: where the log, the picture and what is kept of a run are.
        problems: findings; without them, and not broken off, it has passed.
        broken: why it was not carried out to its end, other than by a problem.
        exits: ends of processes that nobody asked for, explained or not.
        lacking: what this machine does not have.
        drawn: faults that came, by kind.
        effective: those of them that had an effect.
        besides: what there is of the workloads that not every plan asks for.
        led: terms that had a leader.
        peak: of any node under load.
        rest: of any node when all was over.
    """

    plan: Plan
    folder: Path
    problems: list[str] = field(default_factory=list)
    broken: str = ""
    exits: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    bands: list[Band] = field(default_factory=list)
    acknowledged_at: list[float] = field(default_factory=list)
    read_at: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # answers, by status
    drawn: dict[str, int] = field(default_factory=dict)
    effective: dict[str, int] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)  # besides, such as flipped bits
    besides: dict[str, int] = field(default_factory=dict)
    operations: int = 0
    load_s: float = 0.0
    leader_after_s: float = 0.0  # from the last fault to a leader that everybody names
    led: int = 0
    boots: int = 0
    peak: Usage = NOTHING
    rest: Usage = NOTHING
    searched: Searched = field(default_factory=Searched)

    @property
    def verdict(self) -> str:
        return FAILED if self.problems else BROKEN_OFF if self.broken else OK

    @property
    def leader_changes(self) -> int:
        return max(0, self.led - 1)

    @property
    def longest_gap_s(self) -> float:
        """The longest time without an acknowledged write."""
        times = [0.0, *self.acknowledged_at, self.load_s]
        return max(b - a for a, b in itertools.pairwise(sorted(times)))
