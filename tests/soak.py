"""Simulator, mutants and nemesis in turn, until told to stop, and books of all of it.

python -m tests.soak                       each in turn, 20 minutes at a time
python -m tests.soak --minutes 60
python -m tests.soak --what simulator nemesis
python -m tests.soak --books               what all soaks here have come to so far

Every round goes on with the seeds after those of the rounds before it, of this soak and of earlier
ones, and is entered in build/soak/books.json when it ends, with its commit. So hours add up.

Exit codes: 0 nothing failed (with --books), 1 a round of this soak failed, 130 told to stop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tests.mutants.run import SEEDS
from tests.reporting import STOPPED
from tests.simulation.rotation import commit

ROOT = Path(__file__).resolve().parents[1]
BOOKS = ROOT / "build" / "soak" / "books.json"
STOP_S = 180.0  # from being told to stop to the end of a round, which removes what it has made
CANNOT_RUN = 2  # exit code of the nemesis where something is missing

Row = dict[str, Any]
Sums = Mapping[str, Any]


class Kind(NamedTuple):
    """One of the things that take turns.

    Attributes:
        command: of a round, from the first seed and the minutes it has.
        entry: what the books say of it, from the sums that it prints: `seeds` that were run,
            `hours`, simulated or under load, `operations`, and `problems`, as text.
        step: by how many seeds the next round begins later, where that is always the same.
    """

    command: Callable[[int, float], list[str]]
    entry: Callable[[Sums], Row]
    step: int = 0


def _simulator(first: int, minutes: float) -> list[str]:
    options = ["--from", str(first), "--seconds", str(minutes * 60), "--keep-going"]
    return ["tests.simulation.run", *options]


def _simulator_entry(sums: Sums) -> Row:
    return {
        "seeds": sums["seeds"],
        "hours": sums["simulated_hours"],
        "operations": sums["operations"],
        "messages": sums["messages"],
        "problems": [f"seed {f['seed']}: {f['text']}" for f in sums["failures"]],
    }


def _mutants(first: int, minutes: float) -> list[str]:
    """All of them, with seeds that they have not been looked for in; that takes what it takes."""
    return ["tests.mutants.run", "--from", str(first)]


def _mutants_entry(sums: Sums) -> Row:
    return {
        "seeds": sums["seeds"],
        "hours": 0.0,
        "operations": 0,
        "caught": sums["caught"],
        "median_seeds": sums["median_seeds"],
        "problems": sums["problems"],
    }


def _nemesis(first: int, minutes: float) -> list[str]:
    return ["tests.nemesis.run", "--seed", str(first), "--minutes", str(minutes), "--quiet"]


def _nemesis_entry(sums: Sums) -> Row:
    return {
        "seeds": sums["runs"],
        "hours": sums["minutes_under_load"] / 60,
        "operations": sums["operations"],
        "problems": [f"seed {f['seed']}: {f['finding']}" for f in sums["findings"]],
    }


KINDS = {
    "simulator": Kind(_simulator, _simulator_entry),
    "mutants": Kind(_mutants, _mutants_entry, SEEDS),
    "nemesis": Kind(_nemesis, _nemesis_entry),
}


# --- the books ------------------------------------------------------------------------------------


def read_books() -> list[Row]:
    """All rounds so far, oldest first."""
    if not BOOKS.exists():
        return []
    rows: list[Row] = json.loads(BOOKS.read_text(encoding="utf-8"))
    return rows


def enter(row: Row) -> None:
    """One more round. The file is whole at any moment."""
    BOOKS.parent.mkdir(parents=True, exist_ok=True)
    draft = BOOKS.with_suffix(".tmp")
    draft.write_text(json.dumps([*read_books(), row], indent=1) + "\n", encoding="utf-8")
    os.replace(draft, BOOKS)


def next_seed(rows: Sequence[Row], what: str) -> int:
    """After all that were ever run."""
    step = KINDS[what].step
    ends = [row["first_seed"] + (step or row["seeds"]) for row in rows if row["what"] == what]
    return max(ends, default=0)


def totals(rows: Sequence[Row]) -> str:
    """For people: by kind, over all commits and of the newest alone."""
    newest = rows[-1]["commit"] if rows else ""
    lines = [f"{'':12} {'rounds':>6} {'failed':>6} {'seeds':>8} {'hours':>8} {'operations':>11}"]
    ours = [row for row in rows if row["commit"] == newest]
    for title, some in (("all commits", rows), (f"commit {newest[:8]}", ours)):
        lines.append(title)
        for what in KINDS:
            mine = [row for row in some if row["what"] == what]
            failed = sum(bool(row["problems"]) for row in mine)
            seeds, hours, operations = (
                sum(row[name] for row in mine) for name in ("seeds", "hours", "operations")
            )
            lines.append(
                f"  {what:10} {len(mine):>6} {failed:>6} {seeds:>8} {hours:>8.2f} {operations:>11}"
            )
    return "\n".join(lines)


# --- rounds ---------------------------------------------------------------------------------------


def run_round(what: str, first: int, minutes: float) -> tuple[Row | None, bool]:
    """One round, up to its entry in the books.

    Returns:
        The row, None where this cannot run here; and whether we were told to stop meanwhile.
    """
    kind, began, started = KINDS[what], datetime.now(UTC), time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", *kind.command(first, minutes), "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is ours, and we pass it on
    )
    try:
        output, stopped = child.communicate()[0], False
    except KeyboardInterrupt:
        output, stopped = _stop(child), True
    if child.returncode == CANNOT_RUN:
        return None, stopped
    row: Row = {
        "what": what,
        "commit": commit(),
        "began": began.isoformat(timespec="seconds"),
        "minutes": round((time.monotonic() - started) / 60, 2),
        "first_seed": first,
        "result": "stopped" if stopped else "ok",
        **_entry(kind, output, child.returncode, stopped),
    }
    if row["problems"]:
        row["result"] = "failed"
    enter(row)
    return row, stopped


def _entry(kind: Kind, output: str, exit_code: int, stopped: bool) -> Row:
    """What the books say of a round; `stopped`: we told it to stop, else it breaks off nothing."""
    try:
        entry = kind.entry(json.loads(output))
    except (ValueError, KeyError):
        problem = f"it ended with exit code {exit_code} and without its sums"
        return {"seeds": 1, "hours": 0.0, "operations": 0, "problems": [problem]}
    if exit_code not in ((0, STOPPED) if stopped else (0,)) and not entry["problems"]:
        entry["problems"] = [f"it ended with exit code {exit_code}"]
    return entry


def _stop(child: subprocess.Popen[str]) -> str:
    """Have it end, with what it has come to so far."""
    child.send_signal(signal.SIGTERM)
    try:
        return child.communicate(timeout=STOP_S)[0]
    except (subprocess.TimeoutExpired, KeyboardInterrupt):  # or told a second time
        os.killpg(child.pid, signal.SIGKILL)
        return child.communicate()[0]


def soak(kinds: Sequence[str], minutes: float) -> int:
    """Until told to stop; returns the exit code."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    left, failed, stopped = list(kinds), False, False
    try:
        for number in itertools.count():
            if not left or stopped:
                break
            what = left[number % len(left)]
            first = next_seed(read_books(), what)
            print(f"=== {what} from seed {first} ===", file=sys.stderr, flush=True)
            row, stopped = run_round(what, first, minutes)
            if row is None:
                print(f"{what} cannot run here: it is left out", file=sys.stderr)
                left.remove(what)
                continue
            for problem in row["problems"]:
                print(f"FAILED: {what}: {problem}", file=sys.stderr, flush=True)
            failed = failed or bool(row["problems"])
    except KeyboardInterrupt:  # between two rounds
        pass
    print(totals(read_books()))
    print(f"the books are in {BOOKS.relative_to(ROOT)}")
    return 1 if failed else STOPPED


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="of one round")
    parser.add_argument("--what", nargs="*", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--books", action="store_true", help="print what they say, and do nothing")
    args = parser.parse_args()
    if args.books:
        print(totals(read_books()))
        return 0
    return soak(args.what, args.minutes)


if __name__ == "__main__":
    sys.exit(main())
