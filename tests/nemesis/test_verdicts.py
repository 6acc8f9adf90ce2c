"""The judges of the nemesis find what they are for, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.linearizability.checker import FOREVER, Operation
from tests.nemesis import verdicts
from tests.nemesis.histories import contradictions, search
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
        *map(str, contradictions(records)),
        *map(str, search(records.history).contradictions),
        *verdicts.eventual_reads(records),
        *verdicts.nothing_lost(records, {1: held}),
        *verdicts.refused_stays_undone(records, held.values()),
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


def forgotten(records: Records) -> None:
    records.eventual.append(Eventual(1, 1, 4, 5, 0, "r/0", 0, None))


def behind_itself(records: Records) -> None:
    records.eventual.append(Eventual(2, 1, 4, 5, 7, "r/0", 5, "a"))


def behind_what_a_swap_has_found(records: Records) -> None:
    records.eventual.append(Eventual(2, 1, 9, 10, 9, "r/0", 6, "b"))


def ahead_of_itself(records: Records) -> None:
    records.eventual.append(Eventual(2, 1, 4, 5, 5, "r/0", 6, "b"))


def lost_when_all_was_healed(records: Records) -> None:
    """What a node shows in the end is a read like any other."""
    records.history["s/1"] = [
        Operation(0, 0, 1, "write", "one", 3),
        Operation(9, 90, 91, "read", None, (0, None)),
    ]


def old_when_all_was_healed(records: Records) -> None:
    records.history["r/0"].append(Operation(9, 90, 91, "read", None, (6, "b")))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (stale_read, "not linearizable"),
        (lost_update, "not linearizable"),
        (revision_from_nowhere, "not linearizable"),
        (happened_twice, "not linearizable"),
        (back_in_time, "process 1: revision 5"),
        (made_up, "which nobody wrote"),
        (forgotten, "process 1: there was no r/0 at 4.000, and it had been read by 1.000"),
        (behind_itself, "at revision 7 r/0 has revision 5, and it was changed at 6"),
        (behind_what_a_swap_has_found, "has revision 6, and it was changed at 9"),
        (ahead_of_itself, "at revision 5 r/0 has revision 6, and it was changed at 5"),
        (lost_when_all_was_healed, "key s/1 is not linearizable, by search"),
        (lost_when_all_was_healed, "key s/1 is not linearizable, by revision"),
        (old_when_all_was_healed, "not linearizable"),
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


def test_a_key_may_be_missing_where_nobody_has_seen_it() -> None:
    """Another process of the node, or another node, may be behind; so may one that was asked before
    the answer that had the key was there."""
    records = sound()
    records.eventual += [
        Eventual(1, 2, 2, 3, 0, "r/0", 0, None),
        Eventual(2, 1, 6, 7, 0, "r/0", 0, None),
        Eventual(1, 1, 0.5, 7, 0, "r/0", 0, None),
    ]
    assert judged(records) == []


def test_nodes_that_differ_in_the_end_are_found() -> None:
    """In a value, or in a key that one of them lacks."""
    same = {1: {"r/0": "a"}, 2: {"r/0": "a"}, 3: {"r/0": "a"}}
    assert verdicts.same_everywhere(same) == []
    other = {**same, 3: {"r/0": "b"}}
    assert verdicts.same_everywhere(other) == ["nodes 1 and 3 differ in 1 keys: r/0"]
    assert verdicts.same_everywhere({**same, 2: {}}) == ["nodes 1 and 2 differ in 1 keys: r/0"]
    assert verdicts.same_everywhere({}) == []


SAID = """
2026-11-29T05:53:00Z INFO node 1: [Node 1] was here
[Node 1] Follower → Candidate (term 1)
[Node 1] Candidate → Leader (term 2)
[Node 1] Leader → Follower (term 3)
[Node 1] Candidate → Leader (term 5)
"""


def test_leaders_are_counted_from_what_nodes_say() -> None:
    """And two in one term are the worst that there is (paper 5.2)."""
    other = "[Node 2] Candidate → Leader (term 3)\n"
    led = verdicts.leaders([SAID, other])
    assert led == {2: [1], 3: [2], 5: [1]}
    assert verdicts.one_leader_a_term(led) == []
    led = verdicts.leaders([SAID, other, "[Node 3] Candidate → Leader (term 5)\n"])
    assert verdicts.one_leader_a_term(led) == ["term 5 had 2 leaders: nodes 1, 3"]


def test_terms_grow_with_what_was_done_and_no_more() -> None:
    """A node that comes back from 10 s alone with as many terms disturbs everybody."""
    assert verdicts.terms_explained([2, 3], 9, [("isolate", 10.0)]) == [
        "7 of 9 terms had no leader, and 1 faults explain 6"
    ]
    assert verdicts.terms_explained([2, 3], 8, [("isolate", 10.0)]) == []
    assert verdicts.terms_explained([2, 3], 18, [("slow sync", 6.0)]) == []
    assert verdicts.terms_explained([2, 3], 19, [("slow sync", 6.0)]) != []
    assert verdicts.terms_explained(range(2, 12), 12, []) == []


def test_a_leader_that_nobody_disturbs_stays() -> None:
    """But for a moment of a busy machine."""
    assert verdicts.leader_kept(7, 8, 1.0) == []
    assert verdicts.leader_kept(7, 9, 12.0) == []
    assert verdicts.leader_kept(7, 9, 11.0) == [
        "terms rose from 7 to 9 within 11 s without any fault"
    ]
