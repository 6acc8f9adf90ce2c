"""Real processes under faults, as long as the budget allows: another part of the seeds with each
commit. And that the nemesis itself leaves nothing behind.

DENGINE_NEMESIS_SECONDS is the budget; `make nemesis` runs more. A failure prints its seed, how to
repeat it, and where its logs are.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import wait_for
from tests.nemesis import disks, report
from tests.nemesis.machines import NODES, PREFIX, Machines, own_tag, remove_orphans
from tests.nemesis.nodes import NO_LOOP_DEVICE, SMALL_DISK_BYTES
from tests.nemesis.plan import KINDS, SHAPES, WORKLOADS, Plan
from tests.nemesis.run import ROOT, missing, one
from tests.reporting import STOPPED
from tests.simulation.rotation import commit_number

BUDGET_S = float(os.environ.get("DENGINE_NEMESIS_SECONDS") or 180)
BEGIN_S = 120.0  # of a run on a busy machine; a quiet one takes three seconds
END_S = 120.0  # from a signal to the end of a run
SHOWS = {  # what there is of a workload that has done what it is for
    "ttl": ("puts with a TTL", "keys with a TTL found", "keys with a TTL gone"),
    "keyed": ("keyed increments", "repetitions"),
    "watch": ("changes watched", "watches resumed"),
    "lock": ("locks held", "writes guarded by the lock", "writes guarded by its token"),
}
SAMPLE_S = 20.0  # of faults in a run; with the beginning and the end it takes more than twice that

REASON = missing()
needs_root = pytest.mark.skipif(bool(REASON), reason=REASON)


@needs_root
@pytest.mark.timeout(0)
def test_nothing_is_lost_and_no_read_is_stale(tmp_path: Path) -> None:
    """Processes are killed and stopped, cables cut, disks fail and members come and go: what was
    acknowledged stays, every history is linearizable, and the cluster works again afterwards."""
    began, runs = time.monotonic(), []
    for seed in itertools.count(commit_number() % 10_000 * 1000):
        runs.append(one(Plan(seed, SAMPLE_S), tmp_path, quiet=True))
        print(report.as_text(runs))
        assert report.passed(runs), (
            f"seed {seed} fails; logs are in {runs[-1]['folder']}; repeat it with\n"
            f"  python -m tests.nemesis.run --seed {seed} --seconds {SAMPLE_S:.0f} --runs 20 --same"
        )
        spent_s = time.monotonic() - began
        if spent_s + spent_s / len(runs) > BUDGET_S:
            break  # one more would be too many
    assert report.write(runs, tmp_path / "report").exists()
    assert sum(run["acknowledged_writes"] for run in runs) > BUDGET_S, "hardly anything was written"
    done = report.summary(runs)["besides"]
    shown = {what for run in runs for name in run["workloads"] for what in SHOWS[name]}
    shown |= {"deletions", "linearizable lists"}
    assert shown <= done.keys(), f"some workload did nothing: {done}"


def test_a_plan_follows_from_its_seed() -> None:
    """A run can be repeated, and every kind of fault, shape and workload does come."""
    plans = [Plan(seed, 40.0) for seed in range(200)]
    assert [plan.describe() for plan in plans] == [Plan(s, 40.0).describe() for s in range(200)]
    assert {plan.shape for plan in plans} == set(SHAPES)
    done = {action.name for plan in plans for step in plan.steps for action in step.actions}
    assert done == set(KINDS)
    assert {plan.disk for plan in plans} == {"", *disks.KINDS}
    assert {name for plan in plans for name in plan.workloads} == set(WORKLOADS)
    assert min(len(plan.workloads) for plan in plans) == 2


@pytest.mark.parametrize("name", KINDS)
def test_a_plan_for_one_kind_has_a_shape_in_which_it_comes(name: str) -> None:
    assert all(Plan(seed, 20.0, [name]).steps for seed in range(50))


def test_faults_that_damage_come_alone() -> None:
    """More than a minority damaged at once is beyond what is promised."""
    for seed in range(200):
        for step in Plan(seed, 60.0).steps:
            alone = [action for action in step.actions if KINDS[action.name].alone]
            assert not alone or len(step.actions) == 1


def left_behind() -> list[str]:
    """What anything of the nemesis has in the system, by name; this process's own apart."""
    names = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True)
    mounts = Path("/proc/self/mounts").read_text(encoding="utf-8")
    loops = subprocess.run(["losetup", "--list"], check=True, capture_output=True, text=True)
    lines = (names.stdout + mounts + loops.stdout).splitlines()
    return [line for line in lines if PREFIX in line]


