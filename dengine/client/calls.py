"""The calls of a client: each waits for its turn, then goes to one node after another until it is
answered or its time is up.

A request may be sent more than once, because it is a read or a renewal, or carries an
`Idempotency-Key`: a write without one never comes here. What is certain in the end is what the
caller is told (`attempts.py`): an error says "none" only if no attempt can have happened, or may
still happen.

A hung node is only known by its silence, and so is a slow cluster. So the time that counts as
silence follows what answers take (as TCP's retransmission timer does, RFC 6298), and second
attempts come out of a budget: a cluster that is slow everywhere is not asked twice for everything.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dengine.client.attempts import Attempts, Key, Kind
from dengine.client.encoding import as_idempotency_key
from dengine.client.nodes import Node, Prefer
from dengine.client.stopwatch import Stopwatch
from dengine.client.transport import Reply, Transport, Unanswered, closed
from dengine.client.types import ClientClosed
from dengine.errors import (
    ClusterUnavailable,
    DengineError,
    NotLeader,
    RateLimited,
    RequestTimeout,
)

# Fewer than the results that a node keeps for one client (see attempts.py); more than that keep
# a cluster busy.
WRITES_AT_ONCE = 256
READS_AT_ONCE = 256  # the rest of the connections of a client (transport.py)

JSON = {"Content-Type": "application/json"}

ATTEMPTS_AT_ONCE = 3  # of one request

SILENCE_FIRST_S = 1.0  # before anything is known
SILENCE_MIN_S = 0.2
SILENCE_MAX_S = 3.0
HEDGES_MAX = 10.0  # second attempts that may be made in a row
HEDGES_EARNED = 0.1  # of one, by each answered request
ATTEMPT_MIN_S = 2.0
ATTEMPT_MAX_S = 30.0


class Calls:
    """Reads and writes over one transport.

    Args:
        timeout_s: for a call that has none of its own, in seconds.
    """

    def __init__(self, transport: Transport, timeout_s: float) -> None:
        self._transport = transport
        self.timeout_s = timeout_s
        writes = Hedging()
        self._hedging: dict[Kind, Hedging] = {
            "read": Hedging(),
            "renewal": writes,
            "write": writes,
        }
        self._writing = asyncio.Semaphore(WRITES_AT_ONCE)
        self._reading = asyncio.Semaphore(READS_AT_ONCE)

    async def read(
        self,
        where: str,
        timeout_s: float | None,
        prefer: Prefer = "leader",
        body: bytes | None = None,
    ) -> Reply:
        """GET the target `where`, or POST the JSON `body` to it where that changes nothing. Raises
        DengineError, as `RetryingRequest.run`.
        """
        request = Request("GET", where, "read", prefer=prefer)
        if body is not None:
            request = Request("POST", where, "read", body, JSON, prefer=prefer)
        deadline = self.deadline(timeout_s)
        await _turn(self._reading, deadline, f"{READS_AT_ONCE} reads")
        try:
            return await self._send(request, deadline)
        finally:
            self._reading.release()

    async def write(
        self,
        method: str,
        where: str,
        body: bytes | None,
        headers: Mapping[str, str],
        idempotency_key: str | None,
        timeout_s: float | None,
    ) -> Reply:
        """Send a write under its key, or one of this client. Raises as `RetryingRequest.run`."""
        if idempotency_key is not None:
            as_idempotency_key(idempotency_key)
        deadline = self.deadline(timeout_s)
        await _turn(self._writing, deadline, f"{WRITES_AT_ONCE} writes")
        key = Key(idempotency_key) if idempotency_key is not None else self._transport.keys.take()
        try:
            request = Request(method, where, "write", body, headers, key)
            return await self._send(request, deadline)
        finally:
            key.done()
            self._writing.release()

    async def renew(self, where: str, timeout_s: float | None) -> Reply:
        """POST to `where`, which may be carried out any number of times, without a key that would
        be remembered. Raises as `RetryingRequest.run`.
        """
        return await self._send(Request("POST", where, "renewal", b""), self.deadline(timeout_s))

    def deadline(self, timeout_s: float | None) -> float:
        """Of a call that begins now, on the loop's clock. Raises RequestTimeout: there is no time
        for it.
        """
        limit_s = positive(self.timeout_s if timeout_s is None else timeout_s)
        return asyncio.get_running_loop().time() + limit_s

    async def _send(self, request: Request, deadline: float) -> Reply:
        if self._transport.closed:
            raise closed()
        left_s = deadline - asyncio.get_running_loop().time()
        return await RetryingRequest(
            self._transport, self._hedging[request.kind], request, left_s
        ).run()


def positive(timeout_s: float) -> float:
    """A time limit. Raises RequestTimeout: nothing can be done within it, nor has been."""
    if timeout_s > 0:
        return timeout_s
    raise RequestTimeout(
        f"nothing was asked: timeout_s is {timeout_s:g}, which leaves no time; give more than 0",
        outcome="none",
    )


async def _turn(turns: asyncio.Semaphore, deadline: float, those: str) -> None:
    """Raises RequestTimeout: `those` wait already, and none has ended before the deadline."""
    try:
        async with asyncio.timeout_at(deadline):
            await turns.acquire()
    except TimeoutError:
        raise RequestTimeout(
            f"{those} of this client wait already, and none ended in time", outcome="none"
        ) from None


# --- one request over the nodes -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """What to ask. `target` is the raw request target; `key` is sent with the `headers`."""

    method: str
    target: str
    kind: Kind
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    key: Key | None = None
    prefer: Prefer = "leader"


@dataclass(slots=True, eq=False)
class _Attempt:
    node: Node
    began: float


class RetryingRequest:
    """One request and its attempts.

    Args:
        timeout_s: for all attempts together, in seconds.
    """

    def __init__(
        self, transport: Transport, hedging: Hedging, request: Request, timeout_s: float
    ) -> None:
        self._transport = transport
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._deadline = self._loop.time() + timeout_s
        self._flying: dict[asyncio.Task[Reply], _Attempt] = {}
        self._tried: list[Node] = []
        self._attempts = Attempts(request.kind, request.key)
        self._awake = Stopwatch(self._loop.time)
        self._retry_at: float | None = None  # an attempt has failed while others are under way
        self._problems: dict[str, str] = {}
        self._refusal: DengineError | None = None
        self._hedging = hedging

    async def run(self) -> Reply:
        """The answer, 2xx or 304.

        Raises:
            DengineError: the refusal of a node, or that no answer came in time.
        """
        try:
            while True:
                if not self._flying:
                    await self._begin()
                for task in await self._some_end():
                    reply = self._judge(task)
                    if reply is not None:
                        return reply
        finally:
            for task in self._flying:
                task.cancel()
            await asyncio.gather(*self._flying, return_exceptions=True)

    # --- attempts ---------------------------------------------------------------------------------

    async def _begin(self) -> None:
        """Ask the next node; when all have been asked, wait a moment and go round again."""
        now = self._loop.time()
        self._retry_at = None
        node = self._transport.nodes.choose(self._request.prefer, now, self._tried)
        if node is None or self._attempts.patience_s:
            pause_s, self._tried = self._attempts.pause_s(), []
            if now + pause_s >= self._deadline:
                raise self._failure()
            await asyncio.sleep(pause_s)
            now = self._loop.time()
            node = self._transport.nodes.choose(self._request.prefer, now)
        if now >= self._deadline or node is None or not self._may_send():
            raise self._failure()
        self._send(node)

    def _send(self, node: Node) -> None:
        if self._transport.closed:
            raise closed(self._attempts.outcome)
        request, now = self._request, self._loop.time()
        headers = dict(request.headers)
        if request.key is not None:
            headers["Idempotency-Key"] = request.key.text
        limit_s = max(min(self._hedging.attempt_s, self._deadline - now), 0.001)
        attempt = _Attempt(node, now)
        asking = self._transport.attempt(
            node,
            request.method,
            request.target,
            request.body,
            headers,
            limit_s,
            lambda: self._attempts.sent(attempt, self._awake.elapsed_s()),
        )
        self._flying[self._transport.spawn(asking, "dengine-client-attempt")] = attempt
        self._tried.append(node)

    def _may_send(self) -> bool:
        return self._attempts.may_send(self._awake.elapsed_s())

    async def _some_end(self) -> list[asyncio.Task[Reply]]:
        """The attempts that have ended, after a while. Sends another one when these take long."""
        affordable = True
        while True:
            now = self._loop.time()
            nodes = [attempt.node for attempt in self._flying.values()]
            another, due, extra = self._next(now)
            wait_for: set[asyncio.Future[Any]] = set(self._flying)
            until = self._deadline
            if another is not None:
                wait_for |= {node.silence() for node in nodes}
                if not extra or affordable or any(node.silent for node in nodes):
                    until = min(due, until)
            await asyncio.wait(
                wait_for, timeout=max(until - now, 0.0), return_when=asyncio.FIRST_COMPLETED
            )
            ended = [task for task in self._flying if task.done()]
            if ended:
                return ended
            now = self._loop.time()
            if now >= self._deadline:
                raise self._failure()
            if another is not None and now >= due and self._may_send():  # or it has slept too long
                affordable = (
                    not extra or any(node.silent for node in nodes) or self._hedging.spend()
                )
                if affordable:
                    if another in self._tried:  # a new round
                        self._tried = nodes
                    self._retry_at = None
                    self._send(another)
                    return []

    def _next(self, now: float) -> tuple[Node | None, float, bool]:
        """Whom to ask beside those who have not answered yet, when, and whether that is one attempt
        more than there were: not so where it takes the place of one that has failed.
        """
        if len(self._flying) >= ATTEMPTS_AT_ONCE or not self._may_send():
            return None, math.inf, False
        choose, prefer = self._transport.nodes.choose, self._request.prefer
        untried = choose(prefer, now, self._tried)
        if self._retry_at is None:
            last = max(attempt.began for attempt in self._flying.values())
            return untried, last + self._hedging.delay_s, True
        if untried is not None:
            return untried, now, False
        busy = [attempt.node for attempt in self._flying.values()]
        return choose(prefer, now, busy), self._retry_at, False

    # --- answers ----------------------------------------------------------------------------------

    def _judge(self, task: asyncio.Task[Reply]) -> Reply | None:
        """The answer, if it is one; None to go on."""
        attempt, now = self._flying.pop(task), self._loop.time()
        node, nodes = attempt.node, self._transport.nodes
        try:
            if task.cancelled():
                raise closed(self._attempts.outcome)
            reply = task.result()
        except ClientClosed:  # before it was sent, or as it was cancelled just now
            raise closed(self._attempts.outcome) from None
        except Unanswered as failure:
            if not failure.sent:
                self._attempts.did_nothing(attempt)
            self._note(node, failure.why)
            if failure.late:
                self._hedging.timed_out()
            node.failed(now)
            nodes.leads_no_more(node)
            self._transport.learn(trouble=True)
            return None
        if reply.ok:
            self._answered(attempt, now)
            return reply
        error = reply.error()
        self._attempts.refused(attempt, error)
        if error.status < 500 and not error.retryable:
            self._answered(attempt, now)
            raise self._attempts.certain(error)
        if not error.retryable and not self._flying and self._all_tried(now):
            raise self._attempts.certain(error)  # every node has failed at it
        if not isinstance(error, RateLimited):
            node.failed(now)
        self._note(node, error.message)
        self._refusal = error
        if isinstance(error, NotLeader):
            nodes.leads_no_more(node)
        nodes.follow(error.leader, node)
        self._transport.learn(trouble=True)
        return None

    def _answered(self, attempt: _Attempt, now: float) -> None:
        """A node has done its work: it is well, and older attempts of ours are with silent ones."""
        attempt.node.answered()
        self._hedging.answered(now - attempt.began)
        for other in self._flying.values():
            if other.began < attempt.began and other.node is not attempt.node:
                other.node.failed(now)
                other.node.is_silent()
                self._transport.nodes.leads_no_more(other.node)
                self._transport.learn(trouble=True)
        self._transport.learn()

    def _note(self, node: Node, problem: str) -> None:
        self._problems[node.address] = problem
        if self._flying and self._retry_at is None:
            self._retry_at = self._loop.time() + self._attempts.pause_s()

    def _all_tried(self, now: float) -> bool:
        return self._transport.nodes.choose(self._request.prefer, now, self._tried) is None

    def _failure(self) -> DengineError:
        """What to tell when the time is up, or a repetition would not be safe any more."""
        outcome = self._attempts.outcome
        if self._refusal is not None and not self._flying and outcome == self._refusal.outcome:
            return self._refusal
        what = "; ".join(f"{address}: {problem}" for address, problem in self._problems.items())
        for attempt in self._flying.values():
            if attempt.node.address not in self._problems:
                what += f"{'; ' if what else ''}{attempt.node.address}: no answer yet"
        limit_s = self._timeout_s - max(self._deadline - self._loop.time(), 0.0)
        message = f"no answer within {limit_s:.4g} s ({what or 'nobody to ask'})"
        if outcome == "unknown":
            message += ": the write may or may not have happened, so read before you write again"
            return RequestTimeout(message, outcome="unknown")
        if self._flying or self._request.kind == "read":
            return RequestTimeout(message, outcome="none")
        return ClusterUnavailable(message, outcome="none")


# --- when a second node is asked as well ----------------------------------------------------------


class Hedging:
    """What is normal for one kind of requests; times in seconds."""

    def __init__(self) -> None:
        self._smoothed_s: float | None = None
        self._deviation_s = 0.0
        self._budget = HEDGES_MAX
        self._patience = 1.0

    @property
    def delay_s(self) -> float:
        """An attempt that takes longer is joined by one to another node."""
        if self._smoothed_s is None:
            return SILENCE_FIRST_S
        return min(max(self._smoothed_s + 4 * self._deviation_s, SILENCE_MIN_S), SILENCE_MAX_S)

    @property
    def attempt_s(self) -> float:
        """An attempt that takes longer is given up. Each that was, and told nothing about how long
        an answer takes now, doubles it: or a cluster that has become slow would never be heard.
        """
        return min(max(8 * self.delay_s, ATTEMPT_MIN_S) * self._patience, ATTEMPT_MAX_S)

    def timed_out(self) -> None:
        """An attempt was given up."""
        self._patience = min(2 * self._patience, 16.0)

    def answered(self, took_s: float) -> None:
        """A node answered, `took_s` after it was asked."""
        self._patience = 1.0
        if self._smoothed_s is None:
            self._smoothed_s, self._deviation_s = took_s, took_s / 2
        else:
            off = abs(self._smoothed_s - took_s)
            self._deviation_s += (off - self._deviation_s) / 4
            self._smoothed_s += (took_s - self._smoothed_s) / 8
        self._budget = min(self._budget + HEDGES_EARNED, HEDGES_MAX)

    def spend(self) -> bool:
        """May one more second attempt be made now?"""
        if self._budget < 1:
            return False
        self._budget -= 1
        return True
