"""What is refused before anything is touched: the gate, the preflight, a second operator.

Each fault is a real one. A refusal changes nothing (`Run.failed` says so) and names what to do.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.dengine.core.plugins.plugin_utils import run_lock

from tests.ansible.local import PLAYBOOK, ROOT, Local, Run
from tests.cluster import wait_for

pytestmark = pytest.mark.timeout(400)
FULL = bool(os.environ.get("DENGINE_LAB_TESTS"))  # make ansible-full
DELAY_S = 0.03


def failed_rows(run: Run) -> set[tuple[str, str]]:
    """(host, check) of every row of the table that says FAILED."""
    return set(re.findall(r"([\w-]+) +(\w+) +FAILED", run.failed().output))


@contextlib.contextmanager
def taken(port: int) -> Iterator[None]:
    """Somebody else's web server on a port."""
    handler = http.server.SimpleHTTPRequestHandler
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        handler.log_message = lambda *_: None  # type: ignore[method-assign]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def far_away(port: int, behind: int) -> Iterator[None]:
    """A proxy on `port` that needs DELAY_S to pass on to `behind`."""
    with socket.create_server(("127.0.0.1", port)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    link, _ = server.accept()
                    threading.Thread(target=forward, args=(link,), daemon=True).start()

        def forward(link: socket.socket) -> None:
            with (
                contextlib.suppress(OSError),
                link,
                socket.create_connection(("127.0.0.1", behind)) as onward,
            ):
                asked = link.recv(65536)
                threading.Event().wait(DELAY_S)  # the way is long
                onward.sendall(asked)
                while said := onward.recv(65536):
                    link.sendall(said)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(5)


def python_with(directory: Path, name: str, code: str) -> str:
    """An interpreter that runs `code` first."""
    place = directory / name
    place.mkdir()
    (place / "sitecustomize.py").write_text(code)
    wrapper = place / "python3"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={place} exec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    return str(wrapper)


OLD_PYTHON = "import sys\nsys.version_info = (3, 9, 2, 'final', 0)\n"


def clock_that_is(status: str) -> str:
    """What adjtimex says of the kernel's clock: 0x40 is STA_UNSYNC."""
    return f"""
import ctypes, struct
class Libc:
    def __init__(self, *_, **__): pass
    def adjtimex(self, buffer):
        struct.pack_into("i", buffer, 8 + 4 * ctypes.sizeof(ctypes.c_long), {status})
        return 5 if {status} else 0
ctypes.CDLL = Libc
"""


WRONG_CLOCK = "import time\nright = time.time\ntime.time = lambda: right() - 5\n"


def test_every_check_that_fails_is_a_row_of_one_table_and_nothing_is_changed(
    site: Local, tmp_path: Path
) -> None:
    """A taken port, a clock that is five seconds off, a disk too small, an old Python, a long way:
    one run tells all of it, on the right hosts, and says how to go on."""
    site.set_host("n2", dengine_preflight_limits={"disk_free_mb": 10**9})
    site.set_host("n3", ansible_python_interpreter=python_with(tmp_path, "clock", WRONG_CLOCK))
    with taken(site.port("n1")):
        rows = failed_rows(run := site.play("expand"))
    assert ("n1", "port") in rows
    assert ("n2", "disk_space") in rows
    clocks = {host for host, check in rows if check == "clock_offset"}
    assert {"n2", "n3"} <= clocks
    assert {check for _, check in rows} <= {"port", "disk_space", "clock_offset"}
    assert "-> make room" in run.output
    assert "dengine_preflight_skip" in run.output
    assert site.node_pids() == []
    assert not (site.state / "hosts" / "n2").exists()


def test_check_mode_comes_to_its_end_and_changes_nothing(site: Local) -> None:
    """From nothing, with a list of checks as a person types it; what it tells is compared with a
    real run in the full target."""
    names = "time_sync,filesystem,fsync,memory"
    run = site.play("expand", "--check", "--diff", "-e", f"dengine_preflight_skip={names}").ok()
    assert all(run.changed.values())
    assert "Check mode: nothing was changed." in run.output
    assert "Unable to find" not in run.output, "wheels, of which a process has none"
    assert not site.state.exists()
    assert site.node_pids() == []


# The check, the fault on n3, and the hosts whose row it fails: a way has two ends.
FAULTS: dict[str, tuple[Any, set[str]]] = {
    "port": ("taken", {"n3"}),
    "disk_space": ({"dengine_preflight_limits": {"disk_free_mb": 10**9}}, {"n3"}),
    "memory": ({"dengine_preflight_limits": {"memory_mb": 10**9}}, {"n3"}),
    "fsync": ({"dengine_preflight_limits": {"fsync_p99_ms": 0.000001}}, {"n3"}),
    "open_files": ({"dengine_preflight_limits": {"open_files": 10**9}}, {"n3"}),
    "python": (OLD_PYTHON, {"n3"}),
    "clock_offset": (WRONG_CLOCK, {"n1", "n2", "n3"}),
    "rtt": ("far away", {"n1", "n2"}),
    "connect": ("closed", {"n1", "n2"}),
    "filesystem": ("tmpfs", {"n3"}),
    "time_sync": (clock_that_is("0x40"), {"n3"}),
}


@pytest.mark.playbooks
@pytest.mark.parametrize("check", FAULTS)
def test_each_check_alone_fails_exactly_its_row_and_can_be_skipped_by_name(
    check: str, site: Local, tmp_path: Path
) -> None:
    """One fault on n3, its rows and no other; with its name in dengine_preflight_skip, `--check`
    goes through."""
    (fault, hosts), port = FAULTS[check], site.port("n3")
    skip = [c for c in ("time_sync", "filesystem", "fsync", "memory") if c != check]
    site.skip_checks(skip)
    with contextlib.ExitStack() as stack:
        if isinstance(fault, dict):
            site.set_host("n3", **fault)
        elif fault == "taken":
            stack.enter_context(taken(port))
        elif fault in ("far away", "closed"):
            site.set_host("n3", dengine_port=port + 5, dengine_listen_address=f"127.0.0.1:{port}")
            if fault == "far away":
                stack.enter_context(far_away(port + 5, port))
        elif fault == "tmpfs":
            place = Path("/dev/shm") / f"dengine-test-{os.getpid()}"
            stack.callback(shutil.rmtree, place, ignore_errors=True)
            site.set_host("n3", dengine_process_dir=str(place))
        else:
            site.set_host("n3", ansible_python_interpreter=python_with(tmp_path, check, fault))
        if check == "fsync":  # however busy this machine's disk is, it is fast enough on the others
            for host in ("n1", "n2"):
                site.set_host(host, dengine_preflight_limits={"fsync_p99_ms": 10**6})
        if check == "time_sync":  # whatever this machine's clock is, it is right on the others
            right = python_with(tmp_path, "right", clock_that_is("0"))
            for host in ("n1", "n2"):
                site.set_host(host, ansible_python_interpreter=right)
        assert failed_rows(site.play("expand")) == {(host, check) for host in hosts}
        site.skip_checks([*skip, check])
        site.play("expand", "--check").ok()


@pytest.mark.playbooks
def test_a_wiped_voter_stops_the_run_with_the_command_to_run_next(site: Local) -> None:
    site.play("expand", "-e", "dengine_target_voters=3").ok()
    os.kill(site.pid("n2"), 15)
    wait_for(lambda: len(site.node_pids()) == 2, "node 2 to stop")
    shutil.rmtree(site.data("n2"))
    run = site.play("expand")
    assert failed_rows(run) == {("n2", "identity")}
    assert "dengine remove 2" in run.output
    assert site.voters() == [1, 2, 3]


@pytest.mark.playbooks
def test_a_foreign_directory_stops_the_run_with_the_command_to_run_next(site: Local) -> None:
    site.play("site").ok()
    directory = site.data("n2")
    directory.mkdir(parents=True)
    identity = json.loads((site.data("n1") / "identity.json").read_text())
    identity.update(node_id=2, cluster_id="f" * 32)
    (directory / "identity.json").write_text(json.dumps(identity))
    run = site.play("expand")
    assert failed_rows(run) == {("n2", "identity")}
    assert "mv " in run.output
    assert site.voters() == [1]


def test_the_gate_refuses_within_seconds_and_touches_no_host(site: Local) -> None:
    """--limit; to leave out the gate itself; an even target and two hosts with one id, in one run,
    for the gate tells all that it finds."""
    for arguments, hosts, said in (
        (("--limit", "n1"), ("n1",), ["--limit is refused"]),
        (("--skip-tags", "always"), (), ["A step was left out"]),
        (("-e", "dengine_target_voters=2"), (), ["it must be odd", "both have dengine_node_id 2"]),
    ):
        if len(said) > 1:
            site.set_host("n3", dengine_node_id=2)
        began = time.monotonic()
        output = site.play("expand", *arguments).failed(*hosts).output
        assert [text for text in said if text not in output] == []
        assert time.monotonic() - began < 30
    assert not site.state.exists()


def test_a_node_id_that_is_missing_or_no_number_is_named(site: Local) -> None:
    """Not what follows from it and cannot be computed. One in quotes is a number like any other."""
    hosts = site.inventory / "hosts.yml"
    hosts.write_text(hosts.read_text().replace("      dengine_node_id: 2\n", ""))
    site.set_host("n1", dengine_node_id="1")
    site.set_host("n3", dengine_node_id="three")
    output = site.play("expand").failed().output
    assert "missing required arguments: dengine_node_id" in output
    assert "argument 'dengine_node_id' is of type str" in output
    assert "undefined" not in output
    assert "unsupported operand" not in output
    assert not site.state.exists()


def test_secrets_that_others_can_read_are_not_used(site: Local) -> None:
    """As ssh does with a key: whoever can log in to the controller would have the cluster."""
    site.state.mkdir()
    file = site.state / "secrets.json"
    file.write_text(json.dumps({"peer_secret": "p" * 48, "token": "t" * 48}))
    file.chmod(0o644)
    output = site.play("expand").failed().output
    assert f"Run: chmod 0600 {file}" in " ".join(output.split())
    assert list(site.state.iterdir()) == [file]


def test_one_zone_file_of_production_alone_is_refused(tmp_path: Path) -> None:
    """With one of the three files the quorum would be counted wrongly."""
    shutil.copytree(ROOT / "inventories" / "production", tmp_path / "production")
    done = subprocess.run(
        [
            str(PLAYBOOK),
            "-i",
            str(tmp_path / "production" / "10-az-a.yml"),
            str(ROOT / "ansible" / "expand.yml"),
            "-e",
            "dengine_target_voters=1",
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "zone az-b of dengine_zones has no host" in done.stdout
    assert "Nobody else changes" not in done.stdout


def test_a_second_operator_is_refused_while_the_first_is_at_work(site: Local) -> None:
    """The lock names who has it; a run on this machine that was killed gives it up by itself."""
    lock = site.state / "hosts" / "n1" / "dengine-deploy.json"
    lock.parent.mkdir(parents=True)
    other = {
        "controller": "elsewhere", "place": "x", "pid": 7, "started": "1", "user": "alice",
        "nonce": "elsewhere/x/7/1", "refreshed": time.time(),
    }  # fmt: skip
    lock.write_text(json.dumps(other))
    run = site.play("expand").failed()
    assert "alice on elsewhere (process 7)" in run.output
    assert "dengine_take_lock=true" in run.output
    assert json.loads(lock.read_text()) == other, "a run that was refused lets go nobody's lock"
    lock.write_text(json.dumps(other | run_lock.owner(7) | {"started": "1", "nonce": "gone"}))
    site.play("expand", KILL_AT="dengine.core.discover : Look at the host")
    assert json.loads(lock.read_text())["pid"] != 7


def test_every_playbook_is_sound_with_every_inventory(tmp_path: Path) -> None:
    """ansible-playbook --syntax-check, from the root and from ansible/: in any combination in the
    full target, in the others each place and each inventory."""
    playbooks = sorted(p.name for p in (ROOT / "ansible").glob("*.yml"))
    assert len(playbooks) == 8
    root, inside = (ROOT, "ansible/"), (ROOT / "ansible", "")
    for inventory, places in (
        ("local", [root, inside]),
        ("vagrant", [root, inside] if FULL else [inside]),
        ("production", [root, inside] if FULL else [root]),
    ):
        for place, prefix in places:
            path = os.path.relpath(ROOT / "inventories" / inventory, place)
            done = subprocess.run(
                [str(PLAYBOOK), "--syntax-check", "-i", path, *[prefix + p for p in playbooks]],
                cwd=place,
                env={**os.environ, "ANSIBLE_HOME": str(tmp_path)},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, done.stderr


def test_with_several_inventories_the_controller_keeps_one_place(tmp_path: Path) -> None:
    """Each host has the directory of its own file; secrets made in two places would be two."""
    for number, zone in ((1, "az-a"), (2, "az-b")):
        file = tmp_path / zone / "hosts.yml"
        file.parent.mkdir()
        values = {"dengine_node_id": number, "dengine_address": f"10.0.0.{number}"}
        values["ansible_python_interpreter"] = sys.executable
        host = {f"n{number}": {**values, "dengine_zone": zone}}
        file.write_text(json.dumps({"dengine": {"hosts": host}}))
    play = {
        "hosts": "dengine",
        "gather_facts": False,
        "tasks": [
            {"ansible.builtin.import_role": {"name": "dengine.core.dengine"}},
            {"ansible.builtin.debug": {"msg": "kept in {{ dengine_secrets_file }}"}},
        ],
    }
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    done = subprocess.run(
        [
            *(str(PLAYBOOK), "-i", str(tmp_path / "az-b"), "-i", str(tmp_path / "az-a")),
            str(tmp_path / "play.yml"),
        ],
        env={
            **os.environ,
            "ANSIBLE_HOME": str(tmp_path / "home"),
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "ansible" / "collections"),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    kept = set(re.findall(r"kept in (\S+)", done.stdout))
    assert kept == {str(tmp_path / "az-a" / ".dengine" / "secrets.json")}
