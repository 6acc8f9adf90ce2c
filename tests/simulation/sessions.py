"""Clients that repeat a request until they know what it has come to, whichever node tells them.

Each request has an idempotency key: CLIENT:N, or any other. One client at a time counts upwards in
a key of its own, each time only from the revision that it knows, so a request that was carried out
twice, or whose result got lost, shows at once. Beside that it puts keys that go with their time,
holds a lease, keeps it alive for a while, hangs keys on it, and lets it go, or not; and it deletes
ranges of all those, and changes several of them in one transaction.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dengine.errors import DengineError
from dengine.kv.commands import (
    Condition,
    Delete,
    DeleteRange,
    Effect,
    ExpiringPut,
    Full,
    LeaseGrant,
    LeaseKeepAlive,
    LeaseResult,
    LeaseRevoke,
    NoLease,
    Put,
    PutResult,
    Result,
    Txn,
)
from dengine.node.writes import OnceKey
from tests.simulation import requests
from tests.simulation.loop import MS, SECOND
from tests.simulation.model import once_mark
from tests.simulation.violation import violated

if TYPE_CHECKING:
    from tests.simulation.machine import Process
    from tests.simulation.world import World

THINKS_MS = 15
HEDGES = 0.15  # how often a request goes to two nodes at once
PATIENCE_NS = 3 * SECOND  # with one request
SHORT_NS = 400 * MS  # the same where results are soon forgotten
PASSING = (b"t0", b"t1")  # keys that several clients put for a time
TTL_S = (1, 1, 1, 2)


@dataclass(slots=True, eq=False)
class _Request:
    """What is sent until it is answered; a late answer to an earlier `attempt` is void."""

    what: str
    command: Effect
    once: OnceKey
    began: int
    attempt: int = 0
    process: Process | None = None

    @property
    def mark(self) -> bytes:
        return once_mark(self.once.key, self.once.number)


class _Session:
    """One client.

    Attributes:
        counter: the key that it counts in; `revision` is what it knows of it.
        lease: that it holds, as far as it knows; "": none.
    """

    def __init__(self, slot: int, rng: random.Random) -> None:
        self.slot = slot
        self.rng = rng
        self.numbered = rng.random() < 0.6
        self.number = 0
        self.lives = 0
        self.request: _Request | None = None
        self.begin_anew()

    def begin_anew(self) -> None:
        """As another client would: with nothing that it remembers."""
        self.lives += 1
        self.counter = b"o%d.%d" % (self.slot, self.lives)
        self.revision: int | None = None
        self.lease = ""

    def next_key(self) -> OnceKey:
        self.number += 1
        if self.numbered:
            return OnceKey(f"client-{self.slot}", self.number)
        return OnceKey(f"request-{self.slot}-{self.number}")


class Sessions:
    """All of them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._values = 0
        names = range(world.plan.sessions)
        rngs = [random.Random(f"{world.seed} session {i}") for i in names]
        self._sessions = [_Session(i, rng) for i, rng in zip(names, rngs, strict=True)]
        self._patience_ns = SHORT_NS if world.plan.window_s == 1 else PATIENCE_NS

    @property
    def waiting(self) -> int:
        """Requests that some node has."""
        return sum(s.request is not None and s.request.process is not None for s in self._sessions)

    def start(self) -> None:
        for session in self._sessions:
            self._think(session)

    def _think(self, session: _Session) -> None:
        pause_ns = int(session.rng.expovariate(1.0) * THINKS_MS * MS)
        self._world.scheduler.after(pause_ns, self._begin, session)

    # --- what is asked ----------------------------------------------------------------------------

    def _begin(self, session: _Session) -> None:
        if self._world.clients.stopped:
            return
        what, command = self._choose(session)
        now = self._world.scheduler.now
        session.request = _Request(what, command, session.next_key(), now)
        self._try(session, session.request)

    def _choose(self, session: _Session) -> tuple[str, Effect]:
        rng = session.rng
        self._values += 1
        value = b"s%d" % self._values
        dice = rng.random()
        if dice < 0.4:
            condition = (
                Condition(if_none_match=True)
                if session.revision is None
                else Condition(if_match=(session.revision,))
            )
            return "count", Put(session.counter, value, condition)
        if dice < 0.6:
            return "put for a time", ExpiringPut(
                rng.choice(PASSING), value, None, rng.choice(TTL_S)
            )
        if dice < 0.67:
            return "change some", self._change_some(session, value)
        if not session.lease:
            return "grant", LeaseGrant(rng.choice(TTL_S))
        if dice < 0.8:
            return "keep alive", LeaseKeepAlive(session.lease)
        if dice < 0.96:
            return "hang on", self._hang_on(session, value)
        return "revoke", LeaseRevoke(session.lease)

    def _change_some(self, session: _Session, value: bytes) -> Effect:
        """Keys that go with their time or a lease: some go now, and some stay for ever."""
        rng, kind = session.rng, session.rng.random()
        keys = (*PASSING, b"l", b"l%d" % session.slot, b"l%d+" % rng.randrange(6))

        def put(key: bytes) -> Put | ExpiringPut:
            dice = rng.random()
            if dice < 0.4:
                return Put(key, value)
            if dice < 0.7 or not session.lease:
                return ExpiringPut(key, value, None, rng.choice(TTL_S))
            return ExpiringPut(key, value, None, 0, session.lease)

        if kind < 0.15:
            return DeleteRange(*requests.part_of(rng, keys), rng.choice(requests.LIMITS))
        if kind < 0.3:
            return Delete(rng.choice(keys))
        if kind < 0.45:
            return put(rng.choice(keys))
        if kind < 0.6:
            return Txn((), tuple(Put(each, value) for each in PASSING), ())
        compare = requests.comparison(rng, rng.choice(keys), 0, value)
        return requests.transaction(rng, keys, put, (compare,))

    def _hang_on(self, session: _Session, value: bytes) -> Effect:
        """Keys that go with the lease; some of them hang on another one at times."""
        rng = session.rng
        key = rng.choice((b"l%d" % session.slot, b"l", *PASSING))
        put = ExpiringPut(key, value, None, 0, session.lease)
        if rng.random() < 0.5:
            return put
        other = ExpiringPut(b"l%d+" % rng.randrange(6), value + b"+", None, 0, session.lease)
        return Txn((), (put, other), ())

    # --- how --------------------------------------------------------------------------------------

    def _try(self, session: _Session, request: _Request) -> None:
        """At any node, as somebody who has heard of several."""
        if session.request is not request or request.process is not None:
            return
        if self._world.clients.stopped:
            session.request = None
            return
        if self._world.scheduler.now - request.began > self._patience_ns:
            self._world.count("request given up")
            session.request = None
            session.begin_anew()
            self._think(session)
            return
        process = self._any(session)
        if process is None:
            self._later(session, request)
            return
        request.attempt += 1
        request.process = process
        process.arrived(self._invoke, session, request, process)
        hedge = self._any(session) if session.rng.random() < HEDGES else None
        if hedge is not None:
            hedge.arrived(self._invoke_also, session, request, hedge)

    def _any(self, session: _Session) -> Process | None:
        process = session.rng.choice(list(self._world.machines.values())).process
        return process if process is not None and process.serves else None

    def _later(self, session: _Session, request: _Request) -> None:
        pause_ns = session.rng.randint(2, 30) * MS
        self._world.scheduler.after(pause_ns, self._try, session, request)

    def _invoke(self, session: _Session, request: _Request, process: Process) -> None:
        if request.process is not process:
            return
        who, attempt = f"session {session.slot}", request.attempt
        self._world.note(who, request.what, request.mark, "at", process.member.id)
        self._world.attempts.sent(request.mark)
        task = process.loop.create_task(self._perform(session, request, process))
        task.add_done_callback(lambda done: self._answered(session, request, attempt, done))

    def _invoke_also(self, session: _Session, request: _Request, process: Process) -> None:
        """The same request at the same time. Nobody waits for the answer, but it must be true."""
        self._world.note(f"session {session.slot}", request.mark, "also at", process.member.id)
        self._world.attempts.sent(request.mark)
        task = process.loop.create_task(self._perform(session, request, process))
        task.add_done_callback(lambda done: self._answered_also(request, process, done))

    def _answered_also(self, request: _Request, process: Process, task: Any) -> None:
        self._world.checker.look(process)
        error = None if task.cancelled() else task.exception()
        self._failed(request, error)
        if error is None and not task.cancelled():
            self._world.clients.acknowledged(request.mark, task.result())

    def _failed(self, request: _Request, error: BaseException | None) -> None:
        """What is repeated later may still happen, by that repetition."""
        if isinstance(error, DengineError):
            self._world.clients.expected(error)
            if error.outcome == "none":
                self._world.count_quietly("attempt refused")
                self._world.attempts.refused(request.mark)
        elif error is not None:
            raise error

    @staticmethod
    async def _perform(session: _Session, request: _Request, process: Process) -> Result:
        assert process.node is not None
        deadline = process.loop.time() + session.rng.choice((0.03, 0.1, 0.5))
        return await process.node.write(request.command, deadline, request.once)

    def process_gone(self, process: Process) -> None:
        """Its connections break."""
        for session in self._sessions:
            request = session.request
            if request is not None and request.process is process:
                request.process = None
                self._later(session, request)

    # --- what comes of it -------------------------------------------------------------------------

    def _answered(self, session: _Session, request: _Request, attempt: int, task: Any) -> None:
        process = request.process
        if session.request is not request or process is None or request.attempt != attempt:
            return
        self._world.checker.look(process)  # in this very event it may have been committed
        request.process = None
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or error is not None:
            self._failed(request, error)
            self._world.note(f"session {session.slot}", request.mark, "->", error)
            self._later(session, request)
            return
        result = task.result()
        self._world.note(f"session {session.slot}", request.mark, "->", result)
        self._world.clients.acknowledged(request.mark, result)
        self._world.clients.operations += 1
        session.request = None
        self._learn(session, request, result)
        self._think(session)

    def _learn(self, session: _Session, request: _Request, result: Result) -> None:
        if request.what == "count":
            self._counted(session, request, result)
        elif isinstance(result, NoLease):
            session.lease = ""
        elif request.what == "grant" and isinstance(result, LeaseResult):
            session.lease = result.lease
        elif request.what == "revoke":
            session.lease = ""

    def _counted(self, session: _Session, request: _Request, result: Result) -> None:
        """Nobody else writes there, so it can only have gone well, or never will."""
        if isinstance(result, PutResult):
            if result.created != (session.revision is None):
                violated("13 once", f"{request.mark!r} says {result}, known was {session.revision}")
            session.revision = result.revision
            return
        lasted_ns = self._world.scheduler.now - request.began
        forgotten = lasted_ns > 0.8 * self._world.plan.window_s * SECOND
        if not isinstance(result, Full) and not forgotten:
            violated(
                "13 once", f"{request.mark!r} came to {result}, and {session.revision} is ours"
            )
        session.begin_anew()
