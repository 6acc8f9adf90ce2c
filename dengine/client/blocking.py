"""What `dengine.client.sync` is made of: an event loop in a thread of its own, and the asynchronous
objects, for callers that wait.

Each of these holds on to its `owner`, the client: one that nobody holds any more is closed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from dengine.client.client import Client
from dengine.client.elections import Election as AsyncElection
from dengine.client.elections import Leader
from dengine.client.leases import Lease as AsyncLease
from dengine.client.locks import Lock as AsyncLock
from dengine.client.types import Change, ClientClosed, Compare, Item, Page
from dengine.client.types import Listing as AsyncListing
from dengine.client.watching import Watch as AsyncWatch
from dengine.errors import DengineError

STOP_S = 10.0
TOLD_S = 1.0  # for calls under way to learn that their client is closed
T = TypeVar("T")

# Loops of a parent process: their end here would disturb them there.
_INHERITED: list[LoopThread] = []


class LoopThread:
    """The loop, and the asynchronous client that lives in it."""

    def __init__(self, make: Callable[[], Client]) -> None:
        self.pid = os.getpid()
        self.client = make()
        self._loop = asyncio.new_event_loop()
        self._errands: set[asyncio.Task[Any]] = set()
        self._guard = threading.RLock()  # the garbage collector may call `stop` from anywhere
        self._stopping = False  # from then on the loop takes nothing that it may not come to do
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="dengine-client", daemon=True
        )
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns or raises. An exception here, such as Ctrl-C, ends it there."""
        future = self._start(work)
        try:
            return _result(future)
        except BaseException:
            future.cancel()
            raise

    def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """As `run`, but an exception here leaves `work` to its end there."""
        return _result(self._start(work))

    def _start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self.pid != os.getpid():
            work.close()
            raise RuntimeError("this was made before the process forked: make it again")
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("this would wait for itself: use dengine.client.Client in here")
        with self._guard:
            if self._stopping:
                work.close()
                raise ClientClosed("this client is closed: make a new one")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def has_ended(self) -> bool:
        """Is the client closed? Then what was under way in the loop has ended, too, and nobody but
        the caller looks at the objects that were made in it.
        """
        if not self._stopping or self.pid != os.getpid():
            return False
        if threading.current_thread() is not self._thread:
            self._thread.join(STOP_S)
        return not self._thread.is_alive()

    def errand(self, work: Coroutine[Any, Any, Any]) -> None:
        """Have `work` done without waiting for it, as when an object is collected."""
        if self.pid != os.getpid():
            work.close()
            return
        with self._guard:
            if self._stopping:
                work.close()
                return
            self._loop.call_soon_threadsafe(self._begin, work)

    def _begin(self, work: Coroutine[Any, Any, Any]) -> None:
        task = self._loop.create_task(work)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    def stop(self) -> None:
        """Close the client and end the thread; a forked process only leaves them alone."""
        if self.pid != os.getpid():
            _INHERITED.append(self)
            return
        with self._guard:
            if self._stopping:
                return
            self._stopping = True
        if threading.current_thread() is self._thread:  # the garbage collector came by here
            self._begin(self._end_here())
            return
        try:
            with contextlib.suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(STOP_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_S)
            if not self._thread.is_alive():
                self._loop.close()

    async def _end_here(self) -> None:
        await self._end()
        self._loop.stop()

    async def _end(self) -> None:
        await self.client.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks, timeout=TOLD_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()


def _result(future: concurrent.futures.Future[T]) -> T:
    try:
        return future.result()
    except concurrent.futures.CancelledError:
        raise ClientClosed(
            "this client was closed meanwhile: make a new one", outcome="unknown"
        ) from None


class Holder:
    """The loop of this process, made when it is first needed, also after a fork."""

    def __init__(self, make: Callable[[], Client]) -> None:
        self._make = make
        self._held: LoopThread | None = None
        self._guard = threading.Lock()
        self._guard_pid = os.getpid()
        self.closed = False

    def loop(self) -> LoopThread:
        if self._guard_pid != os.getpid():  # a thread of the parent may have held it
            self._guard, self._guard_pid = threading.Lock(), os.getpid()
        with self._guard:
            if self.closed:
                raise ClientClosed("this client is closed: make a new one")
            if self._held is not None and self._held.pid != os.getpid():
                self._held.stop()
                self._held = None
            if self._held is None:
                self._held = LoopThread(self._make)
            return self._held

    def close(self) -> None:
        """A second time does nothing."""
        self.closed = True
        held, self._held = self._held, None
        if held is not None:
            held.stop()


