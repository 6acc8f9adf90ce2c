"""What a node's work costs when it holds more keys: PUT, GET, and a listing from end to end."""

from __future__ import annotations

import http.client
import json
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from drills import start_guide_node
from load import Round, run_round
from processes import BenchError, free_ports
from state_drills import build_keys, wait_ready
from systems import Load, Node, dengine_arguments, stop

CONNECTIONS = 64
LISTED_MAX = 100_000  # keys of a listing
PAGE = 1000
PAGE_MAX_S = 30.0


@dataclass
class Sized:
    """One node with `keys` keys; a round for each load."""

    keys: int
    put: Round | None = None
    get: Round | None = None
    listed: int = 0
    list_s: float = 0.0
    pages_ms: list[float] = field(default_factory=list)


class Single:
    """A node alone, as a system that takes load."""

    name = "dengine"

    def __init__(self, node: Node) -> None:
        self.nodes = [node]

    def leader(self) -> Node:
        """The only node."""
        return self.nodes[0]

    def wrk_arguments(self, load: Load) -> list[str]:
        """PUT and GET on /v1/kv."""
        return dengine_arguments(load)


def grow_in_size(directory: Path, result: Sized, seconds: int, say: Callable[[str], None]) -> None:
    """Found a node, give it the keys of `result`, and put all three loads on it."""
    directory.mkdir()
    node = start_guide_node(1, free_ports(3), directory)
    try:
        wait_ready(node)
        node.process.stop()
        build_keys(directory, result.keys, "bench-{:06d}")
        node.restart()
        wait_ready(node)
        system = Single(node)
        # Reads first: they find the state as it was built, and are not beside its flushing.
        result.get = run_round(system, Load.GET_LINEARIZABLE, CONNECTIONS, seconds, result.keys)
        result.put = run_round(system, Load.PUT, CONNECTIONS, seconds, result.keys)
        if result.get.failed or result.put.failed:
            raise BenchError(f"requests failed with {result.keys} keys; see {node.log_path}")
        _list(node, result)
        say(
            f"{result.keys} keys: PUT {result.put.ops_per_s:.0f}/s, GET {result.get.ops_per_s:.0f}"
            f"/s, {result.listed} keys listed in {result.list_s:.2f} s"
        )
    finally:
        stop([node])
        shutil.rmtree(directory / "grown", ignore_errors=True)


def _list(node: Node, result: Sized) -> None:
    """Page by page over one connection, as `Client.list` does, up to `LISTED_MAX` keys."""
    host, port = node.address.rsplit(":", 1)
    after = ""
    started = time.monotonic()
    with closing(http.client.HTTPConnection(host, int(port), timeout=PAGE_MAX_S)) as connection:
        while result.listed < LISTED_MAX:
            asked = time.monotonic()
            connection.request("GET", f"/v1/kv?prefix=bench-&limit={PAGE}{after}")
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                raise BenchError(f"{node.address}: a listing ended as {response.status} {body!r}")
            result.pages_ms.append((time.monotonic() - asked) * 1000)
            page = json.loads(body)
            result.listed += page["count"]
            if page["next"] is None:
                break
            after = f"&after={quote(page['next'], safe='')}"
    result.list_s = time.monotonic() - started
