"""docs/failure-cases.md: all cases are there, and whatever is to answer them exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.nemesis.plan import KINDS
from tests.simulation.plan import FAULTS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CASES = {
    **{"E": 12, "R": 12, "M": 13, "N": 12, "S": 14, "D": 8},
    **{"C": 8, "W": 6, "T": 6, "H": 9, "P": 7, "A": 7},
}

_QUOTED = re.compile(r"`([^`]+)`")
_PART = re.compile(r"\b(Simulator|Nemesis): ([^.]*)")
_INVARIANTS = re.compile(r"invariants? ([\d, ]+)")


class Row(NamedTuple):
    """A line of a table. `answer`: what is said of tests; `faults`: by who does them."""

    number: str
    case: str
    answer: str
    faults: dict[str, str]


def rows() -> Iterator[Row]:
    for line in (DOCS / "failure-cases.md").read_text("utf-8").splitlines():
        if re.match(r"\| [A-Z]\d", line):
            number, case, answer = (cell.strip() for cell in line.split("|")[1:-1])
            faults = {found[1]: found[2] for found in _PART.finditer(answer)}
            yield Row(number, case, _PART.sub("", answer), faults)


ROWS = list(rows())


@cache
def names_in(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return frozenset(
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    )


def invariants() -> set[int]:
    """The numbers in the table of docs/correctness.md."""
    text = (DOCS / "correctness.md").read_text("utf-8")
    table = text.split("| number | invariant |")[1].split("\n\n")[0]
    numbers = re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE)
    return {int(number) for cell in numbers for number in cell.split(",")}


def test_every_case_is_there_once() -> None:
    expected = [f"{kind}{n + 1}" for kind, count in CASES.items() for n in range(count)]
    assert len(expected) == 114
    assert [row.number for row in ROWS] == expected
    assert len({row.case for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.number)
def test_what_answers_a_case_exists(row: Row) -> None:
    file = None
    for name in _QUOTED.findall(row.answer):
        path, _, test = name.partition("::")
        if path:
            file = ROOT / path
            assert file.is_file(), name
        if test:
            assert file is not None, name
            assert test in names_in(file), name
    by_simulator = row.faults.get("Simulator", "")
    assert set(_QUOTED.findall(by_simulator)) <= FAULTS.keys()
    assert set(_QUOTED.findall(row.faults.get("Nemesis", ""))) <= KINDS.keys()
    for numbers in _INVARIANTS.findall(by_simulator):
        named = [int(number) for number in numbers.split(",") if number.strip()]
        assert set(named) <= invariants()
    assert file is not None or row.faults or row.answer.startswith("Not covered: ")
