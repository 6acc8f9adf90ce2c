"""A whole node inside the test's own process and loop: a cluster of one, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from dengine.config import load
from dengine.node.node import Node
from tests.cluster import free_port
from tests.node.hosts import until

DEADLINE_S = 30.0


@asynccontextmanager
async def alone(directory: Path, extra: str = "") -> AsyncIterator[Node]:
    """The node on `directory` until the block ends, when it stops cleanly. `extra`: more TOML."""
    port = free_port()
    file = directory / "n1.toml"
    file.write_text(
        "[cluster]\nnode_id = 1\nfounding_wait_ms = 0\n"
        f'listen_address = "127.0.0.1:{port}"\n'
        f'initial_cluster = [{{ id = 1, address = "127.0.0.1:{port}", role = 2, status = 2 }}]\n'
        f'db_root_dir = "{directory}"\n{extra}'
    )
    node = Node(load(file, {}))
    await node.open()
    running = asyncio.create_task(node.run())
    try:
        await until(lambda: node.raft.committed_in_term or running.done(), "a leader", DEADLINE_S)
        yield node
    finally:
        await node.stop()
        await running


def deadline() -> float:
    return asyncio.get_running_loop().time() + DEADLINE_S
