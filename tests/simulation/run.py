"""Run seeds, replay one, or find the fewest faults that still break it.

python -m tests.simulation.run --from 0 --seeds 100     stops at the first seed that fails
python -m tests.simulation.run --from 17 --trace        everything that happens in seed 17
python -m tests.simulation.run --from 17 --shrink       which faults seed 17 needs to fail
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from tests.simulation.invariants import Violation
from tests.simulation.plan import Plan
from tests.simulation.world import World

PROGRESS_S = 10.0


@dataclass
class Tally:
    """What a number of seeds has come to."""

    seeds: int = 0
    failed: list[int] = field(default_factory=list)
    messages: int = 0
    operations: int = 0
    simulated_ns: int = 0
    cpu_s: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, world: World, cpu_s: float) -> None:
        self.seeds += 1
        self.messages += world.network.messages
        self.operations += world.clients.operations
        self.simulated_ns += world.scheduler.now
        self.cpu_s += cpu_s
        self.counts.update(world.counts)

    def merge(self, other: Tally) -> None:
        self.seeds += other.seeds
        self.failed += other.failed
        self.messages += other.messages
        self.operations += other.operations
        self.simulated_ns += other.simulated_ns
        self.cpu_s += other.cpu_s
        self.counts.update(other.counts)

    def __str__(self) -> str:
        return (
            f"{self.seeds} seeds, {len(self.failed)} failed; "
            f"{self.simulated_ns / 3.6e12:.2f} simulated hours, {self.operations} operations, "
            f"{self.messages} messages, {self.messages / max(self.cpu_s, 0.001):.0f} per CPU second"
        )


def run_seed(seed: int, without: Collection[str] = (), trace: Any = None) -> World:
    """Raises Violation."""
    world = World(Plan(seed, without), trace)
    world.run()
    return world


def run_seeds(seeds: Iterable[int], tally: Tally, without: Collection[str] = ()) -> None:
    """All of them; adds to `tally`. Raises Violation at the first one that fails."""
    gc.freeze()  # what is there already is not looked through after each seed
    for seed in seeds:
        world = World(Plan(seed, without))
        started = time.process_time()
        try:
            world.run()
        except Violation:
            tally.failed.append(seed)
            raise
        finally:
            tally.add(world, time.process_time() - started)


def explain(seed: int, violation: Violation, without: Collection[str] = ()) -> str:
    """What failed, and how to see it again."""
    left_out = f" --without {','.join(without)!r}" if without else ""
    return (
        f"seed {seed} fails: {violation}\n"
        f"  {Plan(seed, without).describe()}\n"
        f"  replay: python -m tests.simulation.run --from {seed} --trace{left_out}\n"
        f"  shrink: python -m tests.simulation.run --from {seed} --shrink{left_out}"
    )


def fails(seed: int, without: Collection[str]) -> Violation | None:
    try:
        run_seed(seed, without)
    except Violation as violation:
        return violation
    return None


def shrink(seed: int, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The faults that may be left out while the same invariant is still violated."""
    first = fails(seed, without)
    if first is None:
        raise SystemExit(f"seed {seed} does not fail")
    for fault in Plan(seed, without).faults:
        violation = fails(seed, (*without, fault))
        if violation is not None and violation.invariant == first.invariant:
            without = (*without, fault)
            print(f"  also without {fault}: {violation.invariant}", flush=True)
    return without


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="0: until told to stop")
    parser.add_argument("--trace", action="store_true", help="print every event")
    parser.add_argument("--shrink", action="store_true")
    parser.add_argument("--without", default="", help="faults to leave out, by comma")
    parser.add_argument("--keep-going", action="store_true", help="after a seed that failed")
    args = parser.parse_args()
    without = tuple(filter(None, args.without.split(",")))
    if args.shrink:
        without = shrink(args.first, without)
        violation = fails(args.first, without)
        assert violation is not None
        print(explain(args.first, violation, without))
        return 1
    if args.trace:
        return _replay(args.first, without)
    return _run_many(args, without)


def _replay(seed: int, without: tuple[str, ...]) -> int:
    print(f"seed {seed}: {Plan(seed, without).describe()}")
    try:
        world = run_seed(seed, without, print)
    except Violation as violation:
        print(explain(seed, violation, without))
        return 1
    print(f"seed {seed} holds; trace {world.digest:08x}, log {world.checker.digest():08x}")
    return 0


def _one(seed: int, without: tuple[str, ...]) -> tuple[int, Tally, str]:
    """In a process of the pool: the seed, what it came to, and what failed, if anything did."""
    tally = Tally()
    try:
        run_seeds([seed], tally, without)
    except Violation as violation:
        return seed, tally, explain(seed, violation, without)
    return seed, tally, ""


def _on_all_cores(
    seeds: Iterable[int], without: tuple[str, ...]
) -> Iterator[tuple[int, Tally, str]]:
    """`_one` of every seed, as they end; a few are begun ahead, and given up when nobody asks."""
    jobs = os.cpu_count() or 1
    seeds, running = iter(seeds), set[Future[tuple[int, Tally, str]]]()
    # The parent alone is told to stop, and then stops them.
    pool = ProcessPoolExecutor(
        jobs, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    try:
        while True:
            for seed in itertools.islice(seeds, 2 * jobs - len(running)):
                running.add(pool.submit(_one, seed, without))
            if not running:
                return
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _run_many(args: argparse.Namespace, without: tuple[str, ...]) -> int:
    tally, shown = Tally(), time.monotonic()
    seeds = (
        itertools.count(args.first)
        if not args.seeds
        else range(args.first, args.first + args.seeds)
    )
    try:
        for seed, part, failure in _on_all_cores(seeds, without):
            tally.merge(part)
            if failure:
                print(failure, flush=True)
                if not args.keep_going:
                    break
            if time.monotonic() - shown > PROGRESS_S:
                shown = time.monotonic()
                print(f"around seed {seed}: {tally}", flush=True)
    except KeyboardInterrupt:
        pass
    print(tally)
    for what, count in sorted(tally.counts.items()):
        print(f"  {count:8} {what}")
    return 1 if tally.failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
