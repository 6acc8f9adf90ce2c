from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.crash_sweep.runner import Stage, Tally

_TALLY = pytest.StashKey[Tally]()


@pytest.fixture(scope="session")
def tally(request: pytest.FixtureRequest) -> Tally:
    return request.config.stash.setdefault(_TALLY, Tally())


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory, tally: Tally) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("sweep"), tally)
    yield stage
    stage.clear()


@pytest.fixture
def rng() -> random.Random:
    """Choices of a test; DENGINE_TEST_SEED repeats those of a run that failed."""
    seed = int(os.environ.get("DENGINE_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"DENGINE_TEST_SEED={seed}")
    return random.Random(seed)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One of several processes hands its part of the table over."""
    tally = session.config.stash.get(_TALLY, None)
    if tally is not None and hasattr(session.config, "workeroutput"):
        session.config.workeroutput["crash_sweep"] = tally.as_rows()


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    """The process that prints the table adds up the parts."""
    rows = getattr(node, "workeroutput", {}).get("crash_sweep")
    if rows:
        node.config.stash.setdefault(_TALLY, Tally()).add_rows(rows)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tally = terminalreporter.config.stash.get(_TALLY, None)
    if tally is not None:
        terminalreporter.section("crash sweep")
        for line in tally.table():
            terminalreporter.write_line(line)
