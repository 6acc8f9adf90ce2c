"""What faults of disks do to files, and what they excuse."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import wait_for
from tests.nemesis import on_disks
from tests.nemesis.faults import Faults
from tests.nemesis.plan import Action
from tests.nemesis.test_faults import carry_out, faults_of, run_as


def test_a_node_may_take_its_time_to_end_of_a_disk_that_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not answer any more, and there may be room again before it is gone."""

    async def fill(faults: Faults, action: Action) -> None:
        pass

    monkeypatch.setattr(on_disks, "filled", lambda path, leave: contextlib.nullcontext())
    monkeypatch.setattr(on_disks, "fill", fill)
    with faults_of(tmp_path) as faults:
        faults.nodes._plan.small = 1
        node = faults.nodes.small
        run_as(node, "sh", "-c", "sleep 2; exit 74")
        carry_out(faults, "small disk")
        wait_for(lambda: node.notice() or not node.book.running, "the end to be noted")
        assert node.book.lives[0].code == 74
        assert node.book.findings() == []


def test_a_full_disk_has_room_in_time_though_clients_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the node there may be no majority, and so no answer while its disk is full."""
    room = asyncio.Event()

    @contextlib.contextmanager
    def filled(path: Path, leave_bytes: int) -> Iterator[None]:
        yield
        room.set()

    async def fill(faults: Faults, action: Action) -> None:
        await asyncio.wait_for(room.wait(), 30)

    monkeypatch.setattr(on_disks, "filled", filled)
    monkeypatch.setattr(on_disks, "fill", fill)
    with faults_of(tmp_path) as faults:
        faults.nodes._plan.small = 1
        run_as(faults.nodes.small, "true")
        carry_out(faults, "small disk")
        assert room.is_set()


@pytest.mark.parametrize(
    ("name", "amount", "counted"),
    [("flip in log", 2.0, "bits flipped"), ("cut short in log", 0.0, "files cut short")],
)
def test_a_spoilt_file_is_marked_until_it_is_repaired(
    tmp_path: Path, name: str, amount: float, counted: str
) -> None:
    """It has changed as the kind of the fault says."""
    with faults_of(tmp_path) as faults:
        node = faults.nodes.all[1]
        log = node.serve.directory / "log" / "data.mdb"
        log.parent.mkdir(parents=True)
        log.write_bytes(b"x" * 100)
        action = Action(name, "minority", 1.0, amount, 0)
        on_disks.damage(faults, node, "log", action, random.Random(1))
        after = log.read_bytes()
        assert after != b"x" * 100
        assert (len(after) < 100) == (counted == "files cut short")
        assert faults.counts == {counted: amount or 1}
        assert faults.budget.damaged() == {1}
