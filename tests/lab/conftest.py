"""One lab for all tests of this directory: brought up once, destroyed at the end by its name.

`DENGINE_TEST_LAB=NAME` uses a lab that is up already (`DENGINE_LAB=NAME scripts/lab up`), and
leaves it up.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dengine import __version__
from tests.cluster import ROOT, wait_for
from tests.conftest import LAB
from tests.lab.machines import LABS, Lab, Machine
from tests.lab.site import Grown, Site, written

# Writes before and after the growth, that those during it are compared with. The full run judges
# the slowest per cent too: with enough of them to know it, and with one host's part of a task at a
# time, for elsewhere hosts do not share processors and a disk with each other and the clients.
BESIDE = 24_000 if LAB else 4000
ONE_AT_A_TIME = {"ANSIBLE_FORKS": "1"} if LAB else {}
HOSTS_PYTHON, HOSTS_ARCH = "3.11", "x86_64"  # Debian 12


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.timeout(1200, func_only=False))


def why_not() -> str:
    """Why there can be no lab here; empty where there can."""
    if os.geteuid() != 0:
        return "the lab's containers need root"
    release = Path("/etc/os-release")
    if "ID=debian" not in release.read_text().splitlines():
        return "the lab is built for Debian"
    return ""


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Three Debian machines that have just booted and hold nothing of dengine."""
    if name := os.environ.get("DENGINE_TEST_LAB"):
        running = Lab(name)
        running.up()
        yield running
        return
    with new_lab("t") as fresh:
        yield fresh


@contextlib.contextmanager
def new_lab(letter: str) -> Iterator[Lab]:
    """Machines that have just booted; `letter` tells the labs of one run of tests apart. With its
    end no trace is left of them."""
    if reason := why_not():
        pytest.skip(reason)
    remove_orphans(letter)
    fresh = Lab(f"{letter}{os.getpid()}")
    beside = (ROOT / ".vagrant").exists()  # somebody's own machines, of another provider
    try:
        fresh.up()
        yield fresh
    finally:
        fresh.down()
    with contextlib.suppress(AssertionError):  # what was killed may take a moment to end
        wait_for(lambda: not fresh.traces(), "no trace of the lab", 20)
    assert fresh.traces() == {}
    assert beside or not (ROOT / ".vagrant").exists()


def remove_orphans(letter: str) -> None:
    """Labs of test runs that were killed."""
    for left in LABS.glob(f"{letter}*"):
        number = left.name.removeprefix(letter)
        if number.isdecimal() and not Path(f"/proc/{number}").exists():
            Lab(left.name).down()


@pytest.fixture(scope="session")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of this checkout for the lab's machines."""
    out = tmp_path_factory.mktemp("lab") / "wheelhouse"
    command = [sys.executable, str(ROOT / "scripts" / "build-wheelhouse"), str(out)]
    command += ["--python", HOSTS_PYTHON, "--arch", HOSTS_ARCH]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done
    return out


@pytest.fixture(scope="session")
def machines(lab: Lab, wheelhouse: Path) -> dict[int, Machine]:
    """All three with the release installed by hand, and nothing started."""
    with ThreadPoolExecutor(len(lab.machines)) as hands:
        list(hands.map(lambda m: m.install(wheelhouse, __version__), lab.machines.values()))
    return lab.machines


@pytest.fixture
def node(machines: dict[int, Machine]) -> Iterator[Machine]:
    """n1, alone in its cluster, running and ready. What a test does to its unit is undone."""
    n1 = machines[1]
    n1.start()
    try:
        yield n1
    finally:
        print(n1.run("journalctl --quiet --no-pager -u dengine --lines=60"))
        n1.run("systemctl stop dengine; rm -rf /run/systemd/system/dengine.service.d")
        n1.configure()
        n1.run("systemctl daemon-reload")


# --- what only the playbooks have made ------------------------------------------------------------


@contextlib.contextmanager
def one_voter(
    letter: str, directory: Path, wheelhouse: Path, **config: dict[str, int]
) -> Iterator[Site]:
    """A lab of its own with one voter on n1, made by site.yml, and two blank machines.

    `config` is more of the nodes' configuration, by section. What a playbook runs is niced, for
    elsewhere the controller would not take the hosts' processors. On a machine that counts beside
    its own node only: each machine has a control group of its own.
    """
    with new_lab(letter) as lab:
        for machine in lab.machines.values():
            machine.run("renice -n 10 -p $(systemctl show --property=MainPID --value ssh)")
        place = directory / f"cp311-{HOSTS_ARCH}"
        place.symlink_to(wheelhouse)
        made = Site(lab, directory, place)
        made.set_group(dengine_config=config)
        made.play("site").ok()
        made.learn_secrets()
        yield made
        for machine in made.machines.values():
            said = machine.attempt("journalctl --quiet --no-pager -u dengine --lines=40")
            print(said.stdout.decode())


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, wheelhouse: Path) -> Iterator[Site]:
    with one_voter("p", tmp_path_factory.mktemp("site"), wheelhouse) as made:
        yield made


@pytest.fixture(scope="session")
def grown(site: Site) -> Grown:
    """expand.yml, with four clients beside it, and then once more."""
    n1 = site.machines[1]
    load = site.load()
    try:
        load.phase("quiet")
        wait_for(lambda: written(n1) > BESIDE, "the clients to have written for a while", 60)
        before = n1.unit()
        load.phase("expand")
        site.play("expand", **ONE_AT_A_TIME).ok()
        load.phase("three")
        count = written(n1)
        wait_for(lambda: written(n1) > count + BESIDE, "writes through all three", 60)
        found = load.end()
    finally:
        load.close()
    after = n1.unit()
    stored = {
        machine.name: {
            key: machine.request("GET", f"/v1/kv/{key}").body.decode() for key in found["last"]
        }
        for machine in site.machines.values()
    }
    return Grown(found, before, after, site.play("expand").ok().changed, stored, site)
