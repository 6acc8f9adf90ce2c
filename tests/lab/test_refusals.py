"""What stops expand.yml on booted machines: each fault is made for real, fails its row and no more,
and nothing is changed. Then runs that are killed, each followed by a plain second one.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.ansible.local import Kill, Run, Task, chosen, kill_points, local, read_tasks
from tests.cluster import wait_for
from tests.lab.conftest import one_voter
from tests.lab.machines import Machine
from tests.lab.site import Site, written
from tests.simulation.rotation import commit_number

OLD_PYTHON = "import sys\nsys.version_info = (3, 9, 2, 'final', 0)\n"
OLD_SYSTEMD = "import os\nos.environ['PATH'] = '/opt/test/bin:' + os.environ['PATH']\n"
OTHER_MACHINE = "import platform\nplatform.machine = lambda: 'riscv64'\n"
INTERPRETERS = {"python": OLD_PYTHON, "architecture": OTHER_MACHINE, "systemd": OLD_SYSTEMD}
LIBFAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")  # Debian's faketime
SLOW_CLOCK = "LD_PRELOAD=/opt/test/libfaketime.so.1 FAKETIME=-5s DONT_FAKE_MONOTONIC=1"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, wheelhouse: Path) -> Iterator[Site]:
    """One voter on n1 with some data, and two blank machines."""
    with one_voter("r", tmp_path_factory.mktemp("single"), wheelhouse) as site:
        for number in range(50):
            assert site.machines[1].request("PUT", f"/v1/kv/seed/{number}", b"x" * 1000).ok
        yield site


def failed_rows(run: Run) -> set[tuple[str, str]]:
    """(host, check) of every row of the table that says FAILED; nothing was changed."""
    return set(re.findall(r"([\w-]+) +(\w+) +FAILED", run.failed().output))


def is_single(site: Site) -> None:
    """Nothing was installed or started, and the one voter is what it was."""
    members = site.machines[1].json("/v1/cluster")["members"]
    assert [m["id"] for m in members] == [1]
    for i in (2, 3):
        assert site.machines[i].attempt("test -e /etc/dengine/dengine.toml").returncode != 0
        assert site.machines[i].attempt("systemctl is-active --quiet dengine").returncode != 0


@contextlib.contextmanager
def taken_port(machine: Machine) -> Iterator[None]:
    machine.run(
        "systemd-run --quiet --collect --unit=squatter "
        f"python3 -m http.server --bind {machine.address} {machine.port}"
    )
    wait_for(
        lambda: machine.host.socket(f"tcp://{machine.address}:{machine.port}").is_listening,
        "the port to be taken",
    )
    try:
        yield
    finally:
        machine.run("systemctl stop squatter")


@contextlib.contextmanager
def small_disk(machine: Machine) -> Iterator[None]:
    machine.run("mkdir -p /var/lib/dengine; mount -t tmpfs -o size=64m tmpfs /var/lib/dengine")
    try:
        yield
    finally:
        machine.run("umount /var/lib/dengine; rmdir /var/lib/dengine")


@contextlib.contextmanager
def unreachable(machine: Machine) -> Iterator[None]:
    """n2 answers nobody but the controller."""
    machine.run("ip route add blackhole 10.88.0.12/32")
    try:
        yield
    finally:
        machine.run("ip route del blackhole 10.88.0.12/32")


@contextlib.contextmanager
def closed(machine: Machine) -> Iterator[None]:
    """A firewall that lets in ssh and answers, and nothing else."""
    rules = (
        "table inet test { chain input { type filter hook input priority 0; policy drop; "
        "iif lo accept; ct state established,related accept; tcp dport 22 accept; }; }"
    )
    machine.run("nft -f -", rules.encode())
    try:
        yield
    finally:
        machine.run("nft delete table inet test")


@contextlib.contextmanager
def foreign_directory(machine: Machine) -> Iterator[None]:
    identity = (
        '{"format": 1, "node_id": 3, "incarnation": "00000000000000aa", '
        f'"cluster_id": "{"f" * 32}", "address": "", "removed": null}}'
    )
    machine.run("mkdir -p /var/lib/dengine/3")
    machine.write("/var/lib/dengine/3/identity.json", identity)
    try:
        yield
    finally:
        machine.run("rm -r /var/lib/dengine")


FAULTS = {
    "port": (taken_port, {("n3", "port")}),
    "disk_space": (small_disk, {("n3", "disk_space")}),
    "connect": (unreachable, {("n3", "connect"), ("n2", "connect")}),
    "firewall": (closed, {("n3", "firewall"), ("n1", "connect"), ("n2", "connect")}),
    "identity": (foreign_directory, {("n3", "identity")}),
}


@pytest.mark.parametrize("check", FAULTS)
def test_a_fault_on_a_machine_fails_its_row(single: Site, check: str) -> None:
    """Its row and no other; a way that is blocked fails at both of its ends."""
    fault, expected = FAULTS[check]
    with fault(single.machines[3]):
        rows = failed_rows(single.play("expand"))
    assert rows == expected
    is_single(single)


def interpreter_fails_row(
    site: Site, check: str, environment: str, hosts: Sequence[str] = ("n3",)
) -> None:
    """n3's modules run with a Python that sees this environment: `check` fails on `hosts`, and
    nothing else does."""
    machine = site.machines[3]
    wrapper = f'#!/bin/sh\n{environment} exec /usr/bin/python3 "$@"\n'
    machine.write("/opt/test/python3", wrapper, "0755")
    try:
        rows = failed_rows(
            site.play("expand", "-e", "@" + host_variable(site, "/opt/test/python3"))
        )
    finally:
        machine.run("rm -r /opt/test")
    assert rows == {(host, check) for host in hosts}
    is_single(site)


def test_a_clock_that_is_five_seconds_behind_fails_its_row(single: Site) -> None:
    """On all three: n3 is off from both others, and each of them from n3."""
    machine = single.machines[3]
    machine.copy(LIBFAKETIME.parent, "/opt/test", [LIBFAKETIME.name])
    told = machine.run(f"{SLOW_CLOCK} date +%s; date +%s").split()
    assert int(told[0]) < int(told[1]) - 3, "the clock is not faked"
    interpreter_fails_row(single, "clock_offset", SLOW_CLOCK, ("n1", "n2", "n3"))


@pytest.mark.parametrize("check", INTERPRETERS)
def test_a_wrong_interpreter_fails_its_row(single: Site, check: str) -> None:
    """A Python or a systemd too old, a machine nobody has wheels for."""
    machine = single.machines[3]
    machine.run("mkdir -p /opt/test/bin")
    machine.write("/opt/test/sitecustomize.py", INTERPRETERS[check])
    machine.write("/opt/test/bin/systemctl", "#!/bin/sh\necho systemd 241\n", "0755")
    interpreter_fails_row(single, check, "PYTHONPATH=/opt/test")


def host_variable(site: Site, interpreter: str) -> str:
    """n3 alone runs its modules with `interpreter`."""
    file = site.inventory.parent / "interpreter.json"
    file.write_text(
        '{"ansible_python_interpreter": "{{ (inventory_hostname == \'n3\')'
        f" | ternary('{interpreter}', '/usr/bin/python3') }}}}\"}}"
    )
    return str(file)


def test_without_the_rights_of_root_the_run_ends_before_anything(single: Site) -> None:
    """Its row says so, and no other does."""
    ordinary = '{"ansible_become": "{{ inventory_hostname != \'n3\' }}"}'
    run = single.play("expand", "-e", ordinary)
    assert failed_rows(run) == {("n3", "privileges")}
    is_single(single)


def test_a_tampered_wheel_is_refused(single: Site) -> None:
    """The controller makes another release rather than use it, which ends the run where it has no
    index; and a host that got it all the same does not install it."""
    (wheel,) = single.wheels.glob("psutil-*.whl")
    sound = wheel.read_bytes()
    wheel.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    n2 = single.machines[2]
    try:
        run = single.play("expand")
        n2.copy(single.wheels, "/tmp/wheels")
    finally:
        wheel.write_bytes(sound)
    assert run.code != 0
    assert "pip download failed" in run.output
    is_single(single)
    assert "default" not in single.lab.script("exec", "ip", "route"), "the lab has no way out"
    n2.run("python3 -m venv /tmp/venv")
    refused = n2.attempt(
        "/tmp/venv/bin/pip install --no-index --find-links /tmp/wheels --require-hashes "
        "--requirement /tmp/wheels/requirements.txt"
    )
    n2.run("rm -r /tmp/venv /tmp/wheels")
    assert refused.returncode != 0
    assert b"DO NOT MATCH THE HASHES" in refused.stderr


TAMPER = """
while sleep 0.1; do
    for wheel in /opt/dengine/wheelhouse/psutil-*.whl; do
        [ ! -e "$wheel" ] || printf X | dd of="$wheel" bs=1 seek=1000 conv=notrunc status=none
    done
