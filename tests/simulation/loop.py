"""Virtual time: one heap of events for a whole cluster, and an asyncio loop for each process.

`EventLoop` implements just what asyncio's futures, tasks and timeouts ask of a loop. All loops
share the `Scheduler`, so a run is one sequence of events, decided by the seed alone. Futures and
tasks hash by a counter: a set of them is walked in the same order in every run.
"""

from __future__ import annotations

import asyncio
import heapq
from asyncio.events import _set_running_loop  # type: ignore[attr-defined]
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

MS = 1_000_000  # simulated time is counted in ns
SECOND = 1000 * MS
EPOCH_NS = 1_700_000_000 * SECOND  # simulated time 0 as a time of day


class Crash(BaseException):
    """The process died in the middle of what it was doing. Nothing may catch this."""


class WriterDied(BaseException):
    """The snapshot writer did, and its node goes on."""


class Unheard(Exception):
    """Something went wrong in a task or a callback, and nobody was told."""


class Handle:
    """What call_soon and call_later give back."""

    __slots__ = ("args", "cancelled", "fn", "when")

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], when: float = 0.0) -> None:
        self.fn = fn
        self.args = args
        self.when = when
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Future(asyncio.Future):  # type: ignore[type-arg]
    def __init__(self, loop: EventLoop) -> None:
        super().__init__(loop=loop)  # type: ignore[arg-type]
        self.number = loop.next_number()

    def __hash__(self) -> int:
        return self.number

    __eq__ = object.__eq__


class Task(asyncio.Task):  # type: ignore[type-arg]
    def __init__(self, coro: Coroutine[Any, Any, Any], loop: EventLoop, name: str | None) -> None:
        self.number = loop.next_number()
        super().__init__(coro, loop=loop, name=name or "")  # type: ignore[arg-type]

    def __hash__(self) -> int:
        return self.number

    __eq__ = object.__eq__


class Clock:
    """What one machine takes for the time.

    Args:
        offset_ns: what it shows at simulated time 0.
        rate: how fast it runs; 1.0 is right.

    Attributes:
        suspended_ns: for how long the machine was suspended; less where its clock has leapt ahead.
        wrong_ns: by how much the time of day is wrong.
    """

    def __init__(self, scheduler: Scheduler, offset_ns: int = 0, rate: float = 1.0) -> None:
        self._scheduler = scheduler
        self._offset_ns = offset_ns
        self.rate = rate
        self.suspended_ns = 0
        self.wrong_ns = 0

    def boottime_ns(self) -> int:
        """CLOCK_BOOTTIME: goes on while the machine is suspended."""
        return self._offset_ns + int(self._scheduler.now * self.rate)

    def monotonic_ns(self) -> int:
        """CLOCK_MONOTONIC: does not."""
        return self._offset_ns + int(self._scheduler.now * self.rate) - self.suspended_ns

    def unix_ns(self) -> int:
        """The time of day, which anybody may set."""
        return EPOCH_NS + self._scheduler.now + self.wrong_ns


class Scheduler:
    """Events by simulated time, then in the order in which they were made."""

    def __init__(self) -> None:
        self.now = 0
        self.count = 0
        self._made = 0
        self.running: EventLoop | None = None  # asyncio is told only when it changes
        self.unheard: BaseException | None = None  # the first thing that nobody was told of
        self._heap: list[tuple[int, int, Callable[..., Any], tuple[Any, ...]]] = []

    def at(self, when: int, fn: Callable[..., Any], *args: Any) -> None:
        self._made += 1
        heapq.heappush(self._heap, (max(when, self.now), self._made, fn, args))

    def after(self, ns: int, fn: Callable[..., Any], *args: Any) -> None:
        self._made += 1
        heapq.heappush(self._heap, (self.now + ns, self._made, fn, args))

    def run_until(self, when: int) -> None:
        """All events up to `when`."""
        heap = self._heap
        while heap and heap[0][0] <= when:
            self.now, _, fn, args = heapq.heappop(heap)
            self.count += 1
            fn(*args)
        self.now = when

    def close(self) -> None:
        """No loop runs any more."""
        self.running = None
        _set_running_loop(None)


