"""`dengine serve`: one node in the foreground, from its configuration to its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import faulthandler
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import uvloop

from dengine import __version__
from dengine.api.server import HttpServer
from dengine.config import Config, is_loopback, load, parse_address
from dengine.errors import ConfigError, DengineError, TryAgain
from dengine.log import StdoutLog
from dengine.node.node import Node

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
GIL_SWITCH_S = 0.0002  # the log writer's short steps must not wait 5 ms for a busy event loop
UNKNOWN_HOST = (socket.EAI_NONAME, socket.EAI_NODATA)
WATCHDOG_FEEDS = 4  # per interval: one that is late or lost does not matter
STOP_GRACE_S = 5.0  # for requests under way after SIGTERM
# glibc's mallopt(3). With its defaults the top of the heap goes back to the kernel after a batch of
# some size, and is faulted in anew for the next one: a quarter of what it costs to apply that.
MALLOC_OPTIONS = {-1: 16 * 1024 * 1024, -3: 8 * 1024 * 1024}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD

log = logging.getLogger("dengine.serve")


def serve(path: Path | None) -> int:
    """Run the node that `path` (None: CONFIG_PATH) describes until SIGTERM or SIGINT; returns 0.

    Raises:
        FatalError: it cannot start, or cannot go on; its `exit_code` is the process's.
    """
    config = load(path, os.environ)
    sys.setswitchinterval(GIL_SWITCH_S)
    faulthandler.enable()  # the watchdog's SIGABRT leaves in the journal where it hung
    _raise_open_files_limit()
    _keep_freed_memory()
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
    _check_port(config)
    node = Node(config)
    await node.open()
    server = HttpServer(node, config)
    await server.start()
    _greet(config)
    running = asyncio.create_task(node.run(), name="node")
    asking = asyncio.create_task(asked.wait(), name="stop signal")
    feeding = asyncio.create_task(_feed_watchdog(lambda: node.turns), name="watchdog")
    _notify_systemd("READY=1")
    await asyncio.wait({running, asking}, return_when=asyncio.FIRST_COMPLETED)
    asking.cancel()
    feeding.cancel()
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


def _check_port(config: Config) -> None:
    """Find out before anything is written to disk whether the port can be had.

    Raises:
        TryAgain: somebody listens there, the address is not one of this machine (yet: after a boot
            it may come late, by DHCP or with a tunnel), or the system is short of something.
        ConfigError: there is no such host, or this user may not listen there.
    """
    address = config.cluster.listen_address
    host, port = parse_address(address)
    where = f"{config.source}: cluster.listen_address: cannot listen on {address}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, local in {(family, local[:2]) for family, _, _, _, local in found}:
            try:
                socket.create_server(local, family=family).close()
            except OSError as error:
                if error.errno != errno.EAFNOSUPPORT:  # a machine without IPv6
                    raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise TryAgain(
                f"{where}: the port is taken; stop what uses it, or change the address"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ConfigError(
                f"{where}: user {os.geteuid()} may not; use a port above 1023"
            ) from None
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        message = f"{where}: {reason}; use an address of this machine"
        if error.errno in UNKNOWN_HOST:
            raise ConfigError(message) from None
        raise TryAgain(message) from None


def _greet(config: Config) -> None:
    cluster = config.cluster
    log.info("dengine %s listens on %s", __version__, cluster.listen_address)
    security = config.security
    if is_loopback(cluster.listen_address):
        return
    if security.token_file is None and security.peer_secret_file is None:
        problem = "nothing checks who reads, writes or joins"
    elif security.token_file is None:
        problem = "security.token_file is not set, so nothing checks who reads and writes"
    elif security.peer_secret_file is None:
        problem = "security.peer_secret_file is not set, so who speaks as a node needs no token"
    else:
        return
    log.warning(
        "%s is open to everyone who can reach it: %s; keep this port inside a trusted network",
        cluster.listen_address,
        problem,
    )


def _keep_freed_memory() -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not every libc has it
    if mallopt is not None:
        for option, size in MALLOC_OPTIONS.items():
            mallopt(option, size)


def _raise_open_files_limit() -> None:
    """Connections are bounded by [limits], not by the shell's customary 1024 files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _feed_watchdog(turns: Callable[[], int]) -> None:
    """Tell the service manager that the cycle turns; silence has it kill and restart the process.

    An event loop that runs proves nothing: only `turns` completed since the last time count.
    """
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or pid not in ("", str(os.getpid())):
        return
    seen = 0
    while True:
        if (now := turns()) != seen:
            seen = now
            _notify_systemd("WATCHDOG=1")
        await asyncio.sleep(int(usec) / 1e6 / WATCHDOG_FEEDS)


def _notify_systemd(state: str) -> None:
    """Tell the service manager, where there is one (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.sendto(state.encode(), address)
