"""The runner of long simulations: one seed that goes wrong ends nothing but itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster import wait_for
from tests.linearizability.checker import Operation
from tests.reporting import STOPPED
from tests.simulation.run import draw
from tests.simulation.shrinking import shrink, write_trace
from tests.simulation.violation import NotLinearizable
from tests.simulation.workers import each

ROOT = Path(__file__).resolve().parents[2]


# Whoever tests with several processes has threads, and the workers are forked; what they do then is
# told by Python 3.12 and later. None of them uses what another thread could hold.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@forks
def test_a_seed_that_ends_its_process_is_told_and_the_others_go_on() -> None:
    def job(seed: int) -> tuple[int, int]:
        if seed == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return seed, 0

    found = each(iter(range(6)), job, lambda seed, code: (seed, code), 2)
    assert sorted(found) == [(0, 0), (1, 0), (2, -signal.SIGKILL), (3, 0), (4, 0), (5, 0)]


@forks
def test_nobody_works_on_when_nobody_asks_any_more() -> None:
    results = each(iter(range(1000)), lambda seed: os.getpid(), lambda seed, code: 0, 2)
    workers = {next(results) for _ in range(10)}
    results.close()  # type: ignore[attr-defined]
    assert workers
    assert not any(psutil.pid_exists(pid) for pid in workers)


def test_shrinking_is_repeated_until_no_fault_can_be_left_out() -> None:
    """Here `first` can go only when `second` has gone, and `third` is what it takes."""

    def fails(without: tuple[str, ...]) -> str | None:
        if "third" in without or ("first" in without and "second" not in without):
            return None
        return "it fails"

    faults = ("first", "second", "third")
    assert set(shrink(faults, fails, say=lambda text: None)) == {"first", "second"}


def test_another_failure_is_not_the_one_that_is_shrunk() -> None:
    def fails(without: tuple[str, ...]) -> str:
        return "another one" if without else "the first one"

    assert shrink(("loss", "tail"), fails, say=lambda text: None) == ()


def test_a_trace_ends_with_the_verdict(tmp_path: Path) -> None:
    def run(tell) -> str:  # type: ignore[no-untyped-def]
        tell("something happened")
        return "it holds"

    write_trace(tmp_path / "build" / "trace.txt", run)
    text = (tmp_path / "build" / "trace.txt").read_text(encoding="utf-8")
    assert text == "something happened\nit holds\n"


def test_a_contradiction_is_drawn_as_the_fewest_operations(tmp_path: Path) -> None:
    history = [
        Operation(1, 0, 1, "write", b"a", 1),
        Operation(2, 2, 3, "read", None, (1, b"a")),
        Operation(1, 4, 5, "write", b"b", 2),
        Operation(2, 6, 7, "read", None, (2, b"b")),
        Operation(3, 8, 9, "read", None, (1, b"a")),
    ]
    violation = NotLinearizable(b"k0", history, history)
    path = tmp_path / "seed.svg"
    text = draw(violation, path, "seed 1")
    assert 2 <= len(violation.shortest()) < len(history)
    assert str(path) in text
    picture = path.read_text(encoding="utf-8")
    assert picture.startswith("<svg")
    assert "client 3" in picture


def test_control_c_ends_it_at_once_with_the_totals() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.simulation.run", "--seeds", "0", "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        children = psutil.Process(process.pid).children
        wait_for(lambda: bool(children()), "workers", 60)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == STOPPED, errors
    sums = json.loads(output)
    assert sums["stopped"]
    assert not sums["failed"]
    assert "simulated hours" in errors
