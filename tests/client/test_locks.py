"""Locks and elections: one holder at a time, tokens that grow, and nobody who waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable

import pytest

from dengine.client import Client, Lock, LockLost, Put
from dengine.client.elections import Leader
from dengine.client.locks import TAKEN, UNTOLD
from dengine.errors import ClusterUnavailable, DengineError, InvalidRequest, RequestTimeout
from tests.client.fake_server import FakeCluster, fake_cluster
from tests.client.fake_state import Asked
from tests.client.seeds import each_seed, seed_of
from tests.client.virtual import run

pytestmark = pytest.mark.timeout(600)  # virtual time is quick, a busy machine is not
Scenario = Callable[[FakeCluster, Client], Awaitable[None]]


def over(scenario: Scenario, limit_s: float = 600.0) -> None:
    async def prepared() -> None:
        async with fake_cluster(3) as cluster, Client(cluster.endpoints) as client:
            await client.put("met", b"")
            await asyncio.sleep(0.1)
            await scenario(cluster, client)

    run(prepared(), limit_s)


def now() -> float:
    return asyncio.get_running_loop().time()


def queued(cluster: FakeCluster, name: bytes = b"_lock/job/") -> int:
    return sum(key.startswith(name) for key in cluster.state.keys)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it, for a thousand virtual seconds at most."""
    for _ in range(20_000):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("waited in vain")


def test_one_at_a_time_in_the_order_of_coming() -> None:
    """Ten clients, one lock: everybody gets it once, in turn, with a higher token each."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        inside: list[int] = []
        order: list[tuple[int, int]] = []
        go = asyncio.Event()

        async def work(number: int) -> None:
            async with Client(cluster.endpoints) as own, own.lock("job") as lock:
                assert inside == []
                inside.append(number)
                await go.wait()
                await asyncio.sleep(1)
                inside.remove(number)
                order.append((lock.token, number))

        tasks = []
        for number in range(10):
            tasks.append(asyncio.create_task(work(number)))
            await until(lambda number=number: queued(cluster) == number + 1)  # type: ignore[misc]
        go.set()
        await asyncio.gather(*tasks)
        assert order == sorted(order)
        assert [number for _, number in order] == list(range(10))
        assert cluster.state.leases == {}

    over(scenario)


def test_a_release_wakes_one_waiter() -> None:
    """Each watches only the one before it: no thundering herd."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async def hold() -> None:
            async with client.lock("job"):
                await asyncio.sleep(1000)

        first = client.lock("job")
        await first.__aenter__()
        tasks = []
        for number in range(5):
            tasks.append(asyncio.create_task(hold()))
            await until(lambda number=number: queued(cluster) == number + 2)  # type: ignore[misc]
        await asyncio.sleep(1)
        before = len([a for a in cluster.asked if "prefix=_lock" in a.target])
        await first.__aexit__(None, None, None)
        await asyncio.sleep(2)
        assert len([a for a in cluster.asked if "prefix=_lock" in a.target]) == before + 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert queued(cluster) == 0, "who is cancelled leaves the queue"

    over(scenario)


def test_names_that_begin_alike_do_not_meet() -> None:
    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with (
            client.lock("a/b"),
            client.lock("a", timeout_s=5),
            client.lock(b"a/b/c", timeout_s=5),
            client.lock("a/", timeout_s=5),
            client.election("a").campaign(b"", timeout_s=5),
        ):
            pass

    over(scenario)


def test_waiting_ends_when_the_caller_says_so() -> None:
    """Nothing is held then, and nothing left in the queue."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.lock("job") as held:
            began = now()
            with pytest.raises(RequestTimeout, match="was not free within 3 s") as failed:
                async with client.lock("job", timeout_s=3):
                    raise AssertionError("two holders")
            assert 3.0 <= now() - began < 4.0
            assert failed.value.outcome == "none"
            assert queued(cluster) == 1
            held.check()

    over(scenario)


def test_a_lock_that_nobody_could_be_asked_about_is_not_called_taken() -> None:
    """What failed is named, as far as it is known within the time there was."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes:
            await node.kill()
        for timeout_s, why in ((3, UNTOLD), (25, r"no answer within .* \(.*127.0.0.1")):
            with pytest.raises(RequestTimeout, match=f"could not be had within .* s: {why}") as it:
                async with client.lock("job", timeout_s=timeout_s):
                    pass
            assert it.value.outcome == "none"

    over(scenario)


