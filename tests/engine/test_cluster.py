"""Three engines that belong together, in one process: joining, forwarding, losing one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

import dengine
from dengine.client.types import PutResult
from dengine.engine import EngineClosed
from dengine.errors import ConfigError, StorageIO
from tests.cluster import free_port
from tests.engine.apps import PATIENT_S, QUICK, alone, founder, joiner, on, voters
from tests.node.hosts import until

pytestmark = pytest.mark.timeout(300)
GROWN_S = 60.0


@asynccontextmanager
async def three(directory: Path) -> AsyncIterator[list[dengine.Engine]]:
    """Engines 1, 2 and 3, all voters. Number 1 has founded the cluster, and leads it or did so."""
    ports = [free_port() for _ in range(3)]
    async with (
        founder(directory, ports[0]) as one,
        joiner(directory, 2, ports[1], ports[0]) as two,
        joiner(directory, 3, ports[2], ports[0]) as three,
    ):
        engines = [one, two, three]
        await until(
            lambda: all(voters(engine) == {1, 2, 3} for engine in engines), "three voters", GROWN_S
        )
        yield engines


def test_every_member_takes_every_call(tmp_path: Path) -> None:
    """A follower has the leader do what only that can, and what was written anywhere is seen
    everywhere.
    """

    async def app() -> None:
        async with three(tmp_path) as engines:
            for n, engine in enumerate(engines):
                put = await engine.put(f"k/{n}", b"v", timeout_s=PATIENT_S)
                assert put.created
                for reader in engines:
                    found = await reader.get(f"k/{n}", timeout_s=PATIENT_S)
                    assert found is not None
                    assert (found.value, found.mod_revision) == (b"v", put.revision)
            leaders = [engine for engine in engines if engine.is_leader]
            follower = next(engine for engine in engines if not engine.is_leader)
            assert len(leaders) == 1
            assert follower.leader is not None
            assert follower.leader.address == leaders[0].address
            async with follower.watch(prefix="k/", from_revision=1) as watch:
                async with asyncio.timeout(PATIENT_S):
                    seen = [await anext(watch) for _ in range(3)]
            assert [change.events[0].key for change in seen] == [b"k/0", b"k/1", b"k/2"]
            async with follower.lock("job", timeout_s=PATIENT_S) as lock:
                assert lock.token
            assert await leaders[0].put("once", b"", idempotency_key="x") == await follower.put(
                "once", b"", idempotency_key="x"
            ), "a repetition may come to another member"

    on(uvloop.new_event_loop, app)


def test_members_are_told(tmp_path: Path) -> None:
    """From a cluster of one to three voters at once, as each of them sees it."""

    async def app() -> None:
        async with three(tmp_path) as engines:
            for engine in engines:
                assert [member.id for member in engine.members] == [1, 2, 3]
            async with asyncio.timeout(PATIENT_S):
                async for now in engines[2].membership():
                    if not now.joint:  # else the change is still to be finished
                        break
            assert [member.status for member in now.members] == ["active"] * 3

    on(uvloop.new_event_loop, app)


def test_whoever_leaves_hands_leadership_over(tmp_path: Path) -> None:
    """The others have a leader when the block has been left, and lose nothing."""
    ports = [free_port() for _ in range(3)]

    async def app() -> None:
        async with (
            joiner(tmp_path, 2, ports[1], ports[0]) as two,
            joiner(tmp_path, 3, ports[2], ports[0]) as three,
        ):
            async with founder(tmp_path, ports[0]) as one:
                everyone = (one, two, three)
                await until(
                    lambda: all(voters(e) == {1, 2, 3} for e in everyone), "three voters", GROWN_S
                )
                await one.put("k", b"1", timeout_s=PATIENT_S)
                told = one.leadership()
            states = [state async for state in told]
            assert not states[-1].is_leader
            assert await two.put("k", b"2", timeout_s=PATIENT_S) == PutResult(2, False)
            assert three.leader is not None
            assert three.leader.id in (2, 3)
            async with founder(tmp_path, ports[0]) as one:  # it comes back as a follower
                found = await one.get("k", timeout_s=PATIENT_S)
                assert found is not None
                assert found.value == b"2"
                assert one.leader is not None
                assert one.leader.id in (2, 3)

    on(uvloop.new_event_loop, app)


def test_one_that_dies_does_not_take_the_others_along(tmp_path: Path) -> None:
    """The other two elect a leader, and what was on its way to the dead one happens once."""

    async def app() -> None:
        ports = [free_port() for _ in range(3)]
        engines = [
            founder(tmp_path, ports[0]),
            joiner(tmp_path, 2, ports[1], ports[0]),
            joiner(tmp_path, 3, ports[2], ports[0]),
        ]
        for engine in engines:
            await engine.__aenter__()
        await until(
            lambda: all(voters(engine) == {1, 2, 3} for engine in engines), "three voters", GROWN_S
        )
        await until(lambda: any(engine.is_leader for engine in engines), "a leader", GROWN_S)
        dying = next(engine for engine in engines if engine.is_leader)
        one, other = (engine for engine in engines if engine is not dying)
        writes = [asyncio.create_task(one.put(f"k/{n}", b"v", timeout_s=60)) for n in range(20)]
        await asyncio.sleep(0)
        dying._embedded.node.fail(StorageIO("the disk is gone"))
        assert isinstance(await dying.wait_closed(), StorageIO)
        assert not dying.is_leader
        assert sorted([(await write).revision for write in writes]) == list(range(1, 21))
        assert await other.count("k/", timeout_s=PATIENT_S) == 20
        with pytest.raises(EngineClosed, match="the disk is gone"):
            await dying.__aexit__(None, None, None)
        await other.put("k", b"v", timeout_s=PATIENT_S)
        for engine in (one, other):
            await engine.__aexit__(None, None, None)

    on(uvloop.new_event_loop, app)


def test_who_has_company_needs_a_port(tmp_path: Path) -> None:
    """A member that others could not reach does not start, and lets go of what it has opened."""

    async def app() -> None:
        port, other = free_port(), free_port()
        immediate = {**QUICK, "raft.membership.promotion": "immediate"}
        address = f"127.0.0.1:{port}"
        async with (
            dengine.Engine(tmp_path, listen_address=address, settings=immediate) as one,
            joiner(tmp_path, 2, other, port) as two,
        ):
            await until(lambda: voters(one) == voters(two) == {1, 2}, "two voters", GROWN_S)
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"listen_address is missing.*node 2"):
                await alone(tmp_path).__aenter__()

    on(uvloop.new_event_loop, app)


def test_founding_together(tmp_path: Path) -> None:
    """Three that name each other, and none of which is there first."""

    async def app() -> None:
        addresses = {node_id: f"127.0.0.1:{free_port()}" for node_id in (1, 2, 3)}
        engines = [
            dengine.Engine(tmp_path, node_id=node_id, initial_cluster=addresses)
            for node_id in addresses
        ]
        async with engines[0], engines[1], engines[2]:
            for engine, address in zip(engines, addresses.values(), strict=True):
                await engine.wait_ready(GROWN_S)
                assert engine.address == address
                assert voters(engine) == {1, 2, 3}
            await engines[0].put("k", b"v", timeout_s=PATIENT_S)
            assert await engines[2].get("k", timeout_s=PATIENT_S) is not None

    on(uvloop.new_event_loop, app)
