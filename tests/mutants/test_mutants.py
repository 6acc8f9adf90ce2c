"""The simulator finds defects: a few mutants in each run, others with each commit.

DENGINE_MUTANT_SECONDS is the budget, of one core; `make mutants` runs all of them.
"""

from __future__ import annotations

import os
import struct
from itertools import pairwise
from pathlib import Path

import pytest

from dengine.errors import (
    ClusterUnavailable,
    DataCorruption,
    DengineError,
    InvariantBroken,
    TryAgain,
)
from tests.mutants import of_rare, run
from tests.mutants.edits import mutated
from tests.mutants.mutations import BY_NAME, MUTANTS
from tests.mutants.run import (
    BEFORE,
    FACTOR,
    LEAST,
    SEEDS,
    Outcome,
    cost_s,
    is_catch,
    read_needed,
    run_all,
    run_mutant,
    sample,
    seeds_to_look_at,
)
from tests.simulation.rotation import commit_number
from tests.simulation.violation import Violation

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


def test_what_the_simulator_does_not_catch_is_documented() -> None:
    text = (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")
    assert not [mutant.name for mutant in of_rare.MUTANTS if mutant.name not in text]


def test_every_record_speaks_of_a_mutant() -> None:
    """Else a mutant that was renamed would be looked for without one."""
    needed = read_needed()
    assert not needed.keys() - BY_NAME.keys()
    assert all(1 <= seeds <= SEEDS for seeds in needed.values())


def test_each_commit_draws_as_many_mutants_as_the_budget_can_finish() -> None:
    """And every mutant is drawn by some commit, however late the seed is that catches it."""
    needed = {m.name: 1 + n * n % SEEDS for n, m in enumerate(MUTANTS)}
    needed.pop(MUTANTS[0].name)
    drawn = set()
    for number in range(len(MUTANTS)):
        chosen = sample(MUTANTS, number, 60.0, needed)
        assert chosen
        assert sum(cost_s(mutant, needed) for mutant in chosen) <= 60.0
        drawn |= {mutant.name for mutant in chosen}
    assert drawn == set(BY_NAME)


def test_a_mutant_may_need_five_times_what_it_is_known_to_need() -> None:
    mutant = next(mutant for mutant in MUTANTS if not mutant.tests)
    for known, expected in (
        (None, (0, SEEDS)),
        (1, (0, LEAST)),
        (30, (29 - BEFORE, FACTOR * 30)),
        (400, (399 - BEFORE, SEEDS)),
    ):
        needed = {} if known is None else {mutant.name: known}
        assert seeds_to_look_at(mutant, needed) == expected


def violation(invariant: str, *causes: Exception) -> Violation:
    """Each cause has the next one for its own."""
    made = Violation(invariant, "it does not hold")
    for error, cause in pairwise((made, *causes)):
        error.__cause__ = cause
    return made


@pytest.mark.parametrize(
    ("found", "counts"),
    [
        (violation("6 commit rule"), True),
        (violation("0 no surprise"), True),
        (violation("0 no surprise", InvariantBroken("two leaders")), True),
        (violation("0 no surprise", TryAgain("started on an old copy")), True),
        (violation("0 no surprise", DataCorruption("no record"), struct.error()), True),
        (violation("0 no surprise", InvariantBroken("broken"), AssertionError()), False),
        (violation("0 no surprise", TryAgain("the cycle died"), KeyError(7)), False),
        (violation("0 no surprise", TryAgain("the cycle died"), ClusterUnavailable("")), False),
        (violation("0 no surprise", DengineError("unexpected error")), False),
        (violation("0 no surprise", ValueError("zip")), False),
    ],
)
def test_what_only_stumbles_is_not_caught(found: Violation, counts: bool) -> None:
    assert is_catch(found) == counts


def test_some_mutants_are_for_one_invariant_to_catch() -> None:
    assert is_catch(violation("10 state hash"), "10 state hash")
    assert not is_catch(violation("14 watch"), "10 state hash")


def test_one_that_is_not_caught_ends_nothing_and_all_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    survives, breaks, found = MUTANTS[:3]
    outcomes = {
        survives: Outcome(survives.name, None, "2 times by KeyError", "", 1.0),
        breaks: Outcome(breaks.name, None, "", "no room", 1.0),
        found: Outcome(found.name, 3, "7 votes", "", 1.0),
    }
    monkeypatch.setattr(run, "run_mutant", lambda mutant, first, seeds: outcomes[mutant])
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    assert run_all((survives, breaks, found), 0, 500, record=False, output=None) == 1
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"FAILED: the mutant {survives.name!r} survived 500 seeds; it stumbled 2 times by KeyError",
        f"FAILED: the mutant {breaks.name!r} could not be run: no room",
        "1 of 3 caught, median 3 seeds",
    ]


@pytest.mark.timeout(0)
@pytest.mark.parametrize("half", HALVES)
def test_this_commits_mutants_are_caught(half: int) -> None:
    """A simulator that finds nothing proves nothing. Each gets all the seeds it may need."""
    needed = read_needed()
    chosen = sample(MUTANTS[half :: len(HALVES)], commit_number(), BUDGET_S / 2, needed)
    problems = []
    for mutant in chosen:
        first, seeds = seeds_to_look_at(mutant, needed)
        outcome = run_mutant(mutant, first, seeds)
        print(f"{mutant.name}: {outcome.seeds} of {seeds} seeds, {outcome.by}")
        if problem := outcome.problem(seeds):
            problems.append(problem)
    assert not problems, "; ".join(problems)
    assert chosen, "not one mutant fits into the budget"
