"""What every call of the client has in common: its time limit, its key, its place in the queue."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Literal

from dengine.client.idempotency import Key
from dengine.client.nodes import Prefer
from dengine.client.pursuit import Pursuit, Request
from dengine.client.targets import as_key
from dengine.client.transport import Reply, Transport, closed
from dengine.errors import RequestTimeout

# Fewer than the results that a node keeps for one client (see idempotency.py); more than that keep
# a cluster busy.
WRITES_AT_ONCE = 256
READS_AT_ONCE = 256  # the rest of the connections of a client (transport.py)

JSON = {"Content-Type": "application/json"}
Match = int | Sequence[int] | Literal["*"]


class Calls:
    """Reads and writes over one transport.

    Args:
        timeout_s: for a call that has none of its own, in seconds.
    """

    def __init__(self, transport: Transport, timeout_s: float) -> None:
        self._transport = transport
        self._timeout_s = timeout_s
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
        DengineError, as `Pursuit.run`.
        """
        request = Request("GET", where, "read", prefer=prefer)
        if body is not None:
            request = Request("POST", where, "read", body, JSON, prefer=prefer)
        deadline = self._deadline(timeout_s)
        await _turn(self._reading, deadline, f"{READS_AT_ONCE} reads")
        try:
            return await self._pursue(request, deadline)
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
        """Send a write under its key, or under one of this client. Raises as `Pursuit.run`."""
        deadline = self._deadline(timeout_s)
        await _turn(self._writing, deadline, f"{WRITES_AT_ONCE} writes")
        key = Key(idempotency_key) if idempotency_key is not None else self._transport.keys.take()
        try:
            request = Request(method, where, "write", body, headers, key)
            return await self._pursue(request, deadline)
        finally:
            key.done()
            self._writing.release()

    async def renew(self, where: str, timeout_s: float | None) -> Reply:
        """POST to `where`, which may be carried out any number of times, without a key that would
        be remembered. Raises as `Pursuit.run`.
        """
        return await self._pursue(Request("POST", where, "renewal", b""), self._deadline(timeout_s))

    def _deadline(self, timeout_s: float | None) -> float:
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        return asyncio.get_running_loop().time() + limit_s

    async def _pursue(self, request: Request, deadline: float) -> Reply:
        if self._transport.closed:
            raise closed()
        left_s = deadline - asyncio.get_running_loop().time()
        return await Pursuit(self._transport, request, left_s).run()


async def _turn(turns: asyncio.Semaphore, deadline: float, those: str) -> None:
    """Raises RequestTimeout: `those` wait already, and none has ended before the deadline."""
    try:
        async with asyncio.timeout_at(deadline):
            await turns.acquire()
    except TimeoutError:
        raise RequestTimeout(
            f"{those} of this client wait already, and none ended in time", outcome="none"
        ) from None


def conditions(if_match: Match | None, if_none_match: bool) -> dict[str, str]:
    """The headers of a conditional write."""
    headers = {}
    if if_match is not None:
        revisions = [if_match] if isinstance(if_match, int) else if_match
        headers["If-Match"] = "*" if if_match == "*" else ", ".join(f'"{r}"' for r in revisions)
    if if_none_match:
        headers["If-None-Match"] = "*"
    return headers


def selection(
    prefix: str | bytes | None, start: str | bytes | None, end: str | bytes | None
) -> dict[str, bytes]:
    """The query fields that choose a range of keys.

    Raises:
        ValueError: they contradict each other.
    """
    if prefix is not None and (start is not None or end is not None):
        raise ValueError("give a prefix, or start and end")
    bounds = {"prefix": prefix, "start": start, "end": end}
    return {name: as_key(bound) for name, bound in bounds.items() if bound is not None}
