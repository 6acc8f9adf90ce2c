"""The simulator finds defects: a few mutants in each run, others with each commit.

DENGINE_MUTANT_SECONDS is the budget; `make mutants` runs all of them to the end.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.mutants.mutations import BY_NAME, MUTANTS, NOT_CAUGHT, mutated
from tests.mutants.run import SEEDS, run_mutant
from tests.simulation.rotation import commit_number, first_seed

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = float(os.environ.get("DENGINE_MUTANT_SECONDS") or 45)


def test_every_mutant_still_fits_the_source() -> None:
    """Whoever changes a line that a mutant changes too has to say what the mutant is now."""
    mutants = (*MUTANTS, *NOT_CAUGHT)
    assert len(BY_NAME) == len(mutants), "two of one name"
    for mutant in mutants:
        for module in dict.fromkeys(edit.module for edit in mutant.edits):
            path = ROOT / f"{module.replace('.', '/')}.py"
            edits = [edit for edit in mutant.edits if edit.module == module]
            compile(mutated(path.read_text(encoding="utf-8"), edits), str(path), "exec")


@pytest.mark.timeout(0)
def test_a_sample_of_the_mutants_is_caught() -> None:
    """A simulator that finds nothing proves nothing."""
    end, start = time.monotonic() + BUDGET_S, commit_number() % len(MUTANTS)
    caught = 0
    for mutant in (*MUTANTS[start:], *MUTANTS[:start]):
        left_s = end - time.monotonic()
        if left_s <= 0:
            break
        limit_s = min(left_s, BUDGET_S / 4)  # a rare one leaves time for others
        outcome = run_mutant(mutant.name, first_seed(), SEEDS, limit_s)
        assert not outcome.survived, f"{mutant.name!r} survived {SEEDS} seeds"
        caught += outcome.seed is not None
        print(f"{mutant.name}: {outcome.invariant or 'no time left'}")
    assert caught, "not one mutant was caught in time"
