"""What the documentation of the clients shows, the commands that work with them, and the example of
service discovery: what tests/client shows over a stand-in, once over a real node.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import IO, Any

import pytest

from dengine.client import Client, sync
from tests.client.test_package import ASYNC, NAMES, SYNC
from tests.cluster import ROOT, Cluster, static_cluster, wait_for

pytestmark = pytest.mark.timeout(300)
PATIENT_S = 60.0
DENGINE = ("-m", "dengine")
DISCOVERY = (str(ROOT / "examples" / "service-discovery" / "discovery.py"),)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A node that all these tests share."""
    with Cluster(tmp_path_factory.mktemp("for-real")) as cluster:
        [node] = static_cluster(cluster, 1).running()
        yield f"{node.host}:{node.port}"
        print(cluster.describe())


@pytest.fixture
def client(endpoint: str) -> Iterator[sync.Client]:
    """A client of the node, which holds no key when a test begins."""
    with sync.Client(endpoint, timeout_s=PATIENT_S) as client:
        client.delete(all=True)
        yield client


class Programs:
    """Python programs that know where the node is, and end with the test."""

    def __init__(self, endpoint: str) -> None:
        self._environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "LC_ALL": "C",
            "DENGINE_ENDPOINTS": endpoint,
        }
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *args: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *args],
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._started.append(process)
        return process

    def run(self, *args: str) -> str:
        """What it prints; it has to end well."""
        process = self.start(*args)
        printed, _ = process.communicate(timeout=PATIENT_S)
        assert process.returncode == 0, printed
        return printed

    def end(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture
def programs(endpoint: str) -> Iterator[Programs]:
    programs = Programs(endpoint)
    yield programs
    programs.end()


def line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().rstrip("\n")


def ended(process: subprocess.Popen[str], number: signal.Signals = signal.SIGINT) -> int:
    """Its exit code, after this signal."""
    process.send_signal(number)
    return process.wait(PATIENT_S)


# --- the documentation


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("name", sorted(ASYNC))
def test_examples(name: str, endpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each of them runs, and leaves nothing open of which asyncio would complain."""
    code = f"async def example():\n{textwrap.indent(ASYNC[name], '    ')}"

    async def scenario() -> None:
        async with Client(endpoint, timeout_s=PATIENT_S) as given:
            space: dict[str, Any] = {**NAMES, "client": given, "endpoints": [endpoint]}
            exec(compile(code, name, "exec"), space)
            await space["example"]()
        del space
        gc.collect()  # while the loop still runs, as in an app that goes on

    asyncio.run(scenario())
    assert caplog.text == ""


@pytest.mark.parametrize("name", sorted(SYNC))
def test_synchronous_examples(
    name: str, endpoint: str, client: sync.Client, caplog: pytest.LogCaptureFixture
) -> None:
    code = f"def example():\n{textwrap.indent(SYNC[name], '    ')}"
    space: dict[str, Any] = {**NAMES, "Client": sync.Client, "endpoints": [endpoint]}
    space["client"] = client
    exec(compile(code, name, "exec"), space)
    space["example"]()
    gc.collect()
    assert caplog.text == ""


# --- commands


def test_watch(programs: Programs, client: sync.Client) -> None:
    """The past that was asked for, and what happens then."""
    first = client.put("a/1", b"red").revision
    watching = programs.start(
        *DENGINE, "watch", "--prefix", "a/", "--from-revision", str(first), "--prev"
    )
    assert line(watching.stdout) == f"{first}  put     a/1  red"
    client.put("a/1", b"blue")
    client.delete("a/1")
    assert line(watching.stdout) == f"{first + 1}  put     a/1  blue  (was red)"
    assert line(watching.stdout) == f"{first + 2}  delete  a/1  (was blue)"
    assert ended(watching) == 130


def test_lease(programs: Programs, client: sync.Client) -> None:
    """A key lives as long as its lease is renewed, and goes when that is revoked."""
    name = programs.run(*DENGINE, "lease", "grant", "2").strip()
    renewing = programs.start(*DENGINE, "lease", "keepalive", name)
    assert line(renewing.stdout) == f"lease {name} lasts 2 s"
    client.put("k", b"v", lease=name)
    for _ in range(4):  # 2.7 s
        assert line(renewing.stdout) == f"lease {name} lasts 2 s"
    assert client.lease_info(name).keys == (b"k",)
    assert programs.run(*DENGINE, "lease", "revoke", name) == f"lease {name} is ended\n"
    assert client.get("k") is None
    assert f"lease {name} has ended" in line(renewing.stdout)
    assert renewing.wait(PATIENT_S) == 1


def test_lock(programs: Programs, client: sync.Client) -> None:
    """The command has a token that grows, and leaves the lock free."""
    script = (*DENGINE, "lock", "nightly", "--", "sh", "-c", "echo token $DENGINE_LOCK_TOKEN")
    first, second = (programs.run(*script).split() for _ in range(2))
    assert first[0] == second[0] == "token"
    assert 0 < int(first[1]) < int(second[1])
    with client.lock("nightly", timeout_s=PATIENT_S):
        pass
    assert client.count() == 0


def test_elect(programs: Programs) -> None:
    """Who leads is known to others, until it leaves."""
    leading = programs.start(*DENGINE, "elect", "scheduler", "host-a")
    held = line(leading.stdout)
    assert held.startswith("leadership of 'scheduler': held, token ")
    token = held.split()[-1]
    observing = programs.start(*DENGINE, "elect", "scheduler", "--observe")
    assert line(observing.stdout) == f"host-a leads (token {token})"
    assert ended(leading) == 130
    assert line(observing.stdout) == "nobody leads"
    assert ended(observing) == 130
    run = (*DENGINE, "elect", "scheduler", "host-b", "--", "sh", "-c", "echo leads")
    assert programs.run(*run) == "leads\n"


# --- the example


def test_service_discovery(programs: Programs, client: sync.Client) -> None:
    """An instance that leaves in good order is gone at once; one that dies, with its lease."""
    watching = programs.start(*DISCOVERY, "watch", "web")
    assert line(watching.stdout) == "nobody"
    leaving, dying = (
        programs.start(*DISCOVERY, "register", "web", f"{name}:80", "--instance", name)
        for name in ("one", "two")
    )
    for process, name in ((leaving, "one"), (dying, "two")):
        assert line(process.stdout) == f"registered services/web/{name} at {name}:80"
    seen = ""
    while seen != "one at one:80, two at two:80":  # each alone comes before
        seen = line(watching.stdout)
        assert seen in ("one at one:80", "two at two:80", "one at one:80, two at two:80")
    assert ended(leaving, signal.SIGTERM) == 0
    assert line(watching.stdout) == "two at two:80"
    dying.kill()
    assert line(watching.stdout) == "nobody"
    wait_for(lambda: client.count("services/") == 0, "no registration to be left")
    assert ended(watching, signal.SIGTERM) == 0
