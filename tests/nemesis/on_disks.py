"""Faults of disks: calls that fail or take long, a full disk, bits that flip, files cut short."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from tests.crash_sweep.strace import Fault, Injection, Strace
from tests.nemesis.damage import cut_short, file_of, flip
from tests.nemesis.disks import filled
from tests.nemesis.faults import Faults, names
from tests.nemesis.lives import FOREVER, closing
from tests.nemesis.nodes import DAMAGED, READY_S, STORAGE_IO, Node, holds_within
from tests.nemesis.plan import Action

# What a damaged file may do to who reads it; a start after that knows (see ARCHITECTURE.md). After
# 65 a person is needed, who removes the directory: the nodes beside it have everything.
DAMAGES = (DAMAGED, STORAGE_IO, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)
# What a node says when it has read all of its state, or has built another one.
CHECKED = re.compile(r"the state was read through|snapshot up to entry|rebuilt from|rebuilding")
# What it says when it has met damage.
NOTICED = re.compile(
    r"damaged|rolled back|state is wrong|found wrong|trying an older one|new incarnation|are lost"
)
DELAYED = "(DELAYED)"  # strace, of a call that it has held up
FAIL_STOP_S = 15.0  # from an error of the disk under the log to the end of the process
FILLING = 6  # values that fill a small disk
FILLING_BYTES = 60_000


async def eio(faults: Faults, action: Action) -> None:
    """Each commit writes before it syncs, so that a sync fails only where nothing else does."""
    syncs_of_log = action.dice % 4 == 2
    calls = "fdatasync,fsync" + ("" if syncs_of_log else ",pwrite64,pwritev")
    await failing_disk(faults, action, Fault.EIO, calls)


async def enospc(faults: Faults, action: Action) -> None:
    await failing_disk(faults, action, Fault.ENOSPC, "pwrite64,pwritev")


async def failing_disk(faults: Faults, action: Action, fault: Fault, syscalls: str) -> None:
    """A write of the log or of the state fails. Under either that has to be the end of the process:
    what a failed write or sync has left behind, nobody knows."""
    node, part = (await faults.hit(action))[0], ("log", "state")[action.dice % 2]
    life, file = node.book.running, None
    with contextlib.suppress(OSError):  # between two states there may be no file
        file = file_of(node.serve.directory, part)
    if life is None or not node.up or file is None:
        return faults.skip(action, f"node {node.id} has no process that writes its {part}")
    process = node.serve.process
    trace = faults.machines.work / f"strace-{len(faults.bands)}.log"
    injection = Injection(trace, syscalls, [file], fault, 1, children=True)
    why, threads = f"{action.name} under its {part}", set(threads_of(process.pid))

    async def happened() -> bool:
        threads.update(threads_of(process.pid))
        return process.poll() is not None or bool(injection.seen(process.pid))

    async def ended() -> bool:
        return process.poll() is not None

    may_end = node.book.may_end((STORAGE_IO,), why, time.monotonic(), life=life)
    with (
        faults.band(action, f"{names([node])}, {part}") as band,
        closing(may_end, time.monotonic) as reason,
    ):

        async def look() -> None:
            thread = injection.seen(process.pid)
            band.effective |= bool(thread)
            # Not in a snapshot writer, which may fail as it likes.
            if thread in threads and reason.owed_by == FOREVER:
                reason.owed_by = time.monotonic() + FAIL_STOP_S
                await holds_within(ended, FAIL_STOP_S)  # else the book says so

        async with traced(faults, injection, process):
            hit = await holds_within(happened, action.seconds)
            if fault is Fault.ENOSPC and hit:
                await asyncio.sleep(action.seconds)
            await look()
        await look()  # it may have happened just before strace was gone


def threads_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(thread.name) for thread in Path(f"/proc/{pid}/task").iterdir()]
    return []


@contextlib.asynccontextmanager
async def traced(
    faults: Faults, strace: Strace, process: subprocess.Popen[bytes]
) -> AsyncIterator[None]:
    """Within, strace watches the process. That it could not be attached to one that goes on is a
    problem of the run: where tracing is forbidden, no disk ever fails."""
    attaching = asyncio.create_task(asyncio.to_thread(strace.attach, process.pid))
    try:
        try:
            await asyncio.shield(attaching)
        except (AssertionError, OSError) as error:
            said = f"strace could not be attached to process {process.pid}: {error}"
            faults.say(said)
            if process.poll() is None:
                faults.nodes.problems.append(said)
        yield
    finally:
        await asyncio.wait([attaching])  # what is not attached yet cannot be detached
        if not attaching.cancelled():
            attaching.exception()
        strace.detach(process.pid)


async def slow_sync(faults: Faults, action: Action) -> None:
    """Every sync of the log takes `amount` seconds. It counts when one did."""
    node = (await faults.hit(action))[0]
    if not node.up:
        return faults.skip(action, f"node {node.id} is down")
    delay = f"inject=fdatasync:delay_enter={int(action.amount * 1e6)}"
    file = node.serve.directory / "log" / "data.mdb"
    trace = faults.machines.work / f"strace-{len(faults.bands)}.log"
    options = ["-e", "trace=fdatasync", "-P", str(file), "-e", delay]
    with faults.band(action, names([node])) as band:
        strace = Strace(trace, options, children=True)
        async with traced(faults, strace, node.serve.process):
            await asyncio.sleep(action.seconds)
        with contextlib.suppress(OSError):
            band.effective = DELAYED in trace.read_text(encoding="utf-8", errors="replace")


async def small_disk(faults: Faults, action: Action) -> None:
    """`amount` bytes are left, and clients fill them. It counts when somebody was told of it, or
    the node has ended of it."""
    node = faults.nodes.small
    if not node.wanted:
        return faults.skip(action, f"node {node.id} is no member now")
    path, counts = node.serve.cwd / "db", faults.workload.records.counts

    async def ended_or_answers() -> bool:
        return not node.up or node.id in await faults.nodes.statuses()

    with faults.band(action, f"{names([node])}, {action.amount:.0f} bytes left") as band:
        refused, boots = counts["507"], node.boots
        with node.excuse((STORAGE_IO,), "its disk is full"):
            async with asyncio.TaskGroup() as clients:  # they wait long without a majority
                with filled(path, int(action.amount)):
                    clients.create_task(fill(faults, action))
                    await asyncio.sleep(action.seconds)
            await holds_within(ended_or_answers, FAIL_STOP_S)  # of what failed while it was full
            node.failing = 0
        of_it = [life for life in node.book.lives[max(0, boots - 1) :] if life.code == STORAGE_IO]
        band.effective = counts["507"] > refused or bool(of_it)


async def fill(faults: Faults, action: Action) -> None:
    for number in range(FILLING):
        node_id = random.Random(action.dice + number).choice(faults.nodes.wanted()).id
        key = f"s/fill-{action.dice}-{number}"
        await faults.workload.collect(node_id, key, f"{key} ".ljust(FILLING_BYTES, "x"))


async def spoil_files(faults: Faults, action: Action) -> None:
    """Flip `amount` bits of the same file on each of a minority, or cut it short; then wait until
    all is well. It counts when a node has met that, which may be much later."""
    faults.look_back()
    hit, rng = await faults.damageable(action), random.Random(action.dice)
    if not hit:
        return faults.skip(action, "more than a minority would be damaged")
    part = action.name.partition(" in ")[2]
    for node in hit:
        node.spoilt_at = len(node.serve.output())
    said = {node.id: node.spoilt_at for node in hit}

    def since(node: Node) -> str:
        return node.serve.output()[said[node.id] :]

    def noticed() -> bool:
        newest = [node for node in hit if node.spoilt_at == said[node.id]]
        return any(NOTICED.search(since(node)) for node in newest)

    async def checked() -> bool:
        return all(CHECKED.search(since(node)) for node in hit)

    with faults.band(action, names(hit)) as band, contextlib.ExitStack() as stack:
        band.noticed = noticed
        for node in hit:
            stack.enter_context(node.excuse(DAMAGES, action.name))
        with contextlib.ExitStack() as down:
            for node in hit:
                down.enter_context(node.down())
            await asyncio.sleep(action.seconds)
            for node in hit:
                damage(faults, node, part, action, rng)
        sound = part != "state" or await faults.nodes.wait(
            checked, "the states to be read through", READY_S
        )
        await faults.nodes.wait(faults.nodes.whole, f"repairs after {action.name}", READY_S)
        for node in hit if not sound else ():
            faults.budget.spoil(node.id, lambda: False)


def damage(faults: Faults, node: Node, part: str, action: Action, rng: random.Random) -> None:
    """Spoil the file of one node, and mark it until that is repaired. One whose state it is comes
    back only when that was read through, and nothing else is damaged meanwhile."""
    file = file_of(node.serve.directory, part)
    if file is None:
        return
    spoilt, spoil = ("bits flipped", flip) if action.amount else ("files cut short", cut_short)
    for _ in range(round(action.amount) or 1):
        faults.counts[spoilt] += 1
        faults.say(f"node {node.id}: {spoil(file, rng)}")
    if part == "log":
        faults.budget.spoil(node.id, begun_anew(node, action.name))
    elif part == "snapshot":
        faults.budget.spoil(node.id, lambda: not file.exists())


def begun_anew(node: Node, why: str) -> Callable[[], bool]:
    """Tells whether a damaged log has been replaced by another one. It is read when somebody needs
    it, perhaps much later; until then the node may end of it at any time."""
    before, reason = node.incarnation(), node.book.may_end(DAMAGES, why, time.monotonic())

    def repaired() -> bool:
        if node.incarnation() in ("", before):
            return False
        reason.until = min(reason.until, time.monotonic())
        return True

    return repaired


FAULTS = {
    "EIO": eio,
    "ENOSPC": enospc,
    "slow sync": slow_sync,
    "small disk": small_disk,
    "flip in log": spoil_files,
    "flip in state": spoil_files,
    "flip in snapshot": spoil_files,
    "cut short in log": spoil_files,
    "cut short in state": spoil_files,
    "cut short in snapshot": spoil_files,
}
