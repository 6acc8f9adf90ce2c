"""The verdict by revisions is the one of the general search, on histories where that is quick."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from tests.linearizability import by_revision
from tests.linearizability.checker import (
    IMPOSSIBLE,
    Model,
    Operation,
    Verdict,
    check,
    check_key,
)
from tests.linearizability.models import VERSIONED
from tests.simulation.run import run_seed

MOST_OPERATIONS = 9


def history(rng: random.Random) -> list[Operation]:
    """Operations that took effect one after the other, some of them seen a little wrongly."""
    operations, revision, value = [], 0, None
    here: int | None = None
    for number in range(rng.randint(2, MOST_OPERATIONS)):
        at = number * 10
        called, returned = at - rng.randint(0, 25), at + rng.randint(0, 25)
        name = rng.choice(("read", "read", "write", "cas", "delete"))
        argument: object = None
        if name == "read":
            result: object = (here or 0, value)
        elif name == "write":
            revision += rng.randint(1, 2)
            result, argument, value, here = revision, str(number), str(number), revision
        elif name == "delete":
            result = None
            if here is not None:
                revision += 1
                result, value, here = revision, None, None
        else:
            expected = here if rng.random() < 0.7 else rng.choice((None, revision))
            new = None if expected is not None and rng.random() < 0.2 else str(number)
            argument = (expected, new)
            if expected == here:
                revision += 1
                result, value, here = revision, new, None if new is None else revision
            else:
                result = ("is", here)
        operations.append(Operation(number, called, returned, name, argument, result))
    for _ in range(rng.choice((0, 1, 2, 4))):
        place = rng.randrange(len(operations))
        operations[place] = _spoilt(operations[place], rng, operations)
    return operations


def _spoilt(op: Operation, rng: random.Random, others: list[Operation]) -> Operation:
    if rng.random() < 0.6:
        shift = rng.randint(-40, 40)
        return op._replace(called=op.called + shift, returned=op.returned + shift)
    same = [other.result for other in others if other.name == op.name]
    return op._replace(result=rng.choice(same))


def test_both_checkers_agree_on_small_histories() -> None:
    rng = random.Random(20)
    verdicts = dict.fromkeys(Verdict, 0)
    for _ in range(20_000):
        operations = history(rng)
        expected = check({"k": operations}, VERSIONED).verdict
        found = by_revision.check({"k": operations})
        assert found.verdict is expected, "\n".join(map(str, [expected, *operations]))
        assert bool(found.window) == (expected is Verdict.ILLEGAL)
        verdicts[expected] += 1
    assert verdicts[Verdict.UNKNOWN] == 0
    assert min(verdicts[Verdict.ILLEGAL], verdicts[Verdict.LINEARIZABLE]) > 3000, verdicts


def views(rng: random.Random) -> tuple[list[Operation], list[Operation]]:
    """Changes of three keys, one after the other, and looks at all of them; some a little wrong."""
    changes: list[Operation] = []
    looks: list[Operation] = []
    shown: dict[str, tuple[int, str | None]] = dict.fromkeys("abc", (0, None))
    for number in range(rng.randint(3, 8)):
        at = number * 10
        called, returned = at - rng.randint(0, 25), at + rng.randint(0, 25)
        if rng.random() < 0.6:
            key, revision = rng.choice("abc"), len(changes) + 1
            gone = shown[key] != (0, None) and rng.random() < 0.3
            value = None if gone else str(number)
            shown[key] = (0, None) if gone else (revision, value)
            name = "delete" if gone else "write"
            change = Operation(number, called, returned, name, (key, value), revision)
            changes.append(change)
        else:
            result = (len(changes), dict(shown))
            looks.append(Operation(number, called, returned, "view", None, result))
    for _ in range(rng.choice((0, 1, 2))):
        spoilt = rng.choice((changes, looks))
        if not spoilt:
            continue
        place, shift = rng.randrange(len(spoilt)), rng.randint(-30, 30)
        op = spoilt[place]
        spoilt[place] = op._replace(called=op.called + shift, returned=op.returned + shift)
        if op.name == "view" and rng.random() < 0.4:
            seen = {**op.result[1], rng.choice("abc"): rng.choice(((0, None), (1, "0"), (2, "1")))}
            spoilt[place] = op._replace(result=(op.result[0], seen))
    return changes, looks


def _step(state: Any, op: Operation) -> Any:
    """A store of three keys that counts its revisions."""
    revision, records = state
    if op.name == "view":
        return state if op.result == (revision, dict(records)) else IMPOSSIBLE
    key, value = op.argument
    if op.result != revision + 1:
        return IMPOSSIBLE
    record = (0, None) if value is None else (op.result, value)
    return (op.result, tuple((k, record if k == key else old) for k, old in records))


STORE = Model((0, tuple((key, (0, None)) for key in "abc")), None, _step)


def test_views_of_several_keys_are_judged_as_the_search_does() -> None:
    rng = random.Random(21)
    verdicts = dict.fromkeys(Verdict, 0)
    for _ in range(20_000):
        changes, looks = views(rng)
        expected = check_key([*changes, *looks], STORE, math.inf)
        by_key = {
            key: [c._replace(argument=c.argument[1]) for c in changes if c.argument[0] == key]
            for key in "abc"
        }
        found = by_revision.check(by_key, looks)
        if not looks:
            continue
        assert found.verdict is expected, "\n".join(map(str, [expected, *changes, *looks]))
        verdicts[expected] += 1
    assert min(verdicts[Verdict.ILLEGAL], verdicts[Verdict.LINEARIZABLE]) > 3000, verdicts


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_a_stale_read_among_a_thousand_is_found(seed: int) -> None:
    """The history of a simulated cluster, far too long for the search, with one answer changed."""
    histories = run_seed(seed).clients.resolved().by_key
    assert by_revision.check(histories).verdict is Verdict.LINEARIZABLE
    key, operations = max(histories.items(), key=lambda item: len(item[1]))
    reads = sorted(
        (op for op in operations if op.name == "read" and op.result[1] is not None),
        key=lambda op: op.called,
    )
    first, last = reads[0], next(op for op in reversed(reads) if op.result != reads[0].result)
    spoilt = [op for op in operations if op is not last] + [last._replace(result=first.result)]
    assert by_revision.check({key: spoilt}).verdict is Verdict.ILLEGAL


def test_a_list_of_two_moments_is_found() -> None:
    """Each key by itself is what it may be, but not all of them at once."""
    history = run_seed(4).clients.resolved()
    assert by_revision.check(history.by_key, history.views).verdict is Verdict.LINEARIZABLE
    spoilt = 0
    for place, view in enumerate(history.views):
        revision, seen = view.result
        for key in seen:
            before = [c for c in history.by_key[key] if c.name == "write" and c.result < revision]
            if not before:
                continue
            last = max(before, key=lambda change: change.result)
            shown = (last.result, last.argument)
            if shown == seen[key]:
                continue
            views = list(history.views)
            views[place] = view._replace(result=(revision, {**seen, key: shown}))
            assert by_revision.check(history.by_key, views).verdict is Verdict.ILLEGAL
            spoilt += 1
    assert spoilt
