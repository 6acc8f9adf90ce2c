"""The nodes of a run and their supervisor, which is to them what systemd is elsewhere.

Only the supervisor starts nodes. A fault holds a node down or lets it go, and says in its book
which exit codes that explains; every other end of a process is a failure of the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster import ServeProcess
from tests.nemesis import resting
from tests.nemesis.client import Unanswered, call
from tests.nemesis.disks import NoLoopDevice
from tests.nemesis.lives import KILLED, Book, Life, closing
from tests.nemesis.machines import PORT, Machines, host
from tests.nemesis.plan import Plan
from tests.nemesis.resting import NOTHING, Usage

LOOK_S = 0.05
SAMPLE_S = 0.5
RESTART_S = 1.0  # after an end that nobody asked for
RESTARTS_MAX = 6  # in a row without having been ready, as the unit has it
READY_S = 60.0  # for a busy machine; a quiet one takes a second or two
SMALL_DISK_BYTES = 64_000_000  # while nothing fills it
NO_LOOP_DEVICE = "no loop device can be had here"
# After these a node stays down, as the unit has it: a person is needed, or it must not come back.
FINAL = (65, 70, 76, 78)
DAMAGED, STORAGE_IO, TRY_AGAIN = 65, 74, 75
COMPLAINTS = re.compile(
    r"^Traceback|Fatal Python error|was never (retrieved|awaited)", re.MULTILINE
)


@dataclass
class Node:
    """One node and what is expected of it."""

    serve: ServeProcess
    book: Book
    wanted: bool = False
    held: int = 0  # faults that keep it down
    failing: int = 0  # ends in a row
    restart_at: float = 0.0
    given_up: bool = False  # it has ended in a way after which nothing starts it again
    fresh: Usage | None = None  # of this process, when its cluster was whole for the first time
    peak: Usage = NOTHING  # of all its processes
    spoilt_at: int = -1  # how much it had said when its files were damaged last

    @property
    def id(self) -> int:
        return self.serve.node_id

    @property
    def up(self) -> bool:
        return self.serve.running

    @property
    def boots(self) -> int:
        return len(self.book.lives)

    def start(self) -> None:
        self.notice()
        self.serve.start()
        self.book.begin(time.monotonic())
        self.fresh = None

    def notice(self) -> Life | None:
        """The process that has ended since the last look, if one has; it is in the book then."""
        if self.book.running is None or self.up:
            return None
        code = self.serve.wait_exit()
        return self.book.end(code, time.monotonic(), (self.serve.lines() or [""])[-1])

    @contextlib.contextmanager
    def excuse(self, codes: tuple[int, ...], why: str, saying: str = "") -> Iterator[None]:
        """Within it, and a moment longer, its processes may end like this, `saying` so last."""
        reason = self.book.may_end(codes, why, time.monotonic(), saying=saying)
        with closing(reason, time.monotonic):
            yield

    @contextlib.contextmanager
    def down(self) -> Iterator[bool]:
        """kill -9, and nothing starts it within. False: there was no process to kill."""
        with self.kept_down():
            yield self.kill("kill -9")

    def kill(self, why: str) -> bool:
        """kill -9; False when there was no process, or it ended by itself a moment before."""
        life = self.book.running
        if life is None or not self.up:
            return False
        reason = self.book.may_end((KILLED,), why, time.monotonic(), life=life, asked=True)
        with closing(reason, time.monotonic):
            self.serve.kill()
            self.notice()
        return life.code == KILLED

    @contextlib.contextmanager
    def kept_down(self) -> Iterator[None]:
        """However it ends, nothing starts it within."""
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    def ask_to_end(self, deadline_s: float) -> Life | None:
        """SIGTERM: that has to be the end, with 0, in time. None: there was no process."""
        life, now = self.book.running, time.monotonic()
        if life is None or not self.up:
            return None
        self.book.may_end((0,), "SIGTERM", now, life=life, asked=True, owed_by=now + deadline_s)
        self.serve.signal(signal.SIGTERM)
        return life

    def sample(self) -> None:
        """Look at memory and descriptors of the process."""
        usage = resting.look(self.serve.pid)
        if usage is not None:
            self.peak = self.peak.most(usage)

    def damaged_now(self) -> bool:
        """May it answer that its disk or its data is bad?"""
        return bool(self.book.open_codes(time.monotonic()) & {DAMAGED, STORAGE_IO})

    def incarnation(self) -> str:
        """Of its data directory; "" when there is none."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            file = self.serve.directory / "identity.json"
            return str(json.loads(file.read_text(encoding="utf-8"))["incarnation"])
        return ""


