"""What `dengine.client.sync.Client` hands out: the asynchronous objects, for callers that wait.

Each holds on to its `owner`, the client: one that nobody holds any more is closed.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from types import TracebackType
from typing import Generic, TypeVar

from dengine.client.elections import Election as AsyncElection
from dengine.client.elections import Leader
from dengine.client.leases import Lease as AsyncLease
from dengine.client.listing import Listing as AsyncListing
from dengine.client.locks import Lock as AsyncLock
from dengine.client.operations import Compare
from dengine.client.results import Change, Item, Page
from dengine.client.threads import LoopThread
from dengine.client.watching import Watch as AsyncWatch

T = TypeVar("T")


def _each(loop: LoopThread, items: AsyncIterator[T], owner: object) -> Generator[T, None, None]:
    """Iterate here over what comes there. A generator that is dropped ends the other one too, and
    as long as it is not, `owner`, the client, stays open.
    """

    async def following() -> tuple[T, bool] | tuple[None, bool]:
        try:
            return await anext(items), True
        except StopAsyncIteration:
            return None, False

    try:
        while True:
            item, there_is = loop.run(following())
            if not there_is:
                return
            yield item  # type: ignore[misc]
    finally:
        loop.errand(_finish(items))


async def _finish(items: AsyncIterator[object]) -> None:
    """Close a generator as soon as nobody waits in it: Ctrl-C may have left somebody there."""
    close = getattr(items, "aclose", None)
    for _ in range(1000):
        if close is None or not getattr(items, "ag_running", False):
            break
        await asyncio.sleep(0.01)
    if close is not None:
        await close()


class Listing:
    """As `dengine.client.Listing`: iterate over it, over its `pages()`, or take `all()`."""

    def __init__(self, loop: LoopThread, listing: AsyncListing, owner: object) -> None:
        self._loop = loop
        self._listing = listing
        self._owner = owner

    def __iter__(self) -> Iterator[Item]:
        return _each(self._loop, aiter(self._listing), self._owner)

    def pages(self) -> Iterator[Page]:
        return _each(self._loop, self._listing.pages(), self._owner)

    def all(self) -> list[Item]:
        return self._loop.run(self._listing.all())


class Watch:
    """As `dengine.client.Watch`: an iterator, to be closed or used with `with`."""

    def __init__(self, loop: LoopThread, watch: AsyncWatch, owner: object) -> None:
        self._loop = loop
        self._watch = watch
        self._owner = owner
        self._finalizer = weakref.finalize(self, _close, loop, watch)

    @property
    def revision(self) -> int:
        return self._watch.revision

    def __enter__(self) -> Watch:
        self._loop.run(self._watch.__aenter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Watch:
        return self

    def __next__(self) -> Change:
        """The next change, however long that takes. Raises as `dengine.client.Watch`."""
        change = self._loop.run(self._next())
        if change is None:
            raise StopIteration
        return change

    async def _next(self) -> Change | None:
        try:
            return await anext(self._watch)
        except StopAsyncIteration:  # no coroutine may raise it
            return None

    def close(self) -> None:
        self._finalizer()


def _close(loop: LoopThread, watch: AsyncWatch) -> None:
    """Of a watch that is closed or collected, in whichever thread."""
    loop.errand(watch.aclose())


Held = TypeVar("Held", AsyncLease, AsyncLock)


class _Held(Generic[Held]):
    """What `with` holds, and what may be lost meanwhile."""

    def __init__(self, loop: LoopThread, held: Held, owner: object) -> None:
        self._loop = loop
        self._held: Held = held
        self._owner = owner

    @property
    def lost(self) -> Lost:
        """Set as soon as it may have ended; has `is_set()` and `wait(timeout_s)`."""
        return Lost(self._loop, self._held.lost)

    @property
    def remaining_s(self) -> float:
        """Seconds that it is held for certain, were the cluster out of reach from now on."""
        return self._loop.run(_soon(lambda: self._held.remaining_s))

    def check(self) -> None:
        """Raises LeaseLost, of a lock LockLost, when it is not held, or nobody knows."""
        self._loop.run(_soon(self._held.check))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.run(self._held.__aexit__(kind, error, trace))


class Lost:
    """A look at an event of the client's loop."""

    def __init__(self, loop: LoopThread, event: asyncio.Event) -> None:
        self._loop = loop
        self._event = event

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for it, at most `timeout_s` seconds; whether it is set."""

        async def wait() -> bool:
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._event.wait()
            except TimeoutError:
                return False

        return self._loop.run(wait())


class Lease(_Held[AsyncLease]):
    """As `dengine.client.Lease`, with `with`."""

    @property
    def id(self) -> str:
        return self._held.id

    @property
    def ttl_s(self) -> float:
        return self._held.ttl_s

    def __enter__(self) -> Lease:
        self._loop.run(self._held.__aenter__())
        return self


class Lock(_Held[AsyncLock]):
    """As `dengine.client.Lock`, with `with`."""

    @property
    def key(self) -> bytes:
        return self._held.key

    @property
    def token(self) -> int:
        return self._held.token

    @property
    def guard(self) -> Compare:
        return self._held.guard

    def __enter__(self) -> Lock:
        self._loop.run(self._held.__aenter__())
        return self

    def release(self) -> None:
        self._loop.run(self._held.release())

    def resign(self) -> None:
        self._loop.run(self._held.resign())


class Election:
    """As `dengine.client.Election`."""

    def __init__(self, loop: LoopThread, election: AsyncElection, owner: object) -> None:
        self._loop = loop
        self._election = election
        self._owner = owner

    def campaign(self, value: bytes, *, ttl_s: int = 10, timeout_s: float | None = None) -> Lock:
        campaign = self._election.campaign(value, ttl_s=ttl_s, timeout_s=timeout_s)
        return Lock(self._loop, campaign, self._owner)

    def leader(self) -> Leader | None:
        return self._loop.run(self._election.leader())

    def observe(self) -> Iterator[Leader | None]:
        return _each(self._loop, self._election.observe(), self._owner)


async def _soon(read: Callable[[], T]) -> T:
    """`read`, in the loop: its clock is there."""
    return read()
