"""Is every mutant caught? By the simulator, within 500 seeds, or by the tests that it names.

python -m tests.mutants.run                      all of them, one per core at a time
python -m tests.mutants.run --names vote lease   those with one of these words in their names
python -m tests.mutants.run --record             and write down how many seeds each has needed

A module is imported only once, so each mutant has a process of its own; and a catch counts only
when the same seed, or the same tests, find nothing without the mutant, in a process of its own too.
That changed code merely stumbles is no catch (`is_catch`): the next seeds are tried.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple, TextIO

from tests.mutants.edits import Mutant, infect
from tests.mutants.mutations import BY_NAME, MUTANTS
from tests.reporting import STOPPED, stdout_apart
from tests.simulation.rotation import commit
from tests.simulation.violation import Violation

SEEDS = 500  # within which each must be caught
FACTOR = 5  # times the recorded number of seeds, for a mutant that is only looked at again
LEAST = 25  # one that the very first seed caught may well pass the next few
ROOT = Path(__file__).resolve().parents[2]
NEEDED = Path(__file__).with_name("needed.json")

# For choosing as many as fit into a budget; what has been chosen gets all the time it needs.
START_S, SEED_S, TESTS_S = 1.5, 0.7, 4.0
BEFORE = 5  # seeds before the one that is known to catch it: a change may have moved that a little
GUESSED_SEEDS = 20  # of one that has no record yet


class Outcome(NamedTuple):
    """What became of one mutant.

    Attributes:
        seeds: after so many the simulator caught it; 0: tests did; None: it was not caught.
        seed: the one that did.
        by: the invariant, or the test; of one that was not caught, which accidents it had.
        control: what failed without it, so that the catch proves nothing, or why it could not be
            looked for; "" when nothing did.
    """

    name: str
    seeds: int | None
    by: str
    control: str
    seconds: float
    seed: int | None = None

    @property
    def is_caught(self) -> bool:
        return self.seeds is not None and not self.control

    def problem(self, seeds: int) -> str:
        """Why this is a failure; "" when it is none."""
        if self.control and self.seeds is None:
            return f"the mutant {self.name!r} could not be run: {self.control}"
        if self.control:
            return f"without the mutant {self.name!r} it fails as well: {self.control}"
        if self.seeds is None:
            judge = BY_NAME[self.name].tests or f"{seeds} seeds"
            stumbled = f"; it stumbled {self.by}" if self.by else ""
            return f"the mutant {self.name!r} survived {judge}{stumbled}"
        return ""


# --- in a process of its own ----------------------------------------------------------------------


def hunt(name: str, first: int, seeds: int) -> int:
    """Print the first seed that catches the mutant, and how."""
    infect(BY_NAME[name])
    from tests.simulation.loop import Crash
    from tests.simulation.run import Endless, run_seed

    gc.freeze()
    stumbled: Counter[str] = Counter()
    for seed in range(first, first + seeds):
        try:
            run_seed(seed)
        except Violation as violation:
            if is_catch(violation, BY_NAME[name].by):
                print(f"{seed}\t{violation.invariant}")
                return 0
            stumbled[_origin(violation)] += 1
        except (Exception, Crash) as error:
            stumbled[type(error).__name__] += 1
        except Endless as error:  # the next one may take as long
            stumbled[type(error).__name__] += 1
            break
    print(f"survived\t{', '.join(f'{n} times by {what}' for what, n in stumbled.items())}")
    return 0


def is_catch(violation: Violation, by: str = "") -> bool:
    """Or an accident?

    An invariant has caught it, or an assertion that dengine makes on purpose, and in production
    too, or a process has ended on purpose and for no reason. That the changed code stumbles
    (KeyError, an `assert` for the sake of a type, an error that is an answer to somebody and ends a
    cycle) says nothing about who finds one that does not.

    Args:
        by: the only invariant that counts.
    """
    from dengine.errors import DataCorruption, FatalError, IdentityError, InvariantBroken

    if by:
        return violation.invariant == by
    causes = _causes(violation)
    if not causes or isinstance(causes[-1], FatalError):
        return True
    own = any(isinstance(c, DataCorruption | IdentityError | InvariantBroken) for c in causes)
    return own and not isinstance(causes[-1], AssertionError)


def _causes(error: BaseException) -> list[BaseException]:
    found, cause = list[BaseException](), error.__cause__
    while cause is not None:
        found.append(cause)
        cause = cause.__cause__
    return found


def _origin(violation: Violation) -> str:
    causes = _causes(violation)
    return type(causes[-1]).__name__ if causes else violation.invariant


def look_without(seed: int) -> int:
    """Print what fails in `seed` as the code is, if anything does."""
    from tests.simulation.run import examine

    failure = examine(seed)[1]
    if failure is not None:
        print(f"seed {seed}: {failure.text}")
    return 0


# --- whoever starts those -------------------------------------------------------------------------


class _Children:
    """The processes that are running now, so that all of them can be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._over = False

    def run(self, command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
        with self._lock:
            if self._over:
                raise RuntimeError("told to stop")
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self._running.add(child)
        try:
            output, errors = child.communicate()
        finally:
            with self._lock:
                self._running.discard(child)
        return subprocess.CompletedProcess(command, child.returncode, output, errors)

    def end(self) -> None:
        with self._lock:
            self._over = True
            for child in self._running:
                child.kill()


_children = _Children()


def _run_self(*args: str) -> str:
    ended = _children.run([sys.executable, "-m", "tests.mutants.run", *args])
    if ended.returncode:
        raise RuntimeError(f"{' '.join(args)} could not be run:\n{ended.stderr[-3000:]}")
    return ended.stdout.strip()


@cache
def _holds(seed: int) -> str:
    """What the seed finds in the code as it is; nothing, it should."""
    return _run_self("--control", str(seed))


def _pytest(tests: str, **environment: str) -> str:
    """The first test that fails; "" when none does."""
    plugin = ["-p", "tests.mutants.plugin"] if environment else []
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *plugin]
    ended = _children.run([sys.executable, "-m", "pytest", *options, tests], **environment)
    failed = [line for line in ended.stdout.splitlines() if line.startswith("FAILED ")]
    if ended.returncode == 1 and failed:
        return failed[0].removeprefix("FAILED ").partition(" - ")[0]
    if ended.returncode:
        raise RuntimeError(f"{tests} could not be run:\n{(ended.stdout + ended.stderr)[-3000:]}")
    return ""


