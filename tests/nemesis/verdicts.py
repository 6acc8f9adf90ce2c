"""What a run must have kept. Each judge returns sentences about what it found wrong."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from tests.linearizability.checker import FOREVER
from tests.nemesis.histories import value_of
from tests.nemesis.workload import Eventual, Records

SHOWN_MAX = 5
# Elections that come to nothing: at the beginning; and one for each fault, with another one for so
# many seconds of it. Two candidates may share the votes, or one dies.
VAIN_TERMS = 3
VAIN_TERM_S = 5.0
SLOW_SYNC = "slow sync"  # a vote that waits for its disk for 5 s is late for several elections
SLOW_SYNC_TERM_S = 0.5
IDLE_TERMS_PER_MIN = 5  # without any fault: a busy machine makes a leader late
LEADS = re.compile(r"^\[Node (\d+)\] \w+ → Leader \(term (\d+)\)$", re.MULTILINE)


def refused_stays_undone(records: Records, held: Iterable[str]) -> list[str]:
    """Who was told that a write did not happen can rely on that.

    Args:
        held: all values in the end.
    """
    seen = {op.result[1] for ops in records.history.values() for op in ops if op.name == "read"}
    seen |= {read.value for read in records.eventual} | set(held)
    return [
        f"the write of {value[:80]!r} was refused with outcome none, and happened"
        for value in sorted(records.refused & seen)[:SHOWN_MAX]
    ]


def eventual_reads(records: Records) -> list[str]:
    """No process goes back in time, forgets a key, shows less than the state that it names, or
    makes values up. Nothing is deleted here."""
    by_process: dict[tuple[int, int], list[Eventual]] = defaultdict(list)
    for read in records.eventual:
        by_process[read.node_id, read.boot].append(read)
    problems = []
    for (node_id, boot), reads in by_process.items():
        who = f"node {node_id}, process {boot}"
        problems += [
            f"{who}: revision {later.state_revision} was read at {later.called:.3f}, after "
            f"{newest} had been"
            for later, newest in _steps_back([read for read in reads if read.value is not None])
        ]
        problems += [
            f"{who}: there was no {read.key} at {read.called:.3f}, and it had been read by "
            f"{first:.3f}"
            for read, first in _vanished(reads)
        ]
    problems += _behind_themselves(records)
    written = {
        key: {value_of(op) for op in history if op.name != "read"}
        for key, history in records.history.items()
    }
    problems += [
        f"node {read.node_id} says that {read.key} is {read.value[:80]!r}, which nobody wrote"
        for read in records.eventual
        if read.value is not None and read.value not in written.get(read.key, ())
    ]
    return problems[:SHOWN_MAX]


def _vanished(reads: Sequence[Eventual]) -> Iterator[tuple[Eventual, float]]:
    """Reads of one process that lack a key, called after an answer that had it."""
    first: dict[str, float] = {}
    for read in reads:
        if read.value is not None:
            first[read.key] = min(read.returned, first.get(read.key, FOREVER))
    for read in reads:
        if read.value is None and first.get(read.key, FOREVER) < read.called:
            yield read, first[read.key]


def _behind_themselves(records: Records) -> Iterator[str]:
    """An answer names the revision of its state: everything up to that has to show in it."""
    changes: dict[str, set[int]] = defaultdict(set)
    for key, history in records.history.items():
        for op in history:
            if op.name == "read":
                changes[key].add(op.result[0])
            elif isinstance(op.result, tuple):  # what a swap has found there instead
                changes[key].add(op.result[1] or 0)
            elif op.result is not None:
                changes[key].add(op.result)
    for read in records.eventual:
        changes[read.key].add(read.revision)
    ordered = {key: sorted(revisions) for key, revisions in changes.items()}
    for read in records.eventual:
        if read.value is None:  # such an answer names no revision
            continue
        revisions = ordered[read.key]
        position = bisect_right(revisions, read.state_revision)
        newest = revisions[position - 1] if position else 0
        if read.revision != newest:
            yield (
                f"node {read.node_id}, process {read.boot}: at revision {read.state_revision} "
                f"{read.key} has revision {read.revision}, and it was changed at {newest}"
            )


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


def same_everywhere(held: Mapping[int, Mapping[str, str]]) -> list[str]:
    """In the end every node holds the same keys with the same values.

    Args:
        held: by node, all keys and values of its own state.
    """
    problems = []
    first = min(held, default=0)
    for node_id in sorted(held):
        one, other = held[first], held[node_id]
        every = one.keys() | other.keys()
        differing = sorted(key for key in every if one.get(key) != other.get(key))
        if differing:
            problems.append(
                f"nodes {first} and {node_id} differ in {len(differing)} keys: "
                f"{', '.join(differing[:SHOWN_MAX])}"
            )
    return problems


def leaders(outputs: Iterable[str]) -> dict[int, list[int]]:
    """Who said that it leads, by term, from everything that the nodes have printed."""
    found: dict[int, list[int]] = defaultdict(list)
    for output in outputs:
        for node_id, term in LEADS.findall(output):
            found[int(term)].append(int(node_id))
    return dict(sorted(found.items()))


def one_leader_a_term(led: Mapping[int, Sequence[int]]) -> list[str]:
    """Election safety (paper 5.2)."""
    return [
        f"term {term} had {len(nodes)} leaders: nodes {', '.join(map(str, nodes))}"
        for term, nodes in led.items()
        if len(nodes) > 1
    ]


def terms_explained(
    led: Collection[int], newest: int, faults: Sequence[tuple[str, float]]
) -> list[str]:
    """Who cannot win an election begins no term (thesis 9.6), so nearly each has a leader; and who
    was cut off does not come back with terms that nobody has heard of.

    Args:
        led: terms that had a leader.
        newest: that anybody knows of in the end.
        faults: the kind of each, and how many seconds it took.
    """
    vain = newest - len(led)
    most = VAIN_TERMS + sum(
        1 + seconds / (SLOW_SYNC_TERM_S if kind == SLOW_SYNC else VAIN_TERM_S)
        for kind, seconds in faults
    )
    if vain <= most:
        return []
    return [f"{vain} of {newest} terms had no leader, and {len(faults)} faults explain {most:.0f}"]


def leader_kept(before: int, after: int, took_s: float) -> list[str]:
    """Where nobody does anything the leader stays.

    Args:
        before, after: the newest terms at the beginning and at the end of that time.
    """
    if after - before <= 1 + took_s * IDLE_TERMS_PER_MIN / 60:
        return []
    return [f"terms rose from {before} to {after} within {took_s:.0f} s without any fault"]
