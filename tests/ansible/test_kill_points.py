"""Which kills of a run are tried: none that matters is left out, and why the others do not."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from tests.ansible.local import (
    LOOKS_ONLY,
    MIDST_S,
    TAKES_TIME,
    Kill,
    Task,
    chosen,
    kill_points,
    read_tasks,
)
from tests.cluster import ROOT

ROLES = ROOT / "ansible/collections/ansible_collections/dengine/core/roles"
KINDS = ("looks", "acts", "acts: Wait")  # the last one takes time


def run_of(kinds: tuple[str, ...]) -> list[Task]:
    return [Task(i, f"{i} {kind}", kind != "looks") for i, kind in enumerate(kinds, 1)]


def state_at_start(tasks: list[Task], index: int) -> list[str]:
    """What has been done when a task starts."""
    return [task.name for task in tasks[:index] if task.acts]


def test_the_start_of_every_task_is_a_point_or_the_state_of_an_earlier_point() -> None:
    """Every run of up to five tasks: each start is killed at, or a kill before it, also at a start,
    finds the same done; and no two kills at starts find the same. What takes time is killed in its
    midst besides."""
    for kinds in (k for length in range(1, 6) for k in product(KINDS, repeat=length)):
        tasks = run_of(kinds)
        points = kill_points(tasks)
        starts = [tasks.index(kill.task) for kill in points if kill.after_s == 0]
        states = [state_at_start(tasks, index) for index in starts]
        for index in range(len(tasks)):
            earlier = [state_at_start(tasks, start) for start in starts if start <= index]
            assert state_at_start(tasks, index) in earlier, kinds
        assert all(states.count(state) == 1 for state in states), kinds
        midst = [kill.task for kill in points if kill.after_s]
        assert midst == [task for task in tasks if task.takes_time], kinds
        assert {kill.after_s for kill in points} <= {0, MIDST_S}
        for kill in points:
            done = state_at_start(tasks, tasks.index(kill.task))
            assert kill.behind == (done[-1] if done else ""), kinds
            acting = [task.name for task in tasks if task.acts]
            assert kill.ahead == "".join(acting[len(done) : len(done) + 1]), kinds


def test_a_task_that_takes_time_and_follows_one_that_acts_is_killed_twice() -> None:
    first, second = Task(1, "Start it", True), Task(2, "Wait until it serves", True)
    assert kill_points([first, second]) == [
        Kill(first, 0, "", first.name),
        Kill(second, 0, first.name, second.name),
        Kill(second, MIDST_S, first.name, second.name),
    ]


def test_what_only_looks_is_read_as_such(tmp_path: Path) -> None:
    """`acts` is what callback/at_task.py wrote, but for the programs that leave nothing."""
    file = tmp_path / "tasks.txt"
    file.write_text(f"1\t0.10\tCopy\tacts\n2\t0.20\tDecide\t\n3\t0.30\t{LOOKS_ONLY[0]}\tacts\n")
    assert read_tasks(file) == [
        Task(1, "Copy", True),
        Task(2, "Decide", False),
        Task(3, LOOKS_ONLY[0], False),
    ]


def task_names() -> set[str]:
    """`ROLE : TASK` of all roles, as a run shows them."""
    return {
        f"dengine.core.{file.parents[1].name} : {line.partition('- name: ')[2]}"
        for file in ROLES.glob("*/tasks/*.yml")
        for line in file.read_text().splitlines()
        if "- name: " in line
    }


@pytest.mark.parametrize("words", [*TAKES_TIME, *LOOKS_ONLY])
def test_the_roles_still_have_a_task_of_that_name(words: str) -> None:
    """A task that gets another name would silently be killed less often, or for nothing."""
    assert any(words in name for name in task_names())
    if words in LOOKS_ONLY:
        assert words in task_names()


def test_what_no_cheaper_run_has_is_chosen_whatever_the_turn() -> None:
    """Here 'unit' and 'enable' act on hosts with systemd only. Right before, in the midst of and
    right behind them a run is always killed, once for all nodes; of the others every third."""
    names = ["copy", "look", "x : The unit", "wait, node 2", "enable, node 2", "look"]
    names += ["wait, node 3", "enable, node 3", "promote", "verify", "report"]
    points = kill_points([Task(i, name, name != "look") for i, name in enumerate(names, 1)])
    elsewhere = {"copy", "wait, node 2", "wait, node 3", "promote", "verify", "report"}
    always = {
        ("copy", "x : The unit", 0),  # at the start of the look: nothing else is done until there
        ("copy", "x : The unit", MIDST_S),
        ("x : The unit", "wait, node 2", 0),
        ("wait, node 2", "enable, node 2", 0),
        ("enable, node 2", "wait, node 3", 0),
        ("enable, node 3", "promote", 0),
    }

    def about(kill: Kill) -> tuple[str, str, float]:
        return (kill.behind, kill.ahead, kill.after_s)

    turns = [chosen(points, elsewhere, 3, turn) for turn in range(3)]
    for found in turns:
        assert always <= set(map(about, found))
        assert found == [kill for kill in points if kill in found], "in the order of the run"
    assert {kill for found in turns for kill in found} == set(points)
    others = [kill for found in turns for kill in found if about(kill) not in always]
    assert len(others) == len(set(others)) == len(points) - len(always), "each in one turn"
    assert chosen(points, elsewhere, 1, 0) == points
