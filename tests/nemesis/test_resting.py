"""What a node may hold on to when nothing happens, and when that is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nemesis import resting
from tests.nemesis.resting import GROWTH_BYTES, STILL_LOOKS, Still, Usage, leaks

FRESH = Usage(60_000_000, 20, 6)
MB = 1_000_000


def judged(rest: Usage, *, stored: int = 5 * MB, members: int = 3) -> str:
    return "\n".join(leaks(2, FRESH, rest, stored, members))


def test_what_a_working_node_keeps_is_no_leak() -> None:
    """Allocators, a thread pool that was needed once, and streams to its peers."""
    assert judged(FRESH) == ""
    assert judged(Usage(FRESH.memory_bytes + 20 * MB, 28, 10)) == ""


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        (FRESH._replace(memory_bytes=200 * MB), "bytes of memory"),
        (FRESH._replace(descriptors=60), "60 descriptors"),
        (FRESH._replace(threads=60), "60 threads"),
        (FRESH._replace(children=1), "1 children"),
    ],
)
def test_every_leak_is_found(rest: Usage, said: str) -> None:
    """Memory, descriptors, threads and subprocesses, each for itself."""
    assert said in judged(rest)
    assert len(judged(rest).splitlines()) == 1


def test_the_bound_of_memory_grows_with_what_is_stored() -> None:
    """The same figure is a leak beside a small state, and none beside a large one."""
    rest = FRESH._replace(memory_bytes=FRESH.memory_bytes + GROWTH_BYTES + 50 * MB)
    assert "leaks" in judged(rest, stored=5 * MB)
    assert judged(rest, stored=60 * MB) == ""


def test_the_bound_of_descriptors_grows_with_the_members() -> None:
    rest = FRESH._replace(descriptors=34)
    assert "leaks" in judged(rest, members=1)
    assert judged(rest, members=5) == ""


def test_too_much_under_load_is_found_as_well() -> None:
    assert resting.too_much(1, Usage(400 * MB, 100, 10)) == []
    assert "memory" in resting.too_much(1, Usage(600 * MB, 100, 10))[0]
    assert "descriptors" in resting.too_much(1, Usage(400 * MB, 300, 10))[0]


def test_rest_is_a_while_without_change() -> None:
    still = Still()
    looks = [still.see("here", {1: FRESH}) for _ in range(STILL_LOOKS + 1)]
    assert looks == [False] * STILL_LOOKS + [True]


@pytest.mark.parametrize(
    "usage",
    [
        FRESH._replace(descriptors=21),
        FRESH._replace(threads=7),
        FRESH._replace(children=1),
        FRESH._replace(memory_bytes=FRESH.memory_bytes + GROWTH_BYTES),
    ],
)
def test_what_grows_at_rest_begins_it_anew(usage: Usage) -> None:
    """A leak that goes on without load never comes to rest, and so is found."""
    still = Still()
    for _ in range(STILL_LOOKS):
        still.see("here", {1: FRESH})
    assert not still.see("here", {1: usage})
    assert still.looks == 0
    assert "node 1" in still.changed


def test_a_log_that_goes_on_is_no_rest() -> None:
    still = Still()
    assert not any(still.see(number, {1: FRESH}) for number in range(3 * STILL_LOOKS))


def test_a_log_that_hears_of_the_time_rests_and_a_busy_one_does_not() -> None:
    """One entry a second says what time it is, and changes no key."""
    for each, rests in ((1, True), (resting.ENTRIES_MAX + 1, False)):
        still = Still()
        looks = [still.see("here", {1: FRESH}, each * n) for n in range(3 * STILL_LOOKS)]
        assert any(looks) is rests
    assert "log" in still.changed


def test_what_becomes_less_is_no_change() -> None:
    still = Still()
    usages = [FRESH._replace(descriptors=20 - n) for n in range(STILL_LOOKS + 1)]
    assert [still.see("here", {1: usage}) for usage in usages][-1]


def test_a_look_at_a_real_process() -> None:
    """This one: another file and another child show."""
    before = resting.look(os.getpid(), children=True)
    with open(os.devnull) as _, subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1) as p:
        after = resting.look(os.getpid(), children=True)
        p.kill()
    assert before is not None
    assert after is not None
    assert after.descriptors >= before.descriptors + 2
    assert after.children == before.children + 1
    assert after.memory_bytes > MB
    assert resting.look(2**22 + 1) is None


def test_what_is_stored_is_what_the_disk_gave_for_it(tmp_path: Path) -> None:
    for name in ("log", "state-3", "snapshots"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.mdb").write_bytes(b"x" * 100_000)
    (tmp_path / "snapshots" / "data.mdb").rename(tmp_path / "snapshots" / "snapshot-1-1.dsnap")
    assert 200_000 <= resting.stored_bytes(tmp_path) < 300_000
    with (tmp_path / "log" / "data.mdb").open("r+b") as file:
        file.truncate(10**9)  # a hole takes nothing
    assert resting.stored_bytes(tmp_path) < 300_000
