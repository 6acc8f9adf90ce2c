"""What stands in two files and must agree, which nothing but a test would notice."""

from __future__ import annotations

import re

import yaml

from tests.cluster import ROOT


def test_the_machines_have_the_addresses_of_the_inventory() -> None:
    text = (ROOT / "Vagrantfile").read_text()
    block = re.search(r"^NODES = \{(.*)\}$", text, re.M)
    assert block
    machines = dict(re.findall(r'"(\w+)" => "([\d.]+)"', block[1]))
    hosts = yaml.safe_load((ROOT / "inventories/vagrant/hosts.yml").read_text())["dengine"]["hosts"]
    assert machines == {name: values["dengine_address"] for name, values in hosts.items()}
    config = (ROOT / "scripts" / "lab").read_text()
    assert dict(re.findall(r"^Host (n\d)\n    HostName (\S+)$", config, re.M)) == machines


def test_the_dynamic_inventory_names_zones_as_dengine_zones_does() -> None:
    """dengine_zones of the production inventory has other names: the example says what to set."""
    example = (ROOT / "inventories" / "aws_ec2.yml.example").read_text()
    said = re.search(r"^# +dengine_zones: \[(.*)\]$", example, re.M)
    assert said
    region = yaml.safe_load(example)["regions"][0]
    assert [zone.strip()[:-1] for zone in said[1].split(",")] == [region] * 3


def test_operators_are_sent_to_headings_that_there_are() -> None:
    document = (ROOT / "docs" / "operations.md").read_text()
    headings = re.findall(r"^#+ (.*)$", document, re.M)
    plugins = ROOT / "ansible/collections/ansible_collections/dengine/core/plugins"
    sent: list[str] = []
    for file in plugins.rglob("*.py"):
        text = re.sub(r'"\n\s*f?"', "", file.read_text())  # a string over several lines
        sent += re.findall(r"docs/operations\.md, '([^']*)'", text)
    assert sent
    assert set(sent) <= set(headings)
    links = re.findall(r"\]\(#([\w-]+)\)", document)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    assert links
    assert set(links) <= anchors
