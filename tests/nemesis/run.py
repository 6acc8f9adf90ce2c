"""Run the nemesis against real processes. Needs root, e2fsprogs, iproute2, nftables and strace.

python -m tests.nemesis.run --minutes 10 --seed 7      runs with the seeds 7, 8, ...
python -m tests.nemesis.run --minutes 60 --jobs 2      two at a time, each with its own cluster
python -m tests.nemesis.run --seed 7 --runs 1          the run with seed 7 again
python -m tests.nemesis.run --seed 7 --runs 20 --same  and 20 times, or until it fails
python -m tests.nemesis.run --seed 7 --plan            what that would do
python -m tests.nemesis.run --only "kill,flip in log"  these kinds of faults alone

Each call has a directory of its own, build/nemesis/SEED, with a folder for each run; the report of
the one that ended last is in build/nemesis as well. It is written after every run, so it is there
whatever comes. With --json the sums are printed as JSON, and all else goes to stderr.

The schedule follows from the seed. What a cluster makes of it does not: who leads when a fault
comes depends on the machine, so a failure may need some repetitions to come again.

Exit codes: 0 all passed, 1 something was found, 2 it cannot run here, 130 interrupted, or no
fault of some run had an effect.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import TextIO

from tests.nemesis import report, trial
from tests.nemesis.machines import remove_orphans
from tests.nemesis.plan import KINDS, Plan
from tests.nemesis.report import Facts
from tests.reporting import STOPPED, stdout_apart

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "nemesis"
RUN_S = 45.0  # of faults in a run
HANGS_S = 300.0  # beyond the time that a run gives itself: then it waits for something that hangs
END_S = 120.0  # from an interrupt to the end of a job, which judges and removes what it made
COMMANDS = {  # and the packages of Debian that have them
    "ip": "iproute2",
    "losetup": "mount",
    "mkfs.ext4": "e2fsprogs",
    "nft": "nftables",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "strace": "strace",
}


def missing() -> str:
    """What keeps the nemesis from running here; "" when nothing does."""
    if not sys.platform.startswith("linux"):
        return "the nemesis needs Linux: network namespaces, nftables and strace"
    if os.geteuid() != 0:
        return "the nemesis needs root: it makes network namespaces and mounts"
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # where an ordinary user's PATH does not look
    lacking = {package for name, package in COMMANDS.items() if shutil.which(name) is None}
    return f"install {' '.join(sorted(lacking))} for the nemesis" if lacking else ""


def one(plan: Plan, directory: Path, *, quiet: bool = False) -> Facts:
    """One run. What it says goes into its folder, and unless `quiet` to the screen."""
    folder = fresh(directory, f"run-{plan.seed}")
    with (folder / "run.log").open("w", encoding="utf-8") as log:

        def say(text: str) -> None:
            log.write(text + "\n")
            log.flush()
            if not quiet:
                print(text, flush=True)

        clean_up(directory, say)
        say(plan.describe())
        outcome = trial.run(plan, folder, say)
        for problem in outcome.problems:
            say(f"FAILED: {problem}")
        if outcome.broken:
            say(f"broken off: {outcome.broken}")
    report.picture(outcome, folder / "run.svg")
    return report.facts(outcome)


def fresh(directory: Path, name: str) -> Path:
    """Make a directory of this name, or the next that is free: no two runs share one."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(2):
        path = directory / name
        try:
            path.mkdir()
        except FileExistsError:
            name = f"{name.partition('.')[0]}.{number}"
        else:
            return path
    raise AssertionError("numbers do not end")


def clean_up(build: Path, say: Callable[[str], None]) -> None:
    """What killed runs have left. What cannot be removed is in nobody's way."""
    try:
        for name in remove_orphans(build):
            say(f"removed what an earlier run has left: {name}")
    except RuntimeError as error:
        say(f"of an earlier run: {error}")


def many(
    args: argparse.Namespace, only: Collection[str], directory: Path, runs: list[Facts]
) -> None:
    """Runs one after the other, added to `runs`; the report grows with each."""
    began = time.monotonic()
    for number in itertools.count():
        spent_min = (time.monotonic() - began) / 60
        if number >= args.runs if args.runs else spent_min > args.minutes:
            break
        plan = Plan(args.seed if args.same else args.seed + number * args.step, args.seconds, only)
        signal.alarm(int(trial.longest_s(plan) + HANGS_S))
        try:
            runs.append(one(plan, directory, quiet=args.quiet))
        finally:
            signal.alarm(0)
        report.write(runs, directory)
        spent_min = (time.monotonic() - began) / 60
        goal = f"{args.runs} runs" if args.runs else f"{args.minutes:.0f} minutes"
        said = f"run {len(runs)}, {spent_min:.1f} minutes of {goal}: {report.line(runs[-1])}"
        print(said, flush=True)
        interrupted = runs[-1]["broken_off"] == trial.INTERRUPTED
        if interrupted or (runs[-1]["findings"] and not args.keep_going):
            break


