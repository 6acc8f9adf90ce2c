"""site.yml and expand.yml on this machine, with clients beside them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import sys
import threading
from pathlib import Path

import pytest

from examples.ansible.load import Watch, Writer, request
from examples.ansible.run import stop_nodes
from tests.ansible.local import Kill, Local, Task, kill_points, local, read_tasks
from tests.ansible.server import run_module
from tests.cluster import wait_for

pytestmark = pytest.mark.timeout(1200)  # on a shared machine a run takes minutes
WRITERS = 4
PER_SECOND = 50


# Where a kill leaves the most: a stand-in on the port, files half there, one learner waiting.
KILLS = (
    "dengine.core.preflight : Measure the way to the other nodes",
    "dengine.core.node : Configuration",
    "dengine.core.rollout : Wait until it has everything, node 2",
)


@pytest.mark.playbooks
def test_one_node_becomes_three_under_four_writers_through_three_kills_of_the_run(
    site: Local,
) -> None:
    """The story of the appliance: site.yml gives one voter that serves, after `--check` has told
    exactly what it would change. expand.yml makes it three while four clients write to every node
    that is ready, and is killed with -9 three times on the way: no write fails, node 1 stays the
    same process, the membership is never two voters, the data is equal. One more run changes
    nothing, and no secret was ever shown. `make ansible-full` kills at every task."""
    predicted = site.play("site", "--check", "--diff").ok()
    assert not site.state.exists()
    assert site.node_pids() == []
    real = site.play("site", "-vvv", "--diff").ok()
    said = real.output
    assert real.changed == predicted.changed
    assert site.voters() == [1]
    first_pid = site.pid("n1")

    arguments = Arguments()
    arguments.start()
    clients = site.clients()
    watch = Watch(clients, site.endpoint("n1"))
    writers = [Writer(clients, f"w{i}", PER_SECOND) for i in range(WRITERS)]
    watch.start()
    for writer in writers:
        writer.start()
    wait_for(lambda: all(len(w.acknowledged) > 5 for w in writers), "writers to write")
    for name in KILLS:
        killed = site.play("expand", KILL_AT=name, KILL_AFTER_S="0.3")
        assert killed.code == -9, killed.output[-3000:]
        assert site.voters() == [1], name
        assert site.report()["verdict"].startswith("NOT known"), name
    said += site.play("expand", "-vvv", "--diff").ok().output
    through_all = [len(w.acknowledged) + 2 * len(site.hosts) for w in writers]
    wait_for(
        lambda: all(len(w.acknowledged) >= n for w, n in zip(writers, through_all, strict=True)),
        "writes through all three",
    )
    clients.stopping.set()
    for writer in writers:
        writer.join(20)

    assert [f for w in writers for f in w.failures] == []
    assert set(clients.ready) == set(site.endpoints)
    assert site.pid("n1") == first_pid
    assert watch.voters() == [(1,), (1, 2, 3)]
    view = site.get("n2", "/v1/cluster")
    assert not view["joint"]
    assert {m["id"]: m["zone"] for m in view["members"]} == {1: "az-a", 2: "az-b", 3: "az-c"}
    for writer in writers:
        key, value = max(writer.acknowledged.items())
        page = site.get("n3", f"/v1/kv?prefix={key}")
        assert [item["value"] for item in page["items"]] == [value]
    report = site.report()
    assert report["verdict"] == "Verified."
    assert "the same process throughout" in report["facts"]["node 1"]
    assert list((site.state / "backups").glob("backup-*.dsnap"))

    again = site.play("expand").ok()
    assert again.changed == {"n1": 0, "n2": 0, "n3": 0}
    assert site.pid("n1") == first_pid

    said += again.output
    arguments_seen = arguments.stop()
    assert any(b"ansible-playbook" in line for line in arguments_seen)
    assert any(line.startswith(b"/bin/sh\0-c\0") for line in arguments_seen), "nothing on a host"
    for name, secret in site.secrets.items():
        assert len(secret) >= 32
        assert secret not in said, f"{name} was shown"
        assert not [line for line in arguments_seen if secret.encode() in line], name
        # Everything that a run leaves: the hosts, the controller's own directory, remote ones.
        files = [p for p in site.directory.rglob("*") if p.is_file() and "db" not in p.parts]
        holders = [p for p in files if secret.encode() in p.read_bytes()]
        assert {stat.S_IMODE(p.stat().st_mode) for p in holders} == {0o600}
        assert {p.name for p in holders} == {"secrets.json", name}


@pytest.mark.playbooks
def test_check_mode_tells_what_a_run_from_nothing_changes(site: Local) -> None:
    """`--check --diff` on blank hosts writes nothing and predicts as many changes on each host as
    the real run from nothing to three then makes."""
    predicted = site.play("expand", "--check", "--diff").ok()
    assert not site.state.exists()
    assert site.play("expand").ok().changed == predicted.changed
    assert site.voters() == [1, 2, 3]


@pytest.mark.playbooks
def test_check_mode_tells_what_growing_changes(site: Local) -> None:
    """The same from one voter to three; the cluster stays what it is."""
    site.play("site").ok()
    predicted = site.play("expand", "--check", "--diff").ok()
    assert site.voters() == [1]
    assert "voters" in predicted.output
    real = site.play("expand").ok()
    # What becomes of a backup can only be told when there is one; all else is told exactly.
    role = "dengine.core.backup"
    assert real.changed_outside(role) == predicted.changed_outside(role)
    assert predicted.changed["n1"] > predicted.changed_outside(role)["n1"], "and that there is one"


@pytest.mark.playbooks
def test_addresses_of_ipv6_and_more_configuration(site: Local) -> None:
    """One voter on ::1, with settings in sections of its file that the role writes to as well."""
    for host in site.hosts:
        site.set_host(host, dengine_address="::1")
    site.set_group(
        dengine_config={"cluster": {"founding_wait_ms": 100}, "raft.snapshot": {"entries": 5000}},
    )
    site.play("site").ok()
    endpoint = f"[::1]:{site.port('n1')}"
    status, body = request(endpoint, "GET", "/v1/cluster", site.secrets["token"])
    assert status == 200
    assert {m["id"]: m["address"] for m in json.loads(body)["members"]} == {1: endpoint}
    text = (site.state / "hosts" / "n1" / "dengine.toml").read_text()
    assert text.count("[cluster]") == 1
    assert "founding_wait_ms = 100" in text
    assert "[raft.snapshot]\nentries = 5000\n" in text
    assert set(site.play("site").ok().changed.values()) == {0}


@pytest.mark.playbooks
def test_three_become_five(tmp_path: Path) -> None:
    """The inventory gets two more hosts, and expand.yml goes from three voters to five directly."""
    with local(tmp_path, 5) as site:
        site.set_group(dengine_shared_zones=True)
        site.play("expand", "-e", "dengine_target_voters=3").ok()
        assert site.voters() == [1, 2, 3]
        clients = site.clients()
        watch = Watch(clients, site.endpoint("n1"))
        watch.start()
        wait_for(lambda: watch.seen, "the watch to begin")
        site.play("expand").ok()
        clients.stopping.set()
        assert site.voters("n5") == [1, 2, 3, 4, 5]
        assert watch.voters() == [(1, 2, 3), (1, 2, 3, 4, 5)]
        assert set(site.play("expand").ok().changed.values()) == {0}


@pytest.mark.playbooks
@pytest.mark.parametrize("after", ["site", "expand -e dengine_target_voters=1"])
def test_a_learner_that_a_killed_run_left_is_not_made_the_second_voter(
    after: str, site: Local
) -> None:
    """expand.yml is killed with node 2 ready and node 3 not there. What asks for one voter leaves
    node 2 what it is; expand.yml then takes up where it was."""
    site.play("site").ok()
    name = "dengine.core.rollout : The cluster is well before the join of node 3"
    assert site.play("expand", KILL_AT=name).code == -9
    assert {m["id"]: m["status"] for m in site.get("n1", "/v1/cluster")["members"]} == {
        1: "active", 2: "promotable",
    }  # fmt: skip
    playbook, *arguments = after.split()
    assert set(site.play(playbook, *arguments).ok().changed.values()) == {0}
    assert site.voters() == [1]
    site.play("expand").ok()
    assert site.voters() == [1, 2, 3]


FOUNDING = (
    "dengine.core.node : Secrets",
    "dengine.core.node : Configuration",
    "dengine.core.rollout : Wait for a leader",
    "dengine.core.rollout : What it shows is sound",
    "dengine.core.rollout : Look at the processes once more",
    "dengine.core.rollout : Note that the cluster is at work here",
)


@pytest.mark.playbooks
def test_a_first_run_that_is_killed_is_simply_run_again(site: Local) -> None:
    """What it left is neither taken for a lost cluster nor for secrets that somebody else has."""
    for name in FOUNDING:
        assert site.play("site", KILL_AT=name).code == -9, name
    site.play("site").ok()
    assert site.voters() == [1]
    assert set(site.play("site").ok().changed.values()) == {0}


@pytest.mark.playbooks
def test_three_become_five_although_the_first_one_was_stopped(tmp_path: Path) -> None:
    """The backup comes from a follower that runs; node 1 is started again, 4 and 5 join."""
    with local(tmp_path, 5) as site:
        site.set_group(dengine_shared_zones=True)
        site.play("expand", "-e", "dengine_target_voters=3").ok()
        os.kill(site.pid("n1"), signal.SIGTERM)
        wait_for(lambda: len(site.node_pids()) == 2, "node 1 to stop")
        wait_for(lambda: site.get("n2", "/v1/cluster")["leader"], "another leader")
        site.play("expand").ok()
        assert site.voters() == [1, 2, 3, 4, 5]


def tasks_of(site: Local, playbook: str) -> list[Task]:
    """The tasks that a run starts, in order; the run is a real one."""
    file = site.directory / "tasks.txt"
    site.play(playbook, TASKS_FILE=str(file)).ok()
    return read_tasks(file)


class Arguments(threading.Thread):
    """The command lines of all processes of this machine, looked at again and again."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: set[bytes] = set()
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(0.02):  # the pace of looking
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):  # it has ended
                    self.seen.add(file.read_bytes())

    def stop(self) -> set[bytes]:
        self._stopping.set()
        self.join(20)
        return self.seen


