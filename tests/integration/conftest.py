from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """An empty cluster; its processes end with the test, and a failure shows what they said."""
    with Cluster(tmp_path) as nodes:
        yield nodes
        print(nodes.describe())


@pytest.fixture
def rng() -> random.Random:
    """Choices of a test; DENGINE_TEST_SEED repeats those of a run that failed."""
    seed = int(os.environ.get("DENGINE_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"DENGINE_TEST_SEED={seed}")
    return random.Random(seed)