def shared(args: argparse.Namespace, directory: Path, runs: list[Facts]) -> None:
    """The same by several processes, of which each takes every so manieth seed. One that has found
    something ends; the others go on.

    Raises:
        RuntimeError: a job ended in a way that says nothing about its runs.
    """
    jobs = [
        (directory / f"job-{job + 1}", _job(args, directory / f"job-{job + 1}", job))
        for job in range(args.jobs)
        if not args.runs or job < args.runs
    ]
    try:
        for _, process in jobs:
            process.wait()
    finally:
        _end([process for _, process in jobs], directory)
        found = [_runs_of(path) for path, _ in jobs]
        runs += sorted(itertools.chain(*found), key=lambda run: int(run["seed"]))
    for (path, process), its_runs in zip(jobs, found, strict=True):
        code = process.returncode
        # 1 is also what Python ends with over an exception that nobody has expected.
        unexplained = code == 1 and not any(run["findings"] for run in its_runs)
        if unexplained or code not in (0, 1, STOPPED):
            raise RuntimeError(f"{path} ended with {code}: what it ran is unknown")


def _runs_of(directory: Path) -> list[Facts]:
    """What the report of a job says, if it has come to one."""
    with contextlib.suppress(FileNotFoundError):
        text = (directory / "report.json").read_text(encoding="utf-8")
        runs: list[Facts] = json.loads(text)["runs"]
        return runs
    return []


def _job(args: argparse.Namespace, into: Path, job: int) -> subprocess.Popen[bytes]:
    """A process that ends when this one does, and gets its signals from nobody else."""
    options = ["--seed", str(args.seed if args.same else args.seed + job), "--into", str(into)]
    options += ["--minutes", str(args.minutes), "--seconds", str(args.seconds)]
    options += ["--step", str(args.jobs), "--only", args.only, "--quiet"]
    options += ["--runs", str(len(range(job, args.runs, args.jobs)))] if args.runs else []
    options += ["--same"] * args.same + ["--keep-going"] * args.keep_going
    command = ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "tests.nemesis.run"]
    return subprocess.Popen(
        [*command, *options], cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True
    )


def _end(processes: Collection[subprocess.Popen[bytes]], directory: Path) -> None:
    """Interrupt those that still run, once, and wait until they have removed what they made."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + END_S
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            clean_up(directory, print)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM and SIGHUP end a run as Control-C does: whatever that does at the moment."""
    handler = signal.getsignal(signal.SIGINT)
    assert callable(handler)
    handler(number, frame)


def _hangs(*_: object) -> None:
    raise TimeoutError("the run hangs")


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
    parser.add_argument("--jobs", type=int, default=1, help="so many runs at a time")
    parser.add_argument("--plan", action="store_true", help="print it and do nothing")
    parser.add_argument("--keep-going", action="store_true", help="after a run that failed")
    parser.add_argument("--quiet", action="store_true", help="a line for each run, not its log")
    parser.add_argument("--json", action="store_true", help="print the sums as JSON")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # of a job: its directory
    parser.add_argument("--step", type=int, default=1, help=argparse.SUPPRESS)  # of a job
    args = parser.parse_args()
    only = tuple(filter(None, args.only.split(",")))
    unknown = set(only) - KINDS.keys()
    if unknown:
        parser.error(f"no such faults: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    if args.jobs < 1:
        parser.error("--jobs takes 1 or more")
    if args.plan:
        for number in range(max(1, args.runs)):
            print(Plan(args.seed + number, args.seconds, only).describe())
        return 0
    reason = missing()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    output = stdout_apart() if args.json else None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, _interrupt)
    signal.signal(signal.SIGALRM, _hangs)
    return run_all(args, only, output)


def run_all(args: argparse.Namespace, only: Collection[str], output: TextIO | None) -> int:
    """Everything that is asked for, and the report; the exit code."""
    clean_up(BUILD, print)
    directory = args.into or fresh(BUILD, str(args.seed))
    runs: list[Facts] = []
    interrupted = False
    try:
        if args.jobs > 1:
            shared(args, directory, runs)
        else:
            many(args, only, directory, runs)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        written = report.write(runs, directory)
    if args.into is None:
        report.write(runs, BUILD)
        print(report.as_text(runs))
        print(f"{written}, and report.json and the folders of the runs beside it")
    if output is not None:
        print(json.dumps(report.summary(runs), indent=1), file=output, flush=True)
    if any(run["findings"] for run in runs):
        return 1
    return STOPPED if interrupted or not report.passed(runs) else 0


if __name__ == "__main__":
    sys.exit(main())
