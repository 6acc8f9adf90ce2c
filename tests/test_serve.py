"""`dengine serve` and the client commands together: one real node, started as a person would."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dengine.cli.main import main
from dengine.cli.serve import _feed_watchdog
from tests.cluster import ROOT, Cluster, ServeProcess, free_port, node_environment, wait_for
from tests.node.hosts import until

CONFIG = """\
[cluster]
node_id = 1
listen_address = "127.0.0.1:{port}"
initial_cluster = [ {{ id = 1, address = "127.0.0.1:{port}", role = 2, status = 2 }} ]
db_root_dir = "./db"
founding_wait_ms = 100
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[ServeProcess]:
    """A single node that is configured and not started yet."""
    port = free_port()
    with Cluster(tmp_path) as cluster:
        yield cluster.node(1, CONFIG.format(port=port), port)


def dengine(node: ServeProcess, *args: str | bytes, stdin: bytes = b"") -> bytes:
    """The stdout of a client command that succeeded without a word on stderr."""
    done = client(node, *args, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, b""), args
    return done.stdout


def failed(node: ServeProcess, *args: str, code: int = 1) -> str:
    """The stderr of a client command that ends with `code`."""
    done = client(node, *args)
    assert (done.returncode, done.stdout) == (code, b""), done
    return done.stderr.decode()


def client(
    node: ServeProcess, *args: str | bytes, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "dengine", *args],
        input=stdin,
        cwd=node.cwd,
        env={**node_environment(), "DENGINE_ENDPOINTS": f"127.0.0.1:{node.port}"},
        capture_output=True,
        timeout=30,
        check=False,
    )


