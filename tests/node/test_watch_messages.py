"""Large changes: what is made of them is made part by part, once for all readers, in fair turns."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence

import pytest

from dengine.kv.store import PUT, Event, Record
from dengine.node import watch_hub, watch_messages
from dengine.node.watch_hub import Cancelled, Changes, Progress, Watch
from dengine.node.watch_messages import PART_BYTES, PART_EVENTS, Part, Reading
from tests.node.hosts import on_loop
from tests.node.hubs import bare_hub, change_of, told


class Made(list[bytes]):
    """Keys. Weak references to it can be made."""


def keys(part: Part) -> Made:
    return Made(event.key for event in part.events)


def all_keys(changes: Changes) -> list[bytes]:
    return [event.key for event in changes.events]


async def taken(watch: Watch) -> Changes:
    """The next change."""
    while not isinstance(message := await anext(watch), Changes):
        assert isinstance(message, Progress)
    return message


async def rest(reading: Reading[Made]) -> list[bytes]:
    found: list[bytes] = []
    while (part := await reading.next()) is not None:
        found += part
    return found


def parts_of(changes: Changes) -> list[Part]:
    parts = changes.parts(lambda part: part)
    found = []
    while parts.lacks(len(found)):
        parts.make_next()
        found.append(parts.give(len(found), keep=True))
    return found


def of_sizes(sizes: Sequence[int]) -> Changes:
    events = [
        Event(PUT, b"%d" % n, Record(1, 1, 1, bytes(size // 2)), Record(1, 1, 1, bytes(size // 2)))
        for n, size in enumerate(sizes)
    ]
    return Changes(1, events, prev=True)


@pytest.mark.parametrize(
    "sizes",
    [[0] * PART_EVENTS, [0] * (4 * PART_EVENTS + 1), [60_000] * 250, [10, 2**20, 10, 2**20]],
)
def test_a_part_has_few_events_and_few_bytes(sizes: list[int]) -> None:
    """However large they are; one that is larger than a part alone is a part. All of them are
    there, in order, and the ends are known."""
    changes = of_sizes(sizes)
    parts = parts_of(changes)
    assert [event for part in parts for event in part.events] == list(changes.events)
    for part in parts:
        assert 1 <= len(part.events) <= PART_EVENTS
        assert len(part.events) == 1 or value_bytes(part) <= PART_BYTES
    assert [part.is_first for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert changes.is_large == (len(parts) > 1)


def value_bytes(part: Part) -> int:
    records = [r for event in part.events for r in (event.record, event.prev) if r is not None]
    return sum(len(record.value) for record in records)


def test_one_part_is_made_in_a_turn_of_the_loop() -> None:
    """Heartbeats are on the same loop: however many read large changes, of their own or shared,
    and once for all who read the same."""
    shared, own = change_of(7, 10_000), [change_of(8, 10_000) for _ in range(3)]
    last = change_of(9, 10_000)
    made = most = 0

    def make(part: Part) -> Made:
        nonlocal made
        made += len(part.events)
        return keys(part)

    async def check() -> None:
        nonlocal most
        hub = bare_hub()
        watches = [told(hub, shared, changes) for changes in own] + [told(hub, last)]

        async def read(watch: Watch, count: int) -> list[list[bytes]]:
            return [await rest(Reading(watch, await taken(watch), make)) for _ in range(count)]

        counts = (2, 2, 2, 1)
        tasks = [asyncio.create_task(read(w, n)) for w, n in zip(watches, counts, strict=True)]
        while not all(task.done() for task in tasks):
            before = made
            await asyncio.sleep(0)
            most = max(most, made - before)
        wanted = [[all_keys(shared), all_keys(changes)] for changes in own] + [[all_keys(last)]]
        assert [task.result() for task in tasks] == wanted
        await hub.close()

    on_loop(check)
    assert made == 10_000 * (1 + 3 + 1)
    assert 0 < most <= PART_EVENTS


def test_turns_go_round() -> None:
    """Who comes with one large change waits for one part of each that is there before, not for all
    of them."""

    async def check() -> None:
        hub = bare_hub()
        order: list[int] = []
        changes = [change_of(n, 5 * PART_EVENTS) for n in range(1, 11)]

        def make(part: Part) -> Made:
            order.append(part.revision)
            return keys(part)

        async def read(watch: Watch) -> None:
            await rest(Reading(watch, await taken(watch), make))

        await asyncio.gather(*(read(told(hub, change)) for change in changes))
        assert order == list(range(1, 11)) * 5
        await hub.close()

    on_loop(check)


def test_a_reader_that_is_interrupted_goes_on() -> None:
    """An app may give its waiting a time limit; it misses nothing, and gets nothing twice."""

    async def check() -> None:
        hub = bare_hub()
        changes = change_of(7, 20 * PART_EVENTS)
        watch = told(hub, changes)
        reading = Reading(watch, await taken(watch), keys)
        found: list[bytes] = []
        for _ in range(5):
            async with hub.turn:  # it waits in the line
                task = asyncio.create_task(reading.next())
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
            task = asyncio.create_task(reading.next())
            await asyncio.sleep(0)  # the part is made, and not given yet
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            found += await reading.next() or []
        assert len(found) == 5 * PART_EVENTS
        assert found + await rest(reading) == all_keys(changes)
        await hub.close()

    on_loop(check)


def test_who_waits_for_this_node_is_not_slow() -> None:
    """Nor is one that takes part by part, however long all of them take. One that takes none is."""

    async def check() -> None:
        hub = bare_hub()
        watch = told(hub, change_of(7, 50 * PART_EVENTS), Progress(9))
        reading = Reading(watch, await taken(watch), keys)
        watch.is_slow()
        async with hub.turn:
            task = asyncio.create_task(reading.next())
            await asyncio.sleep(0)
            assert not any(watch.is_slow() for _ in range(10))
        await task
        for _ in range(10):
            assert not watch.is_slow()
            assert await reading.next()
        assert not watch.is_slow()
        assert any(watch.is_slow() for _ in range(watch_hub.SLOW_TIMES))
        await hub.close()

    on_loop(check)


def test_nothing_is_made_for_one_that_has_left() -> None:
    """Before it has begun, and in the midst: then its reader knows that this is not all."""

    async def check() -> None:
        hub = bare_hub()
        made: list[Part] = []

        def make(part: Part) -> Made:
            made.append(part)
            return keys(part)

        watches = [told(hub, change_of(7, 5 * PART_EVENTS)) for _ in range(2)]
        waiting, begun = [Reading(w, await taken(w), make) for w in watches]
        assert await begun.next()
        async with hub.turn:
            tasks = [asyncio.create_task(reading.next()) for reading in (waiting, begun)]
            await asyncio.sleep(0)
            for watch in watches:
                watch.close()
            assert hub._bytes == 0
        assert await asyncio.gather(*tasks) == [None, None]
        assert (waiting.in_midst, begun.in_midst) == (False, True)
        assert len(made) == 1
        await hub.close()

    on_loop(check)


def test_one_that_is_cancelled_gets_whole_messages_and_the_reason() -> None:
    """The rest of the one that it has begun with, else none of it, and nothing behind: a slow
    reader that got half of it would come again for the same, and again."""

    async def check() -> None:
        hub = bare_hub()
        changes = change_of(7, 5 * PART_EVENTS)
        watches = [told(hub, changes, change_of(8, 1)) for _ in range(2)]
        waiting, begun = [Reading(w, await taken(w), keys) for w in watches]
        first = await begun.next()
        assert first
        for watch in watches:
            watch.cancel("why")
            assert hub.count == (1 if watch is watches[0] else 0)
        assert await waiting.next() is None
        assert not waiting.in_midst
        assert first + await rest(begun) == all_keys(changes)
        for watch in watches:
            assert await anext(watch) == Cancelled("why")
            with pytest.raises(StopAsyncIteration):
                await anext(watch)
        assert hub._bytes == 0

    on_loop(check)


def test_what_the_last_reader_has_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of a large change is never there as a whole for one reader, and for several it is
    no longer than the slowest needs it."""
    monkeypatch.setattr(watch_messages, "PART_EVENTS", 10)

    async def check() -> None:
        hub = bare_hub()
        changes = change_of(7, 30)
        watches = [told(hub, changes) for _ in range(2)]
        one, other = [Reading(w, await taken(w), keys) for w in watches]
        part = await one.next()
        assert part is not None
        kept = weakref.ref(part)
        del part
        assert kept() is not None
        assert await rest(one) == all_keys(changes)[10:]
        watches[0].close()
        assert await other.next() == all_keys(changes)[:10]
        assert kept() is None
        assert await rest(other) == all_keys(changes)[10:]
        await hub.close()

    on_loop(check)
