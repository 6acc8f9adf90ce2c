"""One point of the sweep: prepare, inject, look what the node makes of it, restart, check."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster import Cluster, wait_for
from tests.crash_sweep.scenarios import PATHS, Scenario, litter
from tests.crash_sweep.sites import (
    CHANGING,
    DISTRUST,
    FIRST,
    INSTALL,
    PURGE,
    REBUILD,
    TAKE,
    Site,
)
from tests.crash_sweep.strace import Fault, Injection, Strace, process_of, recorded, wait_gone

SITES: dict[str, tuple[Site, ...]] = {
    "first take": FIRST,
    "take": TAKE,
    "purge": PURGE,
    "first install": FIRST,
    "install": INSTALL,
    "rebuild": REBUILD,
    "distrust": DISTRUST,
}
STORAGE_IO = 74  # the exit code for "the disk refused; a restart recovers"
POINT_DEADLINE_S = 60.0  # a writer that is stuck is killed after 30


@dataclass
class Tally:
    """How many points of each path and kind have been swept."""

    points: Counter[tuple[str, Fault]] = field(default_factory=Counter)
    passed: Counter[tuple[str, Fault]] = field(default_factory=Counter)

    def as_rows(self) -> list[tuple[str, str, int, int]]:
        """Path, fault, swept, passed: what crosses from one process to another."""
        return [
            (path, fault.value, swept, self.passed[path, fault])
            for (path, fault), swept in self.points.items()
        ]

    def add_rows(self, rows: list[tuple[str, str, int, int]]) -> None:
        """Add what another process has swept."""
        for path, fault, swept, passed in rows:
            self.points[path, Fault(fault)] += swept
            self.passed[path, Fault(fault)] += passed

    def table(self) -> list[str]:
        """Lines for people."""
        heads = "".join(f"{fault.value:>16}" for fault in Fault)
        lines = [f"{'passed/swept':<14}{heads}"]
        for path in SITES:
            cells = "".join(f"{self._cell(path, fault):>16}" for fault in Fault)
            lines.append(f"{path:<14}{cells}")
        lines.append(f"{self.passed.total()} of {self.points.total()} points passed")
        return lines

    def _cell(self, path: str, fault: Fault) -> str:
        total = self.points[path, fault]
        return f"{self.passed[path, fault]}/{total}" if total else "-"


class Stage:
    """The nodes of one path at a time, kept from point to point as long as all is well."""

    def __init__(self, directory: Path, tally: Tally) -> None:
        self._directory = directory
        self._tally = tally
        self._count = 0
        self._cluster: Cluster | None = None
        self._scenario: Scenario | None = None

    def scenario(self, path: str) -> Scenario:
        """The nodes of `path`, at rest."""
        kind = PATHS[path]
        if type(self._scenario) is not kind or kind.walked_once:
            self.clear()
            self._count += 1
            directory = self._directory / f"{self._count}"
            directory.mkdir()
            self._cluster = Cluster(directory).__enter__()
            self._scenario = kind(self._cluster)
        assert self._scenario is not None
        return self._scenario

    def clear(self) -> None:
        """End all processes; the next point starts on new nodes."""
        cluster, self._cluster, self._scenario = self._cluster, None, None
        if cluster is not None:
            cluster.__exit__()

    def sweep(self, path: str, site: Site, fault: Fault, occurrence: int) -> bool:
        """Sweep one point. False when there is no such occurrence: the path ended before it."""
        cluster = None
        try:
            scenario = self.scenario(path)
            cluster = self._cluster
            log = self._directory / f"strace-{self._count}"
            reached = walk(scenario, site, fault, occurrence, log)
            if reached:
                self._tally.points[path, fault] += 1
                self._tally.passed[path, fault] += 1
            return reached
        except BaseException:
            self._tally.points[path, fault] += 1
            print(f"path {path}, {site.name}, occurrence {occurrence}, {fault.value}")
            if cluster is not None:
                print(cluster.describe())
            self.clear()
            raise


def faults(site: Site) -> list[Fault]:
    """What can happen at a site. The subprocess can die alone; the node never does that."""
    return [f for f in Fault if f is not Fault.WRITER_KILLED or site.who == "writer"]


def walk(scenario: Scenario, site: Site, fault: Fault, occurrence: int, log: Path) -> bool:
    """One way along the path, with the fault, and everything that must hold afterwards."""
    scenario.prepare()
    victim, file = scenario.victim, scenario.files()[site.file]
    log.unlink(missing_ok=True)
    # A node knows its files by names relative to where it was started.
    names = [file, file.relative_to(victim.cwd)]
    children = site.who == "writer" or site.new_thread
    injection = Injection(log, site.syscalls, names, fault, occurrence, children=children)
    try:
        if victim.running:
            injection.attach(victim.pid)
        else:
            victim.prefix = injection.prefix
        scenario.go()
        wait_for(
            lambda: injection.seen(victim.pid) or not victim.running or scenario.done(),
            f"{site.name} number {occurrence}, or the end of the path",
            POINT_DEADLINE_S,
        )
        reached = thread = injection.seen(victim.pid)
        assert thread or victim.running, f"it ended for another reason: {victim.lines()[-1]}"
        if fault is Fault.WRITER_KILLED and process_of(thread) == victim.pid:
            reached = 0  # the subprocess is past it; the node does the same there, and stands still
            victim.kill()
        if reached:
            _carry_out(scenario, site, fault, thread, injection)
    finally:
        injection.detach(victim.pid)
    if victim.running:
        victim.kill()
    scenario.restart()
    scenario.check()
    return bool(reached)


def unlisted(scenario: Scenario, sites: Sequence[Site], log: Path) -> set[str]:
    """Walk along the path without a fault: calls in the data directory that `sites` lacks."""
    scenario.prepare()
    victim, files = scenario.victim, scenario.files()
    log.unlink(missing_ok=True)
    strace = Strace(log, ["-y", "-e", f"trace={CHANGING}"], children=True)
    try:
        if victim.running:
            strace.attach(victim.pid)
        else:
            victim.prefix = strace.prefix
        scenario.go()
        wait_for(scenario.done, "the end of the path", POINT_DEADLINE_S)
    finally:
        strace.detach(victim.pid)
    listed = {(files[site.file], name) for site in sites for name in site.syscalls.split(",")}
    listed |= {(path, "openat") for path in files.values()}  # those that change nothing, too
    ordinary = {files["old state data"], files["log"], victim.directory / "LOCK"}
    missing = set()
    for call in recorded(log, victim.cwd):
        if victim.directory not in call.path.parents or call.path in ordinary:
            continue
        if call.name in ("open", "openat") and not call.creates:
            continue
        # A directory is removed through a descriptor of it, one name after the other.
        if not {(call.path, call.name), (call.path.parent, call.name)} & listed:
            missing.add(f"{call.name} {call.path.relative_to(victim.directory)}")
    return missing


def _carry_out(
    scenario: Scenario, site: Site, fault: Fault, thread: int, injection: Injection
) -> None:
    """The rest of the fault, and how the node takes it."""
    victim = scenario.victim
    # A thread of the node may be gone by now; what strace follows in the subprocess stands still
    # or is at its end, and then it is not the node.
    process = process_of(thread) or (victim.pid if site.who == "node" else 0)
    if fault is Fault.NODE_KILLED:
        victim.kill()
        if process:
            wait_gone(process)  # whichever it was: the subprocess dies with its node
        return
    if fault is Fault.WRITER_KILLED:
        os.kill(process, signal.SIGKILL)
    injection.detach(victim.pid)
    if process == victim.pid and site.ends:
        scenario.provoke()
        assert victim.wait_exit() == STORAGE_IO
    elif process == victim.pid and site.ends is None:
        wait_for(lambda: scenario.done() if victim.running else True, "the node to decide")
        assert victim.running or victim.wait_exit() == STORAGE_IO
    if victim.running:
        scenario.again()
        wait_for(scenario.done, "another attempt to succeed", POINT_DEADLINE_S)
        if process != victim.pid:  # what the node itself cannot remove, its next start does
            wait_for(lambda: not litter(victim.directory), "what the subprocess left to be removed")
