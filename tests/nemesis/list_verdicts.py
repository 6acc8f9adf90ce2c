"""What a run must have kept of its lists: they only grow, and appends of one transaction stay
together. Each judge yields sentences about what it found wrong.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tests.linearizability.checker import FOREVER
from tests.nemesis.lists import ListTxn, elements, text
from tests.nemesis.verdicts import SHOWN_MAX
from tests.nemesis.workload import Records


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
