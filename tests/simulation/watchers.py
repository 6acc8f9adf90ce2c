"""Who follows some keys, and what each was shown.

Invariant 14: a watch shows exactly what the committed log has changed of what it selects, revision
by revision, none twice and none left out, also where it goes on at another node. Each message is
compared with the log when it comes; a revision is looked at once by each watcher.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

from dengine.errors import Compacted, DengineError
from dengine.kv.store import Event, Record
from dengine.node.watch_hub import Cancelled, Changes, Message, Progress
from dengine.node.watch_index import Selection
from tests.simulation.loop import MS
from tests.simulation.violation import violated

if TYPE_CHECKING:
    from tests.simulation.machine import Process
    from tests.simulation.world import World

SELECTIONS = (
    Selection(b"k0", is_prefix=False),
    Selection(b"t0", is_prefix=False),
    Selection(b"k", is_prefix=True),
    Selection(b"t", is_prefix=True),
    Selection(b"l", is_prefix=True),
    Selection(b"o", is_prefix=True),
    Selection(b"", is_prefix=True),
)
ASKS_S = 0.5


class _Watcher:
    """One of them.

    Attributes:
        next: the next revision that it has not seen; None: it wants to know what comes from now on.
        process: where its watch is, or is asked for.
    """

    def __init__(self, world: World, slot: int) -> None:
        self._world = world
        self._slot = slot
        self._rng = random.Random(f"{world.seed} watcher {slot}")
        self.selection = self._rng.choice(SELECTIONS)
        self._prev = self._rng.random() < 0.5
        self._stays = self._rng.choice((0.9, 0.98, 1.0))  # after a message
        self._slow = self._rng.choice((0.0, 0.0, 0.1, 0.4))  # how often it lets messages wait
        self.next: int | None = None
        self.process: Process | None = None
        self._attempt = 0

    def ask(self) -> None:
        """At any node."""
        if self.process is not None:
            return
        process = self._rng.choice(list(self._world.machines.values())).process
        if process is None or not process.serves:
            self._later()
            return
        self._attempt += 1
        self.process = process
        process.arrived(self._begin, process)

    def _later(self) -> None:
        self._world.scheduler.after(self._rng.randint(2, 60) * MS, self.ask)

    def _begin(self, process: Process) -> None:
        if self.process is not process:
            return
        attempt = self._attempt
        self._world.note("watcher", self._slot, "asks", process.member.id, "from", self.next)
        task = process.loop.create_task(self._follow(process))
        task.add_done_callback(lambda done: self._ended(attempt, done))

    async def _follow(self, process: Process) -> None:
        node, shown = process.node, self._world.clients.shown_index
        assert node is not None
        if self.next is not None:
            self._world.count("watch resumed")
        deadline = process.loop.time() + ASKS_S
        watch = await node.watch(self.selection, self.next, prev=self._prev, deadline=deadline)
        try:
            async for message in watch:
                self._told(process, message, shown)
                if self._world.clients.stopped:
                    continue  # from here on it stays, and listens
                if self._rng.random() > self._stays:
                    return
                if self._rng.random() < self._slow:
                    await asyncio.sleep(self._rng.choice((0.01, 0.1, 1.5)))
        finally:
            watch.close()

    def gone(self, process: Process) -> None:
        """The connection breaks."""
        if self.process is process:
            self.process = None
            self._later()

    def _ended(self, attempt: int, task: Any) -> None:
        if self._attempt != attempt or self.process is None:
            return
        process, self.process = self.process, None
        error = None if task.cancelled() else task.exception()
        self._world.note("watcher", self._slot, "ends", error)
        if isinstance(error, Compacted):
            self._world.checker.look(process)
            self._compacted(error.details["compact_revision"])
        elif isinstance(error, DengineError):
            self._world.clients.expected(error)
        elif isinstance(error, Exception):
            raise error
        self._later()

    # --- what it is shown -------------------------------------------------------------------------

    def _told(self, process: Process, message: Message, shown: int) -> None:
        self._world.checker.look(process)  # in this very event it may have been committed
        model = self._world.checker.model
        self._world.note("watcher", self._slot, "gets", type(message).__name__, self.next)
        if isinstance(message, Cancelled):
            self._world.count("watch cancelled")
            if process.machine.id in self._world.faults.judged:
                self.next = None  # its state counts as wrong, and so what it has told
            elif message.compact_revision is not None:
                self._compacted(message.compact_revision)
            return
        if message.revision > model.revision:
            violated("14 watch", f"{self}: revision {message.revision} is not committed")
        if self.next is None:
            if message.revision < model.revision_at(shown):
                violated("14 watch", f"{self} began at {message.revision}, which is long past")
            if not isinstance(message, Progress):
                violated("14 watch", f"{self} began with a change")
            self.next = message.revision + 1
        elif isinstance(message, Progress):
            self._nothing_before(message.revision + 1)
            self.next = max(self.next, message.revision + 1)
        else:
            self._changed(message)

    def _changed(self, message: Changes) -> None:
        revision = message.revision
        assert self.next is not None
        if revision < self.next:
            violated("14 watch", f"{self} is shown revision {revision} again")
        self._nothing_before(revision)
        truth = self._selected(revision)
        if list(message.events) != truth:
            violated("14 watch", f"{self}: {revision} was {truth}, and it sees {message.events}")
        for event, (made, old) in zip(message.events, self._records(revision), strict=True):
            is_new = made is not None and (
                old is None or old.create_revision != made.create_revision
            )
            if event.created != is_new:
                violated("14 watch", f"{self}: {revision} has {event}, and of before {old}")
        self.next = revision + 1
        self._world.count("change seen")

    def _nothing_before(self, revision: int) -> None:
        """What it has not seen, it has not missed."""
        assert self.next is not None
        for passed in range(self.next, revision):
            if self._selected(passed):
                violated("14 watch", f"{self} has missed revision {passed}")

    def _records(self, revision: int) -> list[tuple[Record | None, Record | None]]:
        """Of what it selects: what is there since, and what was there before."""
        events = self._world.checker.model.changed_by(revision)
        return [(e.record, e.prev) for e in events if self.selection.holds(e.key)]

    def _selected(self, revision: int) -> list[Any]:
        events = self._world.checker.model.changed_by(revision)
        selected = [event for event in events if self.selection.holds(event.key)]
        if self._prev:
            return selected
        return [Event(event.kind, event.key, event.record, None) for event in selected]

    def _compacted(self, revision: int) -> None:
        """It has to begin anew, and rightly so."""
        self._world.count("watch compacted")
        if (
            self.next is not None
            and not self.next <= revision <= self._world.checker.model.compacted
        ):
            violated("14 watch", f"{self} is told that {revision} is gone")
        self.next = None

    def lacks(self) -> str:
        """What it has still to be shown; empty when it has seen everything."""
        if self.next is None or self.process is None:
            return f"{self} follows nothing"
        last = self._world.checker.model.revision
        missing = [r for r in range(self.next, last + 1) if self._selected(r)]
        return f"{self} has not seen {missing[:5]}" if missing else ""

    def __str__(self) -> str:
        return f"watcher {self._slot} of {self.selection.key!r} from {self.next} on"


class Watchers:
    """All of them."""

    def __init__(self, world: World) -> None:
        self._all = [_Watcher(world, slot) for slot in range(world.plan.watchers)]

    def start(self) -> None:
        for watcher in self._all:
            watcher.ask()

    def process_gone(self, process: Process) -> None:
        """Its connections break."""
        for watcher in self._all:
            watcher.gone(process)

    def lacking(self) -> str:
        """What somebody has still to be shown; empty when nothing is."""
        return next(filter(None, (watcher.lacks() for watcher in self._all)), "")
