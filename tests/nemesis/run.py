"""Run the nemesis against real processes. Needs root, e2fsprogs, iproute2, nftables and strace.

python -m tests.nemesis.run --minutes 10 --seed 7      runs with the seeds 7, 8, ...
python -m tests.nemesis.run --seed 7 --runs 1          the run with seed 7 again
python -m tests.nemesis.run --seed 7 --runs 20 --same  and 20 times, or until it fails
python -m tests.nemesis.run --seed 7 --plan            what that would do
python -m tests.nemesis.run --only "kill,flip in log"  these kinds of faults alone

The schedule follows from the seed. What a cluster makes of it does not: who leads when a fault
comes depends on the machine, so a failure may need some repetitions to come again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path

from tests.nemesis import report, trial
from tests.nemesis.machines import own_tag, remove_orphans
from tests.nemesis.plan import KINDS, Plan
from tests.nemesis.trial import Outcome

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "nemesis"
RUN_S = 45.0  # of faults in a run
COMMANDS = {  # and the packages of Debian that have them
    "ip": "iproute2",
    "losetup": "mount",
    "mkfs.ext4": "e2fsprogs",
    "nft": "nftables",
    "nsenter": "util-linux",
    "strace": "strace",
}


def missing() -> str:
    """What keeps the nemesis from running here; "" when nothing does."""
    if not sys.platform.startswith("linux"):
        return "the nemesis needs Linux: network namespaces, nftables and strace"
    if os.geteuid() != 0:
        return "the nemesis needs root: it makes network namespaces and mounts"
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # where an ordinary user's PATH does not look
    lacking = [package for name, package in COMMANDS.items() if shutil.which(name) is None]
    return f"install {' '.join(lacking)} for the nemesis" if lacking else ""


def one(plan: Plan, build: Path, *, quiet: bool = False) -> Outcome:
    """One run; what it says goes to `build`, and unless `quiet` to the screen."""
    build.mkdir(parents=True, exist_ok=True)
    with (build / f"run-{plan.seed}.log").open("w", encoding="utf-8") as log:

        def say(text: str) -> None:
            log.write(text + "\n")
            log.flush()
            if not quiet:
                print(text, flush=True)

        say(plan.describe())
        outcome = trial.run(plan, build / f"work-{plan.seed}-{own_tag()}", say)
        for problem in outcome.problems:
            say(f"FAILED: {problem}")
    return outcome


def many(args: argparse.Namespace, only: Collection[str]) -> int:
    outcomes: list[Outcome] = []
    end = time.monotonic() + args.minutes * 60
    try:
        for number in itertools.count():
            if number >= args.runs if args.runs else time.monotonic() > end:
                break
            seed = args.seed if args.same else args.seed + number
            outcomes.append(one(Plan(seed, args.seconds, only), BUILD))
            if outcomes[-1].problems and not args.keep_going:
                break
    except KeyboardInterrupt:
        print("stopped; everything is removed")
    if outcomes:
        written = report.write(outcomes, BUILD)
        print(report.as_text(outcomes))
        print(f"{written.relative_to(ROOT)}, report.json and a picture of each run beside it")
    return 1 if any(outcome.problems for outcome in outcomes) else 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--runs", type=int, default=0, help="so many instead of so long")
    parser.add_argument("--same", action="store_true", help="every run with the same seed")
    parser.add_argument("--seconds", type=float, default=RUN_S, help="of faults in each run")
    parser.add_argument("--only", default="", help="kinds of faults, by comma")
    parser.add_argument("--plan", action="store_true", help="print it and do nothing")
    parser.add_argument("--keep-going", action="store_true", help="after a run that failed")
    args = parser.parse_args()
    only = tuple(filter(None, args.only.split(",")))
    unknown = set(only) - KINDS.keys()
    if unknown:
        parser.error(f"no such faults: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    if args.plan:
        for number in range(max(1, args.runs)):
            print(Plan(args.seed + number, args.seconds, only).describe())
        return 0
    reason = missing()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    for name in remove_orphans(BUILD):
        print(f"removed what an earlier run has left: {name}")
    return many(args, only)


if __name__ == "__main__":
    sys.exit(main())
