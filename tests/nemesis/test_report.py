"""What the report says of runs: sums, what was drawn and what had an effect, what went wrong."""

from __future__ import annotations

import json
import multiprocessing
import xml.etree.ElementTree as ET
from pathlib import Path

from tests.nemesis import report
from tests.nemesis.faults import Band
from tests.nemesis.histories import Searched
from tests.nemesis.outcome import Outcome
from tests.nemesis.plan import Plan
from tests.nemesis.resting import Usage
from tests.nemesis.run import fresh


def outcome(seed: int, folder: Path, *problems: str, broken: str = "") -> Outcome:
    return Outcome(
        Plan(seed, 5.0),
        folder,
        problems=list(problems),
        broken=broken,
        bands=[
            Band("kill", "node 1", 1.0, 2.0, effective=True),
            Band("kill", "node 2 <", 3.0, 3.5),
        ],
        acknowledged_at=[0.5, 1.5, 4.0],
        read_at=[0.7],
        counts={"200": 40, "504": 2, "unanswered": 1},
        drawn={"kill": 2, "EIO": 1},
        effective={"kill": 1},
        besides={"locks held": 3, "holders stopped": 2},
        operations=43,
        load_s=60.0,
        led=3,
        boots=4,
        peak=Usage(90_000_000, 40, 9),
        rest=Usage(70_000_000, 25, 7),
        searched=Searched(5, 30, ["r/0"]),
    )


def test_the_sums_are_those_of_all_runs(tmp_path: Path) -> None:
    """What was drawn and what had an effect are told apart, by kind."""
    runs = [report.facts(outcome(seed, tmp_path)) for seed in (1, 2)]
    assert report.summary(runs) == {
        "runs": 2,
        "failed": 0,
        "broken_off": 0,
        "minutes_under_load": 2.0,
        "operations": 86,
        "acknowledged_writes": 6,
        "besides": {"locks held": 6, "holders stopped": 4},
        "faults": {"EIO": {"drawn": 2, "effective": 0}, "kill": {"drawn": 4, "effective": 2}},
        "leader_changes": 4,
        "searched_operations": 60,
        "findings": [],
    }
    assert report.passed(runs)


def test_a_finding_and_a_run_that_broke_off_are_no_pass(tmp_path: Path) -> None:
    """Each is named with its seed, its plan and where its logs are."""
    found = report.facts(outcome(1, tmp_path / "run-1", "key r/0 is wrong\n  client 1"))
    broken = report.facts(outcome(2, tmp_path / "run-2", broken="somebody interrupted it"))
    assert not report.passed([found])
    assert not report.passed([broken])
    total = report.summary([found, broken])
    assert (total["failed"], total["broken_off"]) == (1, 1)
    assert total["findings"] == [{"seed": 1, "finding": "key r/0 is wrong\n  client 1"}]
    text = report.as_text([found, broken])
    assert "# Nemesis: 2 runs, 1 failed, 1 broken off" in text
    assert "- FAILED: key r/0 is wrong" in text
    assert "- broken off: somebody interrupted it" in text
    assert f"In {tmp_path / 'run-1'}:" in text
    assert Plan(1, 5.0).describe() in text


def test_the_table_has_a_row_for_each_run_and_each_fault(tmp_path: Path) -> None:
    text = report.as_text([report.facts(outcome(seed, tmp_path)) for seed in (1, 2)])
    rows = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[0] for row in cells[:4] if not row[0].startswith("-")] == ["seed", "1", "2"]
    assert {len(row) for row in cells[:4]} == {len(report.HEADINGS)}
    assert ["kill", "4", "2"] in cells
    assert ["all", "6", "2"] in cells
    assert "Beside the registers and lists: 6 locks held, 4 holders stopped." in text


def test_a_report_can_be_read_and_added_to_others(tmp_path: Path) -> None:
    """Facts are plain JSON: that of several processes is reported together."""
    run = report.facts(outcome(1, tmp_path, "something"))
    report.write([run], tmp_path)
    read = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert read["runs"] == [run]
    assert read["summary"] == report.summary([run])
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == report.as_text(read["runs"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_no_runs_make_a_report_too(tmp_path: Path) -> None:
    assert "0 runs, 0 failed" in report.write([], tmp_path).read_text(encoding="utf-8")


def test_the_picture_shows_faults_and_which_had_an_effect(tmp_path: Path) -> None:
    """A shadow over the curves for the one, a hollow bar for the other."""
    path = tmp_path / "run.svg"
    report.picture(outcome(1, tmp_path), path)
    text = path.read_text(encoding="utf-8")
    assert ET.fromstring(text).tag.endswith("svg")
    assert "kill: node 1" in text
    assert "kill: node 2 &lt;" in text
    assert text.count('fill-opacity="0.12"') == 1
    assert text.count('fill-opacity="0.0"') == 1


def test_a_run_that_never_began_has_a_picture_too(tmp_path: Path) -> None:
    path = tmp_path / "run.svg"
    report.picture(Outcome(Plan(1, 5.0), tmp_path), path)
    assert ET.parse(path).getroot().tag.endswith("svg")


def test_no_two_runs_share_a_folder(tmp_path: Path) -> None:
    """Also not when several processes begin one of the same seed at the same moment."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        made = pool.starmap(fresh, [(tmp_path, "run-7")] * 40)
    assert len(set(made)) == 40
    assert tmp_path / "run-7" in made
    assert tmp_path / "run-7.2" in made
