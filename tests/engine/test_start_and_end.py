"""An engine from its start to its end: what it takes hold of, and that it lets go of all of it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

import dengine
from dengine.client.types import Put, PutResult
from dengine.embedded.node import NOWHERE
from dengine.engine import EngineClosed
from dengine.errors import ConfigError, RequestTimeout, StorageIO, TooLarge, TryAgain
from dengine.storage.log_store import LogStore
from tests.cluster import free_port
from tests.engine.apps import LOOPS, PATIENT_S, QUICK, alone, founder, joiner, on
from tests.node.hosts import until

Loop = Callable[[], asyncio.AbstractEventLoop]


def listening() -> set[int]:
    """The ports on which this process listens."""
    found = psutil.Process().net_connections(kind="tcp")
    return {c.laddr.port for c in found if c.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "uvloop"])
def test_an_app_keeps_its_data_in_it(tmp_path: Path, loop: Loop) -> None:
    """On either event loop; without a port; and what was acknowledged is there after a restart."""

    async def app() -> None:
        before = listening()
        async with alone(tmp_path) as engine:
            now = await engine.wait_ready(PATIENT_S)
            assert (now.leader, now.is_leader) == (1, True)
            assert await engine.put("k", b"v") == PutResult(1, True)
            assert engine.address is None
            assert listening() == before
            async with engine.watch("k", from_revision=1) as watch:
                assert (await anext(watch)).events[0].value == b"v"
            async with engine.lease(60) as lease:
                await engine.put("leased", b"x", lease=lease)
        async with alone(tmp_path) as engine:
            found = await engine.get("k")
            assert found is not None
            assert (found.value, found.mod_revision) == (b"v", 1)
            assert await engine.get("leased") is None

    on(loop, app)


def test_a_call_may_come_before_it_is_ready(tmp_path: Path) -> None:
    """It waits for a leader like any other, within its time."""

    async def app() -> None:
        async with alone(tmp_path) as engine:
            assert (await engine.put("k", b"v", timeout_s=PATIENT_S)).created

    on(uvloop.new_event_loop, app)


def test_wait_ready_says_for_what_it_waits(tmp_path: Path) -> None:
    """Who is to join a cluster that cannot be reached is not ready, and does not found one."""

    async def app() -> None:
        async with joiner(tmp_path, 2, free_port(), free_port()) as engine:
            with pytest.raises(RequestTimeout, match="not a member of a cluster yet") as caught:
                await engine.wait_ready(0.2)
            assert caught.value.outcome == "none"
            assert engine.members == ()
            assert engine.leader is None

    on(uvloop.new_event_loop, app)


def test_a_second_engine_on_one_directory(tmp_path: Path) -> None:
    """It is told who has it, the first one does not notice, and later it may have it."""

    async def app() -> None:
        async with alone(tmp_path) as engine:
            await engine.put("k", b"v", timeout_s=PATIENT_S)
            with pytest.raises(TryAgain, match=f"in use by process {os.getpid()}"):
                async with alone(tmp_path):
                    pass
            await engine.put("k", b"w")
        async with alone(tmp_path) as engine:
            found = await engine.get("k", timeout_s=PATIENT_S)
            assert found is not None
            assert found.value == b"w"

    on(uvloop.new_event_loop, app)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """It is said before anything is written, and nothing stays locked: directory, port, tasks."""

    async def app() -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(TryAgain, match=f"cannot listen on 127.0.0.1:{port}"):
                async with founder(tmp_path, port):
                    pass
        assert os.listdir(tmp_path) == []
        async with founder(tmp_path, port) as engine:
            await engine.wait_ready(PATIENT_S)
        assert port not in listening()

    on(uvloop.new_event_loop, app)


def test_a_port_that_is_lost_to_somebody_at_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that fails when the directory is open already lets go of it."""

    async def app() -> None:
        async def refuse(_: Any) -> None:
            raise TryAgain("somebody was faster")

        with monkeypatch.context() as taken:
            taken.setattr("dengine.embedded.node.HttpServer.start", refuse)
            with pytest.raises(TryAgain, match="somebody was faster"):
                async with founder(tmp_path, free_port()):
                    pass
        async with founder(tmp_path, free_port()) as engine:
            await engine.wait_ready(PATIENT_S)

    on(uvloop.new_event_loop, app)