# --- what the client hands out --------------------------------------------------------------------


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


class _Entry(Generic[Held]):
    """One time that something is entered. Only the loop knows whether Ctrl-C came before or after
    it was held.
    """

    def __init__(self, held: Held) -> None:
        self._held: Held = held
        self._entered = self._dropped = False

    async def enter(self) -> None:
        await self._held.__aenter__()
        self._entered = True
        if self._dropped:
            await self.drop()

    async def drop(self) -> None:
        """Nobody is going to leave it: let it go, where it is held, or as soon as it is."""
        self._dropped = True
        if self._entered:
            with contextlib.suppress(DengineError):
                await self._held.__aexit__(None, None, None)


def _drop(loop: LoopThread, entries: list[_Entry[Held]]) -> None:
    for entry in entries:
        loop.errand(entry.drop())


class _Held(Generic[Held]):
    """What `with` holds, and what may be lost meanwhile. When nobody holds the object any more, as
    after Ctrl-C in the first or last step of `with`, it is let go.
    """

    def __init__(self, loop: LoopThread, held: Held, owner: object) -> None:
        self._loop = loop
        self._held: Held = held
        self._held._entered_by = "with"
        self._owner = owner
        self._entries: list[_Entry[Held]] = []
        # At the end of the interpreter others may still be at work under it: its time ends it then.
        weakref.finalize(self, _drop, loop, self._entries).atexit = False

    @property
    def lost(self) -> Lost:
        """Set as soon as it may have ended; has `is_set()` and `wait(timeout_s)`."""
        return Lost(self._loop, self._held.lost)

    @property
    def remaining_s(self) -> float:
        """Seconds that it is held for certain, were the cluster out of reach from now on."""
        return self._look(lambda: self._held.remaining_s)

    def check(self) -> None:
        """Raises LeaseLost, of a lock LockLost, when it is not held, or nobody knows."""
        self._look(self._held.check)

    def _look(self, read: Callable[[], T]) -> T:
        """`read`, in the loop, or here where that has ended."""
        try:
            return self._loop.run(_soon(read))
        except ClientClosed:
            if not self._loop.has_ended():
                raise
            return read()

    def __enter__(self) -> Self:
        entry = _Entry(self._held)
        self._entries.append(entry)
        try:
            self._loop.run(entry.enter())
        except BaseException:
            self._loop.errand(entry.drop())
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ctrl-C ends the waiting for it only."""
        try:
            self._leave(lambda: self._held.__aexit__(kind, error, trace), self._held._leave_closed)
        except DengineError:
            if error is None:
                raise

    def _leave(
        self, leaving: Callable[[], Coroutine[Any, Any, None]], closed: Callable[[], None]
    ) -> None:
        """Args:
        closed: does the same where the client is closed, and the loop has ended.
        """
        try:
            self._loop.finish(leaving())
        except ClientClosed as error:
            if error.outcome == "unknown" or not self._loop.has_ended():
                raise  # it was under way
            closed()
        except BaseException:  # perhaps before that was begun
            _drop(self._loop, self._entries)
            raise


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

        try:
            return self._loop.run(wait())
        except ClientClosed:
            if not self._loop.has_ended():
                raise
            return self.is_set()


class Lease(_Held[AsyncLease]):
    """As `dengine.client.Lease`, with `with`. It is kept alive as long as this object is held."""

    @property
    def id(self) -> str:
        return self._held.id

    @property
    def ttl_s(self) -> float:
        return self._held.ttl_s

    def grant(self) -> None:
        """What entering does; `revoke` belongs to it."""
        self.__enter__()

    def revoke(self) -> None:
        """End it now, if a node can be reached within a moment; its time ends it otherwise."""
        self._leave(self._held.revoke, lambda: None)  # a closed client keeps nothing alive


class Lock(_Held[AsyncLock]):
    """As `dengine.client.Lock`, with `with`. It is kept as long as this object is held."""

    @property
    def key(self) -> bytes:
        return self._held.key

    @property
    def token(self) -> int:
        return self._held.token

    @property
    def why(self) -> str:
        return self._held.why

    @property
    def guard(self) -> Compare:
        return self._held.guard

    def release(self) -> None:
        self._leave(self._held.release, self._held._leave_closed)

    def resign(self) -> None:
        self.release()

    def proclaim(self, value: bytes) -> None:
        try:
            self._loop.run(self._held.proclaim(value))
        except ClientClosed:
            if self.token:
                self.check()
            raise


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
