"""Whatever part of a node dies of a bug, the node ends with it: what is left would look alive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from dengine.errors import FatalError
from dengine.kv.commands import Put
from dengine.node import state_flusher
from dengine.node.node import Node
from dengine.node.watch_hub import Selection
from tests.node.alone import alone, deadline
from tests.node.hosts import on_loop, until


def unheard(asked: Coroutine[Any, Any, object]) -> None:
    """Ask for it; that it ends with the node is not of interest."""
    task = asyncio.ensure_future(asked)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())


def write(node: Node) -> None:
    unheard(node.write(Put(b"k", b"v"), deadline()))


def watch(node: Node) -> None:
    unheard(node.watch(Selection(b"", True), 1, prev=False, deadline=deadline()))


def snapshot(node: Node) -> None:
    unheard(node.snapshots.take(deadline()))


def nothing(node: Node) -> None:
    """It happens by itself."""


# The part, the call of it that goes wrong, and what makes it be called.
PARTS: dict[str, tuple[Callable[[Node], Any], str, Callable[[Node], None]]] = {
    "the tick": (lambda node: node._cycle._owner, "ticked", nothing),
    "a turn of the cycle": (lambda node: node.raft, "ready", write),
    "the log's thread": (lambda node: node._log_store, "save", write),
    "the thread that brings the state to the disk": (lambda node: node.state, "write_back", write),
    "snapshots": (lambda node: node.snapshots, "_next_job", snapshot),
    "watches that catch up": (lambda node: node.hub._history, "at", watch),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_node_ends_with_each_of_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    owner, name, provoke = PARTS[part]
    monkeypatch.setattr(state_flusher, "PERIOD_S", 0.05)

    def bug(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    async def check() -> None:
        async with alone(tmp_path) as node:
            await node.write(Put(b"k", b"v"), deadline())
            monkeypatch.setattr(owner(node), name, bug)
            provoke(node)
            await until(node._cycle.failed.done, "its end")

    with pytest.raises(FatalError, match="a bug"):
        on_loop(check)
