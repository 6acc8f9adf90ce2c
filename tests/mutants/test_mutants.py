"""The simulator finds defects: a few mutants in each run, others with each commit.

DENGINE_MUTANT_SECONDS is the budget, of one core; `make mutants` runs all of them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.mutants.edits import mutated
from tests.mutants.mutations import BY_NAME, MUTANTS
from tests.mutants.run import (
    FACTOR,
    LEAST,
    SEEDS,
    allowed,
    cost_s,
    read_needed,
    run_mutant,
    sample,
)
from tests.simulation.rotation import commit_number

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = float(os.environ.get("DENGINE_MUTANT_SECONDS") or 120)
HALVES = (0, 1)  # each for one core


def test_every_mutant_still_fits_the_source() -> None:
    """Whoever changes a line that a mutant changes too has to say what the mutant is now."""
    assert len(BY_NAME) == len(MUTANTS), "two of one name"
    for mutant in MUTANTS:
        assert (ROOT / mutant.tests.partition("::")[0]).exists(), mutant.name
        for module in dict.fromkeys(edit.module for edit in mutant.edits):
            path = ROOT / f"{module.replace('.', '/')}.py"
            edits = [edit for edit in mutant.edits if edit.module == module]
            compile(mutated(path.read_text(encoding="utf-8"), edits), str(path), "exec")


def test_every_record_speaks_of_a_mutant() -> None:
    """Else a mutant that was renamed would be looked for without one."""
    needed = read_needed()
    assert not needed.keys() - BY_NAME.keys()
    assert all(1 <= seeds <= SEEDS for seeds in needed.values())


def test_each_commit_draws_as_many_mutants_as_the_budget_can_finish() -> None:
    """And every mutant that fits into the budget at all is drawn by some commit."""
    needed = {m.name: 1 + n * n % 300 for n, m in enumerate(MUTANTS)}
    needed.pop(MUTANTS[0].name)
    drawn = set()
    for number in range(len(MUTANTS)):
        chosen = sample(MUTANTS, number, 60.0, needed)
        assert chosen
        assert sum(cost_s(mutant, needed) for mutant in chosen) <= 60.0
        drawn |= {mutant.name for mutant in chosen}
    assert drawn == {mutant.name for mutant in MUTANTS if cost_s(mutant, needed) <= 60.0}


def test_a_mutant_may_need_five_times_what_it_is_known_to_need() -> None:
    mutant = next(mutant for mutant in MUTANTS if not mutant.tests)
    assert allowed(mutant, {}) == SEEDS
    assert allowed(mutant, {mutant.name: 1}) == LEAST
    assert allowed(mutant, {mutant.name: 30}) == FACTOR * 30
    assert allowed(mutant, {mutant.name: 400}) == SEEDS


@pytest.mark.timeout(0)
@pytest.mark.parametrize("half", HALVES)
def test_this_commits_mutants_are_caught(half: int) -> None:
    """A simulator that finds nothing proves nothing. Each gets all the seeds it may need."""
    needed = read_needed()
    chosen = sample(MUTANTS[half :: len(HALVES)], commit_number(), BUDGET_S / 2, needed)
    problems = []
    for mutant in chosen:
        seeds = allowed(mutant, needed)
        outcome = run_mutant(mutant, seeds=seeds)
        print(f"{mutant.name}: {outcome.seeds} of {seeds} seeds, {outcome.by}")
        if problem := outcome.problem(seeds):
            problems.append(problem)
    assert not problems, "; ".join(problems)
    assert chosen, "not one mutant fits into the budget"
