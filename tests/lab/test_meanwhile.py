"""What dies while one voter becomes three: each time the end is verified and no write is lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster import ROOT, UNREACHABLE, wait_for
from tests.lab.conftest import one_voter
from tests.lab.machines import Machine
from tests.lab.site import Site, written
from tests.lab.test_refusals import reset

SEEDED_MB = 24
# A joiner always needs a snapshot, however soon it comes: the log is kept for a moment only. And it
# gets it at a pace that leaves time to do something.
SNAPSHOT = {"entries": 500, "retained_log_entries": 100, "max_bytes_per_s": 2_097_152}
CUT_S = 5
# Of each writer. At that pace a snapshot takes its time, and a run waits for several: what is
# written meanwhile must not make them much larger.
PER_SECOND = 25


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory, wheelhouse: Path) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("heavy")
    with one_voter("h", directory, wheelhouse, **{"raft.snapshot": SNAPSHOT}) as site:
        n1 = site.machines[1]
        seed = [sys.executable, "-m", "examples.ansible.seed", f"{n1.address}:{n1.port}"]
        seed += [str(site.state / "secrets.json"), str(SEEDED_MB)]
        subprocess.run(
            [str(ROOT / "scripts" / "lab"), "exec", *seed],
            cwd=ROOT,
            env=site.lab.environment,
            stdin=subprocess.DEVNULL,
            timeout=300,
            check=True,
        )
        yield site


def percent(n1: Machine) -> int:
    """How much of the snapshot the first joiner has; 0 while there is no transfer."""
    try:
        members = n1.json("/v1/cluster")["members"]
    except UNREACHABLE:
        return 0
    return max((m["transfer"]["percent"] for m in members if m.get("transfer")), default=0)


def kill_joiner(site: Site) -> None:
    n2 = site.machines[2]
    n2.run(f"kill -KILL {n2.pid}")


def kill_writer(site: Site) -> None:
    """The process that reads the snapshot at the leader, or takes it in at the joiner."""
    for i in (1, 2):
        site.machines[i].run("pkill -KILL -f '[d]engine.snapshot_writer' || true")


def cut_link(site: Site) -> None:
    site.lab.script("exec", "ip", "link", "set", "n2", "down")
    try:
        site.lab.script("exec", "sleep", str(CUT_S))
    finally:
        site.lab.script("exec", "ip", "link", "set", "n2", "up")


def kill_leader(site: Site) -> None:
    n1 = site.machines[1]
    n1.run(f"kill -KILL {n1.pid}")


@pytest.mark.parametrize("fault", [kill_joiner, kill_writer, cut_link, kill_leader])
def test_a_fault_in_the_midst_of_a_join(heavy: Site, fault: Callable[[Site], None]) -> None:
    """The run gets over it, or ends and the next one does. Writers try again on a 503; what was
    acknowledged is there. Node 1 stays the same process, unless it is the one that died."""
    reset(heavy)
    n1 = heavy.machines[1]
    pid = n1.pid
    load = heavy.load(patient=True, per_second=PER_SECOND)
    try:
        count = written(n1)
        wait_for(lambda: written(n1) > count + 100, "the clients to write", 60)
        with ThreadPoolExecutor(1) as hands:
            first = hands.submit(heavy.play, "expand")
            wait_for(lambda: percent(n1) > 0 or first.done(), "the joiner to get a snapshot", 400)
            assert not first.done(), first.result().output[-3000:]
            fault(heavy)
            run = first.result()
        if run.code:
            heavy.play("expand").ok()
        found = load.end()
    finally:
        load.close()
    heavy.play("verify").ok()
    assert (n1.pid == pid) == (fault is not kill_leader)
    if fault is not kill_leader:  # with node 1 ends the watch that the clients have on it
        assert found["voters"] == [[1], [1, 2, 3]]
    for key, value in found["last"].items():
        for machine in heavy.machines.values():
            assert machine.request("GET", f"/v1/kv/{key}").body.decode() == value
