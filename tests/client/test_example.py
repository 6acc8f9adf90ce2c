"""examples/service-discovery, used for real: in virtual time, and as processes."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from dengine.client import Client
from tests.client.fake_server import cluster_thread, fake_cluster
from tests.client.virtual import run

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "examples" / "service-discovery" / "discovery.py"
WAIT_S = 60.0


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("discovery", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_survives_what_it_says() -> None:
    """Instances that come, die and are cut off; nodes that die; an outage longer than a lease."""
    discovery = load()

    async def scenario() -> None:
        async with fake_cluster(3) as cluster:
            user, one, two = (Client(cluster.endpoints) for _ in range(3))
            seen: list[dict[str, str]] = []

            async def follow() -> None:
                async for live in discovery.instances(user, "web"):
                    seen.append(live)

            async def until(live: dict[str, str]) -> None:
                for _ in range(10_000):
                    if seen and seen[-1] == live:
                        return
                    await asyncio.sleep(0.05)
                raise AssertionError(f"waited for {live}, saw {seen}")

            tasks = [asyncio.create_task(follow())]
            await until({})
            for client, name in ((one, "1"), (two, "2")):
                work = discovery.register(client, "web", name, f"10.0.0.{name}:80")
                tasks.append(asyncio.create_task(work))
            both = {"1": "10.0.0.1:80", "2": "10.0.0.2:80"}
            await until(both)

            for node in cluster.nodes:  # each node fails for a while, nobody notices
                before = len(seen)
                node.hang()
                cluster.leader = cluster.nodes[node.node_id % 3]
                await asyncio.sleep(20)
                node.heal()
                assert seen[before:] == []

            await two.close()  # as if it had died
            await until({"1": "10.0.0.1:80"})

            for node in cluster.nodes:  # longer than the lease: it registers again afterwards
                node.partitioned = True
            cluster.leader = None
            await asyncio.sleep(60)
            assert seen[-1] == {"1": "10.0.0.1:80"}, "what was known last"
            for node in cluster.nodes:
                node.heal()
            cluster.leader = cluster.nodes[1]
            await asyncio.sleep(30)
            await until({"1": "10.0.0.1:80"})
            assert len(cluster.state.leases) == 1

            tasks[1].cancel()  # in good order
            await asyncio.gather(tasks[1], return_exceptions=True)
            await until({})
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for client in (user, one):
                await client.close()

    run(scenario())


def test_as_it_is_typed() -> None:
    """Two processes: one registers, one watches; SIGTERM leaves in good order."""

    def until(condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < end, f"waited {WAIT_S} s for {what}"
            time.sleep(0.05)

    with cluster_thread(1) as thread:
        environ = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DENGINE_ENDPOINTS": thread.cluster.endpoints[0],
        }

        def start(*args: str) -> subprocess.Popen[str]:
            return subprocess.Popen(
                [sys.executable, str(SCRIPT), *args],
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

        def keys() -> list[bytes]:
            found: list[bytes] = thread.do(lambda cluster: list(cluster.state.keys))
            return found

        def line(process: subprocess.Popen[str]) -> str:
            assert process.stdout is not None
            return process.stdout.readline().strip()

        processes = [start("watch", "web")]
        try:
            assert line(processes[0]) == "nobody"
            processes.append(start("register", "web", "a:1", "--instance", "one"))
            until(lambda: keys() == [b"services/web/one"], "the registration")
            processes[1].terminate()
            out, _ = processes[1].communicate(timeout=WAIT_S)
            assert out == "registered services/web/one at a:1\n"
            assert processes[1].returncode == 0
            until(lambda: keys() == [], "the end of the registration")
            assert [line(processes[0]) for _ in range(2)] == ["one at a:1", "nobody"]
            processes[0].terminate()
            assert processes[0].wait(WAIT_S) == 0
        finally:
            for process in processes:
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()
