"""Clients that write, compare-and-swap, delete, change two keys at once and read at three levels,
and what they saw.

Every answer is judged by itself, against the committed log: what a write has come to, and what a
read saw at the index at which it was served. How the answers go together is judged at the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dengine.errors import DataCorruption, DengineError, StorageIO
from dengine.kv.commands import (
    Command,
    Compare,
    Condition,
    ConditionFailed,
    DeleteRange,
    DeleteResult,
    Get,
    GetResult,
    Put,
    PutResult,
    Result,
    Txn,
    TxnResult,
)
from tests.linearizability import checker as search
from tests.linearizability.by_revision import check
from tests.linearizability.checker import FOREVER, Operation, Verdict
from tests.linearizability.models import VERSIONED
from tests.linearizability.timeline import as_text
from tests.simulation.loop import MS
from tests.simulation.model import NOTHING, mark_of
from tests.simulation.violation import violated

if TYPE_CHECKING:
    from tests.simulation.machine import Machine, Process
    from tests.simulation.world import World

LEVELS = ("linearizable", "lease", "eventual")
SEARCHED = 50  # each so many-th seed is judged by the general search as well
SEARCH_S = 600.0


@dataclass(slots=True, eq=False)
class Call:
    """One request that a client has sent and not seen answered."""

    client: int
    key: bytes
    name: str
    argument: Any
    command: Command | None  # None: a read
    level: str
    called: int
    floor: int = 0  # of the index that a read must have applied
    process: Process | None = None
    timeout_s: float | None = None  # None: one of a few is drawn
    told: Callable[[bool], None] | None = None  # that it has come to an end, and whether well


class Clients:
    """Closed loops: each client thinks, calls any node, and waits for the answer."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.stopped = False
        self.history: dict[bytes, list[Operation]] = {}
        self.pending: dict[Call, None] = {}
        self.operations = 0
        self.shown_index = 0  # the newest entry of which anybody has seen what came of it
        self.refused: set[bytes] = set()  # marks of commands that will never happen
        self._unknown: list[tuple[bytes, Operation, bytes]] = []
        self._eventual: dict[Process, int] = {}
        self._counter = 0
        self._clients = world.plan.clients
        self._rngs = [random.Random(f"{world.seed} client {i}") for i in range(self._clients + 1)]
        self._revision: dict[tuple[int, bytes], int | None] = {}

    def start(self) -> None:
        for slot in range(self._clients):
            self._think(slot)

    def _think(self, slot: int) -> None:
        pause_ns = int(self._rngs[slot].expovariate(1.0) * 4 * MS)
        self.world.scheduler.after(pause_ns, self._call, slot)

    def _call(self, slot: int) -> None:
        if self.stopped:
            return
        rng = self._rngs[slot]
        machines = list(self.world.machines.values())
        machine = rng.choice(machines)
        if rng.random() < 0.3:  # whoever believes to lead
            leading = [m for m in machines if m.process and m.process.leads]
            machine = rng.choice(leading) if leading else machine
        if not self._knows_leader(machine):  # as a client that has tried another address
            machine = rng.choice(machines)
        process = machine.process
        if process is None or not process.serves:
            self.world.scheduler.after(20 * MS, self._call, slot)
            return
        self._submit(self._choose(slot, rng), process, slot)

    def _submit(self, call: Call, process: Process, slot: int | None = None) -> None:
        call.process = process
        self.pending[call] = None
        process.arrived(self._invoke, call, slot)

    def burst(
        self, process: Process, count: int, rng: random.Random, timeout_s: float | None = None
    ) -> None:
        """So many writes at once to one node, by clients that are not heard of again."""
        for _ in range(count if process.serves else 0):
            call = self._write(self._key(rng.randrange(self.world.plan.keys)))
            call.timeout_s = timeout_s
            self._submit(call, process)

    def ask(self, process: Process, level: str, told: Callable[[bool], None]) -> None:
        """One write (`level` is empty) or read of a node, by a client of its own."""
        call = self._read(self._key(0), level) if level else self._write(self._key(0))
        call.timeout_s, call.told = 0.5, told
        self._submit(call, process)

    def _write(self, key: bytes) -> Call:
        self._counter += 1
        value, now = b"%d" % self._counter, self.world.scheduler.now
        return Call(self._clients, key, "write", value, Put(key, value), "", now)

    def _read(self, key: bytes, level: str) -> Call:
        return Call(self._clients, key, "read", None, None, level, self.world.scheduler.now)

    def read_once(self, process: Process, rng: random.Random) -> None:
        """By a client that asks this very node, if that believes to lead."""
        if process.serves and process.leads and not self.stopped:
            key = self._key(rng.randrange(self.world.plan.keys))
            self._submit(self._read(key, rng.choice(LEVELS[:2])), process)
            if self.world.leader() is not process:
                self.world.count("read at a deposed leader")

    @staticmethod
    def _knows_leader(machine: Machine) -> bool:
        process = machine.process
        return process is not None and process.node is not None and process.node.leader is not None

    def _choose(self, slot: int, rng: random.Random) -> Call:
        key = self._key(rng.randrange(self.world.plan.keys))
        self._counter += 1
        value = b"%d" % self._counter
        now, dice = self.world.scheduler.now, rng.random()
        if dice < 0.42:
            return Call(slot, key, "write", value, Put(key, value), "", now)
        if dice < 0.6:
            expected = self._revision.get((slot, key))
            condition = (
                Condition(if_none_match=True)
                if expected is None
                else Condition(if_match=(expected,))
            )
            argument = (expected, value)
            return Call(slot, key, "cas", argument, Put(key, value, condition), "", now)
        if dice < 0.65:
            # Of this key only; the limit is never reached, and makes the command one of a kind.
            command = DeleteRange(key, key + b"\0", 1000 + self._counter)
            return Call(slot, key, "delete", None, command, "", now)
        if dice < 0.7 and self.world.plan.keys > 1:
            return self._swap_two(slot, key, value, rng)
        level = rng.choices(LEVELS, (6, 3, 1))[0]
        return Call(slot, key, "read", None, None, level, now)

    def _swap_two(self, slot: int, key: bytes, value: bytes, rng: random.Random) -> Call:
        """A transaction: if `key` is what it was, it and another one change together.

        Some only put, which the machine does all at once; beside a read it goes one by one.
        """
        other = rng.choice([k for k in map(self._key, range(self.world.plan.keys)) if k != key])
        expected = self._revision.get((slot, key))
        compare = Compare(key, "mod_revision", "=", expected or 0)
        success: tuple[Put | Get, ...] = (Put(key, value), Put(other, b"+" + value))
        if rng.random() < 0.5:
            success = (*success, Get(other))
        argument = (expected, value, other, b"+" + value)
        command = Txn((compare,), success, (Get(key),))
        return Call(slot, key, "txn", argument, command, "", self.world.scheduler.now)

    @staticmethod
    def _key(number: int) -> bytes:
        return b"k%d" % number

    def _invoke(self, call: Call, slot: int | None) -> None:
        assert call.process is not None
        call.floor = self.shown_index
        call.called = self.world.scheduler.now
        at = call.process.member.id
        self.world.note("call", call.client, call.level, *_words(call), "at", at)
        task = call.process.loop.create_task(self._perform(call))
        task.add_done_callback(lambda done: self._answered(call, slot, done))

    async def _perform(self, call: Call) -> Any:
        assert call.process is not None
        node, loop = call.process.node, call.process.loop
        assert node is not None
        timeout_s = call.timeout_s or self._rngs[call.client].choice((0.05, 0.1, 0.5))
        if call.command is not None:
            return await node.write(call.command, loop.time() + timeout_s)
        await node.read_barrier(call.level, loop.time() + timeout_s)
        record = node.state.get(call.key)
        shown = NOTHING if record is None else (record.mod_revision, record.value)
        self._judge_read(call, call.process, node.state.applied.index, shown)
        return shown

    def _judge_read(
        self, call: Call, process: Process, index: int, shown: tuple[int, bytes | None]
    ) -> None:
        """Invariant 12: what was read is what the log says at the entry at which it was read, and
        that entry is as new as was promised.
        """
        checker, what = self.world.checker, f"{process.member}, {call.level} read of {call.key!r}"
        checker.look(process)  # in this very event it may have been committed
        if index > len(checker.committed):
            violated("12 future", f"{what}: entry {index} is not committed")
        truth = checker.model.read(call.key, index)
        if shown != truth:
            violated("12 reads", f"{what}: {shown}, but after entry {index} it is {truth}")
        if call.level == "eventual":
            before = self._eventual.get(process, 0)
            if index < before:
                violated("12 monotonic", f"{what}: went back from entry {before} to {index}")
            self._eventual[process] = index
        elif index < call.floor:
            violated(
                "12 fresh reads",
                f"{what}: saw entry {index}, although somebody had seen {call.floor} before",
            )
        self.shown_index = max(self.shown_index, index)
        self.world.count(f"{call.level} read")

    # --- answers ----------------------------------------------------------------------------------

    def _answered(self, call: Call, slot: int | None, task: Any) -> None:
        if self.pending.pop(call, call) is call:
            return  # the client was told before that the connection broke
        if not self.stopped and slot is not None:
            self._think(slot)
        assert call.process is not None
        self.world.checker.look(call.process)  # in this very event it may have been committed
        error = None if task.cancelled() else task.exception()
        self.world.note("answer", call.client, *_words(call), *_answer(task, error))
        if task.cancelled():
            self._lost(call)
        elif error is None:
            self._succeeded(call, task.result())
        elif isinstance(error, DengineError):
            self.world.count(f"refused: {error.name}")
            self.expected(error)
            if error.outcome == "none" and call.command is not None:
                self._refuse(call)
            else:
                self._lost(call)
        elif isinstance(error, Exception):
            raise error
        if call.told is not None:
            call.told(error is None and not task.cancelled())

    def expected(self, error: DengineError) -> None:
        """Who asks is never told of an error inside of a node, but for a disk that gave a reason
        for it.
        """
        world = self.world
        reason = (isinstance(error, DataCorruption) and world.faults.ever_damaged) or (
            isinstance(error, StorageIO) and world.disks_refused
        )
        if error.status == 500 and not reason:
            violated("0 no surprise", f"an answer was {error.name}: {error.message}")

    def _succeeded(self, call: Call, result: Any) -> None:
        self.operations += 1
        seen: Any = None
        if call.command is not None:
            self._acknowledged(call, result)
        if isinstance(result, TxnResult):
            self.world.count("transaction")
            self._revision[(call.client, call.key)] = _revision_after(result)
            operation = Operation(
                call.client, call.called, self.world.scheduler.now, call.name, call.argument
            )
            for key, part in _parts(call.key, operation, result):
                self.history.setdefault(key, []).append(part)
            return
        if isinstance(result, PutResult):
            seen = result.revision
        elif isinstance(result, ConditionFailed):
            seen = ("is", result.current_revision)
            self._revision[(call.client, call.key)] = result.current_revision
        elif isinstance(result, DeleteResult):
            seen = result.revision if result.deleted else None
        elif call.level == "eventual":
            return
        else:
            seen = result
        if call.name in ("write", "cas", "read") and not isinstance(result, ConditionFailed):
            self._revision[(call.client, call.key)] = (
                result[0] or None if call.name == "read" else result.revision
            )
        self._record(call, self.world.scheduler.now, seen)

    def _acknowledged(self, call: Call, result: Result) -> None:
        """Invariant 11: who is told what a write has come to has a committed entry behind it at
        that moment, and is told the truth.
        """
        assert call.command is not None
        self.acknowledged(mark_of(call.command), result)

    def acknowledged(self, mark: bytes, result: Result) -> None:
        """As `_acknowledged`, of any request."""
        model = self.world.checker.model
        index = model.index_of.get(mark)
        if index is None:
            violated("11 acknowledged", f"{mark!r} was acknowledged uncommitted")
        if result not in model.answers[mark]:
            violated("11 outcome", f"{mark!r} was answered {result}, not {model.answers[mark]}")
        self.shown_index = max(self.shown_index, index)

    def _record(self, call: Call, returned: float, result: Any) -> None:
        operation = Operation(call.client, call.called, returned, call.name, call.argument, result)
        self.history.setdefault(call.key, []).append(operation)

    def _refuse(self, call: Call) -> None:
        assert call.command is not None
        mark = mark_of(call.command)
        self.refused.add(mark)  # from here on the checker looks out for it
        if mark in self.world.checker.model.index_of:
            violated("11 outcome", f"{mark!r} was refused, although it is committed")

    def _lost(self, call: Call) -> None:
        """Nobody knows whether it happened, or will."""
        if call.command is None:
            return
        self.world.count("outcome unknown")
        operation = Operation(call.client, call.called, FOREVER, call.name, call.argument)
        self._unknown.append((call.key, operation, mark_of(call.command)))

    def process_gone(self, process: Process) -> None:
        """Its clients see their connections break."""
        for call in [c for c in self.pending if c.process is process]:
            del self.pending[call]
            self.world.note("answer", call.client, *_words(call), "connection lost")
            self._lost(call)
            if call.told is not None:
                call.told(False)
            if call.client < self._clients:
                self._think(call.client)

    # --- the verdict ------------------------------------------------------------------------------

    def verify(self) -> None:
        """At the end, when nothing is on its way any more. Raises Violation."""
        histories = self.resolved_histories()
        finding = check(histories)
        if finding.verdict is not Verdict.LINEARIZABLE:
            violated("linearizability", f"key {finding.key!r}: {as_text(finding.window)}")
        if self.world.seed % SEARCHED == 0:
            self.world.count("searched")
            finding = search.check(histories, VERSIONED, limit_s=SEARCH_S)
            if finding.verdict is not Verdict.LINEARIZABLE:
                text = as_text(finding.window)
                violated("linearizability", f"{finding.verdict}: key {finding.key!r}: {text}")

    def resolved_histories(self) -> dict[bytes, list[Operation]]:
        """What was done to each key, and what came of it, also where no client was told."""
        histories = {key: list(operations) for key, operations in self.history.items()}
        for key, operation in self._resolved():
            histories.setdefault(key, []).append(operation)
        return histories

    def _resolved(self) -> Iterator[tuple[bytes, Operation]]:
        """What clients were not told of and was committed, with what came of it.

        It took effect when it was committed, for every read that covers it, acknowledged or not.
        """
        checker, model = self.world.checker, self.world.checker.model
        for key, operation, mark in self._unknown:
            result = model.result(mark)
            if result is not None and _changed(result):
                at = checker.committed_at[model.index_of[mark] - 1]
                called = max(operation.called, at)
                done = operation._replace(called=called, returned=at + 1)
                if isinstance(result, TxnResult):
                    yield from _parts(key, done, result)
                else:
                    yield key, done._replace(result=_seen(result))


