"""Is a recorded history linearizable? Wing and Gong's search with Lowe's memory.

J. Wing, C. Gong: "Testing and Verifying Concurrent Objects" (1993) search for an order of the
operations that a sequential object could have taken, each at a moment between its call and its
return. G. Lowe: "Testing for Linearizability" (2017) never visits the same set of operations with
the same state twice. Keys are independent objects, and linearizability is local (Herlihy and Wing,
1990), so every key is searched by itself.

The verdict is exact, or UNKNOWN when the time is up, and UNKNOWN is never a pass.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

FOREVER = float("inf")


class Operation(NamedTuple):
    """One call as its client saw it. Times are on one clock, in any unit.

    `returned` is FOREVER when the outcome is unknown: it may take effect any time after `called`,
    or never. What certainly did not happen does not belong into a history.
    """

    client: int
    called: float
    returned: float
    name: str  # as the model knows it
    argument: Any = None
    result: Any = None


class Model(NamedTuple):
    """A sequential object.

    `step(state, operation)` is the state after it, or IMPOSSIBLE when its result contradicts the
    state. States are hashable. `anything` is the state of which nothing is known.
    """

    initial: Hashable
    anything: Hashable
    step: Callable[[Any, Operation], Hashable]


IMPOSSIBLE = object()


class Verdict(enum.Enum):
    LINEARIZABLE = "linearizable"
    ILLEGAL = "illegal"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict on one history; for an illegal one the key and its shortest illegal window."""

    verdict: Verdict
    key: Hashable = None
    window: tuple[Operation, ...] = ()


def check(
    histories: Mapping[Hashable, Sequence[Operation]], model: Model, *, limit_s: float = 60.0
) -> Finding:
    """Judge the operations on each key.

    Args:
        histories: by key.
        limit_s: for all keys together; the search is exponential in the worst case.
    """
    deadline = time.monotonic() + limit_s
    unknown = None
    for key, history in histories.items():
        verdict = check_key(history, model, deadline)
        if verdict is Verdict.ILLEGAL:
            return Finding(verdict, key, shortest_window(history, model, deadline))
        if verdict is Verdict.UNKNOWN:
            unknown = Finding(verdict, key)
    return unknown or Finding(Verdict.LINEARIZABLE)


def check_key(history: Sequence[Operation], model: Model, deadline: float) -> Verdict:
    """Judge the operations on one key; `deadline` is on `time.monotonic`."""
    return _Search(history, model, model.initial).run(deadline)


class _Search:
    """Depth first over "which operation takes effect next", on a linked list of calls and returns.

    Only a call before the first return may be next: that operation had to happen by then. When it
    comes to a return instead, the last choice was wrong.
    """

    def __init__(self, history: Sequence[Operation], model: Model, state: Hashable) -> None:
        self._operations = sorted(history, key=lambda op: op.called)
        self._step = model.step
        self._state = state
        events = [(op.called, 0, n) for n, op in enumerate(self._operations)]
        events += [(op.returned, 1, n) for n, op in enumerate(self._operations)]
        events.sort()  # a call and a return at the same moment overlap
        size = len(events)
        self._next = list(range(1, size + 2))  # entry 0 is the head, entry size + 1 the end
        self._previous = list(range(-1, size + 1))
        self._operation = [0, *(n for _, _, n in events)]
        self._return_of = [0] * (size + 1)  # 0 marks an entry that is itself a return
        returns = {n: entry for entry, (_, kind, n) in enumerate(events, 1) if kind}
        for entry, (_, kind, n) in enumerate(events, 1):
            if not kind:
                self._return_of[entry] = returns[n]
        self._owed = sum(op.returned != FOREVER for op in self._operations)

    def run(self, deadline: float) -> Verdict:
        step, following, end = self._step, self._next, len(self._next) - 1
        operations, operation_of, return_of = self._operations, self._operation, self._return_of
        state, owed = self._state, self._owed
        base, mask = 0, 0  # done: every operation before `base`, and those in `mask` behind it
        seen: set[tuple[int, int, Hashable]] = set()
        choices: list[tuple[int, Hashable, int, int]] = []
        entry, rounds = following[0], 0
        while owed:
            rounds += 1
            if not rounds & 4095 and time.monotonic() > deadline:
                return Verdict.UNKNOWN
            if entry != end and return_of[entry]:
                number = operation_of[entry]
                new = step(state, operations[number])
                if new is not IMPOSSIBLE:
                    new_base, new_mask = base, mask | 1 << (number - base)
                    while new_mask & 1:
                        new_mask >>= 1
                        new_base += 1
                    done = (new_base, new_mask, new)
                    if done not in seen:
                        seen.add(done)
                        choices.append((entry, state, base, mask))
                        state, base, mask = new, new_base, new_mask
                        owed -= operations[number].returned != FOREVER
                        self._lift(entry)
                        entry = following[0]
                        continue
                entry = following[entry]
                continue
            if not choices:
                return Verdict.ILLEGAL
            entry, state, base, mask = choices.pop()
            owed += operations[operation_of[entry]].returned != FOREVER
            self._put_back(entry)
            entry = following[entry]
        return Verdict.LINEARIZABLE

    def _lift(self, call: int) -> None:
        for entry in (call, self._return_of[call]):
            before, after = self._previous[entry], self._next[entry]
            self._next[before], self._previous[after] = after, before

    def _put_back(self, call: int) -> None:
        for entry in (self._return_of[call], call):
            before, after = self._previous[entry], self._next[entry]
            self._next[before] = self._previous[after] = entry


def shortest_window(
    history: Sequence[Operation], model: Model, deadline: float
) -> tuple[Operation, ...]:
    """The few operations of an illegal history that contradict each other, in order of call.

    Cut at the end: the first return that cannot be explained; prefixes of a linearizable history
    are linearizable, so halving finds it. Cut at the start: as much as can go when the state before
    may be anything. Then every read that is not needed.
    """
    ends = sorted(op.returned for op in history if op.returned != FOREVER)
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        if _illegal(_until(history, ends[middle]), model, model.initial, deadline):
            high = middle
        else:
            low = middle + 1
    window = sorted(_until(history, ends[low]), key=lambda op: op.called)
    state = model.initial
    low, high = 0, len(window) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if _illegal(window[middle:], model, model.anything, deadline):
            low, state = middle, model.anything
        else:
            high = middle - 1
    return tuple(_without_bystanders(window[low:], model, state, deadline))


def _without_bystanders(
    window: list[Operation], model: Model, state: Hashable, deadline: float
) -> list[Operation]:
    for op in window if len(window) <= 200 else ():
        fewer = [other for other in window if other is not op]
        # Without a write every read of it is illegal too, which would explain nothing.
        if op.name == "read" and _illegal(fewer, model, state, deadline):
            window = fewer
    return window


def _until(history: Iterable[Operation], moment: float) -> list[Operation]:
    """What had been called by `moment`; what had not returned then is of unknown outcome."""
    return [
        op if op.returned <= moment else op._replace(returned=FOREVER, result=None)
        for op in history
        if op.called <= moment and (op.returned <= moment or op.name != "read")
    ]


def _illegal(history: Sequence[Operation], model: Model, state: Hashable, deadline: float) -> bool:
    return _Search(history, model, state).run(deadline) is Verdict.ILLEGAL
