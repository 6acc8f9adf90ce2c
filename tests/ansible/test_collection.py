"""The collection where ansible-galaxy puts it: away from the repository, and complete."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ansible.local import PLAYBOOK, ROOT, Local

CORE = ROOT / "ansible" / "collections" / "ansible_collections" / "dengine" / "core"
INSTALL_S = 120


@pytest.fixture(params=["directory", "archive"])
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """As the README has it, and as a file that is built once and handed on."""
    (tmp_path / "ansible.cfg").write_text("")
    paths = {"ANSIBLE_CONFIG": tmp_path / "ansible.cfg", "ANSIBLE_HOME": tmp_path / "home"}
    environment = {**os.environ, **{name: str(path) for name, path in paths.items()}}
    galaxy = [str(PLAYBOOK.with_name("ansible-galaxy")), "collection"]

    def run(*arguments: str) -> None:
        command = [*galaxy, *arguments]
        subprocess.run(command, env=environment, check=True, timeout=INSTALL_S)

    source = str(CORE)
    if request.param == "archive":
        run("build", source, "--output-path", str(tmp_path / "built"))
        (archive,) = (tmp_path / "built").iterdir()
        source = str(archive)
    run("install", source, "--offline", "--collections-path", str(tmp_path / "collections"))
    return tmp_path / "collections" / "ansible_collections" / "dengine" / "core"


def test_it_has_all_that_the_hosts_get(installed: Path) -> None:
    """The units as files, not as links into a repository that is not there; and a wheelhouse that
    was made elsewhere is accepted, and nothing less."""
    for unit in (ROOT / "systemd").rglob("*.*"):
        copy = installed / "systemd" / unit.relative_to(ROOT / "systemd")
        if unit.is_file():
            assert not copy.is_symlink()
            assert copy.read_bytes() == unit.read_bytes()
    out = installed.parents[2] / "wheelhouse"
    command = [sys.executable, str(installed / "scripts" / "build-wheelhouse"), str(out)]
    command += ["--python", "3.11", "--arch", "x86_64"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "no checkout of dengine here" in refused.stderr
    out.mkdir()
    marker = "# python 3.11, x86_64, made from something"
    (out / "requirements.txt").write_text(f"{marker}\n")
    used = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (used.returncode, used.stdout) == (0, f"{out} is used as it is\n")


def test_unit_and_manual_say_when_a_node_is_left_alone() -> None:
    """After so many starts within so long: what they say in words follows from these numbers."""
    lines = (CORE / "systemd" / "dengine.service").read_text().splitlines()
    unit = dict(line.split("=", 1) for line in lines if "=" in line and line[0] != "#")
    starts, within_s = int(unit["StartLimitBurst"]), int(unit["StartLimitIntervalSec"])
    assert (starts, within_s) == (100, 15 * 60)
    assert within_s / starts - int(unit["RestartSec"]) == 6, "so long each may take at most"
    manual = (ROOT / "docs" / "operations.md").read_text()
    for text in (" ".join(line.lstrip("# ") for line in lines), " ".join(manual.split())):
        assert "a hundred tries within 15 minutes" in text
        assert "longer than six seconds" in text


@pytest.mark.playbooks
@pytest.mark.timeout(300)
def test_its_playbooks_run_by_their_names(installed: Path, site: Local) -> None:
    """What would be done is told with no repository in sight."""
    done = subprocess.run(
        [str(PLAYBOOK), "-i", str(site.inventory), "dengine.core.expand", "--check"],
        cwd=site.directory,
        env={
            **site.environment(),
            "ANSIBLE_CONFIG": str(installed.parents[3] / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(installed.parents[2]),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "join, in this order: n2, n3" in done.stdout
    assert str(ROOT / "ansible") not in done.stdout
