"""Leases that are kept alive, and say in time when they may have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from unittest import mock

import pytest

from dengine.client import Client, ClientClosed, LeaseLost, stopwatch
from dengine.errors import DengineError, InvalidRequest, RequestTimeout
from tests.client.fake_server import FakeCluster, fake_cluster
from tests.client.fake_state import Asked
from tests.client.virtual import run

Scenario = Callable[[FakeCluster, Client], Awaitable[None]]


def over(scenario: Scenario) -> None:
    async def prepared() -> None:
        async with fake_cluster(3) as cluster, Client(cluster.endpoints) as client:
            await client.put("met", b"")
            await asyncio.sleep(0.1)
            await scenario(cluster, client)

    run(prepared())


def now() -> float:
    return asyncio.get_running_loop().time()


def test_a_lease_lives_as_long_as_its_owner() -> None:
    """Many TTLs long, and not a moment longer: leaving deletes what is attached to it."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.lease(5) as lease:
            await client.put("service/1", b"here", lease=lease)
            await asyncio.sleep(60)
            assert b"service/1" in cluster.state.keys
            assert not lease.lost.is_set()
            lease.check()
            assert 0 < lease.remaining_s <= 5
            renewals = [a for a in cluster.asked if a.target.endswith("/keepalive")]
            assert 60 / 5 * 2 < len(renewals) < 60 / 5 * 5
        assert cluster.state.leases == {}
        assert b"service/1" not in cluster.state.keys
        assert lease.lost.is_set()

    over(scenario)


def test_one_bad_node_does_not_end_it() -> None:
    """The node that renews it hangs: another one does, in time."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.lease(5) as lease:
            for bad in cluster.nodes:
                bad.hang()
                cluster.leader = cluster.nodes[bad.node_id % 3]
                await asyncio.sleep(30)
                assert not lease.lost.is_set()
                bad.heal()

    over(scenario)


def test_an_outage_is_told_before_the_lease_can_end() -> None:
    """Nobody can renew it: the owner knows while everybody else still sees its keys."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async def owner() -> None:
            async with client.lease(5) as lease:
                await client.put("service/1", b"here", lease=lease)
                for node in cluster.nodes:
                    node.hang()
                began = now()
                await lease.lost.wait()
                assert 2.5 <= now() - began <= 5.0
                assert lease.remaining_s == 0
                assert b"service/1" in cluster.state.keys, "the lease itself has not ended yet"
                with pytest.raises(LeaseLost):
                    lease.check()

        with pytest.raises(LeaseLost, match="was not renewed for 5 s"):
            await owner()

    over(scenario)


def test_an_end_that_the_cluster_made_is_told() -> None:
    """Somebody revoked it: the next renewal learns of it."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async def owner() -> None:
            async with client.lease(6) as lease:
                async with Client(cluster.endpoints) as other:
                    await other.revoke_lease(lease.id)
                began = now()
                await lease.lost.wait()
                assert now() - began <= 2.1

        with pytest.raises(LeaseLost, match="the cluster has ended it"):
            await owner()

    over(scenario)


def test_a_short_outage_is_nothing() -> None:
    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.lease(10) as lease:
            for _ in range(4):
                for node in cluster.nodes:
                    node.partitioned = True
                await asyncio.sleep(4)
                for node in cluster.nodes:
                    node.heal()
                await asyncio.sleep(6)
                assert not lease.lost.is_set()

    over(scenario)


def test_leaving_in_an_outage_is_quiet_and_quick() -> None:
    """Nobody can be told; the lease ends by itself when its time is over."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.lease(20) as lease:
            await client.put("service/1", b"here", lease=lease)
            for node in cluster.nodes:
                node.hang()
            began = now()
        assert now() - began <= 3.0
        await asyncio.sleep(20)
        assert cluster.state.leases == {}
        assert b"service/1" not in cluster.state.keys

    over(scenario)


def test_a_machine_that_slept_knows_it() -> None:
    """The loop's clock stands still while a machine is suspended; the lease's does not."""
    slept = 0.0

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        def boot_time() -> float:
            return slept

        async def owner() -> None:
            nonlocal slept
            with mock.patch.object(stopwatch, "boot_time", boot_time):
                async with client.lease(10) as lease:
                    slept = 8.0
                    lease.check()
                    slept = 9.5
                    with pytest.raises(LeaseLost):
                        lease.check()

        with pytest.raises(LeaseLost):
            await owner()

    over(scenario)


