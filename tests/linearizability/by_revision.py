"""Is a history of `models.VERSIONED` linearizable, when every change tells its revision?

Then nothing has to be searched for. The changes of a key can only have happened in the order of
their revisions, W1 W2 .. Wn, and between them lie the states S0 (no key), S1 .. Sn. Who has seen a
revision looked at that very state; who has seen no key, at one of those that have none. So every
operation has its place in the row S0 W1 S1 W2 .. Sn, and the history is linearizable if and only
if nobody returned before somebody at an earlier place was called.

Who has seen no key takes the first of its states behind which nothing had returned before it was
called. That is exact: a later state would only put it behind more that was called, and two of them
never get in the wrong order, for who is called later never has an earlier first.

The verdict takes O(n log n), whatever the history is, and so does not depend on a clock.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Mapping, Sequence

from tests.linearizability.checker import FOREVER, Finding, Operation, Verdict


def check(
    histories: Mapping[Hashable, Sequence[Operation]], views: Sequence[Operation] = ()
) -> Finding:
    """Judge the operations on each key. What an unknown outcome was must have been filled in.

    Args:
        views: of several keys at one moment; each has for a result the revision of the store of
            which it is, and by key what it shows, as a read does. They need all keys to count
            revisions together.
    """
    for key, history in histories.items():
        window = contradiction(history)
        if window:
            return Finding(Verdict.ILLEGAL, key, window)
    window = torn(histories, views) if views else ()
    return Finding(Verdict.ILLEGAL, None, window) if window else Finding(Verdict.LINEARIZABLE)


def contradiction(history: Sequence[Operation]) -> tuple[Operation, ...]:
    """Operations on one key that do not go together; none if it is linearizable.

    For who says that there was no key it shows the changes around; what rules those out can be any
    later look.
    """
    assert all(op.returned != FOREVER for op in history), "an outcome is unknown"
    changes = sorted(filter(_changes, history), key=lambda op: op.result)
    wrong = _out_of_sequence(changes)
    if wrong:
        return wrong
    # Place 2j is state Sj, place 2j - 1 is Wj.
    places: list[list[Operation]] = [[] for _ in range(2 * len(changes) + 1)]
    state_of = {change.result: number for number, change in enumerate(changes, 1)}
    saw_nothing = []
    for number, change in enumerate(changes, 1):
        places[2 * number - 1].append(change)
    for op in history:
        if _changes(op):
            continue
        revision = _seen_revision(op)
        if revision is None:
            saw_nothing.append(op)
            continue
        number = state_of.get(revision, 0)
        if not number or not _fits(op, changes[number - 1]):
            return (*changes[max(number - 1, 0) : number], op)
        places[2 * number].append(op)
    _place_who_saw_nothing(saw_nothing, changes, places)
    if saw_nothing:
        return _around(saw_nothing[0], changes)
    return _out_of_time(places)


def torn(
    histories: Mapping[Hashable, Sequence[Operation]], views: Sequence[Operation]
) -> tuple[Operation, ...]:
    """A view that is not of one moment, or of none between its call and its return.

    Its revision is its place among the changes of all keys: what it shows of each key is what the
    last one before that has left, and nobody returned before somebody at an earlier place was
    called.
    """
    changes = {k: sorted(filter(_changes, h), key=_result) for k, h in histories.items()}
    places: dict[tuple[int, bool], list[Operation]] = {}
    for change in itertools.chain.from_iterable(changes.values()):
        places.setdefault((change.result, False), []).append(change)
    for view in views:
        revision, seen = view.result
        places.setdefault((revision, True), []).append(view)
        for key, what in seen.items():
            of_key = changes.get(key, ())
            place = bisect_right(of_key, revision, key=_result)
            last = of_key[place - 1] if place else None
            there = last is not None and _value(last) is not None
            if what != ((last.result, _value(last)) if last and there else (0, None)):
                return (*of_key[max(place - 1, 0) : place + 1], view)
    return _out_of_time([places[place] for place in sorted(places)])


def _result(change: Operation) -> int:
    revision: int = change.result
    return revision


def _changes(op: Operation) -> bool:
    return op.name != "read" and isinstance(op.result, int)


def _seen_revision(op: Operation) -> int | None:
    """What somebody who changed nothing has seen there; None: no key."""
    if op.name == "read":
        revision, value = op.result
        return None if value is None else revision
    return op.result[1] if op.name == "cas" else None


def _fits(op: Operation, change: Operation) -> bool:
    """Could `op` have seen that, in the state after `change`?"""
    if _value(change) is None:
        return False
    if op.name == "cas":
        return op.argument[0] != change.result
    return op.result[1] == _value(change)


def _value(change: Operation) -> object:
    """None for a deletion, which may be a swap, too."""
    return change.argument[1] if change.name == "cas" else change.argument


def _out_of_sequence(changes: Sequence[Operation]) -> tuple[Operation, ...]:
    """Each revision is there once, and each condition held after the change before."""
    before: Operation | None = None
    for change in changes:
        if before is not None and before.result == change.result:
            return (before, change)
        here = None if before is None or _value(before) is None else before.result
        if (change.name == "cas" and change.argument[0] != here) or (
            change.name == "delete" and here is None
        ):
            return (change,) if before is None else (before, change)
        before = change
    return ()


def _around(op: Operation, changes: Sequence[Operation]) -> tuple[Operation, ...]:
    over = [c for c in changes if c.returned < op.called][-1:]
    return (*over, *(c for c in changes if c.returned >= op.called and c.called <= op.returned), op)


def _place_who_saw_nothing(
    waiting: list[Operation], changes: Sequence[Operation], places: list[list[Operation]]
) -> None:
    """Gives them a place; who finds none stays in `waiting`."""
    empty = [0, *(2 * n for n, change in enumerate(changes, 1) if _value(change) is None)]
    # The earliest return at any place behind each empty state; it grows with the place.
    behind, earliest, place = [FOREVER] * len(empty), FOREVER, len(places) - 1
    for position in range(len(empty) - 1, -1, -1):
        while place > empty[position]:
            earliest = min([earliest, *(op.returned for op in places[place])])
            place -= 1
        behind[position] = earliest
    left = []
    for op in waiting:
        position = bisect_left(behind, op.called)  # a call and a return at one moment overlap
        if position == len(empty):
            left.append(op)
        elif (op.name, op.result) == ("cas", ("is", None)) and op.argument[0] is None:
            left.append(op)  # it asked for no key, and was told that there is none
        else:
            places[empty[position]].append(op)
    waiting[:] = left


def _out_of_time(places: Sequence[Sequence[Operation]]) -> tuple[Operation, ...]:
    """Somebody returned before somebody at an earlier place was called."""
    latest: Operation | None = None  # to be called, of those at earlier places
    for here in places:
        for op in here:
            if latest is not None and op.returned < latest.called:
                return (op, latest)
        for op in here:
            if latest is None or op.called > latest.called:
                latest = op
    return ()
