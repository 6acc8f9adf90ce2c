"""The example's Makefile: what a person types, in a copy of the directory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import GUIDE_CONFIGS, ROOT, free_port, wait_for

EXAMPLE = GUIDE_CONFIGS.parent


@pytest.fixture
def example(tmp_path: Path) -> Iterator[Path]:
    """A copy of the example; nodes that a failed test left in it are ended."""
    copy = tmp_path / "example"
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("db", "logs", "__pycache__"))
    yield copy
    for file in (copy / "logs").glob("*.pid"):
        if is_running(file):
            os.kill(int(file.read_text()), signal.SIGKILL)


def is_running(pid_file: Path) -> bool:
    pid = pid_file.read_text().strip()
    try:
        return b"dengine" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def on_another_port(example: Path) -> None:
    """Node 1 on a free port, so that a busy 9081 does not matter."""
    file = example / "config" / "n1.toml"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("9081", str(free_port())), encoding="utf-8")


def start(example: Path, target: str, *prefix: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, "make", target, f"ROOT={ROOT}", f"PYTHON={sys.executable}"],
        cwd=example,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def logged(example: Path, node_id: int, text: str) -> None:
    """Wait until the node's log file holds `text`."""
    log = example / "logs" / f"{node_id}.log"
    wait_for(lambda: log.exists() and text in log.read_text("utf-8"), f"{text!r} in {log}")


def stopped_cleanly(example: Path, node_id: int) -> bool:
    return (example / "db" / str(node_id) / "CLEAN").exists()


def test_ctrl_c_reaches_the_node_and_the_log_has_everything(example: Path) -> None:
    """Ctrl-C ends the node in good order, and logs/1.log holds what the terminal showed."""
    on_another_port(example)
    shell = start(example, "start-node1")
    logged(example, 1, "[Node 1] Candidate → Leader (term 2)")
    os.killpg(shell.pid, signal.SIGINT)  # what a terminal does
    printed, _ = shell.communicate(timeout=20)
    assert not is_running(example / "logs" / "1.pid"), "the node ended with make"
    assert stopped_cleanly(example, 1)
    log = example / "logs" / "1.log"
    wait_for(lambda: log.read_text("utf-8").strip() in printed, "the log to hold what was shown")


def test_sigterm_and_the_exit_code_pass_through_make(example: Path) -> None:
    """`kill` of make reaches the node, and a refused start is a failed target with its code."""
    on_another_port(example)
    shell = start(example, "start-node1")
    logged(example, 1, "[Node 1] Candidate → Leader (term 2)")
    shell.terminate()
    shell.communicate(timeout=20)
    wait_for(lambda: not is_running(example / "logs" / "1.pid"), "the node to end")
    assert stopped_cleanly(example, 1)

    (example / "config" / "n1.toml").write_text("[cluster]\n", encoding="utf-8")
    refused = start(example, "start-node1")
    printed, _ = refused.communicate(timeout=20)
    assert refused.returncode != 0
    assert "Error 78" in printed, "make reports the node's own exit code"


@pytest.mark.parametrize("target", ["start-node1", "join-node2", "status", "verify", "kill-leader"])
def test_what_is_missing_is_named(example: Path, target: str) -> None:
    """Before `make build` every target says in one sentence what to do."""
    run = subprocess.run(
        ["make", "--no-print-directory", target, "PYTHON=/nowhere/python"],
        cwd=example,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.returncode != 0
    assert run.stdout == "There is no /nowhere/python yet: run 'make build' first.\n"


@pytest.fixture
def own_network() -> Iterator[tuple[str, ...]]:
    """The prefix of a command that runs where 9081 to 9083 are free for sure."""
    name = f"dengine-{os.getpid()}-example"
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    yield "ip", "netns", "exec", name
    subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"
)
def test_every_target_with_the_guides_files_and_ports(
    example: Path, own_network: tuple[str, ...]
) -> None:
    """The guide as it is typed: start, join, join, status, verify, kill the leader, start it again,
    verify, and clean, which refuses while a node runs."""

    def make(target: str) -> tuple[int, str]:
        run = start(example, target, *own_network)
        printed, _ = run.communicate(timeout=30)
        return run.returncode, printed

    nodes = {1: start(example, "start-node1", *own_network)}
    logged(example, 1, "[Node 1] Candidate → Leader (term 2)")
    for node_id in (2, 3):
        nodes[node_id] = start(example, f"join-node{node_id}", *own_network)
        logged(example, node_id, f"🎊 NODE {node_id} PROMOTED TO VOTER!")
    code, printed = make("verify")
    assert (code, printed.count("✓ node")) == (0, 3), printed
    assert make("clean")[0] != 0

    code, printed = make("kill-leader")
    assert (code, "killed node 1" in printed) == (0, True), printed
    nodes[1].communicate(timeout=20)
    wait_for(lambda: "leader" in make("status")[1], "another leader")
    nodes[1] = start(example, "start-node1", *own_network)
    wait_for(lambda: make("verify")[0] == 0, "all three to answer again")

    for shell in nodes.values():
        os.killpg(shell.pid, signal.SIGINT)
    for shell in nodes.values():
        shell.communicate(timeout=30)
    assert make("clean")[0] == 0
    assert not (example / "db").exists()
    assert not (example / "logs").exists()
