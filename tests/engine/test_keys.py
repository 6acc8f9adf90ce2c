"""What an app does with keys: the results of the client library, and certainty about each write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

import dengine
from dengine.client import Client, Compare, Delete, DeleteRange, Get, LockLost, Put, sync
from dengine.client.types import (
    DeleteResult,
    Item,
    OperationResult,
    PutResult,
    TxnResult,
    Value,
)
from dengine.errors import (
    ClusterUnavailable,
    IdempotencyMismatch,
    InvalidRequest,
    LeaderChanged,
    NotFound,
    PreconditionFailed,
    RequestTimeout,
    StaleRequest,
    TooLarge,
)
from dengine.kv.commands import ConditionFailed, Result, Stale
from tests.engine.apps import PATIENT_S, alone, on

App = Callable[[dengine.Engine], Coroutine[Any, Any, None]]


def used(directory: Path, app: App, **settings: int | str) -> None:
    """Run `app` with an engine that is ready."""

    async def entered() -> None:
        async with alone(directory, **settings) as engine:
            await engine.wait_ready(PATIENT_S)
            await app(engine)

    on(uvloop.new_event_loop, entered)


def test_conditions(tmp_path: Path) -> None:
    async def app(engine: dengine.Engine) -> None:
        assert await engine.put("k", b"1", if_none_match=True) == PutResult(1, True)
        with pytest.raises(PreconditionFailed) as caught:
            await engine.put("k", b"2", if_none_match=True)
        assert (caught.value.outcome, caught.value.details) == ("none", {"current_revision": 1})
        assert await engine.put(b"k", b"2", if_match=1) == PutResult(2, False)
        assert await engine.put("k", b"3", if_match=[1, 2]) == PutResult(3, False)
        with pytest.raises(PreconditionFailed):
            await engine.put("none", b"", if_match="*")
        with pytest.raises(PreconditionFailed):
            await engine.delete("k", if_match=2)
        for never in (0, -1, 2**63, -(2**64), [1, 2**70]):
            with pytest.raises(PreconditionFailed):
                await engine.put("k", b"4", if_match=never)
        assert await engine.delete("k", if_match=3) == DeleteResult(4, 1)

    used(tmp_path, app)


def test_ranges(tmp_path: Path) -> None:
    """Listings in pages, counts and deletions, by prefix and by bounds."""

    async def app(engine: dengine.Engine) -> None:
        for n in range(7):
            await engine.put(f"a/{n}", b"%d" % n)
        await engine.put("b", b"last")
        items = await engine.list("a/").all()
        assert [item.key for item in items] == [b"a/%d" % n for n in range(7)]
        assert items[0] == Item(b"a/0", b"0", 1, 1, 1, None, None)
        pages = [page async for page in engine.list("a/").pages()]
        assert [len(page.items) for page in pages] == [3, 3, 1]
        assert {page.revision for page in pages} == {8}
        assert len(await engine.list(limit=5).all()) == 5
        assert [i.value for i in await engine.list(start="a/6", keys_only=True).all()] == [b"", b""]
        assert [i.key for i in await engine.list(start="a/2", end="a/4").all()] == [b"a/2", b"a/3"]
        assert (await engine.count("a/"), await engine.count()) == (7, 8)
        assert await engine.delete(start="a/0", end="a/2") == DeleteResult(9, 2)
        with pytest.raises(TooLarge, match="more than 4 keys match"):
            await engine.delete(prefix="a/")
        with pytest.raises(InvalidRequest, match="delete every key"):
            await engine.delete(prefix="")
        with pytest.raises(ValueError, match="takes a key"):
            await engine.delete()
        assert await engine.count() == 6
        await engine.delete(prefix="a/2")
        await engine.delete(prefix="a/3")
        assert (await engine.delete(all=True)).deleted == 4

    used(tmp_path, app, limits__page=3, limits__range_delete=4)


def test_transactions(tmp_path: Path) -> None:
    """Both branches, every operation, and what each came to."""

    async def app(engine: dengine.Engine) -> None:
        await engine.put("n", b"1")
        done = await engine.txn(
            [Compare("n", "value", "=", b"1"), Compare("m", "exists", "=", False)],
            success=[Put("n", b"2"), Get("n"), Get("m"), Delete("m"), DeleteRange("n")],
        )
        item = Item(b"n", b"2", 2, 1, 2, None, None)
        assert done == TxnResult(
            2,
            True,
            (
                OperationResult("put", created=False),
                OperationResult("get", item=item),
                OperationResult("get"),
                OperationResult("delete", deleted=0),
                OperationResult("delete_range", deleted=1),
            ),
        )
        other = await engine.txn([Compare("n", "version", ">", 0)], [], [Put("n", b"3")])
        assert (other.succeeded, other.results) == (False, (OperationResult("put", created=True),))
        for wrong in (
            engine.txn([Compare("n", "size", "=", 1)]),  # type: ignore[arg-type]
            engine.txn([Compare("n", "exists", "<", True)]),
            engine.txn([Compare("n", "version", "<", 2**70)]),
            engine.txn(success=[DeleteRange("")]),
        ):
            with pytest.raises(InvalidRequest):
                await wrong
        with pytest.raises(TooLarge, match="129 items"):
            await engine.txn(success=[Get("n")] * 129)

    used(tmp_path, app)


def test_a_transaction_that_only_reads_reads_much(tmp_path: Path) -> None:
    """Nothing of it has to be remembered under a key."""

    async def app(engine: dengine.Engine) -> None:
        for number in range(3):
            await engine.put(f"k/{number}", bytes(60_000))
        gets = [Get(f"k/{number}") for number in range(3)]
        exists = Compare("k/0", "exists", "=", True)
        done = await engine.txn([exists], gets, gets[:1])
        assert [len(r.item.value) for r in done.results if r.item] == [60_000] * 3
        with pytest.raises(InvalidRequest, match="at most"):
            await engine.txn(success=[Put("k", b""), *gets])
        with pytest.raises(InvalidRequest, match="at most"):
            await engine.txn(success=gets, idempotency_key="mine")

    used(tmp_path, app)


def test_time_to_live(tmp_path: Path) -> None:
    async def app(engine: dengine.Engine) -> None:
        await engine.put("k", b"v", ttl_s=60)
        found = await engine.get("k")
        assert found is not None
        assert found.ttl_s is not None
        assert 50 < found.ttl_s <= 60
        await engine.put("k", b"v")
        found = await engine.get("k")
        assert found is not None
        assert found.ttl_s is None
        async with engine.watch("short") as watch:
            await engine.put("short", b"v", ttl_s=1)
            assert (await anext(watch)).events[0].type == "put"
            assert (await anext(watch)).events[0].type == "expire"
        with pytest.raises(ValueError, match="whole number"):
            await engine.put("k", b"v", ttl_s=1.5)
        with pytest.raises(InvalidRequest, match="at most"):
            await engine.put("k", b"v", ttl_s=10**9)

    used(tmp_path, app)


WRONG = (
    (Put("k", b"", ttl_s=0), ValueError, "at least 1 second"),
    (Put("k", b"", ttl_s=1.5), ValueError, "whole number of seconds"),
    (Put("k", b"", ttl_s=float("inf")), ValueError, "whole number of seconds"),
    (Put("k", b"", ttl_s=float("nan")), ValueError, "whole number of seconds"),
    (Put("k", b"", ttl_s=1, lease="x"), ValueError, "give one of them"),
    (Put("k", b"", lease=7), TypeError, "a lease is a Lease or its id, not int"),
    (Put("k", b"", lease=""), InvalidRequest, "the lease is empty"),
)


def test_a_put_of_a_transaction_is_the_same_for_engine_and_clients(tmp_path: Path) -> None:
    """It takes the lease itself, and what is wrong with it is told in the same words."""

    async def app() -> None:
        async with dengine.Engine(tmp_path, listen_address="127.0.0.1:0") as engine:
            await engine.wait_ready(PATIENT_S)
            async with Client(engine.address) as client:
                await holds(engine)
                await holds(client)
            await asyncio.to_thread(holds_too, engine.address)

    async def holds(store: dengine.Engine | Client) -> None:
        async with store.lease(60) as lease:
            assert (await store.txn(success=[Put("l", b"1", lease=lease)])).succeeded
            assert (await store.lease_info(lease.id)).keys == (b"l",)
        for put, kind, message in WRONG:
            with pytest.raises(kind, match=message):
                await store.txn(success=[put])

    def holds_too(address: str) -> None:
        with sync.Client(address) as client, client.lease(60) as lease:
            assert client.txn(success=[Put("l", b"1", lease=lease)]).succeeded
            assert client.lease_info(lease.id).keys == (b"l",)
            for put, kind, message in WRONG:
                with pytest.raises(kind, match=message):
                    client.txn(success=[put])

    on(uvloop.new_event_loop, app)


MISTAKES: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda s: s.txn([Compare("a", "value", "=", 1)]), TypeError, "compared with bytes"),
    (lambda s: s.txn([Compare("a", "version", "=", b"1")]), TypeError, "with a number"),
    (lambda s: s.txn([Compare("a", "version", "=", 2**63)]), InvalidRequest, "2\\^63"),
    (lambda s: s.txn([Compare("a", "version", "=", -(2**80))]), InvalidRequest, "2\\^63"),
    (lambda s: s.txn([Compare("a", "age", "=", 1)]), InvalidRequest, "age"),
    (lambda s: s.txn([], [Compare("a", "exists", "=", True)]), TypeError, "an operation is a Put"),
    (lambda s: s.txn([Get("a")]), TypeError, "a comparison is a Compare"),
    (lambda s: s.txn([], [DeleteRange("a", "b")]), ValueError, "a prefix, or start and end"),
    (lambda s: s.put("a", b"", if_match="12"), InvalidRequest, "if_match is a revision"),
    (lambda s: s.put("a", b"", if_match=b"12"), InvalidRequest, "if_match is a revision"),
    (lambda s: s.put("a", b"", if_match=True), InvalidRequest, "if_match is a revision"),
    (lambda s: s.put("a", b"", if_match=[]), InvalidRequest, "if_match is a revision"),
    (lambda s: s.delete("a", if_match="1"), InvalidRequest, "if_match is a revision"),
    (lambda s: s.put("a", b"", idempotency_key="a\nb"), InvalidRequest, "visible ASCII"),
    (lambda s: s.put("a", b"", idempotency_key=""), InvalidRequest, "visible ASCII"),
    (lambda s: s.keepalive_lease(""), ValueError, "not the id of a lease"),
    (lambda s: s.lease_info("é"), ValueError, "not the id of a lease"),
    (lambda s: s.revoke_lease(""), ValueError, "not the id of a lease"),
    (lambda s: anext(s.watch("a", from_revision=0)), ValueError, "begin at 1"),
    (lambda s: anext(s.watch("a", from_revision=2**63 - 1)), InvalidRequest, "from_revision is"),
]


def test_the_same_mistake_is_the_same_error_for_engine_and_client(tmp_path: Path) -> None:
    """So an app that changes from one to the other catches what it caught, and nothing is done."""

    async def app() -> None:
        async with dengine.Engine(tmp_path, listen_address="127.0.0.1:0") as engine:
            await engine.wait_ready(PATIENT_S)
            await engine.put("a", b"kept")
            async with Client(engine.address) as client:
                for number, (call, kind, message) in enumerate(MISTAKES):
                    for store in (engine, client):
                        with pytest.raises(kind, match=message) as caught:
                            await call(store)
                        assert type(caught.value) is kind, (number, store)
            assert await engine.get("a") == Value(b"a", b"kept", 1, 1)

    on(uvloop.new_event_loop, app)


def test_leases_locks_and_elections(tmp_path: Path) -> None:
    """They are the client library's, over the node in this process."""

    async def app(engine: dengine.Engine) -> None:
        async with engine.lease(60) as lease:
            await engine.put("service/1", b"up", lease=lease)
            info = await engine.lease_info(lease.id)
            assert (info.ttl_s, info.keys) == (60, (b"service/1",))
            assert (await engine.keepalive_lease(lease.id)).id == lease.id
        assert await engine.get("service/1") is None
        with pytest.raises(NotFound):
            await engine.keepalive_lease(lease.id)
        with pytest.raises(NotFound):
            await engine.put("k", b"v", lease="no-such-lease")

        order: list[int] = []

        async def worker() -> None:
            async with engine.lock("job") as lock:
                done = await engine.txn([lock.guard], [Put("by", b"me")])
                assert done.succeeded
                order.append(lock.token)

        await asyncio.gather(*(worker() for _ in range(3)))
        assert order == sorted(set(order)), "the fencing token grows from holder to holder"
        async with engine.election("boss").campaign(b"me") as lead:
            await lead.proclaim(b"still me")
            leader = await engine.election("boss").leader()
            assert leader is not None
            assert (leader.value, leader.token) == (b"still me", lead.token)
            assert (await engine.txn([lead.guard])).succeeded
        lead = await engine.election("boss").campaign(b"me").__aenter__()
        await engine.put(lead.key, b"without the lease")
        await asyncio.wait_for(lead.lost.wait(), PATIENT_S)
        with pytest.raises(LockLost, match="its key was written"):
            await lead.resign()
        lock = await engine.lock("job").__aenter__()
        leaving = asyncio.create_task(lock.release())
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        async with engine.lock("job", timeout_s=PATIENT_S):
            pass
        assert await engine.count(start="_", end="`") == 0, "nothing stays behind"

    used(tmp_path, app)


