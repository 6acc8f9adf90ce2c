"""Watches that lose nothing, repeat nothing, and outlive their nodes."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Awaitable, Callable, Iterator

import hypothesis
import pytest
from hypothesis import strategies as st

from dengine.client import Change, Client, ClientClosed, Event, Put
from dengine.client.watching import QUIET_S, Message, Parser, Watch, _Course
from dengine.errors import (
    Compacted,
    DengineError,
    InvalidRequest,
    RequestTimeout,
    WatchOverflow,
)
from tests.client.fake_server import FakeCluster, FakeNode, fake_cluster
from tests.client.fake_state import Asked
from tests.client.seeds import each_seed, seed_of
from tests.client.virtual import run

pytestmark = pytest.mark.timeout(600)  # virtual time is quick, a busy machine is not
Scenario = Callable[[FakeCluster, Client], Awaitable[None]]


def over(scenario: Scenario, size: int = 3, limit_s: float = 600.0) -> None:
    async def prepared() -> None:
        async with fake_cluster(size) as cluster, Client(cluster.endpoints) as client:
            await client.put("met", b"")
            await asyncio.sleep(0.1)
            await scenario(cluster, client)

    run(prepared(), limit_s)


def streaming(cluster: FakeCluster) -> FakeNode:
    """The node that serves the only stream."""
    [node] = [node for node in cluster.nodes if node.streams]
    return node


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it, for a thousand seconds at most, virtual ones in most tests."""
    for _ in range(20_000):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("waited in vain")


async def take(watch: Watch, count: int) -> list[Change]:
    return [await anext(watch) for _ in range(count)]


def test_what_happens_is_told_as_it_happened() -> None:
    """One change for each revision, with keys and values as bytes, also of a transaction."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.watch(prefix=b"a/", prev=True) as watch:
            await client.put("a/1", b"\xff")
            await client.put("b/1", b"not ours")
            await client.txn(success=[Put("a/1", b"2"), Put(b"a/\xfe", b""), Put("b/1", b"")])
            await client.delete(prefix="a/1")
            await client.put("a/2", b"gone", ttl_s=5)
            assert await take(watch, 5) == [
                Change(2, (Event("put", b"a/1", b"\xff", None, True),)),
                Change(
                    4,
                    (
                        Event("put", b"a/1", b"2", b"\xff"),
                        Event("put", b"a/\xfe", b"", None, created=True),
                    ),
                ),
                Change(5, (Event("delete", b"a/1", None, b"2"),)),
                Change(6, (Event("put", b"a/2", b"gone", None, True),)),
                Change(7, (Event("expire", b"a/2", None, b"gone"),)),
            ]
            assert watch.revision == 7

    over(scenario)


def test_the_past_is_told_first() -> None:
    """`from_revision` is the first revision of interest, whatever the node has applied by now."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for number in range(2, 12):
            await client.put("k", b"%d" % number)
        watch = client.watch("k", from_revision=5)
        assert [c.revision for c in await take(watch, 7)] == list(range(5, 12))
        await client.put("k", b"12")
        assert (await anext(watch)).revision == 12
        await watch.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(watch)

    over(scenario)


def test_it_begins_when_it_is_entered() -> None:
    """Nothing that happens after that is missed, even when the first node never answers."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes[1:]:
            node.refuse = _hang_watches(node)
        async with client.watch("k") as watch:
            await client.put("k", b"1")
            for node in cluster.nodes[1:]:
                node.heal()
            assert (await anext(watch)).events[0].value == b"1"

    over(scenario)


def _hang_watches(node: FakeNode) -> Callable[[Asked], DengineError | None]:
    def refuse(asked: Asked) -> DengineError | None:
        return WatchOverflow("too many watchers") if asked.path == "/v1/watch" else None

    return refuse


def test_followers_serve_streams() -> None:
    """The leader has enough to do."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        watches = [client.watch(f"k{n}") for n in range(6)]
        readers = [asyncio.create_task(anext(watch)) for watch in watches]
        await until(lambda: sum(node.streams for node in cluster.nodes) == 6)
        assert cluster.nodes[0].streams == 0
        assert all(node.streams >= 2 for node in cluster.nodes[1:])
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        for watch in watches:
            await watch.aclose()
        await until(lambda: sum(node.streams for node in cluster.nodes) == 0)

    over(scenario)


