"""The client over nodes that die, hang, refuse, are cut off, or lose their answers."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import random
from collections.abc import Awaitable, Callable

import pytest

from dengine.client import Client, ClientClosed
from dengine.client.attempts import SINGLE_KEYS, WINDOW, IdempotencyKeys
from dengine.errors import (
    ClusterUnavailable,
    DengineError,
    NotLeader,
    PreconditionFailed,
    RateLimited,
    RequestTimeout,
    StaleRequest,
    TooLarge,
)
from tests.client.fake_server import FakeCluster, FakeNode, fake_cluster
from tests.client.fake_state import Asked
from tests.client.seeds import each_seed, seed_of
from tests.client.virtual import run

pytestmark = pytest.mark.timeout(600)  # virtual time is quick, a busy machine is not
Scenario = Callable[[FakeCluster, Client], Awaitable[None]]


def over(scenario: Scenario, size: int = 3, timeout_s: float = 10.0) -> None:
    """Run `scenario` with a cluster and a client that has met it."""

    async def prepared() -> None:
        async with (
            fake_cluster(size) as cluster,
            Client(cluster.endpoints, timeout_s=timeout_s) as client,
        ):
            await client.put("met", b"")
            await asyncio.sleep(0.1)  # until it has learned who leads
            await scenario(cluster, client)

    run(prepared())


def now() -> float:
    return asyncio.get_running_loop().time()


def not_leader(node: FakeNode) -> Callable[[Asked], DengineError | None]:
    hint = {"id": node.node_id, "address": node.address}
    return lambda asked: (
        NotLeader("another node leads", leader=hint) if asked.path.startswith("/v1/kv") else None
    )


# --- whom it asks


def test_it_goes_to_the_leader() -> None:
    """A request through a follower costs a hop: once the leader is known, it is asked."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for leader in (cluster.nodes[1], cluster.nodes[2]):
            cluster.leader = leader
            for node in cluster.nodes:
                node.refuse = not_leader(leader) if node is not leader else lambda _: None
            await client.put("k", b"")
            before = len(leader.writes())
            for _ in range(5):
                await client.put("k", b"")
            assert len(leader.writes()) == before + 5

    over(scenario)


def test_it_learns_the_members_from_one() -> None:
    """One endpoint is enough to survive the loss of that node, if there was time to learn."""

    async def scenario() -> None:
        async with fake_cluster(3) as cluster, Client(cluster.nodes[0].address) as client:
            assert client.endpoints == (cluster.nodes[0].address,)
            await client.put("k", b"1")
            await asyncio.sleep(0.1)
            assert set(client.endpoints) == set(cluster.endpoints)
            await cluster.nodes[0].kill()
            cluster.leader = cluster.nodes[1]
            await client.put("k", b"2")
            found = await client.get("k")
            assert found is not None
            assert found.value == b"2"

    run(scenario())


def test_a_wrong_leader_is_only_a_hint() -> None:
    """A node that names a dead one, or itself in vain, does not keep a write from its way."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        first, second, third = cluster.nodes
        await third.kill()
        first.refuse = second.refuse = not_leader(third)
        healed = asyncio.get_running_loop().call_later(2.0, second.heal)
        began = now()
        await client.put("k", b"1", timeout_s=10.0)
        assert 2.0 <= now() - began < 5.0
        healed.cancel()

    over(scenario)


# --- faults, one after the other


@pytest.mark.parametrize("fault", ["dead", "hung", "cut off"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_bad_node_of_three_is_left(fault: str, which: int) -> None:
    """Reads and writes go on within a few seconds, and soon as fast as ever."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        bad, good = cluster.nodes[which], cluster.nodes[(which + 1) % 3]
        if fault == "dead":
            await bad.kill()
        elif fault == "hung":
            bad.hang()
        else:
            bad.partitioned = True
        cluster.leader = good
        began = now()
        await client.put("k", b"1")
        assert await client.get("k") is not None
        assert now() - began < 3.0
        later = now()
        for _ in range(10):
            await client.put("k", b"2")
        assert now() - later < 3.0, "a bad node must not be asked first again and again"

    over(scenario)


def test_many_requests_leave_a_hung_node_together() -> None:
    """The budget for second attempts does not keep a hundred of them waiting, one by one."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        assert cluster.leader is not None
        cluster.leader.hang()
        cluster.leader = cluster.nodes[1]
        began = now()
        await asyncio.gather(*(client.put(f"k{n}", b"") for n in range(100)))
        assert now() - began < 5.0
        assert cluster.state.revision == 101

    over(scenario)


def test_a_slow_cluster_is_not_asked_twice_for_everything() -> None:
    """What is normal here is learned: one second and a half for a write is no sign of a fault."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes:
            node.late_s = 1.5
        before = len([a for n in cluster.nodes for a in n.writes()])
        for _ in range(20):
            await client.put("k", b"")
        assert len([a for n in cluster.nodes for a in n.writes()]) - before <= 22

    over(scenario)