def test_a_lock_says_why_it_is_not_held() -> None:
    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with Client(cluster.endpoints) as other:
            holder, waiter = client.lock("job"), other.lock("job")
            assert (await holder.__aenter__()).why == ""
            waiting = asyncio.create_task(waiter.__aenter__())
            await until(lambda: waiter.why == TAKEN)
            await holder.release()
            assert holder.why == "it was released"
            assert (await waiting).why == ""
            for node in cluster.nodes:
                node.hang()
            await waiter.lost.wait()
            assert "it was not renewed for 10 s" in waiter.why
            with pytest.raises(LockLost, match="it was not renewed for 10 s"):
                await waiter.release()

    over(scenario)


def test_a_dead_holder_is_replaced() -> None:
    """Its lease ends, and the next one has the lock."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        dead = Client(cluster.endpoints)
        lock = dead.lock("job", ttl_s=8)
        await lock.__aenter__()
        await dead.close()
        assert lock.lost.is_set()
        began = now()
        async with client.lock("job") as mine:
            assert 4.0 <= now() - began <= 9.0
            assert mine.token > lock.token

    over(scenario)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("fault", ["dead", "hung", "cut off"])
def test_a_bad_node_holds_nobody_up(which: int, fault: str) -> None:
    """The holder keeps the lock, and the waiter gets it soon after the release."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with Client(cluster.endpoints) as other:
            holder = client.lock("job", ttl_s=6)
            await holder.__aenter__()
            waiter = asyncio.create_task(other.lock("job").__aenter__())
            await until(lambda: queued(cluster) == 2)
            await asyncio.sleep(1)
            bad = cluster.nodes[which]
            if fault == "dead":
                await bad.kill()
            elif fault == "hung":
                bad.hang()
            else:
                bad.partitioned = True
            cluster.leader = cluster.nodes[(which + 1) % 3]
            await asyncio.sleep(20)
            holder.check()
            assert not waiter.done()
            await holder.release()
            began = now()
            lock = await waiter
            assert now() - began < 8.0
            await lock.release()

    over(scenario)


def test_a_lost_lock_is_told_at_once() -> None:
    """Before anybody else can have it: by the event, by `check`, and on leaving."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        held: list[Lock] = []

        async def holder() -> None:
            async with client.lock("job", ttl_s=5) as lock:
                held.append(lock)
                for node in cluster.nodes:
                    node.hang()
                began = now()
                await lock.lost.wait()
                assert now() - began <= 5.0
                assert queued(cluster) == 1, "told before the cluster gives it to another"
                with pytest.raises(LockLost):
                    lock.check()

        with pytest.raises(LockLost, match="was lost before it was released"):
            await holder()
        [lock] = held
        # Whoever looks at the guard is safe even where the holder has not looked.
        for node in cluster.nodes:
            node.heal()
        await asyncio.sleep(6)
        late = await client.txn([lock.guard], [Put("written", b"by a holder that was")])
        assert not late.succeeded
        assert b"written" not in cluster.state.keys

    over(scenario)


def test_leaving_in_an_outage_is_silent() -> None:
    """The lock is released by its lease; the holder has done nothing wrong."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.lock("job", ttl_s=20):
            for node in cluster.nodes:
                node.hang()
            began = now()
        assert now() - began < 3.0
        for node in cluster.nodes:
            node.heal()
        async with client.lock("job", timeout_s=30):
            pass

    over(scenario)


def test_a_waiter_queues_again_after_an_outage() -> None:
    """Longer than its lease: its place is gone, its wish is not."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        holder = client.lock("job", ttl_s=5)
        await holder.__aenter__()
        waiter = asyncio.create_task(client.lock("job", ttl_s=5).__aenter__())
        await until(lambda: queued(cluster) == 2)
        for node in cluster.nodes:
            await node.kill()
        await asyncio.sleep(30)
        assert not waiter.done()
        for node in cluster.nodes:
            await node.start()
            node.heal()
        lock = await waiter
        assert lock.token > holder.token
        lock.check()
        await lock.release()

    over(scenario)


def test_what_nobody_will_grant_is_told() -> None:
    """A refusal that never changes ends the waiting."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes:
            node.refuse = lambda asked: (
                InvalidRequest("no leases here") if asked.path == "/v1/leases" else None
            )
        with pytest.raises(InvalidRequest, match="no leases here"):
            async with client.lock("job"):
                pass

    over(scenario)


def test_a_lost_reply_takes_one_place() -> None:
    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes:
            node.drop_replies = 2
        async with client.lock("job", timeout_s=20):
            assert queued(cluster) == 1
            assert len(cluster.state.leases) == 1

    over(scenario)


