"""What each kind of fault does to a running cluster, and takes back.

A fault is a coroutine: it does its harm, lasts, and undoes what can be undone, also when it is
cancelled. Whom it hits is settled when it comes, from the role and the dice of its action.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash_sweep.strace import Fault, Injection, Strace, process_of
from tests.nemesis.client import Connection, Unanswered, call
from tests.nemesis.damage import file_of, flip
from tests.nemesis.disks import filled
from tests.nemesis.links import Link, Links
from tests.nemesis.machines import Machines, Pair
from tests.nemesis.nodes import READY_S, Node, Nodes, holds_within
from tests.nemesis.plan import KINDS, Action
from tests.nemesis.workload import Workload

STORAGE_IO, REMOVED = 74, 76
# What a damaged file may do to who reads it; a start after that knows (see ARCHITECTURE.md).
DAMAGED = (65, STORAGE_IO, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)
STOP_S = 40.0  # with a leader to hand over to, and perhaps paused meanwhile
# What a node says when it has read all of its state, or has built another one.
CHECKED = re.compile(r"the state was read through|snapshot up to entry|rebuilt from|rebuilding")
OPERATION_S = 120.0  # for an operator who tries again and again, while faults go on
FAIL_STOP_S = 15.0  # from an error of the disk under the log to the end of the process
IDLE_CONNECTIONS = 12
FILLING = 6  # values that fill a small disk
FILLING_BYTES = 60_000


@dataclass
class Band:
    """What was done when, for the report. Times are time.monotonic()."""

    began: float
    text: str
    ended: float = 0.0


@dataclass
class Faults:
    """The nemesis of one run.

    Attributes:
        bands: every fault so far.
        counts: kinds that were done, and effects that were seen.
    """

    machines: Machines
    nodes: Nodes
    links: Links | None
    workload: Workload
    say: Callable[[str], None]
    bands: list[Band] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    _operations: set[asyncio.Task[None]] = field(default_factory=set)
    _operating: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def carry_out(self, actions: Sequence[Action]) -> None:
        """All of them at once, until the last one is over."""
        async with asyncio.TaskGroup() as group:
            for action in actions:
                group.create_task(self._carry_out(action))

    async def _carry_out(self, action: Action) -> None:
        kind = KINDS[action.name]
        voters = len(self.nodes.voters)
        if kind.alone and not await self._settled():
            return
        if voters < kind.nodes:
            self.say(f"{action.name}: skipped, it takes {kind.nodes} voters and there are {voters}")
            return
        self.counts[action.name] += 1
        name = action.name.partition(" in ")[0].replace(" ", "_").replace("-", "_")
        await getattr(self, f"_{name.lower()}")(action)

    async def _settled(self) -> bool:
        """What an operator began is done, and the cluster is whole."""
        if self._operations:
            await asyncio.wait(self._operations, timeout=OPERATION_S)
        return await self.nodes.wait(self.nodes.whole, "a whole cluster", READY_S)

    async def finish(self, deadline_s: float) -> bool:
        """Wait until what operators have begun is done; what they could not do is an error."""
        if not self._operations:
            return True
        done, late = await asyncio.wait(self._operations, timeout=deadline_s)
        for task in done:
            task.result()
        return not late

    async def cancel(self) -> None:
        for task in self._operations:
            task.cancel()
        await asyncio.gather(*self._operations, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def _band(self, action: Action, whom: str) -> AsyncIterator[None]:
        band = Band(time.monotonic(), f"{action.name}: {whom}")
        self.bands.append(band)
        self.say(f"{action.name}: {whom} for {action.seconds:.1f} s")
        try:
            yield
        finally:
            band.ended = time.monotonic()

    # --- Whom it hits.

    async def _hit(self, action: Action) -> list[Node]:
        voting = [node for node in self.nodes.wanted() if node.id in self.nodes.voters]
        rng = random.Random(action.dice)
        rng.shuffle(voting)
        count = len(voting)
        sizes = {"minority": max(1, (count - 1) // 2), "majority": count // 2 + 1, "all": count}
        if "leader" in action.whom:
            leader = await self.nodes.leader()
            voting.sort(key=lambda node: node.id != leader)
        return voting[: sizes.get(action.whom.removeprefix("leader's "), 1)]

    async def _pairs(self, action: Action) -> list[Pair]:
        """Directed pairs: (who sends, who receives)."""
        ids = [node.id for node in self.nodes.wanted()]
        everyone = [(i, j) for i in ids for j in ids if i != j]
        first = (await self._hit(action))[0].id
        rng = random.Random(action.dice)
        others = [other for other in ids if other != first]
        rng.shuffle(others)
        some = others[: rng.randint(1, len(others))]
        match action.whom:
            case "from leader":
                return [(first, other) for other in some]
            case "to leader":
                return [(other, first) for other in some]
            case "leader":
                return [pair for other in some for pair in ((first, other), (other, first))]
            case "pair":
                return [(first, others[0])]
            case _:
                return everyone

    # --- Processes.

    async def _kill(self, action: Action) -> None:
        hit = await self._hit(action)
        async with self._band(action, names(hit)):
            with contextlib.ExitStack() as stack:
                for node in hit:
                    stack.enter_context(node.down())
                await asyncio.sleep(action.seconds)

    async def _restart(self, action: Action) -> None:
        """As an operator does it: SIGTERM, and a start when it has ended well."""
        answering = await self.nodes.statuses()  # one that has just begun dies of the signal
        hit = [node for node in await self._hit(action) if node.id in answering]

        async def ended() -> bool:
            return not any(node.up for node in hit)

        async with self._band(action, names(hit)):
            with contextlib.ExitStack() as stack:
                for node in hit:
                    node.serve.signal(signal.SIGTERM)
                    stack.enter_context(node.kept_down())
                if not await self.nodes.wait(ended, f"{names(hit)} to stop", STOP_S):
                    return
                for node in hit:
                    self.nodes.asked_to_end(node)
                await asyncio.sleep(action.seconds)

    async def _pause(self, action: Action) -> None:
        hit = [node for node in await self._hit(action) if node.up]
        if not hit:
            return
        processes = [node.serve.process for node in hit]
        async with self._band(action, names(hit)):
            try:
                for process in processes:
                    process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(action.seconds)
            finally:
                for process in processes:
                    process.send_signal(signal.SIGCONT)

    async def _few_descriptors(self, action: Action) -> None:
        """So few that neither peers nor clients get a connection that they do not have already."""
        node = (await self._hit(action))[0]
        idle = [Connection(node.id) for _ in range(IDLE_CONNECTIONS)]
        async with self._band(action, names([node])):
            with contextlib.suppress(OSError):
                pid = node.serve.pid
                soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
                limit = len(os.listdir(f"/proc/{pid}/fd")) + int(action.amount)
                try:
                    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))
                    asked = [c.call("GET", "/livez", timeout_s=action.seconds) for c in idle]
                    await asyncio.gather(*asked, return_exceptions=True)
                    await asyncio.sleep(action.seconds)
                finally:
                    for connection in idle:
                        connection.close()
                    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))

    # --- The network.

    async def _cut_for(self, action: Action, pairs: Iterable[Pair], whom: str) -> None:
        async with self._band(action, whom):
            with self.machines.cut(pairs):
                await asyncio.sleep(action.seconds)

    async def _one_way_cut(self, action: Action) -> None:
        pairs = await self._pairs(action)
        await self._cut_for(action, pairs, arrows(pairs))

    async def _two_way_cut(self, action: Action) -> None:
        pairs = await self._pairs(action)
        both = {*pairs, *((j, i) for i, j in pairs)}
        await self._cut_for(action, both, arrows(sorted(both)))

    async def _bridge(self, action: Action) -> None:
        """Two halves that only one node reaches both of."""
        bridge = (await self._hit(action))[0].id
        others = [node.id for node in self.nodes.wanted() if node.id != bridge]
        random.Random(action.dice).shuffle(others)
        half = others[: len(others) // 2]
        whom = f"{half} and {others[len(half) :]} over node {bridge} only"
        await self._cut_for(action, across(half, others[len(half) :]), whom)

    async def _isolate(self, action: Action) -> None:
        inside = [node.id for node in await self._hit(action)]
        outside = [node.id for node in self.nodes.wanted() if node.id not in inside]
        await self._cut_for(action, across(inside, outside), f"{inside} from {outside}")

    async def _isolate_majority(self, action: Action) -> None:
        """Each of a majority is on its own: nobody can decide anything."""
        voting = sorted(self.nodes.voters)
        leader = await self.nodes.leader()
        voting.sort(key=lambda i: (i != leader) == (action.whom == "with leader"))
        alone = voting[: len(voting) // 2 + 1]
        everyone = [node.id for node in self.nodes.wanted()]
        pairs = {pair for i in alone for pair in across([i], [j for j in everyone if j != i])}
        await self._cut_for(action, pairs, f"each of {alone} from everybody")

    @contextlib.asynccontextmanager
    async def _on_links(self, action: Action) -> AsyncIterator[list[Link]]:
        assert self.links is not None, "a plan without proxies has no such fault"
        pairs = await self._pairs(action)
        amount = f" ({action.amount:.0f})" if action.amount else ""
        async with self._band(action, arrows(pairs) + amount):
            yield [self.links.between(*pair) for pair in pairs]

    async def _slow_links(self, action: Action) -> None:
        """`amount` ms more in each direction, and up to as much again as jitter."""
        async with self._on_links(action) as links:
            for link in links:
                link.delay_ms = action.amount
            await asyncio.sleep(action.seconds)
            for link in links:
                link.delay_ms = 0.0

    async def _narrow_links(self, action: Action) -> None:
        """`amount` bytes per second."""
        async with self._on_links(action) as links:
            for link in links:
                link.bytes_per_s = action.amount
            await asyncio.sleep(action.seconds)
            for link in links:
                link.bytes_per_s = 0.0

    async def _stuck_links(self, action: Action) -> None:
        """Nothing arrives, and the sender's kernel thinks it does: no reset, no lost segment."""
        async with self._on_links(action) as links:
            for link in links:
                link.open.clear()
            await asyncio.sleep(action.seconds)
            for link in links:
                link.open.set()

    # --- Disks.

    async def _eio(self, action: Action) -> None:
        await self._failing_disk(action, Fault.EIO, "fdatasync,fsync,pwrite64,pwritev")

    async def _enospc(self, action: Action) -> None:
        await self._failing_disk(action, Fault.ENOSPC, "pwrite64,pwritev")

    async def _failing_disk(self, action: Action, fault: Fault, syscalls: str) -> None:
        """A write of the log or of the state fails. Under the log that has to be the end of the
        process: what a failed sync has left behind, nobody knows."""
        node = (await self._hit(action))[0]
        if not node.up:
            return
        process, part = node.serve.process, ("log", "state")[action.dice % 2]
        with contextlib.suppress(OSError):  # between two states there may be no file
            file = file_of(node.serve.directory, part)
        trace = self.machines.work / f"strace-{len(self.bands)}.log"
        injection = Injection(trace, syscalls, [file], fault, 1, children=True)

        async def happened() -> bool:
            return process.poll() is not None or bool(injection.seen(process.pid))

        async def ended() -> bool:
            return process.poll() is not None

        async with self._band(action, f"{names([node])}, {part}"):
            with node.excuse(STORAGE_IO):
                async with self._traced(injection, process.pid):
                    hit = await holds_within(happened, action.seconds)
                    if fault is Fault.ENOSPC and hit:
                        await asyncio.sleep(action.seconds)
                    thread = injection.seen(process.pid)
                self.counts[f"{action.name} seen"] += bool(thread)
                if thread and process_of(thread) in (0, process.pid):
                    await self.nodes.wait(
                        ended,
                        f"node {node.id} to end after {action.name} under its {part}",
                        FAIL_STOP_S,
                    )

    @contextlib.asynccontextmanager
    async def _traced(self, strace: Strace, pid: int) -> AsyncIterator[None]:
        await asyncio.to_thread(strace.attach, pid)
        try:
            yield
        finally:
            strace.detach(pid)

    async def _slow_sync(self, action: Action) -> None:
        """Every sync of the log takes `amount` seconds."""
        node = (await self._hit(action))[0]
        if not node.up:
            return
        delay = f"inject=fdatasync:delay_enter={int(action.amount * 1e6)}"
        file = node.serve.directory / "log" / "data.mdb"
        trace = self.machines.work / f"strace-{len(self.bands)}.log"
        options = ["-e", "trace=fdatasync", "-P", str(file), "-e", delay]
        async with self._band(action, names([node])):
            strace = Strace(trace, options, children=True)
            async with self._traced(strace, node.serve.pid):
                await asyncio.sleep(action.seconds)

    async def _small_disk(self, action: Action) -> None:
        """`amount` bytes are left, and clients fill them."""
        node = self.nodes.small
        if not node.wanted:
            self.say(f"small disk: skipped, node {node.id} is no member now")
            return
        path = node.serve.cwd / "db"
        async with self._band(action, f"{names([node])}, {action.amount:.0f} bytes left"):
            with node.excuse(STORAGE_IO):
                with filled(path, int(action.amount)):
                    await self._fill(action)
                    await asyncio.sleep(action.seconds)
                node.failing = 0

    async def _fill(self, action: Action) -> None:
        for number in range(FILLING):
            node_id = random.Random(action.dice + number).choice(self.nodes.wanted()).id
            key = f"s/fill-{action.dice}-{number}"
            await self.workload.collect(node_id, key, f"{key} ".ljust(FILLING_BYTES, "x"))

    async def _flip(self, action: Action) -> None:
        """`amount` bits of the same file on each of a minority; then wait until all is well."""
        hit, rng = await self._hit(action), random.Random(action.dice)
        part = action.name.partition(" in ")[2]
        said = {node.id: len(node.serve.output()) for node in hit}

        async def checked() -> bool:
            return all(CHECKED.search(node.serve.output()[said[node.id] :]) for node in hit)

        if part == "log":  # of which parts are read when somebody needs them, perhaps much later
            for node in hit:
                node.excused.update(DAMAGED)
        async with self._band(action, names(hit)):
            with contextlib.ExitStack() as stack:
                for node in hit:
                    stack.enter_context(node.excuse(*DAMAGED))
                with contextlib.ExitStack() as down:
                    for node in hit:
                        down.enter_context(node.down())
                    await asyncio.sleep(action.seconds)
                    for node in hit:
                        self._flip_bits(node, file_of(node.serve.directory, part), action, rng)
                if part == "state":
                    await self.nodes.wait(checked, "the states to be read through", READY_S)
                await self.nodes.wait(self.nodes.whole, f"repairs after {action.name}", READY_S)

    def _flip_bits(self, node: Node, file: Path | None, action: Action, rng: random.Random) -> None:
        for _ in range(round(action.amount) if file is not None else 0):
            self.counts["bits flipped"] += 1
            self.say(f"node {node.id}: {flip(file, rng)}")

    # --- Operators.

    async def _transfer(self, action: Action) -> None:
        target = (await self._hit(action))[0].id
        asked = random.Random(action.dice).choice(self.nodes.wanted()).id
        async with self._band(action, f"to node {target}, by node {asked}"):
            with contextlib.suppress(Unanswered):
                await call(asked, "POST", "/v1/cluster/leader", {"id": target})
                self.counts["transferred"] += 1

    def grow(self, joiners: Sequence[int]) -> None:
        """These nodes are started with empty directories, and will vote."""

        async def growing() -> None:
            async with self._operating:
                self.say(f"nodes {list(joiners)} join")
                now = time.monotonic()
                self.bands.append(Band(now, f"join: {list(joiners)}", now))
                for node_id in joiners:
                    self.nodes.all[node_id].wanted = True
                self.nodes.voters |= set(joiners)

        self._operate(growing())

    async def _replace(self, action: Action) -> None:
        """A node is removed for good and a new one joins. Faults go on meanwhile."""
        self._operate(self._replaced(action))

    async def _replaced(self, action: Action) -> None:
        async with self._operating:
            if not self.nodes.spares:
                self.say("replace: skipped, no id is left")
                return
            old, new = (await self._hit(action))[0], self.nodes.all[self.nodes.spares.pop(0)]
            async with self._band(action, f"node {old.id} by node {new.id}"):
                with old.excuse(REMOVED):
                    removed = await self.nodes.wait(
                        lambda: self._remove(old.id), f"node {old.id} to be removed", OPERATION_S
                    )
                    if not removed:
                        return
                    old.wanted = False
                    self.nodes.voters.discard(old.id)

                async def gone() -> bool:
                    return not old.up

                await holds_within(gone, action.seconds)
                if old.up:  # one that is cut off never hears of it
                    old.serve.kill()
                self.nodes.voters.add(new.id)
                new.wanted = True

    async def _remove(self, node_id: int) -> bool:
        """One try through every node in turn."""
        for node in self.nodes.wanted():
            with contextlib.suppress(Unanswered):
                await call(node.id, "DELETE", f"/v1/cluster/members/{node_id}", timeout_s=6.0)
                return True
        return False

    async def _wipe_and_join(self, action: Action) -> None:
        """A new disk: the id comes back as another member, in the place of the lost one."""
        node = (await self._hit(action))[0]
        async with self._band(action, names([node])):
            with node.down():
                await asyncio.sleep(action.seconds)
                await asyncio.to_thread(self.nodes.wipe, node)
            await self.nodes.wait(self.nodes.whole, f"node {node.id} to be replaced", READY_S)

    def _operate(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._operations.add(task)


def names(hit: Sequence[Node]) -> str:
    return "node " + ", ".join(str(node.id) for node in sorted(hit, key=lambda node: node.id))


def arrows(pairs: Iterable[Pair]) -> str:
    return ", ".join(f"{i}>{j}" for i, j in pairs)


def across(some: Sequence[int], others: Sequence[int]) -> list[Pair]:
    """Every pair with one end here and the other there, in both directions."""
    return [pair for i in some for j in others for pair in ((i, j), (j, i))]
