"""One run: a cluster, clients, faults; then all is healed, and the judges look at what is left."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import shutil
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from dengine.errors import FatalError
from dengine.storage.state_reader import StateReader
from tests.nemesis import verdicts
from tests.nemesis.client import Unanswered, call
from tests.nemesis.damage import file_of
from tests.nemesis.faults import STOP_S, Band, Faults
from tests.nemesis.links import Links
from tests.nemesis.machines import Machines
from tests.nemesis.nodes import READY_S, Node, Nodes
from tests.nemesis.plan import Plan
from tests.nemesis.workload import LEVELS, Workload

# Bounds that tell a cluster that does not recover from one on a busy machine: a quiet one takes a
# twentieth of them.
LEADER_S = 30.0
OPERATORS_S = 120.0
LEVEL_S = 60.0
ANSWER_S = 20.0
CALM_S = 2.0  # of load without faults, before the end
OVERHEAD_S = 600.0  # everything but the faults, at its very worst


@dataclass
class Outcome:
    """What a run has come to. Times are seconds since its clients began."""

    plan: Plan
    problems: list[str] = field(default_factory=list)
    exits: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)  # what this machine does not have
    bands: list[Band] = field(default_factory=list)
    acknowledged_at: list[float] = field(default_factory=list)
    read_at: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # answers, by status
    faults: dict[str, int] = field(default_factory=dict)
    operations: int = 0
    load_s: float = 0.0
    leader_after_s: float = 0.0  # from the last fault to a leader that everybody names
    boots: int = 0
    memory_bytes: int = 0
    descriptors: int = 0

    @property
    def longest_gap_s(self) -> float:
        """The longest time without an acknowledged write."""
        times = [0.0, *self.acknowledged_at, self.load_s]
        return max(b - a for a, b in itertools.pairwise(sorted(times)))


def run(plan: Plan, work: Path, say: Callable[[str], None]) -> Outcome:
    """Carry out a plan. Needs root; leaves nothing but, after a failure, the directory `work`."""
    with Machines([*plan.ids, *plan.spares], work, proxied=plan.proxied) as machines:
        machines.keep = True  # until it is known that nobody needs to look at it
        outcome = asyncio.run(_Trial(plan, machines, say).run())
        machines.keep = bool(outcome.problems)
    if outcome.problems:  # under a name that nothing cleans up
        kept = work.parent / f"failed-{plan.seed}"
        shutil.rmtree(kept, ignore_errors=True)
        work.rename(kept)
    return outcome


class _Trial:
    def __init__(self, plan: Plan, machines: Machines, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._machines = machines
        self._began = time.monotonic()
        self._say = lambda text: say(f"{time.monotonic() - self._began:7.2f}  {text}")
        self.nodes = Nodes(plan, machines, self._say)
        self.workload = Workload(
            plan.seed,
            lambda: [node.id for node in self.nodes.wanted()],
            lambda node_id: self.nodes.all[node_id].boots,
            lambda node_id: +self.nodes.all[node_id].excused != {},
        )
        self.outcome = Outcome(plan)

    async def run(self) -> Outcome:
        problems = self.nodes.problems
        supervisor = asyncio.create_task(self.nodes.supervise())
        try:
            async with asyncio.timeout(self._plan.seconds * 5 + OVERHEAD_S), self._links() as links:
                faults = Faults(self._machines, self.nodes, links, self.workload, self._say)
                try:
                    await _unless_it_ends(supervisor, self._whole_life(faults))
                finally:
                    await self.workload.stop(0.0)
                    await faults.cancel()
                    self._report(faults)
        except TimeoutError:
            problems.append("the run did not end in time")
        finally:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
            for node in self.nodes.all.values():
                if node.up:
                    node.serve.kill()
        self.outcome.problems = [*problems, *self.nodes.complaints()]
        return self.outcome

    @contextlib.asynccontextmanager
    async def _links(self) -> AsyncIterator[Links | None]:
        if not self._plan.proxied:
            yield None
            return
        rng = random.Random(f"nemesis {self._plan.seed} links")
        async with Links(self._machines, rng) as links:
            yield links

    async def _whole_life(self, faults: Faults) -> None:
        for node_id in self._plan.founders:
            self.nodes.all[node_id].wanted = True
        if not await self.nodes.wait(self.nodes.whole, "the cluster to begin", READY_S):
            return
        self._began = time.monotonic()
        self.workload.start()
        await self._schedule(faults)
        if await self._healed(faults):
            await self._look_at_the_end()

    async def _schedule(self, faults: Faults) -> None:
        for number, step in enumerate(self._plan.steps):
            if number == self._plan.grows_at and self._plan.joiners:
                faults.grow(self._plan.joiners)
            await faults.carry_out(step.actions)
            if step is not self._plan.steps[-1]:
                await asyncio.sleep(step.rest_s)
        if self._plan.grows_at >= len(self._plan.steps) and self._plan.joiners:
            faults.grow(self._plan.joiners)

    async def _healed(self, faults: Faults) -> bool:
        """All faults are over: the cluster has to find back by itself, in time."""
        nodes, healed_at = self.nodes, time.monotonic()
        self._say("healed")
        if not await nodes.wait(nodes.one_leader, "a leader that everybody names", LEADER_S):
            return False
        self.outcome.leader_after_s = time.monotonic() - healed_at
        if not await faults.finish(OPERATORS_S):
            nodes.problems.append(f"an operator was not done {OPERATORS_S:.0f} s after healing")
            return False
        if not await nodes.wait(nodes.whole, "every node to be ready and to vote", READY_S):
            return False
        await asyncio.sleep(CALM_S)
        if not await self.workload.stop(ANSWER_S):
            nodes.problems.append(f"a request was not answered {ANSWER_S:.0f} s after healing")
        self.outcome.load_s = time.monotonic() - self._began
        return await nodes.wait(nodes.level, "all nodes to have applied the same", LEVEL_S)

    async def _look_at_the_end(self) -> None:
        nodes, records = self.nodes, self.workload.records
        for node in nodes.wanted():
            await self._last_requests(node)
        await nodes.wait(nodes.level, "all nodes to have applied the same", LEVEL_S)
        held = {node.id: await self._items(node.id, "s/") for node in nodes.wanted()}
        counters, registers, lists = [
            await self._items(nodes.wanted()[0].id, prefix) for prefix in ("c/", "r/", "l/")
        ]
        everything = counters | registers | lists | next(iter(held.values()))
        await self._stop()
        nodes.problems += [
            *records.surprises[: verdicts.SHOWN_MAX],
            *verdicts.linearizable(records),
            *verdicts.refused_stays_undone(records, everything),
            *verdicts.eventual_reads(records),
            *verdicts.nothing_lost(records, held),
            *verdicts.counted(records, counters),
            *verdicts.lists_whole(records, lists),
        ]

    async def _last_requests(self, node: Node) -> None:
        """Every node takes a write, and reads everything for the history."""

        async def written() -> bool:
            return await self.workload.collect(node.id, f"s/last-{node.id}", f"last {node.id}")

        async def read() -> bool:
            return await self.workload.read_all(node.id)

        await self.nodes.wait(written, f"a write through node {node.id}", ANSWER_S)
        await self.nodes.wait(read, f"reads through node {node.id}", ANSWER_S)

    async def _items(self, node_id: int, prefix: str) -> dict[str, str]:
        """All keys under `prefix` as this node's own state holds them."""
        found: dict[str, str] = {}
        after = ""
        query = f"/v1/kv?prefix={quote(prefix, safe='')}&limit=1000&consistency={LEVELS[2]}"
        while True:
            try:
                page = await call(node_id, "GET", query + after, timeout_s=ANSWER_S)
            except Unanswered as error:
                self.nodes.problems.append(f"node {node_id} does not list {prefix}: {error}")
                return found
            found.update((item["key"], item["value"]) for item in page["items"])
            if page["next"] is None:
                return found
            after = "&after=" + quote(page["next"], safe="")

    async def _stop(self) -> None:
        """Stop all nodes at once, and compare what they have on disk."""
        stopped = self.nodes.wanted()
        for node in stopped:
            node.wanted = False
            node.serve.signal(signal.SIGTERM)

        async def ended() -> bool:
            return not any(node.up for node in stopped)

        await self.nodes.wait(ended, "all nodes to stop", STOP_S)
        hashes = {}
        for node in stopped:
            if not node.up:
                self.nodes.asked_to_end(node)
                hashes[node.id] = self._state_of(node)
        if len(set(hashes.values())) > 1:
            self.nodes.problems.append(f"the nodes hold different states: {hashes}")

    def _state_of(self, node: Node) -> str:
        """Revision and hash of a state, which is read through."""
        file = file_of(node.serve.directory, "state")
        try:
            with StateReader(file.parent) as state:
                state.check()
                return f"{state.digest.state_hash.hex()} at revision {state.digest.revision}"
        except FatalError as error:
            return error.message

    def _report(self, faults: Faults) -> None:
        outcome, records, began = self.outcome, self.workload.records, self._began
        outcome.exits, outcome.lacking = self.nodes.exits, self.nodes.lacking
        outcome.bands = [
            Band(band.began - began, band.text, (band.ended or time.monotonic()) - began)
            for band in faults.bands
        ]
        outcome.acknowledged_at = [at - began for at in records.acknowledged_at]
        outcome.read_at = [at - began for at in records.read_at]
        outcome.counts = dict(sorted(records.counts.items()))
        outcome.faults = dict(sorted(faults.counts.items()))
        outcome.operations = records.operations
        outcome.load_s = outcome.load_s or time.monotonic() - began
        nodes = self.nodes.all.values()
        outcome.boots = sum(node.boots for node in nodes)
        outcome.memory_bytes = max(node.memory_bytes for node in nodes)
        outcome.descriptors = max(node.descriptors for node in nodes)


async def _unless_it_ends(other: asyncio.Task[None], life: Awaitable[None]) -> None:
    """Await `life`; when `other` ends first, that is what went wrong."""
    living = asyncio.ensure_future(life)
    try:
        await asyncio.wait({other, living}, return_when=asyncio.FIRST_COMPLETED)
        if other.done():
            other.result()
        await living
    finally:
        living.cancel()
        await asyncio.gather(living, return_exceptions=True)
