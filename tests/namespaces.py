"""Network namespaces for tests: machines whose addresses can meet nobody else's. Needs root."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator

CLONE_NEWNET = 0x40000000


def ip(*arguments: str) -> None:
    """iproute2; raises CalledProcessError."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Sockets that this thread and its new threads open belong to the namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(there, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {namespace}")
        yield
    finally:
        libc.setns(home, CLONE_NEWNET)
        os.close(home)
        os.close(there)


def wire(switch: str, name: str, port: str, address: str) -> None:
    """A new namespace `name`: its eth0 has `address` and is plugged into the bridge of `switch`."""
    ip("netns", "add", name)
    ip("-n", switch, "link", "add", port, "type", "veth", "peer", "eth0", "netns", name)
    ip("-n", switch, "link", "set", port, "master", "bridge0", "up")
    ip("-n", name, "addr", "add", address, "dev", "eth0")
    ip("-n", name, "link", "set", "eth0", "up")
    ip("-n", name, "link", "set", "lo", "up")


def add_switch(switch: str, address: str) -> None:
    """A new namespace with a bridge; `address` is where whoever works in it is seen."""
    ip("netns", "add", switch)
    ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
    ip("-n", switch, "addr", "add", address, "dev", "bridge0")
    ip("-n", switch, "link", "set", "bridge0", "up")


def remove(name: str) -> None:
    """Delete a namespace with everything that is plugged into it; one that is gone is fine."""
    subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