@cache
def _passes(tests: str) -> str:
    """Which of these tests fails with the code as it is; none should."""
    return _pytest(tests)


def run_mutant(mutant: Mutant, first: int = 0, seeds: int = SEEDS) -> Outcome:
    """Until it is caught or has had its seeds. Whatever goes wrong concerns this mutant alone."""
    started, needed, by, seed = time.monotonic(), None, "", None
    try:
        if mutant.tests:
            by = _pytest(mutant.tests, DENGINE_MUTANT=mutant.name)
            needed, control = (0, _passes(mutant.tests)) if by else (None, "")
        else:
            seed, by, control = _hunted(mutant.name, first, seeds)
            needed = None if seed is None else seed - first + 1
    except RuntimeError as error:
        needed, control = None, str(error)
    return Outcome(mutant.name, needed, by, control, time.monotonic() - started, seed)


def _hunted(name: str, first: int, seeds: int) -> tuple[int | None, str, str]:
    """Which seed caught it, by what, and what fails without it."""
    found = _run_self("--hunt", name, "--from", str(first), "--seeds", str(seeds))
    seed, _, by = found.splitlines()[-1].partition("\t")
    if seed == "survived":
        return None, by, ""
    return int(seed), by, _holds(int(seed))


# --- what is known --------------------------------------------------------------------------------


def read_needed() -> dict[str, int]:
    """By name: after how many seeds, from 0 on, a mutant was caught when that was last recorded."""
    if not NEEDED.exists():
        return {}
    found: dict[str, int] = json.loads(NEEDED.read_text(encoding="utf-8"))
    return found


def write_needed(needed: Mapping[str, int]) -> None:
    known = {name: needed[name] for name in sorted(needed) if name in BY_NAME}
    NEEDED.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def seeds_to_look_at(mutant: Mutant, needed: Mapping[str, int]) -> tuple[int, int]:
    """The first one, and how many of them, when it is looked for again: from shortly before the one
    that caught it, which with unchanged code does so again.
    """
    known = needed.get(mutant.name)
    if known is None:
        return 0, SEEDS
    return max(known - 1 - BEFORE, 0), min(SEEDS, max(LEAST, FACTOR * known))


def cost_s(mutant: Mutant, needed: Mapping[str, int]) -> float:
    """About how long one core takes for it, with its control."""
    if mutant.tests:
        return 2 * TESTS_S
    known = needed.get(mutant.name)
    seeds = GUESSED_SEEDS if known is None else min(known, BEFORE + 1)
    return 2 * START_S + (seeds + 1) * SEED_S


