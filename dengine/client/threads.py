"""An event loop in a thread of its own, for `dengine.client.sync`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from dengine.client.client import Client
from dengine.client.failures import ClientClosed

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
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="dengine-client", daemon=True
        )
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns or raises. An exception here, such as Ctrl-C, ends it there."""
        if self.pid != os.getpid():
            work.close()
            raise RuntimeError("this was made before the process forked: make it again")
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("this would wait for itself: use dengine.client.Client in here")
        if self._loop.is_closed():
            work.close()
            raise ClientClosed("this client is closed: make a new one")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ClientClosed(
                "this client was closed meanwhile: make a new one", outcome="unknown"
            ) from None
        except BaseException:
            future.cancel()
            raise

    def errand(self, work: Coroutine[Any, Any, Any]) -> None:
        """Have `work` done without waiting for it, as when an object is collected."""
        if self.pid != os.getpid() or self._loop.is_closed():
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
        if self._loop.is_closed():
            return
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
