"""The judges of the nemesis find what they are for, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.linearizability.checker import FOREVER, Operation
from tests.nemesis import verdicts
from tests.nemesis.workload import Eventual, Records


def sound() -> Records:
    """A write, a swap, reads of both, a write nobody heard of again, and two keys of a set."""
    records = Records()
    records.history["r/0"] = [
        Operation(0, 0, 1, "write", "a", 5),
        Operation(1, 2, 3, "cas", (5, "b"), 6),
        Operation(0, 4, 5, "read", None, (6, "b")),
        Operation(1, 6, FOREVER, "write", "c"),
        Operation(2, 7, 8, "cas", (6, "d"), ("is", 9)),
        Operation(0, 9, FOREVER, "cas", (9, "e")),
        Operation(2, 10, 11, "read", None, (12, "e")),
    ]
    records.history["c/0"] = [
        Operation(0, 0, 1, "cas", (None, "1 x"), 2),
        Operation(1, 2, FOREVER, "cas", (2, "2 y")),
    ]
    records.eventual = [
        Eventual(1, 1, 0, 1, 5, "r/0", 5, "a"),
        Eventual(1, 1, 2, 3, 6, "r/0", 6, "b"),
        Eventual(1, 2, 4, 5, 5, "r/0", 5, "a"),  # of the next process, which may be behind
    ]
    records.collected = {"s/1": "one"}
    records.attempted = {"s/2": "two"}
    records.refused = {"never"}
    return records


def judged(records: Records, held: dict[str, str] | None = None) -> list[str]:
    held = {"s/1": "one", "s/2": "two"} if held is None else held
    return [
        *verdicts.linearizable(records),
        *verdicts.eventual_reads(records),
        *verdicts.nothing_lost(records, {1: held}),
        *verdicts.refused_stays_undone(records, held),
        *verdicts.counted(records, {"c/0": held.get("c/0", "2 y")}),
    ]


def test_a_sound_run_is_passed() -> None:
    """Unknown outcomes may have happened or not, whether somebody has seen them or only their
    revision."""
    assert judged(sound()) == []
    assert judged(sound(), {"s/1": "one"}) == []


def stale_read(records: Records) -> None:
    records.history["r/0"].append(Operation(3, 12, 13, "read", None, (6, "b")))


def lost_update(records: Records) -> None:
    records.history["r/0"].append(Operation(3, 12, 13, "cas", (6, "f"), 14))


def revision_from_nowhere(records: Records) -> None:
    records.history["r/0"].append(Operation(3, 12, 13, "cas", (6, "f"), ("is", 13)))


def happened_twice(records: Records) -> None:
    records.history["r/0"].append(Operation(3, 12, 13, "read", None, (14, "e")))


def back_in_time(records: Records) -> None:
    records.eventual.append(Eventual(1, 1, 4, 5, 5, "r/0", 5, "a"))


def made_up(records: Records) -> None:
    records.eventual.append(Eventual(1, 1, 4, 5, 7, "r/0", 7, "z"))


def lost(records: Records) -> None:
    records.collected["s/3"] = "three"


def refused_and_done(records: Records) -> None:
    records.refused.add("two")


def counted_too_often(records: Records) -> None:
    records.history["c/0"].pop()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (stale_read, "not linearizable"),
        (lost_update, "not linearizable"),
        (revision_from_nowhere, "not linearizable"),
        (happened_twice, "not linearizable"),
        (back_in_time, "process 1: revision 5"),
        (made_up, "which nobody wrote"),
        (lost, "lost 1 of 2 acknowledged keys: s/3"),
        (refused_and_done, "outcome none, and happened"),
        (counted_too_often, "counter c/0 is 2"),
    ],
)
def test_every_breach_is_found(spoil: Callable[[Records], None], said: str) -> None:
    """One wrong answer in a sound run is enough, and the sentence says which."""
    records = sound()
    spoil(records)
    assert said in "\n".join(judged(records))
