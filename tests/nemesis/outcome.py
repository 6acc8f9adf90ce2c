"""What a run has come to."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.nemesis.faults import Band, Faults
from tests.nemesis.histories import Searched
from tests.nemesis.plan import KINDS, Plan
from tests.nemesis.resting import NOTHING, Usage

OK, FAILED, BROKEN_OFF = "ok", "FAILED", "broken off"
UNHARMED = "no fault had an effect: nothing is shown"


@dataclass
class Outcome:
    """Times are seconds since the clients began.

    Attributes:
        folder: where the log, the picture and what is kept of a run are.
        problems: findings; without them, and not broken off, it has passed.
        broken: why it was not carried out as it was meant, other than by a problem.
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

    def tell_of(self, faults: Faults, began: float) -> None:
        """What became of them. A cluster that nothing was done to proves nothing by working.

        Args:
            began: when the clients began.
        """
        faults.look_back()
        self.bands = [
            replace(band, began=band.began - began, ended=(band.ended or time.monotonic()) - began)
            for band in faults.bands
        ]
        self.drawn = dict(sorted(faults.drawn.items()))
        self.effective = dict(sorted(faults.effective.items()))
        self.seen = dict(sorted(faults.counts.items()))
        if not self.effective.keys() & KINDS.keys():  # growth is none of them
            self.broken = self.broken or UNHARMED

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
