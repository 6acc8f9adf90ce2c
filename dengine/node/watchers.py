"""Who follows the membership: every committed change, in order, bounded per watcher."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

QUEUE_MAX = 64  # changes a slow watcher may be behind before its stream ends


class MembershipWatchers:
    """Fans committed views out. A watcher that falls behind is ended, never silently skipped."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[dict[str, Any] | None]] = set()

    def publish(self, view: dict[str, Any]) -> None:
        for queue in list(self._queues):
            try:
                queue.put_nowait(view)
            except asyncio.QueueFull:
                self._end(queue)

    def close(self) -> None:
        for queue in list(self._queues):
            self._end(queue)

    def follow(self, first: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """`first`, then every view published from this call on."""
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(QUEUE_MAX)
        self._queues.add(queue)
        return self._drain(queue, first)

    async def _drain(
        self, queue: asyncio.Queue[dict[str, Any] | None], first: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        try:
            yield first
            while (view := await queue.get()) is not None:
                yield view
        finally:
            self._queues.discard(queue)

    def _end(self, queue: asyncio.Queue[dict[str, Any] | None]) -> None:
        self._queues.discard(queue)
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(None)