@pytest.mark.parametrize("fault", ["dead", "hung", "cut off", "cancelled", "closed"])
def test_it_goes_on_elsewhere(fault: str) -> None:
    """The node of the stream fails, quietly or not: no change is lost, none comes twice."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.watch("k") as watch:
            await client.put("k", b"first")
            assert (await anext(watch)).events[0].value == b"first"
            for number in range(3):
                bad = streaming(cluster)
                reading = asyncio.create_task(take(watch, 2))
                await asyncio.sleep(0.1)
                if fault == "dead":
                    await bad.kill()
                elif fault == "hung":
                    bad.hang()
                elif fault == "cut off":
                    bad.partitioned = True
                elif fault == "cancelled":
                    bad.cancel_streams = True
                else:
                    bad.cut_after = 0
                began = asyncio.get_running_loop().time()
                await client.put("k", b"%d a" % number)
                await client.put("k", b"%d b" % number)
                values = [change.events[0].value for change in await reading]
                assert values == [b"%d a" % number, b"%d b" % number]
                assert asyncio.get_running_loop().time() - began < QUIET_S + 4
                if fault == "dead":
                    await bad.start()
                bad.heal()

    over(scenario)


def test_an_idle_watch_stays_where_it_is() -> None:
    """Silence alone is no reason to leave: the node is asked whether it is well, and it is."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.watch("k") as watch:
            reading = asyncio.create_task(anext(watch))
            await asyncio.sleep(120)
            streams = [a for a in cluster.asked if a.path == "/v1/watch"]
            assert len(streams) == 1
            probes = [a for a in cluster.asked if a.path == "/readyz"]
            assert len(probes) <= 120 / QUIET_S + 1
            await client.put("k", b"")
            assert (await reading).revision == 2

    over(scenario)


def test_an_outage_of_everything_is_survived() -> None:
    """All nodes die and come back a minute later; the watch asks for what it has not seen."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.watch("k") as watch:
            await client.put("k", b"1")
            await anext(watch)
            reading = asyncio.create_task(anext(watch))
            for node in cluster.nodes:
                await node.kill()
            await asyncio.sleep(60)
            assert not reading.done()
            for node in cluster.nodes:
                node.asked.clear()
                await node.start()
                node.heal()
            put = await client.put("k", b"2")
            assert (await reading).revision == put.revision
            asked = [a for a in cluster.asked if a.path == "/v1/watch"]
            assert {a.query["from_revision"] for a in asked} == {b"3"}

    over(scenario)


def test_a_cut_at_any_byte_loses_nothing() -> None:
    """The stream ends in the middle of a message, of a line, of a letter: the next one goes on."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for number in range(2, 5):
            await client.put("k", "дом".encode() + b"%d" % number)
        whole = 600  # more than what three changes take
        for at in range(0, whole, 7):
            for node in cluster.nodes:
                node.cut_after = at
            watch = client.watch("k", from_revision=2)
            changes = await take(watch, 3)
            assert [change.revision for change in changes] == [2, 3, 4], at
            values = [change.events[0].value for change in changes]
            assert values == ["дом".encode() + b"%d" % n for n in range(2, 5)], at
            await watch.aclose()
            for node in cluster.nodes:
                node.heal()

    over(scenario, limit_s=6000.0)


def test_compacted_says_from_where_to_go_on() -> None:
    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for number in range(10):
            await client.put("k", b"%d" % number)
        cluster.state.compact(8)
        watch = client.watch("k", from_revision=3)
        with pytest.raises(Compacted) as failed:
            await anext(watch)
        assert failed.value.details["compact_revision"] == 7
        async with client.watch("k", from_revision=8) as kept:
            assert (await anext(kept)).revision == 8

    over(scenario)


def test_a_quiet_watch_is_not_compacted() -> None:
    """Progress messages move the place to resume from, though nothing of ours has happened."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.watch("mine") as watch:
            reading = asyncio.create_task(anext(watch))
            for _ in range(20):
                await client.put("other", b"")
                await asyncio.sleep(2)
            assert watch.revision >= 19
            cluster.state.compact(18)
            await streaming(cluster).kill()
            await client.put("mine", b"1")
            assert (await reading).events[0].value == b"1"

    over(scenario)


def test_a_node_that_has_enough_watchers_is_passed_by() -> None:
    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes[:2]:
            node.refuse = _hang_watches(node)
        async with client.watch("k") as watch:
            await client.put("k", b"1")
            assert (await anext(watch)).revision == 2
            assert cluster.nodes[2].streams == 1

    over(scenario)


def test_what_no_node_will_answer_ends_it() -> None:
    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes:
            node.refuse = lambda asked: InvalidRequest("no") if asked.path == "/v1/watch" else None
        watch = client.watch("k")
        with pytest.raises(InvalidRequest):
            await anext(watch)
        with pytest.raises(StopAsyncIteration):
            await anext(watch)

    over(scenario)


def test_a_timeout_of_the_caller_loses_nothing() -> None:
    """Waiting for a change with a limit is common; the next call goes on."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.watch("k") as watch:
            for number in range(5):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await anext(watch)
                await client.put("k", b"%d" % number)
                assert (await anext(watch)).events[0].value == b"%d" % number

    over(scenario)


