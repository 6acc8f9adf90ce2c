"""Every write, fsync, rename and unlink on the snapshot paths, each followed by a crash or failing.

`make crash-sweep` goes through all of them; `make test` through a sample that changes with its
seed. DENGINE_TEST_SEED repeats one.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.crash_sweep.runner import SITES, Stage, faults, unlisted
from tests.crash_sweep.sites import FIRST, INSTALL, PURGE, TAKE, Site
from tests.crash_sweep.strace import Fault

SAMPLE_S = 40.0
OCCURRENCES_MAX = 200

ALL = [
    (path, site, fault) for path, sites in SITES.items() for site in sites for fault in faults(site)
]


def _name(path: str, site: Site, fault: Fault) -> str:
    return f"{path}: {site.who} {site.name}: {fault.value}"


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("path", "site", "fault"),
    [pytest.param(*case, id=_name(*case)) for case in ALL],
)
def test_every_point(
    stage: Stage, capsys: pytest.CaptureFixture[str], path: str, site: Site, fault: Fault
) -> None:
    """Whatever step on disk a node dies at or fails at, a restart has one good state, everything
    acknowledged and nothing left over, and agrees with the others."""
    occurrence = 0
    while stage.sweep(path, site, fault, occurrence + 1):
        occurrence += 1
        assert occurrence < OCCURRENCES_MAX
    with capsys.disabled():
        print(f" {occurrence} points", end=" ", flush=True)
    assert occurrence, f"{site.name} was not reached at all: the list in sites.py is out of date"


@pytest.mark.timeout(180)
def test_the_list_of_steps_is_complete(stage: Stage, tmp_path: Path) -> None:
    """No path does anything in the data directory that the sweep does not know of."""
    # They share a way.
    others = {
        "first take": TAKE,
        "take": PURGE,
        "purge": TAKE,
        "first install": INSTALL,
        "install": FIRST,
    }
    missing = {}
    for path, sites in SITES.items():
        found = unlisted(stage.scenario(path), (*sites, *others.get(path, ())), tmp_path / "strace")
        if found:
            missing[path] = sorted(found)
    assert not missing, missing


@pytest.mark.sample
@pytest.mark.timeout(300)
def test_a_sample_of_the_points(stage: Stage, rng: random.Random) -> None:
    """The same for a random few of each path."""
    until = time.monotonic() + SAMPLE_S
    share_s = SAMPLE_S / len(SITES)
    for number, path in enumerate(SITES):
        end = until - (len(SITES) - 1 - number) * share_s
        cases = [case for case in ALL if case[0] == path]
        reached = False
        while not reached or time.monotonic() < end:
            _, site, fault = rng.choice(cases)
            occurrence = rng.randint(1, site.about)
            reached = stage.sweep(path, site, fault, occurrence)
            print(f"{_name(path, site, fault)} {occurrence}: {'passed' if reached else 'no such'}")
