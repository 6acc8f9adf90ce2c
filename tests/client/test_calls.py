"""What the calls of the client take and return, over real sockets and in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import closing

import orjson
import pytest

from dengine.client import (
    Client,
    Compare,
    Delete,
    DeleteRange,
    Get,
    Item,
    LeaseInfo,
    Put,
    PutResult,
    Value,
    calls,
    transport,
)
from dengine.client.encoding import field_bytes
from dengine.errors import (
    DengineError,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    RequestTimeout,
    TooLarge,
    Unauthorized,
)
from tests.client.fake_server import FakeCluster, fake_cluster
from tests.client.virtual import run

KEYS = [
    b"greeting", b"a/b c+d%", b"\xff\xfe", "ключ".encode(), b".", b"..", b"a/../b", b"//", b"a/",
    b"\x00", b"#?&=", b"x" * 511,
]  # fmt: skip


def test_every_key_and_value_comes_back_as_it_was() -> None:
    """Slashes, blanks, dots, bytes that are no text, the empty value: nothing is lost or folded."""

    async def scenario() -> None:
        async with fake_cluster(1) as cluster, Client(cluster.endpoints) as client:
            for number, key in enumerate(KEYS):
                value = bytes([number, 0, 255]) if number else b""
                await client.put(key, value)
                assert cluster.state.keys[key].value == value
                found = await client.get(key)
                assert found is not None
                assert (found.key, found.value) == (key, value)
            listed = await client.list().all()
            assert [item.key for item in listed] == sorted(KEYS)
            for key in KEYS:
                assert (await client.delete(key)).deleted == 1
            assert cluster.state.keys == {}

    run(scenario())


def test_what_a_put_and_a_get_tell() -> None:
    async def scenario() -> None:
        async with fake_cluster(1) as cluster, Client(cluster.endpoints[0]) as client:
            assert await client.put("k", b"1") == PutResult(1, created=True)
            assert await client.put(b"k", b"2", ttl_s=60) == PutResult(2, created=False)
            await client.put("other", b"x")
            assert await client.get("k") == Value(b"k", b"2", 2, 3, 60.0)
            assert await client.get("absent") is None
            [item] = await client.list("k").all()
            assert item == Item(b"k", b"2", 2, 1, 2, 60.0, None)

    run(scenario())


def test_conditions() -> None:
    """A write whose condition does not hold changes nothing, and says what is there instead."""

    async def scenario() -> None:
        async with fake_cluster(1) as cluster, Client(cluster.endpoints) as client:
            first = await client.put("k", b"1", if_none_match=True)
            with pytest.raises(PreconditionFailed) as refused:
                await client.put("k", b"2", if_none_match=True)
            assert refused.value.details["current_revision"] == first.revision
            assert refused.value.outcome == "none"
            second = await client.put("k", b"2", if_match=first.revision)
            with pytest.raises(PreconditionFailed):
                await client.put("k", b"3", if_match=[first.revision, 99])
            await client.put("k", b"3", if_match=[first.revision, second.revision])
            await client.put("k", b"4", if_match="*")
            with pytest.raises(PreconditionFailed):
                await client.delete("k", if_match=second.revision)
            assert (await client.delete("k", if_match="*")).deleted == 1
            with pytest.raises(PreconditionFailed) as absent:
                await client.put("k", b"5", if_match="*")
            assert absent.value.details["current_revision"] is None

    run(scenario())


def test_a_listing_follows_its_pages() -> None:
    """Any number of keys, also where limits.page is smaller than what is asked for."""

    async def scenario() -> None:
        async with fake_cluster(3, page=7) as cluster, Client(cluster.endpoints) as client:
            for number in range(40):
                await client.put(f"n/{number:02d}", b"%d" % number)
            await client.put("other", b"")
            names = [f"n/{number:02d}".encode() for number in range(40)]
            assert [item.key async for item in client.list("n/")] == names
            assert [i.key for i in await client.list("n/", limit=20).all()] == names[:20]
            some = await client.list(start="n/05", end=b"n/09", keys_only=True).all()
            assert [(i.key, i.value) for i in some] == [(name, b"") for name in names[5:9]]
            pages = [page async for page in client.list("n/").pages()]
            assert [len(page.items) for page in pages] == [7] * 5 + [5]
            assert all(page.revision == 41 for page in pages)
            assert await client.count("n/") == 40
            assert await client.count() == 41
            assert await client.list("absent/").all() == []

    run(scenario())


def test_ranges_are_deleted_only_when_they_are_named() -> None:
    async def scenario() -> None:
        async with fake_cluster(1) as cluster, Client(cluster.endpoints) as client:
            for name in ("a/1", "a/2", "b/1", "c"):
                await client.put(name, b"")
            assert (await client.delete(prefix="a/")).deleted == 2
            assert (await client.delete(start="b", end="c")).deleted == 1
            with pytest.raises(ValueError, match="a key, or a prefix"):
                await client.delete()
            with pytest.raises(InvalidRequest):
                await client.delete(prefix="")
            assert (await client.delete(prefix="", all=True)).deleted == 1

    run(scenario())


def test_transactions() -> None:
    """One branch as one change; later operations see earlier ones; bytes survive the JSON."""

    async def scenario() -> None:
        async with fake_cluster(1) as cluster, Client(cluster.endpoints) as client:
            absent = Compare("a", "exists", "=", False)
            done = await client.txn(
                [absent], [Put("a", b"\xff"), Put(b"\xfe", b"2", ttl_s=9), Get("a")], [Get("a")]
            )
            assert (done.succeeded, done.revision) == (True, 1)
            assert [result.created for result in done.results[:2]] == [True, True]
            item = done.results[2].item
            assert item is not None
            assert (item.value, item.create_revision, item.version) == (b"\xff", 1, 1)
            assert cluster.state.keys[b"\xfe"].expires is not None
            again = await client.txn([absent], [Put("a", b"")], [Get("a"), Get("none")])
            assert (again.succeeded, again.revision) == (False, 1)
            assert [result.item is None for result in again.results] == [False, True]
            same = [
                Compare("a", "value", "=", b"\xff"),
                Compare("a", "mod_revision", "=", 1),
                Compare("none", "version", "=", 0),
            ]
            last = await client.txn(same, [Delete("a"), DeleteRange(prefix=b"\xfe"), Delete("a")])
            assert [result.deleted for result in last.results] == [1, 1, 0]
            assert cluster.state.keys == {}

    run(scenario())


@pytest.mark.parametrize(
    "value",
    [
        b"\0" * 400_000,
        b'"' * 400_000,
        b"a\n\x1f" * 100_000,
        b"\xff" * 400_000,
        b'{"a": 1}' * 9,
        b"",
    ],
)
def test_a_transaction_is_hardly_larger_than_its_values(value: bytes) -> None:
    """Their JSON is what a node measures: NULs as strings would take six bytes each."""
    sent = Put("k", value).to_json()
    assert field_bytes(sent, "value") == value
    assert len(orjson.dumps(sent)) < 1.4 * len(value) + 60
    compared = Compare("k", "value", "=", value).to_json()
    assert len(orjson.dumps(compared)) < 1.4 * len(value) + 80


def test_text_stays_text_in_a_transaction() -> None:
    for text in ('{"host": "a", "port": 1}', "two\nlines\n", "ключ", "\x1b", '"'):
        assert Put(text, text.encode()).to_json() == {"op": "put", "key": text, "value": text}


def test_leases_by_hand() -> None:
    async def scenario() -> None:
        async with fake_cluster(1) as cluster, Client(cluster.endpoints) as client:
            granted = await client.grant_lease(30)
            assert granted.ttl_s == 30
            await client.put("k", b"v", lease=granted.id)
            await asyncio.sleep(20)
            assert (await client.keepalive_lease(granted.id)).ttl_s == 30
            await asyncio.sleep(20)
            info = await client.lease_info(granted.id)
            assert info == LeaseInfo(granted.id, 30.0, info.remaining_s, (b"k",))
            assert info.remaining_s is not None
            assert 9 < info.remaining_s <= 10
            await client.revoke_lease(granted.id)
            assert cluster.state.keys == {}
            for call in (client.keepalive_lease, client.revoke_lease, client.lease_info):
                with pytest.raises(NotFound):
                    await call(granted.id)
            with pytest.raises(NotFound):
                await client.put("k", b"v", lease=granted.id)

    run(scenario())


def test_the_consistency_that_was_asked_for() -> None:
    """A level goes out with the request, and an eventual read is spread over the nodes."""

    async def scenario() -> None:
        async with fake_cluster(3) as cluster, Client(cluster.endpoints) as client:
            await client.put("k", b"v")
            for level in ("linearizable", "lease", "eventual"):
                await client.get("k", consistency=level)  # type: ignore[arg-type]
                await client.list("k", consistency=level).all()  # type: ignore[arg-type]
                targets = [asked.target for asked in cluster.asked]
                assert sum(f"consistency={level}" in target for target in targets) == 2
            before = [len(node.asked) for node in cluster.nodes]
            for _ in range(12):
                await client.get("k", consistency="eventual")
            counts = [len(n.asked) - b for n, b in zip(cluster.nodes, before, strict=True)]
            assert all(count >= 3 for count in counts), counts

    run(scenario())


def test_refusals_reach_the_caller_as_they_are() -> None:
    """What no node will ever answer differently is told at once, by one node."""

    async def scenario() -> None:
        async with fake_cluster(3) as cluster, Client(cluster.endpoints) as client:
            for key, error in ((b"", InvalidRequest), (b"x" * 512, TooLarge)):
                with pytest.raises(error) as refused:
                    await client.put(key, b"")
                assert refused.value.outcome == "none"
            cluster.authorization = "Bearer right"
            with pytest.raises(Unauthorized):
                await client.get("k")
            assert len([a for a in cluster.asked if a.path.startswith("/v1/kv")]) == 3
            async with Client(cluster.endpoints, token="right") as holder:
                assert await holder.get("k") is None

    run(scenario())


def test_a_stranger_is_not_believed() -> None:
    """What answers in another form is named, and a write that it took has an unknown outcome."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
            await writer.drain()

    async def scenario() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Client(f"127.0.0.1:{port}") as client:
            with pytest.raises(DengineError, match="is that a dengine node") as refused:
                await client.put("k", b"v")
            assert refused.value.outcome == "unknown"
            with pytest.raises(DengineError, match="is that a dengine node"):
                await client.get("k")

    run(scenario())