def refused_start(node: ServeProcess, **environ: str) -> tuple[int, str]:
    """Exit code and stderr of a node that does not come up."""
    done = subprocess.run(
        [sys.executable, "-m", "dengine", "serve", "--config", str(node.config)],
        cwd=node.cwd,
        env={**node_environment(), **environ},
        capture_output=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stderr.decode()


def test_from_start_to_sigterm(node: ServeProcess) -> None:
    """The announced lines come verbatim and in order, SIGTERM ends it with 0, data stays."""
    node.start()
    wait_for(node.ready, "the node to be ready")
    assert dengine(node, "put", "k", "v") == b"revision 1 (created)\n"
    assert node.stop() == 0
    announced = [line for line in node.lines() if line.startswith("[Node 1]")]
    assert announced == [
        "[Node 1] Follower → Candidate (term 1)",
        "[Node 1] Candidate → Leader (term 2)",
    ]
    node.start()
    wait_for(node.ready, "the node to be ready again")
    assert dengine(node, "get", "k") == b"v"


def test_ctrl_c_is_a_clean_stop(node: ServeProcess) -> None:
    """SIGINT, also while the node is still finding out who it is."""
    node.start()
    wait_for(lambda: "listens on" in node.output(), "the port to be bound")
    node.signal(signal.SIGINT)
    assert node.wait_exit() == 0
    assert "Traceback" not in node.output()


def test_every_client_command_against_a_real_node(node: ServeProcess) -> None:
    """What the small server of test_cli.py pretends is what a node does, with small pages too."""
    text = node.config.read_text(encoding="utf-8")
    node.config.write_text(f"{text}[limits]\npage = 2\n", encoding="utf-8")
    node.start()
    wait_for(node.ready, "the node to be ready")
    value = bytes(range(256))
    for key in (b"a/1", b"..", b"\xff", "ключ".encode()):
        assert b"created" in dengine(node, "put", key, "-", stdin=value)
        assert dengine(node, "get", key) == value
    assert json.loads(dengine(node, "get", "a/1", "--json"))["mod_revision"] == 1
    assert dengine(node, "list", "--count") == b"4\n"
    paged = dengine(node, "list", "--keys-only", "--limit", "1500")
    assert paged.decode().splitlines() == ["..", "a/1", "ключ", "\\xff"]
    assert dengine(node, "list", "a/", "--keys-only") == b"a/1\n"
    assert [i.get("key") for i in json.loads(dengine(node, "list", "--json"))["items"]] == [
        "..",
        "a/1",
        "ключ",
        None,
    ]
    assert dengine(node, "delete", "a/1") == b"revision 5 (1 key deleted)\n"
    assert "--all allows that" in failed(node, "delete", "--prefix", "", code=2)
    assert "--end goes with --start" in failed(node, "delete", "..", "--end", "z", code=2)
    assert "--all goes with --prefix" in failed(node, "delete", "..", "--all", code=2)
    assert dengine(node, "list", "--count") == b"3\n"
    assert dengine(node, "delete", "--prefix", "", "--all") == b"revision 6 (3 keys deleted)\n"
    dengine(node, "put", "brief", "1", "--ttl", "3600")
    assert json.loads(dengine(node, "get", "brief", "--json"))["ttl"] > 3500
    assert re.search(r"^brief +7 +1 +3[56]\d\d +1$", dengine(node, "list").decode(), re.MULTILINE)
    dengine(node, "delete", "brief")

    assert json.loads(dengine(node, "status", "--json"))[0]["role"] == "leader"
    assert re.search(r"127\.0\.0\.1:\d+ +1  leader", dengine(node, "status").decode())
    assert json.loads(dengine(node, "members", "--json"))["members"][0]["role"] == "leader"
    assert b"fault tolerance  0" in dengine(node, "members")
    assert b"promotion" in dengine(node, "settings", "promotion=odd")
    unknown = failed(node, "settings", "bla=1")
    assert "`bla`; known here: promotion, history_revisions, history_bytes, idem" in unknown
    assert dengine(node, "promote", "1") == b"nothing to promote; the voters are 1\n"
    assert failed(node, "promote", "7").startswith("dengine: node 7 is not a member")
    assert json.loads(dengine(node, "settings", "--json"))["promotion"] == "odd"
    for operation in ("put", "get"):
        result = json.loads(dengine(node, "bench", operation, "--seconds", "0.3", "--json"))
        assert result["ops_per_s"] > 0
    large = ("--value-bytes", "1048576", "--keys", "20", "--connections", "4", "--seconds", "0.1")
    assert b"ops_per_s" in dengine(node, "bench", "get", *large), "more than one change may delete"
    assert dengine(node, "list", "--count") == b"0\n", "bench leaves nothing behind"


def test_a_taken_port(node: ServeProcess) -> None:
    """Exit code 75 (try again), a sentence that names the address, and nothing written."""
    with socket.create_server(("127.0.0.1", node.port)):
        code, error = refused_start(node)
    assert code == 75
    assert error.count("\n") == 1
    assert f"127.0.0.1:{node.port}" in error
    assert not node.directory.parent.exists()


def test_a_mistake_in_the_configuration(node: ServeProcess) -> None:
    """Exit code 78, one sentence on stderr, and nothing written."""
    code, error = refused_start(node, DENGINE__READ__LEASE_MS="900")
    assert code == 78
    assert error.count("\n") == 1
    assert f"{node.config}: read.lease_ms (900)" in error
    assert not node.directory.parent.exists()


@pytest.mark.parametrize("directory", ["x" * 300, "/proc/x"])
def test_a_directory_that_can_never_be(node: ServeProcess, directory: str) -> None:
    """`serve` and `check-config` agree: 78, not 74, which would have it restarted for ever."""
    environ = {"DENGINE__CLUSTER__DB_ROOT_DIR": directory}
    code, error = refused_start(node, **environ)
    checked = subprocess.run(
        [sys.executable, "-m", "dengine", "check-config", str(node.config)],
        cwd=node.cwd,
        env={**node_environment(), **environ},
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (code, error) == (checked.returncode, checked.stderr.decode())
    assert code == 78
    assert error.startswith(f"dengine: {node.config}: cluster.db_root_dir cannot hold {directory}")


def test_a_directory_that_cannot_be_made_after_all(node: ServeProcess) -> None:
    """What no check foresees is found when the directory is made, and is the same mistake."""
    code, error = refused_start(
        node, DENGINE__CLUSTER__DB_ROOT_DIR="/proc/x", DENGINE__LIMITS__RESERVE_BYTES="0"
    )
    assert code == 78
    assert f"{node.config}: cluster.db_root_dir: cannot use the data directory /proc/x/1" in error
    assert error.count("\n") == 1


def test_two_processes_never_share_a_directory(node: ServeProcess) -> None:
    """A second node on the same directory ends with 75 and leaves the first alone."""
    node.start()
    wait_for(node.ready, "the node to be ready")
    code, error = refused_start(node, DENGINE__CLUSTER__LISTEN_ADDRESS=f"127.0.0.1:{free_port()}")
    assert code == 75
    assert error.count("\n") == 1
    assert node.put("k", "v").ok


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_an_open_port_is_warned_about_once(node: ServeProcess, host: str) -> None:
    """Nobody runs without authentication on a network unaware of it."""
    text = node.config.read_text().replace("127.0.0.1", host)
    node.config.write_text(text)
    node.start()
    wait_for(node.ready, "the node to be ready")
    assert node.output().count("is open to everyone") == (1 if host == "0.0.0.0" else 0)


def test_the_service_manager_is_told(node: ServeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Type=notify`: READY=1 once the port is bound and the state loaded, STOPPING=1 at the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(15)
        manager.bind(str(node.cwd / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(node.cwd / "notify"))
        node.start()
        assert manager.recv(100) == b"READY=1"
        assert node.stop() == 0
        assert manager.recv(100) == b"STOPPING=1"


def test_the_watchdog_is_fed_while_the_cycle_turns(
    node: ServeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`WatchdogSec=`: an idle node is never killed, and one that hangs falls silent."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(15)
        manager.bind(str(node.cwd / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(node.cwd / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        node.start()
        assert manager.recv(100) == b"READY=1"
        began = time.monotonic()
        for _ in range(12):
            assert manager.recv(100) == b"WATCHDOG=1"
        assert 1.0 < time.monotonic() - began < 10, "four times per interval, also when idle"

        node.signal(signal.SIGSTOP)
        wait_for(lambda: psutil.Process(node.pid).status() == psutil.STATUS_STOPPED, "the stop")
        manager.settimeout(0.01)
        with contextlib.suppress(TimeoutError):  # those sent before
            while manager.recv(100):
                pass
        manager.settimeout(1.0)
        with pytest.raises(TimeoutError):
            manager.recv(100)
        node.signal(signal.SIGCONT)
        assert manager.recv(100) == b"WATCHDOG=1"
        assert node.stop() == 0


@pytest.mark.parametrize("environ", [{"WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": ""}])
def test_a_watchdog_of_somebody_else(
    node: ServeProcess, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    """Variables that are inherited, or empty, are not meant for this process."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(15)
        manager.bind(str(node.cwd / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(node.cwd / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "40000")
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        node.start()
        assert manager.recv(100) == b"READY=1"
        wait_for(node.ready, "the node to be ready")
        assert node.stop() == 0
        assert manager.recv(100) == b"STOPPING=1", "nothing else came between"


def test_a_cycle_that_stands_still_feeds_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event loop that runs is no sign of life: only turns of the cycle are."""
    asked, turned = 0, False

    def turns() -> int:
        nonlocal asked
        asked += 1
        return int(turned)

    async def hang() -> None:
        nonlocal turned
        feeding = asyncio.create_task(_feed_watchdog(turns))
        await until(lambda: asked > 2, "looks at a cycle that has not turned")
        assert not select.select([manager], [], [], 0)[0], "no turn yet, no food"
        turned = True
        await until(lambda: asked > 6, "looks at a cycle that turned once")
        feeding.cancel()

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "20000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        asyncio.run(hang())
        manager.setblocking(False)
        assert manager.recv(100) == b"WATCHDOG=1"
        with pytest.raises(BlockingIOError):
            manager.recv(100)


def test_make_help_and_ci_agree() -> None:
    """`make` alone teaches; continuous integration runs exactly `make test`."""
    shown = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, timeout=30, check=True)
    for target in ("run", "test", "lint", "fix", "bench", "clean"):
        assert f"{target} " in shown.stdout.decode()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(("host", "expected"), [("192.0.2.7", 75), ("nosuch.invalid", 78)])
def test_an_address_of_another_machine(node: ServeProcess, host: str, expected: int) -> None:
    """An address may come later than the node, after a boot, so that is tried again (75); a name
    that nobody knows is a mistake (78). The sentence names file and key; nothing is written."""
    code, stderr = refused_start(node, DENGINE__CLUSTER__LISTEN_ADDRESS=f"{host}:9081")
    assert code == expected
    assert f"{node.config}: cluster.listen_address: cannot listen on {host}:9081" in stderr
    assert stderr.count("\n") == 1
    assert not (node.cwd / "db").exists()


@pytest.mark.parametrize(("number", "code"), [(errno.EMFILE, 75), (errno.EIO, 74)])
def test_what_the_system_refuses_ends_serve_as_documented(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    """Also where it is not the node that meets it: 1 is no exit code of `serve`."""

    def refused(path: Path | None) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("dengine.cli.serve.serve", refused)
    assert main(["serve"]) == code
    assert os.strerror(number) in capsys.readouterr().err


def test_a_node_that_cannot_read_its_modules_may_be_started_again(tmp_path: Path) -> None:
    """Without a descriptor left, say: that passes, and is no code that systemd stops at."""
    program = (
        "import resource, shutil, sys\n"  # argparse asks shutil how wide the terminal is
        "from dengine.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        f"sys.exit(main(['serve', '--config', {str(tmp_path / 'n1.toml')!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 75, done
    assert "the system refused" in done.stderr
    assert "Too many open files" in done.stderr


def test_a_node_without_standard_streams_lives_and_ends_as_any(node: ServeProcess) -> None:
    """None of its own files gets their numbers, into which what it says would be written."""
    node.prefix = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    node.start()
    wait_for(node.ready, "the node to be ready")
    for number in range(3):
        assert os.readlink(f"/proc/{node.pid}/fd/{number}") == os.devnull
    assert node.put("k", "v").ok
    assert node.stop() == 0
