"""`dengine watch`, `lease`, `lock`, `elect` and `completion` as processes, over a fake cluster."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import pytest

from dengine.cli import holding
from dengine.client.leases import margin_s
from tests.client.fake_server import ClusterThread, FakeCluster, cluster_thread

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 60.0  # the machine may be busy; nothing here takes as long


@pytest.fixture
def served() -> Iterator[ClusterThread]:
    with cluster_thread(3) as thread:
        yield thread


class Commands:
    """`dengine` processes that end with the test."""

    def __init__(self, served: ClusterThread) -> None:
        self._environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "LC_ALL": "C",
            "DENGINE_ENDPOINTS": ",".join(served.cluster.endpoints),
        }
        self._started: list[subprocess.Popen[str]] = []

    def start(
        self,
        *args: str,
        terminal: int | None = None,
        redirected: bool = True,
        stderr: int = subprocess.PIPE,
        through: Sequence[str] = (),
    ) -> subprocess.Popen[str]:
        """`terminal`: the one whose foreground it is; `redirected`: it does not read from it;
        `through`: a command that becomes it, such as nohup.
        """
        process = subprocess.Popen(
            [*through, sys.executable, "-m", "dengine", *args],
            env=self._environ,
            stdin=subprocess.DEVNULL if redirected else terminal,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=terminal is not None,
            preexec_fn=terminal and partial(fcntl.ioctl, terminal, termios.TIOCSCTTY, 0),
        )
        self._started.append(process)
        return process

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*args)
        out, err = process.communicate(timeout=WAIT_S)
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def end(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


@pytest.fixture
def commands(served: ClusterThread) -> Iterator[Commands]:
    commands = Commands(served)
    yield commands
    commands.end()


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"waited {WAIT_S} s for {what}"
        time.sleep(0.05)


def keys(served: ClusterThread) -> list[bytes]:
    found: list[bytes] = served.do(lambda cluster: sorted(cluster.state.keys))
    return found


def queued(served: ClusterThread, name: str) -> int:
    return sum(key.startswith(f"_lock/{name}/".encode()) for key in keys(served))


def line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().rstrip("\n")


def hang(cluster: FakeCluster) -> None:
    for node in cluster.nodes:
        node.hang()


def heal(cluster: FakeCluster) -> None:
    for node in cluster.nodes:
        node.heal()


def alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


# --- watch


def test_watch_prints_as_it_happens(served: ClusterThread, commands: Commands) -> None:
    """Also over the death of its node, and safely for a terminal; Ctrl-C ends it with 130."""
    watching = commands.start("watch", "--prefix", "a/", "--prev")

    def node_of_it(cluster: FakeCluster) -> list[int]:
        return [node.node_id for node in cluster.nodes if node.streams]

    until(lambda: len(served.do(node_of_it)) == 1, "the stream")
    assert commands.run("put", "a/1", "\x1b[31mred").stdout == "revision 1 (created)\n"
    assert line(watching.stdout) == "1  put     a/1  \\x1b[31mred"
    [number] = served.do(node_of_it)
    served.do(lambda cluster: cluster.nodes[number - 1].kill())
    commands.run("put", "a/1", "blue", "--ttl", "3600")
    commands.run("delete", "a/1")
    assert line(watching.stdout) == "2  put     a/1  blue  (was \\x1b[31mred)"
    assert line(watching.stdout) == "3  delete  a/1  (was blue)"
    watching.send_signal(signal.SIGINT)
    assert watching.wait(WAIT_S) == 130


def test_watch_for_programs(served: ClusterThread, commands: Commands) -> None:
    """One JSON object per line, the past included when it is asked for."""
    commands.run("put", "k", "1")
    watching = commands.start("watch", "k", "--from-revision", "1", "--json")
    assert json.loads(line(watching.stdout)) == {
        "revision": 1,
        "events": [{"type": "put", "key": "k", "value": "1", "created": True}],
    }
    served.do(lambda cluster: cluster.state.compact(100))
    refused = commands.run("watch", "k", "--from-revision", "1")
    assert refused.returncode == 1
    assert "no longer kept (compacted, outcome none)" in refused.stderr


# --- lease


def test_a_lease_and_its_keys(served: ClusterThread, commands: Commands) -> None:
    granted = commands.run("lease", "grant", "3600")
    name = granted.stdout.strip()
    assert granted.returncode == 0
    assert commands.run("put", "k", "v", "--lease", name).returncode == 0
    shown = commands.run("lease", "show", name)
    assert shown.stdout.splitlines()[-1].split() == ["key", "k"]
    assert json.loads(commands.run("lease", "show", name, "--json").stdout)["ttl"] == 3600
    renewed = commands.run("lease", "keepalive", name, "--once")
    assert renewed.stdout == f"lease {name} lasts 3600 s\n"
    assert commands.run("lease", "revoke", name).stdout == f"lease {name} is ended\n"
    assert keys(served) == []
    large = commands.run("lease", "grant", "3600").stdout.strip()
    for key in ("a", "b"):
        assert commands.run("put", key, "v", "--lease", large).returncode == 0
    served.cluster.state.keys_at_once = 1
    told = commands.run("lease", "revoke", large).stdout
    assert told == (
        f"lease {large} is ended; it held so many keys that some are left, which go by themselves\n"
    )
    assert keys(served) == [b"b"]
    for command in ("keepalive", "revoke", "show"):
        done = commands.run("lease", command, name)
        assert (done.returncode, done.stdout) == (1, "")
        assert "not_found" in done.stderr
    assert commands.run("lease", "grant", "0").returncode == 2
    assert commands.run("put", "k", "v", "--lease", name, "--ttl", "3").returncode == 2


def test_keepalive_goes_on_until_it_is_interrupted(
    served: ClusterThread, commands: Commands
) -> None:
    name = commands.run("lease", "grant", "3").stdout.strip()
    renewing = commands.start("lease", "keepalive", name)
    for _ in range(3):
        assert line(renewing.stdout) == f"lease {name} lasts 3 s"
    renewing.send_signal(signal.SIGINT)
    assert renewing.wait(WAIT_S) == 130


def test_a_hung_node_costs_no_short_lease(served: ClusterThread, commands: Commands) -> None:
    """Neither the one that is named first, nor the one that has answered until now."""

    def hang(number: int) -> Callable[[FakeCluster], None]:
        def change(cluster: FakeCluster) -> None:
            for node in cluster.nodes:
                node.heal()
            cluster.leader = cluster.nodes[2]
            cluster.nodes[number].hang()

        return change

    name = commands.run("lease", "grant", "2").stdout.strip()
    served.do(hang(0))
    renewing = commands.start("lease", "keepalive", name)
    for hung in (0, 1, 0):
        served.do(hang(hung))
        for _ in range(3):
            assert line(renewing.stdout) == f"lease {name} lasts 2 s"
    renewing.send_signal(signal.SIGINT)
    assert renewing.wait(WAIT_S) == 130


# --- writes that happen once


def test_a_key_of_ones_own_makes_a_write_happen_once(
    served: ClusterThread, commands: Commands
) -> None:
    """The same command again, after an unknown outcome, tells what became of the first."""
    at = ("--idempotency-key", "job-7")
    first = commands.run("put", "k", "v", "--if-none-match", *at)
    again = commands.run("put", "k", "v", "--if-none-match", *at)
    assert first.stdout == again.stdout == "revision 1 (created)\n"
    assert served.do(lambda cluster: cluster.state.executed) == 1
    other = commands.run("put", "k", "other", *at)
    assert other.returncode == 1
    assert "idempotency_mismatch" in other.stderr
    assert commands.run("put", "k", "v", "--idempotency-key", "a b").returncode == 2


def test_a_lost_answer_is_asked_for_once_more(served: ClusterThread, commands: Commands) -> None:
    """Every write carries a key of its own, so the next node may be asked."""

    def drop(cluster: FakeCluster) -> None:
        cluster.nodes[0].drop_replies = 1

    served.do(drop)
    assert commands.run("put", "k", "v", "--if-none-match").stdout == "revision 1 (created)\n"
    served.do(drop)
    assert commands.run("delete", "k").stdout == "revision 2 (1 key deleted)\n"
    assert served.do(lambda cluster: cluster.state.executed) == 2


# --- lock


def test_lock_passes_on_what_the_command_does(served: ClusterThread, commands: Commands) -> None:
    """Its output, its exit code, the signal that ended it; the lock is free afterwards."""
    shell = ("lock", "job", "--", "sh", "-c")
    done = commands.run(*shell, 'echo "token $DENGINE_LOCK_TOKEN"; exit 7')
    assert done.returncode == 7
    assert done.stdout.startswith("token ")
    assert int(done.stdout.split()[1]) > 0
    again = commands.run(*shell, 'echo "token $DENGINE_LOCK_TOKEN"')
    assert int(again.stdout.split()[1]) > int(done.stdout.split()[1])
    assert commands.run(*shell, "kill -TERM $$").returncode == 128 + signal.SIGTERM
    nothing = commands.run("lock", "job", "--", "no-such-command-here")
    assert nothing.returncode == 127
    assert "there is no such command" in nothing.stderr
    assert keys(served) == []
    assert served.do(lambda cluster: cluster.state.leases) == {}


def test_locks_wait_for_each_other(
    served: ClusterThread, commands: Commands, tmp_path: Path
) -> None:
    """Two commands never overlap; one that may not wait that long says so."""
    log = tmp_path / "log"
    wait = f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done"
    script = f"echo begin >> {log}; {wait}; echo end >> {log}"
    both = [commands.start("lock", "job", "--", "sh", "-c", script) for _ in range(2)]
    until(lambda: queued(served, "job") == 2, "both to queue")
    impatient = commands.run("lock", "job", "--wait", "0.5", "--", "true")
    assert impatient.returncode == 1
    assert "was not free within 0.5 s" in impatient.stderr
    (tmp_path / "go").touch()
    assert [process.wait(WAIT_S) for process in both] == [0, 0]
    assert log.read_text().split() == ["begin", "end"] * 2


def test_a_lost_lock_ends_everything(
    served: ClusterThread, commands: Commands, tmp_path: Path
) -> None:
    """The command, what it started, what that left behind, and what ignores SIGTERM; loudly."""
    pids = tmp_path / "pids"
    script = (
        f"trap '' TERM; echo $$ >> {pids}; "
        f"(setsid sh -c 'trap \"\" TERM; echo $$ >> {pids}; exec sleep 1000' &) ; "
        f"sh -c 'echo $$ >> {pids}; exec sleep 1000'; sleep 1000"
    )
    holding = commands.start("lock", "job", "--ttl", "3", "--", "sh", "-c", script)
    until(lambda: pids.exists() and len(pids.read_text().split()) == 3, "the processes")
    started = [int(pid) for pid in pids.read_text().split()]
    assert all(alive(pid) for pid in started)
    served.do(hang)
    _, err = holding.communicate(timeout=WAIT_S)
    assert holding.returncode == 1
    assert "lock 'job' is LOST" in err
    until(lambda: not any(alive(pid) for pid in started), "all of them to end")


def test_a_killed_lock_ends_its_command(
    served: ClusterThread, commands: Commands, tmp_path: Path
) -> None:
    """Nobody renews the lease for the command any more, so it must not go on."""
    pid_file = tmp_path / "pid"
    script = f"echo $$ > {pid_file}; exec sleep 1000"
    holding = commands.start("lock", "job", "--", "sh", "-c", script)
    until(lambda: pid_file.exists() and pid_file.read_text().strip() != "", "the command")
    holding.kill()
    until(lambda: not alive(int(pid_file.read_text())), "the command to end")


def test_a_command_whose_lock_was_killed_before_it_began_does_not_begin() -> None:
    """The kernel tells only of a death that comes after it was asked to. Here another process is
    the parent by then."""
    begun = subprocess.run(["true"], preexec_fn=partial(holding.end_with_parent, os.getpid()))
    assert begun.returncode == 0
    late = subprocess.run(["true"], preexec_fn=partial(holding.end_with_parent, os.getppid()))
    assert late.returncode == -signal.SIGKILL


@pytest.mark.parametrize("redirected", [False, True])
def test_ctrl_c_reaches_the_command_once(
    served: ClusterThread, commands: Commands, tmp_path: Path, redirected: bool
) -> None:
    """The terminal tells all of the foreground, wherever its standard input comes from."""
    heard, ready = tmp_path / "heard", tmp_path / "ready"
    script = (
        "import signal, sys, time, pathlib\n"
        f"heard = open({str(heard)!r}, 'a', buffering=1)\n"
        "signal.signal(signal.SIGINT, lambda *_: heard.write('INT\\n'))\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "while True: time.sleep(0.05)\n"
    )
    ours, theirs = os.openpty()
    try:
        process = commands.start(
            *("lock", "job", "--", sys.executable, "-c", script),
            terminal=theirs,
            redirected=redirected,
        )
        until(ready.exists, "the command")
        os.write(ours, b"\x03")
        until(lambda: heard.read_text() != "", "Ctrl-C")
        process.terminate()  # handled after what came before, here and in the command
        assert process.wait(WAIT_S) == 9
        assert heard.read_text().split() == ["INT"]
    finally:
        os.close(ours)
        os.close(theirs)


def test_help_says_which_signal_always_reaches_the_command(commands: Commands) -> None:
    """A SIGINT that somebody sends in the foreground of a terminal is one too many there."""
    assert "send SIGTERM, not SIGINT" in commands.run("lock", "--help").stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_command(
    served: ClusterThread, commands: Commands, tmp_path: Path, number: signal.Signals
) -> None:
    """It may end in its own way, and the lock is released after that."""
    ready = tmp_path / "ready"
    name = number.name.removeprefix("SIG")
    script = f"trap 'exit 9' {name}; touch {ready}; while :; do sleep 0.05; done"
    holding = commands.start("lock", "job", "--", "sh", "-c", script)
    until(ready.exists, "the command")
    holding.send_signal(number)
    assert holding.wait(WAIT_S) == 9
    assert keys(served) == []


def test_a_signal_while_waiting_leaves_the_queue(served: ClusterThread, commands: Commands) -> None:
    first = commands.start("lock", "job", "--", "sleep", "1000")
    until(lambda: queued(served, "job") == 1, "the holder")
    second = commands.start("lock", "job", "--", "true")
    until(lambda: queued(served, "job") == 2, "the waiter")
    second.terminate()
    assert second.wait(WAIT_S) == 128 + signal.SIGTERM
    assert queued(served, "job") == 1
    first.terminate()
    assert first.wait(WAIT_S) == 128 + signal.SIGTERM


# --- elect


def test_an_election(served: ClusterThread, commands: Commands) -> None:
    """Leaders follow each other, and an observer sees all of them."""
    observing = commands.start("elect", "sched", "--observe")
    assert line(observing.stdout) == "nobody leads"
    first = commands.start("elect", "sched", "host-a")
    held = line(first.stdout)
    assert held.startswith("leadership of 'sched': held, token ")
    as_json = commands.start("elect", "sched", "--observe", "--json")
    token = int(held.split()[-1])
    assert json.loads(line(as_json.stdout)) == {"leader": {"value": "host-a", "token": token}}
    assert line(observing.stdout) == f"host-a leads (token {held.split()[-1]})"
    second = commands.start("elect", "sched", "host-b", "--", "sh", "-c", "exit 3")
    first.send_signal(signal.SIGINT)
    assert first.wait(WAIT_S) == 130
    assert second.wait(WAIT_S) == 3
    lines = [line(observing.stdout)]
    while lines[-1] != "nobody leads" or not any("host-b" in text for text in lines):
        lines.append(line(observing.stdout))
    observing.send_signal(signal.SIGINT)
    assert observing.wait(WAIT_S) == 130
    assert commands.run("elect", "sched").returncode == 2
    assert commands.run("elect", "sched", "x", "--observe").returncode == 2
    assert commands.run("elect", "sched", "x", "--json").returncode == 2


def test_a_lost_leadership_is_loud(served: ClusterThread, commands: Commands) -> None:
    leading = commands.start("elect", "sched", "me", "--ttl", "2")
    line(leading.stdout)
    served.do(hang)
    _, err = leading.communicate(timeout=WAIT_S)
    assert leading.returncode == 1
    assert "leadership of 'sched' is LOST" in err
    served.do(heal)


# --- completion


BASH = """COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _dengine; printf '%s\\n' "${COMPREPLY[@]}"
"""
# What zsh has only while it completes, and that it leaves out what begins with other letters.
ZSH = """words=("$@"); CURRENT=$#
compadd() { shift; for word in "$@"; do [[ $word == ${words[-1]}* ]] && print -r -- $word; done }
_files() {}
_normal() {}
_dengine
"""
FISH = """complete -C (string join -- ' ' $argv) | string replace -r '\\t.*' ''
"""


def completed(shell: str, words: Sequence[str]) -> set[str]:
    """What a shell offers after these words."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = subprocess.run(
        [sys.executable, "-m", "dengine", "completion", shell],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    ).stdout
    if shell == "fish":
        asked = ["fish", "--no-config", "-c", script + FISH, "dengine", *words]
    elif shell == "zsh":
        asked = ["zsh", "-f", "-c", f"compdef() {{}}\n{script}{ZSH}", "-", "dengine", *words]
    else:
        asked = ["bash", "-c", script + BASH, "-", "dengine", *words]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete(shell: str) -> None:
    """Commands, their commands, options and what these may be."""
    offered = partial(completed, shell)
    assert {"get", "put", "watch", "lease", "lock", "elect", "snapshot"} <= offered([""])
    assert offered(["sn"]) == {"snapshot"}
    assert {"grant", "keepalive", "revoke", "show"} <= offered(["lease", ""])
    assert "put" not in offered(["lease", ""])
    assert offered(["lease", "grant", "--js"]) == {"--json"}
    assert offered(["get", "k", "--consistency", ""]) == {"linearizable", "lease", "eventual"}
    assert offered(["completion", "z"]) == {"zsh"}
    assert not {"put", "--json"} & offered(["lock", "job", "--", ""]), "that is for the command"


@pytest.mark.parametrize("ttl_s", [1, 2, 5, 10, 60, 86_400])
def test_what_held_a_lock_is_gone_before_another_may_hold_it(ttl_s: int) -> None:
    """Its end is heard `margin_s` before that; what ignores SIGTERM has half of that."""
    assert 0 < holding.terminate_s(ttl_s) <= margin_s(ttl_s) / 2
    assert holding.terminate_s(ttl_s) <= 0.5


def test_what_cannot_be_ended_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not waited for without end."""
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(holding, "GONE_S", 0.1)
    monkeypatch.setattr(holding, "_descendants", lambda: iter([4_000_000]))
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append((pid, number)))
    assert asyncio.run(holding.end_descendants(0.05)) == [4_000_000]
    assert signals[0] == (4_000_000, signal.SIGTERM)
    assert signals[-1] == (4_000_000, signal.SIGKILL)
