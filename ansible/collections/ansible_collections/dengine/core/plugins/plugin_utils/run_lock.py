"""Who holds the run lock: how a run names itself, and what can be proved about another's.

Proofs work within one boot and one process id namespace: nothing is known about a run elsewhere,
and two controllers may well have the same name.
"""

from __future__ import annotations

import getpass
import os
import socket
from typing import Any


def _started(pid: int) -> str:
    """Start time of a process of this machine in clock ticks after boot; "" when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _place() -> str:
    """Where process ids of this controller mean something."""
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
        boot = file.read().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def owner(pid: int) -> dict[str, Any]:
    """The run whose ansible-playbook is process `pid`."""
    controller, place, started = socket.gethostname(), _place(), _started(pid)
    return {
        "controller": controller,
        "place": place,
        "pid": pid,
        "started": started,
        "user": getpass.getuser(),
        "nonce": f"{controller}/{place}/{pid}/{started}",
    }


def lives(holder: dict[str, Any]) -> bool | None:
    """Does that run still go on? None where that cannot be known from here."""
    if not holder or holder.get("place") != _place():
        return None
    return _started(int(holder.get("pid", 0))) == holder.get("started")
