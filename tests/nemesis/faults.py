"""The nemesis of one run: which faults come, whom they hit, and what became of each.

A fault is a coroutine in on_processes.py, on_links.py, on_disks.py or by_operators.py: it does its
harm, lasts, and undoes what can be undone, also when it is cancelled. Whom it hits is settled when
it comes, from the role and the dice of its action.

That a fault was drawn says little: the node may have been down, the link idle, the file not
written. So each also finds out whether it had an effect, and only then it counts as one.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tests.nemesis.budget import Budget
from tests.nemesis.links import Links
from tests.nemesis.machines import Machines, Pair
from tests.nemesis.nodes import READY_S, Node, Nodes
from tests.nemesis.plan import KINDS, Action
from tests.nemesis.workload import Workload

OPERATION_S = 120.0  # for an operator who tries again and again, while faults go on


@dataclass
class Band:
    """What was done when, for the report. Times are time.monotonic()."""

    kind: str
    whom: str
    began: float
    ended: float = 0.0
    effective: bool = False
    noticed: Callable[[], bool] | None = None  # asked later for an effect that may come late

    @property
    def text(self) -> str:
        return f"{self.kind}: {self.whom}"


@dataclass
class Faults:
    """The nemesis of one run.

    Args:
        how: what carries out each kind of fault.

    Attributes:
        drawn: kinds that came, whatever became of them.
        bands: what was done, each with its effect.
        counts: what was seen besides, such as flipped bits.
        budget: of damage for good.
    """

    machines: Machines
    nodes: Nodes
    links: Links | None
    workload: Workload
    say: Callable[[str], None]
    how: Mapping[str, How]
    drawn: Counter[str] = field(default_factory=Counter)
    bands: list[Band] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    budget: Budget = field(default_factory=Budget)
    operating: asyncio.Lock = field(default_factory=asyncio.Lock)
    _operations: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.nodes.wiped = self.budget.forget
        self.nodes.watching = self.budget.damaged  # so that a repair is noted when it comes

    async def carry_out(self, actions: Sequence[Action]) -> None:
        """All of them at once, until the last one is over."""
        async with asyncio.TaskGroup() as group:
            for action in actions:
                group.create_task(self._carry_out(action))

    async def _carry_out(self, action: Action) -> None:
        kind = KINDS[action.name]
        self.drawn[action.name] += 1
        if kind.alone and not await self._settled():
            return
        voters = len(self.nodes.voters)
        if voters < kind.nodes:
            return self.skip(action, f"it takes {kind.nodes} voters and there are {voters}")
        await self.how[action.name](self, action)

    def skip(self, action: Action, why: str) -> None:
        """It was drawn, and nothing is done."""
        self.say(f"{action.name}: skipped, {why}")

    def look_back(self) -> None:
        """Has damage of before been met by now? Before a node is damaged again, and in the end."""
        for band in self.bands:
            if band.noticed is not None:
                band.effective |= band.noticed()

    @property
    def effective(self) -> Counter[str]:
        """Kinds of the faults that had an effect."""
        return Counter(band.kind for band in self.bands if band.effective)

    async def _settled(self) -> bool:
        """What an operator began is done, and the cluster is whole."""
        if self._operations:
            await asyncio.wait(self._operations, timeout=OPERATION_S)
        return await self.nodes.wait(self.nodes.whole, "a whole cluster", READY_S)

    def operate(self, work: Awaitable[None]) -> None:
        """Something that goes on during later faults."""
        self._operations.add(asyncio.ensure_future(work))

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

    @contextlib.contextmanager
    def band(self, action: Action, whom: str) -> Iterator[Band]:
        """The time of a fault. Who opens it says in it whether there was an effect."""
        self.say(f"{action.name}: {whom} for {action.seconds:.1f} s")
        with self.open_band(action.name, whom) as band:
            yield band

    @contextlib.contextmanager
    def open_band(self, kind: str, whom: str) -> Iterator[Band]:
        band = Band(kind, whom, time.monotonic())
        self.bands.append(band)
        try:
            yield band
        finally:
            band.ended = time.monotonic()
            if not band.effective and band.noticed is None:
                self.say(f"{band.text}: without effect")

    # --- Whom it hits.

    async def hit(self, action: Action) -> list[Node]:
        voting = [node for node in self.nodes.wanted() if node.id in self.nodes.voters]
        rng = random.Random(action.dice)
        rng.shuffle(voting)
        count = len(voting)
        sizes = {"minority": max(1, (count - 1) // 2), "majority": count // 2 + 1, "all": count}
        if "leader" in action.whom:
            leader = await self.nodes.leader()
            voting.sort(key=lambda node: node.id != leader)
        return voting[: sizes.get(action.whom.removeprefix("leader's "), 1)]

    async def damageable(self, action: Action) -> list[Node]:
        """Those that it hits and whose damage the budget still allows."""
        hit = {node.id: node for node in await self.hit(action)}
        damaged = sorted(self.budget.damaged() & self.nodes.voters)
        # Who is damaged already comes first: then even a used budget leaves something to do.
        wished = [*damaged, *hit]
        allowed = self.budget.targets(self.nodes.voters, list(dict.fromkeys(wished)))
        every = {node.id: node for node in self.nodes.wanted()}
        return [every[node_id] for node_id in allowed if node_id in every][: len(hit)]

    async def pairs(self, action: Action) -> list[Pair]:
        """Directed pairs: (who sends, who receives)."""
        ids = [node.id for node in self.nodes.wanted()]
        everyone = [(i, j) for i in ids for j in ids if i != j]
        first = (await self.hit(action))[0].id
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


How = Callable[[Faults, Action], Awaitable[None]]


def names(hit: Sequence[Node]) -> str:
    return "node " + ", ".join(str(node.id) for node in sorted(hit, key=lambda node: node.id))


def arrows(pairs: Iterable[Pair]) -> str:
    return ", ".join(f"{i}>{j}" for i, j in pairs)


def across(some: Sequence[int], others: Sequence[int]) -> list[Pair]:
    """Every pair with one end here and the other there, in both directions."""
    return [pair for i in some for j in others for pair in ((i, j), (j, i))]