def _words(call: Call) -> tuple[object, ...]:
    return call.name, call.key, *(() if call.argument is None else (call.argument,))


def _answer(task: Any, error: BaseException | None) -> tuple[object, ...]:
    if error is None:
        return ("cancelled",) if task.cancelled() else ("->", task.result())
    outcome = f", outcome {error.outcome}" if isinstance(error, DengineError) else ""
    return (f"-> {type(error).__name__}{outcome}: {error}",)


def _changed(result: Result) -> bool:
    if isinstance(result, TxnResult):
        return result.succeeded
    return isinstance(result, PutResult) or (
        isinstance(result, DeleteResult) and result.deleted > 0
    )


def _revision_after(result: TxnResult) -> int | None:
    """Of the key that was compared."""
    if result.succeeded:
        return result.revision
    (found,) = result.results
    assert isinstance(found, GetResult)
    return found.mod_revision or None


def _parts(key: bytes, txn: Operation, result: TxnResult) -> Iterator[tuple[bytes, Operation]]:
    """What a transaction was for each of its keys: all of it happened at one moment."""
    expected, value, other, other_value = txn.argument
    swap = txn._replace(name="cas", argument=(expected, value))
    if not result.succeeded:
        yield key, swap._replace(result=("is", _revision_after(result)))
        return
    yield key, swap._replace(result=result.revision)
    yield other, txn._replace(name="write", argument=other_value, result=result.revision)


def _seen(result: Result) -> Any:
    """A result as the model has it."""
    if isinstance(result, ConditionFailed):
        return ("is", result.current_revision)
    if isinstance(result, DeleteResult):
        return result.revision if result.deleted else None
    assert isinstance(result, PutResult)
    return result.revision