done
"""


def test_what_is_altered_on_the_host_is_not_installed(single: Site) -> None:
    """Between the upload and the installation: the run ends there, and nothing is started. The next
    one, with nobody at the files, gets over it."""
    n2 = single.machines[2]
    n2.write("/root/tamper", TAMPER)
    n2.run("systemd-run --quiet --collect --unit=tamper bash /root/tamper")
    try:
        run = single.play("expand")
    finally:
        n2.run("systemctl stop tamper; rm /root/tamper")
    assert run.code not in (0, -9)
    assert "DO NOT MATCH THE HASHES" in run.output
    assert "Retrying" not in run.output, "no index is asked, not even where none can be reached"
    assert n2.attempt("test -e /opt/dengine/current").returncode != 0
    is_single(single)


# --- runs that are checked, and runs that are killed ----------------------------------------------


SAVED = "/root/single.tar"


def reset(site: Site, *, keep_release: bool = False) -> None:
    """Back to one voter and two blank machines; n1 keeps its release, and the others if told to."""
    gone = "/var/lib/dengine /etc/dengine /etc/systemd/system/dengine* /var/backups/dengine "
    gone += "/run/dengine-deploy.json"
    gone += "" if keep_release else " /opt/dengine /usr/local/bin/dengine"
    for i in (2, 3):
        machine = site.machines[i]
        # The stand-in of a run that was killed goes on for a minute at most.
        wait_for(lambda m=machine: not is_busy(m), f"the port of {machine.name} to be free", 90)
        machine.run(
            "systemctl disable --now --quiet dengine dengine-backup.timer 2>/dev/null || true; "
            f"rm -rf {gone}; systemctl daemon-reload"
        )
    n1 = site.machines[1]
    n1.run(
        f"systemctl stop dengine; [ -e {SAVED} ] || tar -C /var/lib -cf {SAVED} dengine; "
        f"rm -rf /var/lib/dengine /run/dengine-deploy.json; tar -C /var/lib -xf {SAVED}"
    )
    n1.start()


def is_busy(machine: Machine) -> bool:
    """Does something other than the unit listen on the node's port?"""
    taken: bool = machine.host.socket(f"tcp://{machine.address}:{machine.port}").is_listening
    return taken and machine.unit()["ActiveState"] != "active"


