"""The order in which the real log reaches a real disk, as strace sees it.

A power cut keeps what was synced and any part of the rest. So before anything is acknowledged all
data must be synced, names of files and directories as well; and before LMDB's meta page names the
pages of a commit, these must be.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.storage.test_crash import CHILD, DEADLINE_S, ENVIRONMENT, ROOT

CALLS = (
    *("openat", "close", "mkdir", "mkdirat", "rename", "renameat", "renameat2"),
    *("write", "pwrite64", "writev", "pwritev", "fsync", "fdatasync"),
)
META_BYTES = 2 * os.sysconf("SC_PAGE_SIZE")  # two meta pages, then those of the trees
LOCKS = ("LOCK", "lock.mdb")  # of use to those only that run at the same time
WRITES = 3  # by the log's thread; what the child says of each
SAID = ["opened", *["written"] * WRITES, "purged", "reset"]

_LINE = re.compile(r"(\d+) +(.*)")
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)")
_CALL = re.compile(r"(?P<name>\w+)\((?:(?P<fd>\d+)<(?P<on>[^>]*)>)?.* = (?P<result>\d+)")
_QUOTED = re.compile(r'"([^"]*)"')
_LAST = re.compile(r", (\d+)\) +=")


class Call(NamedTuple):
    """A call that succeeded.

    Attributes:
        fd: the descriptor that it was for, or has opened; -1: none.
        path: of that descriptor, or of the name that it makes.
        text: all of it.
    """

    name: str
    fd: int
    path: Path
    text: str


def calls(trace: str) -> Iterator[Call]:
    """What `strace -f -y` has written, in the order in which the calls ended.

    A thread's call that another one interrupts stands in two pieces.
    """
    begun: dict[str, str] = {}
    for line in trace.splitlines():
        found = _LINE.fullmatch(line)
        assert found, line
        thread, text = found.groups()
        if text.endswith("<unfinished ...>"):
            begun[thread] = text.removesuffix("<unfinished ...>").rstrip()
            continue
        if rest := _RESUMED.fullmatch(text):
            text = begun.pop(thread) + rest[1]
        if call := _CALL.match(text):
            names = _QUOTED.findall(text)
            fd, path = int(call["fd"] or -1), call["on"] or (names or [""])[-1]
            if call["name"] == "openat":
                fd = int(call["result"])
            yield Call(call["name"], fd, Path(path), text)


class Disk:
    """What a power cut could still take away.

    Args:
        root: all that counts lies below it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._synced_writes: set[int] = set()  # descriptors of which each write is
        self.unsynced: set[Path] = set()  # files with data, directories with names
        self.synced: set[Path] = set()  # since the last look
        self.commits = 0  # writes of a meta page

    def see(self, call: Call) -> None:
        match call.name:
            case "openat":
                self._opened(call)
            case "close":
                self._synced_writes.discard(call.fd)
            case "fsync" | "fdatasync":
                self.unsynced.discard(call.path)
                self.synced.add(call.path)
            case "write" | "pwrite64" | "writev" | "pwritev" if self._is_ours(call.path):
                self._written(call)
            case "mkdir" | "mkdirat" | "rename" | "renameat" | "renameat2":
                self._named(call.path)

    def _opened(self, call: Call) -> None:
        if "O_DSYNC" in call.text or "O_SYNC" in call.text:
            self._synced_writes.add(call.fd)
        if "O_CREAT" in call.text:
            self._named(call.path)

    def _named(self, path: Path) -> None:
        if self._is_ours(path):
            self.unsynced.add(path.parent)

    def _written(self, call: Call) -> None:
        if call.path.name == "data.mdb" and self._is_meta(call):
            assert call.path not in self.unsynced, f"it names pages that may be lost: {call.text}"
            self.commits += 1
        if call.fd not in self._synced_writes:
            self.unsynced.add(call.path)

    def _is_meta(self, call: Call) -> bool:
        offset = _LAST.search(call.text)  # LMDB writes nothing but pwrite64 there
        return call.name == "pwrite64" and offset is not None and int(offset[1]) < META_BYTES

    def _is_ours(self, path: Path) -> bool:
        return self._root in path.parents and path.name not in LOCKS


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_nothing_is_acknowledged_before_a_power_cut_would_leave_it(tmp_path: Path) -> None:
    """In a new directory, and in one that somebody else made and perhaps did not live to sync."""
    root = tmp_path / "db"
    for start in range(2):
        log = root / "1" / "log"
        disk, said = Disk(tmp_path), []
        for call in calls(_traced(root, tmp_path / f"trace-{start}")):
            if call.name != "write" or call.fd != 1:
                disk.see(call)
                continue
            [text] = _QUOTED.findall(call.text)
            if text == r"\n":
                continue
            said.append(text)
            assert not disk.unsynced, f"not synced before {text!r}"
            if text == "opened":
                assert {log, log.parent} <= disk.synced, f"names not synced at start {start}"
            else:
                assert disk.commits == 1, f"{disk.commits} commits before {text!r}"
            disk.commits = 0
        assert said == SAID


def _traced(root: Path, trace: Path) -> str:
    """All that the child does in `root`."""
    strace = ["strace", "-f", "-y", "-qq", "-o", str(trace), "-e", f"trace={','.join(CALLS)}"]
    child = [sys.executable, "-m", "tests.mutants.child", str(CHILD), "acknowledge", str(root)]
    subprocess.run(
        [*strace, *child],
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=DEADLINE_S,
        check=True,
    )
    return trace.read_text(encoding="utf-8", errors="replace")
