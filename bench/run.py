"""`make bench`: dengine beside a plain aiohttp server and a three-node etcd, in one run.

Prints the tables and saves them as bench/results/latest.md and latest.json. Exits 0 whatever the
verdict; 1 when the run itself broke, 2 on wrong usage.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from drills import grow_under_load, repeat_failover
from flame import record
from load import KEYS, preload, run_round
from machine import describe, install_missing, make_data_directory
from processes import BenchError
from report import Case, Results, markdown, save
from size_drills import Sized, grow_in_size
from state_drills import KEY_VALUE_BYTES, LargeState, ManyKeys, large_state, many_keys
from systems import Baseline, Cluster, Dengine, Etcd, Load, System, stop
from watch_drills import STALLED, WATCHERS, Watched, watch_under_load

RESULTS = Path(__file__).with_name("results")
SYSTEMS = ("baseline", "dengine", "etcd")
PARTS = ("load", "failover", "growth", "watch", "state", "restart", "size")
SIZES = (10_000, 100_000)  # keys; and as many as the restart part has
LOADS = {
    "put": Load.PUT,
    **{load.consistency: load for load in Load if load.value.startswith("GET")},
    "txn": Load.TXN,
}
CONNECTIONS = ("1", "64", "256")
PROFILED_CONNECTIONS = 64
PROFILED_S = 10


@dataclass(frozen=True)
class Options:
    """What to run, and for how long."""

    only: tuple[str, ...]
    parts: tuple[str, ...]
    loads: tuple[str, ...]
    connections: tuple[str, ...]
    rounds: int
    seconds: int
    failovers: int
    state_mib: int
    keys: int
    data_dir: Path
    keep: bool
    py_spy: bool


def _names(allowed: Sequence[str], text: str) -> tuple[str, ...]:
    chosen = text.split(",")
    for name in chosen:
        if name not in allowed:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
    return tuple(name for name in allowed if name in chosen)


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Options from the command line; exits 2 with a usage message on a mistake."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="1 round of 2 s, 3 failovers, small states"
    )
    parser.add_argument("--rounds", type=int, help="rounds of each load (3)")
    parser.add_argument("--seconds", type=int, help="length of a round (5)")
    parser.add_argument("--failovers", type=int, help="failovers of each cluster (10)")
    parser.add_argument("--state-mib", type=int, help="MiB of the large state (1024)")
    parser.add_argument("--keys", type=int, help="keys of a node, restarted or not (1000000)")
    choices = {"only": SYSTEMS, "parts": PARTS, "loads": tuple(LOADS), "connections": CONNECTIONS}
    for name, allowed in choices.items():
        parser.add_argument(
            f"--{name}",
            type=partial(_names, allowed),
            default=allowed,
            metavar="A,B",
            help=f"some of {','.join(allowed)} (all)",
        )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("/var/tmp"),
        help="where temporary data goes, on a real disk (/var/tmp)",
    )
    parser.add_argument("--keep", action="store_true", help="keep data and logs of the nodes")
    parser.add_argument(
        "--py-spy",
        action="store_true",
        help=f"also profile dengine's leader in one more PUT {PROFILED_CONNECTIONS} round of "
        f"{PROFILED_S} s (not part of the table): top functions printed, stacks saved",
    )
    given = parser.parse_args(argv)
    rounds, seconds, failovers = (1, 2, 3) if given.quick else (3, 5, 10)
    state_mib, keys = (128, 100_000) if given.quick else (1024, 1_000_000)
    options = Options(
        only=given.only,
        parts=given.parts,
        loads=given.loads,
        connections=given.connections,
        rounds=rounds if given.rounds is None else given.rounds,
        seconds=seconds if given.seconds is None else given.seconds,
        failovers=failovers if given.failovers is None else given.failovers,
        state_mib=state_mib if given.state_mib is None else given.state_mib,
        keys=keys if given.keys is None else given.keys,
        data_dir=given.data_dir,
        keep=given.keep,
        py_spy=given.py_spy,
    )
    numbers = ("rounds", "seconds", "failovers", "state_mib", "keys")
    if min(getattr(options, name) for name in numbers) < 1:
        parser.error(", ".join(f"--{n.replace('_', '-')}" for n in numbers) + " start at 1")
    return options


def say(text: str) -> None:
    """One line of progress, at once."""
    print(text, flush=True)


def run_loads(systems: Sequence[System], options: Options, results: Results) -> None:
    """Every load at every number of connections; each round visits all systems in turn."""
    for system in systems:
        say(f"writing {KEYS} keys to {system.name}")
        preload(system)
    for load in (LOADS[name] for name in options.loads):
        for connections in (int(number) for number in options.connections):
            cases = [Case(load, connections, system.name) for system in systems]
            results.cases += cases
            for number in range(options.rounds):
                # The order turns from round to round: no system always runs after the same one.
                for i in range(len(systems)):
                    at = (i + number) % len(systems)
                    cases[at].rounds.append(
                        run_round(systems[at], load, connections, options.seconds)
                    )
            figures = "  ".join(f"{c.system} {c.median(lambda r: r.ops_per_s):.0f}" for c in cases)
            say(f"{load}, {connections} connections, ops/s: {figures}")


def run_all(options: Options, directory: Path, results: Results) -> None:
    """Start what was asked for, run the chosen parts, stop everything again."""
    clusters: list[Cluster] = []
    systems: list[System] = []
    with ExitStack() as started:
        if "baseline" in options.only:
            baseline = Baseline(directory)
            started.callback(stop, baseline.nodes)
            systems.append(baseline)
        for name, kind in (("dengine", Dengine), ("etcd", Etcd)):
            if name in options.only and ("load" in options.parts or "failover" in options.parts):
                (directory / name).mkdir()
                cluster = kind(directory / name)
                started.callback(stop, cluster.nodes)
                clusters.append(cluster)
                systems.append(cluster)
        if "load" in options.parts:
            with noted(results):
                run_loads(systems, options, results)
        if options.py_spy:
            with noted(results):
                profile(clusters)
        if "failover" in options.parts:
            with noted(results):
                repeat_failover(clusters, options.failovers, results.failover_s, say)
    # Alone on the machine: it has three more nodes of its own.
    if "growth" in options.parts and "dengine" in options.only:
        with noted(results):
            results.growth = grow_under_load(directory)
    if "watch" in options.parts and "dengine" in options.only:
        results.watched = Watched(WATCHERS, STALLED)
        with noted(results):
            watch_under_load(
                directory / "watch", results.watched, options.rounds, options.seconds, say
            )
    if "state" in options.parts and "dengine" in options.only:
        results.large_state = LargeState(options.state_mib * 2**20)
        with noted(results):
            large_state(directory / "large", results.large_state, say)
    if "restart" in options.parts and "dengine" in options.only:
        results.many_keys = ManyKeys(options.keys, KEY_VALUE_BYTES)
        with noted(results):
            many_keys(directory / "keys", results.many_keys, say)
    if "size" in options.parts and "dengine" in options.only:
        for keys in sorted({*SIZES, options.keys}):
            results.sizes.append(Sized(keys))
            with noted(results):
                home = directory / f"size-{keys}"
                grow_in_size(home, results.sizes[-1], options.seconds, say)


@contextmanager
def noted(results: Results) -> Iterator[None]:
    """Write down what broke in the block and go on: the other parts still tell something."""
    try:
        yield
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        results.broken.append(str(error))


def profile(clusters: Sequence[Cluster]) -> None:
    """Print where dengine's leader spends its time under PUT load; keep the stacks."""
    for cluster in clusters:
        if cluster.name == "dengine":
            raw = RESULTS / "leader.collapsed"
            say(f"\nPUT, {PROFILED_CONNECTIONS} connections, dengine's leader; stacks: {raw}")
            say(record(cluster, Load.PUT, PROFILED_CONNECTIONS, PROFILED_S, raw))


