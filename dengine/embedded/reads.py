"""Reads of the state of the node in this process, each as fresh as it was asked to be."""

from __future__ import annotations

import asyncio

from dengine.api.kv import CONSISTENCY_LEVELS, DEFAULT_BARRIER
from dengine.client.types import LeaseInfo, Listing, Page, Value
from dengine.config import Config
from dengine.embedded.calls import Calls
from dengine.embedded.commands import checked_key, item
from dengine.errors import InvalidRequest, RequestTimeout
from dengine.node.node import Node

Span = tuple[bytes, bytes | None]  # the first key, and the first behind the last


class Reads:
    """What `Engine` documents, by the same names.

    Args:
        config: with the limits, and the consistency of reads that name none.
    """

    def __init__(self, node: Node, calls: Calls, config: Config) -> None:
        self._node = node
        self._calls = calls
        self._limits = config.limits
        self._default = config.read.default

    async def get(
        self, key: str | bytes, consistency: str | None, timeout_s: float | None
    ) -> Value | None:
        name = checked_key(key, self._limits)

        async def look(_: float) -> Value | None:
            state = self._node.state
            record = state.get(name)
            if record is None:
                return None
            ttl_s = self._node.lifetimes.remaining_s(record)
            return Value(name, record.value, record.mod_revision, state.revision, ttl_s)

        return await self._calls.read(look, self._as_fresh_as(consistency), timeout_s)

    def list(
        self,
        span: Span,
        limit: int | None,
        keys_only: bool,
        consistency: str | None,
        timeout_s: float | None,
    ) -> Listing:
        first, last = span
        wanted = self._as_fresh_as(consistency)
        if limit is not None and limit < 1:
            raise ValueError(f"limit is at least 1, not {limit}")

        async def fetch(most: int | None, after: str | None) -> Page:
            rows = self._limits.page if most is None else min(most, self._limits.page)
            start = first if after is None else bytes.fromhex(after)

            async def look(_: float) -> Page:
                page = self._node.state.page(start, last, rows, keys_only)
                lifetimes = self._node.lifetimes
                items = tuple(item(key, record, lifetimes) for key, record in page.items)
                return Page(page.revision, items, None if page.next is None else page.next.hex())

            return await self._calls.read(look, wanted, timeout_s)

        return Listing(fetch, limit)

    async def count(self, span: Span, consistency: str | None, timeout_s: float | None) -> int:
        loop = asyncio.get_running_loop()

        async def look(deadline: float) -> int:
            total = 0
            for counted in self._node.state.count(*span):
                total = counted
                await asyncio.sleep(0)  # others get their turn every 1000 keys
                await self._calls.require_alive(deadline)
                if loop.time() > deadline:
                    raise RequestTimeout(
                        f"counted {total} keys in time and there are more: count smaller ranges",
                        outcome="none",
                    )
            return total

        return await self._calls.read(look, self._as_fresh_as(consistency), timeout_s)

    async def lease(self, lease: str, timeout_s: float | None) -> LeaseInfo:
        async def look(_: float) -> LeaseInfo:
            seen = self._node.lifetimes.lease(lease)
            return LeaseInfo(seen.lease, seen.ttl_s, seen.remaining_s, tuple(seen.keys))

        return await self._calls.read(look, DEFAULT_BARRIER, timeout_s)

    def _as_fresh_as(self, asked: str | None) -> str:
        wanted = self._default if asked is None else asked
        if wanted not in CONSISTENCY_LEVELS:
            raise InvalidRequest(f"consistency is one of {', '.join(CONSISTENCY_LEVELS)}")
        return wanted
