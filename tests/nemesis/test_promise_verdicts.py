"""The judges of TTLs, watches, locks and keys find what they are for, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.linearizability.checker import FOREVER, Operation
from tests.nemesis.locks import CERTAIN, FENCED, GUARDED, HELD, WRITE, Note
from tests.nemesis.promise_verdicts import SWAPPED, WRITTEN, Count, promises_kept
from tests.nemesis.ranges import Change, Range, only
from tests.nemesis.watchers import Event, Gap, Told, Watched
from tests.nemesis.workers import Increment, TtlLook, TtlPut
from tests.nemesis.workload import Records

COUNTS = {SWAPPED: Count("2 x", 2), WRITTEN: Count("0 y", 1)}
KEPT = 1  # revisions of the history


def sound() -> Records:
    """Keys that end and one that does not, put anew and of unknown outcome; a watcher of all of it,
    one of a part and one who has missed some; a lock that is lost; and counters."""
    records = Records()
    records.history = {
        "r/0": [
            Operation(0, 0, 1, "write", "a", 1),
            Operation(1, 2, 3, "cas", (1, "b"), 4),
            Operation(1, 2, 3, "cas", (1, "c"), ("is", 4)),
            Operation(2, 5, FOREVER, "write", "d"),
        ]
    }
    records.passing.puts = [
        TtlPut("t/1", "1", 2, 10.0, 10.5, 2),
        TtlPut("t/2", "2", 3600, 10.0, 10.5, 3),
        TtlPut("t/3", "3", 3600, 10.0, 10.1, 5),
        TtlPut("t/3", "3 again", 1, 20.0),
    ]
    records.passing.looks = [
        TtlLook("t/1", 9.0, 9.1, None),
        TtlLook("t/1", 10.6, 11.9, "1"),
        TtlLook("t/1", 11.95, 12.05, None),
        TtlLook("t/1", 13.0, 13.1, None),
        TtlLook("t/2", 10.2, 10.4, None),
        TtlLook("t/2", 90.0, 90.1, "2"),
        TtlLook("t/3", 20.5, 20.9, "3"),
        TtlLook("t/3", 21.0, 21.1, None),
    ]
    records.passing.rested_at, records.passing.late_s = 60.0, 2.0
    note = Note(1, HELD, 8, 30.0)
    records.holds.notes = [
        note,
        replace(note, what=CERTAIN, called=30.5),
        write(1, 8, GUARDED, 30.6, 9),
        Note(2, HELD, 10, 40.0),
        write(2, 10, FENCED, 40.1, 12),
        write(2, 10, GUARDED, 40.3, 13),
        write(1, 8, GUARDED, 41.0, 0),
        replace(write(1, 8, FENCED, 30.9, 0), returned=FOREVER, accepted=None),
    ]
    everything = [
        Told(1.0, 1, 1, (put("r/0", "a"),)),
        Told(10.3, 1, 2, (put("t/1", "1"),)),
        Told(10.3, 1, 3, (put("t/2", "2"),)),
        Told(10.3, 1, 4, (put("r/0", "b"),)),
        Told(10.4, 1, 5, (put("t/3", "3"),)),
        Told(10.5, 1, 5),
        Told(12.2, 2, 6, (ended("t/1"),)),
        Told(20.9, 2, 7, (put("t/3", "3 again"),)),
        Told(30.0, 2, 8, (put("_lock/nemesis/1", ""),)),
        Told(30.7, 2, 9, (put(GUARDED, token(8, 30.6)),)),
        Told(33.0, 3, 10, (ended("_lock/nemesis/1"), ended("t/3"))),
        Told(41.0, 3, 11, (put(FENCED, token(8, 30.9)),)),
        Told(41.0, 3, 12, (put(FENCED, token(10, 40.1)),)),
        Told(41.0, 3, 13, (put(GUARDED, token(10, 40.3)),)),
    ]
    of_r = [replace(told, at=told.at + 1) for told in everything if told.revision in (1, 4)]
    missed = [told for told in everything if told.revision not in (3, 4, 5)]
    records.watched = [
        Watched(0, "", everything, position=14),
        Watched(1, "r/", of_r, position=5),
        Watched(2, "", missed, [Gap(3, 4, 5)], position=14),
    ]
    records.increments = [
        Increment(SWAPPED, "c:1", [(200, 20), (200, 20)], 2, True),
        Increment(SWAPPED, "c:2", [(412, 20)], 0, False),
        Increment(SWAPPED, "c:3", [], 3),
        Increment(WRITTEN, "c:4", [(200, 21)], 0, True),
    ]
    return records


def put(key: str, value: str) -> Event:
    return Event("put", key, value)


def ended(key: str) -> Event:
    return Event("expire", key, None)


def token(number: int, name: float) -> str:
    return f"{number:020} {name}"


def write(holder: int, number: int, key: str, called: float, revision: int) -> Note:
    """Refused with revision 0."""
    value = token(number, called)
    done = (called + 0.1, key, value, revision > 0, revision)
    return Note(holder, WRITE, number, called, *done)


def held_in_the_end() -> dict[str, str]:
    """What matters of it."""
    return {GUARDED: token(10, 40.3), FENCED: token(10, 40.1)}


def judged(records: Records) -> list[str]:
    return promises_kept(records, COUNTS, held_in_the_end(), KEPT)


def test_a_sound_run_is_passed() -> None:
    """Whether what nobody knows has happened or not."""
    assert judged(sound()) == []
    records = sound()
    counts = {**COUNTS, SWAPPED: Count("1 x", 1)}
    assert promises_kept(records, counts, held_in_the_end(), KEPT) == []


@pytest.mark.parametrize(
    ("done_at", "told_at", "type_", "right"),
    [(6, 6, "delete", True), (0, 6, "delete", True), (5, 6, "delete", False), (6, 6, "x", False)],
)
def test_watchers_are_told_of_deletions_that_somebody_did(
    done_at: int, told_at: int, type_: str, right: bool
) -> None:
    """At its revision, if that is known."""
    records = Records()
    records.ranged.changes = [
        Change(only("d/1"), 0, "1", None, 1, 4),
        Change(Range("d/", "d0"), 2, revision=done_at),
    ]
    events = (Event(type_, "d/1", None),)
    told = [Told(1.0, 1, 4, (put("d/1", "1"),)), Told(2.0, 1, told_at, events)]
    records.watched = [Watched(0, "", told)]
    found = promises_kept(records, {}, None, KEPT)
    assert found == (
        [] if right else [f"watcher 0 was told of {type_} d/1 '' at 6, which nobody did"]
    )


def test_a_run_that_broke_off_is_judged_by_what_it_has() -> None:
    records = sound()
    records.passing.rested_at = FOREVER
    records.watched = [Watched(0, ""), Watched(1, "r/", [Told(2.0, 1, 1, (put("r/0", "a"),))])]
    records.watched[1].position = 2
    assert promises_kept(records, {}, None, KEPT) == []


# --- TTLs -----------------------------------------------------------------------------------------


def gone_early(records: Records) -> None:
    """Asked after it was acknowledged, and told before its time: an instant early is early."""
    records.passing.looks.append(TtlLook("t/1", 10.6, 11.99, None))


def gone_as_the_older_put_had_it(records: Records) -> None:
    """Put anew for long, and it goes with the time of the put before."""
    records.passing.puts.append(TtlPut("t/1", "1 again", 3600, 11.0, 11.1, 30))
    records.passing.looks.append(TtlLook("t/1", 12.0, 12.5, None))


def gone_earlier_than_what_may_have_been_put(records: Records) -> None:
    records.passing.looks.append(TtlLook("t/3", 20.5, 20.95, None))


def gone_sooner_than_what_came_late(records: Records) -> None:
    """A put that was never answered may have come after the next one, and not before that."""
    records.passing.puts.append(TtlPut("t/6", "6", 2, 5.0))
    records.passing.puts.append(TtlPut("t/6", "6 again", 3600, 10.0, 10.1, 30))
    records.passing.looks.append(TtlLook("t/6", 11.0, 11.5, None))


def told_of_its_end_early(records: Records) -> None:
    change_told(records, 0, 6, at=11.9)


def told_of_no_end(records: Records) -> None:
    """It is gone, and nobody who follows it knows."""
    records.passing.looks.append(TtlLook("t/1", 70.0, 70.1, None))
    del records.watched[0].told[6]
    del records.watched[2].told[2]


def still_there(records: Records) -> None:
    records.passing.puts.append(TtlPut("t/4", "4", 3, 58.0, 58.1, 40))
    records.passing.looks.append(TtlLook("t/4", 65.1, 65.2, "4"))


def put_without_an_answer_and_still_there(records: Records) -> None:
    records.passing.looks.append(TtlLook("t/3", 63.1, 63.2, "3 again"))


def come_back(records: Records) -> None:
    records.passing.looks.append(TtlLook("t/1", 14.0, 14.1, "1"))


def not_what_was_put(records: Records) -> None:
    records.passing.looks.append(TtlLook("t/2", 14.0, 14.1, "1"))


def put_anew_and_old(records: Records) -> None:
    records.passing.puts.append(TtlPut("t/2", "2 again", 3600, 11.0, 11.1, 30))


# --- watches --------------------------------------------------------------------------------------


def change_told(records: Records, number: int, revision: int, **changes: object) -> None:
    """What a watcher was told of this revision."""
    told = records.watched[number].told
    place = next(n for n, one in enumerate(told) if one.revision == revision and one.events)
    told[place] = replace(told[place], **changes)  # type: ignore[arg-type]


def told_again(records: Records) -> None:
    """At another node, which was behind."""
    told = records.watched[0].told
    told.insert(8, replace(told[4], at=21.0))


def told_before_what_is_lower(records: Records) -> None:
    told = records.watched[1].told
    told.reverse()


def torn(records: Records) -> None:
    """One revision in two messages."""
    change_told(records, 0, 10, events=(ended("_lock/nemesis/1"),))
    records.watched[0].told.insert(11, Told(33.0, 3, 10, (ended("t/3"),)))


def behind_its_own_progress(records: Records) -> None:
    records.watched[0].told.insert(2, Told(10.3, 1, 4))


def nobody_wrote_it(records: Records) -> None:
    change_told(records, 0, 4, events=(put("r/0", "b"), put("r/1", "b")))


def refused_and_shown(records: Records) -> None:
    change_told(records, 0, 4, events=(put("r/0", "c"),))


def another_value(records: Records) -> None:
    change_told(records, 0, 1, events=(put("r/0", "d"),))


def another_revision(records: Records) -> None:
    records.watched[1].told[1] = replace(records.watched[1].told[1], revision=3)


def nobody_deleted_it(records: Records) -> None:
    change_told(records, 0, 6, events=(Event("delete", "t/1", None),))


def ended_without_a_time(records: Records) -> None:
    change_told(records, 0, 6, events=(ended("t/1"), ended("r/0")))


def not_followed(records: Records) -> None:
    change_told(records, 1, 4, events=(put("r/0", "b"), put("t/1", "1")))


def not_followed_nor_written(records: Records) -> None:
    change_told(records, 1, 4, events=(put("r/0", "b"), put("_lock/nemesis/1", "")))


def lost(records: Records) -> None:
    del records.watched[0].told[2]


def lost_by_who_follows_a_part(records: Records) -> None:
    del records.watched[1].told[1]


def lost_before_the_gap(records: Records) -> None:
    del records.watched[2].told[1]


def twice_at_once(records: Records) -> None:
    change_told(records, 0, 4, events=(put("r/0", "b"), put("r/0", "b")))


def twice_without_an_answer(records: Records) -> None:
    """A write of unknown outcome that happened, and again."""
    for number in (0, 2):
        told = records.watched[number].told
        told += [Told(50.0, 1, revision, (put("r/0", "d"),)) for revision in (14, 15)]
        records.watched[number].position = 16


def told_otherwise(records: Records) -> None:
    """Of what nobody knows whether it has happened: one has seen it, and one has not."""
    del records.watched[2].told[-3]


def told_otherwise_of_an_end(records: Records) -> None:
    change_told(records, 2, 10, events=(ended("_lock/nemesis/1"),))


def told_otherwise_than_who_was_there(records: Records) -> None:
    """The first of them has passed over most of it, and the other two tell what it cannot."""
    records.watched[0].gaps.append(Gap(1, 8, 12))
    records.watched[0].told[:-1] = []
    change_told(records, 2, 8, events=(put("_lock/nemesis/2", ""),))
    records.watched.append(replace(records.watched[2], number=3, told=[*records.watched[2].told]))
    change_told(records, 3, 8, events=(put("_lock/nemesis/3", ""),))


def sent_away_for_nothing(records: Records) -> None:
    records.watched[2].gaps[0] = Gap(3, 2, 5)


def gone_too_soon(records: Records) -> None:
    """Who asked for it was late, and not so late that the history need not have it any more."""
    records.watched[2].gaps[0] = Gap(3, 5, 5)


# --- locks ----------------------------------------------------------------------------------------


def written_behind_a_later_holder(records: Records) -> None:
    records.holds.notes.append(write(1, 8, FENCED, 39.0, 30))


def shown_behind_a_later_holder(records: Records) -> None:
    """Of unknown outcome: only a watcher knows."""
    for number in (0, 2):
        change_told(records, number, 11, events=(put(FENCED, token(10, 40.1)),))
        change_told(records, number, 12, events=(put(FENCED, token(8, 30.9)),))


def one_token_for_two(records: Records) -> None:
    records.holds.notes.append(Note(2, HELD, 8, 31.0))


def two_at_once(records: Records) -> None:
    records.holds.notes.append(Note(1, CERTAIN, 8, 40.1))


def written_by_who_has_lost_it(records: Records) -> None:
    """Before the new holder has written: the order of the tokens says nothing."""
    records.holds.notes.append(write(1, 8, GUARDED, 40.2, 12))


# --- keys -----------------------------------------------------------------------------------------


def answered_differently(records: Records) -> None:
    records.increments[0].answers.append((412, 20))


def two_at_one_revision(records: Records) -> None:
    records.increments[2] = Increment(SWAPPED, "c:3", [(200, 20)], 0, True)


def carried_out_twice(records: Records) -> None:
    del records.increments[3]


def lost_increment(records: Records) -> None:
    records.increments += [
        Increment(WRITTEN, "c:5", [(200, 22)], 0, True),
    ]


def told_that_it_did_not_happen(records: Records) -> None:
    records.increments[3] = Increment(WRITTEN, "c:4", [], 1, False)


def refused_without_a_condition(records: Records) -> None:
    records.increments.append(Increment(WRITTEN, "c:5", [(412, 21)], 0, False))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (gone_early, "t/1 was not there for who asked at 10.600 and was told at 11.990"),
        (gone_as_the_older_put_had_it, "t/1 was not there for who asked at 12.000"),
        (gone_earlier_than_what_may_have_been_put, "t/3 was not there for who asked at 20.500"),
        (gone_sooner_than_what_came_late, "t/6 was not there for who asked at 11.000"),
        (told_of_its_end_early, "watcher 0: t/1 ended by revision 6, told at 11.900"),
        (told_of_no_end, "watcher 0 was not told of the end of t/1, which is gone"),
        (still_there, "t/4 was still there for who asked at 65.100"),
        (put_without_an_answer_and_still_there, "t/3 was still there for who asked at 63.100"),
        (come_back, "t/1 was gone for who asked at 11.950, and back for who asked at 14.000"),
        (not_what_was_put, "t/2 is '1', which nobody had put"),
        (put_anew_and_old, "t/2 was '2' for who asked at 90.000, and was put anew by 11.100"),
        (told_again, "watcher 0 was told of revision 5 by node 1 at 21.000"),
        (told_before_what_is_lower, "watcher 1 was told of revision 1 by node 1"),
        (torn, "watcher 0 was told of revision 10 by node 3 at 33.000, and of everything up to 10"),
        (behind_its_own_progress, "watcher 0 was told of revision 3 by node 1 at 10.300"),
        (nobody_wrote_it, "put r/1 'b' at 4, which nobody wrote"),
        (refused_and_shown, "put r/0 'c' at 4, which nobody wrote"),
        (another_value, "watcher 0 was not told that r/0 was written at revision 1"),
        (another_revision, "put r/0 'b' at 3, and who wrote it was told of revision 4"),
        (nobody_deleted_it, "delete t/1 '' at 6, which nobody did"),
        (ended_without_a_time, "expire r/0 '' at 6, which nobody did"),
        (not_followed, "put t/1 '1' at 4, and follows 'r/'"),
        (not_followed_nor_written, "put _lock/nemesis/1 '' at 4, and follows 'r/'"),
        (lost, "watcher 0 was not told that t/2 was written at revision 3"),
        (lost_by_who_follows_a_part, "watcher 1 was not told that r/0 was written at revision 4"),
        (lost_before_the_gap, "watcher 2 was not told that t/1 was written at revision 2"),
        (twice_at_once, "watcher 0 was told 2 times of put r/0 'b'"),
        (twice_without_an_answer, "watcher 0 was told 2 times of put r/0 'd'"),
        (told_otherwise, "watchers 2 and 0 were told otherwise of revision 11"),
        (told_otherwise_of_an_end, "watchers 2 and 0 were told otherwise of revision 10"),
        (told_otherwise_than_who_was_there, "watchers 3 and 2 were told otherwise of revision 8"),
        (sent_away_for_nothing, "asked for revision 3 and was told that all up to 2 is gone"),
        (gone_too_soon, "asked for revision 3 and was told that all up to 5 is gone: by 5"),
        (written_behind_a_later_holder, "g/fenced was written under token 8 at revision 30"),
        (shown_behind_a_later_holder, "g/fenced was written under token 8 at revision 12"),
        (one_token_for_two, "held 2 times under token 8"),
        (two_at_once, "under token 8 for certain at 40.100, and under 10 since 40.000"),
        (written_by_who_has_lost_it, "asked for at 40.200, and 10 held the lock since 40.000"),
        (answered_differently, "c:1 for n/swapped was answered by"),
        (two_at_one_revision, "2 increments of n/swapped were done at revision 20"),
        (carried_out_twice, "n/written was changed 1 times, by 0 increments"),
        (lost_increment, "n/written was changed 1 times, by 2 increments"),
        (told_that_it_did_not_happen, "n/written was changed 1 times, by 0 increments"),
        (refused_without_a_condition, "c:5 for n/written was refused"),
    ],
)
def test_every_breach_is_found(spoil: Callable[[Records], None], said: str) -> None:
    """One wrong answer in a sound run is enough, and the sentence says which."""
    records = sound()
    spoil(records)
    assert said in "\n".join(judged(records))


def test_a_lock_that_outlives_its_holder_is_found() -> None:
    held = {**held_in_the_end(), "_lock/nemesis/7": ""}
    (found,) = promises_kept(sound(), COUNTS, held, KEPT)
    assert "_lock/nemesis/7 is there" in found


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (token(8, 30.6), "was written anew at revision 13"),
        (None, "was written anew at revision 13"),
        (token(8, 41.0), "which nobody wrote"),
    ],
)
def test_a_guarded_write_that_is_lost_is_found(value: str | None, said: str) -> None:
    """In the end there is an older one, or none, or one that was refused."""
    held = held_in_the_end() | {GUARDED: value or ""}
    if value is None:
        del held[GUARDED]
    (found,) = promises_kept(sound(), COUNTS, held, KEPT)
    assert found.startswith("g/guarded is ")
    assert said in found


def test_a_guarded_write_of_which_nobody_knows_may_be_the_last() -> None:
    held = held_in_the_end() | {FENCED: token(8, 30.9)}
    assert promises_kept(sound(), COUNTS, held, KEPT) == []


def test_a_counter_that_is_not_what_its_changes_make_of_it_is_found() -> None:
    counts = {**COUNTS, SWAPPED: Count("1 x", 2)}
    found = promises_kept(sound(), counts, held_in_the_end(), KEPT)
    assert found == ["n/swapped is '1 x' after 2 changes"]


def test_who_was_not_certain_to_hold_it_is_believed() -> None:
    """A holder that writes on is refused, and one that was too slow to say that it holds the lock
    may say so late."""
    records = sound()
    records.holds.notes += [Note(1, CERTAIN, 8, 39.9), Note(3, HELD, 9, 41.0)]
    assert judged(records) == []


def test_an_end_that_was_told_over_a_gap_says_nothing() -> None:
    """It may have been put anew meanwhile, for less."""
    records = sound()
    records.passing.puts.append(TtlPut("t/5", "5", 3600, 1.0, 1.1, 2))
    records.passing.puts.append(TtlPut("t/5", "5 again", 1, 10.0))
    told = [
        Told(1.2, 1, 2, (put("t/5", "5"),)),
        Told(12.2, 1, 6, (ended("t/5"),)),
    ]
    records.watched = [Watched(0, "", told, [Gap(3, 4, 5)], position=3)]
    assert not any("ended by" in problem for problem in judged(records))
