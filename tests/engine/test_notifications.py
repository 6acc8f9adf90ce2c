"""Watches and notifications: in order, bounded, and never ended or thinned out without a word."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop

import dengine
from dengine.client.types import Change, Event, Put
from dengine.embedded import notifications, reads
from dengine.embedded.notifications import Leadership
from dengine.engine import EngineClosed
from dengine.errors import Compacted, WatchOverflow
from dengine.node import watch_hub, watch_messages
from tests.engine.apps import PATIENT_S, alone, on
from tests.node.hosts import until

App = Callable[[dengine.Engine], Coroutine[Any, Any, None]]


def used(directory: Path, app: App, **settings: int | str) -> None:
    """Run `app` with an engine that is ready."""

    async def entered() -> None:
        async with alone(directory, **settings) as engine:
            await engine.wait_ready(PATIENT_S)
            await app(engine)

    on(uvloop.new_event_loop, entered)


async def next_of(watch: dengine.engine.Watch) -> Change:
    async with asyncio.timeout(PATIENT_S):
        return await anext(watch)


def test_a_watch(tmp_path: Path) -> None:
    """From now on or from a revision; all of one revision at once; what was before if asked for."""

    async def app(engine: dengine.Engine) -> None:
        await engine.put("a/1", b"old")
        async with engine.watch(prefix="a/", prev=True) as watch:
            assert watch.revision == 1
            await engine.put("b", b"of no interest")
            await engine.put("a/1", b"new")
            await engine.delete(prefix="a/")
            assert await next_of(watch) == Change(3, (Event("put", b"a/1", b"new", b"old"),))
            assert await next_of(watch) == Change(4, (Event("delete", b"a/1", None, b"new"),))
            assert watch.revision == 4
            await engine.txn([], success=[Put("a/2", b"1"), Put("a/2", b"2")])
            twice = Event("put", b"a/2", b"2", created=True)
            assert await next_of(watch) == Change(5, (twice,)), "a key that was put twice is new"
        with pytest.raises(StopAsyncIteration):
            await anext(watch)
        async with engine.watch("a/1", from_revision=1) as watch:
            seen = [await next_of(watch) for _ in range(3)]
        assert [change.revision for change in seen] == [1, 3, 4]
        assert [change.events[0].created for change in seen] == [True, False, False]
        assert {event.prev for change in seen for event in change.events} == {None}
        with pytest.raises(ValueError, match="a key or a prefix"):
            engine.watch()
        with pytest.raises(ValueError, match="begin at 1"):
            engine.watch("a", from_revision=0)

    used(tmp_path, app)


def test_closing_a_watch_ends_the_iteration(tmp_path: Path) -> None:
    """Also for a task that waits in it."""

    async def app(engine: dengine.Engine) -> None:
        watch = engine.watch("k")
        async with watch:
            waiting = asyncio.create_task(anext(watch))
            await asyncio.sleep(0)
            await watch.aclose()
            with pytest.raises(StopAsyncIteration):
                await waiting

    used(tmp_path, app)


def test_a_watch_has_one_reader_at_a_time(tmp_path: Path) -> None:
    """The second one is told so, and the first goes on waiting."""

    async def app(engine: dengine.Engine) -> None:
        async with engine.watch("k") as watch:
            first = asyncio.create_task(next_of(watch))
            second = asyncio.create_task(next_of(watch))
            done, _ = await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
            assert done == {second}
            with pytest.raises(RuntimeError, match="another task waits"):
                await second
            put = await engine.put("k", b"1")
            assert (await first).revision == put.revision
            first = asyncio.create_task(next_of(watch))
            await asyncio.sleep(0)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            put = await engine.put("k", b"2")
            assert (await next_of(watch)).revision == put.revision, (
                "who was cancelled waits no more"
            )

    used(tmp_path, app)


def test_a_slow_reader_misses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What finds no room waits in the history; a watch that the node ends goes on from there."""
    monkeypatch.setattr(watch_hub, "QUEUE_MAX", 4)

    async def app(engine: dengine.Engine) -> None:
        async with engine.watch("k") as watch:
            for n in range(100):
                await engine.put("k", b"%d" % n)
            for n in range(50):
                assert (await next_of(watch)).events[0].value == b"%d" % n
            assert watch._source is not None
            watch._source.cancel("too slow")
            for n in range(50, 100):
                assert (await next_of(watch)).events[0].value == b"%d" % n

    used(tmp_path, app)


LARGE = [Put(f"k/{n:02}", b"%d" % n) for n in range(60)]
LARGE_EVENTS = tuple(Event("put", f"k/{n:02}".encode(), b"%d" % n, created=True) for n in range(60))


