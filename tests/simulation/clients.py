"""Clients that write, compare-and-swap, delete, change two keys at once and read at three levels,
and what they saw.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dengine.errors import DengineError
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
    decode_batch,
)
from dengine.kv.machine import apply_batch
from dengine.raft.types import Entry, EntryKind
from tests.kv.twin import DictView
from tests.linearizability.by_revision import check
from tests.linearizability.checker import FOREVER, Operation, Verdict
from tests.linearizability.timeline import as_text
from tests.simulation.invariants import mark_of, violated
from tests.simulation.loop import MS

if TYPE_CHECKING:
    from tests.simulation.machine import Machine, Process
    from tests.simulation.world import World

LEVELS = ("linearizable", "lease", "eventual")


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


class Clients:
    """Closed loops: each client thinks, calls any node, and waits for the answer."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.stopped = False
        self.history: dict[bytes, list[Operation]] = {}
        self.pending: dict[Call, None] = {}
        self.operations = 0
        self.acked_index = 0
        self._refused: set[bytes] = set()  # marks of commands that will never happen
        self._told: dict[bytes, Result] = {}  # mark -> the answer
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
        call = self._choose(slot, rng)
        call.process = process
        self.pending[call] = None
        process.arrived(self._invoke, call, slot)

    def burst(self, process: Process, count: int, rng: random.Random) -> None:
        """So many writes at once to one node, by clients that are not heard of again."""
        for _ in range(count if process.serves else 0):
            self._counter += 1
            key, value = self._key(rng.randrange(self.world.plan.keys)), b"%d" % self._counter
            now = self.world.scheduler.now
            call = Call(
                self._clients, key, "write", value, Put(key, value), "", now, process=process
            )
            self.pending[call] = None
            process.arrived(self._invoke, call, None)

    def read_once(self, process: Process, rng: random.Random) -> None:
        """By a client that asks this very node, if that believes to lead."""
        if process.serves and process.leads and not self.stopped:
            key = self._key(rng.randrange(self.world.plan.keys))
            now, level = self.world.scheduler.now, rng.choice(LEVELS[:2])
            call = Call(self._clients, key, "read", None, None, level, now, process=process)
            self.pending[call] = None
            process.arrived(self._invoke, call, None)
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
        """A transaction: if `key` is what it was, it and another one change together."""
        other = rng.choice([k for k in map(self._key, range(self.world.plan.keys)) if k != key])
        expected = self._revision.get((slot, key))
        compare = Compare(key, "mod_revision", "=", expected or 0)
        success = (Put(key, value), Put(other, b"+" + value))
        argument = (expected, value, other, b"+" + value)
        command = Txn((compare,), success, (Get(key),))
        return Call(slot, key, "txn", argument, command, "", self.world.scheduler.now)

    @staticmethod
    def _key(number: int) -> bytes:
        return b"k%d" % number

    def _invoke(self, call: Call, slot: int | None) -> None:
        assert call.process is not None
        call.floor = self.acked_index
        call.called = self.world.scheduler.now
        task = call.process.loop.create_task(self._perform(call))
        task.add_done_callback(lambda done: self._answered(call, slot, done))

    async def _perform(self, call: Call) -> Any:
        assert call.process is not None
        node, loop = call.process.node, call.process.loop
        assert node is not None
        timeout_s = self._rngs[call.client].choice((0.05, 0.1, 0.5))
        if call.command is not None:
            return await node.write(call.command, loop.time() + timeout_s)
        await node.read_barrier(call.level, loop.time() + timeout_s)
        record = node.state.get(call.key)
        if call.level == "eventual":
            self._check_monotonic(call, node.state.revision)
        elif node.state.applied.index < call.floor:
            violated(
                "12 fresh reads",
                f"a {call.level} read on {call.process.member} saw {node.state.applied.index}, "
                f"although {call.floor} had been acknowledged before it began",
            )
        self.world.count(f"{call.level} read")
        return (0, None) if record is None else (record.mod_revision, record.value)

    def _check_monotonic(self, call: Call, revision: int) -> None:
        assert call.process is not None
        before = self._eventual.get(call.process, 0)
        if revision < before:
            violated("12 monotonic", f"{call.process.member} went back from {before} to {revision}")
        self._eventual[call.process] = revision

    # --- answers ----------------------------------------------------------------------------------

    def _answered(self, call: Call, slot: int | None, task: Any) -> None:
        if self.pending.pop(call, call) is call:
            return  # the client was told before that the connection broke
        if not self.stopped and slot is not None:
            self._think(slot)
        assert call.process is not None
        self.world.checker.look(call.process)  # in this very event it may have been committed
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            self._lost(call)
        elif error is None:
            self._succeeded(call, task.result())
        elif isinstance(error, DengineError):
            self.world.count(f"refused: {error.name}")
            if error.outcome == "none" and call.command is not None:
                self._refuse(call)
            else:
                self._lost(call)
        elif isinstance(error, AssertionError):
            call.process.loop.broken = error
        else:
            self._lost(call)

    def _succeeded(self, call: Call, result: Any) -> None:
        self.operations += 1
        seen: Any = None
        if call.command is not None:
            self._told[mark_of(call.command)] = result
        if isinstance(result, PutResult | DeleteResult | TxnResult):
            self._acknowledged(call)
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

    def _acknowledged(self, call: Call) -> None:
        """Invariant 11: who is told "done" has had a committed entry behind it at that moment."""
        mark = mark_of(call.command)
        index = self.world.checker.index_of.get(mark)
        if index is None:
            violated("11 acknowledged", f"{call.name}({mark!r}) was acknowledged uncommitted")
        self.acked_index = max(self.acked_index, index)

    def _record(self, call: Call, returned: float, result: Any) -> None:
        operation = Operation(call.client, call.called, returned, call.name, call.argument, result)
        self.history.setdefault(call.key, []).append(operation)

    def _refuse(self, call: Call) -> None:
        self._refused.add(mark_of(call.command))

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
            self._lost(call)
            if call.client < self._clients:
                self._think(call.client)

    # --- the verdict ------------------------------------------------------------------------------

    def verify(self) -> None:
        """At the end, when nothing is on its way any more. Raises Violation."""
        index_of = self.world.checker.index_of
        for mark in sorted(self._refused):
            if mark in index_of:
                where = index_of[mark]
                violated("11 outcome", f"{mark!r} was refused, and is committed at {where}")
        results = _replay(self.world.checker.committed)
        for mark, answer in self._told.items():
            if results.get(mark) != answer:
                violated("11 outcome", f"{mark!r} was answered {answer}, not {results.get(mark)}")
        finding = check(self.resolved_histories(results))
        if finding.verdict is not Verdict.LINEARIZABLE:
            violated("linearizability", f"key {finding.key!r}: {as_text(finding.window)}")

    def resolved_histories(
        self, results: dict[bytes, Result] | None = None
    ) -> dict[bytes, list[Operation]]:
        """What was done to each key, and what came of it, also where no client was told."""
        if results is None:
            results = _replay(self.world.checker.committed)
        histories = {key: list(operations) for key, operations in self.history.items()}
        for key, operation in self._resolved(results):
            histories.setdefault(key, []).append(operation)
        return histories

    def _resolved(self, results: dict[bytes, Result]) -> Iterator[tuple[bytes, Operation]]:
        """What clients were not told of and was committed, with what came of it.

        It took effect when it was committed, for every read that covers it, acknowledged or not.
        """
        checker = self.world.checker
        for key, operation, mark in self._unknown:
            if mark in results and _changed(results[mark]):
                at = checker.committed_at[checker.index_of[mark] - 1]
                called = max(operation.called, at)
                done = operation._replace(called=called, returned=at + 1)
                result = results[mark]
                if isinstance(result, TxnResult):
                    yield from _parts(key, done, result)
                else:
                    yield key, done._replace(result=_seen(result))


def _replay(entries: Sequence[Entry]) -> dict[bytes, Result]:
    """What each write that was committed has come to, by its mark."""
    records, revision = DictView(), 0
    found: dict[bytes, Result] = {}
    for entry in entries:
        if entry.kind is EntryKind.NORMAL:
            revision, results = apply_batch(entry.data, records, revision)
            for command, result in zip(decode_batch(entry.data), results, strict=True):
                found[mark_of(command)] = result
    return found


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
