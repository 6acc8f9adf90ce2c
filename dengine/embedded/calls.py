"""What is under way between an app and the node in its process: time limits, repetition, the end.

As long as a node works it answers each call in time. When it has ended it answers nothing any more,
so whoever waits is told here, and no call outlives its engine.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

from dengine.api.kv import refusal
from dengine.client.attempts import Attempts, IdempotencyKeys, Key, Kind
from dengine.client.calls import WRITES_AT_ONCE, positive
from dengine.client.stopwatch import Stopwatch
from dengine.errors import DengineError, FatalError, Outcome, RequestTimeout
from dengine.kv.commands import (
    Effect,
    Full,
    Get,
    Invalid,
    LeaseKeepAlive,
    Mismatch,
    Result,
    Stale,
    Txn,
)
from dengine.node.node import Node
from dengine.node.writes import OnceKey, parse_once

SILENCE_S: Final = 1.0  # past its deadline the node answers within a tenth of that, if it ever does
# These say nothing of other attempts, which may still be carried out. Any other result is the first
# and final word of the state machine under that key.
_UNDECIDED: Final = (Full, Invalid, Mismatch, Stale)

T = TypeVar("T")
R = TypeVar("R", bound=Result)


class EngineClosed(DengineError):
    """The engine was left, or its node has ended by itself. `outcome` says what became of the call.

    `reason` is the error that has ended the node; None: the engine was left in good order.
    """

    name = "engine_closed"
    reason: FatalError | None = None


class Calls:
    """Calls on one node, until that ends.

    Args:
        timeout_s: for a call that has none of its own, in seconds.
    """

    def __init__(self, node: Node, timeout_s: float) -> None:
        self._node = node
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._keys = IdempotencyKeys()
        self._turns = asyncio.Semaphore(WRITES_AT_ONCE)
        self._limits: set[asyncio.Timeout] = set()  # one for each call that is under way
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._over = asyncio.Event()
        self.closed = False  # to new calls
        self.reason: FatalError | None = None

    # --- calls ------------------------------------------------------------------------------------

    async def read(
        self, look: Callable[[float], Awaitable[T]], consistency: str, timeout_s: float | None
    ) -> T:
        """What `look` sees of the state once that is as fresh as `consistency` asks for.

        Args:
            look: given the deadline on the loop's clock; called again if that may help.

        Raises:
            DengineError: the outcome is none.
        """
        deadline = self.deadline(timeout_s)

        async def attempt() -> T:
            await self._node.read_barrier(consistency, deadline)
            await self.require_alive(deadline)
            try:
                return await look(deadline)
            except FatalError as error:
                await self.require_alive(deadline)
                self._node.fail(error)  # damage ends a node
                raise

        return await self.repeat(attempt, deadline, "read")

    async def write(
        self,
        command: Effect,
        success: type[R],
        idempotency_key: str | None,
        timeout_s: float | None,
    ) -> R:
        """Have `command` carried out, once, under its key or under one of this engine; without any
        where it may be carried out more often, for a result under a key has to be remembered.

        Args:
            success: the type of its result when it was done; any other is a refusal.

        Raises:
            DengineError: `outcome` counts all attempts together.
        """
        if idempotency_key is not None:
            parse_once(idempotency_key)  # before it waits for its turn
        deadline = self.deadline(timeout_s)
        kind = "write" if idempotency_key is not None else _kind(command)
        if kind != "write":
            result = await self.repeat(lambda: self._ask(command, deadline, None), deadline, kind)
        else:
            result = await self._write_once(command, idempotency_key, deadline)
        if not isinstance(result, success):
            raise refusal(result)
        return result

    async def _write_once(
        self, command: Effect, idempotency_key: str | None, deadline: float
    ) -> Result:
        if self._turns.locked():
            await self._wait_turn(deadline)
        else:
            await self._turns.acquire()  # which waits for nothing
        key = self._keys.take() if idempotency_key is None else Key(idempotency_key)
        try:
            return await self.repeat(
                lambda: self._ask(command, deadline, parse_once(key.text)), deadline, "write", key
            )
        finally:
            key.done()
            self._turns.release()

    async def repeat(
        self,
        attempt: Callable[[], Awaitable[T]],
        deadline: float,
        kind: Kind,
        key: Key | None = None,
    ) -> T:
        """The first answer to `attempt`, which is made again while that may help and is safe.

        Args:
            kind: of a write every attempt carries `key`.

        Raises:
            DengineError: the last refusal. Once an attempt may have happened the outcome is unknown
                for good, for a later attempt says nothing of what is still on its way.
        """
        attempts, awake = Attempts(kind, key), Stopwatch(self._loop.time)
        for number in itertools.count():
            attempts.sent(number, awake.elapsed_s())
            try:
                return await self.run(attempt, deadline, attempts.outcome)
            except DengineError as error:
                attempts.refused(number, error)
                wait_s = attempts.pause_s()
                again = error.retryable and self._loop.time() + wait_s < deadline
                if again:
                    await asyncio.sleep(wait_s)  # in which the machine may sleep for long
                if not (again and attempts.may_send(awake.elapsed_s())):
                    told = attempts.certain(error)
                    if told is error:
                        raise
                    raise told from error
        raise AssertionError("there is always a next number")

    async def run(
        self, attempt: Callable[[], Awaitable[T]], deadline: float, cut_off: Outcome
    ) -> T:
        """One attempt, which ends with the node at the latest.

        Args:
            deadline: what `attempt` itself keeps to. It is cut off a moment later.
            cut_off: the outcome then, or when the node ends.

        Raises:
            EngineClosed: the node ends, or has ended before.
        """
        if self._over.is_set():
            raise self.ended("none") from self.reason
        limit = asyncio.timeout_at(deadline + SILENCE_S)
        try:
            async with limit:
                self._begun(limit)
                try:
                    return await attempt()
                finally:
                    self._done(limit)
        except TimeoutError:
            if not limit.expired():
                raise
            if self._over.is_set():
                raise self.ended(cut_off) from self.reason
            raise RequestTimeout("the node gave no answer in time", outcome=cut_off) from None
        except DengineError:
            raise
        except Exception:
            if self.alive:
                raise
            raise await self._last_word(cut_off, deadline) from self.reason

    async def _ask(self, command: Effect, deadline: float, once: OnceKey | None) -> Result:
        result = await self._node.write(command, deadline, once)
        if isinstance(result, _UNDECIDED):
            raise refusal(result)
        return result

    async def _wait_turn(self, deadline: float) -> None:
        """Bound the numbers that wait in one session of keys (see client/attempts.py)."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._turns.acquire()
        except TimeoutError:
            raise RequestTimeout(
                f"{WRITES_AT_ONCE} writes of this engine wait already, and none ended in time",
                outcome="none",
            ) from None

    def deadline(self, timeout_s: float | None) -> float:
        """Of a call that begins now, on the loop's clock.

        Raises:
            EngineClosed: none begins any more.
            RequestTimeout: there is no time for it.
            RuntimeError: it begins in another event loop.
        """
        self.require_open()
        limit_s = positive(self._timeout_s if timeout_s is None else timeout_s)
        return self._loop.time() + limit_s

    def require_open(self) -> None:
        """Raises EngineClosed, and RuntimeError in another event loop than the node's."""
        if self.closed:
            raise self.ended("none") from self.reason
        self.require_loop()

    def require_loop(self) -> None:
        """What of a node may be looked at in no event loop is no call. After its end it has none.

        Raises:
            RuntimeError: this is another event loop than the node's.
        """
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            return
        if here is not self._loop and not self.closed:
            raise RuntimeError("an Engine belongs to the event loop in which it was entered")

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """A task that ends with the engine at the latest. Raises EngineClosed."""
        try:
            self.require_open()
        except BaseException:
            work.close()
            raise
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- the end ----------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Does the node work? It is on its way out for a while before it can say why."""
        return not self._over.is_set() and self._node.readiness().checks["running"]

    async def require_alive(self, deadline: float) -> None:
        """What is closed must not be looked at. Raises EngineClosed, once it is known why."""
        if not self.alive:
            raise await self._last_word("none", deadline) from self.reason

    async def drain(self, within_s: float) -> None:
        """No new calls; return when those under way have ended, and after `within_s` anyhow."""
        self.closed = True
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._idle.wait()

    def end(self, reason: FatalError | None) -> None:
        """Nothing is answered any more: cut off what is under way."""
        self.closed = True
        self.reason = self.reason or reason
        self._over.set()
        for limit in list(self._limits):
            if not limit.expired():
                limit.reschedule(self._loop.time())
        for task in self._tasks:
            task.cancel()

    async def settle(self) -> None:
        """After `end`: return when everybody has heard of it."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=SILENCE_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(SILENCE_S):
                await self._idle.wait()

    def ended(self, outcome: Outcome) -> EngineClosed:
        """The error that says so; its cause is to be `reason`."""
        said = "this engine was closed"
        if self.reason is not None:
            said = f"the node of this engine has ended: {self.reason.message}"
        if outcome == "unknown":
            said += "; the write may or may not have happened"
        error = EngineClosed(said, outcome=outcome)
        error.reason = self.reason
        return error

    async def _last_word(self, outcome: Outcome, deadline: float) -> EngineClosed:
        """What a call on a node that is on its way out gets, as soon as the reason is known."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._over.wait()
        return self.ended(outcome)

    def _begun(self, limit: asyncio.Timeout) -> None:
        self._limits.add(limit)
        self._idle.clear()

    def _done(self, limit: asyncio.Timeout) -> None:
        self._limits.discard(limit)
        if not self._limits:
            self._idle.set()


def _kind(command: Effect) -> Kind:
    """What may be carried out more than once, and what changes nothing at all?"""
    if isinstance(command, LeaseKeepAlive):
        return "renewal"
    if isinstance(command, Txn):
        operations = (*command.success, *command.failure)
        return "read" if all(isinstance(o, Get) for o in operations) else "write"
    return "write"
