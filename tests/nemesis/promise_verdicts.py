"""What a run must have kept of four promises: what is put for a time has it, a watch shows every
change once, a lock has one holder, and what is repeated under a key happens once.

Each judge yields sentences about what it found wrong.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from tests.linearizability.checker import FOREVER
from tests.nemesis.histories import value_of
from tests.nemesis.locks import CERTAIN, FENCED, GUARDED, WRITE, Holds, Note, token_of
from tests.nemesis.verdicts import SHOWN_MAX
from tests.nemesis.watchers import Event, Watched
from tests.nemesis.workers import COUNTED, Increment, Passing, TtlLook, TtlPut
from tests.nemesis.workload import Records

LOCK_KEYS = "_lock/"
SWAPPED, WRITTEN = COUNTED


class Count(NamedTuple):
    """A counter in the end."""

    value: str
    version: int


def promises_kept(
    records: Records,
    counts: Mapping[str, Count],
    held: Mapping[str, str] | None,
    history_revisions: int,
) -> list[str]:
    """All four.

    Args:
        counts: what was counted under keys; empty: the run did not come so far.
        held: all keys and values when all has ended; None: as above.
        history_revisions: how many the history has to keep.
    """
    passing, watched, holds = records.passing, records.watched, records.holds
    judges = (
        *(_gone_early(passing), _ended_early(passing, watched), _end_untold(passing, watched)),
        *(_still_there(passing), _come_back(passing), _not_what_was_put(passing)),
        *(_not_rising(watched), _made_up(records), _lost(records), _told_twice(watched)),
        *(_differing(watched), _not_compacted(watched, history_revisions)),
        *(_falling(holds, watched), _same_token(holds), _two_holders(holds), _late(holds)),
        *(_locks_left(held or ()), _not_the_last(holds, held)),
        *(_said_differently(records.increments), _one_change_for_two(records.increments)),
        _miscounted(records.increments, counts),
    )
    return [problem for judge in judges for problem in itertools.islice(judge, SHOWN_MAX)]


# --- what is put for a time -----------------------------------------------------------------------


def _by_key(passing: Passing) -> Iterator[tuple[list[TtlPut], list[TtlLook]]]:
    puts: dict[str, list[TtlPut]] = defaultdict(list)
    looks: dict[str, list[TtlLook]] = defaultdict(list)
    for put in passing.puts:
        puts[put.key].append(put)
    for look in passing.looks:
        looks[look.key].append(look)
    for key, seen in looks.items():
        yield sorted(puts[key], key=lambda put: put.called), seen


def _gone_early(passing: Passing) -> Iterator[str]:
    """It is there for all its time, which begins after the put was sent."""
    for puts, looks in _by_key(passing):
        for look in looks:
            if look.value is None and look.returned < _there_until(puts, look):
                yield (
                    f"{look.key} was not there for who asked at {look.called:.3f} and was told at "
                    f"{look.returned:.3f}: it has until {_there_until(puts, look):.3f}"
                )


def _there_until(puts: Sequence[TtlPut], look: TtlLook) -> float:
    """Until when the key is there for certain, for who asks when `look` does; 0: it is not certain
    that it was.

    The newest that was answered before took effect after it was sent; and any that was not known to
    be over by then may have taken its place at any moment since.
    """
    known = [put for put in puts if put.returned < look.called]
    if not known:
        return 0.0
    newest = max(known, key=lambda put: put.called)
    return min(
        max(put.called, newest.called) + put.ttl_s
        for put in puts
        if put.returned > newest.called and put.called < look.returned
    )


def _ended_early(passing: Passing, watched: Sequence[Watched]) -> Iterator[str]:
    """Nobody is told of its end before its time has passed."""
    puts = {(put.key, put.value): put for put in passing.puts}
    for one in watched:
        newest: dict[str, tuple[TtlPut, int]] = {}
        for told in one.told:
            for event in told.events:
                shown = puts.get((event.key, event.value or ""))
                if shown is not None:
                    newest[event.key] = (shown, told.revision)
                    continue
                put, since = newest.pop(event.key, (None, 0))
                missed = any(since < gap.revision and gap.asked < told.revision for gap in one.gaps)
                if put is not None and not missed and told.at < put.called + put.ttl_s:
                    yield (
                        f"watcher {one.number}: {event.key} ended by revision {told.revision}, "
                        f"told at {told.at:.3f}: it has until {put.called + put.ttl_s:.3f}"
                    )


def _end_untold(passing: Passing, watched: Sequence[Watched]) -> Iterator[str]:
    """Who was told that a key was put is told that it has ended, before all comes to rest."""
    gone = {
        look.key for look in passing.looks if look.value is None and look.called > passing.rested_at
    }
    for one in watched:
        last = {event.key: (event, told) for told in one.changes for event in told.events}
        for key in sorted(gone & last.keys()):
            event, told = last[key]
            if event.value is not None and not any(g.revision > told.revision for g in one.gaps):
                yield (
                    f"watcher {one.number} was not told of the end of {key}, which is gone, and "
                    f"was put at revision {told.revision}"
                )


def _still_there(passing: Passing) -> Iterator[str]:
    """It ends with its time, counted while there is a leader, and a moment later at most."""
    puts = {(put.key, put.value): put for put in passing.puts}
    for look in passing.looks:
        put = puts.get((look.key, look.value or ""))
        if put is None:
            continue
        latest = max(passing.rested_at, put.called) + put.ttl_s + passing.late_s
        if look.called > latest:
            yield (
                f"{look.key} was still there for who asked at {look.called:.3f}: for {put.ttl_s} s "
                f"it was put at {put.called:.3f}, all was quiet from {passing.rested_at:.3f} on"
            )


def _come_back(passing: Passing) -> Iterator[str]:
    """What was gone comes only with another put."""
    for puts, looks in _by_key(passing):
        known = {put.value: put for put in puts if put.returned != FOREVER}
        gone = [look for look in looks if look.value is None]
        for look in looks:
            put = known.get(look.value or "")
            if put is None:
                continue
            for other in gone:
                if put.returned < other.called and other.returned < look.called:
                    yield (
                        f"{look.key} was gone for who asked at {other.called:.3f}, and back for "
                        f"who asked at {look.called:.3f}, as it was put at {put.called:.3f}"
                    )
                    break


def _not_what_was_put(passing: Passing) -> Iterator[str]:
    """What is read was put there, and was not put anew before that was asked."""
    for puts, looks in _by_key(passing):
        by_value = {put.value: put for put in puts}
        for look in looks:
            if look.value is None:
                continue
            put = by_value.get(look.value)
            if put is None or put.called > look.returned:
                yield f"{look.key} is {look.value!r}, which nobody had put"
                continue
            later = [p for p in puts if p.called > put.returned and p.returned < look.called]
            if later:
                yield (
                    f"{look.key} was {look.value!r} for who asked at {look.called:.3f}, and was "
                    f"put anew by {later[0].returned:.3f}"
                )


# --- what a watch shows ---------------------------------------------------------------------------


def _written(records: Records) -> dict[tuple[str, str], int]:
    """All that may have been written, by key and value: its revision; 0: nobody knows."""
    found: dict[tuple[str, str], int] = {}
    for key, history in records.history.items():
        for op in history:
            if op.name != "read" and not isinstance(op.result, tuple):
                found[key, value_of(op)] = op.result or 0
    found |= {(put.key, put.value): put.revision for put in records.passing.puts}
    found |= {(c.keys.start, c.value): c.revision for c in records.ranged.changes if c.value}
    for note in records.holds.notes:
        if note.what == WRITE and note.accepted is not False:
            found[note.key, note.value] = note.revision
    return found


def _not_rising(watched: Sequence[Watched]) -> Iterator[str]:
    """Each revision comes once, behind all lower ones, and what was said to be all of them was."""
    for one in watched:
        newest = 0
        for told in one.told:
            if told.revision < newest or (told.events and told.revision == newest):
                yield (
                    f"watcher {one.number} was told of revision {told.revision} by node "
                    f"{told.node_id} at {told.at:.3f}, and of everything up to {newest} before"
                )
            newest = max(newest, told.revision)


def _made_up(records: Records) -> Iterator[str]:
    """Nothing is shown that nobody did, and nothing at another revision than who did it was told.

    Only time ends a key here, and only one that was put for a time; some others are deleted."""
    written = _written(records)
    timed = {put.key for put in records.passing.puts}
    deletions = [change for change in records.ranged.changes if change.value is None]
    for one in records.watched:
        for told in one.changes:
            for event in told.events:
                said = f"watcher {one.number} was told of {_shown(event)} at {told.revision}"
                if not event.key.startswith(one.prefix):
                    yield f"{said}, and follows {one.prefix!r}"
                elif event.key.startswith(LOCK_KEYS):
                    continue  # of those the holders know more than they say
                elif event.value is None:
                    expired = event.type == "expire" and event.key in timed
                    deleted = event.type == "delete" and any(
                        event.key in change.keys and change.revision in (0, told.revision)
                        for change in deletions
                    )
                    if not (expired or deleted):
                        yield f"{said}, which nobody did"
                elif (event.key, event.value) not in written:
                    yield f"{said}, which nobody wrote"
                elif written[event.key, event.value] not in (0, told.revision):
                    revision = written[event.key, event.value]
                    yield f"{said}, and who wrote it was told of revision {revision}"


def _lost(records: Records) -> Iterator[str]:
    """Who follows a key is told of every acknowledged write of it, up to where it has come."""
    written = _written(records)
    for one in records.watched:
        seen = {
            (event.key, event.value): told.revision for told in one.changes for event in told.events
        }
        for (key, value), revision in written.items():
            due = 0 < revision < one.position and key.startswith(one.prefix)
            if due and (key, value) not in seen and not _passed_over(one, revision):
                yield (
                    f"watcher {one.number} was not told that {key} was written at revision "
                    f"{revision}, and of everything up to {one.position - 1}"
                )


def _told_twice(watched: Sequence[Watched]) -> Iterator[str]:
    """A value is written once, so it comes once."""
    for one in watched:
        shown = Counter(
            event for told in one.changes for event in told.events if event.value is not None
        )
        for event, times in shown.items():
            if times > 1 and not event.key.startswith(LOCK_KEYS):
                yield f"watcher {one.number} was told {times} times of {_shown(event)}"


def _differing(watched: Sequence[Watched]) -> Iterator[str]:
    """All who follow a key are told the same, but for what some have passed over."""
    for one, other in itertools.combinations(watched, 2):
        narrow, whole = (one, other) if one.prefix else (other, one)
        if whole.prefix:
            continue
        end = min(narrow.position, whole.position)
        mine, theirs = dict(narrow.selected(narrow)), dict(narrow.selected(whole))
        for revision in sorted(mine.keys() | theirs.keys()):
            if revision >= end or _same(mine.get(revision), theirs.get(revision)):
                continue
            if not (_passed_over(narrow, revision) or _passed_over(whole, revision)):
                yield (
                    f"watchers {narrow.number} and {whole.number} were told otherwise of revision "
                    f"{revision}: {_all(mine.get(revision))} and {_all(theirs.get(revision))}"
                )


def _same(some: Iterable[Event] | None, others: Iterable[Event] | None) -> bool:
    return Counter(some) == Counter(others)


def _not_compacted(watched: Sequence[Watched], history_revisions: int) -> Iterator[str]:
    """Who is sent away has asked for what is gone, and nothing is gone that has to be kept."""
    for one in watched:
        for gap in one.gaps:
            said = f"watcher {one.number} asked for revision {gap.asked} and was told that all up "
            if gap.asked > gap.compact_revision:
                yield f"{said}to {gap.compact_revision} is gone"
            elif gap.compact_revision > max(0, gap.revision - history_revisions):
                yield (
                    f"{said}to {gap.compact_revision} is gone: by {gap.revision} at the latest, "
                    f"and the last {history_revisions} are kept"
                )


def _passed_over(one: Watched, revision: int) -> bool:
    return any(gap.asked <= revision <= gap.revision for gap in one.gaps)


def _shown(event: Event) -> str:
    return f"{event.type} {event.key} {(event.value or '')[:40]!r}"


def _all(events: Iterable[Event] | None) -> str:
    return ", ".join(map(_shown, events or ())) or "nothing"


# --- locks ----------------------------------------------------------------------------------------


def _falling(holds: Holds, watched: Sequence[Watched]) -> Iterator[str]:
    """Nobody writes behind a later holder."""
    for key in (GUARDED, FENCED):
        notes = [note for note in holds.notes if note.key == key and note.accepted]
        values = {note.revision: note.value for note in notes}
        for one in watched:
            for told in one.changes:
                for event in told.events:
                    if event.key == key and event.value is not None:
                        values[told.revision] = event.value
        for earlier, later in itertools.pairwise(sorted(values)):
            if token_of(values[later]) < token_of(values[earlier]):
                yield (
                    f"{key} was written under token {token_of(values[later])} at revision {later}, "
                    f"and under {token_of(values[earlier])} at {earlier}"
                )


def _same_token(holds: Holds) -> Iterator[str]:
    """No two that hold the lock have the same token."""
    held = Counter(note.token for note in holds.held)
    for token, times in held.items():
        if times > 1:
            yield f"the lock was held {times} times under token {token}"


def _two_holders(holds: Holds) -> Iterator[str]:
    """While one holds it for certain, no later one does."""
    held = holds.held
    for note in holds.notes:
        later = _later_holder(held, note) if note.what == CERTAIN else None
        if later is not None:
            yield (
                f"the lock was held under token {note.token} for certain at {note.called:.3f}, "
                f"and under {later.token} since {later.called:.3f}"
            )


def _late(holds: Holds) -> Iterator[str]:
    """What the lock's own key guards is not written any more once somebody else holds it."""
    held = holds.held
    for note in holds.notes:
        later = _later_holder(held, note) if note.key == GUARDED and note.accepted else None
        if later is not None:
            yield (
                f"{note.key} was written under token {note.token}, asked for at "
                f"{note.called:.3f}, and {later.token} held the lock since {later.called:.3f}"
            )


