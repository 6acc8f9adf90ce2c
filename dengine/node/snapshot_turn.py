"""Whose turn it is to take a snapshot: the leader gives it, and each member asks for its own.

Two members never take one at once, with two exceptions: a new leader does not know what the one
before has granted, and a leader for whose file a member waits does not wait for anybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from dengine.errors import DengineError

ASK_S = 1.0  # so long the leader has to answer
TURN_S = 10.0  # so long a turn lasts if its end is not heard of; renewed while the writer works
WAITING_MS = 5000  # a member that waits for its turn asks more often

Lead = Callable[[str, dict[str, Any], float], Awaitable[dict[str, Any]]]


class OwnTurn:
    """The turn of this node, as it asks the leader for it.

    Args:
        node_id: of this node.
        lead: has the leader carry out an operation.
    """

    def __init__(self, node_id: int, lead: Lead) -> None:
        self._node_id = node_id
        self._lead = lead

    async def ask(self, seconds: float = TURN_S) -> bool | None:
        """Have the leader keep all others from taking one for so long; 0 ends our turn.

        Returns:
            Is it our turn? None when no leader answers.
        """
        turn = {"id": self._node_id, "for_ms": int(seconds * 1000)}
        deadline = asyncio.get_running_loop().time() + ASK_S
        try:
            answer = await self._lead("snapshot_turn", turn, deadline)
            return bool(answer["granted"])
        except DengineError:
            return None

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Renew the turn as long as the block lasts, and end it then."""
        renewing = asyncio.get_running_loop().create_task(self._renew(), name="keep the turn")
        try:
            yield
        finally:
            renewing.cancel()
            await self.ask(0)

    async def _renew(self) -> None:
        while True:
            await self.ask()
            await asyncio.sleep(TURN_S / 3)


class SnapshotTurn:
    """On the leader, which alone remembers it: the turns of all members.

    Whoever has waited longest is next. Else a member that is due again as soon as it is done would
    keep the turn, and the logs of the others would grow for ever.
    """

    def __init__(self) -> None:
        self._holder = 0
        self._until_ms = 0
        self._waiting: dict[int, int] = {}  # when each asked last; who has waited longest first

    def grant(self, node_id: int, now_ms: int, for_ms: int) -> bool:
        """Let `node_id` have the turn for `for_ms` from now on; 0 ends it."""
        held = now_ms < self._until_ms
        if not for_ms:
            self._waiting.pop(node_id, None)
            if node_id == self._holder:
                self._until_ms = now_ms
            return True
        if not held or node_id != self._holder:
            self._waiting[node_id] = now_ms
            asking = {n: at for n, at in self._waiting.items() if now_ms - at <= WAITING_MS}
            self._waiting = asking
            if held or next(iter(asking)) != node_id:
                return False
            del asking[node_id]
        self._holder, self._until_ms = node_id, now_ms + for_ms
        return True
