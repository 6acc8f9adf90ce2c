"""A fault that did nothing does not count as one, and every end of a process is in the book.

The nodes here are bare processes (`sleep`, `sh`) in the place of `dengine serve`: what is tested is
what the nemesis makes of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import wait_for
from tests.crash_sweep.strace import Strace, wait_gone
from tests.nemesis import on_disks, trial
from tests.nemesis.by_operators import JOIN
from tests.nemesis.faults import Band, Faults
from tests.nemesis.links import Link, Links
from tests.nemesis.machines import (
    NODES,
    Machines,
    own_tag,
    packets_dropped,
    put_away,
    uninterrupted,
)
from tests.nemesis.nodes import Node, Nodes, holds_within
from tests.nemesis.on_disks import begun_anew, threads_of
from tests.nemesis.on_processes import free_descriptors, is_stopped
from tests.nemesis.outcome import BROKEN_OFF, OK, Outcome
from tests.nemesis.plan import KINDS, Action, Plan
from tests.nemesis.run import missing
from tests.nemesis.workload import Workload

REASON = missing()
needs_root = pytest.mark.skipif(bool(REASON), reason=REASON)
FOREVER_RUNNING = ("sleep", "600")


def plan_of(shape: str) -> Plan:
    """With nothing that needs the right to mount."""
    plans = (Plan(seed, 5.0) for seed in range(999))
    return next(plan for plan in plans if plan.shape == shape and not plan.small)


@contextlib.contextmanager
def faults_of(tmp_path: Path, shape: str = "3") -> Iterator[Faults]:
    """A cluster that nobody has started, and its nemesis."""
    plan, said = plan_of(shape), list[str]()
    machines = Machines([*plan.ids, *plan.spares], tmp_path, proxied=False)
    for node_id in machines.ids:
        machines.directory(node_id).mkdir()
    nodes = Nodes(plan, machines, said.append)
    workload = Workload(plan, lambda: [], lambda node_id: 0, lambda node_id: False)
    faults = Faults(machines, nodes, None, workload, said.append, trial.HOW)
    for node_id in plan.founders:
        nodes.all[node_id].wanted = True
    try:
        yield faults
    finally:
        nodes.end_all()


def run_as(node: Node, *command: str) -> subprocess.Popen[bytes]:
    """A process in the place of the node's."""
    node.serve.process = subprocess.Popen(command)
    node.book.begin(time.monotonic())
    return node.serve.process


def carry_out(faults: Faults, name: str, whom: str = "any", seconds: float = 0.05) -> None:
    asyncio.run(faults.carry_out([Action(name, whom, seconds, 1.0, 0)]))


def test_every_kind_of_fault_is_carried_out_by_something() -> None:
    assert trial.HOW.keys() == KINDS.keys()


def test_a_kill_counts_when_it_ended_a_process(tmp_path: Path) -> None:
    with faults_of(tmp_path) as faults:
        carry_out(faults, "kill", "all")
        assert (faults.drawn["kill"], faults.effective["kill"]) == (1, 0)
        for node in faults.nodes.wanted():
            run_as(node, *FOREVER_RUNNING)
        carry_out(faults, "kill", "minority")
        assert (faults.drawn["kill"], faults.effective["kill"]) == (2, 1)
        down = [node for node in faults.nodes.wanted() if not node.up]
        assert len(down) == 1
        assert down[0].book.findings() == []
        assert down[0].book.lives[-1].code == -signal.SIGKILL


def test_a_pause_counts_when_a_process_stood_still(tmp_path: Path) -> None:
    with faults_of(tmp_path) as faults:
        carry_out(faults, "pause")
        assert (faults.drawn["pause"], faults.effective["pause"]) == (1, 0)
        processes = [run_as(node, *FOREVER_RUNNING) for node in faults.nodes.wanted()]
        carry_out(faults, "pause", "all")
        assert (faults.drawn["pause"], faults.effective["pause"]) == (2, 1)
        wait_for(lambda: not any(is_stopped(p.pid) for p in processes), "all to go on")


def test_a_restart_of_a_node_that_does_not_answer_does_not_count(tmp_path: Path) -> None:
    with faults_of(tmp_path) as faults:
        carry_out(faults, "restart")
        assert (faults.drawn["restart"], faults.effective["restart"]) == (1, 0)