def test_check_mode_tells_what_growing_changes(single: Site) -> None:
    """`--check --diff` changes nothing, and predicts how much of each host the real run changes."""
    reset(single)
    predicted = single.play("expand", "--check", "--diff").ok()
    is_single(single)
    real = single.play("expand").ok()
    # What becomes of a backup can only be told when there is one; all else is told exactly.
    role = "dengine.core.backup"
    assert real.changed_outside(role) == predicted.changed_outside(role)
    assert all(real.changed_outside(role)[host] > 0 for host in ("n2", "n3"))


def tasks_of(site: Site) -> list[Task]:
    """The tasks that a run of expand.yml starts, in order; the run is a real one."""
    file = site.inventory.parent / "tasks.txt"
    file.unlink(missing_ok=True)
    site.play("expand", TASKS_FILE=str(file)).ok()
    return read_tasks(file)


def kills(site: Site) -> list[tuple[Kill, bool]]:
    """Each kill, and whether the release is kept.

    A run that gets as far as the tasks behind the release has made one, which takes it most of its
    time. For these tasks it is there beforehand, and they have the numbers of such a run.
    """
    reset(site)
    tasks = tasks_of(site)
    begin = next(i for i, task in enumerate(tasks) if task.name == "Backup")
    release = "dengine.core.release :"
    last = max(i for i, task in enumerate(tasks) if task.name.startswith(release))
    reset(site, keep_release=True)
    later = tasks_of(site)
    behind = last + 1 + len(later) - len(tasks)
    assert [t.name for t in later[behind:]] == [t.name for t in tasks[last + 1 :]]
    found = [(kill, False) for kill in kill_points(tasks[begin : last + 1])]
    return found + [(kill, True) for kill in kill_points(later[behind:])]


