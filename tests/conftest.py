"""What all tests share: the order of the layers, and how random tests report."""

from __future__ import annotations

import os
import platform
import signal
from collections.abc import Generator
from pathlib import Path
from zlib import crc32

import hypothesis
import pytest

from tests.simulation.rotation import commit_number

# The lowest layer first: a broken quorum function is easier to read than a broken cluster.
LAYERS = (
    *("raft", "kv", "storage", "node", "api", "client", "engine", "linearizability"),
    *("simulation", "mutants", "integration", "crash_sweep", "nemesis", "ansible", "lab"),
)
# Their tests start processes for seconds each: `make test` runs half of them for one commit and the
# other half for another (--rotate), `make test-all` all.
ROTATED = ("integration", "ansible")
FULL = bool(os.environ.get("DENGINE_CRASH_SWEEP"))  # `make crash-sweep`
LAB = bool(os.environ.get("DENGINE_LAB_TESTS"))  # `make lab-full`
# Here everything can be installed and every right is there, so nothing has a reason to be skipped.
MAY_NOT_SKIP = (
    os.geteuid() == 0
    and platform.freedesktop_os_release().get("ID") == "debian"
    and platform.freedesktop_os_release().get("VERSION_ID") == "12"
)

# The machine is shared, so time per example means nothing; a failure prints how to repeat it.
hypothesis.settings.register_profile("dengine", deadline=None, print_blob=True)
hypothesis.settings.load_profile("dengine")

# A script that runs the tests in its background has SIGINT ignored, and what they start would
# inherit that: some of it is told to end by just this signal.
signal.signal(signal.SIGINT, signal.default_int_handler)


def belongs(item: pytest.Item) -> bool:
    """Is `item` part of this run?

    `full` tests belong to a target of their own, `sample` tests stand for them in `make test`, and
    `recorded` tests read data that may not be on this machine.
    """
    if item.get_closest_marker("sample" if FULL else "full"):
        return False
    if not LAB and ("lab" in item.path.parts or item.get_closest_marker("playbooks")):
        return item.get_closest_marker("lab_sample") is not None
    recorded = item.get_closest_marker("recorded")
    return recorded is None or Path(recorded.args[0]).is_dir()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rotate", action="store_true", help=f"half of {ROTATED}, by commit")


def is_drawn(item: pytest.Item, number: int) -> bool:
    """Of ROTATED half of the items are, by name; those that share a recording go together."""
    if item.path.parent.name not in ROTATED:
        return True
    shared = "recording" in getattr(item, "fixturenames", ())
    name = item.path.name if shared else f"{item.path.name}::{item.name}"
    return (crc32(name.encode()) + number) % 2 == 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skipped test is a failure where it could have run."""
    report = yield
    if report.skipped and MAY_NOT_SKIP and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which must not happen here: {report.longrepr}"
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what does not belong; run tests/*.py first, then from the bottom to the top."""
    chosen = [item for item in items if belongs(item)]
    if config.getoption("--rotate"):
        number = commit_number()
        chosen = [item for item in chosen if is_drawn(item, number)]
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen
    here = Path(__file__).parent

    def top(item: pytest.Item) -> str:
        return item.path.relative_to(here).parts[0]

    items.sort(key=lambda item: LAYERS.index(top(item)) + 1 if top(item) in LAYERS else 0)