def test_closing_while_a_stream_begins_leaves_none_open() -> None:
    async def scenario(cluster: FakeCluster, client: Client) -> None:
        await client.put("k", b"")
        for node in cluster.nodes:
            node.delay_s = 1.0
        watch = client.watch("k", from_revision=1)
        reading = asyncio.create_task(anext(watch, None))
        await asyncio.sleep(0.5)
        await watch.aclose()
        assert await reading is None
        await until(lambda: not any(node.streams for node in cluster.nodes))
        await asyncio.sleep(2)
        assert not any(node.streams for node in cluster.nodes)

    over(scenario)


def test_closing_wakes_who_waits() -> None:
    """`aclose` from another task ends the iteration; closing the client says so."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        watch = client.watch("k")

        async def all_of_it() -> list[Change]:
            return [change async for change in watch]

        reading = asyncio.create_task(all_of_it())
        await until(lambda: sum(node.streams for node in cluster.nodes) == 1)
        await client.put("k", b"1")
        await asyncio.sleep(0.1)
        await watch.aclose()
        assert [change.revision for change in await reading] == [2]
        other = asyncio.create_task(anext(client.watch("k")))
        await until(lambda: sum(node.streams for node in cluster.nodes) == 1)
        await client.close()
        with pytest.raises(ClientClosed):
            await other

    over(scenario)


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What asyncio says of connections and generators that nobody has closed."""
    return [record.getMessage() for record in caplog.records if record.name == "asyncio"]


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without what the collector of cycles does in its own time."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
def test_leaving_the_loop_over_a_watch_ends_its_stream(caplog: pytest.LogCaptureFixture) -> None:
    """As the example of `Client.watch` does: at once, and asyncio has nothing to complain of."""

    async def app() -> None:
        async with fake_cluster(1) as cluster, Client(cluster.endpoints) as client:
            put = await client.put("k", b"1")
            for _ in range(10):
                async for change in client.watch("k", from_revision=put.revision):
                    assert change.revision == put.revision
                    break
            await until(lambda: cluster.nodes[0].streams == 0)

    asyncio.run(asyncio.wait_for(app(), 60))
    gc.collect()
    assert complaints(caplog) == []


