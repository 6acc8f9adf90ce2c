"""Seeds of scenarios under random faults: some fixed ones, and one that is new in each run."""

from __future__ import annotations

import random

import pytest

each_seed = pytest.mark.parametrize("chosen", [1, 2, 3, None], ids=["1", "2", "3", "new"])


def seed_of(chosen: int | None) -> int:
    """The seed to use, printed: a failure is repeated by writing it into `each_seed`."""
    seed = random.SystemRandom().randrange(2**32) if chosen is None else chosen
    print(f"seed {seed}")
    return seed