def acts_without_systemd(directory: Path) -> set[str]:
    """The names of the tasks that act when expand.yml makes one voter three on this machine, where
    nodes are processes: tests/ansible kills a run at each of them."""
    with local(directory) as here:
        here.play("site").ok()
        file = directory / "tasks.txt"
        here.play("expand", TASKS_FILE=str(file)).ok()
        return {task.name for task in read_tasks(file) if task.acts}


def kill_and_resume(site: Site, at: Kill, keep_release: bool) -> None:
    n1 = site.machines[1]
    reset(site, keep_release=keep_release)
    pid = n1.pid
    killed = site.play("expand", KILL_AT=str(at.task.number), KILL_AFTER_S=str(at.after_s))
    assert killed.code in (-9, 137), killed.output[-3000:]
    voters = [m["id"] for m in n1.json("/v1/cluster")["members"] if m["status"] == "active"]
    assert sorted(voters) in ([1], [1, 2, 3]), at
    site.play("expand").ok()
    assert site.report("expand")["verdict"] == "Verified.", at
    assert n1.pid == pid, at
    assert written(n1) >= 50


# What a run on this machine has nothing like, in the order of the roles: each is killed every time.
ONLY_HERE = (
    *("Build the wheelhouse on the controller", "Directories of the release", "Upload the wheels"),
    *("Install, from these wheels and no other", "Mark it complete", "Use it"),
    *("System user and directories as systemd knows them", "Make the user", "Make the directories"),
    *("Units", "Have systemd read the units", "The unit", "Start it at boot, node 2"),
    "Start at boot, and back up every night",
)


@pytest.mark.timeout(6 * 3600)
def test_a_run_that_is_killed_at_any_task_is_simply_run_again(single: Site, tmp_path: Path) -> None:
    """SIGKILL of ansible-playbook at the start of a task from backup to verify, and in the midst
    of those that wait or start something; the second run ends verified, node 1 is never restarted.
    Always right before, in the midst of and right behind what only hosts with systemd have. All
    others are killed in tests/ansible; here every Nth of them, another part with each commit, and
    all with DENGINE_ANSIBLE_STEP=1."""
    step = int(os.environ.get("DENGINE_ANSIBLE_STEP", "5"))
    found = kills(single)
    points = [kill for kill, _ in found]
    picked = set(chosen(points, acts_without_systemd(tmp_path), step, commit_number()))
    at_starts = [kill for kill in picked if not kill.after_s]
    ahead = {kill.ahead.rpartition(" : ")[2] for kill in at_starts}
    behind = {kill.behind.rpartition(" : ")[2] for kill in at_starts}
    assert set(ONLY_HERE) <= ahead
    # With what the release leaves begins the second part of `kills`.
    assert set(ONLY_HERE) - {"Use it"} <= behind
    assert next(kill for kill, keep in found if keep) in picked
    print(f"{len(picked)} of {len(points)} kills")
    for at, keep_release in found:
        if at in picked:
            print(f"killed at {at}", flush=True)
            kill_and_resume(single, at, keep_release)
