"""An event loop whose time passes only when nothing else is left to do.

Tests of deadlines, leases and silence would wait for seconds and depend on how busy the machine is.
Here the loop, before it would sleep until its next timer, looks whether a socket has something, and
if not, it is that time. Sockets on loopback deliver at once, so a program that talks to itself
never waits. What other threads or processes do takes no time here: such tests need a real loop.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from unittest import mock

from dengine.client import stopwatch

GRACE_S = 0.003  # for a socket to show what was sent to it
# What a turn of the loop takes. A timer fires up to a nanosecond early: were turns free, whoever
# waits for less than that, again and again, would do so for ever.
TURN_S = 1e-6
T = TypeVar("T")


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Waits for a moment at most, and lets virtual time pass instead."""

    passed: Callable[[float], None]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.passed(TURN_S)
        found = super().select(0)
        if found or timeout == 0:
            return found
        if timeout is None:  # no timer: only a socket can bring anything
            return super().select(None)
        found = super().select(GRACE_S)
        if not found and timeout > 0:
            self.passed(timeout)
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        selector = _Selector()
        super().__init__(selector)
        self._now = 1000.0
        selector.passed = self._pass

    def time(self) -> float:
        return self._now

    def _pass(self, seconds: float) -> None:
        self._now += seconds


def _never_slept() -> float:
    """The time that a machine has slept is real time: here none of it passes."""
    return 0.0


def run(work: Coroutine[Any, Any, T], limit_s: float = 600.0) -> T:
    """Run `work` in virtual time, at most `limit_s` seconds of it."""

    async def limited() -> T:
        async with asyncio.timeout(limit_s):
            return await work

    with (
        mock.patch.object(stopwatch, "boot_time", _never_slept),
        asyncio.Runner(loop_factory=VirtualLoop) as runner,
    ):
        return runner.run(limited())
