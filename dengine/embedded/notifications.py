"""Who leads and who belongs, for an app that wants to be told: states, not events.

A reader that falls behind misses states in between, and is told how many; never the newest one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar
from weakref import WeakSet

from dengine.embedded.calls import Calls
from dengine.errors import ClusterUnavailable, TryAgain
from dengine.node.node import Node

STATES_MAX: Final = 64  # that wait for one reader
POLL_S: Final = 0.05  # until the node belongs to a cluster
SETTLE_S: Final = 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Member:
    """A member of the cluster. `address` is "host:port", as the others dial it.

    `voter`: it counts in majorities; others receive the log, and have a `status` that says whether
    they are to vote later: "promotable" or "read_only". That of a voter is "active".
    """

    id: int
    address: str
    zone: str
    voter: bool
    status: str


@dataclass(frozen=True, slots=True)
class Leadership:
    """Who leads, as far as this node knows: `leader` is None while nobody is known to.

    `term` grows with each election, and has one leader at most: it can serve as a fencing token.
    """

    leader: int | None
    is_leader: bool
    term: int


@dataclass(frozen=True, slots=True)
class Membership:
    """The committed members. `joint`: a change of the voters is under way."""

    members: tuple[Member, ...]
    joint: bool


class Subscription(Generic[T]):
    """The state now, and then each that follows: an asynchronous iterator for one reader.

    `skipped`: states that this reader was too slow for, at most 64 wait. The newest always arrives.
    When the engine is left the iteration ends; when the node ends by itself it raises EngineClosed
    after the last state.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._states: deque[T] = deque()
        self._changed = asyncio.Event()
        self._over = False
        self.skipped = 0

    def __aiter__(self) -> Subscription[T]:
        return self

    async def __anext__(self) -> T:
        while not self._states:
            if self._over:
                if self._calls.reason is not None:
                    raise self._calls.ended("none") from self._calls.reason
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._states.popleft()

    def push(self, state: T) -> None:
        if len(self._states) >= STATES_MAX:
            self._states.popleft()
            self.skipped += 1
        self._states.append(state)
        self._changed.set()

    def end(self) -> None:
        """Nothing follows what is here."""
        self._over = True
        self._changed.set()


class _Topic(Generic[T]):
    """The newest state of something, and who follows it. Readers that are forgotten are gone."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._subscribers: WeakSet[Subscription[T]] = WeakSet()
        self._newest: T | None = None
        self._over = False

    def publish(self, state: T) -> None:
        if state != self._newest and not self._over:
            self._newest = state
            for reader in list(self._subscribers):
                reader.push(state)

    def follow(self) -> Subscription[T]:
        reader = Subscription[T](self._calls)
        if self._newest is not None:
            reader.push(self._newest)
        if self._over:
            reader.end()
        self._subscribers.add(reader)
        return reader

    def end(self) -> None:
        self._over = True
        for reader in list(self._subscribers):
            reader.end()


class Notifier:
    """What one node knows of leader and members, now and as it changes."""

    def __init__(self, node: Node, calls: Calls) -> None:
        self._node = node
        self._calls = calls
        self._leadership = _Topic[Leadership](calls)
        self._membership = _Topic[Membership](calls)
        loop = asyncio.get_running_loop()
        self._tasks = (
            loop.create_task(self._pump(node.leadership_events, self._tell_leadership)),
            loop.create_task(self._pump(node.membership_events, self._tell_membership)),
        )
        self._tell_leadership()

    def leadership_now(self) -> Leadership:
        """A node that is on its way out does not lead, whatever it was before."""
        raft = self._node.raft
        if not self._calls.alive:
            return Leadership(None, False, raft.term)
        leader = raft.leader
        return Leadership(None if leader is None else leader.id, self._node.is_leader, raft.term)

    def membership_now(self) -> Membership:
        committed = self._node.raft.committed_membership
        voters = committed.all_voters
        members = (
            Member(m.id.id, m.address, m.zone, m.id in voters, m.status.name.lower())
            for m in committed.members
        )
        return Membership(tuple(members), committed.joint)

    def leadership(self) -> Subscription[Leadership]:
        self._tell_leadership()
        return self._leadership.follow()

    def membership(self) -> Subscription[Membership]:
        self._tell_membership()
        return self._membership.follow()

    async def end(self) -> None:
        """After the node: the last states, and then no more."""
        for task in self._tasks:
            task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tell_leadership()
        self._leadership.end()
        self._membership.end()

    def _tell_leadership(self) -> None:
        self._leadership.publish(self.leadership_now())

    def _tell_membership(self) -> None:
        now = self.membership_now()
        if now.members:
            self._membership.publish(now)

    async def _pump(
        self, events: Callable[[], AsyncIterator[Any]], tell: Callable[[], None]
    ) -> None:
        """Look again whenever the node says that something has changed, until this is cancelled.

        The node's own stream ends for a reader that falls behind. That loses nothing: what counts
        is the state that is found then.
        """
        try:
            while True:
                with suppress(ClusterUnavailable):  # it does not belong to a cluster yet
                    async for _ in events():
                        tell()
                await asyncio.sleep(POLL_S)
        except Exception as error:  # nobody may wait for what never comes
            died = TryAgain(f"the engine's notifications died of {type(error).__name__}: {error}")
            died.__cause__ = error
            self._node.fail(died)
