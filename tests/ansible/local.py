"""Playbooks on this machine: a copy of inventories/local, its runs, and what they leave.

Everything lies in one temporary directory and is ended by pid. No fault is pretended: an
interpreter is wrong, a port is taken, a clock is off.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

import ansible
from examples.ansible.load import Clients, request
from examples.ansible.run import nodes_of, stop_nodes
from tests.cluster import PORTS

ROOT = Path(__file__).resolve().parents[2]
CALLBACKS = Path(__file__).with_name("callback")
# A quarter of a run's time went into compiling Ansible's own library (compiled/sitecustomize.py).
COMPILED = {
    "PYTHONPATH": str(Path(__file__).with_name("compiled")),
    "DENGINE_TEST_MODULE_UTILS": str(Path(str(ansible.__file__)).with_name("module_utils")),
}
PLAYBOOK = Path(sys.executable).with_name("ansible-playbook")
RUN_S = 480
_RECAP = re.compile(r"^(\S+)\s+: ok=\d+\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.M)
_TASK = re.compile(r"^TASK \[(.*)\] \*+$|^changed: \[([\w.-]+)", re.M)


class Task(NamedTuple):
    """A task that a run has started. `acts`: it ran something on a host."""

    number: int
    name: str
    acts: bool

    @property
    def takes_time(self) -> bool:
        """Does it wait for something, start it, or make it bit by bit? Then a kill in its midst is
        another one than at its start or its end."""
        return self.acts and any(words in self.name for words in TAKES_TIME)


# Parts of the names of tasks; test_kill_points.py looks whether the roles still have them.
TAKES_TIME = (
    *("Wait", "All become", "process", ": The unit", "Take a snapshot"),
    *(": The virtual environment", ": Install, from"),
)
# They run a program on a host that looks at something and leaves nothing.
LOOKS_ONLY = (
    "dengine.core.release : It starts, also for a user without any rights",
    "dengine.core.node : The units are sound",
)
MIDST_S = 0.5


class Kill(NamedTuple):
    """SIGKILL `after_s` into a task. `behind` is the last task before that acted, `ahead` the first
    from there on that acts, which a kill in its midst is about; "" where there is none."""

    task: Task
    after_s: float
    behind: str
    ahead: str

    def __str__(self) -> str:
        return f"{self.task.number}: {self.task.name}, {self.after_s} s in"


def read_tasks(file: Path) -> list[Task]:
    """What callback/at_task.py has written."""
    lines = [line.split("\t") for line in file.read_text().splitlines()]
    return [
        Task(int(number), name, acts == "acts" and name not in LOOKS_ONLY)
        for number, _, name, acts in lines
    ]


def kill_points(tasks: Sequence[Task]) -> list[Kill]:
    """Every kill that leaves something of its own.

    At the start of a task there is what the tasks before it did. Where the one before did nothing
    but on the controller, in memory, that is what there was at its start as well: the same kill
    again. So it is the start of the first, of each that follows one that acted, and the midst of
    those that take time.
    """
    points, behind = list[Kill](), ""
    changed = True  # since the last kill at a start
    for index, task in enumerate(tasks):
        ahead = next((later.name for later in tasks[index:] if later.acts), "")
        if changed:
            points.append(Kill(task, 0, behind, ahead))
        if task.takes_time:
            points.append(Kill(task, MIDST_S, behind, ahead))
        changed = task.acts
        if task.acts:
            behind = task.name
    return points


def chosen(points: Sequence[Kill], elsewhere: Set[str], step: int, turn: int) -> list[Kill]:
    """Of `points` those to try where every one takes minutes.

    Always each right before, in the midst of and right behind a task that no cheaper run has: whose
    name is not in `elsewhere`, those of the tasks that act there. What is done once more for
    another node is not among them. Of all others every `step`th, another part with each `turn`.
    """
    always, others, seen = set[Kill](), list[Kill](), set[tuple[str, str, float]]()
    for kill in points:
        names = {kill.ahead} if kill.after_s else {kill.ahead, kill.behind}
        kind = (_any_node(kill.behind), _any_node(kill.ahead), kill.after_s)
        if names - elsewhere - {""} and kind not in seen:
            always.add(kill)
        else:
            others.append(kill)
        seen.add(kind)
    always.update(others[turn % step :: step])
    return [kill for kill in points if kill in always]


def _any_node(name: str) -> str:
    return re.sub(r"node \d+$", "node", name)


@dataclass
class Run:
    """One finished run of ansible-playbook."""

    code: int
    output: str
    hosts: tuple[str, ...] = ()

    @property
    def changed(self) -> dict[str, int]:
        """Changed tasks by host, as the recap counts them."""
        return {host: int(count) for host, count, _, _ in _RECAP.findall(self.output)}

    def changed_outside(self, role: str) -> dict[str, int]:
        """The same without the tasks of one role: tasks with a change, by host."""
        found = dict.fromkeys(self.hosts, 0)
        task, counted = "", set[str]()
        for name, host in _TASK.findall(self.output):
            if name:
                task, counted = name, set()
            elif not task.startswith(f"{role} : ") and host not in counted:
                counted.add(host)
                found[host] += 1
        return found

    def ok(self) -> Run:
        assert self.code == 0, self.output[-6000:]
        return self

    def failed(self, *hosts: str) -> Run:
        """It came to an end that is no success, and changed nothing on any of `hosts` (all)."""
        assert self.code not in (0, -9), self.output[-6000:]
        expected = hosts or self.hosts
        assert self.changed, f"no recap: {self.output[-6000:]}"
        assert not expected or set(self.changed) == set(expected), self.output[-6000:]
        assert not any(self.changed.values()), self.output[-6000:]
        return self


def run_to_end(
    command: Sequence[str], environment: dict[str, str], hosts: Sequence[str], within_s: float
) -> Run:
    """A run of Ansible. One that takes longer is ended with all that it has started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=within_s)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        error.add_note(output[-6000:])
        raise
    return Run(process.returncode, output, tuple(hosts))