def _leave(signum: int, frame: FrameType | None) -> None:
    # As KeyboardInterrupt does: unwinds, so that every process we started is stopped.
    raise SystemExit(128 + signum)


def main() -> int:
    """Run, print, save; the exit code."""
    options = parse_options()
    signal.signal(signal.SIGTERM, _leave)
    directory: Path | None = None
    results: Results | None = None
    try:
        wanted = ["wrk"] * bool((set(PARTS) - {"failover", "growth"}) & set(options.parts)) + [
            "etcd",
            "etcdctl",
        ] * ("etcd" in options.only and bool({"load", "failover"} & set(options.parts)))
        install_missing(wanted)
        directory = make_data_directory(options.data_dir)
        shown = {
            "rounds": f"{options.rounds} of {options.seconds} s, {KEYS} keys, values of 256 bytes"
        }
        results = Results(describe(directory), shown)
        with noted(results):
            run_all(options, directory, results)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
    finally:
        if directory is not None:
            if options.keep:
                say(f"data and logs kept in {directory}")
            else:
                shutil.rmtree(directory)
    if results is None:
        return 1
    save(results, RESULTS)
    say("\n" + markdown(results))
    say(f"saved: {RESULTS}/latest.md, {RESULTS}/latest.json")
    return 1 if results.broken else 0


if __name__ == "__main__":
    sys.exit(main())