@pytest.mark.parametrize("wrong", ["", "ftp://x:1", "a b:1", "x:99999", "x:1/path", "http://"])
def test_endpoints_are_checked_when_they_are_given(wrong: str) -> None:
    with pytest.raises(ValueError, match="is not an endpoint"):
        Client([wrong])
    with pytest.raises(ValueError, match="at least one endpoint"):
        Client([])


def test_wrong_arguments_are_told_before_anything_is_sent() -> None:
    async def scenario() -> None:
        cluster = FakeCluster(1)
        await cluster.start()
        async with Client(cluster.endpoints) as client:
            with pytest.raises(TypeError, match="a value is bytes"):
                await client.put("k", "text")  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="a key is str or bytes"):
                await client.get(7)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="ttl_s is a whole number"):
                await client.put("k", b"", ttl_s=1.5)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="ttl_s is at least 1"):
                await client.put("k", b"", ttl_s=0)
            with pytest.raises(ValueError, match="ttl_s or with a lease"):
                await client.put("k", b"", ttl_s=1, lease="x")
            with pytest.raises(ValueError, match="a key or a prefix"):
                client.watch()
            with pytest.raises(ValueError, match="a prefix, or start and end"):
                client.list("a", start="b")
            with pytest.raises(ValueError, match="a name has 1 to 400 bytes"):
                client.lock("")
        assert cluster.asked == []
        await cluster.stop()

    run(scenario())


