"""A lab of its own whose machines only the playbooks touch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ansible.local import CALLBACKS, PLAYBOOK, Run, run_to_end
from tests.cluster import ROOT
from tests.lab.machines import ADDRESSES, Lab, Machine

RUN_S = 400
LOAD_STOPS_S = 40


class Site:
    """inventories/vagrant, copied, for the machines of one lab."""

    def __init__(self, lab: Lab, directory: Path, wheelhouse: Path) -> None:
        self.lab = lab
        self.machines: dict[int, Machine] = lab.machines
        self.inventory = directory / "inventory"
        self.state = self.inventory / ".dengine"
        ignored = shutil.ignore_patterns(".dengine")
        shutil.copytree(ROOT / "inventories" / "vagrant", self.inventory, ignore=ignored)
        self.wheels = self.state / "wheelhouse" / wheelhouse.name
        shutil.copytree(wheelhouse, self.wheels)

    def set_group(self, **values: Any) -> None:
        (self.inventory / "group_vars" / "all.yml").write_text(json.dumps(values))

    def play(self, playbook: str, *arguments: str, **environment: str) -> Run:
        """Run ansible/`playbook`.yml from inside the lab's network, to its end."""
        file = ROOT / "ansible" / f"{playbook}.yml"
        command = ["nice", "-n", "10", str(PLAYBOOK), "-i", str(self.inventory), str(file)]
        return run_to_end(
            [str(ROOT / "scripts" / "lab"), "exec", *command, *arguments],
            {
                **self.lab.environment,
                "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
                "ANSIBLE_NOCOLOR": "1",
                "ANSIBLE_HOME": str(self.inventory.parent / "ansible"),
                "ANSIBLE_CALLBACK_PLUGINS": str(CALLBACKS),
                "ANSIBLE_CALLBACKS_ENABLED": "at_task",
                **environment,
            },
            [m.name for m in self.machines.values()],
            RUN_S,
        )

    def learn_secrets(self) -> None:
        """From now on `Machine.request` shows the token that the playbooks have made."""
        found = json.loads((self.state / "secrets.json").read_text())
        self.lab.token, self.lab.peer_secret = found["token"], found["peer_secret"]

    def report(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.state / "reports" / f"{name}.json").read_text())
        return found

    def load(self, *, patience_s: float = 0, per_second: int = 250) -> Load:
        """Start the clients of tests/lab/load.py; a writer writes `per_second` times at most, and
        tries node after node for `patience_s`."""
        endpoints = [f"{address}:{9080 + i}" for i, address in ADDRESSES.items()]
        command = [sys.executable, "-m", "tests.lab.load", "--per-second", str(per_second)]
        command += ["--patience-s", str(patience_s)]
        return Load(self, [*command, str(self.state / "secrets.json"), *endpoints])


class Load:
    """Clients in a process of their own, inside the lab's network."""

    def __init__(self, site: Site, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [str(ROOT / "scripts" / "lab"), "exec", *command],
            cwd=ROOT,
            env=site.lab.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def phase(self, name: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()

    def end(self) -> dict[str, Any]:
        out, _ = self._process.communicate(timeout=LOAD_STOPS_S)
        assert self._process.returncode == 0, out
        found: dict[str, Any] = json.loads(out)
        return found

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()  # its child sees the end of stdin
            self._process.communicate()


@dataclass
class Grown:
    """What happened while one voter became three."""

    load: dict[str, Any]
    before: dict[str, str]
    after: dict[str, str]
    again: dict[str, int]
    stored: dict[str, dict[str, str]]  # what each host answered for the last keys written
    site: Site


def losses(load: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What the clients of a load lost connections to, by machine and reason; a 503 is no loss."""
    names = {f"{address}:{9080 + i}": f"n{i}" for i, address in ADDRESSES.items()}
    found = {
        names[endpoint]: {reason: count for reason, count in reasons.items() if reason != "503"}
        for endpoint, reasons in load["retries"].items()
    }
    return {name: reasons for name, reasons in found.items() if reasons}


def missing(load: dict[str, Any], machines: Iterable[Machine]) -> list[tuple[str, str]]:
    """(machine, key) of what was acknowledged and is not there: of each connection the last write
    and others in equal steps."""
    assert load["kept"], "nothing was acknowledged"
    assert set(load["last"].items()) <= set(load["kept"].items())
    return [
        (machine.name, key)
        for machine in machines
        for key, value in load["kept"].items()
        if machine.request("GET", f"/v1/kv/{key}").body != value.encode()
    ]


def written(machine: Machine) -> int:
    """How often the cluster was written to."""
    return int(machine.json("/v1/status")["revision"])