@each_seed
def test_no_two_holders_under_any_faults(chosen: int | None) -> None:
    """Five clients and nodes that fail all the time. Whoever believes to hold the lock, and asks,
    holds it alone; and tokens only grow. Writes under the guard carry growing tokens.
    """
    seed = seed_of(chosen)

    async def scenario(cluster: FakeCluster, _: Client) -> None:
        rng = random.Random(seed)
        tokens: list[int] = []

        def holders(locks: dict[int, Lock]) -> list[int]:
            return [n for n, lock in locks.items() if lock.remaining_s > 0]

        locks: dict[int, Lock] = {}

        async def contend(number: int) -> None:
            own = random.Random(seed + number)
            async with Client(cluster.endpoints, timeout_s=5.0) as client:
                for _ in range(3):
                    try:
                        async with client.lock("job", ttl_s=own.randint(3, 8)) as lock:
                            tokens.append(lock.token)
                            locks[number] = lock
                            until_s = now() + own.uniform(0.0, 6.0)
                            while now() < until_s and not lock.lost.is_set():
                                assert holders(locks) in ([number], []), "two holders"
                                await asyncio.sleep(0.5)
                                with contextlib.suppress(DengineError):
                                    await client.txn(
                                        [lock.guard],
                                        [Put("token", b"%d" % lock.token)],
                                        timeout_s=1.0,
                                    )
                    except LockLost:
                        pass
                    locks.pop(number, None)
                    await asyncio.sleep(own.uniform(0.0, 2.0))

        async def torment() -> None:
            while True:
                await asyncio.sleep(rng.uniform(0.0, 4.0))
                for node in cluster.nodes:
                    if rng.random() < 0.5:
                        node.heal()
                node = rng.choice(cluster.nodes)
                fault = rng.randrange(6)
                if fault == 0:
                    node.hang()
                elif fault == 1:
                    node.partitioned = True
                elif fault == 2:
                    node.drop_replies = rng.randrange(1, 4)
                elif fault == 3:
                    node.late_s = rng.uniform(0.1, 2.0)
                elif fault == 4:
                    cluster.leader = rng.choice([*cluster.nodes, None])
                elif rng.random() < 0.3:
                    for each in cluster.nodes:
                        each.hang()

        tormentor = asyncio.create_task(torment())
        await asyncio.gather(*(contend(number) for number in range(5)))
        tormentor.cancel()
        assert tokens == sorted(set(tokens)), "a token that falls or comes twice"
        history = [e.value for events in cluster.state.history.values() for e in events
                   if e.key == b"token" and e.value is not None]  # fmt: skip
        assert [int(value) for value in history] == sorted(int(value) for value in history)

    over(scenario, limit_s=6000.0)


def test_who_enters_a_lock_a_second_time_leaves_its_holder_alone() -> None:
    """Two tasks with one `Lock`: the second is told so, and the first goes on holding it."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for lock in (client.lock("job"), client.election("e").campaign(b"a")):
            entering = [asyncio.create_task(lock.__aenter__()) for _ in range(2)]
            first, second = await asyncio.gather(*entering, return_exceptions=True)
            assert first is lock
            assert isinstance(second, RuntimeError)
            with pytest.raises(RuntimeError, match="entered once"):
                await lock.__aenter__()
            assert not lock.lost.is_set()
            assert lock.remaining_s > 0
            assert lock.key in cluster.state.keys
            await lock.__aexit__(None, None, None)
        assert cluster.state.leases == {}

    over(scenario)


def test_a_lock_that_was_taken_away_is_not_left_in_silence() -> None:
    """Only an explicit release makes the end of the block quiet."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.lock("job") as lock:
            await lock.release()
            await lock.release()
        taken = await client.lock("job").__aenter__()
        await client.revoke_lease(taken.key.rpartition(b"/")[2].decode())
        await taken.lost.wait()
        with pytest.raises(LockLost):
            await taken.__aexit__(None, None, None)
        unused = client.lock("job")
        await unused.release()  # nothing is held, so nothing is let go
        async with unused:
            assert unused.token > 0

    over(scenario)


def test_a_holder_whose_key_is_deleted_is_told() -> None:
    """By somebody else, while the lease goes on: the next one holds the lock from then on. Also
    when the watch of the holder was cut off, and the history that it missed is gone.
    """

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with Client(cluster.endpoints) as other:
            for missed in (False, True):
                lock = await client.lock("job").__aenter__()
                await until(lambda: sum(node.streams for node in cluster.nodes) == 1)
                await lock.proclaim(b"noted")  # no end of it
                if missed:
                    for node in cluster.nodes:
                        node.partitioned, node.cut_after = True, 0
                    await until(lambda: sum(node.streams for node in cluster.nodes) == 0)
                    cluster.state.execute(Asked("DELETE", f"/v1/kv/{lock.key.decode()}", {}, b""))
                    cluster.state.compact(cluster.state.revision + 1)
                    for node in cluster.nodes:
                        node.heal()
                else:
                    await asyncio.sleep(5)
                    assert not lock.lost.is_set()
                    await other.delete(lock.key)
                await asyncio.wait_for(lock.lost.wait(), 5)
                assert lock.remaining_s == 0
                with pytest.raises(LockLost, match="its key is gone"):
                    lock.check()
                with pytest.raises(LockLost):
                    await lock.__aexit__(None, None, None)
                async with other.lock("job", timeout_s=5) as following:
                    assert following.token > lock.token
        assert cluster.state.leases == {}

    over(scenario)


