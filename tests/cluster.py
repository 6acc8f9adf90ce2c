"""Real clusters for tests: `dengine serve` processes on loopback, and clients that hide nothing.

Nothing here retries or forgives. A request is one raw HTTP exchange, a `Writer` counts everything
but a 2xx within five seconds as a failure, and waiting means `wait_for`: a condition with a
deadline. Every process is ended by its pid, and the kernel ends it when the test run dies.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
# "The guide" is the README of this example: what a person is told to do, step by step.
GUIDE_CONFIGS = ROOT / "examples" / "single-node-expansion" / "config"
REQUEST_TIMEOUT_S = 5.0  # a write that takes longer is a failed write
POLL_S = 0.02
UNREACHABLE = (OSError, http.client.HTTPException)
T = TypeVar("T")


def wait_for(condition: Callable[[], T | None], what: str, deadline_s: float = 15.0) -> T:
    """The first truthy value of `condition`, polled until `deadline_s` seconds have passed.

    A node that cannot be reached counts as "not yet".

    Raises:
        AssertionError: names `what`, and the last value or error seen.
    """
    end = time.monotonic() + deadline_s
    while True:
        seen: object
        try:
            value = condition()
            if value:
                return value
            seen = value
        except UNREACHABLE as error:
            seen = error
        if time.monotonic() > end:
            raise AssertionError(f"waited {deadline_s} s for {what}; last seen: {seen!r}")
        time.sleep(POLL_S)  # the pace of the polling, never a guess at how long something takes


# Below the range of outgoing connections: a port of that could be taken by any client between the
# kill and the restart of a node, and a dial to it while nobody listens can connect to itself. When
# several processes test, each has a part to itself, for the nodes of another one may be down.
PORTS = (
    range(26_000, 32_000)
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw1"
    else range(20_000, 26_000)
)
_ports_given: set[int] = set()


def free_port() -> int:
    """One of `PORTS` that nobody listens on."""
    for _ in range(1000):
        port = random.SystemRandom().choice(PORTS)
        if port not in _ports_given and _is_free(port):
            _ports_given.add(port)
            return port
    raise AssertionError(f"no free port from {PORTS.start} to {PORTS.stop - 1}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def json(self) -> Any:
        return json.loads(self.body)


def exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """One request and its reply on an open connection; raises one of `UNREACHABLE`."""
    connection.request(method, path, body=body, headers=dict(headers or {}))
    response = connection.getresponse()
    names = {name.lower(): value for name, value in response.getheaders()}
    return Reply(response.status, names, response.read())


@dataclass
class ServeProcess:
    """One `dengine serve` and what it printed. `host` and `port` are where clients reach it."""

    node_id: int
    port: int
    config: Path
    cwd: Path
    log: Path
    host: str = "127.0.0.1"
    prefix: Sequence[str] = ()  # a command that runs the node, such as `ip netns exec NAME`
    process: subprocess.Popen[bytes] | None = None
    token: str | None = None  # sent with every request

    @property
    def authorization(self) -> dict[str, str]:
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    @property
    def directory(self) -> Path:
        """The node's data directory under the guide's `db_root_dir = "./db"`."""
        return self.cwd / "db" / str(self.node_id)

    @property
    def pid(self) -> int:
        assert self.process is not None, f"node {self.node_id} was never started"
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> ServeProcess:
        assert not self.running, f"node {self.node_id} is already running"
        # The kernel ends the node when this process dies, however it dies.
        guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        command = [*guard, *self.prefix, sys.executable, "-m", "dengine", "serve"]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, "--config", str(self.config)],
                cwd=self.cwd,
                env=node_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9, and wait until the process is gone."""
        if self.running:
            self.signal(signal.SIGKILL)
        self.wait_exit()

    def stop(self) -> int:
        """SIGTERM, as systemd would; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait_exit()

    def wait_exit(self, deadline_s: float = 15.0) -> int:
        """The exit code once the process ended by itself (or by a signal: negative)."""
        assert self.process is not None
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"node {self.node_id} still runs after {deadline_s} s:\n{self.tail()}"
            ) from None

    def output(self) -> str:
        """Everything this node printed since it first started."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def lines(self) -> list[str]:
        return self.output().splitlines()

    def tail(self) -> str:
        return "\n".join(self.lines()[-30:])

    def connect(self, timeout_s: float = REQUEST_TIMEOUT_S) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> Reply:
        """One request on a connection of its own; raises one of `UNREACHABLE`."""
        with contextlib.closing(self.connect(timeout_s)) as connection:
            return exchange(
                connection, method, path, body, {**self.authorization, **(headers or {})}
            )

    def call(self, method: str, path: str, body: object = None) -> Reply:
        """A request with a JSON body, as the operator's endpoints take it."""
        data = None if body is None else json.dumps(body).encode()
        headers = {} if data is None else {"Content-Type": "application/json"}
        return self.request(method, path, data, headers)

    def put(self, key: str, value: str) -> Reply:
        return self.request("PUT", "/v1/kv/" + quote(key, safe="/"), value.encode())

    def get(self, key: str, consistency: str = "linearizable") -> Reply:
        return self.request("GET", f"/v1/kv/{quote(key, safe='/')}?consistency={consistency}")

    def status(self) -> dict[str, Any]:
        """What the node itself knows: GET /v1/status."""
        reply = self.call("GET", "/v1/status")
        assert reply.ok, reply
        status: dict[str, Any] = reply.json()
        return status

    def cluster(self) -> dict[str, Any]:
        """GET /v1/cluster, or {} while this node cannot tell."""
        reply = self.call("GET", "/v1/cluster")
        view: dict[str, Any] = reply.json() if reply.ok else {}
        return view

    def ready(self) -> bool:
        try:
            return self.request("GET", "/readyz").ok
        except UNREACHABLE:
            return False

    def items(self, prefix: str) -> dict[str, str]:
        """All keys under `prefix` as this node's own state holds them after a read barrier."""
        found: dict[str, str] = {}
        after = ""
        while True:
            query = f"/v1/kv?prefix={quote(prefix, safe='')}&limit=1000" + after
            reply = self.call("GET", query)
            assert reply.ok, reply
            page = reply.json()
            found.update((item["key"], item["value"]) for item in page["items"])
            if page["next"] is None:
                return found
            after = "&after=" + quote(page["next"], safe="")