def test_a_large_change_leaves_others_their_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The app's, and the heartbeats of its node: a part of it is made in a turn of the event loop,
    once for all watches that select the same."""
    monkeypatch.setattr(watch_messages, "PART_EVENTS", 3)
    made = 0

    def counted(*fields: Any) -> Event:
        nonlocal made
        made += 1
        return Event(*fields)

    monkeypatch.setattr(reads, "Event", counted)

    async def app(engine: dengine.Engine) -> None:
        async with engine.watch(prefix="k/") as one, engine.watch(prefix="k/") as other:
            await engine.txn([], success=LARGE)
            tasks = [asyncio.create_task(next_of(watch)) for watch in (one, other)]
            most = 0
            while not all(task.done() for task in tasks):
                before = made
                await asyncio.sleep(0)
                most = max(most, made - before)
            assert {task.result() for task in tasks} == {Change(1, LARGE_EVENTS)}
            assert made == len(LARGE)
            assert most <= 3
            assert one.revision == other.revision == 1

    used(tmp_path, app)


def test_a_large_change_survives_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An app that waits for a while only, and then again, gets all of it."""
    monkeypatch.setattr(watch_messages, "PART_EVENTS", 3)

    async def app(engine: dengine.Engine) -> None:
        async with engine.watch(prefix="k/") as watch:
            await engine.txn([], success=LARGE)
            interrupted = 0
            while True:
                task = asyncio.create_task(anext(watch))
                for _ in range(5):
                    await asyncio.sleep(0)
                if task.done():
                    break
                assert watch.revision == 0
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
                interrupted += watch._large is not None
            assert task.result() == Change(1, LARGE_EVENTS)
            assert interrupted > 2
            await engine.put("k/00", b"next")
            assert (await next_of(watch)).revision == 2

    used(tmp_path, app)


def test_closing_a_watch_in_the_midst_of_a_large_change_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_messages, "PART_EVENTS", 3)

    async def app(engine: dengine.Engine) -> None:
        async with engine.watch(prefix="k/") as watch:
            await engine.txn([], success=LARGE)
            async with engine._embedded.node.hub.turn:
                task = asyncio.create_task(anext(watch))
                await until(lambda: watch._large is not None, "the change to be taken")
                await watch.aclose()
            with pytest.raises(StopAsyncIteration):
                await task

    used(tmp_path, app)


def test_what_is_gone_is_said(tmp_path: Path) -> None:
    """A watch that the end of the history has overtaken says so, and how far the loss goes."""

    async def app(engine: dengine.Engine) -> None:
        for n in range(20):
            await engine.put("k", b"%d" % n)
        watch = engine.watch("k", from_revision=1)
        with pytest.raises(Compacted) as caught:
            await next_of(watch)
        compacted = caught.value.details["compact_revision"]
        assert compacted >= 1
        assert (await next_of(engine.watch("k", from_revision=compacted + 1))).revision > compacted

    used(tmp_path, app, kv__history_revisions=5)


def test_the_number_of_watches_is_bounded(tmp_path: Path) -> None:
    async def app(engine: dengine.Engine) -> None:
        calls = engine._embedded.calls
        async with engine.watch("a"), engine.watch("b"):
            calls._timeout_s = 0.3  # it may help to wait, so it waits that long
            with pytest.raises(WatchOverflow):
                await engine.watch("c").__aenter__()
            calls._timeout_s = PATIENT_S
        async with engine.watch("c"):
            pass

    used(tmp_path, app, limits__watchers=2)


def test_a_watch_that_is_dropped_gives_its_place_back(tmp_path: Path) -> None:
    """Who leaves the loop over it does not have to close it, whichever thread drops it last."""

    async def app(engine: dengine.Engine) -> None:
        first = await engine.put("k", b"1")
        hub = engine._embedded.node.hub
        for _ in range(3 * 4):
            async for change in engine.watch("k", from_revision=first.revision):
                assert change.revision == first.revision
                break
        held = [engine.watch("k", from_revision=first.revision)]
        await next_of(held[0])
        await until(lambda: hub.count == 1, "the places of those that were left")
        await asyncio.to_thread(held.clear)
        await until(lambda: hub.count == 0, "the place of the one that a thread has dropped")

    used(tmp_path, app, limits__watchers=4)


