"""Does the simulator find defects? `python -m tests.mutants.run` runs every mutant until caught.

Each mutant has a process of its own, for a module is imported only once.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.mutants.mutations import BY_NAME, MUTANTS, infect

SEEDS = 500
ROOT = Path(__file__).resolve().parents[2]


SURVIVED, NO_TIME = 1, 3  # exit codes of `hunt`


class Outcome(NamedTuple):
    """`seed` is None when the mutant was not caught; `survived`: although it had all its seeds."""

    name: str
    seed: int | None
    invariant: str
    seconds: float
    survived: bool = False


def hunt(name: str, first: int, seeds: int, limit_s: float) -> int:
    """In this process: 0 when a seed has caught the mutant, which is printed."""
    end = time.monotonic() + limit_s
    infect(BY_NAME[name])
    from tests.simulation.invariants import Violation
    from tests.simulation.plan import Plan
    from tests.simulation.world import World

    gc.freeze()
    for seed in range(first, first + seeds):
        try:
            World(Plan(seed)).run()
        except Violation as violation:
            print(f"{seed}\t{violation.invariant}")
            return 0
        if time.monotonic() > end:
            return NO_TIME
    return SURVIVED


def run_mutant(
    name: str, first: int = 0, seeds: int = SEEDS, limit_s: float = float("inf")
) -> Outcome:
    """In a process of its own."""
    started = time.monotonic()
    command = [sys.executable, "-m", "tests.mutants.run", "--only", name]
    ended = subprocess.run(
        [*command, "--from", str(first), "--seeds", str(seeds), "--limit-s", str(limit_s)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - started
    if ended.returncode == 0:
        seed, _, invariant = ended.stdout.strip().splitlines()[-1].partition("\t")
        return Outcome(name, int(seed), invariant, seconds)
    if ended.returncode not in (SURVIVED, NO_TIME) or ended.stderr:
        raise RuntimeError(f"mutant {name!r} could not be run:\n{ended.stderr[-3000:]}")
    return Outcome(name, None, "", seconds, ended.returncode == SURVIVED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="this mutant, in this process")
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--limit-s", type=float, default=float("inf"))
    parser.add_argument("--names", nargs="*", default=[""], help="parts of names")
    args = parser.parse_args()
    if args.only:
        return hunt(args.only, args.first, args.seeds, args.limit_s)
    survivors, needed = [], []
    print(f"{'mutant':58} {'seeds':>5}  {'s':>5}  caught by")
    names = [m.name for m in MUTANTS if any(part in m.name for part in args.names)]
    pool = ThreadPoolExecutor(os.cpu_count())
    for outcome in pool.map(lambda name: run_mutant(name, args.first, args.seeds), names):
        if outcome.seed is None:
            survivors.append(outcome.name)
        else:
            needed.append(outcome.seed - args.first + 1)
        seeds = "-" if outcome.seed is None else outcome.seed - args.first + 1
        print(
            f"{outcome.name:58} {seeds:>5}  {outcome.seconds:5.1f}  "
            f"{outcome.invariant or 'NOT CAUGHT'}",
            flush=True,
        )
    needed.sort()
    if needed:
        print(f"{len(needed)} caught, median {needed[len(needed) // 2]} seeds; ", end="")
    print(f"{len(survivors)} survived: {', '.join(survivors) or 'none'}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
