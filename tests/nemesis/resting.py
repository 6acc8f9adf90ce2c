"""What a node holds on to when nothing happens any more: memory, descriptors, threads, children.

Under load every figure depends on the moment. A leak is what remains at rest: all faults are
healed, the clients are gone, no snapshot is written, the log hardly grows, and all that has been
so for a while. Then a node may use what the same process used when it was fresh, and room for what
is stored there.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

LOOK_S = 0.5
STILL_LOOKS = 10  # in a row, at which nothing has grown
# From one look to the next: while anything can expire, the log hears of the time, from one node
# alone every second.
ENTRIES_MAX = 3
GROWTH_BYTES = 48 * 1024 * 1024  # what allocators keep, and the entries kept for slow followers
STREAMS = 3  # descriptors per other member: a stream, one that is being replaced, a transfer
MORE_DESCRIPTORS = 6
# asyncio starts as many threads for blocking calls as it ever needed at once, up to that.
MORE_THREADS = min(32, (os.cpu_count() or 1) + 4) + 4
# Bounds under load, of queues and caches together: far above what this load needs.
PEAK_BYTES = 512 * 1024 * 1024
PEAK_DESCRIPTORS = 256


class Usage(NamedTuple):
    """Of one process, at one moment."""

    memory_bytes: int  # its own, not what it has mapped
    descriptors: int
    threads: int
    children: int = 0

    def __str__(self) -> str:
        return (
            f"{self.memory_bytes / 1e6:.1f} MB, {self.descriptors} descriptors, "
            f"{self.threads} threads, {self.children} children"
        )

    def most(self, other: Usage) -> Usage:
        return Usage(*(max(one, two) for one, two in zip(self, other, strict=True)))


NOTHING = Usage(0, 0, 0)


def look(pid: int, *, children: bool = False) -> Usage | None:
    """At a process now; None when it has ended."""
    with contextlib.suppress(OSError, psutil.NoSuchProcess):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        memory = re.search(r"RssAnon:\s+(\d+) kB", status)
        threads = re.search(r"Threads:\s+(\d+)", status)
        if memory is None or threads is None:  # it has ended, and its parent was not told yet
            return None
        count = len(psutil.Process(pid).children()) if children else 0
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        return Usage(int(memory[1]) * 1024, descriptors, int(threads[1]), count)
    return None


def stored_bytes(directory: Path) -> int:
    """What a node has on disk as its log and its state."""
    total = 0
    for file in directory.glob("*/data.mdb"):
        with contextlib.suppress(OSError):
            total += file.stat().st_blocks * 512
    return total


class Still:
    """Has nothing changed for a while? Told what is seen at each look."""

    def __init__(self) -> None:
        self.looks = 0
        self.changed = ""  # what changed last
        self._before: tuple[object, Mapping[int, Usage]] | None = None
        self._entries = 0

    def see(self, position: object, usages: Mapping[int, Usage], entries: int = 0) -> bool:
        """True when nothing has changed for STILL_LOOKS looks.

        Args:
            position: where the cluster is: terms, revisions, jobs.
            usages: of every node. What becomes less does not count as a change, nor do a few pages
                of memory.
            entries: in the longest log, ever.
        """
        change = self._change(position, usages, entries)
        self._entries = entries
        if change:
            self.changed, self.looks = change, 0
            self._before = (position, dict(usages))
        else:
            self.looks += 1
        return self.looks >= STILL_LOOKS

    def _change(self, position: object, usages: Mapping[int, Usage], entries: int) -> str:
        if self._before is None:
            return "the first look"
        where, before = self._before
        if position != where:
            return f"{where} became {position}"
        if entries > self._entries + ENTRIES_MAX:
            return f"the log went on from entry {self._entries} to {entries}"
        for node_id, usage in usages.items():
            was = before.get(node_id, NOTHING)
            if usage.children:
                return f"node {node_id} has {usage.children} children"
            if usage.descriptors > was.descriptors or usage.threads > was.threads:
                return f"node {node_id} had {was}, and then {usage}"
            if usage.memory_bytes > was.memory_bytes + GROWTH_BYTES // 16:
                return f"node {node_id} had {was}, and then {usage}"
        return ""


def leaks(node_id: int, fresh: Usage, rest: Usage, stored: int, members: int) -> list[str]:
    """What a process holds on to for no reason.

    Args:
        fresh: when its cluster was whole for the first time in its life.
        rest: when nothing happens any more.
        stored: bytes, see `stored_bytes`.
        members: of the cluster now.
    """
    bounds: Sequence[tuple[str, int, int]] = (
        ("bytes of memory", rest.memory_bytes, fresh.memory_bytes + GROWTH_BYTES + stored),
        (
            "descriptors",
            rest.descriptors,
            fresh.descriptors + STREAMS * (members - 1) + MORE_DESCRIPTORS,
        ),
        ("threads", rest.threads, fresh.threads + MORE_THREADS),
        ("children", rest.children, 0),
    )
    return [
        f"node {node_id} leaks: at rest it has {count} {what}, and {most} at most would do "
        f"(fresh: {fresh}; {stored} bytes are stored, {members} members)"
        for what, count, most in bounds
        if count > most
    ]


def too_much(node_id: int, peak: Usage) -> list[str]:
    """Under load there is a bound as well, whatever the clients do."""
    found = []
    if peak.memory_bytes > PEAK_BYTES:
        found.append(f"node {node_id} used {peak.memory_bytes} bytes of memory under load")
    if peak.descriptors > PEAK_DESCRIPTORS:
        found.append(f"node {node_id} had {peak.descriptors} descriptors under load")
    return found
