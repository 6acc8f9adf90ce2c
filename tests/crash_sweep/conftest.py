from __future__ import annotations

import os
import random
from collections.abc import Iterator

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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tally = terminalreporter.config.stash.get(_TALLY, None)
    if tally is not None:
        terminalreporter.section("crash sweep")
        for line in tally.table():
            terminalreporter.write_line(line)
