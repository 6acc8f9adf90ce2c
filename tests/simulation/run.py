"""Run seeds, replay one, or find the fewest faults that still break it.

python -m tests.simulation.run --from 0 --seeds 100     until the first seed that fails
python -m tests.simulation.run --from 0 --seconds 60    as many as that
python -m tests.simulation.run --from 17 --trace        everything that happens in seed 17
python -m tests.simulation.run --from 17 --shrink       which faults seed 17 needs to fail

A seed that fails is printed, its trace goes to build/simulation/, beside it a picture where the
clients' history contradicts itself, and it is shrunk. With --json the sums are printed as JSON, and
all else goes to stderr.

Exit codes: 0 all held, 1 one failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from tests.linearizability.timeline import as_text, write_svg
from tests.reporting import STOPPED, stdout_apart
from tests.simulation.loop import Crash
from tests.simulation.plan import Plan
from tests.simulation.rotation import commit
from tests.simulation.shrinking import shrink, write_trace
from tests.simulation.violation import NotLinearizable, Violation
from tests.simulation.workers import each
from tests.simulation.world import World

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "simulation"
PROGRESS_S, TERMINAL_S = 60.0, 3.0  # between two lines of progress; on a terminal it is one line
SEED_CPU_S = 120.0  # a hundred times what a seed takes: beyond it, it goes round in circles
SHRINK_S = 600.0
DIED = "process died"
FAULT = "fault: "  # before the name of a fault, among what a world counts


class Failure(NamedTuple):
    """`kind` is the invariant, or the class of what was raised."""

    seed: int
    kind: str
    text: str


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
    on: Counter[str] = field(default_factory=Counter)  # in how many seeds each fault was on

    def add(self, world: World, cpu_s: float) -> None:
        self.seeds += 1
        self.messages += world.network.messages
        self.operations += world.clients.operations
        self.simulated_ns += world.scheduler.now
        self.cpu_s += cpu_s
        self.counts.update(world.counts)
        self.on.update(world.plan.faults)

    def merge(self, other: Tally) -> None:
        self.seeds += other.seeds
        self.failed += other.failed
        self.messages += other.messages
        self.operations += other.operations
        self.simulated_ns += other.simulated_ns
        self.cpu_s += other.cpu_s
        self.counts.update(other.counts)
        self.on.update(other.on)

    @property
    def simulated_hours(self) -> float:
        return self.simulated_ns / 3.6e12

    @property
    def messages_per_cpu_s(self) -> float:
        return self.messages / max(self.cpu_s, 0.001)

    @property
    def rare_states(self) -> dict[str, int]:
        return {k: n for k, n in sorted(self.counts.items()) if not k.startswith(FAULT)}

    @property
    def faults(self) -> dict[str, tuple[int, int]]:
        """By kind: how often it found where to strike, and in how many seeds it was on. A habit of
        links or clocks is counted by messages and starts. What a fuse, a cut, or a disk that is to
        fail then does is a rare state.
        """
        return {name: (self.counts[FAULT + name], n) for name, n in sorted(self.on.items())}

    def __str__(self) -> str:
        return (
            f"{self.seeds} seeds, {len(self.failed)} failed; "
            f"{self.simulated_hours:.2f} simulated hours, {self.operations} operations, "
            f"{self.messages} messages, {self.messages_per_cpu_s:.0f} per CPU second of a core"
        )


class Endless(BaseException):
    """A seed used far more processor time than any needs. Nothing may catch this."""


def _endless(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise Endless(f"no end after {SEED_CPU_S:.0f} s of processor time")


@contextmanager
def limited() -> Iterator[None]:
    """Raises Endless inside of the block, and again and again until it is left."""
    before = signal.signal(signal.SIGVTALRM, _endless)
    signal.setitimer(signal.ITIMER_VIRTUAL, SEED_CPU_S, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def run_seed(seed: int, without: Collection[str] = (), trace: Any = None) -> World:
    """Raises Violation."""
    world = World(Plan(seed, without), trace)
    with limited():
        world.run()
    return world


def run_seeds(seeds: Iterable[int], tally: Tally, without: Collection[str] = ()) -> None:
    """All of them; adds to `tally`. Raises Violation at the first one that fails."""
    gc.freeze()  # what is there already is not looked through after each seed
    for seed in seeds:
        world = World(Plan(seed, without))
        started = time.process_time()
        try:
            with limited():
                world.run()
        except Violation:
            tally.failed.append(seed)
            raise
        finally:
            tally.add(world, time.process_time() - started)


def examine(
    seed: int,
    without: Collection[str] = (),
    tell: Callable[[str], None] | None = None,
    picture: Path | None = None,
) -> tuple[Tally, Failure | None]:
    """One seed, whatever comes of it: an exception, too, is a failure of this seed alone.

    Args:
        tell: of all that happens.
        picture: where to draw the fewest operations that contradict each other.
    """
    tally, started = Tally(), time.process_time()
    failure: Failure | None = None
    world: World | None = None
    try:
        world = World(Plan(seed, without), tell)
        with limited():
            world.run()
    except Violation as violation:
        failure = Failure(seed, violation.invariant, str(violation))
        if picture is not None and isinstance(violation, NotLinearizable):
            failure = Failure(seed, violation.invariant, draw(violation, picture, f"seed {seed}"))
    except (Exception, Crash, Endless) as error:
        failure = Failure(seed, type(error).__name__, traceback.format_exc().strip())
    if world is None:
        tally.seeds = 1
    else:
        tally.add(world, time.process_time() - started)
    if failure is not None:
        tally.failed.append(seed)
    return tally, failure


def draw(violation: NotLinearizable, path: Path, title: str) -> str:
    """Returns what `path` shows then, as text."""
    window = violation.shortest()
    write_svg(window, path, f"{title}, key {violation.key!r}")
    return f"[{violation.invariant}] key {violation.key!r}, drawn in {path}: {as_text(window)}"


def died(seed: int, exit_code: int) -> tuple[Tally, Failure | None]:
    """As `examine`, of a seed whose process is gone."""
    text = f"its process ended with exit code {exit_code}"
    return Tally(seeds=1, failed=[seed]), Failure(seed, DIED, text)


def explain(seed: int, what: Violation | str, without: Collection[str] = ()) -> str:
    """What failed, and how to see it again."""
    left_out = f" --without {','.join(without)!r}" if without else ""
    return (
        f"seed {seed} fails: {what}\n"
        f"  {Plan(seed, without).describe()}\n"
        f"  replay: python -m tests.simulation.run --from {seed} --trace{left_out}\n"
        f"  shrink: python -m tests.simulation.run --from {seed} --shrink{left_out}"
    )


def narrow_down(
    seed: int, without: tuple[str, ...] = (), limit_s: float = SHRINK_S
) -> Failure | None:
    """Trace a seed that fails to build/simulation/, shrink it, and trace what is left of it.

    Args:
        limit_s: for shrinking.

    Returns:
        How the rest of it fails; None when it does not fail (any more).
    """
    path = BUILD / f"seed-{seed}.txt"
    failure = _trace(seed, without, path)
    if failure is None:
        print(f"seed {seed} does not fail; its trace is in {path}")
        return None
    print(f"the trace of seed {seed} is in {path}; which faults does it need?", flush=True)

    def fails(left_out: tuple[str, ...]) -> str | None:
        found = examine(seed, left_out)[1]
        return None if found is None else found.kind

    fewest = shrink(Plan(seed, without).faults, fails, without, limit_s=limit_s)
    path = path.with_name(f"seed-{seed}-shrunk.txt")
    failure = _trace(seed, fewest, path)
    if failure is not None:
        needed = ", ".join(Plan(seed, fewest).faults) or "none"
        print(f"it needs these faults: {needed}; the trace without the others is in {path}")
        print(explain(seed, failure.text, fewest), flush=True)
    return failure


def _trace(seed: int, without: tuple[str, ...], path: Path) -> Failure | None:
    failure: Failure | None = None

    def run(tell: Callable[[str], None]) -> str:
        nonlocal failure
        tell(f"seed {seed}: {Plan(seed, without).describe()}")
        failure = examine(seed, without, tell, path.with_suffix(".svg"))[1]
        return "it holds" if failure is None else explain(seed, failure.text, without)

    write_trace(path, run)
    return failure


def _replay(seed: int, without: tuple[str, ...]) -> int:
    print(f"seed {seed}: {Plan(seed, without).describe()}")
    try:
        world = run_seed(seed, without, print)
    except Violation as violation:
        print(explain(seed, violation, without))
        return 1
    print(f"seed {seed} holds; trace {world.digest:08x}, log {world.checker.digest():08x}")
    return 0


class _Progress:
    """One line every minute; on a terminal one that is written anew every few seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._every_s = TERMINAL_S if self._terminal else PROGRESS_S
        self._started = self._shown = time.monotonic()

    def show(self, seed: int, tally: Tally) -> None:
        now = time.monotonic()
        if now - self._shown < self._every_s:
            return
        self._shown = now
        minutes, seconds = divmod(int(now - self._started), 60)
        line = f"{minutes}:{seconds:02} around seed {seed}: {tally}"
        if self._terminal:
            columns = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:columns]}", end="", flush=True)
        else:
            print(line, flush=True)

    def say(self, text: str) -> None:
        """Something that stays."""
        if self._terminal:
            print("\r\x1b[K", end="")
        print(text, flush=True)


