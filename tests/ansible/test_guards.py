"""Each guard of the playbooks, taken out once: the test that is named beside it must then fail.

A guard that nobody would miss is none. The pure ones are quick; those that need whole playbooks
run in the long target. Everything happens in a copy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = Path("ansible/collections/ansible_collections/dengine/core")
COPIED = ("ansible", "examples", "inventories", "tests/ansible", "tests/cluster.py")
LINKED = ("dengine", "scripts", "systemd", "tests/conftest.py", "pyproject.toml")


class Guard(NamedTuple):
    file: str
    text: str
    instead: str
    test: str


PURE = (
    Guard(
        "plugins/plugin_utils/inventory.py",
        'if options.get("limit") not in (None, "", "all"):',
        "if False:",
        "test_plan.py::test_each_guard_of_the_gate",
    ),
    Guard(
        "plugins/plugin_utils/inventory.py",
        "target < 1 or target % 2 == 0",
        "target < 1",
        "test_plan.py::test_each_guard_of_the_gate",
    ),
    Guard(
        "plugins/plugin_utils/inventory.py",
        "elif ids.setdefault(node_id, host) != host:",
        "elif False:",
        "test_plan.py::test_each_guard_of_the_gate",
    ),
    Guard(
        "plugins/plugin_utils/plan.py",
        "if survey.view or survey.unreachable or not self.nodes:",
        "if survey.view or not self.nodes:",
        "test_plan.py::test_a_host_that_cannot_be_reached_is_a_row_and_decides_nothing",
    ),
    Guard(
        "plugins/plugin_utils/plan.py",
        'if any(survey.belongs(n["host"]) for n in self.nodes):',
        "if False:",
        "test_plan.py::test_a_lost_first_host_founds_no_second_cluster",
    ),
    Guard(
        "plugins/plugin_utils/plan.py",
        "and len(chosen) < self.target",
        'and (len(chosen) < self.target or node["id"] in survey.learners)',
        "test_plan.py::test_learners_become_voters_only_where_the_target_has_room",
    ),
    Guard(
        "plugins/plugin_utils/plan.py",
        ' and node["id"] not in survey.readers',
        "",
        "test_plan.py::test_a_read_only_member_neither_joins_nor_votes",
    ),
    Guard(
        "plugins/plugin_utils/plan.py",
        "elif survey.view and voters % 2 == 0:",
        "elif False:",
        "test_plan.py::test_an_even_number_of_voters_is_never_the_target",
    ),
    Guard(
        "plugins/plugin_utils/plan.py",
        "for problem in crowded_zones(members, voters):",
        "for problem in ():",
        "test_plan.py::test_the_zones_of_the_chosen_nodes_count_whatever_is_to_spare",
    ),
    Guard(
        "plugins/plugin_utils/plan.py",
        "if len(survey.voters) > self.target:",
        "if False:",
        "test_plan.py::test_growing_does_not_shrink",
    ),
    Guard(
        "plugins/plugin_utils/faults.py",
        "        found += _lost(survey)",
        "        pass",
        "test_plan.py::test_an_earlier_cluster_whose_data_are_gone_is_not_replaced_by_a_new_one",
    ),
    Guard(
        "plugins/plugin_utils/faults.py",
        'if options.get("secrets", True):',
        "if True:",
        "test_plan.py::test_secrets_that_only_the_hosts_have_are_not_replaced",
    ),
    Guard(
        "plugins/plugin_utils/faults.py",
        'elif any(m["status"] == "active" for m in own) and not _is_known(identity, own):',
        "elif False:",
        "test_plan.py::test_a_lost_first_host_founds_no_second_cluster",
    ),
    Guard(
        "plugins/plugin_utils/faults.py",
        'elif survey.view and survey.belongs(host) not in ("", survey.view["cluster_id"]):',
        "elif False:",
        "test_plan.py::test_what_stops_a_run",
    ),
    Guard(
        "plugins/plugin_utils/faults.py",
        "    if len(found) > 1:",
        "    if False:",
        "test_plan.py::test_what_stops_a_run",
    ),
    Guard(
        "plugins/modules/dengine_member.py",
        "if len(after) % 2 == 0:",
        "if False:",
        "test_member_and_lock.py::test_member_never_makes_the_voters_even",
    ),
    Guard(
        "plugins/modules/dengine_lock.py",
        'if not holder or mine or taken or params["force"]:',
        "if True:",
        "test_member_and_lock.py::test_lock_has_one_holder_who_says_how_long_it_may_be_silent",
    ),
)

IN_PLAYBOOKS = (
    Guard(
        "roles/gate/tasks/main.yml",
        "that: gate_problems | length == 0",
        "that: gate_problems is defined",
        "test_gate.py::test_the_gate_refuses_within_seconds_and_touches_no_host",
    ),
    Guard(
        "roles/gate/tasks/main.yml",
        "when: gate_lock | bool",
        "when: false",
        "test_gate.py::test_a_second_operator_is_refused_while_the_first_is_at_work",
    ),
    Guard(
        "roles/preflight/tasks/main.yml",
        "that: preflight_failures | length == 0",
        "that: preflight_failures is defined",
        "test_gate.py::test_every_check_that_fails_is_a_row_of_one_table_and_nothing_is_changed",
    ),
    Guard(
        "roles/rollout/tasks/guard.yml",
        "that: rollout_marks | default([])",
        "that: true or rollout_marks | default([])",
        "test_gate.py::test_the_gate_refuses_within_seconds_and_touches_no_host",
    ),
)


def fails_without(guard: Guard, place: Path, *more: str) -> None:
    """The named test passes as things are, which the run of all tests shows; so not without it."""
    for name in COPIED:
        source, target = ROOT / name, place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(
                source, target, ignore=shutil.ignore_patterns("__pycache__", ".dengine")
            )
        else:
            shutil.copy(source, target)
    for name in LINKED:
        (place / name).symlink_to(ROOT / name)
    (place / "ansible.cfg").symlink_to("ansible/ansible.cfg")
    file = place / CORE / guard.file
    text = file.read_text(encoding="utf-8")
    assert text.count(guard.text) == 1, f"{guard.text!r} is not once in {guard.file}"
    file.write_text(text.replace(guard.text, guard.instead), encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("--basetemp", str(place / "tmp"), f"tests/ansible/{guard.test}", *more),
        ],
        cwd=place,
        env={**os.environ, "DENGINE_LAB_TESTS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 1, f"nobody misses {guard.text!r}:\n{done.stdout[-3000:]}"


def test_a_sound_copy_passes(tmp_path: Path) -> None:
    """Else the tests below would prove nothing."""
    nothing = Guard(PURE[0].file, PURE[0].text, PURE[0].text, "test_plan.py")
    with pytest.raises(AssertionError, match="nobody misses"):
        fails_without(nothing, tmp_path, "--noconftest")


@pytest.mark.parametrize("guard", PURE, ids=lambda g: f"{Path(g.file).stem}: {g.text.strip()}")
def test_a_guard_that_is_gone_is_missed(guard: Guard, tmp_path: Path) -> None:
    fails_without(guard, tmp_path, "--noconftest")


@pytest.mark.playbooks
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("guard", IN_PLAYBOOKS, ids=lambda g: g.file)
def test_a_guard_of_a_playbook_that_is_gone_is_missed(guard: Guard, tmp_path: Path) -> None:
    fails_without(guard, tmp_path)