@pytest.mark.parametrize("what", ["lock", "leadership"])
def test_a_leave_that_is_cancelled_lets_go(what: str) -> None:
    """Whenever that happens; the next one does not even have to wait for the lease to end."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for turns in range(1, 12):
            lock = client.lock("job") if what == "lock" else client.election("job").campaign(b"me")
            await lock.__aenter__()
            leaving = asyncio.create_task(lock.release())
            for _ in range(turns):
                await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            assert lock.lost.is_set()
            began = now()
            await until(lambda: not cluster.state.leases)
            assert now() - began < 2, turns

    over(scenario)


def test_who_cancels_waiting_twice_leaves_the_queue() -> None:
    """The second time while the first is being heeded."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.lock("job"):
            for turns in range(1, 12):
                waiter = asyncio.create_task(client.lock("job").__aenter__())
                await until(lambda: queued(cluster) == 2)
                waiter.cancel()
                for _ in range(turns):
                    await asyncio.sleep(0)
                waiter.cancel()
                await asyncio.gather(waiter, return_exceptions=True)
                began = now()
                await until(lambda: len(cluster.state.leases) == 1)
                assert now() - began < 2, turns

    over(scenario)


def test_a_holder_that_writes_its_key_has_lost_the_lock() -> None:
    """A plain put takes the key from its lease: it would hold the lock for ever. The next one gets
    it, also while the first stays in its block, and where that was left before it could be told.
    """

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with Client(cluster.endpoints) as other:
            election = other.election("e")
            lead = await client.election("e").campaign(b"a, starting").__aenter__()
            await client.put(lead.key, b"a, ready")
            await asyncio.wait_for(lead.lost.wait(), 5)
            async with election.campaign(b"b", timeout_s=5) as following:
                assert await election.leader() == Leader(b"b", following.token)
            with pytest.raises(LockLost, match="its key was written"):
                await lead.resign()

            async with client.election("e").campaign(b"a, starting") as lead:
                await client.put(lead.key, b"a, ready")
            assert await election.leader() is None

            for late in (False, True):  # the watch of the holder is cut off meanwhile
                lead = await client.election("e").campaign(b"a").__aenter__()
                await until(lambda: sum(node.streams for node in cluster.nodes) == 1)
                for node in cluster.nodes:
                    node.partitioned, node.cut_after = True, 0
                await until(lambda: sum(node.streams for node in cluster.nodes) == 0)
                where = f"/v1/kv/{lead.key.decode()}"
                cluster.state.execute(Asked("PUT", where, {}, b"by whoever"))
                if late:
                    cluster.state.compact(cluster.state.revision)
                for node in cluster.nodes:
                    node.heal()
                await asyncio.wait_for(lead.lost.wait(), 5)
                async with election.campaign(b"b", timeout_s=5):
                    pass
                with pytest.raises(LockLost):
                    await lead.resign()
        assert cluster.state.leases == {}
        assert queued(cluster, b"_election/") == 0

    over(scenario)


def test_a_watch_that_cannot_go_on_yet_loses_no_lock() -> None:
    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.lock("job", ttl_s=30) as lock:
            await until(lambda: sum(node.streams for node in cluster.nodes) == 1)
            cluster.state.compact(cluster.state.revision)
            for node in cluster.nodes:
                node.cut_after = 0
            await asyncio.sleep(3)
            for node in cluster.nodes:
                node.heal()
            await asyncio.sleep(20)
            assert not lock.lost.is_set()

    over(scenario)


def test_no_lock_is_lost_to_a_listing_that_is_refused_for_now() -> None:
    """The history that its watch missed is gone, and nobody says yet whether its key is there."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.lock("job", ttl_s=120) as lock:
            await until(lambda: sum(node.streams for node in cluster.nodes) == 1)
            for node in cluster.nodes:
                node.refuse = lambda asked: (
                    ClusterUnavailable("nobody leads") if asked.path == "/v1/kv" else None
                )
                node.cut_after = 0
            cluster.state.compact(cluster.state.revision + 1)
            await asyncio.sleep(40)
            assert not lock.lost.is_set()
            for node in cluster.nodes:
                node.refuse = None
                node.heal()
            await asyncio.sleep(10)
            assert not lock.lost.is_set()

    over(scenario)