def test_a_run_in_which_no_fault_had_an_effect_is_no_pass(tmp_path: Path) -> None:
    """That nodes grow is no harm to them."""
    with faults_of(tmp_path) as faults:
        carry_out(faults, "kill", "all")
        faults.bands.append(Band(JOIN, "[2, 3]", 0.0, 1.0, effective=True))
        outcome = Outcome(plan_of("3"), tmp_path)
        outcome.tell_of(faults, 0.0)
        assert (outcome.drawn, outcome.effective) == ({"kill": 1}, {JOIN: 1})
        assert outcome.verdict == BROKEN_OFF
        run_as(faults.nodes.all[1], *FOREVER_RUNNING)
        carry_out(faults, "kill", "all")
        outcome = Outcome(plan_of("3"), tmp_path)
        outcome.tell_of(faults, 0.0)
        assert outcome.verdict == OK


def test_a_failing_disk_that_nobody_wrote_to_does_not_count(tmp_path: Path) -> None:
    """strace waits for a write, and none comes; or there is no process to attach to."""
    with faults_of(tmp_path) as faults:
        carry_out(faults, "EIO")
        assert (faults.drawn["EIO"], faults.effective["EIO"]) == (1, 0)


WRITER = """
import os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
while True:
    try:
        os.pwrite(fd, b"entry", 0)
    except OSError:
        if sys.argv[2] == "ends":
            sys.exit(74)
    time.sleep(0.01)
"""


def failed_write(faults: Faults, does: str) -> Node:
    """A node that writes its log, and what it does after an error."""
    node = faults.nodes.all[1]
    for other in faults.nodes.wanted():
        other.wanted = other is node
    log = node.serve.directory / "log" / "data.mdb"
    log.parent.mkdir(parents=True)
    run_as(node, sys.executable, "-c", WRITER, str(log), does)
    wait_for(lambda: log.exists() and log.stat().st_size, "the first write")
    carry_out(faults, "EIO", seconds=5.0)
    return node


@needs_root
def test_a_node_that_ends_after_a_failed_write_is_right(tmp_path: Path) -> None:
    """The fault counts, and the end is explained by it."""
    with faults_of(tmp_path) as faults:
        node = failed_write(faults, "ends")
        wait_for(lambda: node.notice() or not node.book.running, "the end to be noted")
        assert faults.effective["EIO"] == 1
        assert node.book.lives[0].code == 74
        assert node.book.findings() == []


@needs_root
def test_a_node_that_goes_on_after_a_failed_write_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a failed write has left behind nobody knows: going on is worse than ending."""
    monkeypatch.setattr(on_disks, "FAIL_STOP_S", 0.5)
    with faults_of(tmp_path) as faults:
        node = failed_write(faults, "goes on")
        assert faults.effective["EIO"] == 1
        assert node.book.findings() == [
            "process 1 of node 1 has to end with 74 (EIO under its log), and goes on"
        ]


@needs_root
def test_a_write_that_strace_waited_for_in_vain_does_not_count(tmp_path: Path) -> None:
    """Nor is anything left of strace afterwards."""
    with faults_of(tmp_path) as faults:
        node = faults.nodes.all[1]
        for other in faults.nodes.wanted():
            other.wanted = other is node
        process = run_as(node, *FOREVER_RUNNING)
        carry_out(faults, "EIO", seconds=0.5)
        assert (faults.drawn["EIO"], faults.effective["EIO"]) == (1, 0)
        assert len(faults.bands) == 1
        assert "TracerPid:\t0" in Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        assert node.book.findings() == []


@pytest.mark.parametrize("gone", [False, True])
def test_strace_that_cannot_be_attached_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    """Unless the process has ended meanwhile: else no disk would ever fail, and all would pass."""

    def attach(self: Strace, pid: int) -> None:
        if gone:
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        raise AssertionError("no permission")

    monkeypatch.setattr(Strace, "attach", attach)
    with faults_of(tmp_path) as faults:
        node = faults.nodes.all[1]
        for other in faults.nodes.wanted():
            other.wanted = other is node
        process = run_as(node, *FOREVER_RUNNING)
        carry_out(faults, "slow sync")
        said = f"strace could not be attached to process {process.pid}: no permission"
        assert faults.nodes.problems == ([] if gone else [said])


def test_what_strace_has_started_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was left behind with the pipe whose end was waited for, and the run never ended."""
    started = tmp_path / "started"
    stand_in = tmp_path / "strace"
    stand_in.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {started}\nexec sleep 600\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    gone = subprocess.Popen(["true"])
    gone.wait()
    strace = Strace(tmp_path / "log", [], children=True)
    strace.attach(gone.pid)
    wait_for(lambda: started.exists() and started.read_text().endswith("\n"), "it to start one")
    strace.detach(gone.pid)
    wait_gone(int(started.read_text()))