def test_an_iterator_of_operations_is_one_transaction_under_one_key() -> None:
    """It gives its items only once, and a transaction of none of them would be a read."""

    async def scenario() -> None:
        async with fake_cluster(1) as cluster, Client(cluster.endpoints) as client:
            cluster.nodes[0].drop_replies = 1
            puts = (Put(f"k{n}", b"v") for n in range(2))
            done = await client.txn(iter([]), puts)  # type: ignore[arg-type]
            assert len(done.results) == 2
            keys = [a.headers["Idempotency-Key"] for a in cluster.asked if a.path == "/v1/txn"]
            assert len(keys) == 2
            assert len(set(keys)) == 1

    run(scenario())


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it, for a hundred virtual seconds at most."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited in vain")


def test_streams_take_no_connection_from_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watches are open for long; were they counted, the last of many would keep out all calls."""
    monkeypatch.setattr(transport, "CONNECTIONS", 4)

    async def scenario() -> None:
        async with fake_cluster(3) as cluster, Client(cluster.endpoints) as client:
            watches = [asyncio.create_task(anext(client.watch("k"))) for _ in range(20)]
            await until(lambda: sum(node.streams for node in cluster.nodes) == len(watches))
            await client.put("k", b"v", timeout_s=5)
            changes = await asyncio.wait_for(asyncio.gather(*watches), 5)
            assert {change.events[0].value for change in changes} == {b"v"}

    run(scenario())


def test_what_waits_for_a_connection_did_not_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "CONNECTIONS", 1)

    async def scenario() -> None:
        async with fake_cluster(1) as cluster, Client(cluster.endpoints) as client:
            [node] = cluster.nodes
            node.hang()
            first = asyncio.create_task(client.put("a", b"", timeout_s=10))
            await until(lambda: bool(node.writes()))
            with pytest.raises(DengineError) as told:
                await client.put("b", b"", timeout_s=1)
            assert told.value.outcome == "none"
            node.heal()
            await first
            await asyncio.sleep(5)
            assert sorted(cluster.state.keys) == [b"a"]

    run(scenario())


def test_reads_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ever so many at once keep no write waiting."""
    monkeypatch.setattr(transport, "CONNECTIONS", 4)
    monkeypatch.setattr(calls, "READS_AT_ONCE", 2)

    async def scenario() -> None:
        async with fake_cluster(1) as cluster, Client(cluster.endpoints) as client:
            [node] = cluster.nodes
            node.delay_s = 1.0
            reads = [asyncio.create_task(client.get("k", timeout_s=60)) for _ in range(20)]
            await asyncio.sleep(0.5)
            await client.put("k", b"v", timeout_s=2)
            await asyncio.gather(*reads)

    run(scenario())