def sample(
    mutants: Sequence[Mutant], number: int, budget_s: float, needed: Mapping[str, int]
) -> list[Mutant]:
    """From the `number`th on, around the list: each whose cost fits into what is left."""
    start, chosen = number % len(mutants), []
    for mutant in (*mutants[start:], *mutants[:start]):
        cost = cost_s(mutant, needed)
        if cost <= budget_s:
            chosen.append(mutant)
            budget_s -= cost
    return chosen


# --- all of them ----------------------------------------------------------------------------------


def run_all(
    mutants: Sequence[Mutant], first: int, seeds: int, *, record: bool, output: TextIO | None
) -> int:
    """Returns the exit code.

    Args:
        output: where the sums go as JSON.
    """
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    needed, outcomes, stopped = read_needed(), list[Outcome](), False
    print(f"{'mutant':62} {'seeds':>5} {'known':>5} {'s':>6}  caught by, in seed")
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for outcome in pool.map(lambda mutant: run_mutant(mutant, first, seeds), mutants):
            outcomes.append(outcome)
            print(_row(outcome, needed.get(outcome.name)), flush=True)
            if record and outcome.is_caught and outcome.seeds:
                needed[outcome.name] = outcome.seeds
                write_needed(needed)
    except KeyboardInterrupt:
        stopped = True
        _children.end()
    finally:
        pool.shutdown(cancel_futures=True)
    _print_end(outcomes, seeds)
    if output is not None:
        summary = _summary(outcomes, seeds, stopped)
        print(json.dumps(summary, indent=1), file=output, flush=True)
    if stopped:
        return STOPPED
    return 0 if all(outcome.is_caught for outcome in outcomes) else 1


def _row(outcome: Outcome, known: int | None) -> str:
    seeds = {None: "-", 0: "tests"}.get(outcome.seeds, outcome.seeds)
    by = outcome.by if outcome.is_caught else "NOT CAUGHT" if not outcome.control else "NO PROOF"
    seed = "" if outcome.seed is None else f", {outcome.seed}"
    return f"{outcome.name:62} {seeds:>5} {known or '':>5} {outcome.seconds:6.1f}  {by}{seed}"


def _median(outcomes: Sequence[Outcome]) -> float:
    """Seeds until a catch, of those that the simulator has caught."""
    return statistics.median([o.seeds for o in outcomes if o.is_caught and o.seeds] or [0])


def _summary(outcomes: Sequence[Outcome], seeds: int, stopped: bool) -> dict[str, object]:
    return {
        "commit": commit(),
        "mutants": [outcome._asdict() for outcome in outcomes],
        "caught": sum(outcome.is_caught for outcome in outcomes),
        "median_seeds": _median(outcomes),
        "seeds": sum(o.seeds or seeds for o in outcomes if not BY_NAME[o.name].tests),
        "problems": [text for o in outcomes if (text := o.problem(seeds))],
        "stopped": stopped,
    }


def _print_end(outcomes: Sequence[Outcome], seeds: int) -> None:
    for outcome in outcomes:
        if problem := outcome.problem(seeds):
            print(f"FAILED: {problem}")
    caught = sum(outcome.is_caught for outcome in outcomes)
    print(f"{caught} of {len(outcomes)} caught, median {_median(outcomes):g} seeds")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--names", nargs="*", help="parts of names")
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--record", action="store_true", help=f"in {NEEDED.name}, from seed 0 on")
    parser.add_argument("--json", action="store_true", help="print the sums as JSON")
    parser.add_argument("--hunt", help=argparse.SUPPRESS)
    parser.add_argument("--control", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.hunt is not None:
        return hunt(args.hunt, args.first, args.seeds)
    if args.control is not None:
        return look_without(args.control)
    if args.record and args.first:
        parser.error("what is recorded are seeds from 0 on: leave out --from")
    mutants: Sequence[Mutant] = MUTANTS
    if args.names is not None:
        mutants = [m for m in BY_NAME.values() if any(part in m.name for part in args.names)]
        if not mutants:
            parser.error(f"no mutant has {' or '.join(args.names)} in its name")
    output = stdout_apart() if args.json else None
    return run_all(mutants, args.first, args.seeds, record=args.record, output=output)


if __name__ == "__main__":
    sys.exit(main())
