"""Clients of two promises: keys go with their time, and what is repeated under a key happens once.

As everywhere here, all that a judge needs is kept, and nothing is judged.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tests.cluster import Reply
from tests.linearizability.checker import FOREVER, Operation
from tests.nemesis.client import Caller, another, held

BACK_OFF_S = 0.05  # a node that is down refuses thousands a second
SHORT_TTLS_S = (1, 1, 2, 3)
TTL_PREFIX = "t/"  # of keys that are put for a time
LONG_TTL_S = 3600  # of a key that outlives every run
LONG = 0.1  # how often
TTL_KEYS = 12  # the newest of a client, which it asks for
LOST = 0.2  # how often the answer to a keyed request is not waited for, and lost
LOST_S = 0.05
AGAIN = 0.1  # how often one is repeated that was answered
GIVES_UP = 0.3  # how often one is not repeated that was told each time that it did not happen
COUNTED = ("n/swapped", "n/written")


@dataclass(frozen=True, slots=True)
class TtlPut:
    """A key was put for some time. Times are time.monotonic().

    Attributes:
        returned: FOREVER while its outcome is unknown.
        revision: 0 while it is unknown.
    """

    key: str
    value: str
    ttl_s: int
    called: float
    returned: float = FOREVER
    revision: int = 0


@dataclass(frozen=True, slots=True)
class TtlLook:
    """An answer of what was there then; not what one node happened to have. None: nothing."""

    key: str
    called: float
    returned: float
    value: str | None


@dataclass
class Passing:
    """What goes with its time, and what was seen of it.

    Attributes:
        rested_at: since then there has been one leader, and no write was under way. FOREVER: the
            run did not come to that.
        late_s: after its time and a rest, what is still there so much later is too late.
    """

    puts: list[TtlPut] = field(default_factory=list)
    looks: list[TtlLook] = field(default_factory=list)
    rested_at: float = FOREVER
    late_s: float = 0.0


class TtlClient:
    """Puts keys of its own for a time, some of them again, and asks for them."""

    def __init__(self, caller: Caller, number: int, passing: Passing) -> None:
        self.rng = caller.rng
        self.close = caller.close
        self._caller = caller
        self._number = number
        self._passing = passing
        self._made = 0
        self._keys: list[str] = []

    async def once(self, node_id: int) -> bool:
        """One request; False when it was not answered as a working cluster would."""
        dice = self.rng.random()
        if not self._keys or dice < 0.25:
            key = f"{TTL_PREFIX}{self._number}.{self._made + 1}"
            self._keys = [*self._keys[1 - TTL_KEYS :], key]
            return await self._put(key, node_id)
        key = self.rng.choice(self._keys)
        return await (self._put if dice < 0.35 else self._read)(key, node_id)

    async def _put(self, key: str, node_id: int) -> bool:
        self._made += 1
        ttl_s = LONG_TTL_S if self.rng.random() < LONG else self.rng.choice(SHORT_TTLS_S)
        puts, value = self._passing.puts, f"{self._number}.{self._made} for {ttl_s}"
        put = TtlPut(key, value, ttl_s, time.monotonic())
        puts.append(put)  # of unknown outcome, should the run break off before there is an answer
        path = f"/v1/kv/{key}?ttl={ttl_s}"
        reply, outcome = await self._caller.send("PUT", path, value.encode(), {}, node_id)
        returned = time.monotonic()
        if outcome == "none":
            puts.remove(put)
        elif reply is not None and reply.status == 200:
            puts.remove(put)
            puts.append(replace(put, returned=returned, revision=reply.json()["revision"]))
            self._caller.tally.acknowledged_at.append(returned)
            return True
        return False

    async def _read(self, key: str, node_id: int) -> bool:
        level, called = self.rng.choice(("linearizable", "linearizable", "lease")), time.monotonic()
        path = f"/v1/kv/{key}?consistency={level}"
        reply, _ = await self._caller.send("GET", path, None, {}, node_id)
        returned = time.monotonic()
        if reply is None or reply.status not in (200, 404):
            return False
        self._caller.tally.read_at.append(returned)
        _, value = held(reply)
        self._passing.looks.append(TtlLook(key, called, returned, value))
        return True


@dataclass(slots=True)
class Increment:
    """One request under one key: it either happens once or not at all.

    Attributes:
        answers: what it was told, each time: the status, and the revision that was named.
        repeated: how often it was sent beside the first time.
        done: did it happen? None: nobody knows. False also where it was sent in vain each time.
        doubtful: some attempt that was not answered may have happened.
    """

    key: str
    once: str
    answers: list[tuple[int, int | None]] = field(default_factory=list)
    repeated: int = 0
    done: bool | None = None
    doubtful: bool = False

    def not_answered(self, outcome: str) -> None:
        self.doubtful = self.doubtful or outcome != "none"
        self.done = None if self.doubtful else False


class KeyedClient:
    """Counts, each time under a key, and repeats that at any node until it is answered, or, now and
    then, is known not to have happened.

    One counter is swapped for what follows; the other is written whatever it is, and its version
    counts. Of the former a repetition that is carried out would be refused, of the latter it would
    count.

    Args:
        nodes: ids of those that may be asked now.
    """

    def __init__(
        self,
        caller: Caller,
        number: int,
        nodes: Callable[[], Sequence[int]],
        increments: list[Increment],
        history: dict[str, list[Operation]],
    ) -> None:
        self.rng = caller.rng
        self.close = caller.close
        self._caller = caller
        self._number = number
        self._nodes = nodes
        self._increments = increments
        self._history = history
        self._made = 0
        self._name = f"counting-{number}-{random.SystemRandom().getrandbits(64):x}"

    async def once(self, node_id: int) -> bool:
        """One increment, however many requests that takes."""
        key = self.rng.choice(COUNTED)
        if key == COUNTED[1]:
            value = self._value(0)
            return await self._increment(key, value, {}, ("write", value), node_id)
        called = time.monotonic()
        reply, _ = await self._caller.send("GET", f"/v1/kv/{key}", None, {}, node_id)
        if reply is None or reply.status not in (200, 404):
            return False
        expected, found = held(reply)
        seen = Operation(self._number, called, time.monotonic(), "read", None, (expected, found))
        self._history.setdefault(key, []).append(seen)
        count = int((found or "0").partition(" ")[0])
        headers = {"If-Match": f'"{expected}"'} if expected else {"If-None-Match": "*"}
        value = self._value(count + 1)
        swap = ("cas", (expected or None, value))
        return await self._increment(key, value, headers, swap, node_id)

    def _value(self, count: int) -> str:
        self._made += 1
        return f"{count} {self._number}.{self._made}"

    async def _increment(
        self,
        key: str,
        value: str,
        headers: dict[str, str],
        what: tuple[str, object],
        node_id: int,
    ) -> bool:
        separator = ":" if self._number % 2 else "-"  # a client that numbers, or keys by themselves
        increment = Increment(key, f"{self._name}{separator}{self._made}")
        op = Operation(self._number, time.monotonic(), FOREVER, *what)
        self._increments.append(increment)
        history = self._history.setdefault(key, [])
        history.append(op)
        headers = {**headers, "Idempotency-Key": increment.once}
        send = (key, value.encode(), headers, increment)
        while not increment.answers:
            increment.done = None
            hangs_up = not increment.repeated and self.rng.random() < LOST
            patience_s = LOST_S * self.rng.random() if hangs_up else None
            outcome = await self._send(*send, node_id, patience_s)
            if not increment.answers:
                increment.not_answered(outcome)
                if increment.done is False and self.rng.random() < GIVES_UP:
                    history.remove(op)
                    return False
                increment.repeated += 1
                await asyncio.sleep(BACK_OFF_S)
                node_id = another(self.rng, self._nodes(), node_id)
        returned = time.monotonic()
        status, revision = increment.answers[0]
        increment.done = status == 200
        if increment.done:
            self._caller.tally.acknowledged_at.append(returned)
        result = revision if increment.done else ("is", revision)
        history.remove(op)
        if increment.done or key == COUNTED[0]:
            history.append(op._replace(returned=returned, result=result))
        if self.rng.random() < AGAIN:
            increment.repeated += 1
            await self._send(*send, another(self.rng, self._nodes(), node_id), None)
        return True

    async def _send(
        self,
        key: str,
        body: bytes,
        headers: dict[str, str],
        increment: Increment,
        node_id: int,
        patience_s: float | None,
    ) -> str:
        """The outcome, if it was a refusal."""
        path = f"/v1/kv/{key}"
        reply, outcome = await self._caller.send("PUT", path, body, headers, node_id, patience_s)
        if reply is not None and reply.status in (200, 412):
            increment.answers.append(_told(reply))
        return outcome


def _told(reply: Reply) -> tuple[int, int | None]:
    answer = json.loads(reply.body)
    return reply.status, answer["revision" if reply.status == 200 else "current_revision"]
