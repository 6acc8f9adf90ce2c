"""Run seeds: `python -m tests.simulation.run --from 0 --seeds 100`."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter

from tests.simulation.invariants import Violation
from tests.simulation.plan import Plan
from tests.simulation.world import World


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--trace", action="store_true", help="print every event")
    parser.add_argument("--without", default="", help="faults to leave out, by comma")
    parser.add_argument("--keep-going", action="store_true")
    args = parser.parse_args()
    without = tuple(filter(None, args.without.split(",")))
    started, messages, operations, failed = time.process_time(), 0, 0, 0
    simulated_ns = 0
    counts: Counter[str] = Counter()
    gc.freeze()  # what is there already is not looked through after each seed
    for seed in range(args.first, args.first + args.seeds):
        plan = Plan(seed, without)
        world = World(plan, print if args.trace else None)
        try:
            world.run()
        except Violation as violation:
            failed += 1
            print(f"seed {seed} ({plan.describe()})\n  {violation}", flush=True)
            if not args.keep_going:
                raise
        messages += world.network.messages
        operations += world.clients.operations
        simulated_ns += world.scheduler.now
        counts.update(world.counts)
    seconds = time.process_time() - started
    print(
        f"{args.seeds} seeds, {failed} failed, {simulated_ns / 1e9 / 3600:.2f} simulated hours, "
        f"{messages} messages, {operations} operations in {seconds:.1f} s: "
        f"{messages / seconds:.0f} messages/s"
    )
    for what, count in sorted(counts.items()):
        print(f"  {count:8} {what}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