def test_what_needs_more_voters_than_there_are_is_drawn_and_does_nothing(tmp_path: Path) -> None:
    """One node alone is never damaged, also not where the plan would: it grows later."""
    with faults_of(tmp_path, "1->3") as faults:
        run_as(faults.nodes.all[1], *FOREVER_RUNNING)

        async def whole() -> bool:
            return True

        faults.nodes.whole = whole  # type: ignore[method-assign]
        parts = ("log", "state", "snapshot")
        kinds = [f"{what} in {part}" for what in ("flip", "cut short") for part in parts]
        for name in (*kinds, "wipe and join"):
            carry_out(faults, name)
            assert (faults.drawn[name], faults.effective[name]) == (1, 0)
        assert faults.nodes.all[1].up
        assert faults.bands == []
        assert not faults.counts


def test_an_effect_that_comes_late_counts_in_the_end(tmp_path: Path) -> None:
    """A flipped bit is met when somebody reads it."""
    with faults_of(tmp_path) as faults:
        met = [False]
        faults.bands.append(Band("flip in log", "node 1", 0.0, 1.0, noticed=lambda: met[0]))
        faults.look_back()
        assert faults.effective == {}
        met[0] = True
        faults.look_back()
        assert faults.effective == {"flip in log": 1}


def test_a_damaged_log_is_repaired_when_another_incarnation_began(tmp_path: Path) -> None:
    """Until then the node may end of it at any time, and afterwards it may not."""
    with faults_of(tmp_path) as faults:
        node = faults.nodes.all[1]
        node.serve.directory.mkdir(parents=True)
        identity = node.serve.directory / "identity.json"
        identity.write_text('{"incarnation": "00000000000000aa"}', encoding="utf-8")
        repaired = begun_anew(node, "flip in log")
        assert not repaired()
        assert node.damaged_now()
        identity.unlink()
        assert not repaired()
        identity.write_text('{"incarnation": "00000000000000bb"}', encoding="utf-8")
        assert repaired()
        assert all(reason.until < time.monotonic() for reason in node.book.reasons)


@pytest.mark.parametrize(
    ("code", "given_up", "finding"),
    [(75, False, True), (74, False, True), (65, True, True), (70, True, True), (0, False, True)],
)
def test_an_end_that_no_fault_explains(
    tmp_path: Path, code: int, given_up: bool, finding: bool
) -> None:
    """After some of them the unit starts a node no more; each is a finding."""
    with faults_of(tmp_path) as faults:
        node = faults.nodes.all[1]
        node.held = 1  # nothing is started here
        run_as(node, "sh", "-c", f"exit {code}")
        wait_for(lambda: not node.up, "it to end")
        faults.nodes._look_at(node, time.monotonic())
        assert node.given_up is given_up
        assert bool(node.book.findings()) is finding
        assert len(faults.nodes.exits) == 1
        faults.nodes._look_at(node, time.monotonic())
        assert len(faults.nodes.exits) == 1, "it is noted once"


def test_after_65_that_a_fault_explains_a_person_removes_the_directory(tmp_path: Path) -> None:
    """As the message tells; the node joins anew, and is damaged no more."""
    with faults_of(tmp_path) as faults:
        node = faults.nodes.all[1]
        node.held = 1
        node.serve.directory.mkdir(parents=True)
        faults.budget.spoil(1, lambda: False)
        with node.excuse((65, 74), "flip in log"):
            run_as(node, "sh", "-c", "exit 65")
            wait_for(lambda: not node.up, "it to end")
            faults.nodes._look_at(node, time.monotonic())
        assert not node.given_up
        assert not node.serve.directory.exists()
        assert "role = 3" in node.serve.config.read_text(encoding="utf-8")
        assert faults.budget.damaged() == set()
        assert node.book.findings() == []


def test_a_reign_is_one_term_and_one_leader_that_all_name(tmp_path: Path) -> None:
    """Who has heard of a later term, or of no leader, may be right."""
    with faults_of(tmp_path) as faults:

        def reign(*named: tuple[int, int | None]) -> tuple[int, int] | None:
            async def statuses() -> dict[int, dict[str, object]]:
                return {
                    number: {"term": term, "leader": None if leader is None else {"id": leader}}
                    for number, (term, leader) in enumerate(named, 1)
                }

            faults.nodes.statuses = statuses  # type: ignore[method-assign]
            return asyncio.run(faults.nodes.reign())

        assert reign((5, 1), (5, 1), (5, 1)) == (5, 1)
        assert reign((5, 1), (5, None)) is None
        assert reign((5, 1), (6, 1)) is None
        assert reign((5, None), (5, None)) is None
        assert reign() is None


def test_the_end_of_a_run_ends_every_process(tmp_path: Path) -> None:
    """Also one that is stopped, and nothing is started any more."""
    with faults_of(tmp_path) as faults:
        nodes = faults.nodes.wanted()
        for node in nodes:
            run_as(node, *FOREVER_RUNNING)
        nodes[0].serve.signal(signal.SIGSTOP)
        faults.nodes.end_all()
        assert not any(node.up for node in nodes)
        assert faults.nodes.complaints() == faults.nodes.problems == []