def test_a_watch_of_a_client_begins_amid_writes_that_nobody_keeps(tmp_path: Path) -> None:
    """It follows what comes from now on, as one of an engine: nothing of the past is needed."""

    async def app() -> None:
        settings: dict[str, int | str] = {"kv.history_revisions": 0, "kv.history_bytes": 1}
        async with (
            dengine.Engine(tmp_path, listen_address="127.0.0.1:0", settings=settings) as engine,
            asyncio.timeout(PATIENT_S),
        ):
            await engine.wait_ready(PATIENT_S)

            async def write() -> None:
                while True:
                    await engine.put("k", b"")

            assert engine.address is not None
            writing = [asyncio.create_task(write()) for _ in range(4)]
            async with dengine.client.Client(engine.address) as client:
                for _ in range(20):
                    async with client.watch("k") as watch:
                        begun = watch.revision
                        assert (await anext(watch)).revision == begun + 1
            for task in writing:
                task.cancel()
            await asyncio.gather(*writing, return_exceptions=True)

    on(uvloop.new_event_loop, app)


def test_a_watch_may_outlive_its_event_loop(tmp_path: Path) -> None:
    """Dropped after the end it says nothing, and neither does one that was refused."""
    held: list[dengine.engine.Watch] = []

    async def app(engine: dengine.Engine) -> None:
        first = await engine.put("k", b"1")
        held.append(engine.watch("k", from_revision=first.revision))
        await next_of(held[0])
        with pytest.raises(ValueError, match="begin at 1"):
            engine.watch("k", from_revision=0)

    used(tmp_path, app)
    held.clear()


def test_leaving_ends_a_watch(tmp_path: Path) -> None:
    async def app() -> None:
        async with alone(tmp_path) as engine:
            await engine.wait_ready(PATIENT_S)
            watch = engine.watch("k")
            await watch.__aenter__()
            waiting = asyncio.create_task(anext(watch))
            await asyncio.sleep(0)
        with pytest.raises(EngineClosed):
            await waiting

    on(uvloop.new_event_loop, app)


def test_it_says_when_it_leads(tmp_path: Path) -> None:
    """From the state in which it finds the node; each state once."""

    async def app() -> None:
        async with alone(tmp_path) as engine:
            async with asyncio.timeout(PATIENT_S):
                told = [now async for now in _until_it_leads(engine)]
            assert told[-1].leader == 1
            assert len(set(told)) == len(told)
            assert [now.term for now in told] == sorted(now.term for now in told)
            assert engine.is_leader
            assert engine.leader is not None
            assert engine.leader.id == 1
            now = await anext(engine.membership())
            assert [(member.id, member.voter) for member in now.members] == [(1, True)]
            assert now.members == engine.members
            assert not now.joint

    on(uvloop.new_event_loop, app)


async def _until_it_leads(engine: dengine.Engine) -> Any:
    async for now in engine.leadership():
        yield now
        if now.is_leader:
            return


def test_a_slow_listener_gets_the_newest_state(tmp_path: Path) -> None:
    """What waits is bounded; what is dropped is counted, and it is never the newest."""

    async def app(engine: dengine.Engine) -> None:
        slow, quick = engine.leadership(), engine.leadership()
        await anext(quick)
        topic = engine._embedded.notifications._leadership
        for term in range(1000, 1000 + 2 * notifications.STATES_MAX):
            topic.publish(Leadership(2, False, term))
            assert (await anext(quick)).term == term
        newest = 1000 + 2 * notifications.STATES_MAX - 1
        got = [await anext(slow) for _ in range(notifications.STATES_MAX)]
        assert got[-1].term == newest
        assert slow.skipped == notifications.STATES_MAX + 1
        assert quick.skipped == 0

    used(tmp_path, app)


def test_a_listener_that_is_forgotten_is_gone(tmp_path: Path) -> None:
    """Nothing is kept for an iteration that was left without a word."""

    async def app(engine: dengine.Engine) -> None:
        async for _ in engine.leadership():
            break
        readers = engine._embedded.notifications._leadership._subscribers
        await until(lambda: not list(readers), "the listener to be forgotten")

    used(tmp_path, app)


def test_listeners_hear_of_it_when_the_notifications_themselves_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug there ends the engine; nobody goes on with a state that is long past."""

    async def app() -> None:
        engine = alone(tmp_path)
        await engine.__aenter__()
        await engine.wait_ready(PATIENT_S)
        topic = engine._embedded.notifications._leadership

        def fail(_: Leadership) -> None:
            monkeypatch.undo()
            raise KeyError("a bug")

        monkeypatch.setattr(topic, "publish", fail)
        engine._embedded.node._leaders.publish({})  # as if the leader were another one
        reason = await engine.wait_closed()
        assert reason is not None
        assert "notifications died of KeyError" in reason.message
        with pytest.raises(EngineClosed):
            await engine.__aexit__(None, None, None)

    on(uvloop.new_event_loop, app)
