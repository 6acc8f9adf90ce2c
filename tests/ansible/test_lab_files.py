"""The Vagrantfile and the inventories say the same, which nothing but a test would notice."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cluster import ROOT

VALIDATE_S = 60


def test_the_machines_have_the_addresses_of_the_inventory() -> None:
    text = (ROOT / "Vagrantfile").read_text()
    block = re.search(r"^NODES = \{(.*)\}$", text, re.M)
    assert block
    machines = dict(re.findall(r'"(\w+)" => "([\d.]+)"', block[1]))
    hosts = yaml.safe_load((ROOT / "inventories/vagrant/hosts.yml").read_text())["dengine"]["hosts"]
    assert machines == {name: values["dengine_address"] for name, values in hosts.items()}
    config = (ROOT / "scripts" / "lab").read_text()
    assert dict(re.findall(r"^Host (n\d)\n    HostName (\S+)$", config, re.M)) == machines


@pytest.mark.skipif(not shutil.which("vagrant"), reason="vagrant is not installed")
def test_vagrant_finds_the_file_sound(tmp_path: Path) -> None:
    places = {"VAGRANT_HOME": tmp_path / "home", "VAGRANT_DOTFILE_PATH": tmp_path / "machines"}
    done = subprocess.run(
        ["vagrant", "validate", "--ignore-provider"],
        cwd=ROOT,
        env={**os.environ, "LC_ALL": "C.UTF-8", **{k: str(v) for k, v in places.items()}},
        capture_output=True,
        text=True,
        timeout=VALIDATE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dynamic_inventory_names_zones_as_dengine_zones_does() -> None:
    """dengine_zones of the production inventory has other names: the example says what to set."""
    example = (ROOT / "inventories" / "aws_ec2.yml.example").read_text()
    said = re.search(r"^# +dengine_zones: \[(.*)\]$", example, re.M)
    assert said
    region = yaml.safe_load(example)["regions"][0]
    assert [zone.strip()[:-1] for zone in said[1].split(",")] == [region] * 3
