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
from tests.lab.site import Site, losses, missing, written
from tests.lab.test_refusals import reset

SEEDED_MB = 24
# A joiner always needs a snapshot, however soon it comes: the log is kept for a moment only. And it
# gets it at a pace that leaves time to do something.
SNAPSHOT = {"entries": 500, "retained_log_entries": 100, "max_bytes_per_s": 2_097_152}
CUT_S = 5
WRITER_S = 100  # for a snapshot writer to be at work at the leader and at the joiner
PATIENCE_S = 60.0  # of a writer: a node that was killed is away for some seconds
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


def kill_process(machine: Machine) -> None:
    """kill -9 of the node; systemd makes another one."""
    pid = machine.pid
    assert pid, f"there is no node to be killed on {machine.name}"
    machine.run(f"kill -KILL {pid}")
    wait_for(lambda: machine.pid not in (0, pid), f"another process on {machine.name}", 60)


def kill_joiner(site: Site) -> None:
    kill_process(site.machines[2])


# Prints the process that it has killed, once that is gone. It may be there for a moment only.
KILL_WRITER = f"""
end=$((SECONDS + {WRITER_S}))
while [ $SECONDS -lt $end ]; do
    for pid in $(pgrep -f '[d]engine\\.snapshot_writer'); do
        kill -KILL $pid 2>/dev/null || continue
        while [ $SECONDS -lt $end ]; do
            [ -e /proc/$pid ] || {{ echo $pid; exit 0; }}
            sleep 0.02
        done
    done
    sleep 0.01
done
exit 1
"""


def kill_writer(site: Site) -> None:
    """The processes that make a snapshot at the leader and take one in at the joiner."""
    with ThreadPoolExecutor(2) as hands:
        killed = hands.map(lambda i: site.machines[i].run(KILL_WRITER), (1, 2))
        assert all(int(pid) > 1 for pid in killed)


def cut_link(site: Site) -> None:
    site.lab.script("exec", "ip", "link", "set", "n2", "down")
    try:
        site.lab.script("exec", "sleep", str(CUT_S))
        link = site.lab.script("exec", "ip", "-oneline", "link", "show", "n2")
        assert "state DOWN" in link, link
    finally:
        site.lab.script("exec", "ip", "link", "set", "n2", "up")


def kill_leader(site: Site) -> None:
    kill_process(site.machines[1])


# Whose connections a fault ends, and whether a node that lives may have to say that it does not
# know the outcome of a write, for it was cut off from the leader that it had passed it on to.
EXPLAINED = {
    kill_joiner: ({"n2"}, False),
    kill_writer: (set(), False),
    cut_link: ({"n2"}, True),
    kill_leader: ({"n1"}, True),
}


@pytest.mark.parametrize("fault", EXPLAINED)
def test_a_fault_in_the_midst_of_a_join(heavy: Site, fault: Callable[[Site], None]) -> None:
    """The run gets over it, or ends and the next one does. Writers try again on a 503, and
    elsewhere where the fault ended their connection: no other connection is lost, and no write
    fails for another reason. What was acknowledged is there. Node 1 stays the same process, unless
    it is the one that died."""
    reset(heavy)
    n1 = heavy.machines[1]
    pid = n1.pid
    load = heavy.load(patience_s=PATIENCE_S, per_second=PER_SECOND)
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
    print("retries:", found["retries"], "failures:", found["failures"])
    assert (n1.pid == pid) == (fault is not kill_leader)
    if fault is not kill_leader:  # with node 1 ends the watch that the clients have on it
        assert found["voters"] == [[1], [1, 2, 3]]
    cut_off, unknown = EXPLAINED[fault]
    assert set(losses(found)) <= cut_off
    if fault is kill_leader:
        assert losses(found), "nobody noticed that the only voter died"
    unexplained = [f for f in found["failures"] if not unknown or '"outcome":"unknown"' not in f]
    assert unexplained == []
    assert missing(found, heavy.machines.values()) == []
