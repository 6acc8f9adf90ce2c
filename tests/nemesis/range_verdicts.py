"""Are keys that come and go, and lists of them, what the changes say? Each judge yields sentences.

Every change has a revision, and every list names that of the state that it shows. So nothing has to
be searched for: a list at a revision has to be what the changes up to it have made, key by key, and
nobody may be told of an earlier revision than somebody whose answer was there before he asked.

What became of a put of unknown outcome shows where its value was seen. Of a deletion nothing shows
but that a key is gone: one of unknown outcome explains that if it was asked for by then, and a
revision is free for it, at which nobody else has changed anything.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

from tests.linearizability.checker import FOREVER
from tests.nemesis.ranges import RANGE_KEYS, Change, Look
from tests.nemesis.verdicts import SHOWN_MAX
from tests.nemesis.workload import Records


class Moment(NamedTuple):
    """Somebody was told of a revision: of a change's own, or of the state that he was shown."""

    called: float
    returned: float
    revision: int
    changes: bool
    eventual: bool = False


def ranges_whole(records: Records) -> list[str]:
    """What is wrong with the keys that come and go."""
    changes, wrong = _resolved(records.ranged.changes, records.ranged.looks)
    story = _Story(changes, [*_moments(records), *_of(changes, records.ranged.looks)])
    judges = (
        wrong,
        story.out_of_order(),
        story.looks_that_lie(records.ranged.looks),
        story.changes_that_lie(),
    )
    return [problem for judge in judges for problem in itertools.islice(judge, SHOWN_MAX)]


def _resolved(
    changes: Iterable[Change], looks: Iterable[Look]
) -> tuple[list[Change], Iterable[str]]:
    """The changes, with the revisions of puts whose values were seen; and what is wrong then."""
    found = {change.value: change for change in changes if change.value is not None}
    wrong = []
    for look in looks:
        for key, (revision, value) in look.seen.items():
            put = found.get(value)
            if value is None:
                continue
            if put is None or key not in put.keys:
                wrong.append(f"{key} was {value!r} at {look.returned:.3f}, which nobody wrote")
            elif put.revision == 0:
                found[value] = replace(put, revision=revision)
            elif put.revision != revision:
                wrong.append(f"{value!r} came into {key} at {put.revision} and at {revision}")
    deletions = [change for change in changes if change.value is None]
    return [*found.values(), *deletions], wrong


def _moments(records: Records) -> Iterator[Moment]:
    """Of the changes to other keys."""
    for history in records.history.values():
        for op in history:
            if op.name != "read" and isinstance(op.result, int):
                yield Moment(op.called, op.returned, op.result, changes=True)
    for put in records.passing.puts:
        if put.revision:
            yield Moment(put.called, put.returned, put.revision, changes=True)


def _of(changes: Iterable[Change], looks: Iterable[Look]) -> Iterator[Moment]:
    for change in changes:
        if change.revision:
            yield Moment(change.called, change.returned, change.revision, changes=True)
    for look in looks:
        if look.revision is not None:
            yield Moment(look.called, look.returned, look.revision, False, look.eventual)