class Single:
    """What site.yml has made, kept aside, so that any number of runs can begin with it."""

    def __init__(self, site: Local) -> None:
        site.play("site").ok()
        stop_nodes(site.directory)
        self._site = site
        self._kept = site.directory / "kept"
        shutil.copytree(site.state, self._kept)

    def restore(self) -> None:
        """One voter that runs, two hosts on which there is nothing, and nobody on their ports: what
        stood in for the node of a run that was killed goes on for a minute at most."""
        site = self._site
        stop_nodes(site.directory)
        shutil.rmtree(site.state)
        shutil.copytree(self._kept, site.state)
        wait_for(site.ports_are_free, "the ports to be free", 90)
        place = site.state / "hosts" / "n1"
        started = run_module(
            "dengine_process",
            config=str(place / "dengine.toml"),
            log=str(place / "dengine.log"),
            command=[sys.executable, "-m", "dengine"],
        )
        assert started["changed"]
        wait_for(lambda: site.voters() == [1], "node 1 to serve")


def kill_and_resume(site: Local, at: Kill) -> None:
    """site.yml after a kill may find one voter or three, and never makes two of it: that is tried
    after every fourth."""
    number = at.task.number
    killed = site.play("expand", KILL_AT=str(number), KILL_AFTER_S=str(at.after_s))
    assert killed.code == -9, killed.output[-3000:]
    assert site.voters() in ([1], [1, 2, 3]), at
    if not number % 4:
        site.play("site").ok()
        assert site.voters() in ([1], [1, 2, 3]), at
    site.play("expand").ok()
    assert site.voters() == [1, 2, 3], at
    assert site.report()["verdict"] == "Verified."


PARTS = 4  # as two processes do them side by side


@pytest.mark.playbooks
@pytest.mark.timeout(2 * 3600)
@pytest.mark.parametrize("part", range(PARTS))
def test_the_kill_matrix(part: int, site: Local) -> None:
    """SIGKILL at the start of each task from the backup on, each time of a run that begins with one
    voter, and in the midst of those that wait or start something; the second run ends verified.
    Where nothing was done since the task before, it would be the same kill again: kill_points says
    why, test_kill_points.py tests it. What only hosts with systemd do is killed in tests/lab."""
    single = Single(site)
    single.restore()
    tasks = tasks_of(site, "expand")
    begin = next(i for i, task in enumerate(tasks) if task.name == "Backup")
    points = kill_points(tasks[begin:])
    assert len(points) > 20, tasks
    for at in points[len(points) * part // PARTS : len(points) * (part + 1) // PARTS]:
        print(f"killed at {at}", flush=True)
        single.restore()
        first = site.pid("n1")
        kill_and_resume(site, at)
        assert site.pid("n1") == first, at