def test_a_start_that_is_cancelled(tmp_path: Path) -> None:
    async def app() -> None:
        entering = asyncio.create_task(founder(tmp_path, free_port()).__aenter__())
        await asyncio.sleep(0)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        async with alone(tmp_path) as engine:
            await engine.wait_ready(PATIENT_S)

    on(uvloop.new_event_loop, app)


@pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "uvloop"])
def test_a_node_that_dies_ends_the_engine_and_not_the_app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: Loop
) -> None:
    """Whoever waits is told, everybody after that, and leaving says it too. What is durable stays,
    and another engine goes on with it at once.
    """

    def refuse(*_: Any) -> None:
        raise StorageIO("the disk is gone")

    async def app() -> None:
        engine = alone(tmp_path)
        await engine.__aenter__()
        await engine.wait_ready(PATIENT_S)
        await engine.put("k", b"v")
        told, watch = engine.leadership(), engine.watch("k", from_revision=2)
        assert (await anext(told)).is_leader
        closed = asyncio.create_task(engine.wait_closed())
        waiting = asyncio.create_task(anext(watch))
        with monkeypatch.context() as broken:
            broken.setattr(LogStore, "save", refuse)
            with pytest.raises(EngineClosed, match="the disk is gone") as caught:
                await engine.put("k", b"w", timeout_s=PATIENT_S)
            reason = await closed
        assert isinstance(reason, StorageIO)
        assert (caught.value.outcome, caught.value.reason) == ("unknown", reason)
        with pytest.raises(EngineClosed):
            await waiting
        assert engine.closed
        assert not engine.is_leader
        assert engine.leader is None
        assert not (await anext(told)).is_leader
        with pytest.raises(EngineClosed):
            await anext(told)
        for call in (
            engine.get("k"),
            engine.get("k", consistency="eventual"),
            engine.put("k", b"x"),
            engine.delete("k"),
            engine.list().all(),
            engine.count(),
            engine.txn(),
            engine.grant_lease(60),
            engine.lease_info("x"),
            anext(engine.watch("k")),
            engine.wait_ready(),
        ):
            with pytest.raises(EngineClosed, match="the disk is gone") as caught:
                await call
            assert caught.value.outcome == "none"
        async with alone(tmp_path) as another:
            found = await another.get("k", timeout_s=PATIENT_S)
            assert found is not None
            assert found.value in (b"v", b"w")
        with pytest.raises(EngineClosed, match="the disk is gone"):
            await engine.__aexit__(None, None, None)

    on(loop, app)


def test_an_error_of_the_app_is_not_hidden_by_that_of_the_node(tmp_path: Path) -> None:
    async def app() -> None:
        engine = alone(tmp_path)
        await engine.__aenter__()
        await engine.wait_ready(PATIENT_S)
        engine._embedded.node.fail(StorageIO("the disk is gone"))
        await engine.wait_closed()
        assert await engine.__aexit__(ValueError, ValueError("of the app"), None) is None

    on(uvloop.new_event_loop, app)


def test_a_lease_ends_with_its_engine(tmp_path: Path) -> None:
    """Its owner hears at once that it is not renewed any more."""

    async def app() -> None:
        engine = alone(tmp_path)
        await engine.__aenter__()
        await engine.wait_ready(PATIENT_S)
        lease = engine.lease(3600)
        await lease.grant()
        engine._embedded.node.fail(StorageIO("the disk is gone"))
        async with asyncio.timeout(PATIENT_S):
            await lease.lost.wait()
        with pytest.raises(EngineClosed):
            await engine.__aexit__(None, None, None)

    on(uvloop.new_event_loop, app)