@pytest.mark.parametrize("held", [False, True])
def test_a_client_that_is_closed_closes_its_watches(
    held: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Right behind a loop that was left, and where somebody still has the watch."""
    watches: list[Watch] = []

    async def app() -> None:
        async with fake_cluster(1) as cluster:
            for _ in range(10):
                async with Client(cluster.endpoints) as client:
                    put = await client.put("k", b"1")
                    watch = client.watch("k", from_revision=put.revision)
                    await anext(watch)
                    if held:
                        watches.append(watch)
                    del watch
                gc.collect()
            await until(lambda: cluster.nodes[0].streams == 0)

    asyncio.run(asyncio.wait_for(app(), 60))
    watches.clear()
    gc.collect()
    assert complaints(caplog) == []


def test_a_watch_that_a_thread_drops_ends_its_stream() -> None:
    async def app() -> None:
        async with fake_cluster(1) as cluster, Client(cluster.endpoints) as client:
            put = await client.put("k", b"1")
            watches = [client.watch("k", from_revision=put.revision)]
            await anext(watches[0])
            await asyncio.to_thread(watches.clear)
            await until(lambda: cluster.nodes[0].streams == 0)

    asyncio.run(asyncio.wait_for(app(), 60))


@each_seed
def test_a_watch_under_any_faults_tells_the_history(chosen: int | None) -> None:
    """Whatever the nodes do, the watch delivers exactly what the state went through, in order."""
    seed = seed_of(chosen)

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        rng = random.Random(seed)
        state = cluster.state

        async def write() -> None:
            for number in range(40):
                await asyncio.sleep(rng.uniform(0.0, 0.5))
                key = rng.choice([b"w/a", b"w/b", b"other"])
                state._change({key: state._record(b"%d" % number, {})} if rng.random() < 0.8
                              else {key: None})  # fmt: skip
            state._change({b"w/end": state._record(b"", {})})

        async def torment() -> None:
            while True:
                await asyncio.sleep(rng.uniform(0.0, 2.0))
                node = rng.choice(cluster.nodes)
                node.heal()
                fault = rng.randrange(5)
                if fault == 0:
                    node.hang()
                elif fault == 1:
                    node.partitioned = True
                elif fault == 2:
                    node.cut_after = rng.randrange(400)
                elif fault == 3:
                    node.cancel_streams = True

        first = state.revision + 1
        seen: list[tuple[int, tuple[bytes, ...]]] = []
        watch = client.watch(prefix="w/", from_revision=first)
        tormentor = asyncio.create_task(torment())
        writer = asyncio.create_task(write())
        async for change in watch:
            seen.append((change.revision, tuple(event.key for event in change.events)))
            if change.events[-1].key == b"w/end":
                break
        await watch.aclose()
        tormentor.cancel()
        await writer
        expected = [
            (revision, tuple(event.key for event in events))
            for revision, events in state.changes(first, lambda key: key.startswith(b"w/"))
        ]
        assert seen == expected

    over(scenario, limit_s=3000.0)


# --- the format


@hypothesis.given(
    st.lists(st.tuples(st.sampled_from(["change", "progress", "message"]), st.binary(max_size=40))),
    st.sampled_from([b"\n", b"\r\n"]),
    st.data(),
)
@hypothesis.settings(max_examples=50)
def test_messages_arrive_however_they_are_cut(
    wanted: list[tuple[str, bytes]], newline: bytes, data: st.DataObject
) -> None:
    """Chunks are where the network cuts them, and mean nothing."""
    sent = [(event, text.replace(b"\r", b"").replace(b"\n", b"")) for event, text in wanted]
    stream = b": comment" + newline * 2
    for event, text in sent:
        stream += b"event: %b%bid: 7%bdata: %b" % (event.encode(), newline, newline, text)
        stream += newline * 2
    parser, found, rest = Parser(), [], stream
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        found += parser.feed(rest[:size])
        rest = rest[size:]
    assert found == [Message(event, text) for event, text in sent]


def test_half_a_message_is_none() -> None:
    parser = Parser()
    assert parser.feed(b'event: change\ndata: {"revision":1}\n') == []
    assert parser.feed(b"\n") == [Message("change", b'{"revision":1}')]


def test_a_node_that_ends_a_watch_for_good_says_so() -> None:
    """Its state was wrong: to resume where we are could miss what it has not told."""
    course = _Course.__new__(_Course)
    course._placed = True
    data = b'{"reason":"the state of this node is wrong","compact_revision":7}'
    with pytest.raises(Compacted, match="is wrong") as refused:
        course._take(Message("cancelled", data))
    assert refused.value.details == {"compact_revision": 7}


def test_it_begins_where_its_first_stream_does() -> None:
    """Once it is entered a node follows for it: that the cluster forgets at once what has happened
    is no hindrance.
    """

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.watch("k") as watch:
            put = await client.put("k", b"1")
            cluster.state.compact(put.revision + 1)
            assert (await anext(watch)).revision == put.revision

    over(scenario)


@pytest.mark.parametrize("cut_after", [0, 7, 30])
def test_a_stream_that_breaks_before_its_first_word_is_none(cut_after: int) -> None:
    """It has not begun, so it is opened anew; once it is entered, nothing is missed."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes[1:]:
            node.cut_after = cut_after
        async with client.watch("k") as watch:
            assert watch.revision == cluster.state.revision
            await client.put("k", b"1")
            assert (await anext(watch)).events[0].value == b"1"

    over(scenario)


def test_a_watch_that_cannot_begin_says_why() -> None:
    """In the time that every call has, with nothing open; and it can still begin later."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes:
            node.refuse = lambda asked: WatchOverflow("full") if "watch" in asked.path else None
        watch, began = client.watch("k"), asyncio.get_running_loop().time()
        with pytest.raises(WatchOverflow, match="full") as refused:
            await anext(watch)
        assert refused.value.outcome == "none"
        for node in cluster.nodes:
            node.heal()
            node.hang()
        with pytest.raises(RequestTimeout, match=r"has not begun within 10 s .*: timed out"):
            await watch.__aenter__()
        assert asyncio.get_running_loop().time() - began < 21
        for node in cluster.nodes:
            node.heal()
        async with watch:
            await client.put("k", b"1")
            assert (await anext(watch)).events[0].value == b"1"

    over(scenario)


def test_a_watch_has_one_reader_at_a_time() -> None:
    """The second one is told so, in the words of an engine, and the first goes on waiting."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.watch("k") as watch:
            first, second = (asyncio.create_task(anext(watch)) for _ in range(2))
            with pytest.raises(RuntimeError, match="another task waits in this watch"):
                await second
            await client.put("k", b"1")
            assert (await first).events[0].value == b"1"

    over(scenario)
