"""Network namespaces for tests: machines whose addresses can meet nobody else's. Needs root."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping

import pytest

CLONE_NEWNET = 0x40000000
CUT = """table inet cut {
  chain input { type filter hook input priority 0; iifname eth0 drop; }
  chain output { type filter hook output priority 0; oifname eth0 drop; }
}"""

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("nft") is None,
    reason="needs root, iproute2 and nftables",
)


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


@contextlib.contextmanager
def machines(addresses: Mapping[int, str], own: str) -> Iterator[dict[int, str]]:
    """One namespace per address, joined by a bridge in one more (0), where whoever works in it is
    seen as `own`: nothing of it can meet the addresses of the machine that runs the test."""
    prefix = f"dengine-{os.getpid()}"
    switch = f"{prefix}-switch"
    names = {number: f"{prefix}-{number}" for number in addresses}
    try:
        add_switch(switch, f"{own}/24")
        for number, name in names.items():
            wire(switch, name, f"port{number}", f"{addresses[number]}/24")
        yield {0: switch, **names}
    finally:
        for name in (switch, *names.values()):
            remove(name)


@contextlib.contextmanager
def cut_off(*names: str) -> Iterator[None]:
    """Within, nothing comes to these machines and nothing leaves them, and nobody is told."""
    done: list[str] = []
    try:
        for name in names:
            _nft(name, CUT)
            done.append(name)
        yield
    finally:
        for name in done:
            _nft(name, "delete table inet cut")


def _nft(name: str, rules: str) -> None:
    command = ["ip", "netns", "exec", name, "nft", "-f", "-"]
    subprocess.run(command, input=rules, check=True, capture_output=True, text=True)


def remove(name: str) -> None:
    """Delete a namespace with everything that is plugged into it; one that is gone is fine."""
    subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
