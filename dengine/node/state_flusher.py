"""The one thread that writes the state's dirty pages, so that the log never waits for all of them.

Nothing asks for the state to be durable, so without this they would pile up until the kernel writes
them in one burst: half a GiB, with a state that a snapshot's reader has made grow.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable

from dengine.storage.state_store import StateStore

log = logging.getLogger("dengine.state")

# What a page that is written often costs the disk, against the size of a burst: Linux writes all of
# a file that is never clean every 30 s, however old its pages are (vm.dirty_expire_centisecs).
PERIOD_S = 5.0
PAUSE = 4  # times as long as a step took, others have the disk for themselves
SHORT_S = 0.0002  # a step that wrote nothing; waking up after each of them would cost more


class StateFlusher:
    """Sweeps over the state's file again and again, as long as entries are applied.

    Args:
        state: of which only `path`, `applied` and `write_back` are used.
        failed: called on the loop when the disk did not take a page, which ends the process.
    """

    def __init__(
        self,
        state: StateStore,
        loop: asyncio.AbstractEventLoop,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._state = state
        self._loop = loop
        self._failed = failed
        self._stopping = threading.Event()
        # A daemon: a disk that never answers must not keep a stopped process alive.
        self._thread = threading.Thread(target=self._run, name="state-flusher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End after the step under way; False when the disk did not within `timeout_s`."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        swept, started = self._state.applied, time.monotonic()
        said: str | None = None
        while not self._stopping.wait(max(0.0, started + PERIOD_S - time.monotonic())):
            started = time.monotonic()
            if self._state.applied == swept:
                continue
            swept = self._state.applied
            try:
                self._sweep()
            except OSError as error:  # of this system, and so of every sweep: said once
                if error.strerror != said:
                    said = error.strerror
                    log.warning("the state's pages are left to the kernel to write: %s", said)
            except BaseException as error:  # carried to the loop, where it ends the process
                self._loop.call_soon_threadsafe(self._failed, error)
                return

    def _sweep(self) -> None:
        for took_s in self._state.write_back():
            if took_s > SHORT_S and self._stopping.wait(PAUSE * took_s):
                return