def test_a_lost_reply_grants_one_lease() -> None:
    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for node in cluster.nodes:
            node.drop_replies = 1
        async with client.lease(20):
            assert len(cluster.state.leases) == 1

    over(scenario)


def test_the_exception_of_the_block_wins() -> None:
    """What went wrong inside is more than that the lease went, too."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async def owner() -> None:
            async with client.lease(5) as lease:
                for node in cluster.nodes:
                    node.hang()
                await lease.lost.wait()
                raise KeyError("mine")

        with pytest.raises(KeyError):
            await owner()

    over(scenario)


def test_renewing_that_will_never_work_ends_it() -> None:
    """No use in asking for ever what every node refuses."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        def refuse(asked: Asked) -> DengineError | None:
            return InvalidRequest("no such call") if asked.target.endswith("/keepalive") else None

        for node in cluster.nodes:
            node.refuse = refuse
        with pytest.raises(LeaseLost, match="no such call"):
            async with client.lease(30) as lease:
                await lease.lost.wait()

    over(scenario)


def test_closing_the_client_tells_the_owner() -> None:
    """Nobody renews it any more, so it is as good as lost."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async def owner() -> None:
            async with client.lease(10) as lease:
                await client.close()
                await asyncio.sleep(0)
                assert lease.lost.is_set()

        with pytest.raises(LeaseLost, match="the client was closed"):
            await owner()
        with pytest.raises(ClientClosed):
            await client.grant_lease(5)

    over(scenario)


def test_a_lease_is_entered_once() -> None:
    async def scenario(cluster: FakeCluster, client: Client) -> None:
        lease = client.lease(10)
        with pytest.raises(RuntimeError, match="not granted yet"):
            _ = lease.id
        async with lease:
            pass
        with pytest.raises(RuntimeError, match="granted once"):
            async with lease:
                pass
        together = client.lease(10)
        answers = await asyncio.gather(together.grant(), together.grant(), return_exceptions=True)
        assert answers[0] is None
        assert isinstance(answers[1], RuntimeError)
        assert list(cluster.state.leases) == [together.id]
        await together.revoke()

    over(scenario)


def test_a_renewal_has_all_the_time_that_is_left() -> None:
    """Also the one after a failure: nodes that answer late are not given up too early for ever."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.lease(30) as lease:
            await asyncio.sleep(9)
            for node in cluster.nodes:
                node.hang()
            await asyncio.sleep(8)
            for node in cluster.nodes:
                node.heal()
                node.late_s = 3.5
            await asyncio.sleep(120)
            assert not lease.lost.is_set()

    over(scenario)


def test_a_revocation_that_is_cancelled_keeps_nothing_alive() -> None:
    """Whenever that happens: the lease is lost at once, and ends with its time at the latest."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        for turns in range(1, 12):
            lease = await client.lease(5).__aenter__()
            revoking = asyncio.create_task(lease.revoke())
            for _ in range(turns):
                await asyncio.sleep(0)
            revoking.cancel()
            await asyncio.gather(revoking, return_exceptions=True)
            assert lease.lost.is_set()
            await asyncio.sleep(6)
            assert cluster.state.leases == {}, turns

    over(scenario)


def test_the_keys_of_a_large_lease_are_waited_for() -> None:
    """The cluster deletes very many keys one part after the other. Who has revoked a lease, or left
    it, finds none of them; or hears that the time was too short, and what happens then.
    """

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        state = cluster.state
        state.keys_at_once = 1

        async def hold(lease: str) -> None:
            for key in ("a", "b", "c"):
                await client.put(key, b"", lease=lease)

        granted = await client.grant_lease(600)
        await hold(granted.id)
        with pytest.raises(RequestTimeout, match="has ended, but not all of its keys") as late:
            await client.revoke_lease(granted.id, timeout_s=3.0)
        assert late.value.outcome == "unknown"
        assert state.ending
        state.end()
        granted = await client.grant_lease(600)
        await hold(granted.id)
        looked = asyncio.Event()
        for node in cluster.nodes:
            node.refuse = lambda asked: looked.set() if "/v1/leases/" in asked.target else None
        revoking = asyncio.create_task(client.revoke_lease(granted.id))
        await looked.wait()
        assert not revoking.done()
        state.end()
        await revoking
        assert await client.count() == 1

        async with client.lease(600) as lease:
            await hold(lease.id)
            asyncio.get_running_loop().call_later(1.0, state.end)
        assert await client.count() == 1
        began = now()
        async with client.lease(600) as lease:
            await hold(lease.id)
        assert now() - began < 3.0, "an owner is not held up for long"
        assert state.ending

    over(scenario)
