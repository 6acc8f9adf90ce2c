"""The checker against histories with known verdicts, and against the plainest of all checkers."""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.linearizability.checker import (
    FOREVER,
    IMPOSSIBLE,
    Model,
    Operation,
    Verdict,
    check,
    check_key,
)
from tests.linearizability.models import REGISTER, VERSIONED
from tests.linearizability.timeline import as_text, write_svg

RECORDED = Path(__file__).resolve().parents[3] / "shared" / "conformance" / "jepsen-etcd"
LINE = re.compile(r"INFO  jepsen\.util - (\d+)\t:(\w+)\t:(\w+)\t(.*)")


def judge(history: Sequence[Operation], model: Model = REGISTER) -> Verdict:
    return check_key(history, model, time.monotonic() + 60)


def recorded(path: Path) -> list[Operation]:
    """A jepsen log as operations; time is the line number."""
    history: list[Operation] = []
    open_calls: dict[int, Operation] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        found = LINE.match(line)
        if found is None:
            continue
        client, kind, name, text = int(found[1]), found[2], found[3], found[4]
        values = [int(v) for v in re.findall(r"\d+", text)]
        if kind == "invoke":
            argument = None if name == "read" else values[0] if name == "write" else tuple(values)
            open_calls[client] = Operation(client, number, FOREVER, name, argument)
            continue
        op = open_calls.pop(client)
        if kind == "info":
            history.append(op)
        elif name == "read":
            history.append(op._replace(returned=number, result=values[0] if values else None))
        else:
            history.append(op._replace(returned=number, result=kind == "ok"))
    return history + list(open_calls.values())


@pytest.mark.recorded(RECORDED)
def test_recorded_histories_of_etcd() -> None:
    """Every verdict that others reached on these recordings is reached here."""
    verdicts = json.loads((RECORDED / "verdicts.json").read_text(encoding="utf-8"))
    assert verdicts
    for name, linearizable in verdicts.items():
        history = recorded(RECORDED / name)
        finding = check({"r": history}, REGISTER)
        assert (finding.verdict is Verdict.LINEARIZABLE) == linearizable, name
        assert (finding.verdict is Verdict.ILLEGAL) == (len(finding.window) > 0), name


def by_permutation(history: Sequence[Operation], model: Model) -> Verdict:
    """All orders of all choices of what took effect. Slow, and too simple to be wrong."""
    certain = [op for op in history if op.returned != FOREVER]
    unknown = [op for op in history if op.returned == FOREVER]
    for count in range(len(unknown) + 1):
        for chosen in itertools.combinations(unknown, count):
            for order in itertools.permutations([*certain, *chosen]):
                if _explains(order, model):
                    return Verdict.LINEARIZABLE
    return Verdict.ILLEGAL


def _explains(order: Sequence[Operation], model: Model) -> bool:
    for earlier, later in itertools.combinations(order, 2):
        if later.returned < earlier.called:
            return False
    state = model.initial
    for op in order:
        state = model.step(state, op)
        if state is IMPOSSIBLE:
            return False
    return True


@st.composite
def small_histories(draw: st.DrawFn) -> list[Operation]:
    history = []
    for client in range(draw(st.integers(1, 5))):
        called = draw(st.integers(0, 8))
        returned = draw(st.one_of(st.integers(called, 9), st.just(FOREVER)))
        name = draw(st.sampled_from(["read", "write", "cas"]))
        value = st.integers(0, 2)
        argument = {
            "read": st.none(),
            "write": value,
            "cas": st.tuples(value, value),
        }[name]
        result = {"read": st.one_of(st.none(), value), "write": st.none(), "cas": st.booleans()}
        known = draw(result[name]) if returned != FOREVER else None
        if name == "read" and returned == FOREVER:
            continue  # a read without an answer says nothing
        history.append(Operation(client, called, returned, name, draw(argument), known))
    return history


@settings(max_examples=400, deadline=None)
@given(small_histories())
def test_agrees_with_trying_every_order(history: list[Operation]) -> None:
    """On small histories the search finds exactly what trying all orders finds."""
    assert judge(history) is by_permutation(history, REGISTER)


