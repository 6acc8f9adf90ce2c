"""Whole clusters under faults: as many seeds as the budget allows, another part with each commit.

DENGINE_SIM_SECONDS is the budget, of one core; `make sim` and `make soak` run more. A failure prints
its seed, which faults it needs, and where its trace is.
"""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.simulation.plan import FAULTS, Plan
from tests.simulation.rotation import first_seed
from tests.simulation.run import Tally, examine, explain, narrow_down, run_seed, run_seeds

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = float(os.environ.get("DENGINE_SIM_SECONDS") or 360)
HALVES = (0, 1)  # each for one core
OTHER_SEEDS = range(100)  # always the same, for rare states

# What a few hundred seeds must have come through, or the faults do not reach where they should.
SOMETIMES = (
    "EIO hit",
    "blackout",
    "buried",
    "clean stop",
    "crashed in the middle",
    "disk full hit",
    "disk replaced",
    "fetch done",
    "joint state",
    "leader crashed",
    "log purged",
    "log rotted",
    "log truncated",
    "one-way cut",
    "outcome unknown",
    "power lost",
    "power lost while down",
    "promoted",
    "reincarnated",
    "removed node stopped",
    "snapshot cut",
    "snapshot installed",
    "state rotted",
    "state torn",
    "take crashed",
    "take done",
    "transfer asked",
    "write crashed",
    "write survived unheard",
)
RARELY = ("install crashed", "joint state crashed", "fetch crashed", "snapshot rotted")


@pytest.fixture(scope="module")
def tally() -> Tally:
    return Tally()


@pytest.mark.timeout(0)
@pytest.mark.parametrize("half", HALVES)
def test_every_invariant_holds_in_this_commits_seeds(half: int, tally: Tally) -> None:
    """No acknowledged write is lost, no read is stale, and a healed cluster works again."""
    first, end = first_seed() + half, time.monotonic() + BUDGET_S / len(HALVES)
    mine = Tally()
    gc.freeze()  # what is there already is not looked through after each seed
    for seed in itertools.count(first, len(HALVES)):
        part, failure = examine(seed)
        mine.merge(part)
        if failure is not None:
            narrow_down(seed, limit_s=60)
            raise AssertionError(explain(seed, failure.text))
        if time.monotonic() > end:
            break
    print(f"every second seed from {first} to {seed}: {mine}")
    tally.merge(mine)
    assert mine.operations > 50 * mine.seeds, "the faults leave the clients nothing to see"


@pytest.mark.timeout(0)
def test_rare_states_are_reached(tally: Tally) -> None:
    """A crash in a joint state, a cut transfer, a failing disk: all of them do occur."""
    seeds = iter(OTHER_SEEDS)
    while any(not tally.counts[what] for what in SOMETIMES):
        seed = next(seeds, None)
        missing = [what for what in SOMETIMES if not tally.counts[what]]
        assert seed is not None, f"never seen in {tally.seeds} seeds: {', '.join(missing)}"
        run_seeds([seed], tally)
    rare = [what for what in RARELY if tally.counts[what]]
    print(f"{tally.seeds} seeds; of the rarest: {', '.join(rare) or 'none'}")


def digest_of(seed: int, hash_seed: str) -> str:
    """What a fresh process says of `seed`: a digest of its trace and one of its log."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.simulation.run", "--from", str(seed), "--trace"],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    return ended.stdout


@pytest.mark.parametrize("seed", [1, 8, 15, 23])
def test_a_seed_is_always_the_same_run(seed: int) -> None:
    """Else no failure could be replayed."""
    assert digest_of(seed, "1") == digest_of(seed, "2")


def test_leaving_a_fault_out_changes_no_other_choice() -> None:
    """Else a failing seed could not be shrunk."""
    for seed in range(50):
        whole = Plan(seed)
        for fault in FAULTS:
            part = Plan(seed, (fault,))
            assert part.faults == tuple(f for f in whole.faults if f != fault)
            assert (part.shape, part.limits, part.calm) == (whole.shape, whole.limits, whole.calm)


def test_a_calm_cluster_refuses_nothing() -> None:
    """Without faults hardly a call is left in doubt: where a member was removed, or in a hurry."""
    for seed in (3, 17):
        world = run_seed(seed, tuple(FAULTS))
        assert world.clients.operations > 100
        assert world.counts["outcome unknown"] < world.clients.operations / 50