def command(into: Path, *options: str) -> list[str]:
    """What an operator runs, with a directory of its own."""
    return [sys.executable, "-m", "tests.nemesis.run", "--into", str(into), *options]


def child(work: Path, disk: str) -> subprocess.Popen[str]:
    """Another process with a run, once its nodes have begun to fall."""
    plans = (Plan(seed, 60.0, ["kill"]) for seed in itertools.count())
    seed = next(plan.seed for plan in plans if plan.disk == disk)
    options = ["--seed", str(seed), "--runs", "1", "--seconds", "60", "--only", "kill"]
    output = work / "child.log"
    with output.open("w") as stream:
        process = subprocess.Popen(
            command(work, *options), cwd=ROOT, stdout=stream, stderr=stream, text=True
        )
    wait_for(lambda: "kill: node" in output.read_text(), "the first fault of a run", BEGIN_S)
    lacking = [line for line in output.read_text().splitlines() if NO_LOOP_DEVICE in line]
    if lacking:
        process.send_signal(signal.SIGINT)
        process.wait(END_S)
        pytest.skip(lacking[0])
    return process


def mine(pid: int) -> list[str]:
    return [line for line in left_behind() if f"{PREFIX}{pid}-" in line]


def reported(directory: Path) -> list[dict[str, Any]]:
    """The runs in a report."""
    runs: list[dict[str, Any]] = json.loads((directory / "report.json").read_text())["runs"]
    return runs


@needs_root
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("disk", disks.KINDS)
def test_an_interrupted_run_removes_what_it_made(
    tmp_path: Path, disk: str, number: signal.Signals
) -> None:
    """Ctrl-C leaves no namespace, no mount, no loop device and no process. The logs are kept, and
    the report says that the run broke off."""
    process = child(tmp_path, disk)
    assert any("/db " in line for line in mine(process.pid)), "a disk of its own"
    nodes = processes_of(process.pid)
    process.send_signal(number)
    assert process.wait(END_S) == STOPPED
    assert mine(process.pid) == []
    assert nodes
    assert not any(Path(f"/proc/{pid}").exists() for pid in nodes)
    (run,) = reported(tmp_path)
    assert run["verdict"] == "broken off"
    assert list(Path(run["folder"]).glob(f"{NODES}/n*.log"))
    assert (Path(run["folder"]) / "run.log").stat().st_size


@needs_root
@pytest.mark.timeout(600)
@pytest.mark.parametrize("disk", disks.KINDS)
def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path, disk: str) -> None:
    """And nothing of a run that goes on beside it. What the killed one's nodes have written is
    kept."""
    other, process = child_directory(tmp_path, "other"), child_directory(tmp_path, "killed")
    beside, killed = child(other, disk), child(process, disk)
    killed.kill()
    killed.wait(10)
    assert mine(killed.pid)
    nodes = processes_of(killed.pid)
    try:
        removed = remove_orphans(process)
        assert any(f"{PREFIX}{killed.pid}-" in name for name in removed)
        assert mine(killed.pid) == []
        assert not any(Path(f"/proc/{pid}").exists() for pid in nodes)
        assert list(process.glob(f"run-*/{NODES}/n*.log"))
        assert mine(beside.pid), "the other run goes on"
    finally:
        beside.send_signal(signal.SIGINT)
        beside.wait(END_S)
    assert mine(beside.pid) == []


