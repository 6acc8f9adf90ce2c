"""One node in the event loop of an app, from its start to its end, whichever way that comes."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

from dengine.api.server import HttpServer
from dengine.config import Config
from dengine.embedded.calls import Calls
from dengine.embedded.configuring import Setup, reserved
from dengine.embedded.news import Leadership, Newsroom
from dengine.embedded.reads import Reads
from dengine.errors import ConfigError, FatalError, RequestTimeout, TryAgain
from dengine.node.node import Node

POLL_S: Final = 0.02
STOP_GRACE_S: Final = 5.0  # for calls under way when the engine is left

log = logging.getLogger("dengine.engine")


async def begin(setup: Setup, timeout_s: float) -> Life:
    """Lock the directory, load what is in it, and serve. Loading keeps the event loop busy.

    Raises:
        FatalError: it cannot start; nothing is left behind, also when this is cancelled.
    """
    starting = asyncio.create_task(_begin(setup, timeout_s), name="dengine engine starting")
    if await _to_its_end(starting):
        if starting.exception() is None:
            await end(starting.result(), quietly=True)
        raise asyncio.CancelledError
    return starting.result()


async def end(life: Life, *, quietly: bool = False) -> None:
    """`Life.end`, to its end, also when this is cancelled meanwhile.

    Raises:
        EngineClosed: the node had ended by itself, and not `quietly`.
    """
    ending = asyncio.create_task(life.end(), name="dengine engine ending")
    cancelled = await _to_its_end(ending)
    ending.result()
    if cancelled:
        raise asyncio.CancelledError
    if life.calls.reason is not None and not quietly:
        raise life.calls.ended("none") from life.calls.reason


async def _to_its_end(task: asyncio.Task[Any]) -> bool:
    """Wait until `task` is done, also when we are cancelled meanwhile: then the answer is True."""
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    return cancelled


async def _begin(setup: Setup, timeout_s: float) -> Life:
    if not setup.listens:
        return await _open(setup.config, False, timeout_s)
    async with reserved(setup) as config:
        return await _open(config, True, timeout_s)


async def _open(config: Config, listens: bool, timeout_s: float) -> Life:
    node = Node(config)
    await node.open()
    try:
        if not listens:
            _require_alone(node, config)
            return Life(node, config, None, timeout_s)
        server = HttpServer(node, config)
        await server.start()
        return Life(node, config, server, timeout_s)
    except BaseException:
        await node.stop()
        raise


def _require_alone(node: Node, config: Config) -> None:
    """Who has no port cannot be a member among others. Raises ConfigError."""
    others = {m.id.id for m in node.raft.membership.members} - {config.cluster.node_id}
    if others:
        names = ", ".join(str(node_id) for node_id in sorted(others))
        raise ConfigError(
            f"{config.source}: cluster.listen_address is missing: "
            f"{config.cluster.db_root_dir / str(config.cluster.node_id)} belongs to a cluster with "
            f"node {names}, and they have to reach this one"
        )


class Life:
    """A node that runs, made by `begin`; `end` it.

    Attributes:
        address: where it serves HTTP; None: nowhere.
    """

    def __init__(
        self, node: Node, config: Config, server: HttpServer | None, timeout_s: float
    ) -> None:
        self.node = node
        self.config = config
        self.address = None if server is None else config.cluster.listen_address
        self.calls = Calls(node, timeout_s)
        self.reads = Reads(node, self.calls, config)
        self.news = Newsroom(node, self.calls)
        self._server = server
        self._ending = False
        self._gone = asyncio.Event()
        self._running = asyncio.get_running_loop().create_task(self._run(), name="dengine engine")

    async def _run(self) -> None:
        """The node until it ends. Whoever waits for anything of it learns why."""
        reason = await self._until_it_ends()
        if reason is not None:
            log.error("node %d has ended: %s", self.config.cluster.node_id, reason.message)
        self.calls.end(reason)
        try:
            if self._server is not None:
                await self._server.stop(0.0)
            await self.news.end()
            await self.calls.settle()
        finally:
            if not self._ending:
                self._gone.set()

    async def _until_it_ends(self) -> FatalError | None:
        try:
            await self.node.run()
        except FatalError as error:
            return error
        except asyncio.CancelledError:
            return TryAgain("all tasks were cancelled, as at the end of an event loop")
        except Exception as error:
            log.exception("the node died of a bug")
            died = TryAgain(
                f"the node died of a bug ({type(error).__name__}: {error}): please report it; "
                "another engine on the same directory goes on from what is durable"
            )
            died.__cause__ = error
            return died
        return None

    async def ready(self, timeout_s: float) -> Leadership:
        """Return once reads and writes can be answered. Raises RequestTimeout, EngineClosed."""
        loop = asyncio.get_running_loop()
        deadline = self.calls.deadline(timeout_s)
        while not (readiness := self.node.readiness()).ready:
            self.calls.deadline(0.0)  # raises when the node has ended
            if loop.time() >= deadline:
                raise RequestTimeout(
                    f"not ready after {timeout_s:g} s: {'; '.join(readiness.reasons)}",
                    outcome="none",
                )
            await asyncio.sleep(POLL_S)
        return self.news.leadership_now()

    async def end(self) -> None:
        """Let calls end, hand leadership over, sync, let go of directory and port.

        Each part has a time limit: 5 s for calls, 3 s for leadership, more for the disk. One that
        hangs keeps the directory locked until the process ends.
        """
        self._ending = True
        try:
            if not self._running.done():
                await asyncio.gather(self.calls.drain(STOP_GRACE_S), self._stop_serving())
            if not self._running.done() or self._running.cancelled():
                self.calls.end(None)
                await self.calls.settle()
                await self.node.stop()
        except FatalError as error:  # the last sync failed
            log.error("node %d: %s", self.config.cluster.node_id, error.message)
            self.calls.end(error)
        finally:
            await asyncio.wait({self._running})
            self._gone.set()

    async def _stop_serving(self) -> None:
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)

    async def gone(self) -> FatalError | None:
        """Return when all is over: why, or None for `end`."""
        await self._gone.wait()
        return self.calls.reason
