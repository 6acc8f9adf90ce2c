"""One request of a caller, pursued over the nodes until it is answered or its time is up.

It may be sent more than once, because it is a read or carries an `Idempotency-Key`: a write without
one never comes here. What is certain in the end is what the caller is told: an error says "none"
only if no attempt can have happened, or may still happen.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dengine.client.failures import ClientClosed
from dengine.client.nodes import Node, Prefer
from dengine.client.transport import Kind, Reply, Transport, Unanswered, closed
from dengine.errors import (
    ClusterUnavailable,
    DengineError,
    NotLeader,
    RateLimited,
    RequestTimeout,
    StaleRequest,
)

PAUSE_S = 0.05  # before the nodes are asked a second time; doubled with each round, up to
PAUSE_MAX_S = 1.0
RATE_LIMITED_S = 0.5  # at least, where a node asks for patience
AT_ONCE = 3  # attempts under way
# Under the key of this very request these are the state machine's own word on it (DESIGN 5: the
# first result comes back), so no other attempt can have ended differently.
VERDICTS = (404, 412)


@dataclass(frozen=True, slots=True)
class Request:
    """What to ask. `target` is the raw request target; `headers` include the idempotency key."""

    method: str
    target: str
    kind: Kind
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    prefer: Prefer = "leader"


@dataclass(slots=True)
class _Attempt:
    node: Node
    began: float


class Pursuit:
    """One request and its attempts.

    Args:
        timeout_s: for all attempts together, in seconds.
    """

    def __init__(self, transport: Transport, request: Request, timeout_s: float) -> None:
        self._transport = transport
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._deadline = self._loop.time() + timeout_s
        self._flying: dict[asyncio.Task[Reply], _Attempt] = {}
        self._tried: list[Node] = []
        self._rounds = 0
        self._patience_s = 0.0
        self._retry_at: float | None = None  # an attempt has failed while others are under way
        self._maybe = False  # an attempt may have happened, or may still
        self._problems: dict[str, str] = {}
        self._refusal: DengineError | None = None
        self._hedging = transport.hedging[request.kind]

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
        if node is None or self._patience_s:
            pause_s, self._tried = self._pause_s(), []
            if now + pause_s >= self._deadline:
                raise self._failure()
            await asyncio.sleep(pause_s)
            now = self._loop.time()
            node = self._transport.nodes.choose(self._request.prefer, now)
        if now >= self._deadline or node is None:
            raise self._failure()
        self._send(node)

    def _send(self, node: Node) -> None:
        if self._transport.closed:
            raise closed("unknown" if self._maybe else "none")
        request, now = self._request, self._loop.time()
        limit_s = max(min(self._hedging.attempt_s, self._deadline - now), 0.001)
        attempt = self._transport.attempt(
            node, request.method, request.target, request.body, request.headers, limit_s
        )
        task = self._transport.spawn(attempt, "dengine-client-attempt")
        self._flying[task] = _Attempt(node, now)
        self._tried.append(node)

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
            if another is not None and now >= due:
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
        if len(self._flying) >= AT_ONCE:
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

    def _pause_s(self) -> float:
        """Before the nodes are asked once more; longer from round to round."""
        pause_s = min(PAUSE_S * 2.0**self._rounds, PAUSE_MAX_S) * random.uniform(0.5, 1.0)
        self._rounds = min(self._rounds + 1, 8)
        patience_s, self._patience_s = self._patience_s, 0.0
        return max(pause_s, patience_s)

    # --- answers ----------------------------------------------------------------------------------

    def _judge(self, task: asyncio.Task[Reply]) -> Reply | None:
        """The answer, if it is one; None to go on."""
        attempt, now = self._flying.pop(task), self._loop.time()
        node, nodes = attempt.node, self._transport.nodes
        try:
            if task.cancelled():
                self._maybe = self._maybe or self._request.kind == "write"
                raise closed("unknown" if self._maybe else "none")
            reply = task.result()
        except ClientClosed:
            raise closed("unknown" if self._may_have_happened else "none") from None
        except Unanswered as failure:
            self._note(node, failure.why, maybe=failure.sent)
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
        if error.status < 500 and not error.retryable:
            self._answered(attempt, now)
            raise self._certain(error)
        if not error.retryable and not self._flying and self._all_tried(now):
            raise self._certain(error)  # every node has failed at it
        if isinstance(error, RateLimited):
            self._patience_s = RATE_LIMITED_S
        else:
            node.failed(now)
        self._note(node, error.message, maybe=error.outcome == "unknown")
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

    def _note(self, node: Node, problem: str, *, maybe: bool) -> None:
        self._problems[node.address] = problem
        if maybe and self._request.kind == "write":
            self._maybe = True
        if self._flying and self._retry_at is None:
            self._retry_at = self._loop.time() + self._pause_s()

    def _all_tried(self, now: float) -> bool:
        return self._transport.nodes.choose(self._request.prefer, now, self._tried) is None

    @property
    def _may_have_happened(self) -> bool:
        return self._request.kind == "write" and (self._maybe or bool(self._flying))

    def _certain(self, error: DengineError) -> DengineError:
        """`error` with the outcome of all attempts together."""
        if self._request.kind == "read":
            error.outcome = "none"
        elif isinstance(error, StaleRequest) or (
            error.status not in VERDICTS and self._may_have_happened
        ):
            error.outcome = "unknown"
        return error

    def _failure(self) -> DengineError:
        """What to tell when the time is up."""
        unknown = self._may_have_happened
        outcome = "unknown" if unknown else "none"
        if self._refusal is not None and not self._flying and outcome == self._refusal.outcome:
            return self._refusal
        what = "; ".join(f"{address}: {problem}" for address, problem in self._problems.items())
        for attempt in self._flying.values():
            if attempt.node.address not in self._problems:
                what += f"{'; ' if what else ''}{attempt.node.address}: no answer yet"
        message = f"no answer within {self._timeout_s:g} s ({what or 'nobody to ask'})"
        if unknown:
            message += ": the write may or may not have happened, so read before you write again"
            return RequestTimeout(message, outcome="unknown")
        if self._flying or self._request.kind == "read":
            return RequestTimeout(message, outcome="none")
        return ClusterUnavailable(message, outcome="none")