def test_leaving_lets_calls_end(tmp_path: Path) -> None:
    """What was asked before is answered; what comes after is refused."""

    async def app() -> None:
        async with alone(tmp_path) as engine:
            await engine.wait_ready(PATIENT_S)
            writes = [asyncio.create_task(engine.put(f"k/{n}", b"v")) for n in range(50)]
            reads = [asyncio.create_task(engine.get("k/0")) for _ in range(50)]
            closed = asyncio.create_task(engine.wait_closed())
            told = engine.leadership()
            await asyncio.sleep(0)  # all of them have begun
        assert sorted([(await write).revision for write in writes]) == list(range(1, 51))
        for read in reads:
            await read
        assert await closed is None
        states = [state async for state in told]
        assert not states[-1].is_leader
        with pytest.raises(EngineClosed, match="this engine was closed") as caught:
            await engine.get("k/0")
        assert caught.value.reason is None
        with pytest.raises(EngineClosed):
            await engine.put("k/0", b"w")
        async with alone(tmp_path) as engine:
            assert await engine.count("k/", timeout_s=PATIENT_S) == 50

    on(uvloop.new_event_loop, app)


def test_leaving_by_cancellation(tmp_path: Path) -> None:
    """It is left in good order, also when somebody is impatient and cancels again."""

    async def app() -> None:
        entered = asyncio.Event()

        async def body() -> None:
            async with alone(tmp_path) as engine:
                await engine.put("k", b"v", timeout_s=PATIENT_S)
                entered.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(body())
        await entered.wait()
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (tmp_path / "1" / "CLEAN").exists()
        async with alone(tmp_path) as engine:
            assert await engine.get("k", timeout_s=PATIENT_S) is not None

    on(uvloop.new_event_loop, app)


def test_an_engine_is_entered_first_and_once(tmp_path: Path) -> None:
    """Whoever forgets it hears that first, whatever else is wrong with the call."""

    async def app() -> None:
        engine = alone(tmp_path)
        calls: list[Callable[[], Any]] = [
            lambda: engine.get("k"),
            lambda: engine.put("k", b"v", ttl_s=-1),
            lambda: engine.delete(),
            lambda: engine.txn(success=[Put("", b"")]),
            lambda: engine.grant_lease(0),
            lambda: engine.count("k" * 1000),
            lambda: engine.list("k" * 1000),
            lambda: engine.watch(),
        ]
        for call in calls:
            with pytest.raises(RuntimeError, match="async with"):
                await call()
        async with engine:
            with pytest.raises(RuntimeError, match="entered once"):
                await engine.__aenter__()

    on(uvloop.new_event_loop, app)


def test_an_engine_belongs_to_one_event_loop(tmp_path: Path) -> None:
    """Whoever uses it from that of another thread is told so, by every call; and it goes on."""

    async def app() -> None:
        async with alone(tmp_path) as engine:
            await engine.wait_ready(PATIENT_S)
            await engine.put("k", b"kept")
            watch, lock, lease = engine.watch("k"), engine.lock("job"), engine.lease(60)

            async def elsewhere() -> None:
                calls: list[Callable[[], Any]] = [
                    lambda: engine.get("k"),
                    lambda: engine.put("k", b"lost"),
                    lambda: engine.wait_ready(PATIENT_S),
                    lambda: anext(watch),
                    watch.__aenter__,
                    lock.__aenter__,
                    lease.__aenter__,
                    lambda: anext(engine.watch("k")),
                    engine.lock("other").__aenter__,
                    engine.lease(60).__aenter__,
                    lambda: engine.election("boss").leader(),
                    lambda: engine.__aexit__(None, None, None),
                ]
                for call in calls:
                    with pytest.raises(RuntimeError, match="belongs to the event loop"):
                        await call()

            def look() -> str | None:
                assert engine.is_leader
                return engine.address

            await asyncio.to_thread(asyncio.run, elsewhere())
            assert await asyncio.to_thread(look) is None
            found = await engine.get("k")
            assert found is not None
            assert found.value == b"kept"
        async with alone(tmp_path) as engine:  # nothing keeps the directory
            await engine.wait_ready(PATIENT_S)

    on(uvloop.new_event_loop, app)


