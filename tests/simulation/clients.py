"""Clients that write, compare-and-swap, delete, send transactions and range deletes, read keys and
list ranges at three levels, and what they saw.

Every answer is judged by itself, against the committed log: what a write has come to, and what a
read saw at the index at which it was served. How the answers go together is judged at the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dengine.errors import DataCorruption, DengineError, StorageIO
from dengine.kv.commands import (
    Condition,
    ConditionFailed,
    Delete,
    DeleteRange,
    Effect,
    Get,
    GetResult,
    Put,
    PutResult,
    Result,
    TooMany,
    Txn,
    TxnResult,
)
from dengine.kv.store import Record
from tests.linearizability import checker as search
from tests.linearizability.by_revision import check
from tests.linearizability.checker import Operation, Verdict
from tests.linearizability.models import VERSIONED
from tests.linearizability.timeline import as_text
from tests.simulation import requests
from tests.simulation.history import History, is_change
from tests.simulation.loop import MS
from tests.simulation.model import MARKS, mark_of, marking
from tests.simulation.violation import NotLinearizable, Violation, violated

if TYPE_CHECKING:
    from tests.simulation.machine import Machine, Process
    from tests.simulation.world import World

LEVELS = ("linearizable", "lease", "eventual")
# Keys with a TTL or a lease, which sessions put: clients only look at them.
PASSING = (b"t0", b"t1", b"l", b"l0", b"l1", b"l1+", b"l4+")
PREFIXES: tuple[tuple[bytes, bytes | None], ...] = (
    (b"k", b"l"),
    (b"t", b"u"),
    (b"l", b"m"),
    (b"", None),
)
PAGES = (1, 2, 1000, 1000)  # how many rows are asked for
SEARCHED = 50  # each so many-th seed is judged by the general search as well
SEARCH_S = 30.0


@dataclass(slots=True, eq=False)
class Call:
    """One request that a client has sent and not seen answered."""

    client: int
    key: bytes
    command: Effect | None  # None: a read
    level: str
    called: int
    end: bytes | None = None  # of a list, which begins at `key`
    limit: int = 0  # of the rows of a list; 0: it is no list
    floor: int = 0  # of the index that a read must have applied
    process: Process | None = None
    timeout_s: float | None = None  # None: one of a few is drawn
    told: Callable[[bool], None] | None = None  # that it has come to an end, and whether well


class Clients:
    """Closed loops: each client thinks, calls any node, and waits for the answer."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.stopped = False
        self.pending: dict[Call, None] = {}
        self.operations = 0
        self.shown_index = 0  # the newest entry of which anybody has seen what came of it
        self._unknown: list[Call] = []
        self._eventual: dict[Process, int] = {}
        self._counter = 0
        self._clients = world.plan.clients
        self._rngs = [random.Random(f"{world.seed} client {i}") for i in range(self._clients + 1)]
        self._keys = [b"k%d" % number for number in range(world.plan.keys)]
        self._known: dict[tuple[int, bytes], tuple[int, bytes]] = {}  # revision and value, by who
        self.history = History(self._keys, world.checker.promises.keys)

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
            call = self._write(rng.choice(self._keys))
            call.timeout_s = timeout_s
            self._submit(call, process)

    def ask(self, process: Process, level: str, told: Callable[[bool], None]) -> None:
        """One write (`level` is empty) or read of a node, by a client of its own."""
        call = self._read(b"k0", level) if level else self._write(b"k0")
        call.timeout_s, call.told = 0.5, told
        self._submit(call, process)

    def _write(self, key: bytes) -> Call:
        return Call(self._clients, key, self._put(key), "", self.world.scheduler.now)

    def _read(self, key: bytes, level: str) -> Call:
        return Call(self._clients, key, None, level, self.world.scheduler.now)

    def read_once(self, process: Process, rng: random.Random) -> None:
        """By a client that asks this very node, if that believes to lead."""
        if process.serves and process.leads and not self.stopped:
            self._submit(self._read(rng.choice(self._keys), rng.choice(LEVELS[:2])), process)
            if self.world.leader() is not process:
                self.world.count("read at a deposed leader")

    @staticmethod
    def _knows_leader(machine: Machine) -> bool:
        process = machine.process
        return process is not None and process.node is not None and process.node.leader is not None

    def _choose(self, slot: int, rng: random.Random) -> Call:
        key, now, dice = rng.choice(self._keys), self.world.scheduler.now, rng.random()
        if dice < 0.7:
            return Call(slot, key, self._change(slot, key, dice / 0.7, rng), "", now)
        level = rng.choices(LEVELS, (6, 3, 1))[0]
        if dice < 0.93:
            key = rng.choice(PASSING) if rng.random() < 0.15 else key
            return Call(slot, key, None, level, now)
        start, end = rng.choice((*PREFIXES, requests.part_of(rng, self._keys)))
        return Call(slot, start, None, level, now, end, rng.choice(PAGES))

    def _change(self, slot: int, key: bytes, dice: float, rng: random.Random) -> Effect:
        known = self._known.get((slot, key))
        if dice < 0.58:
            return self._put(key)
        if dice < 0.8:
            if known is None:
                return self._put(key, Condition(if_none_match=True))
            return self._put(key, Condition(if_match=known[:1]))
        mark = self._next()
        if dice < 0.83 and known is not None:
            return Delete(key, Condition(if_match=(known[0], MARKS + mark)))
        if dice < 0.87:
            # The limit is never reached, and makes the command one of a kind.
            return DeleteRange(key, key + b"\0", 1000 + mark)
        if dice < 0.89:
            return DeleteRange(*requests.part_of(rng, self._keys), 1000 + mark)
        revision, value = known or (0, b"")
        compare = [marking(mark)]
        for _ in range(rng.choice((0, 1, 1, 2))):
            compare.append(requests.comparison(rng, key, revision, value))
        return requests.transaction(rng, self._keys, self._put, tuple(compare))

    def _put(self, key: bytes, condition: Condition | None = None) -> Put:
        return Put(key, b"%d" % self._next(), condition)

    def _next(self) -> int:
        self._counter += 1
        return self._counter

    def _invoke(self, call: Call, slot: int | None) -> None:
        assert call.process is not None
        call.floor = self.shown_index
        call.called = self.world.scheduler.now
        if call.command is not None:
            self.world.attempts.sent(mark_of(call.command))
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
        state = node.state
        if not call.limit:
            record = state.get(call.key)
            self._judge_read(call, call.process, state.applied.index, record)
            return record
        page = state.page(call.key, call.end, call.limit, keys_only=False)
        *_, count = state.count(call.key, call.end)
        shown = (page.items, page.next, page.revision, count)
        self._judge_read(call, call.process, state.applied.index, shown)
        return page

    def _truth(self, call: Call, index: int) -> Any:
        """What a read has to show after entry `index`."""
        checker, keys = self.world.checker, self.world.checker.promises.keys
        if not call.limit:
            return keys.read(call.key, index)
        rows = keys.rows(call.key, call.end, index)
        following = rows[call.limit][0] if call.limit < len(rows) else None
        return rows[: call.limit], following, checker.model.revision_at(index), len(rows)

    def _judge_read(self, call: Call, process: Process, index: int, shown: Any) -> None:
        """Invariant 12: what was read is what the log says at the entry at which it was read, and
        that entry is as new as was promised.
        """
        checker, what = self.world.checker, f"{process.member}, {call.level} read of {call.key!r}"
        checker.look(process)  # in this very event it may have been committed
        if index > len(checker.committed):
            violated("12 future", f"{what}: entry {index} is not committed")
        truth = self._truth(call, index)
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
        self.world.count(f"{call.level} {'list' if call.limit else 'read'}")

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
                self.world.attempts.refused(mark_of(call.command))
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
            what = f"an answer was {error.name}: {error.message}"
            raise Violation("0 no surprise", what) from error

    def _succeeded(self, call: Call, result: Any) -> None:
        self.operations += 1
        op = Operation(call.client, call.called, self.world.scheduler.now, "")
        if call.command is not None:
            self._acknowledged(call, result)
            self.history.written(op, call.command, result)
            self._learn_written(call, call.command, result)
        elif call.level == "eventual":
            return
        elif call.limit:
            end = call.end if result.next is None else result.next
            self.history.listed(op, result.revision, result.items, call.key, end)
        else:
            self.history.read(op, call.key, result)
            self._learn(call, result)

    def _learn(self, call: Call, found: Record | GetResult | None) -> None:
        if found is None or not found.mod_revision:
            self._known.pop((call.client, call.key), None)
        else:
            self._known[(call.client, call.key)] = (found.mod_revision, found.value)

    def _learn_written(self, call: Call, command: Effect, result: Result) -> None:
        """What is remembered need not be right: others write, too."""
        who = (call.client, call.key)
        if isinstance(result, PutResult):
            assert isinstance(command, Put)
            self._known[who] = (result.revision, command.value)
        elif isinstance(result, ConditionFailed) and result.current_revision is not None:
            self._known[who] = (result.current_revision, b"")
        elif isinstance(command, Txn) and isinstance(result, TxnResult):
            self.world.count("transaction" if result.succeeded else "the other branch")
            branch = command.success if result.succeeded else command.failure
            for operation, done in zip(branch, result.results, strict=True):
                if isinstance(operation, Get) and operation.key == call.key:
                    self._learn(call, done)
        else:
            self._known.pop(who, None)
        if isinstance(result, TooMany):
            self.world.count("too many keys in a range")

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

    def _lost(self, call: Call) -> None:
        """Nobody knows whether it happened, or will."""
        if call.command is None:
            return
        self.world.count("outcome unknown")
        self._unknown.append(call)

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
        history = self.resolved()
        finding = check(history.by_key, history.views)
        if finding.verdict is not Verdict.LINEARIZABLE:
            if finding.key is None:  # looks at several keys at one moment
                violated("linearizability", as_text(finding.window))
            raise NotLinearizable(finding.key, history.by_key[finding.key], finding.window)
        if self.world.seed % SEARCHED == 0:
            finding = search.check(history.by_key, VERSIONED, limit_s=SEARCH_S)
            # It is exponential; where it comes to no end, the exact judge above has the word.
            unknown = finding.verdict is Verdict.UNKNOWN
            # How far it gets depends on the machine, and so is no part of the trace.
            self.world.counts["searched without end" if unknown else "searched"] += 1
            if finding.verdict is Verdict.ILLEGAL:
                text = as_text(finding.window)
                violated("linearizability", f"{finding.verdict}: key {finding.key!r}: {text}")

    def resolved(self) -> History:
        """What was done to each key, and what came of it, also where no client was told.

        Then it took effect when it was committed, for every read that covers it.
        """
        history = self.history.copy()
        checker, model = self.world.checker, self.world.checker.model
        for call in self._unknown:
            assert call.command is not None
            mark = mark_of(call.command)
            result = model.result(mark)
            if result is not None and is_change(result):
                at = checker.committed_at[model.index_of[mark] - 1]
                op = Operation(call.client, max(call.called, at), at + 1, "")
                history.written(op, call.command, result)
        return history


def _words(call: Call) -> tuple[object, ...]:
    if call.command is not None:
        return (call.command,)
    return ("list", call.key, call.end, call.limit) if call.limit else ("read", call.key)


def _answer(task: Any, error: BaseException | None) -> tuple[object, ...]:
    if error is None:
        return ("cancelled",) if task.cancelled() else ("->", task.result())
    outcome = f", outcome {error.outcome}" if isinstance(error, DengineError) else ""
    return (f"-> {type(error).__name__}{outcome}: {error}",)