def test_free_descriptors_are_those_below_the_limit() -> None:
    """One with a number above the limit takes no place below it."""
    assert free_descriptors([0, 1, 2], 5) == 2
    assert free_descriptors([0, 1, 2, 70], 4) == 1
    assert free_descriptors(range(5), 5) == 0


def test_threads_of_a_process_are_told_from_those_of_others() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        assert {os.getpid(), thread.native_id} <= set(threads_of(os.getpid()))
    finally:
        release.set()
        thread.join()
    assert threads_of(2**22 + 1) == []


LISTED = """
table inet nemesis {
        chain input {
                type filter hook input priority filter; policy accept;
                ip saddr @cut counter packets 37 bytes 2310 drop
        }
}
"""


def test_dropped_packets_are_read_from_the_counter() -> None:
    assert packets_dropped(LISTED) == 37
    with pytest.raises(AssertionError, match="no counter"):
        packets_dropped("table inet nemesis { }")


async def _carried(link: Link, change: str) -> tuple[int, bytes]:
    """What comes out of a link that one chunk went into, and how many it has held up."""
    near, far = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=near)
    far_reader, far_writer = await asyncio.open_connection(sock=far)
    links = Links(Machines([1, 2], Path("/nowhere"), proxied=True), random.Random(1))
    source = asyncio.StreamReader()
    carrying = asyncio.create_task(links._carry(source, writer, link))
    try:
        if change == "delay":
            link.delay_ms = 20.0
        elif change == "narrow":
            link.bytes_per_s = 1000.0
        elif change == "stuck":
            link.open.clear()
        source.feed_data(b"append")
        if change == "stuck":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await far_reader.read(6)
            link.open.set()
        async with asyncio.timeout(10):
            return link.touched, await far_reader.readexactly(6)
    finally:
        source.feed_eof()
        await carrying
        for end in (writer, far_writer):
            end.close()
            await end.wait_closed()
        assert reader is not None


@pytest.mark.parametrize("change", ["delay", "narrow", "stuck"])
def test_a_link_counts_what_a_fault_has_held_up(change: str) -> None:
    """And a fault on a link that carried nothing has none to show."""

    async def touched() -> tuple[int, bytes]:
        link = Link()
        before, arrived = await _carried(link, "")
        assert (before, arrived) == (0, b"append")
        await _carried(link, change)
        return link.touched, arrived

    count, _ = asyncio.run(touched())
    assert count == 1


@pytest.mark.parametrize("name", ["slow links", "narrow links", "stuck links"])
def test_links_are_well_again_when_their_fault_is_over(tmp_path: Path, name: str) -> None:
    """All of them were hit meanwhile; without anything to carry that has no effect."""
    with faults_of(tmp_path) as faults:
        faults.links = Links(faults.machines, random.Random(1))
        every = [faults.links.between(i, j) for i in (1, 2, 3) for j in (1, 2, 3) if i != j]

        async def hit() -> bool:
            return all(link.faulty for link in every)

        async def come_and_go() -> bool:
            fault = asyncio.create_task(faults.carry_out([Action(name, "all", 0.5, 5.0, 0)]))
            were_hit = await holds_within(hit, 10.0)
            await fault
            return were_hit

        assert asyncio.run(come_and_go())
        assert not any(link.faulty for link in every)
        assert (faults.drawn[name], faults.effective[name]) == (1, 0)


def test_nobody_stops_the_cleaning_up_half_way() -> None:
    """An interrupt that comes meanwhile is there when it is done."""
    done = []

    def clean_up() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)  # to this thread: there may be others
            done.append("all")
        time.sleep(5)  # the signal comes first

    with pytest.raises(KeyboardInterrupt):
        clean_up()
    assert done == ["all"]


def test_what_nodes_have_written_is_kept_under_a_name_that_nothing_removes(tmp_path: Path) -> None:
    """And images of disks are not. A second run in the same folder has another name."""
    for number in range(2):
        work = tmp_path / own_tag()
        work.mkdir()
        (work / "n1.log").write_text(f"run {number}", encoding="utf-8")
        (work / f"{own_tag()}-disk").write_bytes(bytes(100))
        put_away(work)
    assert not (tmp_path / own_tag()).exists()
    assert (tmp_path / NODES / "n1.log").read_text(encoding="utf-8") == "run 0"
    assert (tmp_path / f"{NODES}-2" / "n1.log").read_text(encoding="utf-8") == "run 1"
    assert not list(tmp_path.glob("*/*-disk"))