def test_a_lease_with_very_many_keys_ends_with_all_of_them(tmp_path: Path) -> None:
    """They are deleted 1000 at a time: to revoke a lease, or to leave it, is to wait for the last,
    for an engine and both clients.
    """
    operations = [[f"many/{n}" for n in range(first, first + 125)] for first in range(0, 2500, 125)]

    async def app() -> None:
        async with dengine.Engine(tmp_path, listen_address="127.0.0.1:0") as engine:
            await engine.wait_ready(PATIENT_S)

            async def hold() -> str:
                lease = (await engine.grant_lease(600)).id
                await hang_on(lease)
                return lease

            async def hang_on(lease: str) -> None:
                for keys in operations:
                    await engine.txn(success=[Put(key, b"", lease=lease) for key in keys])

            def revoke_too(address: str, lease: str) -> None:
                with sync.Client(address) as client:
                    client.revoke_lease(lease)

            assert engine.address is not None
            async with Client(engine.address) as client:
                for store in (engine, client):
                    await store.revoke_lease(await hold(), timeout_s=PATIENT_S)
                    assert await engine.count() == 0
                    async with store.lease(600) as lease:
                        await hang_on(lease.id)
                    assert await engine.count() == 0
            await asyncio.to_thread(revoke_too, engine.address, await hold())
            assert await engine.count() == 0

    on(uvloop.new_event_loop, app)


