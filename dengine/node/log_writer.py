"""The one thread that writes the log, so that a slow or hung disk never stops the event loop.

When it has nothing to write it deletes, a little at a time, what the log may drop.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable

from dengine.raft.raft import Ready
from dengine.storage.log_store import LogStore

Written = Callable[[Ready, BaseException | None, float], None]

PURGE_PAUSE_S = 0.005  # between two steps, so that a write that comes meanwhile goes first
PURGE_LOOK_S = 1.0


class LogWriter:
    """Writes one `Ready` after the other and reports each on the event loop.

    Args:
        store: where to.
        restore: the durable part of installing a snapshot.
        loop: the loop on which `written` is called.
        failed: called on the loop when a purge failed, which must end the process as a failed write
            does: nothing is tried on that disk again.
        written: `(ready, error or None, seconds the durable write took)`.
    """

    def __init__(
        self,
        store: LogStore,
        restore: Callable[[Ready], None],
        loop: asyncio.AbstractEventLoop,
        written: Written,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._store = store
        self._restore = restore
        self._loop = loop
        self._written = written
        self._failed = failed
        self._jobs: queue.SimpleQueue[Ready | None] = queue.SimpleQueue()  # Raft allows one at once
        # A daemon: a disk that never answers must not keep a stopped process alive.
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def submit(self, ready: Ready) -> None:
        self._jobs.put(ready)

    def stop(self, timeout_s: float) -> bool:
        """Finish what was submitted; False when the disk did not within `timeout_s`."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (ready := self._next()) is not None:
            started = time.perf_counter()
            error: BaseException | None = None
            try:
                if ready.snapshot is not None:
                    self._restore(ready)
                else:
                    self._store.save(ready.hard_state, ready.entries)
            except BaseException as caught:  # carried to the loop, where it ends the process
                error = caught
            seconds = time.perf_counter() - started
            self._loop.call_soon_threadsafe(self._written, ready, error, seconds)

    def _next(self) -> Ready | None:
        """The next job; while there is none, purge."""
        while True:
            try:
                return self._jobs.get(
                    timeout=PURGE_PAUSE_S if self._store.purge_pending else PURGE_LOOK_S
                )
            except queue.Empty:
                if self._store.purge_pending:
                    try:
                        self._store.purge_step()
                    except BaseException as error:  # carried to the loop, where it ends the process
                        self._loop.call_soon_threadsafe(self._failed, error)
                        return self._jobs.get()