class Session:
    """Many seeds over all cores, and what they have come to.

    Args:
        count: how many; 0: until told to stop, or `seconds` are over.
    """

    def __init__(
        self,
        first: int,
        count: int,
        seconds: float = float("inf"),
        without: tuple[str, ...] = (),
        *,
        keep_going: bool = False,
    ) -> None:
        self.tally = Tally()
        self.failures: dict[int, Failure] = {}
        self.first, self.begun = first, first
        self.stopped = False
        self._seeds = itertools.count(first) if not count else iter(range(first, first + count))
        self._without = without
        self._keep_going = keep_going
        self._started = time.monotonic()
        self._end = self._started + seconds

    def run(self) -> int:
        """Returns the exit code. Ctrl-C and SIGTERM end it at once, also in the background of a
        script, whose shell has SIGINT ignored."""
        for stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop, self._stop)
        progress = _Progress()
        try:
            for tally, failure in each(self._numbers(), self._examine, died):
                self.tally.merge(tally)
                if failure is not None:
                    self.failures[failure.seed] = failure
                    progress.say(explain(failure.seed, failure.text, self._without))
                progress.show(self.begun, self.tally)
        except KeyboardInterrupt:
            self.stopped = True
        progress.say(self.totals())
        if self.stopped:
            return STOPPED
        return 1 if self.failures else 0

    def _stop(self, number: int, frame: FrameType | None) -> NoReturn:
        self.stopped = True
        raise KeyboardInterrupt

    def _numbers(self) -> Iterator[int]:
        """Asked for the next seed as soon as a core is free. After a failure no more are begun:
        those before it have been, and are waited for, so the lowest that fails is found."""
        for seed in self._seeds:
            if self.stopped:  # what is raised in the midst of a fork, Python only prints
                raise KeyboardInterrupt
            if time.monotonic() >= self._end or (self.failures and not self._keep_going):
                return
            self.begun = seed
            yield seed

    def _examine(self, seed: int) -> tuple[Tally, Failure | None]:
        return examine(seed, self._without)

    @property
    def lowest(self) -> int | None:
        """The lowest seed that failed."""
        return min(self.failures, default=None)

    def totals(self) -> str:
        """For people."""
        lines = [str(self.tally), f"{'times':>9} {'in seeds':>9}  fault"]
        lines += [f"{n or '':>9} {on:>9}  {name}" for name, (n, on) in self.tally.faults.items()]
        lines += [f"{'times':>9}  rare state"]
        lines += [f"{count:>9}  {what}" for what, count in self.tally.rare_states.items()]
        if self.failures:
            lines.append("failed: " + ", ".join(map(str, sorted(self.failures))))
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """The same for programs."""
        tally = self.tally
        return {
            "commit": commit(),
            "first_seed": self.first,
            "last_seed": self.begun,
            "seeds": tally.seeds,
            "failed": sorted(self.failures),
            "lowest_failed": self.lowest,
            "failures": [self.failures[seed]._asdict() for seed in sorted(self.failures)],
            "stopped": self.stopped,
            "seconds": round(time.monotonic() - self._started, 3),
            "cpu_s": round(tally.cpu_s, 3),
            "simulated_hours": round(tally.simulated_hours, 6),
            "operations": tally.operations,
            "messages": tally.messages,
            "messages_per_cpu_s": round(tally.messages_per_cpu_s),
            "faults": {k: {"times": n, "seeds": on} for k, (n, on) in tally.faults.items()},
            "rare_states": tally.rare_states,
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--seeds", type=int, help="default 1; 0: until told to stop")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no more then")
    parser.add_argument("--trace", action="store_true", help="print every event")
    parser.add_argument("--shrink", action="store_true")
    parser.add_argument("--without", default="", help="faults to leave out, by comma")
    parser.add_argument("--keep-going", action="store_true", help="after a seed that failed")
    parser.add_argument("--json", action="store_true", help="print the sums as JSON")
    args = parser.parse_args()
    without = tuple(filter(None, args.without.split(",")))
    if args.trace:
        return _replay(args.first, without)
    try:
        if args.shrink:
            return 0 if narrow_down(args.first, without) is None else 1
        return _many(args, without)
    except KeyboardInterrupt:  # while a seed was being shrunk
        return STOPPED


def _many(args: argparse.Namespace, without: tuple[str, ...]) -> int:
    count = args.seeds if args.seeds is not None else int(args.seconds == float("inf"))
    session = Session(args.first, count, args.seconds, without, keep_going=args.keep_going)
    output = stdout_apart() if args.json else None
    exit_code = session.run()
    if output is not None:
        print(json.dumps(session.summary(), indent=1), file=output, flush=True)
    lowest = session.lowest
    if lowest is not None and not session.stopped:
        if session.failures[lowest].kind == DIED:
            print(f"seed {lowest} is not shrunk: it would end this process, too")
        else:
            narrow_down(lowest, without)
    return exit_code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
