"""Are the histories of a run linearizable? Two judges that know nothing of each other.

The exact one (by_revision.py) takes the revisions that every answer carries for the order of the
changes: quick, whatever the size. The general search (checker.py) believes no revision before it
fits, is exponential in the worst case, and so judges the histories that are small enough. A search
that comes to no verdict is not a pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.linearizability import by_revision
from tests.linearizability.checker import (
    FOREVER,
    Operation,
    Verdict,
    check_key,
    shortest_window,
)
from tests.linearizability.models import VERSIONED
from tests.linearizability.timeline import as_text, write_svg
from tests.nemesis.workload import Eventual, Records

SEARCHED_OPERATIONS = 1500  # on one key; larger histories are left to the exact judge
SEARCHED_UNKNOWN = 12  # each of these may have happened at any time, or never
SEARCH_S = 20.0  # for one key; those that are small enough take far less than a second
VALUE_SHOWN = 60


class Contradiction(NamedTuple):
    """Operations on a key that no order explains."""

    key: str
    judge: str
    window: tuple[Operation, ...]

    def draw(self, directory: Path) -> Path:
        """As a picture, in a file of its own."""
        name = self.key.replace("/", "-")
        path, number = directory / f"contradiction-{name}.svg", 1
        while path.exists():
            number += 1
            path = directory / f"contradiction-{name}-{number}.svg"
        write_svg([shown(op) for op in self.window], path, f"key {self.key}, by {self.judge}")
        return path

    def __str__(self) -> str:
        text = as_text([shown(op) for op in self.window])
        return f"key {self.key} is not linearizable, by {self.judge}: {text}"


@dataclass
class Searched:
    """What the general search has come to."""

    keys: int = 0
    operations: int = 0
    left_out: list[str] = field(default_factory=list)  # keys whose histories are too large
    contradictions: list[Contradiction] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # no verdict


def contradictions(records: Records) -> list[Contradiction]:
    """By revision: writes, swaps, and reads of the first two levels."""
    by_key: dict[str, list[Eventual]] = {}
    for read in records.eventual:
        by_key.setdefault(read.key, []).append(read)
    found = []
    for key, history in records.history.items():
        window = by_revision.contradiction(resolved(history, by_key.get(key, ())))
        if window:
            found.append(Contradiction(key, "revision", window))
    return found


def search(histories: Mapping[str, Sequence[Operation]], limit_s: float = SEARCH_S) -> Searched:
    """Of the same operations, by trying orders; unknown outcomes stay unknown.

    Args:
        limit_s: for one key.
    """
    searched = Searched()
    for key, history in histories.items():
        unknown = sum(op.returned == FOREVER for op in history)
        if len(history) > SEARCHED_OPERATIONS or unknown > SEARCHED_UNKNOWN:
            searched.left_out.append(key)
            continue
        searched.keys += 1
        searched.operations += len(history)
        deadline = time.monotonic() + limit_s
        verdict = check_key(history, VERSIONED, deadline)
        if verdict is Verdict.ILLEGAL:
            window = shortest_window(history, VERSIONED, time.monotonic() + limit_s)
            searched.contradictions.append(Contradiction(key, "search", window))
        elif verdict is not Verdict.LINEARIZABLE:
            searched.problems.append(
                f"key {key}: the search came to no verdict within {limit_s:.0f} s "
                f"({len(history)} operations, {unknown} of unknown outcome)"
            )
    return searched


def shown(op: Operation) -> Operation:
    """With long values cut, for people."""
    return op._replace(argument=_cut(op.argument), result=_cut(op.result))


def _cut(what: object) -> object:
    if isinstance(what, str) and len(what) > VALUE_SHOWN:
        return what[:VALUE_SHOWN] + "..."
    if isinstance(what, tuple):
        return tuple(_cut(part) for part in what)
    return what


def resolved(history: Sequence[Operation], seen: Iterable[Eventual]) -> list[Operation]:
    """A history in which no outcome is unknown.

    Each value is written once. A change of unknown outcome whose value somebody has read did
    happen, at the revision that was read and before the first such answer returned. One that nobody
    has read is left out: nothing is deleted here, so if it happened between two others, then no
    answer shows its state, and without it all of them say the same.
    """
    observed = _observed(history, seen)
    found, free = [], []
    for op in history:
        if op.returned != FOREVER:
            found.append(op)
        elif value_of(op) in observed:
            revision, returned = observed[value_of(op)]
            found.append(op._replace(returned=max(returned, op.called), result=revision))
        else:
            free.append(op)
    return found + _refused_for(found, free)


def _observed(
    history: Sequence[Operation], seen: Iterable[Eventual]
) -> dict[str, tuple[int, float]]:
    """For each value that was read its revision, and when the first such answer returned."""
    observed: dict[str, tuple[int, float]] = {}
    readings = [(op.result[0], op.result[1], op.returned) for op in history if op.name == "read"]
    readings += [(read.revision, read.value, read.returned) for read in seen]
    for revision, value, returned in readings:
        if value is not None:
            first = observed.get(value, (revision, FOREVER))[1]
            observed[value] = (revision, min(first, returned))
    return observed


def _refused_for(found: Sequence[Operation], free: list[Operation]) -> list[Operation]:
    """Changes of which only the revision was seen, by a swap that was refused because of it.

    Which of the unknown ones made it nobody can tell, nor does it matter: nobody has read its
    value. The one that was called first leaves the others the most room in time; a swap goes only
    behind what it expected, and is taken first for it fits nowhere else.
    """
    known = {op.result for op in found if op.name != "read" and isinstance(op.result, int)}
    unexplained: dict[int, float] = {}
    for op in found:
        there = op.result[1] if op.name == "cas" and isinstance(op.result, tuple) else None
        if there is not None and there not in known:
            unexplained[there] = min(unexplained.get(there, FOREVER), op.returned)
    made = []
    for revision, returned in sorted(unexplained.items()):
        before = max((other for other in known if other < revision), default=None)
        fitting = [
            op
            for op in free
            if op.called <= returned and (op.name == "write" or op.argument[0] == before)
        ]
        if fitting:  # else it came from nowhere, and is found to
            op = min(fitting, key=lambda op: (op.name == "write", op.called))
            free.remove(op)
            known.add(revision)
            made.append(op._replace(returned=returned, result=revision))
    return made


def value_of(op: Operation) -> str:
    return str(op.argument[1] if op.name == "cas" else op.argument)
