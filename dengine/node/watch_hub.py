"""Who follows which keys: every change of them, once, in order, for as long as the reader keeps up.

A watch is either live, and gets what is applied from then on, or it catches up from the history of
the state. It becomes live in the very step that has read the last revision, so nothing falls in
between. Live ones cost a write one look-up per changed key. Those that catch up share a few
milliseconds at a time, or many of them would keep the node from its heartbeats.

What waits for a reader is bounded, and the message that it is reading counts. When that is full the
watch goes over to catching up: what comes meanwhile waits in the history, and costs nothing. A
reader that takes nothing for a while, or that the end of the history overtakes, is told so, and its
watch ends; it can resume behind the last revision that it has seen, here or at any other node, for
as long as the history has it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

from dengine.errors import (
    ClusterUnavailable,
    Compacted,
    FatalError,
    InvariantBroken,
    TryAgain,
    WatchOverflow,
)
from dengine.kv.store import Event
from dengine.node.watch_history import History
from dengine.node.watch_index import Bucket, Selection, WatchIndex
from dengine.node.watch_messages import Cancelled, Changes, Message, Progress
from dengine.storage.state_store import StateStore

__all__ = ["Cancelled", "Changes", "Message", "Progress", "Selection", "Watch", "WatchHub"]

QUEUE_MAX: Final = 1000  # messages of a live watch, with the one that is being read
QUEUE_BYTES_MAX: Final = 4 * 1024 * 1024  # and their size; a single larger one is let through
QUEUES_BYTES_MAX: Final = 128 * 1024 * 1024  # for all watches: what several wait for counts once
CATCH_UP_BYTES: Final = 256 * 1024  # of history that is read at once; and waiting for a watch
CATCH_UP_REVISIONS: Final = 500
CATCH_UP_S: Final = 0.005  # for all that catch up, and then a pause as long
PROGRESS_S: Final = 10.0
SLOW_TIMES: Final = 2  # in a row that nothing was taken since the last time: 20 to 30 s


class Watch:
    """An asynchronous iterator of messages; `aclose` it, or use it with `contextlib.aclosing`.

    It ends after `Cancelled`, and when it is closed.

    Attributes:
        selection: which keys.
        prev: is what was there before wanted?
        first: the first revision that was wanted.
        position: the next revision that is wanted; lower ones were delivered.
        over: nothing new comes any more.
        closed: nor does anybody wait for the rest of what was taken.
    """

    def __init__(self, hub: WatchHub, selection: Selection, position: int, prev: bool) -> None:
        self.selection = selection
        self.prev = prev
        self.first = self.position = position
        self.over = self.closed = False
        self._hub = hub
        self._queue: deque[Message] = deque()
        self._in_hand = False  # is the first of them being read?
        self._bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._held_up = False  # does the reader wait for this node?
        self._taken = 0  # messages, and parts of them, since `is_slow` was asked last
        self._stood_still = 0  # times in a row that it had to be said
        self._refused = False  # a message found no room, and nothing comes before all is read

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> Message:
        self.done()
        while not self._queue:
            if self.over:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._in_hand = True
        self._taken += 1
        return self._queue[0]

    def done(self) -> None:
        """The reader is done with the message that it took last, as when it asks for the next."""
        if self._in_hand:
            self._in_hand = False
            self._remove(self._queue.popleft())
            self._refused = self._refused and bool(self._queue)
            self._hub.drained(self)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """The right to make one part of a large message: for whoever waits longest, of all watches
        of the node. To wait for it is no fault of the reader.
        """
        self._held_up = True
        try:
            async with self._hub.turn:
                yield
        finally:
            self._held_up = False

    def took_part(self) -> None:
        """The reader goes on with the message that it took last."""
        self._taken += 1

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        """No more messages, and nothing kept."""
        self.over = self.closed = True
        self.done()
        self._drop_waiting()
        self._hub.closed(self)
        self._awake()

    # --- the hub's side -----------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Messages that the reader has yet to take."""
        return len(self._queue) - self._in_hand

    @property
    def has_room(self) -> bool:
        """Would another step of catching up not pile up?"""
        if not self._queue:
            return True
        roomy = self._bytes < CATCH_UP_BYTES and len(self._queue) < CATCH_UP_REVISIONS
        return roomy and not (self._refused or self._hub.is_full)

    def is_slow(self) -> bool:
        """Asked at intervals: has the reader let messages wait for too many of them?"""
        stands = self.waiting > 0 and not (self._taken or self._held_up)
        self._stood_still = self._stood_still + 1 if stands else 0
        self._taken = 0
        return self._stood_still >= SLOW_TIMES

    def push(self, message: Message) -> bool:
        """Queue a message. False: too much waits already."""
        size = message.size
        if self._queue and (
            len(self._queue) >= QUEUE_MAX
            or self._bytes + size > QUEUE_BYTES_MAX
            or self._hub.is_full
        ):
            self._refused = True
            return False
        self._queue.append(message)
        self._bytes += size
        self._hub.joined_queue(message)
        self._awake()
        return True

    def cancel(self, reason: str, compact_revision: int | None = None) -> None:
        """End it; the reader learns why. What it has not taken yet is dropped."""
        self._drop_waiting()
        self._queue.append(Cancelled(reason, compact_revision))
        self.over = True
        self._hub.closed(self)
        self._awake()

    def _drop_waiting(self) -> None:
        while self.waiting:
            self._remove(self._queue.pop())

    def _remove(self, message: Message) -> None:
        self._bytes -= message.size
        self._hub.left_queue(message)

    def _awake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class WatchHub:
    """All watches of one node.

    Args:
        count_max: `limits.watchers`.
        fail: ends the process: the history could not be read.
    """

    def __init__(
        self, state: StateStore, count_max: int, fail: Callable[[FatalError], None]
    ) -> None:
        self._state = state
        self._count_max = count_max
        self._fail = fail
        self._path = state.path
        self._revision = state.revision  # up to which live ones were served
        self._live = WatchIndex[Watch]()
        self._catching: dict[Watch, None] = {}  # whose turn is next comes first
        self._history = History(state)
        self._all: dict[Watch, None] = {}
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._bytes = 0  # of all changes that wait for a reader, or are being read
        self.turn = asyncio.Lock()  # see `Watch.turn`

    @property
    def count(self) -> int:
        """Watches that are open."""
        return len(self._all)

    @property
    def compact_revision(self) -> int:
        """The newest revision that the history does not have any more."""
        totals = self._state.totals
        return self._state.revision if totals is None else totals.history_first - 1

    def open(self, selection: Selection, first: int | None, *, prev: bool = False) -> Watch:
        """Follow `selection` from revision `first` on; None: from now on.

        The first message is a `Progress` that says up to where there is nothing to come.

        Raises:
            Compacted, WatchOverflow, ClusterUnavailable: refused.
        """
        if self._closed:
            raise ClusterUnavailable("this node is stopping")
        if len(self._all) >= self._count_max:
            raise WatchOverflow(
                f"{self._count_max} watches are open on this node (limits.watchers): "
                "close some, or use another node"
            )
        self._notice_replacement()
        applied, compact = self._state.revision, self.compact_revision
        if first is not None and first <= compact:
            raise Compacted(
                f"the history begins after revision {compact}: read the keys anew, then watch "
                "from the revision of that reading on",
                compact_revision=compact,
            )
        watch = Watch(self, selection, applied + 1 if first is None else first, prev)
        self._all[watch] = None
        watch.push(Progress(min(applied, watch.position - 1)))
        self._sort_in(watch)
        if self._timer is None:
            self._arm_timer()
        return watch

    async def close(self) -> None:
        """The node is stopping: all watches end."""
        self._closed = True
        for watch in list(self._all):
            watch.cancel("this node is stopping: resume at another one")
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # --- live ---------------------------------------------------------------------------------

    def applied(self) -> None:
        """Entries were applied, or the state was replaced: tell whom it concerns."""
        self._notice_replacement()
        for revision, events in self._state.take_changes():
            for watch in self._deliver(self._live, revision, events):
                self._sort_in(watch)
        self._state.keep_changes = bool(self._live)
        self._revision = self._state.revision

    def _deliver(
        self, index: WatchIndex[Watch], revision: int, events: Sequence[Event]
    ) -> list[Watch]:
        """Give each in `index` what it selects of a revision. Returns those without room for it:
        they are taken out of `index`, and their position is this revision.

        What there is to do grows with the events, and with the watches, but not with the product:
        a range that goes while thousands follow it must not keep this node from its heartbeats.
        """
        selected: dict[Bucket[Watch], list[int]] = {}
        for number, event in enumerate(events):
            for bucket in index.find(event.key):
                selected.setdefault(bucket, []).append(number)
        shared: dict[tuple[bool, tuple[int, ...]], Changes] = {}
        refused: list[Watch] = []
        for bucket, numbers in selected.items():
            which = tuple(numbers)
            mine: dict[bool, Changes] = {}
            for watch in bucket.things:
                if revision < watch.position:
                    continue
                changes = mine.get(watch.prev)
                if changes is None:
                    changes = shared.get((watch.prev, which))
                    if changes is None:
                        changes = Changes(revision, [events[n] for n in which], prev=watch.prev)
                        shared[watch.prev, which] = changes
                    mine[watch.prev] = changes
                if watch.push(changes):
                    watch.position = revision + 1
                else:
                    watch.position = revision
                    refused.append(watch)
        for watch in refused:
            index.discard(watch.selection, watch)
        return refused

    def _sort_in(self, watch: Watch) -> None:
        """Live, if there is nothing behind it."""
        if watch.position > self._state.revision:
            self._catching.pop(watch, None)
            self._live.add(watch.selection, watch)
            self._state.keep_changes = True
            return
        self._catching[watch] = None
        self._wake.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(
                self._catch_up(), name="watches that catch up"
            )

    def distrusted(self) -> None:
        """The state was wrong, perhaps for long, and with it what it told: it ends all of them, and
        nobody may go on from the revision that he has come to.
        """
        for watch in list(self._all):
            watch.cancel(
                "the state of this node is wrong: read the keys anew, at another one",
                self._state.revision,
            )

    def _notice_replacement(self) -> None:
        """A snapshot took the state's place: what lies between is in its history, or is not."""
        if self._state.path == self._path:
            return
        self._path = self._state.path
        self._history.forget()
        self._state.take_changes()
        lost = self._state.revision < self._revision
        for watch in self._live.clear():
            watch.position = max(watch.position, self._revision + 1)
            if not lost:
                self._sort_in(watch)
        if lost:
            for watch in list(self._all):
                watch.cancel("the state of this node is being rebuilt: resume at another one")
        self._revision = self._state.revision

    # --- catching up --------------------------------------------------------------------------

    async def _catch_up(self) -> None:
        try:
            while self._catching:
                self._wake.clear()
                if self._step():
                    await asyncio.sleep(CATCH_UP_S)
                else:
                    await self._wake.wait()  # for a reader
        except FatalError as error:
            self._fail(error)
        except Exception as error:
            wrapped = TryAgain(f"watches died of {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            self._fail(wrapped)

    def _step(self) -> bool:
        """Serve those that wait, in turn, for a few milliseconds. False: no reader has room."""
        self._notice_replacement()  # nobody may take an empty state for one that it has caught up
        self._end_overtaken()
        until = time.monotonic() + CATCH_UP_S
        moved = False
        while (watch := self._next_with_room()) is not None:
            moved = True
            self._advance(watch.position, until)
            if time.monotonic() >= until:
                break
        return moved

    def _end_overtaken(self) -> None:
        compact = self.compact_revision
        for watch in [watch for watch in self._catching if watch.position <= compact]:
            watch.cancel(
                f"the history begins after revision {compact} by now, and this watch had come to "
                f"{watch.position - 1}: read the keys anew",
                compact,
            )

    def _next_with_room(self) -> Watch | None:
        for watch in list(self._catching):
            del self._catching[watch]  # to the end of the line
            self._catching[watch] = None
            if watch.has_room:
                return watch
        return None

    def _advance(self, position: int, until: float) -> None:
        """Serve all that are in the same piece of the history as `position`, as far as time and
        their room last; but one revision at least."""
        piece = self._history.at(position, CATCH_UP_REVISIONS, CATCH_UP_BYTES)
        if piece is None:
            raise InvariantBroken(
                f"{self._state.path}: the history begins after {self.compact_revision} and does "
                f"not have revision {position} of {self._state.revision}"
            )
        here = {
            watch: None
            for watch in self._catching
            if piece.first <= watch.position <= piece.last and watch.has_room
        }
        served = WatchIndex[Watch]()
        for watch in here:
            served.add(watch.selection, watch)
        passed = 0
        for revision, events in piece.from_revision(min(watch.position for watch in here)):
            for watch in self._deliver(served, revision, events):
                del here[watch]
            passed = revision
            if time.monotonic() >= until:
                break
        for watch in here:
            watch.position = max(watch.position, passed + 1)
            self._sort_in(watch)

    # --- the readers' side --------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """Do readers keep so much that each may have only one message, waiting or in hand?"""
        return self._bytes > QUEUES_BYTES_MAX

    def joined_queue(self, message: Message) -> None:
        """It is kept for one reader more."""
        if type(message) is Changes:
            if not message.queues:
                self._bytes += message.size
            message.queues += 1

    def left_queue(self, message: Message) -> None:
        """It is kept for one reader less."""
        if type(message) is Changes:
            message.queues -= 1
            if not message.queues:
                self._bytes -= message.size

    def drained(self, watch: Watch) -> None:
        """A reader is done with a message."""
        if watch.has_room and not self._wake.is_set() and self._catching:
            self._wake.set()

    def closed(self, watch: Watch) -> None:
        """It gets nothing more."""
        self._all.pop(watch, None)
        self._catching.pop(watch, None)
        self._live.discard(watch.selection, watch)
        if not self._live:
            self._state.keep_changes = False
            self._state.take_changes()
        if not self._all and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- progress -----------------------------------------------------------------------------

    def _arm_timer(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(PROGRESS_S, self._tell_progress)

    def _tell_progress(self) -> None:
        """To whoever has taken everything: idle ones learn a newer place from which to resume."""
        self._arm_timer()
        self._notice_replacement()
        self._end_slow_ones()
        for watch in self._catching:
            if not watch.waiting:
                watch.push(Progress(watch.position - 1))
        revision = self._state.revision
        for watch in list(self._live):
            if not watch.waiting:
                watch.push(Progress(revision))

    def _end_slow_ones(self) -> None:
        for watch in [watch for watch in self._all if watch.is_slow()]:
            watch.cancel(
                f"too slow: nothing was read for {SLOW_TIMES * PROGRESS_S:g} s, and "
                f"{watch.waiting} messages wait; resume behind the last that you have seen",
            )
