"""One node in the event loop of an app: from what the app names, over its start, to its end,
whichever way that comes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from dengine.api.server import HttpServer
from dengine.config import ENVIRONMENT_PREFIX, Config, load, parse_address
from dengine.embedded.calls import Calls
from dengine.embedded.notifications import Leadership, Notifier
from dengine.embedded.reads import Reads
from dengine.errors import ConfigError, FatalError, RequestTimeout, TryAgain
from dengine.node.addresses import join_host_port
from dengine.node.node import Node

SOURCE: Final = "dengine.Engine"
NOWHERE: Final = "127.0.0.1:1"  # of a node without a port; a member has to have an address
ANY_PORT: Final = ":0"
POLL_S: Final = 0.02
STOP_GRACE_S: Final = 5.0  # for calls under way when the engine is left

log = logging.getLogger("dengine.engine")


# --- start and end --------------------------------------------------------------------------------


async def start(setup: Setup, timeout_s: float) -> EmbeddedNode:
    """Lock the directory, load what is in it, and serve. Loading keeps the event loop busy.

    Raises:
        FatalError: it cannot start; nothing is left behind, also when this is cancelled.
    """
    starting = asyncio.create_task(_start(setup, timeout_s), name="dengine engine starting")
    if await _to_its_end(starting):
        if starting.exception() is None:
            await stop(starting.result(), quietly=True)
        raise asyncio.CancelledError
    return starting.result()


async def stop(embedded: EmbeddedNode, *, quietly: bool = False) -> None:
    """`EmbeddedNode.stop`, to its end, also when this is cancelled meanwhile.

    Raises:
        EngineClosed: the node had ended by itself, and not `quietly`.
    """
    stopping = asyncio.create_task(embedded.stop(), name="dengine engine ending")
    cancelled = await _to_its_end(stopping)
    stopping.result()
    if cancelled:
        raise asyncio.CancelledError
    if embedded.calls.reason is not None and not quietly:
        raise embedded.calls.ended("none") from embedded.calls.reason


async def _to_its_end(task: asyncio.Task[Any]) -> bool:
    """Wait until `task` is done, also when we are cancelled meanwhile: then the answer is True."""
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    return cancelled


async def _start(setup: Setup, timeout_s: float) -> EmbeddedNode:
    if not setup.listens:
        return await _open(setup.config, False, timeout_s)
    async with reserved(setup) as config:
        return await _open(config, True, timeout_s)


async def _open(config: Config, listens: bool, timeout_s: float) -> EmbeddedNode:
    node = Node(config)
    await node.open()
    try:
        if not listens:
            _require_alone(node, config)
            return EmbeddedNode(node, config, None, timeout_s)
        server = HttpServer(node, config)
        await server.start()
        return EmbeddedNode(node, config, server, timeout_s)
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


class EmbeddedNode:
    """A node that runs, made by `start`; `stop` it.

    Attributes:
        address: where it serves HTTP; None: nowhere.
        limits: what its calls are checked against before the node hears of them.
    """

    def __init__(
        self, node: Node, config: Config, server: HttpServer | None, timeout_s: float
    ) -> None:
        self.node = node
        self.config = config
        self.limits = config.limits
        self.address = None if server is None else config.cluster.listen_address
        self.calls = Calls(node, timeout_s)
        self.reads = Reads(node, self.calls, config)
        self.notifications = Notifier(node, self.calls)
        self._server = server
        self._stopping = False
        self._ended = asyncio.Event()
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
            await self.notifications.end()
            await self.calls.settle()
        finally:
            if not self._stopping:
                self._ended.set()

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
        self.calls.require_open()
        deadline = loop.time() + timeout_s
        while not (readiness := self.node.readiness()).ready:
            self.calls.require_open()
            if loop.time() >= deadline:
                raise RequestTimeout(
                    f"not ready after {timeout_s:g} s: {'; '.join(readiness.reasons)}",
                    outcome="none",
                )
            await asyncio.sleep(POLL_S)
        return self.notifications.leadership_now()

    async def stop(self) -> None:
        """Let calls end, hand leadership over, sync, let go of directory and port.

        Each part has a time limit: 5 s for calls, 3 s for leadership, more for the disk. One that
        hangs keeps the directory locked until the process ends.
        """
        self._stopping = True
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
            self._ended.set()

    async def _stop_serving(self) -> None:
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)

    async def wait_ended(self) -> FatalError | None:
        """Return when all is over: why, or None for `stop`."""
        await self._ended.wait()
        return self.calls.reason


# --- its configuration, and a port that is surely its own -----------------------------------------


class Setup(NamedTuple):
    """What a node is to be.

    Attributes:
        listens: it has a port, so others can reach it.
        any_port: whichever is free, not the one in `config`.
    """

    config: Config
    listens: bool = True
    any_port: bool = False


def setup_of(
    data_dir: Path | str | None,
    node_id: int,
    listen_address: str | None,
    initial_cluster: Mapping[int, str] | None,
    join: bool,
    settings: Mapping[str, int | str] | None,
    config: Config | Path | str | None,
) -> Setup:
    """What the arguments of an `Engine` stand for: `config`, or all the others.

    Raises:
        ValueError: both, or neither.
        ConfigError: a sentence that names the key.
    """
    if (data_dir is None) == (config is None):
        raise ValueError("an engine takes a data_dir, or a config that names it")
    if data_dir is not None:
        return _of_keys(
            data_dir, node_id, listen_address, initial_cluster or {}, join, settings or {}
        )
    if listen_address or initial_cluster or join or settings or node_id != 1:
        raise ValueError("all of that is in the config: give the config alone")
    if isinstance(config, Config):
        return Setup(config)
    return Setup(load(Path(config or ""), os.environ))


def _of_keys(
    data_dir: Path | str,
    node_id: int,
    listen_address: str | None,
    initial_cluster: Mapping[int, str],
    join: bool,
    settings: Mapping[str, int | str],
) -> Setup:
    """The environment has no say in it."""
    members = dict(initial_cluster)
    own = listen_address or members.get(node_id)
    if own is None and (members or join):
        raise ConfigError(
            f"{SOURCE}: cluster.listen_address is missing: the other members have to reach node "
            f"{node_id}"
        )
    any_port = own is not None and own.endswith(ANY_PORT)
    listen = own or NOWHERE
    if any_port:
        listen = listen.removesuffix(ANY_PORT) + ":1"  # until it is known which
    try:
        parse_address(listen)
    except ValueError as error:
        raise ConfigError(f"{SOURCE}: cluster.listen_address {error}, not {own!r}") from None
    members.setdefault(node_id, listen)
    if any_port and members[node_id] == own:
        members[node_id] = listen
    rows = [
        f"{{ id = {member}, address = {json.dumps(str(address))}, "
        + ("role = 3, status = 0 }" if join and member == node_id else "role = 0, status = 2 }")
        for member, address in members.items()
    ]
    keys: dict[str, int | str] = {
        "cluster.node_id": node_id,
        "cluster.listen_address": listen,
        "cluster.initial_cluster": f"[{', '.join(rows)}]",
        "cluster.db_root_dir": str(data_dir),
    }
    if own is None:
        keys["cluster.founding_wait_ms"] = 0  # who could call a node without a port?
    return Setup(_load(keys | dict(settings)), listens=own is not None, any_port=any_port)


def _load(keys: Mapping[str, int | str]) -> Config:
    """The configuration with these keys, checked as if they came from the environment."""
    environ = {
        ENVIRONMENT_PREFIX + key.upper().replace(".", "__"): str(value)
        for key, value in keys.items()
    }
    try:
        return replace(load(None, environ), source=SOURCE)
    except ConfigError as error:
        said = re.sub(rf"^(\${ENVIRONMENT_PREFIX}\w+|the environment)", SOURCE, error.message)
        raise ConfigError(said) from None


@asynccontextmanager
async def reserved(setup: Setup) -> AsyncIterator[Config]:
    """The configuration with the port that the node is to have, which nobody else gets meanwhile.

    A socket that is bound and does not listen keeps a port, and lets a listener of ours have it.

    Raises:
        TryAgain: the port is taken, or the address is not one of this machine.
        ConfigError: there is no such host.
    """
    address = setup.config.cluster.listen_address
    host, port = parse_address(address)
    wanted = 0 if setup.any_port else port
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, wanted, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ConfigError(
            f"{setup.config.source}: cluster.listen_address: cannot listen on {address}: "
            f"{error.strerror}; use an address of this machine"
        ) from None
    family, _, _, _, where = found[0]
    with socket.socket(family, socket.SOCK_STREAM) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind(where)
        except OSError as error:
            raise TryAgain(
                f"cannot listen on {address}: {error.strerror}; stop what uses that port, or "
                "change cluster.listen_address"
            ) from None
        yield _at(setup.config, join_host_port(host, held.getsockname()[1]))


def _at(config: Config, address: str) -> Config:
    """`config` with that address to listen on, by which the node is known unless it names another
    one.
    """
    cluster = config.cluster
    members = tuple(
        replace(member, address=address)
        if member.id == cluster.node_id and member.address == cluster.listen_address
        else member
        for member in cluster.initial_cluster
    )
    moved = replace(cluster, listen_address=address, initial_cluster=members)
    return replace(config, cluster=moved)
