"""`dengine serve`: one node in the foreground, from its configuration to its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import sys
from pathlib import Path

import uvloop

from dengine import __version__
from dengine.api.server import HttpServer
from dengine.config import Config, is_loopback, load, parse_address
from dengine.errors import DengineError, TryAgain
from dengine.log import StdoutLog
from dengine.node.node import Node

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
GIL_SWITCH_S = 0.0002  # the log writer's short steps must not wait 5 ms for a busy event loop
STOP_GRACE_S = 5.0  # for requests under way after SIGTERM

log = logging.getLogger("dengine.serve")


def serve(path: Path | None) -> int:
    """Run the node that `path` (None: CONFIG_PATH) describes until SIGTERM or SIGINT; returns 0.

    Raises:
        FatalError: it cannot start, or cannot go on; its `exit_code` is the process's.
    """
    config = load(path, os.environ)
    sys.setswitchinterval(GIL_SWITCH_S)
    _raise_open_files_limit()
    with (
        StdoutLog(config.log.level, config.log.format, config.cluster.node_id),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_serve(config))
    return 0


async def _serve(config: Config) -> None:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, asked.set)
    _check_port(config.cluster.listen_address)
    node = Node(config)
    await node.open()
    server = HttpServer(node, config)
    await server.start()
    _greet(config)
    running = asyncio.create_task(node.run(), name="node")
    asking = asyncio.create_task(asked.wait(), name="stop signal")
    _notify_systemd("READY=1")
    await asyncio.wait({running, asking}, return_when=asyncio.FIRST_COMPLETED)
    asking.cancel()
    _notify_systemd("STOPPING=1")
    if running.done():
        await server.stop(0.0)
    else:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)  # a second one ends the process at once
        log.info("stopping: finishing requests, handing leadership over, syncing")
        await server.stop(STOP_GRACE_S)
        await node.stop()
    try:
        await running
    except DengineError:
        raise
    except Exception as error:
        log.exception("the node died of a bug")
        raise TryAgain(
            f"the node died of a bug ({type(error).__name__}: {error}): its log has the trace, "
            "please report it; a restart goes on from what is durable"
        ) from error


def _check_port(address: str) -> None:
    """Find a taken port before anything is written to disk.

    Raises:
        TryAgain: somebody listens there.
    """
    host, port = parse_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise TryAgain(
                f"cannot listen on {address}: the port is taken; stop what uses it, or change "
                "cluster.listen_address"
            ) from None


def _greet(config: Config) -> None:
    cluster = config.cluster
    log.info("dengine %s listens on %s", __version__, cluster.listen_address)
    if not is_loopback(cluster.listen_address):
        log.warning(
            "%s is open to everyone who can reach it: nothing checks who reads, writes "
            "or joins, so keep this port inside a trusted network",
            cluster.listen_address,
        )


def _raise_open_files_limit() -> None:
    """Connections are bounded by [limits], not by the shell's customary 1024 files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _notify_systemd(state: str) -> None:
    """Tell the service manager, where there is one (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.sendto(state.encode(), address)
