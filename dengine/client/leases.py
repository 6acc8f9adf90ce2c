"""A lease that is kept alive while its owner works, and says when it may have ended.

The cluster never ends a lease early: not before its TTL has passed on the log's clock, which never
runs ahead of ours by more than clocks differ in speed. So a lease holds until TTL seconds after the
last renewal that was acknowledged *was sent*, and nobody knows whether it holds after that.
"""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dengine.client.encoding import as_seconds
from dengine.client.stopwatch import Stopwatch
from dengine.client.types import LeaseLost
from dengine.errors import DengineError, NotFound, RequestTimeout

if TYPE_CHECKING:
    from dengine.client.client import Client

RENEWALS = 3  # in each TTL
MARGIN = 0.1  # of the TTL, but at most
MARGIN_MAX_S = 1.0
REVOKE_S = 2.0  # on leaving; an outage must not hold up its owner
GOING_PAUSE_S = 0.02  # before it is asked whether all keys are gone; doubled up to
GOING_PAUSE_MAX_S = 0.5


def margin_s(ttl_s: float) -> float:
    """How long before the end of a lease its owner hears that it is lost."""
    return min(MARGIN * ttl_s, MARGIN_MAX_S)


class Lease:
    """Made by `Client.lease`; holds from entering `async with` until leaving it.

    `id` is the cluster's name for it, and goes into `put(..., lease=lease)`. `ttl_s` is its time to
    live in seconds. `lost` is an event: set as soon as the lease has ended, or may have.

    Leaving revokes it, and returns when all keys attached to it are deleted, or after 2 seconds:
    of very many the last go by themselves a little later. While no node can be reached, leaving
    says nothing, and the lease ends with its time.

    Example:
        async with client.lease(10) as lease:
            await client.put("service/web/1", b"10.0.0.7:80", lease=lease)
            assert not lease.lost.is_set()
        assert await client.get("service/web/1") is None
    """

    _entered_by = "async with"  # for messages

    def __init__(self, client: Client, ttl_s: int) -> None:
        self._client = client
        self._asked_ttl_s = as_seconds(ttl_s, "the TTL of a lease")
        self.ttl_s: float = self._asked_ttl_s
        self._id = ""
        self._asked = False
        self.lost = asyncio.Event()
        self._why = ""
        self._held: Stopwatch | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        if not self._id:
            raise RuntimeError(f"this lease is not granted yet: enter it with `{self._entered_by}`")
        return self._id

    @property
    def remaining_s(self) -> float:
        """Seconds that the lease holds for certain, were it not renewed any more. 0: it is lost."""
        if self._held is None or self.lost.is_set():
            return 0.0
        return max(0.0, self._certain_s - self._held.elapsed_s())

    @property
    def _certain_s(self) -> float:
        """How long a renewal is good for, less the speed by which two clocks may differ."""
        return self.ttl_s - margin_s(self.ttl_s)

    def check(self) -> None:
        """Say whether it still holds.

        Raises:
            LeaseLost: it does not, or nobody knows.
        """
        if self._is_lost():
            raise self._loss()

    def _is_lost(self) -> bool:
        """Its time may be up before its keeper, which waits for its turn, can say so."""
        if self.remaining_s <= 0:
            self._lose(f"it was not renewed for {self.ttl_s:g} s")
        return self.lost.is_set()

    def _loss(self) -> LeaseLost:
        return LeaseLost(f"lease {self._id} is lost: {self._why}")

    async def __aenter__(self) -> Lease:
        """Have it granted. Errors are those of `Client.put`."""
        await self.grant()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Raises LeaseLost when it was lost and nothing else is raised already."""
        was_lost = self._is_lost()
        await self.revoke()
        if was_lost and error is None:
            raise self._loss()

    def _leave_closed(self) -> None:
        """What leaving raises when the client is closed: LeaseLost. Needs no event loop."""
        self.check()

    async def grant(self) -> None:
        """What entering does; `revoke` belongs to it."""
        if self._asked:  # at once: two that enter it together would be granted two
            raise RuntimeError("a lease is granted once: make another one")
        self._asked = True
        asked = Stopwatch(asyncio.get_running_loop().time)
        info = await self._client.grant_lease(self._asked_ttl_s)
        self._id, self.ttl_s, self._held = info.id, info.ttl_s, asked
        self._keeper = self._client.spawn(self._keep(), f"dengine-client-lease-{self._id}")
        self._keeper.add_done_callback(self._keeper_ended)

    async def revoke(self) -> None:
        """End it now, if a node can be reached within a moment; its time ends it otherwise, also
        when this is cancelled.
        """
        holds = bool(self._id) and not self.lost.is_set()
        if holds:  # before the first pause, in which this may be cancelled
            self._lose("it was revoked")
        await _cancel(self._keeper)
        if holds:
            with contextlib.suppress(DengineError):
                await self._client.revoke_lease(self._id, timeout_s=REVOKE_S)

    def _keeper_ended(self, task: asyncio.Task[None]) -> None:
        """Without its keeper a lease ends unseen: say so at once."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._lose(f"it cannot be renewed: {error}")
        elif task.cancelled() and self._client.closed:
            self._lose("the client was closed")

    def _lose(self, why: str) -> None:
        if not self.lost.is_set():
            self._why = why
            self.lost.set()

    async def _keep(self) -> None:
        """Renew it until it is lost."""
        pause_s = self.ttl_s / RENEWALS
        while True:
            await asyncio.sleep(min(pause_s, self.remaining_s))
            left_s = self.remaining_s
            if left_s <= 0:
                self._lose(f"it was not renewed for {self.ttl_s:g} s")
                return
            asked = Stopwatch(asyncio.get_running_loop().time)
            try:
                async with asyncio.timeout(left_s):
                    info = await self._client.keepalive_lease(self._id, timeout_s=max(left_s, 0.1))
            except NotFound:
                self._lose("the cluster has ended it")
                return
            except (DengineError, TimeoutError) as error:
                if isinstance(error, DengineError) and not _may_pass(error):
                    self._lose(f"it cannot be renewed: {error.message}")
                    return
                pause_s = min(pause_s, max(0.1, self.ttl_s / 10))
                continue
            self._held = asked
            self.ttl_s = info.ttl_s
            pause_s = self.ttl_s / RENEWALS


def _may_pass(error: DengineError) -> bool:
    """Is it worth another try? What nodes answer to bad requests and strangers never changes."""
    return error.retryable or error.status >= 500 or error.outcome == "unknown"


async def until_keys_are_gone(client: Client, id: str, deadline: float) -> None:
    """Of a lease that was revoked and holds so many keys that they go one part after the other.

    Args:
        deadline: on the loop's clock.

    Raises:
        DengineError: nobody knows; the outcome is "unknown", for they go by themselves.
    """
    loop, pause_s = asyncio.get_running_loop(), GOING_PAUSE_S
    while (left_s := deadline - loop.time()) > 0:
        try:
            await client.lease_info(id, timeout_s=left_s)
        except NotFound as error:
            if not error.details.get("going"):
                return
        except DengineError as error:
            if not error.retryable:
                error.outcome = "unknown"
                raise
        await asyncio.sleep(min(pause_s, max(deadline - loop.time(), 0.0)))
        pause_s = min(2 * pause_s, GOING_PAUSE_MAX_S)
    raise RequestTimeout(
        f"lease {id} has ended, but not all of its keys were seen to be deleted in time: what is "
        "left of them goes by itself",
        outcome="unknown",
    )


async def _cancel(task: asyncio.Task[Any] | None) -> None:
    if task is not None and task is not asyncio.current_task():
        task.cancel()
        await asyncio.wait({task})
