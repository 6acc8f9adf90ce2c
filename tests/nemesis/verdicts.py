"""What a run must have kept. Each judge returns sentences about what it found wrong."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from tests.linearizability import by_revision
from tests.linearizability.checker import FOREVER, Operation
from tests.linearizability.timeline import as_text
from tests.nemesis.lists import ListTxn, elements, text
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


class _Look(NamedTuple):
    """Somebody has seen a list. Of an eventual read only the end counts: it may show an old state,
    but none that is still to come."""

    called: float
    returned: float
    revision: float
    held: tuple[str, ...]


Looks = Mapping[str, Sequence[_Look]]


def lists_whole(records: Records, held: Mapping[str, str]) -> list[str]:
    """Lists only grow, by what was appended, once each, and those of one transaction together.

    Args:
        held: the lists in the end.
    """
    every = held.keys() | {key for txn in records.lists for key in txn.asked}
    in_the_end = {key: elements(held.get(key)) for key in every}
    looks = _looks(records, in_the_end)
    judges = (
        _not_growing(looks),
        _shrinking(looks),
        _wrong_elements(records, looks),
        _wrong_answers(records),
        _lost_appends(records, in_the_end),
        _torn_at_once(records, in_the_end),
        _torn_in_time(records, looks),
    )
    return [problem for judge in judges for problem in itertools.islice(judge, SHOWN_MAX)]


def _looks(records: Records, in_the_end: Mapping[str, tuple[str, ...]]) -> Looks:
    """By key, each once: what a transaction has read is in the history as well."""
    looks: dict[str, list[_Look]] = {key: [] for key in in_the_end}
    for txn in records.lists:
        for key, (revision, held) in txn.found.items():
            looks[key].append(_Look(txn.called, txn.returned, revision, held))
    for key in looks.keys() & records.history.keys():
        for op in records.history[key]:
            if op.name == "read":
                revision, value = op.result
                looks[key].append(_Look(op.called, op.returned, revision, elements(value)))
    for read in records.eventual:
        if read.key in looks:
            seen = _Look(-FOREVER, read.returned, read.revision, elements(read.value))
            looks[read.key].append(seen)
    for key, held in in_the_end.items():
        looks[key].append(_Look(FOREVER, FOREVER, FOREVER, held))
    return {key: list(dict.fromkeys(seen)) for key, seen in looks.items()}


def _shown(key: str, look: _Look) -> str:
    return f"list {key} was {text(look.held)!r} for who asked at {_moment(look.called)}"


def _moment(number: float, form: str = "{:.3f}") -> str:
    return "the end" if number == FOREVER else form.format(number)


def _not_growing(looks: Looks) -> Iterator[str]:
    """Each version is a longer one's beginning."""
    for key, seen in looks.items():
        ordered = sorted(seen, key=lambda look: look.revision)
        for one, other in itertools.pairwise(ordered):
            if one.held != other.held[: len(one.held)] or (
                one.revision == other.revision and one.held != other.held
            ):
                yield (
                    f"list {key} was {text(one.held)!r} at revision {one.revision} and "
                    f"{text(other.held)!r} at {_moment(other.revision, 'revision {:.0f}')}"
                )


def _shrinking(looks: Looks) -> Iterator[str]:
    """Who looks after another's answer sees no less: an append is seen from its answer on."""
    for key, seen in looks.items():
        answered = sorted(seen, key=lambda look: look.returned)
        longest, position = answered[0]._replace(held=()), 0
        for look in sorted(seen, key=lambda look: look.called):
            while position < len(answered) and answered[position].returned < look.called:
                longest = max(longest, answered[position], key=lambda other: len(other.held))
                position += 1
            if len(look.held) < len(longest.held):
                yield (
                    f"{_shown(key, look)}, and {text(longest.held)!r} had been read by "
                    f"{longest.returned:.3f}"
                )


def _wrong_elements(records: Records, looks: Looks) -> Iterator[str]:
    """What is in a list was appended to it, once, and not refused."""
    appended = {(key, value): txn for txn in records.lists for key, value in txn.appended.items()}
    shown: dict[tuple[str, str], int] = {}
    for key, seen in looks.items():
        for look in seen:
            for value, times in Counter(look.held).items():
                shown[key, value] = max(times, shown.get((key, value), 0))
    for (key, value), times in shown.items():
        txn = appended.get((key, value))
        if txn is None:
            yield f"list {key} has {value!r}, which nobody appended to it"
        elif txn.succeeded is False:
            yield f"list {key} has {value!r}, and its append was refused"
        if times > 1:
            yield f"list {key} has {value!r} {times} times"


def _wrong_answers(records: Records) -> Iterator[str]:
    """Who succeeds is shown its own append, at one revision; who fails, something that differs
    from what was compared."""
    for txn in records.lists:
        if not txn.appended or not txn.found:
            continue
        shown = {key: held for key, (_, held) in txn.found.items() if key in txn.appended}
        said = f"client {txn.client} appended {dict(txn.appended)} at {txn.called:.3f}"
        if txn.succeeded:
            revisions = {revision for revision, _ in txn.found.values()}
            if len(revisions) > 1 or shown != {key: txn.put(key) for key in txn.appended}:
                yield f"{said} and was shown {dict(txn.found)}"
        elif all(txn.found[key][0] == txn.base[key][0] for key in txn.appended):
            yield f"{said} and was refused, though nothing had changed: {dict(txn.found)}"


def _lost_appends(records: Records, in_the_end: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    for txn in records.lists:
        for key, value in txn.appended.items():
            if txn.succeeded and value not in in_the_end[key]:
                yield f"list {key} lost {value!r}, an acknowledged append"


def _torn_at_once(records: Records, in_the_end: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Who sees several lists at one moment sees all of a transaction or nothing."""
    moments = [{key: held for key, (_, held) in txn.found.items()} for txn in records.lists]
    moments = [in_the_end, *(moment for moment in moments if len(moment) > 1)]
    for txn in _on_several(records):
        for moment in moments:
            seen = {value in moment[key] for key, value in txn.appended.items() if key in moment}
            if len(seen) > 1:
                yield f"the appends {dict(txn.appended)} of one transaction were torn: {moment}"
                break


def _torn_in_time(records: Records, looks: Looks) -> Iterator[str]:
    """Who has seen one append of a transaction on one list finds the others on theirs."""
    for txn in _on_several(records):
        seen_at = min(
            (
                look.returned
                for key, value in txn.appended.items()
                for look in looks[key]
                if value in look.held
            ),
            default=FOREVER,
        )
        for key, value in txn.appended.items():
            for look in looks[key]:
                if look.called > seen_at and value not in look.held:
                    yield (
                        f"{_shown(key, look)}: a part of the appends {dict(txn.appended)}, "
                        f"of one transaction, had been seen at {seen_at:.3f}"
                    )


def _on_several(records: Records) -> Iterator[ListTxn]:
    return (txn for txn in records.lists if len(txn.appended) > 1)