def test_a_time_limit_that_leaves_no_time_is_told_as_one(tmp_path: Path) -> None:
    """As by a client."""

    async def app(engine: dengine.Engine) -> None:
        for limit_s in (0, -1):
            for call in (
                engine.put("k", b"", timeout_s=limit_s),
                engine.get("k", timeout_s=limit_s),
                engine.revoke_lease("1", timeout_s=limit_s),
            ):
                with pytest.raises(RequestTimeout, match=f"timeout_s is {limit_s}, which") as late:
                    await call
                assert late.value.outcome == "none"
        assert (await engine.wait_ready(timeout_s=0)).is_leader, "that only looks"

    used(tmp_path, app)


def test_limits_hold_before_anything_is_proposed(tmp_path: Path) -> None:
    async def app(engine: dengine.Engine) -> None:
        last = engine._embedded.node.raft.log.last_index
        for key in ("", b""):
            with pytest.raises(InvalidRequest, match="the key is empty"):
                await engine.put(key, b"")
            with pytest.raises(InvalidRequest, match="the key is empty"):
                await engine.get(key)
        for wrong in (
            engine.put("k" * 512, b""),
            engine.get("k" * 512),
            engine.delete("k" * 512),
            engine.delete(prefix="k" * 512),
            engine.count("k" * 512),
            engine.put("k", b"v" * 101),
            engine.txn(success=[Put("k", b"v" * 101)]),
            engine.txn(success=[Put("k", b"v" * 100)] * 20),
            engine.txn([Compare("k" * 512, "exists", "=", True)]),
        ):
            with pytest.raises(TooLarge) as caught:
                await wrong
            assert caught.value.outcome == "none"
        with pytest.raises(TooLarge):
            engine.list("k" * 512)
        with pytest.raises(TooLarge):
            engine.watch("k" * 512)
        assert engine._embedded.node.raft.log.last_index == last
        with pytest.raises(TypeError, match="a value is bytes"):
            await engine.put("k", "text")  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="linearizable, lease, eventual"):
            await engine.get("k", consistency="soon")  # type: ignore[arg-type]
        assert (await engine.put("k", b"v")).revision == 1

    used(tmp_path, app, limits__value_bytes=100, limits__txn_bytes=1000)