def test_a_transaction_that_only_reads_has_no_key() -> None:
    """Under a key it could read no more than what is remembered. It is repeated as a read is."""

    async def scenario() -> None:
        async with fake_cluster(3) as cluster, Client(cluster.endpoints) as client:
            await client.put("k", b"v")
            for node in cluster.nodes[:2]:
                node.drop_replies = 1
            holds = Compare("k", "exists", "=", True)
            done = await client.txn([holds], [Get("k")], [Get("other")])
            assert [r.item.value for r in done.results if r.item] == [b"v"]
            for node in cluster.nodes:
                node.heal()
            await client.txn(success=[Get("k"), Put("k", b"w")])
            await client.txn(success=[Get("k")], idempotency_key="mine")
            asked = [a for a in cluster.asked if a.path == "/v1/txn"]
            reads = [a for a in asked if b'"put"' not in a.body]
            keys = [a.headers.get("Idempotency-Key") for a in reads]
            assert set(keys) == {None, "mine"}
            assert keys.count("mine") == 1
            assert all("Idempotency-Key" in a.headers for a in asked if a not in reads)

    run(scenario())


def test_a_time_limit_that_leaves_no_time_is_told_as_one() -> None:
    """By every call, and nothing is asked: who has counted down to it gets the error of every other
    late call.
    """

    async def scenario() -> None:
        async with fake_cluster(1) as cluster, Client(cluster.endpoints) as client:
            await refused(cluster, client)

    async def refused(cluster: FakeCluster, client: Client) -> None:
        for limit_s in (0, -1):
            for call in (
                lambda limit_s: client.put("k", b"", timeout_s=limit_s),
                lambda limit_s: client.get("k", timeout_s=limit_s),
                lambda limit_s: client.keepalive_lease("1", timeout_s=limit_s),
                lambda limit_s: client.revoke_lease("1", timeout_s=limit_s),
            ):
                with pytest.raises(RequestTimeout, match=f"timeout_s is {limit_s}, which") as late:
                    await call(limit_s)
                assert late.value.outcome == "none"
        async with Client(cluster.endpoints, timeout_s=0) as hasty:
            with pytest.raises(RequestTimeout, match="timeout_s is 0, which"):
                await hasty.get("k")
            with pytest.raises(RequestTimeout, match="timeout_s is 0, which"):
                await anext(hasty.watch("k"))
        assert cluster.asked == []

    run(scenario())
