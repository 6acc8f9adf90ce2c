"""Linearizable reads without log writes (thesis 6.4), and the lease (6.4.1).

Every heartbeat broadcast is a round with a number that grows within the leader's term. A read
waits for a round that STARTED after it arrived; once a quorum has answered that round or a later
one, no newer leader existed when the read came in, so the commit index of that moment is safe.
Answers to older rounds prove nothing about it (etcd #20418 confirmed reads with reused ids).
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from dengine.raft.types import MemberId, ReadNonce


class PendingRead(NamedTuple):
    requester: MemberId  # the leader itself, or the follower that asked
    nonce: ReadNonce


class _Round(NamedTuple):
    number: int
    commit_index: int
    reads: tuple[PendingRead, ...]


class ReadRounds:
    """The rounds of one leader in one term, and the reads that wait for them."""

    def __init__(self) -> None:
        self.last_round = 0
        self.arrived: list[PendingRead] = []  # wait for a round that has not started
        self._rounds: deque[_Round] = deque()  # started, with reads on board, unconfirmed
        self._sent_ms: dict[int, int] = {}

    @property
    def outstanding(self) -> bool:
        """True while a round with reads on board is unconfirmed."""
        return bool(self._rounds)

    def start(self, commit_index: int | None, now_ms: int) -> int:
        """Open the next round and let the reads that have arrived join it.

        Args:
            commit_index: the index those reads may rely on; None keeps them waiting, because
                the leader has not committed in its own term yet.
            now_ms: when the heartbeats of this round leave.
        """
        self.last_round += 1
        self._sent_ms[self.last_round] = now_ms
        self._sent_ms.pop(self.last_round - 256, None)  # unanswered for so long: of no use now
        if self.arrived and commit_index is not None:
            self._rounds.append(_Round(self.last_round, commit_index, tuple(self.arrived)))
            self.arrived.clear()
        return self.last_round

    def sent_ms(self, number: int) -> int:
        """When round `number` was sent; 0 when that is no longer known."""
        return self._sent_ms.get(number, 0)

    def confirm(self, number: int) -> list[tuple[PendingRead, int]]:
        """A quorum answered round `number`: every read of it and of older rounds is safe."""
        confirmed = []
        while self._rounds and self._rounds[0].number <= number:
            started = self._rounds.popleft()
            confirmed += [(read, started.commit_index) for read in started.reads]
        return confirmed

    def drain(self) -> list[PendingRead]:
        """Leadership is over: every read that still waits, so that it can be failed."""
        waiting = [read for started in self._rounds for read in started.reads] + self.arrived
        self._rounds.clear()
        self.arrived = []
        return waiting