class EventLoop:
    """The loop of one process.

    Args:
        ran: called after each event that this process has handled.

    Attributes:
        dead: the process is gone, and none of its callbacks runs any more.
        frozen_until: it is stopped until then; what is due meanwhile waits.
        frozen_by: the fault that has stopped it.
        hit: told what a fault has held up.
    """

    def __init__(self, scheduler: Scheduler, clock: Clock, ran: Callable[[], None]) -> None:
        self._scheduler = scheduler
        self.clock = clock
        self._ran = ran
        self._ready: deque[Handle] = deque()
        self._numbers = 0
        self.dead = False
        self.frozen_until = 0
        self.frozen_by = ""
        self.hit: Callable[[str], None] = lambda what: None

    # --- what asyncio asks of a loop --------------------------------------------------------------

    def time(self) -> float:
        return self.clock.monotonic_ns() / 1e9

    def call_soon(self, fn: Callable[..., Any], *args: Any, context: Any = None) -> Handle:
        handle = Handle(fn, args)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, fn: Callable[..., Any], *args: Any, context: Any = None
    ) -> Handle:
        return self.call_at(self.time() + delay, fn, *args)

    def call_at(
        self, when: float, fn: Callable[..., Any], *args: Any, context: Any = None
    ) -> Handle:
        handle = Handle(fn, args, when)
        self._arm(handle)
        return handle

    def create_future(self) -> Future:
        return Future(self)

    def create_task(
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Any = None
    ) -> Task:
        return Task(coro, self, name)

    def run_in_executor(self, _executor: None, fn: Callable[..., Any], *args: Any) -> Future:
        future = self.create_future()

        def run() -> None:
            if future.done():
                return
            try:
                future.set_result(fn(*args))
            except Exception as error:
                future.set_exception(error)

        self.call_later(0.0005, run)
        return future

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """An error that nobody looked at, or a task that nobody waited for. Of a process that is
        gone it means nothing: its tasks were in the middle of something.
        """
        if self.dead or self._scheduler.unheard is not None:
            return
        who = context.get("task") or context.get("future")
        error = context.get("exception")
        if isinstance(error, AssertionError):  # of an invariant
            self._scheduler.unheard = error
            return
        self._scheduler.unheard = Unheard(f"{context['message']}: {who!r}: {error!r}")
        self._scheduler.unheard.__cause__ = error

    # --- what the simulation asks of it -----------------------------------------------------------

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def clear_away(self) -> None:
        """After the run: end every coroutine that still waits, without running anything more."""
        for task in asyncio.all_tasks(self):  # type: ignore[arg-type]
            coroutine: Any = task.get_coro()
            for _ in range(10):  # each may await once more on its way out
                try:
                    coroutine.close()
                    break
                except RuntimeError:
                    continue
                except BaseException:
                    break
        self._ready.clear()

    def run(self, fn: Callable[..., Any], *args: Any) -> None:
        """One event: `fn`, then everything that it made ready."""
        if self.dead:
            return
        if self.frozen_until > self._scheduler.now:
            self.hit(f"held up by a {self.frozen_by}")
            self._scheduler.at(self.frozen_until, self.run, fn, *args)
            return
        if self._scheduler.running is not self:
            self._scheduler.running = self
            _set_running_loop(self)
        try:
            fn(*args)
            ready = self._ready
            while ready and not self.dead:
                handle = ready.popleft()
                if not handle.cancelled:
                    handle.fn(*handle.args)
        except Crash:
            pass
        if self._scheduler.unheard is not None:
            raise self._scheduler.unheard
        self._ran()

    def _arm(self, handle: Handle) -> None:
        left = (handle.when - self.time()) * 1e9 / self.clock.rate
        self._scheduler.after(max(int(left) + 1, 0), self._due, handle)

    def _due(self, handle: Handle) -> None:
        if handle.cancelled or self.dead:
            return
        if self.frozen_until > self._scheduler.now:
            self.hit(f"held up by a {self.frozen_by}")
            self._scheduler.at(self.frozen_until, self._due, handle)
        elif handle.when > self.time() + 1e-6:  # the machine was suspended meanwhile
            self.hit("deadline put off by a suspend")
            self._arm(handle)
        else:
            self.run(handle.fn, *handle.args)