def node_environment() -> dict[str, str]:
    """The environment of a node: the project importable, a locale that knows no UTF-8."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DENGINE_")}
    return {**kept, "PYTHONPATH": str(ROOT), "LC_ALL": "C"}


@dataclass
class Writer:
    """A thread that writes new keys through one node and remembers what was acknowledged.

    A failure is anything but 2xx, or more than five seconds. Nothing is retried: after a failure
    the next key follows on a new connection.
    """

    node: ServeProcess
    name: str
    pause_s: float = 0.002
    acknowledged: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    acknowledged_at: list[float] = field(default_factory=list)  # time.monotonic()
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> Writer:
        self._thread = threading.Thread(target=self._run, name=f"writer-{self.name}", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> Writer:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(2 * REQUEST_TIMEOUT_S)
            assert not self._thread.is_alive(), f"writer {self.name} hangs"
        return self

    def _run(self) -> None:
        connection = self.node.connect()
        number = 0
        while not self._stopping.wait(self.pause_s):
            number += 1
            key, value = f"{self.name}/{number:06d}", f"{self.name} wrote {number}"
            began = time.monotonic()
            try:
                reply = exchange(
                    connection, "PUT", f"/v1/kv/{key}", value.encode(), self.node.authorization
                )
                failure = "" if reply.ok else f"{reply.status} {reply.body[:300]!r}"
            except UNREACHABLE as error:
                failure = f"{type(error).__name__}: {error}"
                connection.close()
            took_s = time.monotonic() - began
            if not failure and took_s > REQUEST_TIMEOUT_S:
                failure = "too late"
            if failure:
                self.failures.append(f"{key} after {took_s:.3f} s: {failure}")
                self._stopping.wait(0.05)  # a node that is down refuses thousands a second
            else:
                self.acknowledged[key] = value
                self.acknowledged_at.append(time.monotonic())
        connection.close()

    def longest_gap_s(self) -> float:
        """The longest time between two acknowledged writes."""
        times = self.acknowledged_at
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)

    def wait_more(self, count: int, deadline_s: float = 15.0) -> None:
        """Wait until `count` further writes were acknowledged."""
        goal = len(self.acknowledged) + count
        wait_for(
            lambda: len(self.acknowledged) >= goal,
            f"{count} more acknowledged writes of {self.name}; failures: {self.failures[-3:]}",
            deadline_s,
        )


@dataclass
class EventStream:
    """A thread that follows a server-sent event stream and keeps the data of every message."""

    node: ServeProcess
    path: str
    events: list[dict[str, Any]] = field(default_factory=list)

    def start(self) -> EventStream:
        threading.Thread(target=self._run, name=f"events-{self.path}", daemon=True).start()
        return self

    def _run(self) -> None:
        # Ends with the node: its death closes the connection, silence ends it after a minute.
        with contextlib.suppress(*UNREACHABLE), contextlib.closing(self.node.connect(60)) as link:
            link.request("GET", self.path, headers=self.node.authorization)
            for line in link.getresponse():
                if line.startswith(b"data:"):
                    self.events.append(json.loads(line[5:]))


def voters(view: Mapping[str, Any]) -> set[int]:
    """The ids of the voters in a `/v1/cluster` body."""
    return {m["id"] for m in view.get("members", ()) if m["status"] == "active"}


class Cluster:
    """Nodes that belong together, in one directory; a context manager that leaves none behind."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.token: str | None = None  # of the nodes that are made from now on
        self.nodes: dict[int, ServeProcess] = {}
        self._strays: list[ServeProcess] = []

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.everyone():
            if node.running:
                node.kill()

    def everyone(self) -> list[ServeProcess]:
        return [*self.nodes.values(), *self._strays]

    def node(self, node_id: int, text: str, port: int, *, name: str = "") -> ServeProcess:
        """A node with this configuration, not started yet. A `name` marks one beside the cluster,
        in a directory of its own: it is cleaned up with the others, and belongs to nobody."""
        cwd = self.directory / name if name else self.directory
        cwd.mkdir(exist_ok=True)
        config = cwd / f"n{node_id}.toml"
        config.write_text(text, encoding="utf-8")
        log = cwd / f"n{node_id}.log"
        node = ServeProcess(node_id, port, config, cwd, log, token=self.token)
        if name:
            self._strays.append(node)
        else:
            self.nodes[node_id] = node
        return node

    def describe(self) -> str:
        """The end of every node's output, for the report of a failed test."""
        return "\n".join(f"--- node {n.node_id} ({n.log})\n{n.tail()}" for n in self.everyone())

    def running(self) -> list[ServeProcess]:
        return [node for node in self.nodes.values() if node.running]

    def wait_voters(self, *ids: int, deadline_s: float = 20.0) -> dict[str, Any]:
        """Wait until every running node says that exactly these vote, outside a joint state."""

        def agreed() -> dict[str, Any]:
            views = [node.cluster() for node in self.running()]
            good = all(v and voters(v) == set(ids) and not v["joint"] for v in views)
            return views[0] if good else {}

        return wait_for(agreed, f"voters {sorted(ids)}", deadline_s)

    def wait_leader(self, *, among: Sequence[ServeProcess] = ()) -> ServeProcess:
        """Wait until the nodes (all running ones by default) name the same living leader."""

        def agreed() -> ServeProcess | None:
            statuses = [node.status() for node in among or self.running()]
            leaders = {s["node_id"] for s in statuses if s["role"] == "leader"}
            named = {(s["leader"] or {}).get("id") for s in statuses}
            return self.nodes[leaders.pop()] if len(leaders) == 1 and named == leaders else None

        return wait_for(agreed, "one leader that everyone names")

    def wait_applied(self) -> None:
        """Wait until all running nodes have applied the same log to its end."""

        def level() -> bool:
            statuses = [node.status() for node in self.running()]
            return len({(s["last_applied"], s["last_index"]) for s in statuses}) == 1

        wait_for(level, "all nodes to have applied the same index")

    def assert_everywhere(self, *writers: Writer) -> None:
        """Every acknowledged key of `writers` is on every running node, with its value."""
        self.wait_applied()
        for node in self.running():
            for writer in writers:
                held = node.items(writer.name + "/")
                lost = {k: v for k, v in writer.acknowledged.items() if held.get(k) != v}
                assert not lost, f"node {node.node_id} lost acknowledged writes: {lost}"


