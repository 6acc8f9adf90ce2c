"""One run: a cluster, clients, faults; then all is healed, and the judges look at what is left."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from dengine.errors import FatalError
from tests.linearizability.checker import Operation
from tests.nemesis import (
    by_operators,
    histories,
    list_verdicts,
    on_disks,
    on_links,
    on_processes,
    promise_verdicts,
    range_verdicts,
    states,
    verdicts,
)
from tests.nemesis.client import Unanswered, call
from tests.nemesis.faults import Faults
from tests.nemesis.links import Links
from tests.nemesis.machines import Machines, own_tag
from tests.nemesis.nodes import READY_S, Node, Nodes, holds_within
from tests.nemesis.on_processes import STOP_S
from tests.nemesis.outcome import OK, Outcome
from tests.nemesis.plan import Plan
from tests.nemesis.promise_verdicts import LOCK_KEYS, Count
from tests.nemesis.ranges import RANGE_END, RANGED, Look, Range
from tests.nemesis.watchers import behind
from tests.nemesis.workers import COUNTED, SHORT_TTLS_S, TTL_PREFIX, TtlLook
from tests.nemesis.workload import CLIENTS, LEVELS, Workload

# Bounds that tell a cluster that does not recover from one on a busy machine: a quiet one takes a
# twentieth of them.
LEADER_S = 30.0
OPERATORS_S = 120.0
LEVEL_S = 60.0
ANSWER_S = 20.0
CALM_S = 2.0  # of load without faults, before the end
LATE_S = 2.0  # a key goes with its time and a heartbeat; a quiet machine needs no more
STEADY_S = 60.0  # until time has passed with one leader all the while
REST_S = 60.0  # until the nodes have come to rest, which takes five when all is well
OVERHEAD_S = 600.0  # everything but the faults, at its very worst
INTERRUPTED = "somebody interrupted it"
PREFIXES = ("s/", "c/", "r/", "l/", "n/", "g/", TTL_PREFIX, LOCK_KEYS, RANGED)
HOW = {
    **on_processes.FAULTS,
    **on_links.FAULTS,
    **on_disks.FAULTS,
    **by_operators.FAULTS,
}


def longest_s(plan: Plan) -> float:
    """How much time a run has, all in all."""
    return plan.seconds * 5 + OVERHEAD_S


def run(plan: Plan, folder: Path, say: Callable[[str], None]) -> Outcome:
    """Carry out a plan. Needs root. Whatever ends it, nothing is left in the system; what the nodes
    have written is kept in `folder` unless all went well."""
    outcome = Outcome(plan, folder)
    machines = Machines([*plan.ids, *plan.spares], folder / own_tag(), proxied=plan.proxied)
    try:
        with machines:
            machines.keep = True  # until it is known that nobody needs to look at it
            trial = _Trial(plan, machines, say, outcome)
            asyncio.run(trial.run())
            trial.judge()
            machines.keep = outcome.verdict != OK
    except KeyboardInterrupt:
        outcome.broken = INTERRUPTED
    except Exception:
        outcome.problems.append(f"the run broke off:\n{traceback.format_exc()}")
    return outcome


class _Trial:
    def __init__(
        self, plan: Plan, machines: Machines, say: Callable[[str], None], outcome: Outcome
    ) -> None:
        self._plan = plan
        self._machines = machines
        self._began, self._loaded = time.monotonic(), False  # with clients
        self._say = lambda text: say(f"{time.monotonic() - self._began:7.2f}  {text}")
        self.nodes = Nodes(plan, machines, self._say)
        self.workload = Workload(
            plan,
            lambda: [node.id for node in self.nodes.wanted()],
            lambda node_id: self.nodes.all[node_id].boots,
            lambda node_id: self.nodes.all[node_id].damaged_now(),
        )
        self.outcome = outcome
        self._held: dict[int, dict[str, _Item]] = {}  # what each node holds in the end
        self._calm: list[tuple[float, int]] = []  # when it began and ended, and the terms of then

    async def run(self) -> None:
        """The life of a cluster, to its end or until it breaks off; no node runs afterwards."""
        problems = self.nodes.problems
        supervisor = asyncio.create_task(self.nodes.supervise())
        faults: Faults | None = None
        try:
            async with asyncio.timeout(longest_s(self._plan)), self._links() as links:
                faults = Faults(self._machines, self.nodes, links, self.workload, self._say, HOW)
                try:
                    await _unless_it_ends(supervisor, self._whole_life(faults))
                finally:
                    if self._loaded:
                        self.outcome.load_s = self.outcome.load_s or time.monotonic() - self._began
                    async with contextlib.AsyncExitStack() as ending:  # whatever one of them raises
                        ending.push_async_callback(faults.cancel)
                        ending.push_async_callback(self.workload.hang_up)
                        await self.workload.stop(0.0)
        except TimeoutError:
            problems.append("the run did not end in time")
        except asyncio.CancelledError:
            self.outcome.broken = INTERRUPTED
        except Exception:
            problems.append(f"the run broke off:\n{traceback.format_exc()}")
        finally:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
            self.nodes.end_all()
        self._report(faults)

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
        self._began, self._loaded = time.monotonic(), True
        self.workload.start()
        await self._schedule(faults)
        if await self._healed(faults):
            await self._look_at_the_end()

    async def _schedule(self, faults: Faults) -> None:
        for number, step in enumerate(self._plan.steps):
            if number == self._plan.grows_at and self._plan.joiners:
                by_operators.grow(faults, self._plan.joiners)
            await faults.carry_out(step.actions)
            if step is not self._plan.steps[-1]:
                await asyncio.sleep(step.rest_s)
        if self._plan.grows_at >= len(self._plan.steps) and self._plan.joiners:
            by_operators.grow(faults, self._plan.joiners)

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
        await self._note_term()
        await asyncio.sleep(CALM_S)
        if not await self.workload.stop(ANSWER_S):
            nodes.problems.append(f"a request was not answered {ANSWER_S:.0f} s after healing")
        self.outcome.load_s = time.monotonic() - self._began
        return await nodes.wait(nodes.level, "all nodes to have applied the same", LEVEL_S)

    async def _look_at_the_end(self) -> None:
        nodes = self.nodes
        for node in nodes.wanted():
            await self._last_requests(node)
        await nodes.wait(nodes.level, "all nodes to have applied the same", LEVEL_S)
        await self._let_time_pass()
        await self._let_watchers_catch_up()
        rest = await nodes.at_rest(REST_S)
        nodes.problems += nodes.leaks(rest)
        for usage in rest.values():
            self.outcome.rest = self.outcome.rest.most(usage)
        for node in nodes.wanted():
            await self._read_all(node.id)
        await self._compare()
        await self._note_term()
        await self._stop()

    async def _last_requests(self, node: Node) -> None:
        """Every node takes a write, and reads everything for the history."""
        tries = itertools.count()

        async def written() -> bool:
            key = f"s/last-{node.id}-{next(tries)}"  # a key is written once, whatever comes of it
            return await self.workload.collect(node.id, key, key)

        async def read() -> bool:
            return await self.workload.read_all(node.id)

        await self.nodes.wait(written, f"a write through node {node.id}", ANSWER_S)
        await self.nodes.wait(read, f"reads through node {node.id}", ANSWER_S)

    async def _let_time_pass(self) -> None:
        """What goes with its time is gone then: all its time has passed under one leader."""
        if not {"ttl", "lock"} & set(self._plan.workloads):
            return
        nodes, passing = self.nodes, self.workload.records.passing
        heartbeat_ms = int(self._plan.settings["raft.election"]["heartbeat_ms"])
        passing.late_s = LATE_S + heartbeat_ms / 1000
        reign: tuple[int, int] | None = None

        async def passed() -> bool:
            nonlocal reign
            before, reign = reign, await nodes.reign()
            now = time.monotonic()
            if reign is None or reign != before:
                passing.rested_at = now
            return now > passing.rested_at + max(SHORT_TTLS_S) + passing.late_s

        await nodes.wait(passed, "time to pass under one leader", STEADY_S)

    async def _let_watchers_catch_up(self) -> None:
        workload = self.workload
        if not workload.records.watched:
            return
        statuses = await self.nodes.statuses()
        revision = max((status["revision"] for status in statuses.values()), default=0)

        async def told() -> bool:
            return not behind(workload.records.watched, revision)

        await self.nodes.wait(told, f"watchers to be told of revision {revision}", ANSWER_S)
        await workload.hang_up()

    async def _read_all(self, node_id: int) -> None:
        """All keys as this node holds them. Nothing happens meanwhile, so for the history that is a
        read of each key, also of one that is not there."""
        found: dict[str, _Item] = {}
        called = time.monotonic()
        for prefix in PREFIXES:
            if not await self._list(node_id, prefix, found):
                return
        returned = time.monotonic()
        for key, history in self.workload.records.history.items():
            item = found.get(key, NOTHING)
            result = (item.revision, item.value)
            history.append(Operation(CLIENTS + node_id, called, returned, "read", None, result))
        ranged = {key: (i.revision, i.value) for key, i in found.items() if key.startswith(RANGED)}
        look = Look(Range(RANGED, RANGE_END), called, returned, ranged)
        self.workload.records.ranged.looks.append(look)
        passing = self.workload.records.passing
        timed = {key for key in found if key.startswith(TTL_PREFIX)}  # also what was refused
        for key in timed | {put.key for put in passing.puts}:
            passing.looks.append(TtlLook(key, called, returned, found.get(key, NOTHING).value))
        self._held[node_id] = found

    async def _list(self, node_id: int, prefix: str, found: dict[str, _Item]) -> bool:
        after = ""
        query = f"/v1/kv?prefix={quote(prefix, safe='')}&limit=1000&consistency={LEVELS[2]}"
        while True:
            try:
                page = await call(node_id, "GET", query + after, timeout_s=ANSWER_S)
            except Unanswered as error:
                self.nodes.problems.append(f"node {node_id} does not list {prefix}: {error}")
                return False
            for item in page["items"]:
                found[item["key"]] = _Item(item["value"], item["mod_revision"], item["version"])
            if page["next"] is None:
                return True
            after = "&after=" + quote(page["next"], safe="")

    async def _note_term(self) -> None:
        statuses = (await self.nodes.statuses()).values()
        term = max((status["term"] for status in statuses), default=0)
        self._calm.append((time.monotonic(), term))

    async def _compare(self) -> None:
        """The whole of what the nodes hold, leases and remembered results too, while they run: of
        states on disk after a stop each may be at a log time of its own."""
        directories = {node.id: node.serve.directory for node in self.nodes.wanted()}
        found: dict[int, str] = {}

        async def at_one_moment() -> bool:
            found.update(await asyncio.to_thread(states.at_one_moment, directories) or {})
            return bool(found)

        try:
            await self.nodes.wait(at_one_moment, "all nodes to be at one log time", LEVEL_S)
        except FatalError as error:
            self.nodes.problems.append(f"a node holds a state that is not sound: {error.message}")
        if len(set(found.values())) > 1:
            self.nodes.problems.append(f"the nodes hold different states: {found}")

    async def _stop(self) -> None:
        """Stop all nodes at once, and read what they have on disk."""
        stopped = self.nodes.wanted()
        for node in stopped:
            node.wanted = False
            node.ask_to_end(STOP_S)

        async def ended() -> bool:
            return not any(node.up for node in stopped)

        await holds_within(ended, STOP_S)  # else the books say so
        for node in stopped:
            if not node.up:
                try:
                    states.read_through(node.serve.directory)
                except FatalError as error:
                    self.nodes.problems.append(f"node {node.id} has stopped with: {error.message}")
            node.notice()

    def judge(self) -> None:
        """What is wrong with what was seen; also with a run that broke off."""
        records, outcome = self.workload.records, self.outcome
        led = verdicts.leaders(node.serve.output() for node in self.nodes.all.values())
        outcome.led = len(led)
        outcome.problems += [
            *self.nodes.problems,
            *self.nodes.complaints(),
            *verdicts.one_leader_a_term(led),
            *self._judge_terms(led),
            *records.surprises[: verdicts.SHOWN_MAX],
            *verdicts.eventual_reads(records),
            *range_verdicts.ranges_whole(records),
            *self._judge_promises(),
            *self._judge_the_end(),
        ]
        outcome.searched = searched = histories.search(records.history)
        wrong = [*histories.contradictions(records), *searched.contradictions]
        for contradiction in wrong[: 2 * verdicts.SHOWN_MAX]:
            drawn = contradiction.draw(outcome.folder)
            outcome.problems.append(f"{contradiction}\ndrawn in {drawn}")
        outcome.problems += searched.problems

    def _judge_terms(self, led: Mapping[int, object]) -> list[str]:
        """Of a run that came to its end."""
        if len(self._calm) < 2:
            return []
        (began, before), (ended, after) = self._calm
        faults = [(band.kind, band.ended - band.began) for band in self.outcome.bands]
        return [
            *verdicts.terms_explained(led, after, faults),
            *verdicts.leader_kept(before, after, ended - began),
        ]

    def _judge_promises(self) -> list[str]:
        held = next(iter(self._held.values()), None)
        if held is None or "keyed" not in self._plan.workloads:
            counts = {}
        else:
            items = {key: held.get(key, NOTHING) for key in COUNTED}
            counts = {key: Count(item.value or "", item.version) for key, item in items.items()}
        values = None if held is None else _values(held)
        kept = int(self._plan.settings["kv"]["history_revisions"])
        return promise_verdicts.promises_kept(self.workload.records, counts, values, kept)

    def _judge_the_end(self) -> list[str]:
        """Of a run that came so far."""
        records = self.workload.records
        held = {node_id: _values(items) for node_id, items in self._held.items()}
        one = next(iter(held.values()), None)  # the others are the same, or that is a finding
        sets = {node_id: _under("s/", values) for node_id, values in held.items()}
        found = [*verdicts.same_everywhere(held), *verdicts.nothing_lost(records, sets)]
        found += verdicts.refused_stays_undone(records, one.values() if one else ())
        if one is not None:
            found += verdicts.counted(records, one)
            found += list_verdicts.lists_whole(records, _under("l/", one))
        return found

    def _report(self, faults: Faults | None) -> None:
        outcome, records, began = self.outcome, self.workload.records, self._began
        outcome.exits, outcome.lacking = self.nodes.exits, self.nodes.lacking
        outcome.acknowledged_at = [at - began for at in records.acknowledged_at]
        outcome.read_at = [at - began for at in records.read_at]
        outcome.counts = dict(sorted(records.counts.items()))
        outcome.operations = records.operations
        outcome.besides = records.besides
        for node in self.nodes.all.values():
            outcome.boots += node.boots
            outcome.peak = outcome.peak.most(node.peak)
        if faults is not None:
            outcome.tell_of(faults, began)


class _Item(NamedTuple):
    """Of a list of keys."""

    value: str | None
    revision: int
    version: int


NOTHING = _Item(None, 0, 0)


def _values(items: Mapping[str, _Item]) -> dict[str, str]:
    return {key: item.value or "" for key, item in items.items()}


def _under(prefix: str, held: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in held.items() if key.startswith(prefix)}


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
