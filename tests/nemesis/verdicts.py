"""What a run must have kept. Each judge returns sentences about what it found wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from tests.linearizability import by_revision
from tests.linearizability.checker import FOREVER, Operation
from tests.linearizability.timeline import as_text
from tests.nemesis.workload import Eventual, Records

SHOWN_MAX = 5


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


def linearizable(records: Records) -> list[str]:
    """Writes, swaps, and reads of the first two levels."""
    problems = []
    for key, history in records.history.items():
        seen = [read for read in records.eventual if read.key == key]
        window = by_revision.contradiction(resolved(history, seen))
        if window:
            problems.append(f"key {key} is not linearizable: {as_text(window)}")
    return problems


def refused_stays_undone(records: Records, held: Mapping[str, str]) -> list[str]:
    """Who was told that a write did not happen can rely on that."""
    seen = {op.result[1] for ops in records.history.values() for op in ops if op.name == "read"}
    seen |= {read.value for read in records.eventual} | set(held.values())
    return [
        f"the write of {value[:80]!r} was refused with outcome none, and happened"
        for value in sorted(records.refused & seen)[:SHOWN_MAX]
    ]


def eventual_reads(records: Records) -> list[str]:
    """No process goes back in time, and none makes values up."""
    problems = []
    by_process: dict[tuple[int, int], list[Eventual]] = defaultdict(list)
    for read in records.eventual:
        by_process[read.node_id, read.boot].append(read)
    for (node_id, boot), reads in by_process.items():
        problems += [
            f"node {node_id}, process {boot}: revision {later.state_revision} was read at "
            f"{later.called:.3f}, after {newest} had been"
            for later, newest in _steps_back(reads)
        ]
    written = {
        key: {value_of(op) for op in history if op.name != "read"}
        for key, history in records.history.items()
    }
    problems += [
        f"node {read.node_id} says that {read.key} is {read.value!r}, which nobody wrote"
        for read in records.eventual
        if read.value not in written.get(read.key, ())
    ]
    return problems[:SHOWN_MAX]


def _steps_back(reads: Sequence[Eventual]) -> list[tuple[Eventual, int]]:
    """Reads that were called after an answer from a later state had returned."""
    found, newest, position = [], 0, 0
    answered = sorted(reads, key=lambda read: read.returned)
    for read in sorted(reads, key=lambda read: read.called):
        while position < len(answered) and answered[position].returned < read.called:
            newest = max(newest, answered[position].state_revision)
            position += 1
        if read.state_revision < newest:
            found.append((read, newest))
    return found


def nothing_lost(records: Records, held: Mapping[int, Mapping[str, str]]) -> list[str]:
    """Every acknowledged key of the set is on every node, and nothing that nobody added."""
    problems = []
    for node_id, items in held.items():
        lost = [key for key, value in records.collected.items() if items.get(key) != value]
        strange = [
            key
            for key, value in items.items()
            if value != (records.collected.get(key) or records.attempted.get(key))
        ]
        if lost:
            problems.append(
                f"node {node_id} lost {len(lost)} of {len(records.collected)} acknowledged keys: "
                f"{', '.join(sorted(lost)[:SHOWN_MAX])}"
            )
        if strange:
            problems.append(
                f"node {node_id} holds {len(strange)} keys that nobody wrote like that: "
                f"{', '.join(sorted(strange)[:SHOWN_MAX])}"
            )
    return problems


def counted(records: Records, held: Mapping[str, str]) -> list[str]:
    """A counter is at least at the increments that were acknowledged, and at most at all tries."""
    problems = []
    for key, history in records.history.items():
        if key.startswith("c/"):
            tries = [op for op in history if op.name == "cas"]
            least = sum(isinstance(op.result, int) for op in tries)
            most = least + sum(op.returned == FOREVER for op in tries)
            count = int(held.get(key, "0").partition(" ")[0])
            if not least <= count <= most:
                problems.append(
                    f"counter {key} is {count} after {least} acknowledged increments "
                    f"and {most - least} of unknown outcome"
                )
    return problems