def config_text(
    node_id: int, ports: Mapping[int, int], role: int, status: int, extra: str = ""
) -> str:
    """A configuration in the guide's form: `ports` are all members known to the node, itself
    included with `role` and `status`; the others are listed as active followers."""
    rows = "".join(
        f'  {{ id = {i}, address = "127.0.0.1:{port}", '
        f"role = {role if i == node_id else 0}, status = {status if i == node_id else 2} }},\n"
        for i, port in ports.items()
    )
    return (
        f'[cluster]\nnode_id = {node_id}\nlisten_address = "127.0.0.1:{ports[node_id]}"\n'
        f'initial_cluster = [\n{rows}]\ndb_root_dir = "./db"\n{extra}'
    )


def static_cluster(cluster: Cluster, *ids: int, extra: str = "") -> Cluster:
    """Found a cluster of these voters from one static list, and wait until it has a leader."""
    ports = {node_id: free_port() for node_id in ids}
    for node_id in ids:
        cluster.node(node_id, config_text(node_id, ports, 0, 2, extra), ports[node_id]).start()
    cluster.wait_voters(*ids)
    cluster.wait_leader()
    return cluster


def joiner(cluster: Cluster, node_id: int, extra: str = "") -> ServeProcess:
    """A node, not started yet, that will join `cluster` as a promotable learner."""
    ports = {i: node.port for i, node in cluster.nodes.items()} | {node_id: free_port()}
    return cluster.node(node_id, config_text(node_id, ports, 3, 0, extra), ports[node_id])


def guide_files(cluster: Cluster) -> dict[int, ServeProcess]:
    """Nodes 1, 2 and 3 with the files of examples/single-node-expansion, not started yet.

    Other ports stand for 9081-9083, so that nobody else's nodes or clients can interfere.
    """
    ports = {node_id: free_port() for node_id in (1, 2, 3)}
    for node_id, port in ports.items():
        text = (GUIDE_CONFIGS / f"n{node_id}.toml").read_text(encoding="utf-8")
        for other, other_port in ports.items():
            text = text.replace(f":908{other}", f":{other_port}")
        cluster.node(node_id, text, port)
    return cluster.nodes