class Local:
    """A site of `count` nodes on free ports."""

    def __init__(self, directory: Path, count: int = 3) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.inventory = directory / "inventory"
        shutil.copytree(
            ROOT / "inventories" / "local",
            self.inventory,
            ignore=shutil.ignore_patterns(".dengine"),
        )
        self.base = free_base(count)
        self.set_group(dengine_port_base=self.base)
        self.hosts = [f"n{i}" for i in range(1, count + 1)]
        if count > 3:
            self._grow(count)

    def _grow(self, count: int) -> None:
        hosts = {
            f"n{i}": {"dengine_node_id": i, "dengine_zone": f"az-{'abc'[(i - 1) % 3]}"}
            for i in range(1, count + 1)
        }
        (self.inventory / "hosts.yml").write_text(yaml.safe_dump({"dengine": {"hosts": hosts}}))

    def set_group(self, **values: Any) -> None:
        self._set(self.inventory / "group_vars" / "all.yml", values)

    def skip_checks(self, names: list[str]) -> None:
        """In place of what the inventory itself skips on one machine."""
        file = self.inventory / "group_vars" / "dengine.yml"
        self._set(file, {"dengine_preflight_skip": names})

    def set_host(self, host: str, **values: Any) -> None:
        self._set(self.inventory / "host_vars" / f"{host}.yml", values)

    @staticmethod
    def _set(file: Path, values: dict[str, Any]) -> None:
        file.parent.mkdir(exist_ok=True)
        known = yaml.safe_load(file.read_text()) if file.exists() else {}
        file.write_text(yaml.safe_dump({**known, **values}))

    def environment(self, **more: str) -> dict[str, str]:
        return {
            **os.environ,
            "DENGINE_LOCAL_DIR": str(self.state),
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_HOME": str(self.directory / "ansible"),
            "ANSIBLE_REMOTE_TEMP": str(self.directory / "remote"),
            "ANSIBLE_CALLBACK_PLUGINS": str(CALLBACKS),
            "ANSIBLE_CALLBACKS_ENABLED": "at_task",
            **COMPILED,
            **more,
        }

    def play(self, playbook: str, *arguments: str, **environment: str) -> Run:
        """Run ansible/`playbook`.yml to its end."""
        file = ROOT / "ansible" / f"{playbook}.yml"
        command = [str(PLAYBOOK), "-i", str(self.inventory), str(file), *arguments]
        return run_to_end(command, self.environment(**environment), self.hosts, RUN_S)

    def port(self, host: str) -> int:
        return self.base + int(host[1:])

    def ports_are_free(self) -> bool:
        with contextlib.ExitStack() as held:
            try:
                for host in self.hosts:
                    probe = held.enter_context(socket.socket())
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", self.port(host)))
            except OSError:
                return False
        return True

    def endpoint(self, host: str) -> str:
        return f"127.0.0.1:{self.port(host)}"

    @property
    def endpoints(self) -> list[str]:
        return [self.endpoint(host) for host in self.hosts]

    @property
    def secrets(self) -> dict[str, str]:
        found: dict[str, str] = json.loads((self.state / "secrets.json").read_text())
        return found

    def clients(self) -> Clients:
        return Clients(self.endpoints, self.state / "secrets.json")

    def get(self, host: str, path: str) -> Any:
        status, body = request(self.endpoint(host), "GET", path, self.secrets["token"])
        assert status == 200, body
        return json.loads(body)

    def voters(self, host: str = "n1") -> list[int]:
        members = self.get(host, "/v1/cluster")["members"]
        return sorted(m["id"] for m in members if m["status"] == "active")

    def report(self, name: str = "expand") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.state / "reports" / f"{name}.json").read_text())
        return found

    def node_pids(self) -> list[int]:
        return nodes_of(self.state)

    def pid(self, host: str) -> int:
        (pid,) = nodes_of(self.state / "hosts" / host)
        return pid

    def data(self, host: str) -> Path:
        return self.state / "hosts" / host / "db" / host[1:]

    def close(self) -> None:
        stop_nodes(self.directory)
        # A worker of a run that was killed may wait for its parent for ever.
        for process in psutil.process_iter(["cmdline"]):
            if str(self.inventory) in (process.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def free_base(count: int) -> int:
    """A number after which `count` of `PORTS` are free."""
    for base in PORTS[os.getpid() % 500 * 10 :: 10]:
        with contextlib.ExitStack() as held:
            try:
                for number in range(base + 1, base + 1 + count):
                    probe = held.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", number))
            except OSError:
                continue
            return base
    raise AssertionError("no free ports")


@contextlib.contextmanager
def local(directory: Path, count: int = 3) -> Iterator[Local]:
    site = Local(directory, count)
    try:
        yield site
    finally:
        site.close()
