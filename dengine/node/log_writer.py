"""The one thread that writes the log, so that a slow or hung disk never stops the event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable

from dengine.raft.raft import Ready
from dengine.storage.log_store import LogStore

Written = Callable[[Ready, BaseException | None, float], None]


class LogWriter:
    """Writes one `Ready` after the other and reports each on the event loop.

    Args:
        store: where to.
        loop: the loop on which `written` is called.
        written: `(ready, error or None, seconds the durable write took)`.
    """

    def __init__(self, store: LogStore, loop: asyncio.AbstractEventLoop, written: Written) -> None:
        self._store = store
        self._loop = loop
        self._written = written
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
        while (ready := self._jobs.get()) is not None:
            started = time.perf_counter()
            error: BaseException | None = None
            try:
                self._store.save(ready.hard_state, ready.entries)
            except BaseException as caught:  # carried to the loop, where it ends the process
                error = caught
            seconds = time.perf_counter() - started
            self._loop.call_soon_threadsafe(self._written, ready, error, seconds)