def _later_holder(held: Iterable[Note], note: Note) -> Note | None:
    """Who has got the lock under a higher token, before what the note says began."""
    later = (other for other in held if other.token > note.token and other.called < note.called)
    return next(later, None)


def _locks_left(held: Iterable[str]) -> Iterator[str]:
    """All holders have ended, and so have their leases."""
    for key in held:
        if key.startswith(LOCK_KEYS):
            yield f"{key} is there, and its holder has ended long ago"


def _not_the_last(holds: Holds, held: Mapping[str, str] | None) -> Iterator[str]:
    """In the end there is what was written last, or what nobody knows of came after it."""
    if held is None:
        return
    for key in (GUARDED, FENCED):
        notes = {n.value: n for n in holds.notes if n.key == key and n.accepted is not False}
        newest = max((note.revision for note in notes.values()), default=0)
        value = held.get(key)
        found = notes.get(value or "")
        if value is not None and found is None:
            yield f"{key} is {value!r} in the end, which nobody wrote"
        elif newest and (found is None or 0 < found.revision < newest):
            yield f"{key} is {value!r} in the end, and was written anew at revision {newest}"


# --- what is repeated under a key -----------------------------------------------------------------


def _said_differently(increments: Sequence[Increment]) -> Iterator[str]:
    """Whoever is asked, and however often: the answer is the first one."""
    for increment in increments:
        if len(set(increment.answers)) > 1:
            yield f"{increment.once} for {increment.key} was answered by {increment.answers}"


def _one_change_for_two(increments: Sequence[Increment]) -> Iterator[str]:
    """Each that is done is a change of its own."""
    done = Counter(
        (increment.key, increment.answers[0][1]) for increment in increments if increment.done
    )
    for (key, revision), times in done.items():
        if times > 1:
            yield f"{times} increments of {key} were done at revision {revision}"


def _miscounted(increments: Sequence[Increment], counts: Mapping[str, Count]) -> Iterator[str]:
    """A counter is at what is known to be done, and above it by what is not known at most."""
    for increment in increments:
        if increment.key == WRITTEN and increment.answers and increment.done is False:
            yield f"{increment.once} for {WRITTEN} was refused, and asked for no condition"
    for key, count in counts.items():
        done = [increment.done for increment in increments if increment.key == key]
        least, most = done.count(True), done.count(True) + done.count(None)
        if not least <= count.version <= most:
            yield (
                f"{key} was changed {count.version} times, by {least} increments that are known "
                f"to be done and {most - least} of which nobody knows"
            )
        if key == SWAPPED and int(count.value.partition(" ")[0] or 0) != count.version:
            yield f"{key} is {count.value!r} after {count.version} changes"
