"""`dengine.client` over real nodes: what tests/client shows over a stand-in, once for real."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from dengine.client import Client, Compare, Get, LockLost, Put
from dengine.errors import Compacted, NotFound, PreconditionFailed
from tests.cluster import Cluster, static_cluster

pytestmark = pytest.mark.timeout(300)
PATIENT_S = 60.0  # for calls that an election may hold up


def endpoints(cluster: Cluster) -> list[str]:
    return [f"{node.host}:{node.port}" for node in cluster.running()]


async def kill_leader(cluster: Cluster) -> None:
    """kill -9, and start it again when another one leads."""
    leader = await asyncio.to_thread(cluster.wait_leader)
    await asyncio.to_thread(leader.kill)
    await asyncio.to_thread(cluster.wait_leader)
    leader.start()


def test_every_operation(cluster: Cluster) -> None:
    """A real node understands each request, and the client each answer."""
    static_cluster(cluster, 1, 2, 3)

    async def scenario() -> None:
        async with Client(endpoints(cluster)[0], timeout_s=PATIENT_S) as client:
            first = await client.put(b"a/\xff", b"", if_none_match=True)
            assert first.created
            with pytest.raises(PreconditionFailed) as refused:
                await client.put(b"a/\xff", b"x", if_none_match=True)
            assert refused.value.details["current_revision"] == first.revision
            await client.put("a/1", b"\xfe", ttl_s=3600)
            found = await client.get("a/1", consistency="lease")
            assert found is not None
            assert found.value == b"\xfe"
            assert found.ttl_s is not None
            assert 3590 < found.ttl_s <= 3600
            assert await client.get("none") is None
            items = await client.list("a/").all()
            assert [(item.key, item.version) for item in items] == [(b"a/1", 1), (b"a/\xff", 1)]
            assert [i.key for i in await client.list("a/", limit=1).all()] == [b"a/1"]
            assert await client.count("a/") == 2
            done = await client.txn(
                [Compare("a/1", "value", "=", b"\xfe"), Compare("b", "exists", "=", False)],
                [Put("b", b"1", ttl_s=60), Get("b")],
            )
            item = done.results[1].item
            assert done.succeeded
            assert item is not None
            assert (item.value, item.mod_revision) == (b"1", done.revision)

            async with client.watch(prefix="a/", from_revision=first.revision, prev=True) as watch:
                deleted = await client.delete("a/1")
                changes = [await anext(watch) for _ in range(3)]
            assert [change.events[0].type for change in changes] == ["put", "put", "delete"]
            assert changes[2].revision == deleted.revision
            assert changes[2].events[0].prev == b"\xfe"

            async with client.lease(10) as lease:
                await client.put("leased", b"1", lease=lease)
                info = await client.lease_info(lease.id)
                assert (info.ttl_s, info.keys) == (10, (b"leased",))
            assert await client.get("leased") is None
            with pytest.raises(NotFound):
                await client.keepalive_lease(lease.id)
            async with client.lock("job") as lock:
                assert (await client.txn([lock.guard], [Put("by", b"me")])).succeeded
            assert not (await client.txn([lock.guard], [Put("by", b"me")])).succeeded
            async with client.election("e").campaign(b"me") as leadership:
                leader = await client.election("e").leader()
                assert leader is not None
                assert (leader.value, leader.token) == (b"me", leadership.token)
            assert (await client.delete(prefix="a/")).deleted == 1
            assert set(client.endpoints) == set(endpoints(cluster))

    asyncio.run(scenario())


def test_a_counter_is_exact_over_kills(cluster: Cluster) -> None:
    """Four clients count while leaders die: no increment is lost, and none happens twice."""
    static_cluster(cluster, 1, 2, 3)

    async def count(client: Client, times: int) -> None:
        for _ in range(times):
            while True:
                found = await client.get("counter")
                try:
                    if found is None:
                        await client.put("counter", b"1", if_none_match=True)
                    else:
                        value = b"%d" % (int(found.value) + 1)
                        await client.put("counter", value, if_match=found.mod_revision)
                    break
                except PreconditionFailed:
                    continue

    async def scenario() -> None:
        clients = [Client(endpoints(cluster), timeout_s=PATIENT_S) for _ in range(4)]
        counting = [asyncio.create_task(count(client, 250)) for client in clients]
        for _ in range(3):
            await kill_leader(cluster)
        await asyncio.gather(*counting)
        found = await clients[0].get("counter")
        assert found is not None
        assert found.value == b"1000"
        for client in clients:
            await client.close()

    asyncio.run(scenario())


def test_a_stopped_leader_is_left(cluster: Cluster) -> None:
    """SIGSTOP: it takes connections and answers nothing. The caller waits for an election, not
    for the node.
    """
    static_cluster(cluster, 1, 2, 3)

    async def scenario() -> None:
        async with Client(endpoints(cluster), timeout_s=PATIENT_S) as client:
            for _ in range(20):
                await client.put("k", b"")
            leader = await asyncio.to_thread(cluster.wait_leader)
            leader.signal(signal.SIGSTOP)
            try:
                began = time.monotonic()
                await client.put("k", b"after")
                assert time.monotonic() - began < 10.0
            finally:
                leader.signal(signal.SIGCONT)

    asyncio.run(scenario())


def test_a_watch_over_failovers(cluster: Cluster) -> None:
    """Whatever node serves it dies; each acknowledged write is told once, in order."""
    static_cluster(cluster, 1, 2, 3)

    async def scenario() -> None:
        writer = Client(endpoints(cluster), timeout_s=PATIENT_S)
        watcher = Client(endpoints(cluster), timeout_s=PATIENT_S)
        written: list[int] = []
        seen: list[int] = []

        async def write() -> None:
            for number in range(400):
                written.append((await writer.put("w", b"%d" % number)).revision)
                await asyncio.sleep(0.01)

        async def follow() -> None:
            async for change in watch:
                seen.append(change.revision)
                if change.events[-1].value == b"399":
                    return

        async with watcher.watch("w") as watch:
            tasks = [asyncio.create_task(write()), asyncio.create_task(follow())]
            for node in list(cluster.nodes.values()):
                await asyncio.to_thread(node.kill)
                await asyncio.to_thread(cluster.wait_leader)
                node.start()
                await asyncio.to_thread(cluster.wait_leader)
            await asyncio.gather(*tasks)
        assert seen == written
        for client in (writer, watcher):
            await client.close()

    asyncio.run(scenario())


def test_history_has_an_end(cluster: Cluster) -> None:
    """A watch from before it says so, and from where the keys have to be read anew."""
    static_cluster(cluster, 1, extra="[kv]\nhistory_revisions = 10\n")

    async def scenario() -> None:
        async with Client(endpoints(cluster), timeout_s=PATIENT_S) as client:
            for _ in range(50):
                last = await client.put("k", b"")
            with pytest.raises(Compacted) as failed:
                await anext(client.watch("k", from_revision=1))
            assert 0 < failed.value.details["compact_revision"] < last.revision

    asyncio.run(scenario())


def test_locks_over_pauses(cluster: Cluster) -> None:
    """Nodes are stopped for longer than a lease: never two holders, and tokens only grow."""
    static_cluster(cluster, 1, 2, 3)
    inside: list[int] = []
    tokens: list[int] = []

    async def contend(number: int) -> None:
        async with Client(endpoints(cluster), timeout_s=10.0) as client:
            for _ in range(5):
                try:
                    async with client.lock("job", ttl_s=3) as lock:
                        held = [n for n in inside if n != number]
                        assert held == [] or lock.remaining_s <= 0, f"{number} beside {held}"
                        inside.append(number)
                        tokens.append(lock.token)
                        lost = asyncio.create_task(lock.lost.wait())
                        await asyncio.wait({lost}, timeout=0.3)
                        lost.cancel()
                        inside.remove(number)
                except LockLost:
                    continue

    async def scenario() -> None:
        contending = [asyncio.create_task(contend(number)) for number in range(4)]
        for node in list(cluster.nodes.values()):
            node.signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(4.0)  # longer than the lease
            finally:
                node.signal(signal.SIGCONT)
            await asyncio.to_thread(cluster.wait_leader)
        await asyncio.gather(*contending)
        assert tokens == sorted(set(tokens))

    asyncio.run(scenario())
