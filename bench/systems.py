"""The three things measured side by side: the baseline, three dengine nodes, three etcd nodes.

All run on loopback with their data in temporary directories on a real disk, and all with their own
defaults: nothing is tuned for the benchmark, and no process that was here before is touched.
"""

from __future__ import annotations

import base64
import enum
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from processes import BenchError, Process, free_ports, http_request, wait_until

REPOSITORY = Path(__file__).resolve().parent.parent
START_S = 30.0
TXN_PUTS = 64  # as in requests.lua
JSON_HEADERS = {"Content-Type": "application/json"}


class Load(enum.StrEnum):
    """What the clients of one round do."""

    PUT = "PUT"
    GET_LINEARIZABLE = "GET linearizable"
    GET_LEASE = "GET lease"
    GET_EVENTUAL = "GET eventual"
    TXN = "txn of 64 PUT"

    @property
    def consistency(self) -> str:
        """The word after GET, as dengine's query parameter spells it."""
        return self.value.split()[-1]

    @property
    def operations(self) -> int:
        """How many each request carries out."""
        return TXN_PUTS if self is Load.TXN else 1


@dataclass
class Node:
    """One process of a system and the `host:port` at which its clients reach it."""

    name: str
    address: str
    argv: Sequence[str]
    log_path: Path
    process: Process

    @classmethod
    def start(cls, name: str, address: str, argv: Sequence[str], log_path: Path) -> Node:
        """Start the process of a node."""
        return cls(name, address, argv, log_path, _launch(argv, log_path))

    def restart(self) -> None:
        """Start the process again, on the same data, after it was killed."""
        self.process = _launch(self.argv, self.log_path)


class System(Protocol):
    """Something that takes load."""

    name: str
    nodes: list[Node]

    def leader(self) -> Node:
        """The node that load is sent to."""

    def wrk_arguments(self, load: Load) -> list[str]:
        """Arguments of requests.lua for this load, without the number of keys."""


class Cluster(System, Protocol):
    """A system that survives the loss of a node."""

    def put(self, node: Node, key: str, value: str, timeout_s: float) -> bool:
        """Write through `node`; whether it was acknowledged in time."""

    def caught_up(self, node: Node) -> bool:
        """Whether `node` serves and has applied everything the leader has committed."""


def _launch(argv: Sequence[str], log_path: Path) -> Process:
    # dengine runs from this tree even where it is not installed.
    return Process(argv, log_path, {"PYTHONPATH": str(REPOSITORY)})


def stop(nodes: Sequence[Node]) -> None:
    """End the processes of `nodes`, by pid."""
    for node in nodes:
        node.process.stop()


class Baseline:
    """bench/baseline.py, one process."""

    name = "baseline"

    def __init__(self, directory: Path) -> None:
        """Start it; `directory` takes its log."""
        (port,) = free_ports(1)
        argv = [sys.executable, str(Path(__file__).with_name("baseline.py")), "--port", str(port)]
        node = Node.start("baseline", f"127.0.0.1:{port}", argv, directory / "baseline.log")
        self.nodes = [node]
        wait_until(
            lambda: http_request(node.address, "GET", "/") is not None,
            "the baseline's port",
            START_S,
            [node.process],
        )

    def leader(self) -> Node:
        """The only process."""
        return self.nodes[0]

    def wrk_arguments(self, load: Load) -> list[str]:
        """Exactly the requests dengine gets; the query is read and ignored."""
        return dengine_arguments(load)


def dengine_arguments(load: Load) -> list[str]:
    """Arguments of requests.lua for a load on dengine, without the number of keys."""
    if load in (Load.PUT, Load.TXN):
        return ["put" if load is Load.PUT else "txn"]
    return ["get", load.consistency]


class Dengine:
    """Three voters founded from one static list, as in examples/three-nodes-standalone."""

    name = "dengine"

    def __init__(self, directory: Path) -> None:
        """Write the three configurations, start the nodes, wait until they take writes."""
        addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
        members = ",\n".join(
            f'  {{ id = {i}, address = "{address}", role = 0, status = 2 }}'
            for i, address in enumerate(addresses, 1)
        )
        self.nodes: list[Node] = []
        for i, address in enumerate(addresses, 1):
            config = directory / f"n{i}.toml"
            config.write_text(
                f'[cluster]\nnode_id = {i}\nlisten_address = "{address}"\n'
                f'initial_cluster = [\n{members},\n]\ndb_root_dir = "{directory / "db"}"\n'
            )
            self.nodes.append(start_dengine(str(i), address, config, directory))
        processes = [node.process for node in self.nodes]
        try:
            wait_until(
                lambda: all(self.caught_up(node) for node in self.nodes),
                "three ready dengine nodes",
                START_S,
                processes,
            )
        except BenchError:
            stop(self.nodes)
            raise

    def leader(self) -> Node:
        """The node that answers GET /leader with 200."""
        return _elected(self.nodes, is_dengine_leader, "dengine leader")

    def wrk_arguments(self, load: Load) -> list[str]:
        """PUT and GET on /v1/kv."""
        return dengine_arguments(load)

    def put(self, node: Node, key: str, value: str, timeout_s: float) -> bool:
        """PUT through `node`; whether it was acknowledged in time."""
        headers = {"Dengine-Timeout-Ms": str(int(timeout_s * 1000))}
        answer = http_request(
            node.address, "PUT", f"/v1/kv/{key}", value.encode(), headers, timeout_s
        )
        return answer is not None and answer[0] == 200

    def caught_up(self, node: Node) -> bool:
        """Ready, and nothing the leader has committed is missing."""
        ready = http_request(node.address, "GET", "/readyz", timeout_s=1)
        leaders = [n for n in self.nodes if n.process.alive and is_dengine_leader(n)]
        if ready is None or ready[0] != 200 or not leaders:
            return False
        mine, leaders_own = dengine_status(node), dengine_status(leaders[0])
        if mine is None or leaders_own is None:
            return False
        return bool(mine["last_applied"] >= leaders_own["commit_index"])


