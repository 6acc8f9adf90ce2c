"""What tests of embedded mode share: an event loop of either kind, and engines that are quick."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import uvloop

import dengine
from tests.node.hosts import until

PATIENT_S = 30.0
QUICK = {"cluster.founding_wait_ms": 0, "raft.membership.promotion": "odd"}
LOOPS: tuple[Callable[[], asyncio.AbstractEventLoop], ...] = (
    asyncio.new_event_loop,
    uvloop.new_event_loop,
)


def on(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
    app: Callable[[], Coroutine[Any, Any, None]],
) -> None:
    """Run `app` and check that its engines leave no task behind."""

    async def checked() -> None:
        await app()
        ours = asyncio.current_task()
        await until(lambda: asyncio.all_tasks() == {ours}, "all tasks to end")

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(checked())


def alone(directory: Path, **settings: int | str) -> dengine.Engine:
    """A cluster of one, without a port. `settings`: with `__` for the dots."""
    keys = {name.replace("__", "."): value for name, value in settings.items()}
    return dengine.Engine(directory, settings=keys)


def founder(directory: Path, port: int) -> dengine.Engine:
    """Node 1, which others can join."""
    return dengine.Engine(directory, listen_address=f"127.0.0.1:{port}", settings=QUICK)


def joiner(directory: Path, node_id: int, port: int, first: int) -> dengine.Engine:
    """A node that joins node 1, which listens on the port `first`."""
    return dengine.Engine(
        directory,
        node_id=node_id,
        listen_address=f"127.0.0.1:{port}",
        initial_cluster={1: f"127.0.0.1:{first}"},
        join=True,
    )


def voters(engine: dengine.Engine) -> set[int]:
    return {member.id for member in engine.members if member.voter}
