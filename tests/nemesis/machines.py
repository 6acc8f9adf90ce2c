"""The machines of a run: a network namespace and a directory each, and what can be done to both.

Everything that is made here carries a name with the pid and the start time of its maker. So the
next run can tell what a killed one has left behind from what another one still uses, and runs that
go on side by side have nothing in common: addresses and ports exist in the namespaces of one alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from tests.namespaces import add_switch, inside, remove, wire
from tests.nemesis import disks

PREFIX = "dengine-nemesis-"
PORT = 9081
CLIENTS = "10.77.0.100"
PROXY_PORT = 20_000  # plus the id of the node behind it
PROXY_MARK = 7  # of what the proxies send, which must not be led to them again
COMMAND_S = 30.0  # for each command of the system's; the slowest takes a tenth of a second
REMOVED_S = 15.0  # until the last of it is gone: the kernel takes its time with namespaces
NODES = "nodes"  # in the folder of a run: what is kept of its machines

Pair = tuple[int, int]  # who sends, who receives

# Directed cuts drop what comes in, and count it. A closed connection is told by nobody: cables do
# not speak.
RULES = """
table inet nemesis {{
  set cut {{ type ipv4_addr; }}
  chain input {{ type filter hook input priority 0; ip saddr @cut counter drop; }}
  chain output {{ type nat hook output priority -100; {redirects} }}
}}
"""
REDIRECT = "meta mark != {mark} ip daddr {host} tcp dport {port} redirect to :{proxy};"


def host(node_id: int) -> str:
    """The address of a machine, in a private range that exists only inside the namespaces."""
    return f"10.77.0.{node_id}"


DROPPED = re.compile(r"counter packets (\d+)")


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
        work: where each machine gets a directory, named `own_tag()`. Removed in the end unless
            `keep` says otherwise; then it becomes the directory NODES beside it.
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
            self._change(node_id, RULES.format(redirects=redirects))

    def _remove(self) -> None:
        with uninterrupted():
            try:
                remove_made(_is_own)
            finally:
                if self.keep:
                    put_away(self.work)
                else:
                    shutil.rmtree(self.work, ignore_errors=True)

    def _nft(self, node_id: int, *arguments: str, rules: str = "") -> str:
        """nft(8) on a machine; what it says. Raises CalledProcessError."""
        done = subprocess.run(
            [*self.prefix(node_id), "nft", *arguments],
            input=rules,
            check=True,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )
        return done.stdout

    def _change(self, node_id: int, rules: str) -> None:
        self._nft(node_id, "-f", "-", rules=rules)

    def dropped(self, ids: Collection[int]) -> int:
        """How many packets cuts have kept from these machines so far."""
        chain = ("list", "chain", "inet", "nemesis", "input")
        return sum(packets_dropped(self._nft(node_id, *chain)) for node_id in ids)

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
                    self._change(target, f"add element inet nemesis cut {{ {host(source)} }}")
            yield
        finally:
            for source, target in made:
                self._cuts[source, target] -= 1
                if not self._cuts[source, target]:
                    self._change(target, f"delete element inet nemesis cut {{ {host(source)} }}")

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


def packets_dropped(listed: str) -> int:
    """The counter in what nft lists of the input chain."""
    found = DROPPED.search(listed)
    assert found is not None, f"nft lists no counter: {listed!r}"
    return int(found[1])


def remove_orphans(build: Path | None = None) -> list[str]:
    """End and remove what killed runs have left: processes, namespaces and disks.

    Args:
        build: where runs have their folders; what nodes have written there is kept.

    Returns:
        The names of what was removed.
    """
    found = remove_made(_is_orphan)
    for directory in _work_directories(build) if build is not None else ():
        if _is_orphan(directory.name):
            found.append(str(put_away(directory)))
    return found


def _work_directories(build: Path) -> list[Path]:
    """Of all runs in it, of other invocations as well."""
    found = []
    for depth in ("", "*/", "*/*/", "*/*/*/"):
        with contextlib.suppress(FileNotFoundError):  # another run ends while we look
            found += list(build.glob(f"{depth}{PREFIX}*"))
    return found


def remove_made(made_by: Callable[[str], bool]) -> list[str]:
    """End and remove every process, namespace and disk whose tag `made_by` accepts.

    Returns:
        The names of what was there.

    Raises:
        RuntimeError: some of it is still there after REMOVED_S; says what.
    """
    found = left(made_by)
    end = time.monotonic() + REMOVED_S
    while remaining := left(made_by):
        if time.monotonic() > end:
            raise RuntimeError(f"cannot be removed: {', '.join(remaining)}")
        for name in filter(made_by, _namespaces()):
            for pid in _processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            remove(name)
        disks.remove(made_by)
        if left(made_by):
            time.sleep(0.05)  # the pace of the polling
    return found


def left(made_by: Callable[[str], bool]) -> list[str]:
    """What there is of the runs whose tags `made_by` accepts: processes, namespaces and disks."""
    found = []
    for name in filter(made_by, _namespaces()):
        found += [name, *(f"process {pid} in {name}" for pid in _processes(name))]
    return found + disks.made(made_by)


def put_away(work: Path) -> Path:
    """Give what is left of a run's machines a name that nothing cleans up; without the images of
    their disks. Returns it."""
    for image in work.glob("*-disk"):
        image.unlink(missing_ok=True)
    kept, number = work.parent / NODES, 1
    while kept.exists():
        number += 1
        kept = work.parent / f"{NODES}-{number}"
    with contextlib.suppress(FileNotFoundError):  # another run did so first
        work.rename(kept)
    return kept


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within, SIGINT and SIGTERM wait: who cleans up is not stopped half way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _namespaces() -> list[str]:
    names = subprocess.run(
        ["ip", "netns", "list"], check=True, capture_output=True, text=True, timeout=COMMAND_S
    ).stdout
    return [line.split()[0] for line in names.splitlines() if line.strip()]


def _processes(namespace: str) -> list[int]:
    """All that work in it, but for this one."""
    said = subprocess.run(
        ["ip", "netns", "pids", namespace],
        check=False,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
    ).stdout
    return [int(pid) for pid in said.split() if int(pid) != os.getpid()]