@pytest.mark.parametrize("consistency", ["linearizable", "lease", "eventual"])
def test_consistency(tmp_path: Path, consistency: Any) -> None:
    """On the node that has acknowledged a write every reading sees it."""

    async def app(engine: dengine.Engine) -> None:
        for n in range(10):
            await engine.put("k", b"%d" % n)
            found = await engine.get("k", consistency=consistency)
            assert found is not None
            assert found.value == b"%d" % n
            assert await engine.count(consistency=consistency) == 1

    used(tmp_path, app)


# --- once -----------------------------------------------------------------------------------------


def test_a_call_under_a_key_of_its_own_happens_once(tmp_path: Path) -> None:
    """Also over a restart; another request under that key is refused."""

    async def first(engine: dengine.Engine) -> None:
        for _ in range(2):
            assert await engine.put("k", b"v", idempotency_key="job-7") == PutResult(1, True)
        assert (await engine.txn(success=[Put("n", b"1")], idempotency_key="t")).revision == 2

    async def second(engine: dengine.Engine) -> None:
        assert await engine.put("k", b"v", idempotency_key="job-7") == PutResult(1, True)
        assert (await engine.txn(success=[Put("n", b"1")], idempotency_key="t")).revision == 2
        with pytest.raises(IdempotencyMismatch):
            await engine.put("k", b"w", idempotency_key="job-7")
        with pytest.raises(InvalidRequest, match="visible ASCII"):
            await engine.put("k", b"w", idempotency_key="a b")
        assert (await engine.put("k", b"w")).revision == 3

    used(tmp_path, first)
    used(tmp_path, second)


