"""Faults of processes: killed, restarted, stopped, short of file descriptors.

The subprocesses that write snapshots are killed and stopped as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import psutil

from tests.nemesis.client import Connection
from tests.nemesis.faults import Faults, names
from tests.nemesis.nodes import STORAGE_IO, TRY_AGAIN, holds_within
from tests.nemesis.plan import Action

STOP_S = 40.0  # with a leader to hand over to, and perhaps paused meanwhile
STOPPED_S = 1.0  # from SIGSTOP to the state that shows it
IDLE_CONNECTIONS = 12
LOOK_S = 0.05
WRITER = "dengine.snapshot_writer"
UNNOTED = "identity.json: Too many open files"


async def kill(faults: Faults, action: Action) -> None:
    hit = await faults.hit(action)
    with faults.band(action, names(hit)) as band, contextlib.ExitStack() as stack:
        for node in hit:
            band.effective |= stack.enter_context(node.down())
        await asyncio.sleep(action.seconds)


async def restart(faults: Faults, action: Action) -> None:
    """As an operator does it: SIGTERM, and a start when it has ended well."""
    answering = await faults.nodes.statuses()  # one that has just begun dies of the signal
    hit = [node for node in await faults.hit(action) if node.id in answering and node.up]

    async def ended() -> bool:
        return not any(node.up for node in hit)

    with faults.band(action, names(hit)) as band, contextlib.ExitStack() as stack:
        for node in hit:
            stack.enter_context(node.kept_down())
        lives = [node.ask_to_end(STOP_S) for node in hit]
        if await holds_within(ended, STOP_S):  # else the book says so
            for node in hit:
                node.notice()
            band.effective = any(life is not None and life.code == 0 for life in lives)
            await asyncio.sleep(action.seconds)


async def pause(faults: Faults, action: Action) -> None:
    hit = [node for node in await faults.hit(action) if node.up]
    processes = [node.serve.process for node in hit]
    with faults.band(action, names(hit)) as band:
        try:
            for process in processes:
                process.send_signal(signal.SIGSTOP)

            async def stopped() -> bool:
                return any(is_stopped(process.pid) for process in processes)

            began = time.monotonic()
            band.effective = await holds_within(stopped, STOPPED_S)
            await asyncio.sleep(max(0.0, began + action.seconds - time.monotonic()))
        finally:
            for process in processes:
                process.send_signal(signal.SIGCONT)


async def on_writers(faults: Faults, action: Action, number: signal.Signals) -> None:
    """Whatever writes, checks or fetches a snapshot gets a signal, as soon as it is there. Its node
    goes on: nothing excuses an end. It counts when one got it."""
    hit, met = await faults.hit(action), set[psutil.Process]()
    with faults.band(action, names(hit)) as band:
        try:
            end = time.monotonic() + action.seconds
            while time.monotonic() < end:
                for writer in {w for node in hit if node.up for w in writers_of(node.serve.pid)}:
                    if writer not in met:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            writer.send_signal(number)
                            met.add(writer)
                            band.effective = True
                await asyncio.sleep(LOOK_S)
        finally:
            for writer in met:
                with contextlib.suppress(psutil.NoSuchProcess):
                    writer.resume()


def writers_of(pid: int) -> list[psutil.Process]:
    """The snapshot writers of this node; one that is being started is none yet."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            children = [psutil.Process(int(text)) for text in file.read_text().split()]
            found += [child for child in children if WRITER in child.cmdline()]
    return found


async def few_descriptors(faults: Faults, action: Action) -> None:
    """So few that neither peers nor clients get a connection that they do not have already."""
    hit = await faults.hit(action)
    answering = await faults.nodes.statuses()
    node = hit[0]
    if not node.up:  # down, or about to be started for the first time
        with faults.band(action, names(hit)):
            return
    idle = [Connection(node.id) for _ in range(IDLE_CONNECTIONS)]
    excuses = contextlib.ExitStack()
    # Who is let in or removed has to note that at once.
    why = "it cannot note who it is without a descriptor left"
    excuses.enter_context(node.excuse((STORAGE_IO,), why, UNNOTED))
    if node.id not in answering:  # one that has just begun still reads its modules
        excuses.enter_context(node.excuse((TRY_AGAIN,), "it starts without a descriptor left"))
    with excuses, faults.band(action, names([node])) as band, contextlib.suppress(OSError):
        pid = node.serve.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        limit = len(os.listdir(f"/proc/{pid}/fd")) + int(action.amount)
        asked: list[asyncio.Task[object]] = []
        try:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))
            asked = [
                asyncio.create_task(c.call("GET", "/livez", timeout_s=action.seconds)) for c in idle
            ]
            end = time.monotonic() + 2 * action.seconds
            while time.monotonic() < end:
                band.effective |= not free_descriptors(open_descriptors(pid), limit)
                await asyncio.sleep(LOOK_S)
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            for connection in idle:
                connection.close()
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def open_descriptors(pid: int) -> list[int]:
    """Raises OSError when the process has ended."""
    return [int(name) for name in os.listdir(f"/proc/{pid}/fd")]


def free_descriptors(numbers: Iterable[int], limit: int) -> int:
    """How many more a process may open, which has these open: new ones have numbers below the
    limit."""
    return limit - sum(number < limit for number in numbers)


def is_stopped(pid: int) -> bool:
    """By a signal; one that is traced shows that as "t"."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        return stat.rpartition(")")[2].split()[0] in ("T", "t")
    return False


FAULTS = {
    "kill": kill,
    "restart": restart,
    "pause": pause,
    "kill writer": partial(on_writers, number=signal.SIGKILL),
    "stop writer": partial(on_writers, number=signal.SIGSTOP),
    "few descriptors": few_descriptors,
}