def test_a_very_slow_cluster_is_spared_too() -> None:
    """Second attempts come out of a budget: not nearly one for each, however slow it is."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes:
            node.late_s = 4.0
        before = len([a for n in cluster.nodes for a in n.writes()])
        for _ in range(40):
            await client.put("k", b"", timeout_s=30.0)
        extra = len([a for n in cluster.nodes for a in n.writes()]) - before - 40
        assert extra <= 20, extra

    over(scenario)


def test_an_election_is_waited_out() -> None:
    """Nobody leads for two seconds: the caller sees a slow write, and no error."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        cluster.leader = None
        asyncio.get_running_loop().call_later(2.0, setattr, cluster, "leader", cluster.nodes[2])
        began, asked = now(), len(cluster.asked)
        await client.put("k", b"1")
        assert 2.0 <= now() - began < 4.0
        assert len(cluster.asked) - asked < 60, "waiting means pauses"

    over(scenario)


def test_a_hung_leader_does_not_hold_up_the_others() -> None:
    """It hangs, the others refuse until one of them leads: they are asked again meanwhile, and the
    write is there soon after that, however long the hung one is waited for.
    """

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes:
            node.late_s = 0.9  # so a single attempt may take long
        for _ in range(5):
            await client.put("k", b"")
        for node in cluster.nodes:
            node.late_s = 0.0
        first, second, third = cluster.nodes
        first.hang()
        second.refuse = third.refuse = lambda _: ClusterUnavailable("no leader yet")
        asyncio.get_running_loop().call_later(4.0, second.heal)
        asyncio.get_running_loop().call_later(4.0, setattr, cluster, "leader", second)
        began = now()
        await client.put("k", b"", timeout_s=30.0)
        assert 4.0 <= now() - began < 5.5

    over(scenario)


def test_who_is_asked_for_patience_has_it() -> None:
    """429 is no fault of the node: it is asked again, a while later."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        refusals = itertools.count()

        def busy(asked: Asked) -> DengineError | None:
            return RateLimited("later") if asked.method == "PUT" and next(refusals) < 3 else None

        for node in cluster.nodes:
            node.refuse = busy
        began = now()
        await client.put("k", b"1")
        assert 1.4 <= now() - began < 5.0

    over(scenario)


# --- exactly once


def test_a_busy_node_makes_no_key_change_its_kind() -> None:
    """Only where there is no more room for keys that stand for themselves is it given up: a client
    that numbers its requests takes one of the few places that there are for those."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        refusals = itertools.count()
        asked_with: list[str] = []

        def busy(asked: Asked) -> DengineError | None:
            if asked.method != "PUT":
                return None
            asked_with.append(asked.headers["Idempotency-Key"])
            return RateLimited("10000 writes wait already") if next(refusals) < 3 else None

        for node in cluster.nodes:
            node.refuse = busy
        await client.put("k", b"1")
        assert len(asked_with) == 4
        assert set(asked_with) == {asked_with[0]}
        assert ":" not in asked_with[0]

    over(scenario)


def test_a_lost_reply_counts_once() -> None:
    """The write was carried out, its answer is lost, another node is asked: one change."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for number in range(30):
            for node in cluster.nodes:
                node.drop_replies = 1 if number % 2 else 0
            put = await client.put("counter", b"%d" % number)
            assert put.revision == number + 2
        assert cluster.state.revision == 31
        assert cluster.state.keys[b"counter"].version == 30

    over(scenario)


def test_a_condition_is_judged_once() -> None:
    """The first answer was lost; the second attempt must not fail at what the first one did."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes:
            node.drop_replies = 1
        created = await client.put("k", b"1", if_none_match=True)
        assert created.created
        for node in cluster.nodes:
            node.drop_replies = 1
        with pytest.raises(PreconditionFailed) as refused:
            await client.put("k", b"2", if_none_match=True)
        assert refused.value.outcome == "none", "the state machine has said so, under this key"

    over(scenario)


