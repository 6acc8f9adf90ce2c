"""The nodes of a run and their supervisor, which is to them what systemd is elsewhere.

Only the supervisor starts nodes. A fault holds a node down or lets it go, and says which exit codes
it explains; every other end of a process that nobody asked for is a failure of the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster import ServeProcess
from tests.nemesis.client import Unanswered, call
from tests.nemesis.disks import NoLoopDevice
from tests.nemesis.machines import PORT, Machines, host
from tests.nemesis.plan import Plan

LOOK_S = 0.05
SAMPLE_S = 0.5
LENIENT_S = 1.0  # an end is noticed a moment after it came
RESTART_S = 1.0  # after an end that nobody asked for
RESTARTS_MAX = 6  # in a row without having been ready, as the unit has it
READY_S = 60.0  # for a busy machine; a quiet one takes a second or two
SMALL_DISK_BYTES = 64_000_000  # while nothing fills it
NO_LOOP_DEVICE = "no loop device can be had here"
# What a node may need on this load: far above what it does, far below what a leak comes to.
MEMORY_MAX_BYTES = 256 * 1024 * 1024  # its own, not what it has mapped
DESCRIPTORS_MAX = 256
COMPLAINTS = re.compile(
    r"^Traceback|Fatal Python error|was never (retrieved|awaited)", re.MULTILINE
)


@dataclass
class Node:
    """One node and what is expected of it."""

    serve: ServeProcess
    wanted: bool = False
    held: int = 0  # faults that keep it down
    boots: int = 0
    excused: Counter[int] = field(default_factory=Counter)  # exit codes
    lenient_until: dict[int, float] = field(default_factory=dict)
    failing: int = 0  # ends in a row
    noted: bool = True  # the end of its last process
    restart_at: float = 0.0
    memory_bytes: int = 0  # the most it has used
    descriptors: int = 0

    @property
    def id(self) -> int:
        return self.serve.node_id

    @property
    def up(self) -> bool:
        return self.serve.running

    @contextlib.contextmanager
    def excuse(self, *codes: int) -> Iterator[None]:
        """Within it, and a moment longer, the node may end like this; signals are negative."""
        self.excused.update(codes)
        try:
            yield
        finally:
            self.excused.subtract(codes)
            self.lenient_until.update(dict.fromkeys(codes, time.monotonic() + LENIENT_S))

    def explains(self, code: int) -> bool:
        """Does a fault of this moment, or of the one before, explain this exit code?"""
        return self.excused[code] > 0 or time.monotonic() < self.lenient_until.get(code, 0.0)

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """kill -9, and nothing starts it within."""
        with self.kept_down():
            if self.up:
                self.serve.kill()
            self.noted = True
            yield

    @contextlib.contextmanager
    def kept_down(self) -> Iterator[None]:
        """However it ends, nothing starts it within, and nobody asks why it ended."""
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    def sample(self) -> None:
        """Look at memory and descriptors of the process."""
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self.serve.pid}/status").read_text(encoding="utf-8")
            found = re.search(r"RssAnon:\s+(\d+) kB", status)
            if found:
                self.memory_bytes = max(self.memory_bytes, int(found[1]) * 1024)
            count = len(os.listdir(f"/proc/{self.serve.pid}/fd"))
            self.descriptors = max(self.descriptors, count)


class Nodes:
    """The nodes of a plan on their machines.

    Attributes:
        problems: what no fault explains.
        spares: ids that were never used.
        exits: ends of processes that nobody asked for, as sentences, explained or not.
        lacking: what the plan asks for and this machine does not have.
    """

    def __init__(self, plan: Plan, machines: Machines, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._machines = machines
        self._say = say
        self.problems: list[str] = []
        self.exits: list[str] = []
        self.lacking: list[str] = []
        self._peer_secret = secrets.token_hex(32)
        self.all = {node_id: self._make(node_id) for node_id in (*plan.ids, *plan.spares)}
        self.spares = list(plan.spares)
        self.voters = set(plan.founders)  # once everything asked for is done

    @property
    def small(self) -> Node:
        """The node with a disk of its own."""
        return self.all[self._plan.small]

    def wanted(self) -> list[Node]:
        return [node for node in self.all.values() if node.wanted]

    def _make(self, node_id: int) -> Node:
        cwd = self._machines.directory(node_id)
        if node_id == self._plan.small:
            self._give_disk(node_id, cwd / "db")
        config = cwd / "node.toml"
        joins = node_id not in self._plan.founders
        serve = ServeProcess(
            node_id,
            PORT,
            config,
            cwd,
            self._machines.work / f"n{node_id}.log",
            host=host(node_id),
            prefix=self._machines.prefix(node_id),
        )
        node = Node(serve)
        self.configure(node, joins=joins)
        return node

    def _give_disk(self, node_id: int, path: Path) -> None:
        try:
            self._machines.mount_disk(path, self._plan.disk, SMALL_DISK_BYTES)
        except NoLoopDevice as error:
            text = f"node {node_id} has a disk in memory: {NO_LOOP_DEVICE}: {error}"
            self.lacking.append(text)
            self._say(text)
            self._machines.mount_disk(path, "tmpfs", SMALL_DISK_BYTES)

    def configure(self, node: Node, *, joins: bool) -> None:
        """Write the file of a founder, or of a node that joins with an empty directory."""
        known = sorted({*self._plan.ids, node.id}) if joins else self._plan.founders
        rows = []
        for member in known:
            role, status = (3, 0) if joins and member == node.id else (0, 2)
            rows.append(
                f'{{ id = {member}, address = "{host(member)}:{PORT}", '
                f"role = {role}, status = {status} }},"
            )
        lines = [
            "[cluster]",
            f"node_id = {node.id}",
            f'listen_address = "{host(node.id)}:{PORT}"',
            "initial_cluster = [",
            *rows,
            "]",
            'db_root_dir = "./db"',
            "founding_wait_ms = 100",
        ]
        for section, values in self._plan.settings.items():
            lines.append(f"[{section}]")
            lines += [f"{name} = {value!r}".replace("'", '"') for name, value in values.items()]
        if self._plan.secured:
            file = self._machines.directory(node.id) / "peer.secret"
            file.write_text(self._peer_secret, encoding="ascii")
            file.chmod(0o600)
            lines += ["[security]", f'peer_secret_file = "{file}"']
        node.serve.config.write_text("\n".join([*lines, ""]), encoding="utf-8")

    def wipe(self, node: Node) -> None:
        """Remove the data directory of a node that is down; it will join as another member."""
        assert not node.up, f"node {node.id} still runs"
        shutil.rmtree(node.serve.directory, ignore_errors=True)
        self.configure(node, joins=True)

    async def supervise(self) -> None:
        """Start what is wanted, note what ends; until cancelled."""
        sample_at = 0.0
        while True:
            now = time.monotonic()
            for node in self.all.values():
                self._look_at(node, now)
            if now >= sample_at:
                sample_at = now + SAMPLE_S
                for node in self.all.values():
                    if node.up:
                        node.sample()
            await asyncio.sleep(LOOK_S)

    def _look_at(self, node: Node, now: float) -> None:
        if node.up:
            return
        if not node.noted:
            node.noted = True
            if node.wanted and not node.held:
                self._ended(node, now)
        if node.wanted and not node.held and now >= node.restart_at:
            node.serve.start()
            node.boots += 1
            node.noted = False

    def _ended(self, node: Node, now: float) -> None:
        code = node.serve.wait_exit()
        said = (node.serve.lines() or [""])[-1]
        text = f"node {node.id} ended by itself with {code}: {said}"
        self.exits.append(text)
        self._say(text)
        node.restart_at = now + RESTART_S
        node.failing += 1
        if not node.explains(code):
            self.problems.append(f"no fault explains that {text}")
        if node.failing > RESTARTS_MAX:
            self.problems.append(f"node {node.id} ended {node.failing} times in a row: {said}")
            node.wanted = False

    def asked_to_end(self, node: Node) -> None:
        """A node has ended after SIGTERM: that has to be with 0."""
        node.noted = True
        code = node.serve.wait_exit()
        if (
            code != 0
            and not (code == -signal.SIGKILL and node.held > 1)
            and not node.explains(code)
        ):
            said = (node.serve.lines() or [""])[-1]
            self.problems.append(f"node {node.id} ended with {code} when asked to: {said}")

    # --- What they say.

    async def statuses(self) -> dict[int, dict[str, Any]]:
        """GET /v1/status of all that answer."""
        asked = [node.id for node in self.wanted() if node.up]
        calls = [call(node_id, "GET", "/v1/status", timeout_s=1.0) for node_id in asked]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        found = {}
        for node_id, answer in zip(asked, answers, strict=True):
            if isinstance(answer, dict):
                found[node_id] = answer
            elif not isinstance(answer, Unanswered):
                raise answer
        return found

    async def leader(self) -> int | None:
        """The node that leads in the newest term that anybody knows of."""
        leading = [
            (status["term"], node_id)
            for node_id, status in (await self.statuses()).items()
            if status["role"] == "leader"
        ]
        return max(leading)[1] if leading else None

    async def one_leader(self) -> bool:
        """Do all nodes that should run name the same leader, which agrees?"""
        statuses = await self.statuses()
        named = {(status["leader"] or {}).get("id") for status in statuses.values()}
        leading = {i for i, status in statuses.items() if status["role"] == "leader"}
        return len(statuses) == len(self.wanted()) and len(leading) == 1 and named == leading

    async def whole(self) -> bool:
        """Is every node up and ready, and does everybody vote who should?"""
        leader = await self.leader()
        if leader is None or not await self.one_leader():
            return False
        try:
            view = await call(leader, "GET", "/v1/cluster", timeout_s=1.0)
            for node in self.wanted():
                await call(node.id, "GET", "/readyz", timeout_s=1.0)
                node.failing = 0
        except Unanswered:
            return False
        members = view["members"]
        voting = sorted(m["id"] for m in members if m["status"] == "active")
        caught_up = all(m["ready"] and (m["lag"] or 0) < 1000 for m in members)
        return (
            not view["joint"]
            and voting == sorted(self.voters)
            and len(members) == len(voting)
            and caught_up
        )

    async def level(self) -> bool:
        """Has everybody applied the same log to its end, and does no write wait?"""
        statuses = await self.statuses()
        ends = {(s["last_applied"], s["last_index"], s["revision"]) for s in statuses.values()}
        idle = all(status["pending_writes"] == 0 for status in statuses.values())
        return len(statuses) == len(self.wanted()) and len(ends) == 1 and idle

    async def wait(
        self, condition: Callable[[], Awaitable[bool]], what: str, deadline_s: float
    ) -> bool:
        """Until the condition holds; a problem of the run when it does not in time."""
        if await holds_within(condition, deadline_s):
            return True
        seen = {
            node_id: {name: status[name] for name in ("role", "term", "last_applied", "voters")}
            for node_id, status in (await self.statuses()).items()
        }
        self.problems.append(f"waited {deadline_s:.0f} s for {what}; last seen: {seen}")
        return False

    def complaints(self) -> list[str]:
        """What no log may hold, and who used more than a node needs."""
        found = []
        for node in self.all.values():
            output = node.serve.output()
            match = COMPLAINTS.search(output)
            if match is not None:
                around = output[match.start() : match.start() + 3000]
                found.append(f"node {node.id} printed a traceback:\n{around}")
            if node.memory_bytes > MEMORY_MAX_BYTES:
                found.append(f"node {node.id} used {node.memory_bytes} bytes of memory")
            if node.descriptors > DESCRIPTORS_MAX:
                found.append(f"node {node.id} had {node.descriptors} files open")
        return found


async def holds_within(condition: Callable[[], Awaitable[bool]], deadline_s: float) -> bool:
    """Ask until the condition holds; False when it does not in time."""
    end = time.monotonic() + deadline_s
    while not await condition():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.1)
    return True
