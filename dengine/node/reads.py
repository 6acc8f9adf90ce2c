"""Reads between a client and the state: who waits for a read index, who for the state to get there.

All reads of one turn share a nonce, and so one question to the leader.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterator
from typing import NamedTuple

from dengine.errors import LeaderChanged, RequestTimeout
from dengine.raft.types import MemberId, ReadNonce, ReadState


class _Waiting(NamedTuple):
    future: asyncio.Future[None]
    deadline: float


class _Batch(NamedTuple):
    asked_at: float
    waiting: list[_Waiting]


class Reads:
    """Nonces are (member, boot, counter) and never reused, not even after a restart.

    Args:
        answer_timeout_s: after that a question or its answer counts as lost, and is asked again.
            Raft itself waits as long; less would throw away what a slow link brings.
    """

    def __init__(self, me: MemberId, boot: int, answer_timeout_s: float) -> None:
        self._answer_timeout_s = answer_timeout_s
        self._me = me
        self._boot = boot
        self._counter = 0
        self._arrived: dict[bool, list[_Waiting]] = {False: [], True: []}
        self._asked: dict[ReadNonce, _Batch] = {}
        self._until_applied: list[tuple[int, int, list[_Waiting]]] = []  # heap by index

    def add(self, future: asyncio.Future[None], deadline: float, *, lease: bool) -> None:
        """`future` is done once a local read is as fresh as asked for."""
        self._arrived[lease].append(_Waiting(future, deadline))

    def take(self, now: float) -> Iterator[tuple[ReadNonce, bool]]:
        """One nonce for all linearizable reads that have arrived, one for all lease reads."""
        for lease, waiting in self._arrived.items():
            if waiting:
                self._counter += 1
                nonce = ReadNonce(self._me, self._boot, self._counter)
                self._asked[nonce] = _Batch(now, waiting)
                self._arrived[lease] = []
                yield nonce, lease

    def answered(self, state: ReadState, applied_index: int) -> None:
        """The leader answered; never serve after a failed wait."""
        batch = self._asked.pop(state.nonce, None)
        if batch is None:
            return
        if state.index is None:
            self._fail(batch.waiting)
        elif state.index <= applied_index:
            self._release(batch.waiting)
        else:
            self._counter += 1
            heapq.heappush(self._until_applied, (state.index, self._counter, batch.waiting))

    def applied(self, index: int) -> None:
        while self._until_applied and self._until_applied[0][0] <= index:
            self._release(heapq.heappop(self._until_applied)[2])

    def expire(self, now: float) -> None:
        """Fail questions nobody answered, and whoever is past the deadline."""
        limit_s = self._answer_timeout_s
        for nonce in [n for n, b in self._asked.items() if now - b.asked_at > limit_s]:
            self._fail(self._asked.pop(nonce).waiting)
        for waiting in self._everyone():
            if waiting.deadline <= now and not waiting.future.done():
                waiting.future.set_exception(
                    RequestTimeout("the read could not be confirmed in time", outcome="none")
                )

    def _everyone(self) -> Iterator[_Waiting]:
        for batch in self._asked.values():
            yield from batch.waiting
        for _, _, waiting in self._until_applied:
            yield from waiting

    @staticmethod
    def _release(waiting: list[_Waiting]) -> None:
        for item in waiting:
            if not item.future.done():
                item.future.set_result(None)

    @staticmethod
    def _fail(waiting: list[_Waiting]) -> None:
        for item in waiting:
            if not item.future.done():
                item.future.set_exception(
                    LeaderChanged("leadership changed while the read was being confirmed")
                )
