"""Clusters with both secrets set: everything works, strangers get nothing, and nothing leaks."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cluster import (
    ROOT,
    Cluster,
    ServeProcess,
    Writer,
    config_text,
    free_port,
    joiner,
    static_cluster,
    wait_for,
)

FULL = bool(os.environ.get("DENGINE_CRASH_SWEEP"))  # make crash-sweep
TOKEN = secrets.token_hex(32)
PEER_SECRET = secrets.token_hex(32)
SMALL = """
[raft.snapshot]
entries = 200
retained_log_entries = 50
chunk_bytes = 4096
max_bytes_per_s = 65536
"""
QUICK = """
[raft.snapshot]
entries = 50
retained_log_entries = 10
"""


def secret_files(directory: Path, *, token: str = TOKEN, peer: str = PEER_SECRET) -> str:
    """Files with these secrets, and the configuration that names them; "" leaves one out."""
    directory.mkdir(exist_ok=True)
    text = "[security]\n"
    for key, content in (("token", token), ("peer_secret", peer)):
        if content:
            (directory / key).write_text(content + "\n", encoding="ascii")
            (directory / key).chmod(0o600)
            text += f'{key}_file = "{directory / key}"\n'
    return text


@pytest.fixture
def guarded(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster to be, whose nodes have both secrets; afterwards no log holds one of them."""
    cluster.token = TOKEN
    yield cluster
    for node in cluster.everyone():
        for secret in (TOKEN, PEER_SECRET):
            assert secret not in node.output()


@dataclass
class ProcWatcher:
    """Reads arguments and environment of nodes and their subprocesses for as long as it runs."""

    nodes: list[ServeProcess]
    leaks: list[str] = field(default_factory=list)
    writers: set[int] = field(default_factory=set)  # snapshot writers that were seen
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> ProcWatcher:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stopping.wait(0.01):
            for node in self.nodes:
                if node.running:
                    self._look(node.pid)

    def _look(self, pid: int) -> None:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for process in (pid, *map(int, children)):
                arguments = Path(f"/proc/{process}/cmdline").read_bytes()
                environment = Path(f"/proc/{process}/environ").read_bytes()
                if b"snapshot_writer" in arguments:
                    self.writers.add(process)
                for secret in (TOKEN.encode(), PEER_SECRET.encode()):
                    if secret in arguments or secret in environment:
                        self.leaks.append(f"{process}: {arguments!r}")


