"""What a call of the nemesis makes of its runs: when it ends, how, and what it reports.

Without nodes: each run has a given outcome.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.nemesis import report, run
from tests.nemesis.outcome import UNHARMED, Outcome
from tests.nemesis.plan import Plan
from tests.nemesis.run import run_all
from tests.nemesis.trial import INTERRUPTED
from tests.reporting import STOPPED

# Of a run: "ok", why it was broken off, a finding; or what it raises.
Result = str | type[BaseException]
Start = Callable[..., int]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start so many runs as there are results; the exit code."""

    def started(*results: Result, **more: Any) -> int:
        left = list(results)

        def carried_out(plan: Plan, folder: Path, say: Callable[[str], None]) -> Outcome:
            result = left.pop(0)
            if isinstance(result, type):
                raise result
            if result in (INTERRUPTED, UNHARMED):
                return Outcome(plan, folder, broken=result)
            say("something")
            return Outcome(plan, folder, [] if result == "ok" else [result], operations=10)

        monkeypatch.setattr(run.trial, "run", carried_out)
        monkeypatch.setattr(run, "clean_up", lambda build, say: None)
        values = {
            "seed": 7,
            "minutes": 10.0,
            "runs": len(results),
            "same": False,
            "seconds": 5.0,
            "only": "",
            "jobs": 1,
            "keep_going": False,
            "quiet": True,
            "step": 1,
            "into": tmp_path,
            **more,
        }
        return run_all(argparse.Namespace(**values), (), None)

    return started


def reported(tmp_path: Path) -> list[tuple[int, str]]:
    """Seed and verdict of each run in the report."""
    whole = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert whole["summary"]["runs"] == len(whole["runs"])
    return [(row["seed"], row["verdict"]) for row in whole["runs"]]


def test_runs_that_pass_take_one_seed_after_the_other(tmp_path: Path, start: Start) -> None:
    assert start("ok", "ok", "ok") == 0
    assert reported(tmp_path) == [(7, "ok"), (8, "ok"), (9, "ok")]
    assert (tmp_path / "run-8" / "run.log").read_text(encoding="utf-8").endswith("something\n")
    assert (tmp_path / "run-8" / "run.svg").exists()


def test_a_job_takes_every_so_manieth_seed(tmp_path: Path, start: Start) -> None:
    assert start("ok", "ok", step=2) == 0
    assert reported(tmp_path) == [(7, "ok"), (9, "ok")]


def test_the_same_seed_again_has_another_folder(tmp_path: Path, start: Start) -> None:
    assert start("ok", "ok", same=True) == 0
    assert reported(tmp_path) == [(7, "ok"), (7, "ok")]
    assert {path.name for path in tmp_path.glob("run-*")} == {"run-7", "run-7.2"}


def test_a_finding_ends_it_unless_it_is_to_go_on(tmp_path: Path, start: Start) -> None:
    assert start("ok", "key r/0 is not linearizable", "ok") == 1
    assert reported(tmp_path) == [(7, "ok"), (8, "FAILED")]
    log = (tmp_path / "run-8" / "run.log").read_text(encoding="utf-8")
    assert "FAILED: key r/0 is not linearizable" in log


def test_it_goes_on_after_a_finding_when_told_to(tmp_path: Path, start: Start) -> None:
    assert start("lost", "ok", keep_going=True) == 1
    assert reported(tmp_path) == [(7, "FAILED"), (8, "ok")]


def test_a_run_that_was_interrupted_is_reported_and_no_pass(tmp_path: Path, start: Start) -> None:
    """And no other begins."""
    assert start("ok", INTERRUPTED, "ok") == STOPPED
    assert reported(tmp_path) == [(7, "ok"), (8, "broken off")]


def test_a_run_without_an_effective_fault_is_no_pass_and_the_next_begins(
    tmp_path: Path, start: Start
) -> None:
    assert start(UNHARMED, "ok") == STOPPED
    assert reported(tmp_path) == [(7, "broken off"), (8, "ok")]


def test_an_interrupt_between_runs_keeps_the_report(tmp_path: Path, start: Start) -> None:
    assert start("ok", KeyboardInterrupt) == STOPPED
    assert reported(tmp_path) == [(7, "ok")]


def test_whatever_else_ends_it_the_report_is_there(tmp_path: Path, start: Start) -> None:
    with pytest.raises(MemoryError):
        start("ok", MemoryError)
    assert reported(tmp_path) == [(7, "ok")]


def test_no_run_at_all_is_no_pass(start: Start) -> None:
    assert start(minutes=-1.0) == STOPPED


@pytest.mark.parametrize(
    ("verdicts", "code", "wrong"),
    [
        (["ok"], 0, False),
        (["FAILED"], 1, False),
        (["broken off"], STOPPED, False),
        (["ok"], 1, True),  # what Python ends with over an exception
        ([], 1, True),
        (["ok"], -signal.SIGKILL, True),
    ],
)
def test_a_job_that_has_died_is_no_pass(
    tmp_path: Path,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    verdicts: list[str],
    code: int,
    wrong: bool,
) -> None:
    """Of two the other one passes."""

    def job(args: argparse.Namespace, into: Path, number: int) -> subprocess.Popen[bytes]:
        into.mkdir()
        rows = [
            {**facts(verdict), "seed": number, "findings": ["lost"] * (verdict == "FAILED")}
            for verdict in (["ok"] if number else verdicts)
        ]
        if rows:
            (into / "report.json").write_text(json.dumps({"runs": rows}), encoding="utf-8")
        ending = "import os, signal, sys; code = int(sys.argv[1])\n"
        ending += "os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)"
        return subprocess.Popen([sys.executable, "-c", ending, str(0 if number else code)])

    monkeypatch.setattr(run, "_job", job)
    if wrong:
        with pytest.raises(RuntimeError, match=f"job-1 ended with {code}"):
            start(jobs=2)
    else:
        assert start(jobs=2) == code
    assert len(reported(tmp_path)) == len(verdicts) + 1


def facts(verdict: str) -> report.Facts:
    """Of one run that did not do much."""
    made = report.facts(Outcome(Plan(7, 5.0, ()), Path("run-7"), operations=10))
    return {**made, "verdict": verdict}


def test_the_last_report_is_also_above_the_directory_of_the_call(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a second call with the same seed has a directory of its own."""
    monkeypatch.setattr(run, "BUILD", tmp_path)
    assert start("ok", into=None) == 0
    assert start("ok", "ok", into=None) == 0
    assert reported(tmp_path) == [(7, "ok"), (8, "ok")]
    assert reported(tmp_path / "7") == [(7, "ok")]
    assert reported(tmp_path / "7.2") == [(7, "ok"), (8, "ok")]


def test_other_signals_interrupt_as_control_c_does() -> None:
    before = signal.signal(signal.SIGTERM, run._interrupt)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.signal(signal.SIGTERM, before)