def busy_history(count: int, clients: int, seed: int, keep: float = 1.0) -> list[Operation]:
    """`count` operations of `clients` on a register that takes effect at a moment in between."""
    rng = random.Random(seed)
    ready = [(rng.random(), client) for client in range(clients)]
    pending = []
    for number in range(count):
        called, client = min(ready)
        ready.remove((called, client))
        point = called + rng.random()
        returned = point + rng.random()
        ready.append((returned + rng.random() * 0.1, client))
        pending.append((point, number, client, called, returned))
    value, history = None, []
    for _, number, client, called, returned in sorted(pending):
        lost = rng.random() > keep
        if rng.random() < 0.5:
            value = number
            op = Operation(client, called, FOREVER if lost else returned, "write", value)
        else:
            op = Operation(client, called, returned, "read", None, value)
        history.append(op)
    return history


def test_twenty_thousand_operations_on_one_key_take_about_a_second() -> None:
    """A long run of the nemesis can be judged while one waits."""
    history = busy_history(20_000, 8, seed=1)
    started = time.monotonic()
    assert judge(history) is Verdict.LINEARIZABLE
    assert time.monotonic() - started < 10, "an order of magnitude above what it should take"


def test_unknown_outcomes_may_have_happened_or_not() -> None:
    """Writes whose answers were lost are explained either way."""
    assert judge(busy_history(2000, 4, seed=2, keep=0.98)) is Verdict.LINEARIZABLE


def test_one_stale_read_among_thousands_is_found_and_shown(tmp_path: Path) -> None:
    """The report is the contradiction itself: a handful of operations, as text and as a picture."""
    history = busy_history(5000, 5, seed=3)
    reads = [n for n, op in enumerate(history) if op.name == "read" and n > 2500]
    stale = reads[0]
    history[stale] = history[stale]._replace(result=history[100].result or 1)
    finding = check({"x": history}, REGISTER)
    assert finding.verdict is Verdict.ILLEGAL
    assert len(finding.window) <= 12
    assert any(op.called == history[stale].called for op in finding.window)
    assert "no order of these operations" in as_text(finding.window)
    write_svg(finding.window, tmp_path / "window.svg", "key x")
    assert (tmp_path / "window.svg").read_text(encoding="utf-8").count("<rect") > 1


def test_when_time_is_up_the_verdict_is_unknown() -> None:
    """Never a pass by exhaustion."""
    assert check_key(busy_history(20_000, 8, seed=4), REGISTER, 0.0) is Verdict.UNKNOWN


def versioned(*rows: tuple[float, float, str, object, object]) -> list[Operation]:
    return [Operation(n, *row) for n, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("history", "verdict"),
    [
        (versioned((0, 1, "write", "a", 5), (2, 3, "read", None, (5, "a"))), "linearizable"),
        (versioned((0, 1, "write", "a", 5), (2, 3, "read", None, (6, "a"))), "illegal"),
        (versioned((0, 1, "write", "a", 5), (2, 3, "write", "b", 4)), "illegal"),
        (
            versioned((0, FOREVER, "write", "a", None), (2, 3, "read", None, (9, "a"))),
            "linearizable",
        ),
        (
            versioned(
                (0, FOREVER, "write", "a", None),
                (2, 3, "read", None, (9, "a")),
                (4, 5, "read", None, (8, "a")),
            ),
            "illegal",
        ),
        (versioned((0, 1, "write", "a", 5), (2, 3, "cas", (5, "b"), 7)), "linearizable"),
        (versioned((0, 1, "write", "a", 5), (2, 3, "cas", (4, "b"), 7)), "illegal"),
        (versioned((0, 1, "write", "a", 5), (2, 3, "cas", (4, "b"), ("is", 5))), "linearizable"),
        (versioned((0, 1, "cas", (None, "b"), 3), (2, 3, "read", None, (3, "b"))), "linearizable"),
        (versioned((0, 1, "write", "a", 5), (2, 3, "cas", (None, "b"), 7)), "illegal"),
        (
            versioned(
                (0, 1, "write", "a", 5), (2, 3, "delete", None, 6), (4, 5, "read", None, (0, None))
            ),
            "linearizable",
        ),
        (versioned((0, 1, "write", "a", 5), (2, 3, "delete", None, None)), "illegal"),
        (
            versioned((0, 1, "write", "a", 5), (2, 3, "delete", None, 6), (4, 5, "write", "c", 6)),
            "illegal",
        ),
    ],
)
def test_versions(history: list[Operation], verdict: str) -> None:
    """Every reply carries its revision, which pins down the order much further."""
    assert judge(history, VERSIONED).value == verdict
