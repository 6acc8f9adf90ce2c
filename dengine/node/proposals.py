"""Writes between a client and the log: the queue, what is in the log, and who waits for it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from dengine.errors import DengineError, LeaderChanged, RateLimited, RequestTimeout
from dengine.kv.commands import Deferred
from dengine.raft.types import Entry, LogId

BATCH_COMMANDS_MAX = 1024
BATCH_BYTES_MAX = 512 * 1024  # members work on one entry while the leader takes in the next
COMMAND_BYTES_MAX = 4 * 1024 * 1024  # of one alone: an entry, and with it a frame, is never larger


class _Waiting(NamedTuple):
    command: bytes
    future: asyncio.Future[Any]
    deadline: float


class _InLog(NamedTuple):
    term: int
    waiting: Sequence[_Waiting]


class Proposals:
    """Bounded by count and bytes, from the queue until the answer.

    Args:
        count_max, bytes_max: `limits.pending_writes` and `limits.pending_bytes`.
    """

    def __init__(self, count_max: int, bytes_max: int) -> None:
        self._count_max = count_max
        self._bytes_max = bytes_max
        self._queue: deque[_Waiting] = deque()
        self._in_log: dict[int, _InLog] = {}
        self.total = 0  # since the start
        self.count = 0
        self.bytes = 0

    @property
    def queued(self) -> bool:
        return bool(self._queue)

    def add(self, command: bytes, future: asyncio.Future[Any], deadline: float) -> None:
        """Queue a command; `future` gets its result, or the error that ended it.

        Raises:
            RateLimited: the bound is reached; nothing was queued.
        """
        if self.count >= self._count_max or self.bytes + len(command) > self._bytes_max:
            raise RateLimited(
                f"{self.count} writes with {self.bytes} bytes are pending on this node, which is "
                "its limit: slow down and try again"
            )
        self.total += 1
        self.count += 1
        self.bytes += len(command)
        self._queue.append(_Waiting(command, future, deadline))

    def take_batch(self) -> list[_Waiting]:
        """The next commands that share an entry: 1024 or 512 KiB at most, or one that is larger."""
        batch: list[_Waiting] = []
        size = 0
        while self._queue and len(batch) < BATCH_COMMANDS_MAX:
            size += len(self._queue[0].command)
            if batch and size > BATCH_BYTES_MAX:
                break
            batch.append(self._queue.popleft())
        return batch

    def appended(self, log_id: LogId, batch: Sequence[_Waiting]) -> None:
        """`batch` stands in the log at `log_id`."""
        self._displaced(log_id.index)
        self._in_log[log_id.index] = _InLog(log_id.term, batch)

    def watch(self, log_id: LogId, future: asyncio.Future[Any], deadline: float) -> None:
        """`future` gets None once the entry at `log_id` is applied."""
        self.count += 1
        self.appended(log_id, [_Waiting(b"", future, deadline)])

    def applied(self, entry: Entry, results: Sequence[Any]) -> bool:
        """The entry was applied: whoever proposed exactly this one gets the results.

        True: it could not do all of it, and what it left undone is queued again, before all else.
        """
        for index in [
            i for i, w in self._in_log.items() if i >= entry.index and w.term < entry.term
        ]:
            # Terms never fall within a log (5.3): none that holds that write holds this entry, and
            # every later leader's does (5.4).
            self._fail(self._in_log.pop(index).waiting, _replaced())
        found = self._in_log.pop(entry.index, None)
        if found is None:
            return False
        if found.term != entry.term:
            self._fail(found.waiting, _replaced())
            return False
        deferred: list[_Waiting] = []
        for waiting, result in zip(found.waiting, results or [None], strict=True):
            if type(result) is Deferred and not waiting.future.done():
                deferred.append(waiting)
                continue
            self._done(waiting)
            if not waiting.future.done():
                waiting.future.set_result(result)
        self._queue.extendleft(reversed(deferred))
        return bool(deferred)

    def distrusted(self) -> None:
        """Results from here on would be those of a wrong state."""
        error = LeaderChanged(
            "the state of this node is wrong, so it cannot tell the result; the write may happen",
            outcome="unknown",
        )
        for in_log in self._in_log.values():
            self._fail(in_log.waiting, error)
        self._in_log.clear()

    def restored(self, index: int) -> None:
        """A snapshot took the place of the entries up to `index`: nobody here saw them applied."""
        for skipped in [i for i in self._in_log if i <= index]:
            error = LeaderChanged(
                "a snapshot from another member covers the write; it may have happened",
                outcome="unknown",
            )
            self._fail(self._in_log.pop(skipped).waiting, error)

    def refuse_queued(self, error: DengineError) -> None:
        """What is not in the log yet will not get there."""
        waiting, self._queue = self._queue, deque()
        self._fail(waiting, error)

    def expire(self, now: float) -> None:
        """End what has waited past its deadline: unknown when it is in the log, none before."""
        late = [w for w in self._queue if w.deadline <= now or w.future.done()]
        if late:
            self._queue = deque(w for w in self._queue if w.deadline > now and not w.future.done())
            self._fail(late, RequestTimeout("no leader took the write in time", outcome="none"))
        for in_log in self._in_log.values():
            for waiting in in_log.waiting:
                if waiting.deadline <= now and not waiting.future.done():
                    waiting.future.set_exception(
                        RequestTimeout("the write was not committed in time; it may still be")
                    )

    def _displaced(self, index: int) -> None:
        """A new entry at `index`: an older one of ours has left this log, but another member may
        still hold it, be elected and commit it. Only a committed entry in its place proves more.
        """
        for stale in [i for i in self._in_log if i >= index]:
            error = LeaderChanged(
                "leadership changed and the write left this node's log; it may still happen",
                outcome="unknown",
            )
            self._fail(self._in_log.pop(stale).waiting, error)

    def _fail(self, waiting: Sequence[_Waiting] | deque[_Waiting], error: DengineError) -> None:
        for item in waiting:
            self._done(item)
            if not item.future.done():
                item.future.set_exception(error)

    def _done(self, waiting: _Waiting) -> None:
        self.count -= 1
        self.bytes -= len(waiting.command)


def _replaced() -> LeaderChanged:
    return LeaderChanged("leadership changed and the write was replaced: it did not happen")