class _Story:
    """What is known to have happened."""

    def __init__(self, changes: Sequence[Change], moments: Sequence[Moment]) -> None:
        known = sorted((c for c in changes if c.revision), key=attrgetter("revision"))
        self._known = known
        self._unknown = [change for change in changes if not change.revision]
        self._epochs = {key: list(_epochs(key, known)) for key in RANGE_KEYS}
        self._taken = sorted({moment.revision for moment in moments if moment.changes})
        self._moments = moments
        told = [moment for moment in moments if not moment.eventual]
        told.sort(key=attrgetter("returned"))
        self._returned = [moment.returned for moment in told]
        self._newest = [0, *itertools.accumulate((moment.revision for moment in told), max)]
        told.sort(key=attrgetter("called"), reverse=True)
        self._called = [-moment.called for moment in told]
        states = (moment.revision - moment.changes for moment in told)
        self._oldest = [FOREVER, *itertools.accumulate(states, min)]

    def _between(self, called: float, returned: float) -> tuple[float, float]:
        """The first and the last state that may be shown: nobody had been told of a later one
        before, and nobody who asked afterwards was told of an earlier one."""
        first = self._newest[bisect_left(self._returned, called)]
        return first, self._oldest[bisect_left(self._called, -returned)]

    def out_of_order(self) -> Iterator[str]:
        for moment in self._moments:
            first, last = self._between(moment.called, moment.returned)
            what = "a change has" if moment.changes else "keys were shown at"
            said = f"{what} revision {moment.revision}, asked for at {moment.called:.3f}"
            if moment.eventual and moment.revision > last:
                yield f"{said}, and later {last:.0f} was the newest"
            elif not moment.eventual and moment.revision < first + moment.changes:
                yield f"{said}, when {first:.0f} was told already"

    def looks_that_lie(self, looks: Iterable[Look]) -> Iterator[str]:
        """A list is what the changes have made, key by key; so is a look at one."""
        for look in looks:
            first, last = self._between(look.called, look.returned)
            if look.revision is not None:
                first = last = look.revision
            for key in {*filter(look.keys.__contains__, RANGE_KEYS), *look.seen}:
                revision = look.seen.get(key, (0, None))[0]
                shown = f"{key} at {look.returned:.3f} with revision {revision}, and in the state"
                if key not in look.keys:
                    yield f"{shown} nobody had asked for it"
                elif not self._may_show(key, revision, first, last, look.returned):
                    state = last if last < FOREVER else first
                    yield f"{shown} at {state:.0f} it has {self._at(key, state).revision}"

    def changes_that_lie(self) -> Iterator[str]:
        """A condition held in the state before, and as many keys were there as were deleted."""
        for change in self._known:
            key, before, by = change.keys.start, change.revision - 1, change.returned
            state = (before, before, by)
            if change.expected is not None and not self._may_show(key, change.expected, *state):
                yield (
                    f"a change of {key} at {change.revision} asked for revision {change.expected}, "
                    f"and it had {self._at(key, before).revision}"
                )
            if change.value is None:
                keys = [key for key in RANGE_KEYS if key in change.keys]
                least = sum(not self._may_show(key, 0, *state) for key in keys)
                most = sum(self._may_be_there(key, before, by) for key in keys)
                if not least <= change.deleted <= most:
                    yield (
                        f"{change.deleted} keys from {key} on were deleted at {change.revision}, "
                        f"and there were {least} to {most}"
                    )

    def _may_show(self, key: str, revision: int, first: float, last: float, by: float) -> bool:
        """Could that be there (0: nothing) in one of these states, as was told at `by`?"""
        for epoch in self._epochs[key]:
            if epoch.begins <= last and epoch.ends > first:
                end = min(last, epoch.ends - 1)
                if epoch.revision == revision:
                    return True
                if revision and epoch.begins < revision <= end:
                    hidden = self._hidden(key, revision - 1, revision, by, put=True)
                else:
                    hidden = not revision and self._hidden(key, epoch.begins, end, by, put=False)
                if hidden:
                    return True
        return False

    def _may_be_there(self, key: str, state: float, by: float) -> bool:
        epoch = self._at(key, state)
        return bool(epoch.revision) or self._hidden(key, epoch.begins, state, by, put=True)

    def _hidden(self, key: str, begins: float, ends: float, by: float, *, put: bool) -> bool:
        """Could a change of unknown outcome have come behind `begins`, and at `ends` at last?"""
        taken = bisect_right(self._taken, ends) - bisect_right(self._taken, begins)
        return taken < ends - begins and any(
            key in change.keys and change.called <= by and (change.value is not None) == put
            for change in self._unknown
        )

    def _at(self, key: str, state: float) -> _Epoch:
        return next(epoch for epoch in self._epochs[key] if epoch.begins <= state < epoch.ends)


class _Epoch(NamedTuple):
    """States in which a key has this revision, as far as is known; 0: there is none."""

    begins: float
    ends: float
    revision: int


def _epochs(key: str, known: Iterable[Change]) -> Iterator[_Epoch]:
    begins = revision = 0
    for change in known:
        if key in change.keys:
            yield _Epoch(begins, change.revision, revision)
            begins = change.revision
            revision = begins if change.value is not None else 0
    yield _Epoch(begins, FOREVER, revision)
