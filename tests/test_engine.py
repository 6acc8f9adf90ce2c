"""Embedded mode: a node in the test's own process, and what an app does with it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

import dengine
from dengine.errors import (
    ConfigError,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    TryAgain,
)
from dengine.kv.commands import Compare, DeleteResult, Get, Put, PutResult, Txn
from dengine.node.watch_hub import Changes, Progress
from tests.cluster import free_port
from tests.node.hosts import on_loop, until

QUICK = {"cluster.founding_wait_ms": "0"}
PATIENT_S = 30.0


def engine(directory: Path, port: int | None = None) -> dengine.Engine:
    address = f"127.0.0.1:{port or free_port()}"
    return dengine.Engine(directory, listen_address=address, settings=QUICK)


def test_an_app_keeps_its_data_in_it(tmp_path: Path) -> None:
    """Everything that HTTP can do, without HTTP; and it is still there after a restart."""

    async def check() -> None:
        async with engine(tmp_path) as node:
            await node.wait_ready(PATIENT_S)
            assert node.is_leader
            assert await node.put("config/color", b"blue") == PutResult(1, True)
            found = await node.get("config/color")
            assert found is not None
            assert (found.value, found.mod_revision) == (b"blue", 1)
            with pytest.raises(PreconditionFailed):
                await node.put("config/color", b"red", if_absent=True)
            assert await node.put("config/color", b"red", if_revision=1) == PutResult(2, False)
            assert await node.put("n", b"1", once="job:1") == PutResult(3, True)
            assert await node.put("n", b"1", once="job:1") == PutResult(3, True)
            txn = Txn((Compare(b"n", "value", "=", b"1"),), (Put(b"n", b"2"), Get(b"n")), ())
            assert (await node.txn(txn)).succeeded
            page = await node.list("config/")
            assert [key for key, _ in page.items] == [b"config/color"]
        async with engine(tmp_path) as node:
            await node.wait_ready(PATIENT_S)
            found = await node.get("n")
            assert found is not None
            assert found.value == b"2"
            assert await node.delete_prefix("config/") == DeleteResult(5, 1)
            assert await node.delete("nothing") == DeleteResult(5, 0)

    on_loop(check)


def test_leases_and_watches(tmp_path: Path) -> None:
    async def check() -> None:
        async with engine(tmp_path) as node:
            await node.wait_ready(PATIENT_S)
            watch = await node.watch(prefix="service/", prev=True)
            lease = await node.grant_lease(60)
            await node.put("service/web/1", b"up", lease=lease)
            await node.keep_lease(lease)
            assert (await node.lease(lease)).keys == [b"service/web/1"]
            assert (await node.revoke_lease(lease)).deleted == 1
            with pytest.raises(NotFound):
                await node.keep_lease(lease)
            first, put, deleted = [await anext(watch) for _ in range(3)]
            assert first == Progress(0)
            assert isinstance(put, Changes)
            assert isinstance(deleted, Changes)
            assert deleted.events[0].prev is not None
            assert deleted.events[0].prev.value == b"up"
            await watch.aclose()
            with pytest.raises(InvalidRequest):
                await node.watch()

    on_loop(check)


def test_it_says_when_it_leads(tmp_path: Path) -> None:
    async def check() -> None:
        async with engine(tmp_path) as node:
            told = node.leadership()
            while not (now := await anext(told))["is_leader"]:
                pass
            assert now["leader"] == 1
            members = node.membership()
            await node.wait_ready(PATIENT_S)
            view = await anext(members)
            assert [member["id"] for member in view["members"]] == [1]

    on_loop(check)


def test_the_same_port_serves_http(tmp_path: Path) -> None:
    """Others read and write it, and join it."""

    async def check() -> None:
        port = free_port()
        async with engine(tmp_path, port) as node:
            await node.wait_ready(PATIENT_S)
            await node.put("k", b"v")
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /v1/kv/k HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
            answer = await reader.read()
            assert answer.endswith(b"\r\n\r\nv")
            writer.close()

    on_loop(check)


def test_a_second_one_joins(tmp_path: Path) -> None:
    """One app's engine founds the cluster, another's joins it and is promoted."""

    async def check() -> None:
        port = free_port()
        first = engine(tmp_path / "a", port)
        second = dengine.Engine(
            tmp_path / "b",
            node_id=2,
            listen_address=f"127.0.0.1:{free_port()}",
            join={1: f"127.0.0.1:{port}"},
        )
        async with first:
            await first.wait_ready(PATIENT_S)
            await first.put("k", b"v", timeout_s=PATIENT_S)
            async with second:
                await until(
                    lambda: second.status["voters"] == [1, 2], "the second to vote", PATIENT_S
                )
                found = await second.get("k", timeout_s=PATIENT_S)
                assert found is not None
                assert found.value == b"v"
                await second.put("k", b"w", timeout_s=PATIENT_S)

    on_loop(check)


def test_a_taken_port_and_a_wrong_setting_are_said(tmp_path: Path) -> None:
    async def check() -> None:
        port = free_port()
        async with engine(tmp_path / "a", port):
            with pytest.raises(TryAgain):
                async with engine(tmp_path / "b", port):
                    pass
        async with engine(tmp_path / "b", port):  # the directory was let go of
            pass

    on_loop(check)
    with pytest.raises(ConfigError, match=r"raft\.election\.timeout_ms_min"):
        dengine.Engine(tmp_path, settings={"raft.election.timeout_ms_min": "soon"})


def test_the_package_alone_loads_no_node() -> None:
    """`import dengine` is what `import dengine.client` begins with."""
    code = "import sys, dengine; sys.exit('dengine.engine' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
