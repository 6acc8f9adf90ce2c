"""The books of long runs: nothing that was run is forgotten, nor run again instead of new seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import soak
from tests.reporting import STOPPED


def row(what: str, first_seed: int, seeds: int, commit: str = "a" * 40, **more: object) -> soak.Row:
    entry = {"what": what, "commit": commit, "first_seed": first_seed, "seeds": seeds}
    return {**entry, "hours": 0.5, "operations": 10, "problems": [], **more}


@pytest.fixture(autouse=True)
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(soak, "BOOKS", tmp_path / "soak" / "books.json")
    return soak.BOOKS


def test_hours_add_up_over_runs() -> None:
    assert soak.read_books() == []
    soak.enter(row("simulator", 0, 100))
    soak.enter(row("simulator", 100, 50, commit="b" * 40, problems=["seed 120: it fails"]))
    every, _, newest = soak.totals(soak.read_books()).partition("commit bbbbbbbb")
    line = next(line for line in every.splitlines() if "simulator" in line)
    assert line.split() == ["simulator", "2", "1", "150", "1.00", "20"]
    line = next(line for line in newest.splitlines() if "simulator" in line)
    assert line.split() == ["simulator", "1", "1", "50", "0.50", "10"]


def test_each_round_takes_other_seeds() -> None:
    """Also where the round before was told to stop in the middle."""
    rows = [row("simulator", 0, 100), row("simulator", 100, 7), row("nemesis", 0, 3)]
    assert soak.next_seed(rows, "simulator") == 107
    assert soak.next_seed(rows, "nemesis") == 3
    assert soak.next_seed([row("mutants", 500, 12_345)], "mutants") == 1000
    assert soak.next_seed([], "mutants") == 0


def problems(what: str, sums: str, exit_code: int, *, stopped: bool = False) -> list[str]:
    found: list[str] = soak._entry(soak.KINDS[what], sums, exit_code, stopped)["problems"]
    return found


def test_a_round_without_sums_has_failed() -> None:
    assert problems("simulator", "", -9) == ["it ended with exit code -9 and without its sums"]


SUMS = '{"runs": 2, "minutes_under_load": 6, "operations": 9, "findings": []}'  # of the nemesis


def test_a_round_that_ends_badly_has_failed_whatever_it_says() -> None:
    assert problems("nemesis", SUMS, 0) == []
    assert soak._entry(soak.KINDS["nemesis"], SUMS, 0, False)["hours"] == 0.1
    assert problems("nemesis", SUMS, 1) == ["it ended with exit code 1"]


def test_a_round_that_breaks_off_has_failed_unless_we_told_it_to() -> None:
    assert problems("nemesis", SUMS, STOPPED) == [f"it ended with exit code {STOPPED}"]
    assert problems("nemesis", SUMS, STOPPED, stopped=True) == []
