"""The thread that keeps the state's dirty pages few."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from dengine.errors import StorageIO
from dengine.node import state_flusher
from dengine.node.state_flusher import StateFlusher
from dengine.raft.types import LogId
from dengine.storage.state_store import StateStore
from tests.node.hosts import until

DEADLINE_S = 5.0


class State:
    """A stand-in for a StateStore, whose disk takes as long per step as a test wants."""

    def __init__(self) -> None:
        self.looks = 0
        self._applied = LogId(1, 1)
        self.sweeps = 0
        self.steps = threading.Semaphore(0)
        self.error: Exception | None = None

    @property
    def applied(self) -> LogId:
        self.looks += 1
        return self._applied

    @applied.setter
    def applied(self, log_id: LogId) -> None:
        self._applied = log_id

    def write_back(self) -> Iterator[float]:
        self.sweeps += 1
        if self.error is not None:
            raise self.error
        for _ in range(1000):
            self.steps.release()
            yield 0.001


def flusher_of(
    state: State, failed: Callable[[BaseException], object] = lambda error: None
) -> StateFlusher:
    return StateFlusher(cast(StateStore, state), asyncio.get_running_loop(), cast(Any, failed))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_flusher, "PERIOD_S", 0.02)


def test_an_idle_node_leaves_its_disk_alone() -> None:
    async def main() -> None:
        state = State()
        flusher = flusher_of(state)
        flusher.start()
        await until(lambda: state.looks > 5, "it to have looked a few times")
        assert not state.sweeps
        state.applied = LogId(2, 1)
        assert await asyncio.to_thread(state.steps.acquire, timeout=DEADLINE_S)
        assert flusher.stop(DEADLINE_S)

    asyncio.run(main())


def test_it_stops_in_the_middle_of_a_sweep() -> None:
    """A thousand steps and their pauses would take five seconds."""

    async def main() -> None:
        state = State()
        flusher = flusher_of(state)
        flusher.start()
        state.applied = LogId(2, 1)
        assert await asyncio.to_thread(state.steps.acquire, timeout=DEADLINE_S)
        started = time.monotonic()
        assert flusher.stop(DEADLINE_S)
        assert time.monotonic() - started < 1

    asyncio.run(main())


def test_what_the_disk_refused_ends_the_process() -> None:
    async def main() -> None:
        state = State()
        state.error = StorageIO("the disk did not take it")
        failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        flusher = flusher_of(state, failed.set_result)
        flusher.start()
        state.applied = LogId(2, 1)
        assert await asyncio.wait_for(failed, DEADLINE_S) is state.error
        assert flusher.stop(DEADLINE_S)

    asyncio.run(main())


def test_one_that_was_never_started_has_nothing_to_stop() -> None:
    async def main() -> None:
        flusher = flusher_of(State())
        assert flusher.stop(DEADLINE_S)

    asyncio.run(main())


def test_where_it_cannot_be_done_the_node_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """It says so once, and tries again with the next sweep."""

    async def main() -> None:
        state = State()
        state.error = PermissionError(errno.EPERM, "Operation not permitted")
        failed: list[BaseException] = []
        flusher = flusher_of(state, failed.append)
        flusher.start()
        state.applied = LogId(2, 1)
        await until(lambda: state.sweeps == 1, "a sweep")
        state.applied = LogId(3, 1)
        await until(lambda: state.sweeps == 2, "another one")
        assert flusher.stop(DEADLINE_S)
        assert not failed
        assert caplog.text.count("left to the kernel") == 1

    asyncio.run(main())
