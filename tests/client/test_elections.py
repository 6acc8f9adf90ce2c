"""Elections: one leader, whom all can see, and who says of himself what he likes."""

from __future__ import annotations

import asyncio

import pytest

from dengine.client import Client, LockLost, Put
from dengine.client.elections import Leader
from tests.client.fake_server import FakeCluster
from tests.client.fake_state import Asked
from tests.client.test_locks import over, queued, until

pytestmark = pytest.mark.timeout(600)  # virtual time is quick, a busy machine is not


def observing(client: Client, name: str) -> tuple[asyncio.Task[None], list[Leader | None]]:
    """The leaders that an observer has seen so far; who asks ends it."""
    seen: list[Leader | None] = []

    async def observe() -> None:
        async for leader in client.election(name).observe():
            seen.append(leader)

    return asyncio.create_task(observe()), seen


def test_an_election_has_one_leader_whom_all_can_see() -> None:
    async def scenario(cluster: FakeCluster, client: Client) -> None:
        election = client.election("scheduler")
        observer, seen = observing(client, "scheduler")
        await until(lambda: seen == [None])
        async with election.campaign(b"a") as first:
            assert await election.leader() == Leader(b"a", first.token)
            second = asyncio.create_task(election.campaign(b"b").__aenter__())
            await asyncio.sleep(1)
            assert not second.done()
        leadership = await second
        assert await election.leader() == Leader(b"b", leadership.token)
        await leadership.resign()
        assert await election.leader() is None
        await until(lambda: len(seen) == 4)
        assert seen == [
            None,
            Leader(b"a", first.token),
            Leader(b"b", leadership.token),
            None,
        ]
        observer.cancel()
        await asyncio.gather(observer, return_exceptions=True)

    over(scenario)


def test_observing_outlives_nodes_and_history() -> None:
    """The node of the observer dies while the history it needs is thrown away: it looks anew."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        observer, seen = observing(client, "e")
        await until(lambda: sum(node.streams for node in cluster.nodes) == 1)
        async with Client(cluster.endpoints) as other:
            [node] = [node for node in cluster.nodes if node.streams]
            await node.kill()
            cluster.leader = next(each for each in cluster.nodes if each is not node)
            for number in range(3):
                async with other.election("e").campaign(b"%d" % number, timeout_s=60):
                    pass
            async with other.election("e").campaign(b"last", timeout_s=60) as last:
                cluster.state.compact(cluster.state.revision)
                await until(lambda: seen[-1] == Leader(b"last", last.token))
        observer.cancel()
        await asyncio.gather(observer, return_exceptions=True)

    over(scenario)


def test_a_leader_proclaims_another_value_and_goes_on_leading() -> None:
    async def scenario(cluster: FakeCluster, client: Client) -> None:
        observer, seen = observing(client, "e")
        await until(lambda: seen == [None])
        lead = client.election("e").campaign(b"starting", ttl_s=5)
        with pytest.raises(RuntimeError, match="not held yet"):
            await lead.proclaim(b"early")
        async with lead:
            old = lead.guard
            await lead.proclaim(b"ready")
            assert not (await client.txn([old])).succeeded
            assert (await client.txn([lead.guard], [Put("by", b"it")])).succeeded
            await asyncio.sleep(20)
            assert not lead.lost.is_set()
            lead.check()
            assert (await client.txn([lead.guard])).succeeded
            second = asyncio.create_task(client.election("e").campaign(b"next").__aenter__())
            await until(lambda: queued(cluster, b"_election/e/") == 2)
            await lead.proclaim(b"busy")
            await asyncio.sleep(5)
            assert not second.done()
        following = await second
        await following.resign()
        await until(lambda: seen[-1] is None and len(seen) > 1)
        assert seen == [
            None,
            Leader(b"starting", lead.token),
            Leader(b"ready", lead.token),
            Leader(b"busy", lead.token),
            Leader(b"next", following.token),
            None,
        ]
        observer.cancel()
        await asyncio.gather(observer, return_exceptions=True)
        assert cluster.state.leases == {}
        assert queued(cluster, b"_election/") == 0

    over(scenario)


def test_what_became_of_a_proclamation_without_an_answer_is_learned() -> None:
    """It may have happened: the guard follows what the key says."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.election("e").campaign(b"starting", ttl_s=60) as lead:
            await until(lambda: sum(node.streams for node in cluster.nodes) == 1)
            lease = lead.key.rpartition(b"/")[2].decode()
            where = f"/v1/kv/{lead.key.decode()}?lease={lease}"
            cluster.state.execute(Asked("PUT", where, {}, b"ready"))
            await until(lambda: lead.guard.operand == cluster.state.revision)
            assert (await client.txn([lead.guard])).succeeded
            assert not lead.lost.is_set()

    over(scenario)


def test_nobody_proclaims_what_is_lost() -> None:
    async def scenario(cluster: FakeCluster, client: Client) -> None:
        lead = await client.election("e").campaign(b"a").__aenter__()
        await client.delete(lead.key)
        with pytest.raises(LockLost, match="its key is gone"):
            await lead.proclaim(b"b")
        assert await client.election("e").leader() is None
        with pytest.raises(LockLost):
            await lead.resign()

    over(scenario)


def test_who_leads_is_read_from_the_majority() -> None:
    """Whatever the nodes are configured for: a node that is behind knows an earlier holder."""

    async def scenario(cluster: FakeCluster, client: Client) -> None:
        async with client.lock("job"):
            pass
        election = client.election("e")
        async with election.campaign(b"a"):
            await election.leader()
        watch = client.watch("job")
        async with watch:
            pass
        listings = [a.target for a in cluster.asked if a.target.startswith("/v1/kv?")]
        assert listings
        assert all("consistency=linearizable" in target for target in listings)

    over(scenario)