@each_seed
def test_increments_are_exact_under_any_faults(chosen: int | None) -> None:
    """Twenty-one increments by three clients, nodes failing all the time: the sum is right, and no
    client sends the same key for two different writes."""
    seed = seed_of(chosen)

    async def increment(client: Client, rng: random.Random) -> None:
        while True:
            found = await client.get("counter")
            value = 0 if found is None else int(found.value)
            try:
                if found is None:
                    await client.put("counter", b"1", if_none_match=True)
                else:
                    await client.put("counter", b"%d" % (value + 1), if_match=found.mod_revision)
                return
            except PreconditionFailed:
                await asyncio.sleep(rng.random())

    async def scenario() -> None:
        rng = random.Random(seed)
        async with fake_cluster(3) as cluster:
            clients = [Client(cluster.endpoints, timeout_s=300.0) for _ in range(3)]

            async def torment() -> None:
                while True:
                    await asyncio.sleep(rng.uniform(0.0, 1.0))
                    node = rng.choice(cluster.nodes)
                    for each in cluster.nodes:
                        each.heal()
                    fault = rng.randrange(5)
                    if fault == 0:
                        node.hang()
                    elif fault == 1:
                        node.partitioned = True
                    elif fault == 2:
                        node.drop_replies = rng.randrange(1, 4)
                    elif fault == 3:
                        node.late_s = rng.uniform(0.5, 3.0)
                    else:
                        cluster.leader = rng.choice([*cluster.nodes, None])

            tormentor = asyncio.create_task(torment())
            work = [
                increment(client, random.Random(seed + n)) for client in clients for n in range(7)
            ]
            await asyncio.gather(*work)
            tormentor.cancel()
            for client in clients:
                await client.close()
            assert cluster.state.keys[b"counter"].value == b"21"
            assert cluster.state.keys[b"counter"].version == 21

    run(scenario(), limit_s=3000.0)


def test_every_write_has_a_key_of_its_own() -> None:
    """All attempts of one write share it; short-lived clients do not take a session."""

    async def scenario() -> None:
        async with fake_cluster(1) as cluster:
            for _ in range(3):
                async with Client(cluster.endpoints) as client:
                    for _ in range(SINGLE_KEYS):
                        await client.put("k", b"")
            assert cluster.state.clients == 0
            async with Client(cluster.endpoints) as client:
                for _ in range(SINGLE_KEYS + 10):
                    await client.put("k", b"")
                await client.put("k", b"", idempotency_key="mine")
            assert cluster.state.clients == 1
            keys = [a.headers["Idempotency-Key"] for a in cluster.nodes[0].writes()]
            assert len(set(keys)) == len(keys) == 3 * SINGLE_KEYS + SINGLE_KEYS + 11
            assert keys[-1] == "mine"
            numbers = [int(key.partition(":")[2]) for key in keys if ":" in key]
            assert numbers == list(range(1, 11))
            assert all(key.isascii() and key.isprintable() and len(key) <= 128 for key in keys)

    run(scenario())


def test_a_write_that_waits_keeps_its_place_among_the_results() -> None:
    """However many writes pass it by, its number never falls out of what a node remembers."""
    keys = IdempotencyKeys()
    for _ in range(SINGLE_KEYS):
        keys.take().done()
    waiting = keys.take()
    client_id, number = waiting.text.split(":")
    highest = int(number)
    for _ in range(3000):
        key = keys.take()
        other, count = key.text.split(":")
        if other == client_id:
            highest = max(highest, int(count))
        key.done()
    assert highest - int(number) <= WINDOW
    assert key.text.split(":")[0] != client_id


def _keys_of_a_child(keys: IdempotencyKeys, results: multiprocessing.Queue[str]) -> None:
    for _ in range(SINGLE_KEYS):
        keys.take()
    results.put(keys.take().text)


