"""The machines of a run: a network namespace and a directory each, and what can be done to both.

Everything that is made here carries a name with the pid and the start time of its maker. So the
next run can tell what a killed one has left behind from what another one still uses.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.namespaces import add_switch, inside, remove, wire
from tests.nemesis import disks

PREFIX = "dengine-nemesis-"
PORT = 9081
CLIENTS = "10.77.0.100"
PROXY_PORT = 20_000  # plus the id of the node behind it
PROXY_MARK = 7  # of what the proxies send, which must not be led to them again

Pair = tuple[int, int]  # who sends, who receives

# Directed cuts drop what comes in. A closed connection is told by nobody: cables do not speak.
RULES = """
table inet nemesis {{
  set cut {{ type ipv4_addr; }}
  chain input {{ type filter hook input priority 0; ip saddr @cut drop; }}
  chain output {{ type nat hook output priority -100; {redirects} }}
}}
"""
REDIRECT = "meta mark != {mark} ip daddr {host} tcp dport {port} redirect to :{proxy};"


def host(node_id: int) -> str:
    """The address of a machine, in a private range that exists only inside the namespaces."""
    return f"10.77.0.{node_id}"


def _started(pid: int) -> str:
    """When a process began, in clock ticks since boot; "" when there is none."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        return stat.rpartition(")")[2].split()[19]
    return ""


def own_tag() -> str:
    return f"{PREFIX}{os.getpid()}-{_started(os.getpid())}"


def _is_own(name: str) -> bool:
    return name == own_tag() or name.startswith(f"{own_tag()}-")


def _is_orphan(name: str) -> bool:
    """Was `name` made by a run whose process is gone?"""
    pid, _, started = name.removeprefix(PREFIX).partition("-")
    started = started.partition("-")[0]
    return name.startswith(PREFIX) and pid.isdigit() and _started(int(pid)) != started


class Machines:
    """A context manager: makes the machines, and leaves nothing of them behind.

    Args:
        ids: of the nodes, 1 to 99.
        work: where each machine gets a directory; removed in the end unless `keep` says otherwise.
        proxied: everything between nodes goes through the proxies of links.py.
    """

    def __init__(self, ids: Sequence[int], work: Path, *, proxied: bool) -> None:
        self.ids = tuple(ids)
        self.work = work
        self.keep = False
        self._proxied = proxied
        self._cuts: Counter[Pair] = Counter()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Machines:
        remove_orphans(self.work.parent)
        try:
            self._make()
            # Clients and proxies live in this process, inside the clients' namespace.
            self._stack.enter_context(inside(self.namespace(0)))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._remove()

    def namespace(self, node_id: int) -> str:
        """Of a machine; 0 is the switch, where the clients are."""
        return f"{own_tag()}-{node_id}"

    def directory(self, node_id: int) -> Path:
        return self.work / f"n{node_id}"

    def prefix(self, node_id: int) -> tuple[str, ...]:
        """What runs a command on a machine."""
        return ("nsenter", f"--net=/run/netns/{self.namespace(node_id)}")

    def _make(self) -> None:
        self.work.mkdir(parents=True)
        add_switch(self.namespace(0), f"{CLIENTS}/24")
        for node_id in self.ids:
            self.directory(node_id).mkdir()
            wire(
                self.namespace(0),
                self.namespace(node_id),
                f"port{node_id}",
                f"{host(node_id)}/24",
            )
            others = [other for other in self.ids if other != node_id] if self._proxied else []
            redirects = "".join(
                REDIRECT.format(
                    mark=PROXY_MARK, host=host(other), port=PORT, proxy=PROXY_PORT + other
                )
                for other in others
            )
            self._nft(node_id, RULES.format(redirects=redirects))

    def _remove(self) -> None:
        disks.remove(_is_own)
        for node_id in (*self.ids, 0):
            remove(self.namespace(node_id))
        if not self.keep:
            shutil.rmtree(self.work, ignore_errors=True)

    def _nft(self, node_id: int, rules: str) -> None:
        subprocess.run(
            [*self.prefix(node_id), "nft", "-f", "-"],
            input=rules,
            check=True,
            capture_output=True,
            text=True,
        )

    @contextlib.contextmanager
    def cut(self, pairs: Iterable[Pair]) -> Iterator[None]:
        """Within, nothing that the first machine of a pair sends arrives at the second.

        Cuts may overlap: each is counted, and mended when the last one ends.
        """
        made: list[Pair] = []
        try:
            for source, target in pairs:
                made.append((source, target))
                self._cuts[source, target] += 1
                if self._cuts[source, target] == 1:
                    self._nft(target, f"add element inet nemesis cut {{ {host(source)} }}")
            yield
        finally:
            for source, target in made:
                self._cuts[source, target] -= 1
                if not self._cuts[source, target]:
                    self._nft(target, f"delete element inet nemesis cut {{ {host(source)} }}")

    def mount_disk(self, path: Path, kind: str, size_bytes: int) -> None:
        """A file system of its own at `path`; `kind` is one of disks.KINDS.

        Raises:
            NoLoopDevice
        """
        path.mkdir(exist_ok=True)
        if kind == "loop":
            disks.mount_loop(path, size_bytes, self.work / f"{own_tag()}-disk")
        else:
            disks.mount_tmpfs(path, size_bytes, own_tag())


def remove_orphans(work: Path | None = None) -> list[str]:
    """End and remove what killed runs have left: nodes, namespaces, disks, directories in `work`.

    Returns:
        The names of what was removed.
    """
    names = subprocess.run(
        ["ip", "netns", "list"], check=True, capture_output=True, text=True
    ).stdout
    found = []
    for name in [line.split()[0] for line in names.splitlines() if line.strip()]:
        if _is_orphan(name):
            for pid in _processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            remove(name)
            found.append(name)
    found += disks.remove(_is_orphan)
    for directory in work.glob(f"*{PREFIX}*") if work is not None else ():
        if _is_orphan(directory.name[directory.name.index(PREFIX) :]):
            shutil.rmtree(directory, ignore_errors=True)
            found.append(str(directory))
    return found


def _processes(namespace: str) -> list[int]:
    said = subprocess.run(
        ["ip", "netns", "pids", namespace], check=False, capture_output=True, text=True
    ).stdout
    return [int(pid) for pid in said.split()]
