"""What a run makes in the system goes with it, however it ends, and nothing of another run does.

Without nodes: `sleep` has their place in the namespaces.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

from tests.cluster import wait_for
from tests.nemesis import disks, trial
from tests.nemesis.machines import NODES, PREFIX, left, own_tag, remove_orphans
from tests.nemesis.outcome import FAILED
from tests.nemesis.plan import Plan
from tests.nemesis.run import ROOT, missing

REASON = missing()
needs_root = pytest.mark.skipif(bool(REASON), reason=REASON)

# Makes two machines with a disk and a process each, says so, and waits for its end.
MAKER = """
import signal, subprocess, sys, time
from pathlib import Path
from tests.nemesis.machines import Machines, own_tag
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
with Machines([1, 2], Path(sys.argv[1]) / own_tag(), proxied=True) as machines:
    machines.keep = True
    machines.mount_disk(machines.work / "db", sys.argv[2], 8_000_000)
    for node_id in machines.ids:
        held = (machines.work / "db" / f"held-{node_id}").open("w")
        command = [*machines.prefix(node_id), "sleep", "600"]
        child = subprocess.Popen(command, stdout=held, start_new_session=True)
        comm, end = Path(f"/proc/{child.pid}/comm"), time.monotonic() + 30
        while comm.read_text() != "sleep\\n" and time.monotonic() < end:
            time.sleep(0.01)  # on its way into the namespace
    (machines.work / "n1.log").write_text("said")
    print("made", flush=True)
    time.sleep(600)
"""


def of(pid: int) -> list[str]:
    """What there is of the run with this process."""
    return left(lambda name: name.startswith(f"{PREFIX}{pid}-"))


def maker(work: Path, disk: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", MAKER, str(work), disk],
        cwd=ROOT,
        stdout=PIPE,
        stderr=PIPE,
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() != "made\n":
        said = process.communicate()[1]
        if "NoLoopDevice" in said:
            pytest.skip(said)
        raise AssertionError(said)
    return process


def ended(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """What it started holds its pipes too, and outlives it when it is killed: no end of file."""
    process.send_signal(number)
    process.wait(60)
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()


@needs_root
@pytest.mark.parametrize("disk", disks.KINDS)
def test_an_interrupted_maker_removes_all_of_it(tmp_path: Path, disk: str) -> None:
    """Namespaces, processes in them that it did not wait for, mounts and loop devices."""
    process = maker(tmp_path, disk)
    made = of(process.pid)
    assert sum(name.startswith("process ") for name in made) >= 2
    assert any("db" in name for name in made)
    ended(process, signal.SIGINT)
    assert of(process.pid) == []
    assert (tmp_path / NODES / "n1.log").read_text(encoding="utf-8") == "said"


@needs_root
@pytest.mark.parametrize("disk", disks.KINDS)
def test_what_a_killed_maker_left_is_removed_and_nothing_else(tmp_path: Path, disk: str) -> None:
    """By the next run, which leaves one that goes on beside it alone."""
    killed, beside = maker(tmp_path / "run-1", disk), maker(tmp_path / "run-2", disk)
    try:
        before = of(beside.pid)
        ended(killed, signal.SIGKILL)
        wait_for(lambda: of(killed.pid), "its machines to be there without it")
        removed = remove_orphans(tmp_path)
        assert any(f"{PREFIX}{killed.pid}-" in name for name in removed)
        assert of(killed.pid) == []
        assert of(beside.pid) == before
        assert (tmp_path / "run-1" / NODES / "n1.log").exists()
        assert not list((tmp_path / "run-1" / NODES).glob("*-disk"))
    finally:
        ended(beside, signal.SIGINT)
    assert of(beside.pid) == []


@needs_root
def test_a_run_that_breaks_off_says_why_and_removes_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was, it is a finding of the run, and never ends the report of the others."""
    monkeypatch.setenv("PATH", f"{_failing(tmp_path, 'nft')}:{os.environ['PATH']}")
    outcome = trial.run(Plan(1, 5.0), tmp_path, lambda text: None)
    assert outcome.verdict == FAILED
    assert "the run broke off" in outcome.problems[0]
    assert "nft" in outcome.problems[0]
    assert left(lambda name: name.startswith(own_tag())) == []


def _failing(directory: Path, name: str) -> Path:
    """A directory with a command of this name that always fails."""
    path = directory / "bin"
    path.mkdir()
    (path / name).write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    (path / name).chmod(0o755)
    return path
