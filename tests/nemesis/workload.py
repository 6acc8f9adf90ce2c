"""Clients that write, swap, count, collect, append and read at three levels; what they saw. Others
delete and list (ranges.py).

Beside them there is what the plan asks for: keys with a TTL and keyed increments (workers.py),
watchers (watchers.py) and holders of a lock (locks.py).

Everything is kept that a judge needs, and nothing is judged here. Each client asks any node, one
request at a time, and repeats nothing but what has a key. Every value is written once, so whoever
reads one knows whose it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.linearizability.checker import FOREVER, Operation
from tests.nemesis.client import Caller, Tally, held
from tests.nemesis.lists import ListTxn, Version, elements, text
from tests.nemesis.locks import FENCED, GUARDED, HOLDERS, Holder, Holds
from tests.nemesis.machines import PORT, host
from tests.nemesis.plan import Plan
from tests.nemesis.ranges import RangeClient, Ranged
from tests.nemesis.watchers import FOLLOWED, Watched, Watcher
from tests.nemesis.workers import BACK_OFF_S, Increment, KeyedClient, Passing, TtlClient

CLIENTS = 8
THINK_S = 0.02  # on average, between two requests of a client: the load is bounded
TTL_CLIENTS, KEYED_CLIENTS, RANGE_CLIENTS = 2, 2, 2
FIRST_TTL, FIRST_KEYED, FIRST_RANGE = 100, 200, 300  # numbers of clients
REGISTERS, COUNTERS, LISTS = 4, 2, 3
LIST_ELEMENTS = 24  # then another key is begun: an answer tells the whole list
APPENDS = 3  # with what the answer to the last one has told
LEVELS = ("linearizable", "lease", "eventual")


@dataclass(frozen=True, slots=True)
class Eventual:
    """A read of what one process of a node holds. Without a key there the value is None, and both
    revisions are 0: such an answer names none."""

    node_id: int
    boot: int  # number of the process of this node
    called: float
    returned: float
    state_revision: int
    key: str
    revision: int
    value: str | None


@dataclass
class Records(Tally):
    """What the clients of a run have seen. Times are time.monotonic()."""

    history: dict[str, list[Operation]] = field(default_factory=dict)
    eventual: list[Eventual] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)  # values of writes with the outcome "none"
    lists: list[ListTxn] = field(default_factory=list)
    ranged: Ranged = field(default_factory=Ranged)
    collected: dict[str, str] = field(default_factory=dict)  # acknowledged: key -> value
    attempted: dict[str, str] = field(default_factory=dict)  # unknown outcome
    passing: Passing = field(default_factory=Passing)
    watched: list[Watched] = field(default_factory=list)
    holds: Holds = field(default_factory=Holds)
    increments: list[Increment] = field(default_factory=list)

    @property
    def besides(self) -> dict[str, int]:
        """How much there is beside registers and lists: what was done, not what was tried."""
        looks, deleted = self.passing.looks, [c for c in self.ranged.changes if c.deleted]
        written = Counter(note.key for note in self.holds.notes if note.accepted)
        found = {
            "deletions": len(deleted),
            "keys deleted": sum(change.deleted for change in deleted),
            "linearizable lists": self.ranged.lists,
            "puts with a TTL": sum(put.revision > 0 for put in self.passing.puts),
            "keys with a TTL found": sum(look.value is not None for look in looks),
            "keys with a TTL gone": sum(look.value is None for look in looks),
            "changes watched": sum(len(watched.changes) for watched in self.watched),
            "watches resumed": sum(watched.resumed for watched in self.watched),
            "watches behind the history": sum(len(watched.gaps) for watched in self.watched),
            "locks held": len(self.holds.held),
            "holders stopped": self.holds.stopped,
            "writes guarded by the lock": written[GUARDED],
            "writes guarded by its token": written[FENCED],
            "keyed increments": sum(increment.done is True for increment in self.increments),
            "repetitions": sum(increment.repeated for increment in self.increments),
        }
        return {what: count for what, count in found.items() if count}


class Worker(Protocol):
    """A client that does one thing after the other."""

    rng: random.Random

    async def once(self, node_id: int) -> bool:
        """What it does next; False when it was not answered as a working cluster would."""

    def close(self) -> None: ...


class Workload:
    """The clients of a run.

    Args:
        nodes: ids of the nodes that clients may ask now.
        boot: number of the process that a node runs now.
        excused: may this node answer with an internal error now?
    """

    def __init__(
        self,
        plan: Plan,
        nodes: Callable[[], list[int]],
        boot: Callable[[int], int],
        excused: Callable[[int], bool],
    ) -> None:
        self.records = Records()
        self._plan = plan
        self._nodes = nodes
        self._boot = boot
        self._excused = excused
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._watching: list[asyncio.Task[None]] = []
        self._holders: list[Holder] = []
        self._lists_begun = [1] * LISTS  # keys by place
        self.asked_for: list[str] = []  # keys of the set that may be there

    def start(self) -> None:
        """The clients that every run has, and what its plan asks for beside them."""
        begin = {
            "ttl": self._put_for_a_time,
            "keyed": self._count_under_keys,
            "watch": self._watch,
            "lock": self._hold_locks,
        }
        for number in range(CLIENTS):
            self._run(self._loop(_Client(self, number, self._rng("client", number))))
        for number in range(FIRST_RANGE, FIRST_RANGE + RANGE_CLIENTS):
            caller, records = self._caller("ranges", number), self.records
            self._run(self._loop(RangeClient(caller, number, records.ranged, records.refused)))
        for name in self._plan.workloads:
            begin[name]()

    def _put_for_a_time(self) -> None:
        for number in range(FIRST_TTL, FIRST_TTL + TTL_CLIENTS):
            caller = self._caller("ttl", number)
            self._run(self._loop(TtlClient(caller, number, self.records.passing)))

    def _count_under_keys(self) -> None:
        records = self.records
        for number in range(FIRST_KEYED, FIRST_KEYED + KEYED_CLIENTS):
            caller, seen = self._caller("keyed", number), (records.increments, records.history)
            self._run(self._loop(KeyedClient(caller, number, self._nodes, *seen)))

    def _watch(self) -> None:
        founders = self._plan.founders
        for number, prefix in enumerate(FOLLOWED):
            watched, caller = Watched(number, prefix), self._caller("watcher", number)
            watcher = Watcher(caller, watched, founders[number % len(founders)], self._nodes)
            self.records.watched.append(watched)
            self._watching.append(asyncio.create_task(watcher.run()))

    def _hold_locks(self) -> None:
        endpoints = [f"{host(i)}:{PORT}" for i in (*self._plan.ids, *self._plan.spares)]
        for number in range(HOLDERS):
            rng = self._rng("holder", number)
            self._holders.append(Holder(number, rng, endpoints, self.records.holds))
            self._run(self._holders[-1].run())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    def _rng(self, what: str, number: int) -> random.Random:
        return random.Random(f"{self._plan.seed} {what} {number}")

    def _caller(self, what: str, number: int) -> Caller:
        return Caller(self._rng(what, number), self.records, self._excused)

    async def stop(self, deadline_s: float) -> bool:
        """Let every client finish its request; False when one did not in time. Watchers go on."""
        self._stopping = True
        for holder in self._holders:
            holder.ask_to_end()
        if not self._tasks:
            return True
        _, hanging = await asyncio.wait(self._tasks, timeout=deadline_s)
        await _end(self._tasks)
        return not hanging

    async def hang_up(self) -> None:
        """The watchers have been told enough."""
        await _end(self._watching)

    async def read_all(self, node_id: int) -> bool:
        """Read every key of the history once through this node; False when one was not answered."""
        reader = _Client(self, CLIENTS + node_id, random.Random(node_id))
        try:
            every = keys() + [key for n in range(LISTS) for key in self.lists(n)]
            return all([await reader.read(key, node_id, LEVELS[0]) for key in every])
        finally:
            reader.close()

    async def collect(self, node_id: int, key: str, value: str) -> bool:
        """Add one key through this node; was it acknowledged?"""
        client = _Client(self, CLIENTS + node_id, random.Random(node_id))
        try:
            return await client.collect(key, value, node_id)
        finally:
            client.close()

    def lists(self, place: int) -> list[str]:
        """The keys of one place for a list; only the last is not full."""
        return [f"l/{place}.{number}" for number in range(self._lists_begun[place])]

    def begin_list(self, place: int) -> None:
        self._lists_begun[place] += 1

    async def _loop(self, client: Worker) -> None:
        try:
            while not self._stopping:
                await asyncio.sleep(client.rng.expovariate(1 / THINK_S))
                nodes = self._nodes()
                if not nodes or not await client.once(client.rng.choice(nodes)):
                    await asyncio.sleep(BACK_OFF_S)
        finally:
            client.close()


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    """Those that have not ended are cancelled; what one of them has died of is raised."""
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    tasks.clear()
    for result in results:
        if isinstance(result, Exception):
            raise result


def keys() -> list[str]:
    """Those that are there all the time."""
    return [f"r/{n}" for n in range(REGISTERS)] + [f"c/{n}" for n in range(COUNTERS)]


class _Client:
    def __init__(self, owner: Workload, number: int, rng: random.Random) -> None:
        self.rng = rng
        self._caller = Caller(rng, owner.records, owner._excused)
        self.close = self._caller.close
        self._owner = owner
        self._records = owner.records
        self._number = number
        self._made = 0
        self._known: dict[str, tuple[int, str]] = {}  # key -> revision and value, as last read

    async def once(self, node_id: int) -> bool:
        """One request; False when it was not answered as a working cluster would."""
        dice, rng = self.rng.random(), self.rng
        register = f"r/{rng.randrange(REGISTERS)}"
        if dice < 0.15:
            return await self._change("write", register, self._value(), node_id)
        if dice < 0.3:
            return await self._change("cas", register, self._value(), node_id)
        if dice < 0.55:
            collected = [rng.choice(self._owner.asked_for)] if self._owner.asked_for else []
            key = rng.choice(keys() + [self._list(n) for n in range(LISTS)] + collected)
            return await self.read(key, node_id, rng.choices(LEVELS, (4, 3, 3))[0])
        if dice < 0.65:
            return await self._increment(f"c/{rng.randrange(COUNTERS)}", node_id)
        if dice < 0.75:
            return await self._append(rng.choice((1, 1, 2)), node_id)
        if dice < 0.85:
            return await self._read_lists(node_id)
        value = self._value()
        padded = value + "." * int(rng.paretovariate(0.7) * 50 % 8000)
        return await self.collect(f"s/{value}", padded, node_id)

    def _value(self) -> str:
        self._made += 1
        return f"{self._number}.{self._made}"

    async def _increment(self, key: str, node_id: int) -> bool:
        if not await self.read(key, node_id, "linearizable"):
            return False
        _, value = self._known.get(key, (0, "0"))
        count = int(value.partition(" ")[0]) + 1
        return await self._change("cas", key, f"{count} {self._value()}", node_id)

    async def _change(self, name: str, key: str, value: str, node_id: int) -> bool:
        """Write, or swap for what this client has seen last."""
        expected = self._known.get(key, (None, ""))[0]
        argument: Any = value if name == "write" else (expected, value)
        headers: dict[str, str] = {}
        if name == "cas":
            headers = {"If-None-Match": "*"} if expected is None else {"If-Match": f'"{expected}"'}
        with self._under_way(key, name, argument) as unknown:
            body = value.encode()
            reply, outcome = await self._caller.send("PUT", f"/v1/kv/{key}", body, headers, node_id)
        returned = time.monotonic()
        result: Any = None
        if reply is not None and reply.status == 200:
            result = json.loads(reply.body)["revision"]
            self._known[key] = (result, value)
            self._records.acknowledged_at.append(returned)
        elif reply is not None and reply.status == 412 and name == "cas":
            result = ("is", json.loads(reply.body)["current_revision"])
            self._known.pop(key, None)
        elif outcome == "none":
            self._records.refused.add(value)
            return False
        else:
            self._known.pop(key, None)
            returned = FOREVER
        op = unknown._replace(returned=returned, result=result)
        self._records.history[key].append(op)
        return returned != FOREVER

    @contextlib.contextmanager
    def _under_way(self, key: str, name: str, argument: Any) -> Iterator[Operation]:
        """Of unknown outcome, which it stays when the run breaks off before there is an answer."""
        op = Operation(self._number, time.monotonic(), FOREVER, name, argument)
        history = self._records.history.setdefault(key, [])
        history.append(op)
        yield op
        history.remove(op)

    def _list(self, place: int) -> str:
        """The key of a list that is not full, as far as this client knows."""
        while True:
            key = self._owner.lists(place)[-1]
            if len(self._seen(key)[1]) < LIST_ELEMENTS:
                return key
            self._owner.begin_list(place)

    def _seen(self, key: str) -> Version:
        revision, value = self._known.get(key, (0, ""))
        return revision, elements(value)

    async def _append(self, count: int, node_id: int) -> bool:
        """To so many lists at once. Who was too late has been told what is there, and appends
        something else to that."""
        places = self.rng.sample(range(LISTS), count)
        for _ in range(APPENDS):
            appended = {self._list(place): self._value() for place in places}
            txn = await self._transact(list(appended), appended, node_id)
            if txn.succeeded or not txn.found:
                break
        return bool(txn.found)

    async def _read_lists(self, node_id: int) -> bool:
        """Two of them, as they are at one moment."""
        asked = [self._list(place) for place in self.rng.sample(range(LISTS), 2)]
        return bool((await self._transact(asked, {}, node_id)).found)

    async def _transact(
        self, asked: Sequence[str], appended: Mapping[str, str], node_id: int
    ) -> ListTxn:
        records, base = self._records, {key: self._seen(key) for key in appended}
        txn = ListTxn(self._number, time.monotonic(), asked, appended, base)
        headers = {"Content-Type": "application/json"}
        with contextlib.ExitStack() as under_way:
            for key, op in txn.operations():
                under_way.enter_context(self._under_way(key, op.name, op.argument))
            records.lists.append(txn)  # as above
            reply, outcome = await self._caller.send(
                "POST", "/v1/txn", txn.request(), headers, node_id
            )
            records.lists.remove(txn)
        returned = time.monotonic()
        if reply is not None and reply.status == 200:
            txn = txn.answered(returned, reply.json())
            changed = appended and txn.succeeded
            (records.acknowledged_at if changed else records.read_at).append(returned)
        elif outcome == "none":
            txn = txn.refused(returned)
        for key in asked:
            self._known.pop(key, None)
        found = {key: (revision, text(shown)) for key, (revision, shown) in txn.found.items()}
        self._known.update({key: seen for key, seen in found.items() if seen[0]})
        records.lists.append(txn)
        for key, op in txn.operations():
            records.history.setdefault(key, []).append(op)
        return txn

    async def read(self, key: str, node_id: int, level: str) -> bool:
        boot, called = self._owner._boot(node_id), time.monotonic()
        path = f"/v1/kv/{key}?consistency={level}"
        reply, _ = await self._caller.send("GET", path, None, {}, node_id)
        returned = time.monotonic()
        if reply is None or reply.status not in (200, 404):
            return False
        self._records.read_at.append(returned)
        revision, value = held(reply)
        if level == "eventual":
            if boot == self._owner._boot(node_id):
                seen = int(reply.headers["dengine-revision"]) if revision else 0
                self._records.eventual.append(
                    Eventual(node_id, boot, called, returned, seen, key, revision, value)
                )
            return True
        if value is None:
            self._known.pop(key, None)
        else:
            self._known[key] = (revision, value)
        op = Operation(self._number, called, returned, "read", None, (revision, value))
        self._records.history.setdefault(key, []).append(op)
        return True

    async def collect(self, key: str, value: str, node_id: int) -> bool:
        """Add a key that nobody else adds."""
        records = self._records
        self._owner.asked_for.append(key)
        records.attempted[key] = value
        with self._under_way(key, "write", value) as unknown:
            reply, outcome = await self._caller.send(
                "PUT", f"/v1/kv/{key}", value.encode(), {}, node_id
            )
        returned, result = time.monotonic(), None
        if outcome == "none":
            del records.attempted[key]
            records.refused.add(value)
            return False
        if reply is not None and reply.status == 200:
            result = json.loads(reply.body)["revision"]
            records.collected[key] = records.attempted.pop(key)
            records.acknowledged_at.append(returned)
        else:
            returned = FOREVER
        records.history[key].append(unknown._replace(returned=returned, result=result))
        return returned != FOREVER
