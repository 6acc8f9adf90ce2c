"""What was promised about time and about repetition, counted by hand: none of dengine.kv's code
decides here.

It follows the committed log, command by command, and hands on to keys.py what is carried out. 13:
what comes under an idempotency key is carried out once, and says the same again for as long as
results are remembered. 15: what has a TTL or a lease is there for all of its time, by the log's
time and by the true one, and ends with the first entry that says that the time has come; what
holds for a lease holds for all that hangs on it.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dengine.kv.commands import (
    Command,
    Deferred,
    Full,
    LeaseGrant,
    LeaseKeepAlive,
    LeaseResult,
    LeaseRevoke,
    LeaseRevoked,
    Mismatch,
    NoLease,
    Once,
    Result,
    Stale,
)
from dengine.kv.store import DELETE, EXPIRE, Event
from tests.simulation.keys import Keys
from tests.simulation.loop import MS
from tests.simulation.model import Outcome, Step
from tests.simulation.plan import MANY
from tests.simulation.violation import violated

if TYPE_CHECKING:
    from tests.simulation.world import World

FASTEST = 1.1  # of all clocks, where they are skewed
ROUNDED_MS = 1.001  # by how much the difference of two readings in whole milliseconds may be wrong
CALM_MS = 300  # in which, beside a heartbeat, what is due has ended, where nothing goes wrong


@dataclass(slots=True, eq=False)
class _Time:
    """Of a key or a lease: how long, until when by the log, and since when it truly runs."""

    ttl_s: int
    due_ms: int
    since_ns: int


@dataclass(slots=True, eq=False)
class _Lease:
    id: str
    time: _Time
    keys: dict[bytes, None] = field(default_factory=dict)
    revoked: bool = False  # and its keys are on their way out


class Promises:
    """Grows with the committed log; each command costs what it has changed.

    Attributes:
        keys: what there is.
        calm_since: from this log time on nothing has gone wrong.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._strict = world.plan.limits["expire_keys"] == MANY  # an entry ends all that is due
        self._window_ms = world.plan.window_s * 1000
        self._rate = FASTEST if world.plan.skewed_clocks else 1.0
        self._lives: dict[bytes, _Time | _Lease] = {}
        self._leases: dict[str, _Lease] = {}
        self._given_out: dict[str, None] = {}
        self.keys = Keys(world.plan.limits["work_keys"], self._alive)
        self._due: list[tuple[int, int, bytes | str]] = []
        self._count = itertools.count()  # names are of two types, and cannot be compared
        self._first: dict[bytes, tuple[Result, int]] = {}  # by mark, and when
        self._numbers: dict[str, int] = {}  # of the newest request of each client
        self._ahead_ms = float("inf")  # the least that any entry's clock was ahead of the truth
        self.clock_ms = 0
        self.calm_since: int | None = None

    def lasting(self) -> str:
        """What has not come to its end yet; empty when all has."""
        if self._lives or self._leases:
            return f"{list(self._lives)} and the leases {list(self._leases)} are there still"
        return ""

    def follow(self, step: Step, at_ns: int) -> None:
        """One entry, which was made at `at_ns`."""
        self._runs(step, at_ns)
        self._end(step, at_ns)
        for outcome in step.outcomes:
            if not isinstance(outcome.result, Deferred):
                self._command(outcome, step.index, at_ns)
            elif outcome.events is not None:
                violated("13 once", f"{outcome.mark!r} was put off, and has changed something")
            else:
                self._world.count("put off")
        self.keys.compare(step.left, step.revision, step.index)

    # --- 15: time ---------------------------------------------------------------------------------

    def _runs(self, step: Step, at_ns: int) -> None:
        """From no entry to a later one does the log count more time than has passed."""
        assert step.clock_ms is not None, "an entry of the format that has no time"
        self.clock_ms = max(self.clock_ms, step.clock_ms)
        ahead_ms = self.clock_ms - at_ns / MS * self._rate
        if ahead_ms > self._ahead_ms + ROUNDED_MS:
            ahead_ms -= self._ahead_ms
            violated("15 log time", f"entry {step.index} is {ahead_ms:.3f} ms ahead of the truth")
        self._ahead_ms = min(self._ahead_ms, ahead_ms)

    def _end(self, step: Step, at_ns: int) -> None:
        """What time has ended, at the beginning of an entry."""
        events = step.ended or ()
        self.keys.ended(events, step.index)
        for event in events:
            life = self._lives.get(event.key)
            lease = life if isinstance(life, _Lease) else None
            time = lease.time if lease is not None else life
            if not isinstance(time, _Time):
                violated("15 expiry", f"{event.key!r} has ended, and had all the time in the world")
            if event.kind == DELETE and lease is not None and lease.revoked:
                self._let_go(event.key)
                continue
            if event.kind != EXPIRE or (lease is not None and lease.revoked):
                violated("15 expiry", f"{event.key!r} ended by an event of kind {event.kind}")
            self._is_over(f"{event.key!r}", time, at_ns)
            self._let_go(event.key)
            self._world.count("lease expired" if lease is not None else "key expired")
        while self._due and self._due[0][0] <= self.clock_ms:
            due_ms, _, name = heapq.heappop(self._due)
            if isinstance(name, str):
                self._lease_over(name, due_ms)
                continue
            life = self._lives.get(name)
            if self._strict and isinstance(life, _Time) and life.due_ms == due_ms:
                violated("15 late", f"{name!r} was due at {due_ms}, it is {self.clock_ms}")

    def _lease_over(self, lease_id: str, due_ms: int) -> None:
        lease = self._leases.get(lease_id)
        if lease is None or lease.time.due_ms != due_ms:
            return
        if self._strict and lease.keys:
            violated("15 late", f"lease {lease_id} was due at {due_ms}, it is {self.clock_ms}")
        if not lease.keys:
            del self._leases[lease_id]

    def _is_over(self, what: str, time: _Time, at_ns: int) -> None:
        if time.due_ms > self.clock_ms:
            early_ms = time.due_ms - self.clock_ms
            violated("15 early", f"{what} has ended {early_ms} ms early by the log's time")
        passed_ns = (at_ns - time.since_ns) * self._rate
        if passed_ns + 1000 < time.ttl_s * 1000 * MS:
            lived_ms = (at_ns - time.since_ns) / MS
            violated("15 early", f"{what}, for {time.ttl_s} s, has ended after {lived_ms:.3f} ms")
        if self.calm_since is not None and time.due_ms > self.calm_since and self._strict:
            late_ms = self.clock_ms - time.due_ms
            if late_ms > self._world.plan.election.heartbeat_ms + CALM_MS:
                violated("15 late", f"{what} has ended {late_ms} ms after its time, in a calm")

    def _alive(self, lease_id: str) -> bool:
        lease = self._leases.get(lease_id)
        return lease is not None and not lease.revoked and lease.time.due_ms > self.clock_ms

    def _time(self, ttl_s: int, at_ns: int) -> _Time:
        """A millisecond more, for what began late in its own."""
        return _Time(ttl_s, self.clock_ms + ttl_s * 1000 + 1, at_ns)

    def _remind(self, due_ms: int, name: bytes | str) -> None:
        heapq.heappush(self._due, (due_ms, next(self._count), name))

    def _let_go(self, key: bytes) -> None:
        life = self._lives.pop(key, None)
        if isinstance(life, _Lease):
            del life.keys[key]
            if not life.keys and (life.revoked or life.time.due_ms <= self.clock_ms):
                self._leases.pop(life.id, None)

    # --- 13: once ---------------------------------------------------------------------------------

    def _command(self, outcome: Outcome, index: int, at_ns: int) -> None:
        command, result = outcome.command, outcome.result
        if isinstance(command, Once):
            if isinstance(result, Full):
                self._unchanged(outcome)
                self._world.count("nothing more can be remembered")
                return
            if not self._is_first(command, outcome):
                return
            self._first[outcome.mark] = (result, self.clock_ms)
            command = command.command
        self.keys.carry_out(command, result, outcome.events, index, self.clock_ms)
        if outcome.events is not None:
            self._changed(outcome.events, command, at_ns)
        self._lease_command(command, outcome, at_ns)

    def _is_first(self, command: Once, outcome: Outcome) -> bool:
        """Else it was carried out before, and has to say the same and to change nothing."""
        mark, result = outcome.mark, outcome.result
        newest = self._numbers.get(command.key, 0)
        if isinstance(result, Mismatch):
            violated("13 once", f"{mark!r} came under a key of another request")
        if isinstance(result, Stale):
            kept = self._world.plan.limits["results"]
            if command.number is None or newest - command.number < kept:
                violated("13 once", f"{mark!r} is stale, and the newest is {newest}")
            self._unchanged(outcome)
            self._world.count("repeated too late")
            return False
        if command.number is not None:
            self._numbers[command.key] = max(newest, command.number)
        first = self._first.get(mark)
        if first is None:
            return True
        forgotten = self.clock_ms - first[1] > self._window_ms
        if forgotten and (result != first[0] or outcome.events is not None):
            return True
        if result != first[0]:
            violated("13 once", f"{mark!r} came to {first[0]}, and later to {result}")
        self._unchanged(outcome)
        self._world.count("repeated")
        return False

    @staticmethod
    def _unchanged(outcome: Outcome) -> None:
        if outcome.events is not None:
            violated("13 once", f"{outcome.mark!r} has changed {outcome.events} once more")

    # --- what commands do -------------------------------------------------------------------------

    def _changed(self, events: Sequence[Event], command: Command, at_ns: int) -> None:
        for event in events:
            if event.kind == EXPIRE:
                violated("15 expiry", f"{event.key!r} has ended by a command: {command}")
            self._let_go(event.key)
            made = event.record
            if made is not None and made.lease:
                self._require(made.lease)
                lease = self._leases[made.lease]
                lease.keys[event.key] = None
                self._lives[event.key] = lease
            elif made is not None and made.expires_ms:
                ttl_s = (made.expires_ms - self.clock_ms) // 1000
                time = self._lives[event.key] = self._time(ttl_s, at_ns)
                self._remind(time.due_ms, event.key)

    def _lease_command(self, command: Command, outcome: Outcome, at_ns: int) -> None:
        result = outcome.result
        if isinstance(command, LeaseGrant) and isinstance(result, LeaseResult):
            if result.lease in self._given_out:
                violated("15 lease", f"{result.lease} was given out twice")
            self._given_out[result.lease] = None
            if result.ttl_s != command.ttl_s:
                violated("15 lease", f"{command} was granted {result.ttl_s} s")
            time = self._time(command.ttl_s, at_ns)
            self._leases[result.lease] = _Lease(result.lease, time)
            self._remind(time.due_ms, result.lease)
            return
        if isinstance(result, NoLease):
            if self._alive(result.lease):
                violated("15 lease", f"{result.lease} is said to be gone, and it is not")
            return
        asked = getattr(command, "lease", "")
        if isinstance(command, LeaseKeepAlive):
            self._require(asked)
            lease = self._leases[asked]
            if result != LeaseResult(asked, lease.time.ttl_s):
                violated("15 lease", f"{asked} was kept alive, and the answer is {result}")
            lease.time = self._time(lease.time.ttl_s, at_ns)
            self._remind(lease.time.due_ms, asked)
        elif isinstance(command, LeaseRevoke):
            self._revoked(asked, result)

    def _require(self, lease_id: str) -> None:
        if not self._alive(lease_id):
            violated("15 lease", f"{lease_id} is used, and its time is over")

    def _revoked(self, lease_id: str, result: Result) -> None:
        """The keys that went were let go of before."""
        assert isinstance(result, LeaseRevoked), result
        self._require(lease_id)
        lease = self._leases[lease_id]
        lease.revoked = True
        if lease.keys and not result.going:
            violated("15 lease", f"{lease_id} is revoked, and {list(lease.keys)} stay")
        if lease.keys:
            self._world.count("revoked in steps")
        else:
            del self._leases[lease_id]
            self._world.count("revoked")