def start_dengine(name: str, address: str, config: Path, directory: Path) -> Node:
    """Start `dengine serve` with one configuration file."""
    argv = [sys.executable, "-m", "dengine", "serve", "--config", str(config)]
    return Node.start(name, address, argv, directory / f"n{name}.log")


def is_dengine_leader(node: Node) -> bool:
    """Whether `node` says that it leads."""
    answer = http_request(node.address, "GET", "/leader", timeout_s=1)
    return answer is not None and answer[0] == 200


def dengine_status(node: Node) -> dict[str, Any] | None:
    """GET /v1/status, or None when the node does not answer."""
    return _json(http_request(node.address, "GET", "/v1/status", timeout_s=1))


class Etcd:
    """Three etcd members with etcd's defaults, reached through its v3 JSON gateway."""

    name = "etcd"

    def __init__(self, directory: Path) -> None:
        """Start the three members and wait until they take writes."""
        ports = free_ports(6)
        clients, peers = ports[:3], ports[3:]
        initial = ",".join(f"e{i}=http://127.0.0.1:{port}" for i, port in enumerate(peers, 1))
        self.nodes: list[Node] = []
        for i, (client, peer) in enumerate(zip(clients, peers, strict=True), 1):
            flags = {
                "name": f"e{i}",
                "data-dir": str(directory / f"e{i}"),
                "listen-client-urls": f"http://127.0.0.1:{client}",
                "advertise-client-urls": f"http://127.0.0.1:{client}",
                "listen-peer-urls": f"http://127.0.0.1:{peer}",
                "initial-advertise-peer-urls": f"http://127.0.0.1:{peer}",
                "initial-cluster": initial,
                "initial-cluster-state": "new",
                "initial-cluster-token": f"dengine-bench-{peers[0]}",
                # Room for the history of a long run: etcd keeps every revision until compacted.
                "quota-backend-bytes": str(8 * 2**30),
            }
            argv = ["etcd", *(f"--{flag}={value}" for flag, value in flags.items())]
            log_path = directory / f"e{i}.log"
            self.nodes.append(Node.start(f"e{i}", f"127.0.0.1:{client}", argv, log_path))
        processes = [node.process for node in self.nodes]
        try:
            wait_until(
                lambda: all(self.caught_up(node) for node in self.nodes),
                "three healthy etcd members",
                START_S,
                processes,
            )
        except BenchError:
            stop(self.nodes)
            raise

    def leader(self) -> Node:
        """The member whose maintenance status names itself as leader."""
        return _elected(self.nodes, _is_etcd_leader, "etcd leader")

    def wrk_arguments(self, load: Load) -> list[str]:
        """put and range; eventual is etcd's serializable, lease stands beside its linearizable."""
        if load in (Load.PUT, Load.TXN):
            return ["etcd_put" if load is Load.PUT else "etcd_txn"]
        return ["etcd_range", "serializable" if load is Load.GET_EVENTUAL else "linearizable"]

    def put(self, node: Node, key: str, value: str, timeout_s: float) -> bool:
        """put through `node`; whether it was acknowledged in time."""
        encoded = [base64.b64encode(text.encode()).decode() for text in (key, value)]
        body = json.dumps({"key": encoded[0], "value": encoded[1]}).encode()
        answer = http_request(node.address, "POST", "/v3/kv/put", body, JSON_HEADERS, timeout_s)
        return answer is not None and answer[0] == 200

    def caught_up(self, node: Node) -> bool:
        """Healthy, and nothing the leader has in its log is missing."""
        health = http_request(node.address, "GET", "/health", timeout_s=1)
        leaders = [n for n in self.nodes if n.process.alive and _is_etcd_leader(n)]
        if health is None or health[0] != 200 or not leaders:
            return False
        mine, leaders_own = _etcd_status(node), _etcd_status(leaders[0])
        if mine is None or leaders_own is None:
            return False
        return int(mine["raftAppliedIndex"]) >= int(leaders_own["raftAppliedIndex"])


def _etcd_status(node: Node) -> dict[str, Any] | None:
    path = "/v3/maintenance/status"
    return _json(http_request(node.address, "POST", path, b"{}", JSON_HEADERS, 1))


def _is_etcd_leader(node: Node) -> bool:
    status = _etcd_status(node)
    return status is not None and status.get("leader") == status["header"]["member_id"]


def _json(answer: tuple[int, bytes] | None) -> dict[str, Any] | None:
    if answer is None or answer[0] != 200:
        return None
    decoded: dict[str, Any] = json.loads(answer[1])
    return decoded


def _elected(nodes: Sequence[Node], leads: Callable[[Node], bool], what: str) -> Node:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        for node in nodes:
            if node.process.alive and leads(node):
                return node
        time.sleep(0.05)
    raise BenchError(f"no {what} within {START_S:g} s; see {nodes[0].log_path.parent}")