@needs_root
@pytest.mark.timeout(600)
def test_two_jobs_share_the_seeds_and_are_reported_together(tmp_path: Path) -> None:
    """Each has machines of its own with the same addresses. --json prints the sums and nothing
    else."""
    options = ["--seed", "5", "--runs", "3", "--jobs", "2", "--seconds", "3", "--json"]
    done = subprocess.run(
        command(tmp_path, *options, "--only", "kill,pause"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout) == report.summary(reported(tmp_path))
    assert [run["seed"] for run in reported(tmp_path)] == [5, 6, 7]
    assert {path.name for path in tmp_path.glob("job-*/run-*")} == {"run-5", "run-6", "run-7"}
    assert not [line for line in left_behind() if str(tmp_path) in line]


@needs_root
@pytest.mark.timeout(600)
def test_jobs_end_with_who_started_them(tmp_path: Path) -> None:
    """A signal to the one is passed on; each job removes what it made."""
    options = ["--seed", "5", "--minutes", "10", "--jobs", "2", "--only", "kill"]
    process = subprocess.Popen(command(tmp_path, *options), cwd=ROOT)
    logs = [tmp_path / f"job-{job}" / f"run-{seed}" / "run.log" for job, seed in ((1, 5), (2, 6))]
    wait_for(lambda: all("kill: node" in log.read_text() for log in logs), "both to begin", BEGIN_S)
    process.send_signal(signal.SIGTERM)
    assert process.wait(2 * END_S) == STOPPED
    assert [run["verdict"] for run in reported(tmp_path)] == ["broken off"] * 2
    assert not [line for line in left_behind() if str(tmp_path) in line]


@needs_root
def test_a_loop_device_that_was_never_mounted_is_detached(tmp_path: Path) -> None:
    """Its maker was killed between the two."""
    image = tmp_path / f"{PREFIX}1-0-disk"  # process 1 began at another time
    image.write_bytes(bytes(1_000_000))
    said = subprocess.run(
        ["losetup", "--find", "--show", str(image)], capture_output=True, text=True
    )
    if said.returncode:
        pytest.skip(f"{NO_LOOP_DEVICE}: {said.stderr}")
    remove_orphans()  # or that of a run beside this test
    wait_for(lambda: not any(image.name in line for line in left_behind()), "it to be gone")


WITHOUT_DEVICES = """
mkdir "$1/dev" && mount -t tmpfs none "$1/dev" && cp -a /dev/null /dev/urandom "$1/dev" &&
mount --bind "$1/dev" /dev && exec "$2" -c "$3" "$1"
"""
SHORT_RUN = """
import sys
from pathlib import Path
from tests.nemesis import report
from tests.nemesis.plan import Plan
from tests.nemesis.run import one
plans = map(lambda seed: Plan(seed, 1.0, ["pause"]), range(99))
print(report.as_text([one(next(p for p in plans if p.disk == "loop"), Path(sys.argv[1]))]))
"""


@needs_root
@pytest.mark.timeout(300)
def test_without_a_loop_device_a_run_says_so(tmp_path: Path) -> None:
    """The node has a disk in memory then; the run and its report say that, and why."""
    without_devices = ["unshare", "--mount", "sh", "-c", WITHOUT_DEVICES, "sh"]
    done = subprocess.run(
        [*without_devices, str(tmp_path), sys.executable, SHORT_RUN],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "1 runs, 0 failed" in done.stdout, done.stdout + done.stderr
    lacking = [line for line in done.stdout.splitlines() if NO_LOOP_DEVICE in line]
    assert len(lacking) == 2
    assert all("losetup" in line for line in lacking)


@needs_root
@pytest.mark.parametrize("disk", disks.KINDS)
def test_a_small_disk_is_filled_and_has_room_again(tmp_path: Path, disk: str) -> None:
    """What a fault leaves of a disk can be written, and not much more; afterwards all of it can."""
    with Machines([], tmp_path / own_tag(), proxied=False) as machines:
        path = machines.work / "db"
        try:
            machines.mount_disk(path, disk, SMALL_DISK_BYTES)
        except disks.NoLoopDevice as error:
            pytest.skip(f"{NO_LOOP_DEVICE}: {error}")
        with disks.filled(path, 50_000):
            (path / "fits").write_bytes(bytes(40_000))
            with pytest.raises(OSError, match="No space left"):
                (path / "does not").write_bytes(bytes(40_000))
        (path / "does").write_bytes(bytes(SMALL_DISK_BYTES // 2))
    assert not any(str(tmp_path) in line for line in left_behind())


def child_directory(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    path.mkdir()
    return path


def processes_of(pid: int) -> list[int]:
    """The processes in the namespaces of a run."""
    found = []
    for line in mine(pid):
        if line.startswith(PREFIX) and "tmpfs" not in line:
            said = subprocess.run(
                ["ip", "netns", "pids", line.split()[0]], capture_output=True, text=True
            )
            found += [int(text) for text in said.stdout.split()]
    return found