class Nodes:
    """The nodes of a plan on their machines.

    Attributes:
        problems: what no fault explains.
        spares: ids that were never used.
        exits: ends of processes that nobody asked for, as sentences, explained or not.
        wiped: told of a node whose directory was removed.
        watching: called a few times a second.
        lacking: what the plan asks for and this machine does not have.
    """

    def __init__(self, plan: Plan, machines: Machines, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._machines = machines
        self._say = say
        self.problems: list[str] = []
        self.exits: list[str] = []
        self.lacking: list[str] = []
        self.wiped: Callable[[int], None] = lambda node_id: None
        self.watching: Callable[[], object] = lambda: None
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
        serve = ServeProcess(
            node_id,
            PORT,
            config,
            cwd,
            self._machines.work / f"n{node_id}.log",
            host=host(node_id),
            prefix=self._machines.prefix(node_id),
        )
        node = Node(serve, Book(node_id))
        if node_id in self._plan.founders:
            self._configure(node, self._plan.founders, joins=False)
        else:
            self._configure(node, self._plan.ids, joins=True)
        return node

    def _give_disk(self, node_id: int, path: Path) -> None:
        try:
            self._machines.mount_disk(path, self._plan.disk, SMALL_DISK_BYTES)
        except NoLoopDevice as error:
            text = f"node {node_id} has a disk in memory: {NO_LOOP_DEVICE}: {error}"
            self.lacking.append(text)
            self._say(text)
            self._machines.mount_disk(path, "tmpfs", SMALL_DISK_BYTES)

    def will_join(self, node: Node) -> None:
        """Name the members of this moment in its file, as who operates it would: those that it was
        made with may all be gone."""
        self._configure(node, self.voters, joins=True)

    def _configure(self, node: Node, known: Collection[int], *, joins: bool) -> None:
        """Write the file of a founder, or of a node that joins with an empty directory."""
        rows = []
        for member in sorted({*known, node.id}):
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
        self.will_join(node)
        node.given_up = False
        self.wiped(node.id)

    async def supervise(self) -> None:
        """Start what is wanted, note what ends; until cancelled."""
        sample_at = 0.0
        while True:
            now = time.monotonic()
            for node in self.all.values():
                self._look_at(node, now)
            if now >= sample_at:
                sample_at = now + SAMPLE_S
                self.watching()
                for node in self.all.values():
                    if node.up:
                        node.sample()
            await asyncio.sleep(LOOK_S)

    def _look_at(self, node: Node, now: float) -> None:
        life = node.notice()
        if life is not None and not node.book.asked(life):
            self._ended(node, life)
        idle = not node.up and not node.held and not node.given_up
        if node.wanted and idle and now >= node.restart_at:
            node.start()

    def _ended(self, node: Node, life: Life) -> None:
        text = node.book.describe(life)
        self.exits.append(text)
        self._say(text)
        node.restart_at = life.ended + RESTART_S
        node.failing += 1
        if life.code == DAMAGED and node.book.explained(life):
            self._say(f"node {node.id} needs a person: its directory is removed, and it joins anew")
            self.wipe(node)
        elif life.code in FINAL:
            node.given_up = True
        if node.failing > RESTARTS_MAX:
            self.problems.append(f"node {node.id} ended {node.failing} times in a row: {life.said}")
            node.given_up = True

    def end_all(self) -> None:
        """kill -9 for every process that is left, whatever state it is in."""
        for node in self.all.values():
            node.held += 1
            try:
                node.kill("the run is over")
                node.notice()
            except (AssertionError, OSError) as error:
                self.problems.append(f"node {node.id} cannot be ended: {error}")

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

    async def reign(self) -> tuple[int, int] | None:
        """The term and the leader that all name who answer; None: they differ, or nobody leads."""
        statuses = (await self.statuses()).values()
        named = {(status["term"], (status["leader"] or {}).get("id")) for status in statuses}
        term, leader = named.pop() if len(named) == 1 else (0, None)
        return None if leader is None else (term, leader)

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
        found = (
            not view["joint"]
            and voting == sorted(self.voters)
            and len(members) == len(voting)
            and caught_up
        )
        for node in self.wanted() if found else ():
            if node.fresh is None:
                node.fresh = resting.look(node.serve.pid)
        return found

    async def voting(self) -> set[int]:
        """The voters as the leader says; nobody while there is none."""
        leader = await self.leader()
        with contextlib.suppress(Unanswered):
            if leader is not None:
                view = await call(leader, "GET", "/v1/cluster", timeout_s=1.0)
                return {m["id"] for m in view["members"] if m["status"] == "active"}
        return set()

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

    async def at_rest(self, deadline_s: float) -> dict[int, Usage]:
        """What every node holds on to when nothing has happened for a while; a problem of the run
        when that does not come in time.

        Few entries that only carry the time are no change: while anything can expire there is one
        every few seconds."""
        still, end = resting.Still(), time.monotonic() + deadline_s
        while True:
            statuses = await self.statuses()
            position = [
                (node_id, s["term"], s["revision"], s["pending_writes"])
                for node_id, s in sorted(statuses.items())
            ]
            entries = max((s["last_index"] for s in statuses.values()), default=0)
            await asyncio.sleep(resting.LOOK_S)  # and the connections of the question are gone
            looks = {node.id: resting.look(node.serve.pid, children=True) for node in self.wanted()}
            usages = {node_id: usage for node_id, usage in looks.items() if usage is not None}
            if len(position) == len(looks) == len(usages) and still.see(position, usages, entries):
                return usages
            if time.monotonic() > end:
                self.problems.append(
                    f"waited {deadline_s:.0f} s for the nodes to come to rest; what changed last: "
                    f"{still.changed}"
                )
                return usages

    def leaks(self, rest: dict[int, Usage]) -> list[str]:
        """What `at_rest` has found, against what is stored."""
        found = []
        for node_id, usage in rest.items():
            node = self.all[node_id]
            stored = resting.stored_bytes(node.serve.directory)
            fresh = node.fresh or usage
            found += resting.leaks(node_id, fresh, usage, stored, len(rest))
        return found

    def complaints(self) -> list[str]:
        """What no log may hold, ends that are wrong, and who used more than any load explains."""
        found = []
        for node in self.all.values():
            output = node.serve.output()
            match = COMPLAINTS.search(output)
            if match is not None:
                around = output[match.start() : match.start() + 3000]
                found.append(f"node {node.id} printed a traceback:\n{around}")
            found += node.book.findings()
            found += resting.too_much(node.id, node.peak)
        return found


async def holds_within(condition: Callable[[], Awaitable[bool]], deadline_s: float) -> bool:
    """Ask until the condition holds; False when it does not in time."""
    end = time.monotonic() + deadline_s
    while not await condition():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.1)
    return True