def test_every_increment_counts_once(tmp_path: Path) -> None:
    """Several at once, with an answer lost now and then: none is lost, none counts twice."""
    workers, each = 5, 40

    async def app(engine: dengine.Engine) -> None:
        node = engine._embedded.node
        whole, calls = node.write, 0

        async def write(*args: Any) -> Result:
            nonlocal calls
            calls += 1
            lost = calls % 7 == 0
            result: Result = await whole(*args)
            if lost:
                raise LeaderChanged("the answer was lost", outcome="unknown")
            return result

        node.write = write

        async def add() -> None:
            while True:
                found = await engine.get("n")
                before, revision = (int(found.value), found.mod_revision) if found else (0, 0)
                same = Compare("n", "mod_revision", "=", revision)
                done = await engine.txn(
                    [same], [Put("n", b"%d" % (before + 1))], timeout_s=PATIENT_S
                )
                if done.succeeded:
                    return

        async def work() -> None:
            for _ in range(each):
                await add()

        await asyncio.gather(*(work() for _ in range(workers)))
        found = await engine.get("n")
        assert found is not None
        assert found.value == b"%d" % (workers * each)
        assert found.mod_revision == workers * each

    used(tmp_path, app)


class Script:
    """Stands in front of a node's `write`: one answer after the other, then the node's own."""

    def __init__(self, engine: dengine.Engine, *answers: Result | Exception) -> None:
        self._node = engine._embedded.node
        self._write = self._node.write
        self._answers = list(answers)
        self.keys: list[str] = []
        self._node.write = self

    async def __call__(self, command: Any, deadline: float, once: Any) -> Result:
        self.keys.append(once)
        if not self._answers:
            result: Result = await self._write(command, deadline, once)
            return result
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


