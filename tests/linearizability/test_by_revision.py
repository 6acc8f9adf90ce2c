"""The verdict by revisions is the one of the general search, on histories where that is quick."""

from __future__ import annotations

import random

import pytest

from tests.linearizability import by_revision
from tests.linearizability.checker import Operation, Verdict, check
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
            argument = (expected, str(number))
            if expected == here:
                revision += 1
                result, value, here = revision, str(number), revision
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


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_a_stale_read_among_a_thousand_is_found(seed: int) -> None:
    """The history of a simulated cluster, far too long for the search, with one answer changed."""
    histories = run_seed(seed).clients.resolved_histories()
    assert by_revision.check(histories).verdict is Verdict.LINEARIZABLE
    key, operations = max(histories.items(), key=lambda item: len(item[1]))
    reads = sorted(
        (op for op in operations if op.name == "read" and op.result[1] is not None),
        key=lambda op: op.called,
    )
    first, last = reads[0], next(op for op in reversed(reads) if op.result != reads[0].result)
    spoilt = [op for op in operations if op is not last] + [last._replace(result=first.result)]
    assert by_revision.check({key: spoilt}).verdict is Verdict.ILLEGAL
