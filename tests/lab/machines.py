"""The machines of the lab as tests see them: ssh, HTTP, and a release installed by hand.

The lab is brought up by `scripts/lab`, like anybody's. With LXC it has a network of its own, so a
connection is made by a thread that has entered it; the socket can then be used from anywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import secrets
import socket
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import testinfra
from testinfra.host import Host

from tests.cluster import REQUEST_TIMEOUT_S, ROOT, Reply, exchange, wait_for

LABS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dengine" / "labs"
ADDRESSES = {1: "10.88.0.11", 2: "10.88.0.12", 3: "10.88.0.13"}
ZONES = {1: "az-a", 2: "az-b", 3: "az-c"}
CLONE_NEWNET = 0x40000000
UP_TIMEOUT_S = 900  # the first time it builds the box
COMMAND_TIMEOUT_S = 120


class Lab:
    """Three booted machines under a name of their own, so that several labs can be up at once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.peer_secret, self.token = secrets.token_hex(32), secrets.token_hex(32)
        self.machines = {i: Machine(self, i) for i in ADDRESSES}
        self._masters: list[subprocess.Popen[bytes]] = []
        self._interfaces = interfaces()
        self._network = 0  # the inode of the lab's network namespace
        # One thread that lives inside the lab's network and opens the connections.
        self._inside = ThreadPoolExecutor(1, initializer=self._enter)

    def up(self) -> None:
        self.script("up", timeout_s=UP_TIMEOUT_S)
        self._network = self._namespace.stat().st_ino
        self._masters = [machine.connection() for machine in self.machines.values()]

    def down(self) -> None:
        self._inside.shutdown(cancel_futures=True)
        for master in self._masters:
            master.kill()
            master.wait()
        self.script("down")

    def script(self, *args: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """`scripts/lab ARGS` on this lab."""
        done = subprocess.run(
            [str(ROOT / "scripts" / "lab"), *args],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        """With which `scripts/lab` means this lab."""
        return {**os.environ, "DENGINE_LAB": self.name, "VAGRANT_DEFAULT_PROVIDER": "lxc"}

    @property
    def _namespace(self) -> Path:
        return Path(f"/run/netns/dengine-{self.name}")

    def traces(self) -> dict[str, set[str]]:
        """What there is of this lab on this machine, by kind; nothing once it is down."""
        state = LABS / self.name
        named = (f"{state}/", f"dengine-{self.name}-")  # its files, its containers
        processes, mounts = set[str](), set[str]()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                line = (
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
                where = (entry / "cgroup").read_text()
                lines = (entry / "mountinfo").read_text().splitlines()
                inside = (entry / "ns" / "net").stat().st_ino == self._network
            except OSError:
                continue  # it has ended
            if inside or any(name in line or name in where for name in named):
                processes.add(f"{entry.name} {line}")
            mounts |= {mount for mount in lines if any(name in mount for name in named)}
        groups = Path("/sys/fs/cgroup")
        group = f"lxc.*.dengine-{self.name}-*"
        found = {
            "files": {str(path) for path in (state,) if path.exists()},
            "namespace": {str(path) for path in (self._namespace,) if path.exists()},
            "interfaces": interfaces() - self._interfaces,
            "cgroups": {str(path) for at in (group, f"*/{group}") for path in groups.glob(at)},
            "processes": processes,
            "mounts": mounts,
        }
        return {kind: traces for kind, traces in found.items() if traces}

    def connect(self, address: tuple[str, int], timeout_s: float) -> socket.socket:
        return self._inside.submit(socket.create_connection, address, timeout_s).result()

    def _enter(self) -> None:
        with self._namespace.open("rb") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "cannot enter the lab's network")


def interfaces() -> set[str]:
    """Of the network of this machine, outside of all labs."""
    return {path.name for path in Path("/sys/class/net").iterdir()}


@dataclass
class Machine:
    """One host of the lab. Commands run as root, requests carry the token."""

    lab: Lab
    node_id: int
    address: str = field(init=False)
    port: int = field(init=False)

    def __post_init__(self) -> None:
        self.address, self.port = ADDRESSES[self.node_id], 9080 + self.node_id

    @property
    def name(self) -> str:
        return f"n{self.node_id}"

    @property
    def ssh_config(self) -> Path:
        return LABS / self.lab.name / "ssh_config"

    @cached_property
    def host(self) -> Host:
        """For pytest-testinfra's questions."""
        return testinfra.get_host(f"ssh://{self.name}", ssh_config=str(self.ssh_config), sudo=True)

    def connection(self) -> subprocess.Popen[bytes]:
        """One that all commands share while this process lives."""
        return subprocess.Popen(
            ["ssh", "-F", str(self.ssh_config), "-M", "-N", self.name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def run(self, script: str, stdin: bytes = b"", timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """The output of a shell script that succeeded."""
        done = self.attempt(script, stdin, timeout_s)
        assert done.returncode == 0, (script, done.stdout, done.stderr)
        return done.stdout.decode().strip()

    def attempt(
        self, script: str, stdin: bytes = b"", timeout_s: float = COMMAND_TIMEOUT_S
    ) -> subprocess.CompletedProcess[bytes]:
        """A shell script that may fail."""
        return subprocess.run(
            ["ssh", "-F", str(self.ssh_config), self.name, "sudo", "bash", "-euc", quoted(script)],
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )

    def write(self, path: str, text: str, mode: str = "0644", owner: str = "root:root") -> None:
        self.run(
            f"umask 077; cat > {path}.new; chown {owner} {path}.new; chmod {mode} {path}.new; "
            f"mv -f {path}.new {path}",
            text.encode(),
        )

    def copy(self, directory: Path, to: str, names: Sequence[str] = (".",)) -> None:
        """Copy files of `directory`, owned by root, into the directory `to`."""
        tar = ["tar", "--owner=0", "--group=0", "-C", str(directory), "-c", *names]
        packed = subprocess.run(tar, capture_output=True, timeout=COMMAND_TIMEOUT_S, check=True)
        self.run(f"mkdir -p {to}; tar -C {to} -x", packed.stdout)

    # --- HTTP ---------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> Reply:
        """One request on a connection of its own; raises one of `UNREACHABLE`."""
        connection = http.client.HTTPConnection(self.address, self.port, timeout=timeout_s)
        connection.sock = self.lab.connect((self.address, self.port), timeout_s)
        with contextlib.closing(connection):
            token = {"Authorization": f"Bearer {self.lab.token}"}
            return exchange(connection, method, path, body, token if headers is None else headers)

    def json(self, path: str) -> dict[str, Any]:
        reply = self.request("GET", path)
        assert reply.ok, reply
        answer: dict[str, Any] = reply.json()
        return answer

    def ready(self) -> bool:
        return self.request("GET", "/readyz").ok

    # --- the service ----------------------------------------------------------------------------

    def unit(self, name: str = "dengine.service") -> dict[str, str]:
        """Every property that systemd knows of a unit."""
        lines = self.run(f"systemctl show {name}").splitlines()
        return dict(line.partition("=")[::2] for line in lines)

    @property
    def pid(self) -> int:
        return int(self.unit()["MainPID"])

    def journal(self, since: str = "") -> str:
        """What the service and systemd said of it, `since` a cursor of `journal_cursor`."""
        after = f"--after-cursor='{since}'" if since else ""
        read = f"journalctl --quiet --no-pager --output=cat -u dengine {after}"
        return self.run(f"journalctl --sync; {read}")  # what was said just now is in it too

    def says(self, text: str, since: str = "") -> str:
        """The journal, once it has `text`: what a process says just before its end may come after
        what systemd says of that end."""
        wait_for(lambda: text in self.journal(since), f"{text!r} in the journal of {self.name}")
        return self.journal(since)

    def journal_cursor(self) -> str:
        """Where the journal of the service ends now. Not that of all: `--after-cursor` skips one
        entry of those it shows, whether or not that is the one which the cursor names."""
        said = self.run("journalctl --sync; journalctl -u dengine -q --lines=0 --show-cursor")
        return said.rpartition("cursor: ")[2]

    def start(self) -> None:
        """Start the service as if nothing had happened to it before, and wait until it serves."""
        self.run("systemctl reset-failed dengine 2>/dev/null || true; systemctl start dengine")
        wait_for(self.ready, f"{self.name} to be ready", 30)

    def override(self, unit: Mapping[str, str] | None = None, **settings: str) -> None:
        """A drop-in, as an operator would write it; `unit` is for the section of that name."""
        lines = [f"{key}={value}\n" for key, value in (unit or {}).items()]
        lines = ["[Unit]\n", *lines, "[Service]\n"]
        lines += [f"{key}={value}\n" for key, value in settings.items()]
        self.run("mkdir -p /run/systemd/system/dengine.service.d")
        self.write("/run/systemd/system/dengine.service.d/test.conf", "".join(lines))
        self.run("systemctl daemon-reload")

    # --- by hand --------------------------------------------------------------------------------

    def install(self, wheelhouse: Path, version: str) -> None:
        """What the playbooks do, in the fewest steps. Nothing is started."""
        release = f"/opt/dengine/releases/{version}"
        self.wipe()
        self.copy(ROOT / "systemd", "/tmp/systemd")
        self.copy(wheelhouse, "/tmp/wheelhouse")
        self.run(f"""
            cd /tmp/systemd
            install -m 644 dengine* /etc/systemd/system/
            install -D -m 644 sysusers.d/dengine.conf -t /etc/sysusers.d
            install -D -m 644 tmpfiles.d/dengine.conf -t /etc/tmpfiles.d
            systemd-sysusers
            systemd-tmpfiles --create dengine.conf
            python3 -m venv --clear {release}
            {release}/bin/pip install --quiet --no-index --find-links /tmp/wheelhouse \
                --require-hashes --requirement /tmp/wheelhouse/requirements.txt
            ln -sfn releases/{version} /opt/dengine/current.new
            mv -T /opt/dengine/current.new /opt/dengine/current
            rm -r /tmp/systemd /tmp/wheelhouse
            systemctl daemon-reload
        """)
        self.write("/etc/dengine/secrets/peer_secret", self.lab.peer_secret, "0600")
        self.write("/etc/dengine/secrets/token", self.lab.token, "0600")
        self.configure()

    def wipe(self) -> None:
        """Nothing runs, and no data is left."""
        self.run(
            "systemctl stop dengine 2>/dev/null || true; rm -rf /var/lib/dengine; "
            "systemctl reset-failed"
        )

    def configure(self, extra: str = "") -> None:
        members = [(self.node_id, 2 if self.node_id == 1 else 3, 2 if self.node_id == 1 else 0)]
        if self.node_id != 1:
            members.insert(0, (1, 2, 2))
        entries = "".join(
            f'    {{ id = {i}, address = "{ADDRESSES[i]}:{9080 + i}", role = {role}, '
            f"status = {status} }},\n"
            for i, role, status in members
        )
        text = f"""\
[cluster]
node_id = {self.node_id}
listen_address = "{self.address}:{self.port}"
zone = "{ZONES[self.node_id]}"
db_root_dir = "/var/lib/dengine"
initial_cluster = [
{entries}]

[raft.membership]
promotion = "odd"

[raft.snapshot]
max_bytes_per_s = 262144

[security]
peer_secret_file = "/run/credentials/dengine.service/peer_secret"
token_file = "/run/credentials/dengine.service/token"
{extra}"""
        self.write("/etc/dengine/dengine.toml", text, "0640", "root:dengine")

    def python(self, script: str) -> Any:
        """What a Python script, run by root on the machine, printed as JSON."""
        return json.loads(self.run("python3 -", script.encode()))


def quoted(script: str) -> str:
    """One argument for the shell at the other end of ssh."""
    return "'" + script.replace("'", "'\\''") + "'"