def dengine(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """The command line, with an environment of its own."""
    kept: Mapping[str, str] = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "dengine", *arguments],
        cwd=cwd,
        env={**kept, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_founders_with_secrets_forward_and_survive_a_kill(guarded: Cluster, tmp_path: Path) -> None:
    """Founding from a list, writes through followers, a new leader: as without secrets."""
    static_cluster(guarded, 1, 2, 3, extra=secret_files(tmp_path / "secrets"))
    writers = [Writer(node, f"w{i}").start() for i, node in guarded.nodes.items()]
    for writer in writers:
        writer.wait_more(50)
    leader = guarded.wait_leader()
    leader.kill()
    guarded.wait_leader()
    for writer in writers:
        if writer.node is not leader:
            writer.wait_more(50)
    leader.start()
    guarded.wait_leader()
    for writer in writers:
        writer.stop()
    guarded.assert_everywhere(*writers)
    stranger = guarded.wait_leader()
    stranger.token = None
    for method, path in (("GET", "/v1/cluster"), ("GET", "/v1/status"), ("GET", "/metrics")):
        assert stranger.request(method, path).status == 401
    assert stranger.request("GET", "/leader").status == 200
    stranger.token = TOKEN


@pytest.mark.timeout(240)
def test_joiners_fetch_and_no_process_shows_a_secret(guarded: Cluster, tmp_path: Path) -> None:
    """One grows to three with snapshots fetched, and /proc holds no secret at any time."""
    extra = SMALL + secret_files(tmp_path / "secrets")
    port = free_port()
    first = guarded.node(1, config_text(1, {1: port}, 2, 2, extra), port)
    nodes = [first]
    with ProcWatcher(nodes) as watcher:
        first.start()
        guarded.wait_leader()
        writer = Writer(first, "w", pause_s=0.0).start()
        wait_for(
            lambda: first.call("GET", "/v1/snapshots").json()["purged_index"], "a purged log", 120
        )
        taken_by = len(watcher.writers)
        for node_id in (2, 3):
            nodes.append(joiner(guarded, node_id, extra).start())
        guarded.wait_voters(1, 2, 3, deadline_s=90)
        writer.wait_more(20)
        writer.stop()
        assert not writer.failures
    assert taken_by
    assert len(watcher.writers) >= taken_by + 2
    assert watcher.leaks == []
    for node in nodes[1:]:
        assert "snapshot up to entry" in node.output()
    guarded.assert_everywhere(writer)


@pytest.mark.parametrize("secrets_set", ["token", "peer"])
def test_one_secret_alone_lets_joiners_in_too(
    cluster: Cluster, tmp_path: Path, secrets_set: str
) -> None:
    """With a token the joiner shows that; with a peer secret it proves it and needs no token."""
    if secrets_set == "token":
        extra = QUICK + secret_files(tmp_path / "secrets", peer="")
        cluster.token = TOKEN
    else:
        extra = QUICK + secret_files(tmp_path / "secrets", token="")
    port = free_port()
    first = cluster.node(1, config_text(1, {1: port}, 2, 2, extra), port).start()
    cluster.wait_leader()
    writer = Writer(first, "w", pause_s=0.0).start()
    wait_for(lambda: first.call("GET", "/v1/snapshots").json()["purged_index"], "a purged log", 30)
    second = joiner(cluster, 2, extra).start()
    cluster.wait_voters(1, 2, deadline_s=60)
    writer.stop()
    assert "snapshot up to entry" in second.output()
    cluster.assert_everywhere(writer)


def test_a_joiner_without_the_peer_secret_stays_outside(guarded: Cluster, tmp_path: Path) -> None:
    """With no secret, with only the token, with another peer secret: it is no member, learns no
    cluster id, and says after ten seconds why it is not let in. All three wait for the same ten."""
    port = free_port()
    extra = secret_files(tmp_path / "secrets")
    first = guarded.node(1, config_text(1, {1: port}, 2, 2, extra), port).start()
    guarded.wait_leader()
    strangers = []
    for name, token, peer in (
        ("no secret", "", ""),
        ("only the token", TOKEN, ""),
        ("another peer secret", TOKEN, "another peer secret"),
    ):
        other = secret_files(tmp_path / f"with {name}", token=token, peer=peer)
        ports = {1: port, 2: free_port()}
        text = config_text(2, ports, 3, 0, other)
        strangers.append(guarded.node(2, text, ports[2], name=name).start())
    for second in strangers:
        why = f"cannot join yet; 127.0.0.1:{port}: not authenticated"
        wait_for(lambda s=second, w=why: w in s.output(), f"why, of {second.cwd.name}", 20)
        assert [member["id"] for member in first.cluster()["members"]] == [1]
        identity = (second.directory / "identity.json").read_text(encoding="utf-8")
        assert first.status()["cluster_id"] not in identity
        assert first.status()["cluster_id"] not in second.output()


def test_a_joiner_with_a_secret_does_not_join_a_cluster_without(
    cluster: Cluster, tmp_path: Path
) -> None:
    """It could be anybody's: the joiner says so, and that cluster gets no new member."""
    port = free_port()
    first = cluster.node(1, config_text(1, {1: port}, 2, 2), port).start()
    cluster.wait_leader()
    second = joiner(cluster, 2, secret_files(tmp_path / "secrets", token="")).start()
    wait_for(lambda: "that node asks for no peer secret" in second.output(), "why", 20)
    assert [member["id"] for member in first.cluster()["members"]] == [1]


def test_a_founder_with_another_secret_is_named_with_its_address(
    guarded: Cluster, tmp_path: Path
) -> None:
    """Two of three founders agree on the secret: the log of the others says whom to mend."""
    ports = {node_id: free_port() for node_id in (1, 2, 3)}
    for node_id, port in ports.items():
        peer = PEER_SECRET if node_id < 3 else "another peer secret"
        extra = secret_files(tmp_path / f"secrets{node_id}", peer=peer)
        guarded.node(node_id, config_text(node_id, ports, 0, 2, extra), port).start()
    first = guarded.nodes[1]
    named = f"node 3 (127.0.0.1:{ports[3]}) not authenticated"
    wait_for(lambda: named in first.output(), "the founder's line", 20)
    complaint = f"127.0.0.1:{ports[3]} did not prove that it knows the peer secret"
    assert first.output().count(complaint) == 1
    # Mended, it is let in, and the cluster is founded.
    third = guarded.nodes[3]
    third.kill()
    secret_files(tmp_path / "secrets3")
    third.start()
    guarded.wait_voters(1, 2, 3)


def test_a_member_that_lost_its_secret_is_missed_by_name(guarded: Cluster, tmp_path: Path) -> None:
    """A restart with another secret leaves it alone, and `no leader` says why."""
    static_cluster(guarded, 1, 2, extra=secret_files(tmp_path / "secrets"))
    second = guarded.nodes[2]
    second.kill()
    text = second.config.read_text(encoding="utf-8")
    other = secret_files(tmp_path / "other", peer="another peer secret")
    second.config.write_text(text.partition("[security]")[0] + other, encoding="utf-8")
    second.start()
    for node in guarded.nodes.values():
        reasons = functools.partial(node.request, "GET", "/readyz")
        wait_for(lambda ask=reasons: b"not authenticated" in ask().body, "the reason")


def test_the_command_line_finds_the_token(guarded: Cluster, tmp_path: Path) -> None:
    """By option, by variable, by the host's configuration; never as an argument itself. The full
    target tries each command in each way, the others each way and each command."""
    extra = secret_files(tmp_path / "secrets")
    port = free_port()
    node = guarded.node(1, config_text(1, {1: port}, 2, 2, extra), port).start()
    guarded.wait_leader()
    at = ("--endpoint", f"127.0.0.1:{port}")
    file = str(tmp_path / "secrets" / "token")
    ways: list[tuple[tuple[str, ...], dict[str, str]]] = [
        ((*at, "--token-file", file), {}),
        (at, {"DENGINE_TOKEN_FILE": file}),
        (at, {"CONFIG_PATH": str(node.config)}),
        ((), {"CONFIG_PATH": str(node.config)}),
    ]
    commands: list[tuple[str, ...]] = [
        *(("get", "color"), ("members",), ("status",), ("list",), ("settings",)),
        *(("snapshot", "list"), ("snapshot", "take"), ("snapshot", "save")),
    ]
    for number, (options, environ) in enumerate(ways):
        put = dengine("put", "color", "blue", *options, cwd=tmp_path, **environ)
        assert put.returncode == 0, put
        for command in commands if FULL else commands[number :: len(ways)]:
            more = (f"backup-{number}.dsnap",) if command[-1] == "save" else ()
            done = dengine(*command, *more, *options, cwd=tmp_path, **environ)
            assert done.returncode == 0, done
            assert command[0] == "snapshot" or not done.stderr, done
    bench = ("bench", "get", "--seconds", "0.3", "--connections", "2", "--keys", "10")
    done = dengine(*bench, *at, "--token-file", file, cwd=tmp_path)
    assert done.returncode == 0, done
    without = dengine("get", "color", *at, cwd=tmp_path)
    assert without.returncode == 1
    assert "this call needs a token" in without.stderr
    Path(file).chmod(0o644)
    loose = dengine("get", "color", *at, "--token-file", file, cwd=tmp_path)
    assert loose.returncode == 78
    assert loose.stderr == (
        f"dengine: --token-file: {file} is open to other users (mode 0644): chmod 600 it\n"
    )


def test_a_start_with_a_bad_secret_file_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """Exit code 78 and one sentence, before anything is made on disk."""
    extra = secret_files(tmp_path / "secrets", peer="short")
    port = free_port()
    node = cluster.node(1, config_text(1, {1: port}, 2, 2, extra), port).start()
    assert node.wait_exit() == 78
    assert "security.peer_secret_file" in node.output()
    assert "must hold 16 to 4096 bytes" in node.output()
    assert not node.directory.exists()
    checked = dengine("check-config", str(node.config), cwd=tmp_path)
    assert checked.returncode == 78