def test_forked_workers_share_no_keys() -> None:
    """A server forks its workers after the client was made: their writes are not taken for one."""
    keys = IdempotencyKeys()
    for _ in range(SINGLE_KEYS + 1):
        keys.take()
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    workers = [context.Process(target=_keys_of_a_child, args=(keys, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    texts = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    texts.append(keys.take().text)
    assert len({text.split(":")[0] for text in texts}) == 3


# --- what a caller is told


def test_nobody_there_means_nothing_happened() -> None:
    """Every connection refused: outcome none, and each address with its reason."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes:
            await node.kill()
        began = now()
        with pytest.raises(ClusterUnavailable, match="refused") as failed:
            await client.put("k", b"", timeout_s=4.0)
        assert 3.0 <= now() - began <= 4.1
        assert failed.value.outcome == "none"
        for address in cluster.endpoints:
            assert address in failed.value.message

    over(scenario)


def test_silence_means_unknown_for_a_write_and_none_for_a_read() -> None:
    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes:
            node.hang()
        began = now()
        with pytest.raises(RequestTimeout, match="may or may not have happened") as failed:
            await client.put("k", b"", timeout_s=4.0)
        assert failed.value.outcome == "unknown"
        assert 3.9 <= now() - began <= 4.1, "the caller's deadline holds"
        with pytest.raises(RequestTimeout) as unread:
            await client.get("k", timeout_s=4.0)
        assert unread.value.outcome == "none"

    over(scenario)


def test_a_refusal_after_a_lost_attempt_is_unknown() -> None:
    """One attempt may have happened, the others certainly not: together nobody knows. So the HTTP
    library must not repeat a PUT behind our back when a kept connection breaks.
    """

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes:
            node.drop_replies = 1
        lost = asyncio.Event()

        def refuse(asked: Asked) -> DengineError | None:
            if asked.method != "PUT" or not lost.is_set():
                lost.set()
                return None
            return ClusterUnavailable("no majority")

        for node in cluster.nodes:
            node.refuse = refuse
        with pytest.raises(DengineError) as failed:
            await client.put("k", b"", timeout_s=3.0)
        assert failed.value.outcome == "unknown"

    over(scenario)


def test_a_value_too_large_for_one_node_may_not_be_for_another() -> None:
    """Each node has limits of its own. So where one refuses a value for its size, and another that
    was asked before keeps silent, it is not certain that nothing was stored.
    """

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        cluster.nodes[0].late_s = 30.0
        for node in cluster.nodes[1:]:
            node.refuse = lambda asked: TooLarge("it is") if asked.method == "PUT" else None
        with pytest.raises(TooLarge, match="an earlier attempt may have happened") as failed:
            await client.put("k", b"large")
        assert failed.value.outcome == "unknown"
        assert cluster.state.keys[b"k"].value == b"large"

    over(scenario)


def test_a_refusal_alone_is_none() -> None:
    """The error of the node itself, when nothing else has happened."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        cluster.leader = None
        with pytest.raises(ClusterUnavailable, match="cut off from the majority") as failed:
            await client.put("k", b"", timeout_s=3.0)
        assert failed.value.outcome == "none"

    over(scenario)


def test_a_forgotten_result_is_unknown() -> None:
    """409 stale_request: it may have happened, long ago."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes:
            node.refuse = lambda asked: (
                StaleRequest("no longer kept", outcome="none") if asked.method == "PUT" else None
            )
        with pytest.raises(StaleRequest) as failed:
            await client.put("k", b"")
        assert failed.value.outcome == "unknown"

    over(scenario)


def test_a_failing_node_is_no_failing_cluster() -> None:
    """500 of one node: another one is asked. 500 of all: told when the last has said it."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        def broken(asked: Asked) -> DengineError | None:
            return DengineError("unexpected", outcome="none") if asked.method == "PUT" else None

        assert cluster.leader is not None
        cluster.leader.refuse = broken
        await client.put("k", b"1")
        for node in cluster.nodes:
            node.refuse = broken
        began = now()
        with pytest.raises(DengineError, match="unexpected"):
            await client.put("k", b"2")
        assert now() - began < 1.0

    over(scenario)


def test_a_closed_client_stays_closed() -> None:
    """Nothing is sent any more, and what was under way ends at once and says what is known."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes:
            node.hang()
        writing = asyncio.create_task(client.put("k", b""))
        reading = asyncio.create_task(client.get("k"))
        await asyncio.sleep(0.1)
        await client.close()
        with pytest.raises(ClientClosed) as failed:
            await writing
        assert failed.value.outcome == "unknown"
        with pytest.raises(ClientClosed):
            await reading
        for call in (client.put("k", b""), client.get("k"), client.list().all()):
            with pytest.raises(ClientClosed):
                await call
        with pytest.raises(ClientClosed):
            async with client.lease(10):
                pass
        await client.close()
        assert client.closed

    over(scenario)


def test_a_cancelled_call_leaves_nothing_behind() -> None:
    """The caller's own timeout works, and the client goes on."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes:
            node.hang()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await client.put("k", b"")
        attempts = [t for t in asyncio.all_tasks() if t.get_name() == "dengine-client-attempt"]
        assert attempts == []
        for node in cluster.nodes:
            node.heal()
        await client.put("k", b"")

    over(scenario)


def test_more_writes_than_may_be_under_way_wait_their_turn() -> None:
    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes:
            node.late_s = 0.05
        await asyncio.gather(*(client.put(f"k{n}", b"") for n in range(600)))
        assert cluster.state.revision == 601

    over(scenario)
