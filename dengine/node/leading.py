"""Having the leader do something, whoever that is and however often it changes meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from dengine.errors import ClusterUnavailable, LeaderChanged, NotLeader
from dengine.node.status import Status
from dengine.raft.raft import Raft
from dengine.raft.types import MemberId

T = TypeVar("T")

RETRY_S = 0.02  # before a request that certainly did not happen is tried again


class AtLeader:
    """Finds the leader, waits for one, and tries again only what certainly did not happen."""

    def __init__(self, raft: Raft, status: Status) -> None:
        self._raft = raft
        self._status = status
        self._loop = asyncio.get_running_loop()
        self._waiters: set[asyncio.Future[None]] = set()

    async def do(
        self,
        here: Callable[[], Awaitable[T]],
        forward: Callable[[MemberId], Awaitable[T]],
        deadline: float,
    ) -> T:
        """The result of `here` if this node leads, else of `forward`.

        Raises:
            ClusterUnavailable: no leader until `deadline`; nothing happened.
            DengineError: what the leader answered.
        """
        while True:
            leader = await self.known(deadline)
            try:
                if leader == self._raft.me:
                    return await here()
                return await forward(leader)
            except (NotLeader, LeaderChanged, ClusterUnavailable) as error:
                if error.outcome != "none":
                    raise
            await self.pause(deadline)

    async def known(self, deadline: float) -> MemberId:
        """The leader, once there is one. Raises ClusterUnavailable."""
        while self._raft.leader is None:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.add(waiter)
            try:
                async with asyncio.timeout_at(deadline):
                    await waiter
            except TimeoutError:
                raise ClusterUnavailable(self._status.no_leader()) from None
            finally:
                self._waiters.discard(waiter)
        return self._raft.leader

    async def pause(self, deadline: float) -> None:
        """Let leadership settle; ends the request when its time is up. Raises as `known`."""
        if self._loop.time() + RETRY_S >= deadline:
            raise ClusterUnavailable(self._status.no_leader())
        await asyncio.sleep(RETRY_S)

    def found(self) -> None:
        """There is a leader: wake who waits for one."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