LOST = LeaderChanged("the answer was lost", outcome="unknown")
NO_LEADER = ClusterUnavailable("no leader")


def test_a_write_is_repeated_under_its_key(tmp_path: Path) -> None:
    async def app(engine: dengine.Engine) -> None:
        script = Script(engine, LOST, NO_LEADER)
        assert await engine.put("k", b"v") == PutResult(1, True)
        assert len(script.keys) == 3
        assert len(set(script.keys)) == 1

    used(tmp_path, app)


def test_a_refusal_after_a_lost_attempt_proves_nothing(tmp_path: Path) -> None:
    """The first attempt may still be on its way, whatever a later one is told."""

    async def app(engine: dengine.Engine) -> None:
        refusal = TooLarge("of a node with other limits")
        Script(engine, LOST, refusal)
        with pytest.raises(TooLarge, match="an earlier attempt may have happened") as caught:
            await engine.put("k", b"v")
        assert caught.value.outcome == "unknown"
        assert refusal.outcome == "none", "it may have been given to others as well"

        Script(engine, LOST, *[NO_LEADER] * 100)
        with pytest.raises(ClusterUnavailable) as unavailable:
            await engine.put("k", b"v", timeout_s=0.5)
        assert unavailable.value.outcome == "unknown"

        Script(engine, Stale(7))
        with pytest.raises(StaleRequest) as stale:
            await engine.put("k", b"v")
        assert stale.value.outcome == "unknown"

    used(tmp_path, app)


def test_the_word_of_the_state_machine_is_final(tmp_path: Path) -> None:
    """It comes back under the key of this very request: no other attempt has ended differently."""

    async def app(engine: dengine.Engine) -> None:
        Script(engine, LOST, ConditionFailed(5))
        with pytest.raises(PreconditionFailed) as caught:
            await engine.put("k", b"v", if_match=4)
        assert caught.value.outcome == "none"

    used(tmp_path, app)


def test_without_any_attempt_that_may_have_happened_the_outcome_is_known(tmp_path: Path) -> None:
    async def app(engine: dengine.Engine) -> None:
        Script(engine, *[NO_LEADER] * 100)
        with pytest.raises(ClusterUnavailable) as caught:
            await engine.put("k", b"v", timeout_s=0.5)
        assert caught.value.outcome == "none"

    used(tmp_path, app)


def test_a_node_that_keeps_silent_is_not_waited_for(tmp_path: Path) -> None:
    """A call ends although the node has forgotten it; a write's outcome is unknown then."""

    async def app(engine: dengine.Engine) -> None:
        async def silence(*_: Any) -> Any:
            await asyncio.Event().wait()

        node = engine._embedded.node
        node.write = node.read_barrier = silence
        with pytest.raises(RequestTimeout) as caught:
            await engine.put("k", b"v", timeout_s=0.1)
        assert caught.value.outcome == "unknown"
        with pytest.raises(RequestTimeout) as caught:
            await engine.get("k", timeout_s=0.1)
        assert caught.value.outcome == "none"

    used(tmp_path, app)


def test_a_read_is_repeated(tmp_path: Path) -> None:
    async def app(engine: dengine.Engine) -> None:
        await engine.put("k", b"v")
        node = engine._embedded.node
        barrier, failures = node.read_barrier, [NO_LEADER, LOST]

        async def sometimes(*args: Any) -> None:
            if failures:
                raise failures.pop()
            await barrier(*args)

        node.read_barrier = sometimes
        found = await engine.get("k")
        assert found is not None
        assert found.value == b"v"

    used(tmp_path, app)
