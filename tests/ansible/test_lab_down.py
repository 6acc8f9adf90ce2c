"""`make lab-down` beside the machines: what is in the checkout and in the cache goes, no more."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster import ROOT

STATE = "inventories/vagrant/.dengine/secrets.json"
VAGRANT = """#!/bin/sh
echo "$@" >>"$0.said"
[ "$1" != destroy ] || find "$VAGRANT_CWD/.vagrant" -name id -path "$DESTROYS" -delete
"""


def lab_down(checkout: Path, provider: str, destroys: str = "*") -> str:
    """Run it in a copy, with a vagrant that destroys some machines; what that was asked for."""
    shutil.copy(ROOT / "Makefile", checkout)
    (checkout / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "lab", checkout / "scripts")
    for name in (STATE, "inventories/vagrant/hosts.yml", ".vagrant/rgloader/loader.rb"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    vagrant = checkout / "bin" / "vagrant"
    vagrant.parent.mkdir()
    vagrant.write_text(VAGRANT)
    vagrant.chmod(0o755)
    cache = checkout / "cache" / "dengine"
    for lab in ("mine", "other"):
        (cache / "labs" / lab / "vagrant").mkdir(parents=True)
    (cache / "box").mkdir()
    done = subprocess.run(
        ["make", "lab-down"],
        cwd=checkout,
        env={
            **os.environ,
            "PATH": f"{vagrant.parent}:{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(cache.parent),
            "DENGINE_LAB": "mine",
            "DESTROYS": destroys,
            "VAGRANT_DEFAULT_PROVIDER": provider,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (checkout / STATE).parent.exists()
    assert (checkout / "inventories/vagrant/hosts.yml").exists()
    assert (cache / "box").exists()
    assert (cache / "labs" / "other").exists()
    said = Path(f"{vagrant}.said")
    return said.read_text() if said.exists() else ""


@pytest.mark.skipif(os.geteuid() != 0, reason="LXC machines need root")
def test_of_containers_nothing_is_left(tmp_path: Path) -> None:
    """Without a word to vagrant, which may have been killed in the middle of something."""
    assert lab_down(tmp_path, "lxc") == ""
    assert not (tmp_path / ".vagrant").exists()
    assert not (tmp_path / "cache/dengine/labs/mine").exists()


@pytest.mark.parametrize("provider", ["libvirt", "virtualbox"])
def test_of_virtual_machines_nothing_is_left(tmp_path: Path, provider: str) -> None:
    made = tmp_path / ".vagrant/machines/n1" / provider
    made.mkdir(parents=True)
    (made / "id").write_text("1")
    assert lab_down(tmp_path, provider) == "destroy -f\n"
    assert not (tmp_path / ".vagrant").exists()


def test_a_machine_that_is_left_is_not_forgotten(tmp_path: Path) -> None:
    """Somebody's own one, of another provider: vagrant must be able to find it again."""
    for provider in ("libvirt", "virtualbox"):
        made = tmp_path / ".vagrant/machines/n1" / provider
        made.mkdir(parents=True)
        (made / "id").write_text("1")
    lab_down(tmp_path, "libvirt", destroys="*/libvirt/*")
    assert (tmp_path / ".vagrant/machines/n1/virtualbox/id").exists()