def test_the_port_serves_http(tmp_path: Path) -> None:
    """Port 0 is any; others read and write the same keys there, and the cluster knows it by it."""

    async def app() -> None:
        async with alone(tmp_path) as engine:
            await engine.put("k", b"v", timeout_s=PATIENT_S)
            assert [member.address for member in engine.members] == [NOWHERE]
        engine = dengine.Engine(tmp_path, listen_address="127.0.0.1:0", settings=QUICK)
        async with engine:
            await engine.wait_ready(PATIENT_S)
            assert engine.address is not None
            host, _, port = engine.address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /v1/kv/k HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
            async with asyncio.timeout(PATIENT_S):
                answer = await reader.read()
            writer.close()
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.endswith(b"\r\n\r\nv")
            await until(
                lambda: [member.address for member in engine.members] == [engine.address],
                "the cluster to know the address",
                PATIENT_S,
            )
        assert int(port) not in listening()

    on(uvloop.new_event_loop, app)


def test_the_file_of_a_server_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`config` is a file as `dengine serve` takes it, with the environment on top."""
    port = free_port()
    file = tmp_path / "n1.toml"
    file.write_text(
        f'[cluster]\nnode_id = 1\nlisten_address = "127.0.0.1:{port}"\nfounding_wait_ms = 0\n'
        f'initial_cluster = [ {{ id = 1, address = "127.0.0.1:{port}", role = 2, status = 2 }} ]\n'
        f'db_root_dir = "{tmp_path / "db"}"\n'
    )
    monkeypatch.setenv("DENGINE__LIMITS__VALUE_BYTES", "10")

    async def app() -> None:
        async with dengine.Engine(config=file) as engine:
            await engine.wait_ready(PATIENT_S)
            assert engine.address == f"127.0.0.1:{port}"
            with pytest.raises(TooLarge, match="at most 10"):
                await engine.put("k", b"12345678901")

    on(uvloop.new_event_loop, app)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"node_id": 0}, "id must be an integer from 1"),
        ({"listen_address": "here"}, "cluster.listen_address"),
        ({"listen_address": "127.0.0.1:99999"}, "cluster.listen_address"),
        ({"join": True}, "cluster.listen_address is missing"),
        ({"initial_cluster": {2: "127.0.0.1:9082"}}, "cluster.listen_address is missing"),
        ({"join": True, "listen_address": "127.0.0.1:9081"}, "names nobody to join"),
        ({"settings": {"raft.election.timeout_ms_mni": 500}}, "timeout_ms_min"),
        ({"settings": {"raft.election.timeout_ms_min": "soon"}}, "raft.election.timeout_ms_min"),
        ({"settings": {"read.lease_ms": 900}}, "read.lease_ms"),
    ],
)
def test_a_mistake_is_a_sentence_that_names_the_key(
    tmp_path: Path, arguments: dict[str, Any], said: str
) -> None:
    """At once, when the engine is made, and nothing is written."""
    with pytest.raises(ConfigError) as caught:
        dengine.Engine(tmp_path / "db", **arguments)
    assert said in caught.value.message
    assert caught.value.message.startswith("dengine.Engine: ")
    assert not (tmp_path / "db").exists()


def test_a_directory_or_a_config() -> None:
    """To name neither, or both, is a mistake of the app and no configuration that is wrong."""
    assert "ValueError: neither `data_dir` nor `config`" in (dengine.Engine.__doc__ or "")
    with pytest.raises(ValueError, match="data_dir, or a config"):
        dengine.Engine()
    with pytest.raises(ValueError, match="data_dir, or a config"):
        dengine.Engine("./data", config="n1.toml")
    with pytest.raises(ValueError, match="alone"):
        dengine.Engine(config="n1.toml", node_id=2)


def test_the_package_alone_loads_no_node() -> None:
    """`import dengine` is what `import dengine.client` begins with, on hosts without [node] too."""
    code = (
        "import sys, dengine, dengine.client\n"
        "wrong = {'dengine.engine', 'dengine.node', 'dengine.storage', 'lmdb', 'msgspec'}\n"
        "sys.exit(repr(wrong & set(sys.modules)) if wrong & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
