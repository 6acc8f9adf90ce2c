"""Backups of a cluster: saved while it works, verified, and the beginning of a new one."""

from __future__ import annotations

import json
import os
import random
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dengine.storage.snapshot_frames import scan
from tests.cluster import (
    Cluster,
    ServeProcess,
    Writer,
    config_text,
    free_port,
    joiner,
    node_environment,
    static_cluster,
    wait_for,
)
from tests.integration.backups import (
    dengine,
    fill,
    one_sentence,
    records,
    single,
    snapshot,
    tree,
)
from tests.small_disk import fill as fill_disk
from tests.small_disk import small_disk

NOBODY = 65534


def restored(
    cluster: Cluster, file: Path, node_id: int, name: str, port: int | None = None
) -> ServeProcess:
    """A node, started, of the new cluster that begins with `file`."""
    port = port or free_port()
    text = config_text(node_id, {node_id: port}, 2, 2)
    node = cluster.node(node_id, text, port, name=name)
    done = snapshot(
        "restore", file, "--data-dir", node.cwd / "db", "--node-id", node_id,
        "--address", f"127.0.0.1:{port}",
    )  # fmt: skip
    assert done.returncode == 0, done
    assert "role = 3" in done.stdout
    assert f"node_id = {node_id}" in done.stdout
    node.start()
    wait_for(node.ready, "the restored node to be ready")
    return node


def test_a_backup_comes_back_as_a_new_cluster_that_grows(cluster: Cluster, tmp_path: Path) -> None:
    """Every key with its revisions, a revision moved up, another cluster; then 1 -> 3."""
    first = single(cluster)
    fill(first, 60)
    assert first.request("DELETE", "/v1/kv/k/0007").ok
    before, old = records(first), first.cluster()
    file = tmp_path / "backup.dsnap"
    done = snapshot("save", file, node=first)
    assert done.returncode == 0, done
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.glob("backup*")] == ["backup.dsnap"]

    verified = snapshot("verify", file, "--json")
    assert verified.returncode == 0, verified
    inside = json.loads(verified.stdout)
    assert (inside["cluster_id"], inside["revision"]) == (old["cluster_id"], old["revision"])
    assert [m["address"] for m in inside["members"]] == [f"127.0.0.1:{first.port}"]
    assert scan(file).sha256 == inside["sha256"]
    table = snapshot("verify", file)
    assert old["cluster_id"] in table.stdout
    assert "voter" in table.stdout
    assert list(tmp_path.glob(".dengine-verify*")) == []

    second_life = Cluster(tmp_path / "new")
    second_life.directory.mkdir()
    with second_life as new:
        port = free_port()
        node = new.node(1, config_text(1, {1: port}, 2, 2), port)
        done = snapshot(
            "restore", file, "--data-dir", node.cwd / "db", "--node-id", 1,
            "--address", f"127.0.0.1:{port}",
        )  # fmt: skip
        assert done.returncode == 0, done
        node.start()
        new.wait_leader()
        assert records(node) == before
        view = node.cluster()
        assert view["revision"] >= old["revision"] + 1_000_000
        assert view["cluster_id"] not in ("", old["cluster_id"])
        assert node.put("k/new", "v").json()["revision"] == view["revision"] + 1
        writer = Writer(node, "w").start()
        joiner(new, 2).start()
        joiner(new, 3).start()
        new.wait_voters(1, 2, 3, deadline_s=40)
        writer.wait_more(20)
        writer.stop()
        assert not writer.failures
        new.assert_everywhere(writer)
        for member in new.nodes.values():
            assert [r for r in records(member) if r["key"] in {b["key"] for b in before}] == before
        node.kill()  # the state of a restored node can be rebuilt, too
        (node.directory / "RUN").unlink()
        (node.directory / "CLEAN").unlink(missing_ok=True)
        node.start()
        new.wait_voters(1, 2, 3)
        new.assert_everywhere(writer)


def test_a_member_of_the_old_cluster_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """An old follower that still dials the restored node's address gets nothing from it."""
    static_cluster(cluster, 1, 2)
    first, second = cluster.nodes[1], cluster.nodes[2]
    fill(first, 5)
    file = tmp_path / "backup.dsnap"
    assert snapshot("save", file, node=second).returncode == 0, "any node works"
    first.kill()
    node = restored(cluster, file, 1, "restored", port=first.port)
    assert node.put("color", "new").ok
    wait_for(
        lambda: f"node 1 at 127.0.0.1:{first.port}: foreign cluster" in second.output(),
        "the old member to be refused",
    )
    assert [m["id"] for m in node.cluster()["members"]] == [1]
    wait_for(lambda: not second.ready(), "the old member to miss its leader")
    assert second.get("color", "eventual").status == 404


def test_a_stopped_node_is_saved_with_its_log(cluster: Cluster, tmp_path: Path) -> None:
    """`save --data-dir` has everything acknowledged, also what no state held when it was killed."""
    node = single(cluster)
    fill(node, 20)
    at = ("--data-dir", node.directory.parent, "--node-id", 1)
    file = tmp_path / "cold.dsnap"
    assert "in use by process" in one_sentence(snapshot("save", file, *at), 75)
    before = records(node)
    node.kill()
    (node.directory / "RUN").unlink()  # as after a power loss: the state is rebuilt first
    if os.geteuid() == 0:  # an operator's sudo leaves nothing that the node's user cannot read
        for path in (node.directory.parent, node.directory, *node.directory.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    done = snapshot("save", file, *at)
    assert done.returncode == 0, done
    owners = {path.stat().st_uid for path in node.directory.rglob("*")}
    assert owners == {node.directory.parent.stat().st_uid}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = restored(cluster, file, 4, "restored")
    assert records(again) == before
    node.start()
    cluster.wait_leader()
    assert records(node) == before
    absent = one_sentence(snapshot("save", tmp_path / "x", "--data-dir", "db", "--node-id", 9), 1)
    assert "not the data directory" in absent


def test_take_and_list_show_what_is_there(cluster: Cluster) -> None:
    """`take` waits for a snapshot of everything applied; `list` shows it with its time."""
    node = single(cluster)
    fill(node, 3)
    taken = snapshot("take", "--json", node=node)
    assert taken.returncode == 0, taken
    described = json.loads(taken.stdout)
    assert described["index"] == node.status()["last_applied"]
    listed = json.loads(snapshot("list", "--json", node=node).stdout)["snapshots"]
    assert [s["sha256"] for s in listed] == [described["sha256"]]
    assert listed[0]["taken_at_s"] > 1_700_000_000
    table = snapshot("list", node=node).stdout
    assert "INDEX" in table
    assert listed[0]["file"] in table


def test_a_cluster_with_a_token_is_backed_up_too(cluster: Cluster, tmp_path: Path) -> None:
    """Every request of every snapshot command carries it; without it nothing is given out."""
    token = tmp_path / "token"
    token.write_text("a-token-of-the-test-0123456789abcdef\n")
    token.chmod(0o600)
    port = free_port()
    extra = f'\n[security]\ntoken_file = "{token}"\n'
    node = cluster.node(1, config_text(1, {1: port}, 2, 2, extra), port).start()
    wait_for(lambda: node.request("GET", "/readyz").ok, "the node to be ready")
    file = tmp_path / "backup.dsnap"
    for command in (("take",), ("list",), ("save", file)):
        assert snapshot(*command, node=node).returncode == 1
        done = snapshot(*command, "--token-file", token, node=node)
        assert done.returncode == 0, done
    assert snapshot("verify", file).returncode == 0


def test_nothing_is_overwritten(cluster: Cluster, tmp_path: Path) -> None:
    """An existing file or directory stays as it is, whoever made it."""
    node = single(cluster)
    fill(node, 3)
    file = tmp_path / "backup.dsnap"
    file.write_text("precious")
    assert "exists" in one_sentence(snapshot("save", file, node=node), 1)
    assert file.read_text() == "precious"
    good = tmp_path / "good.dsnap"
    assert snapshot("save", good, node=node).returncode == 0
    before = tree(tmp_path / "db" / "1")
    node.kill()
    restore = (
        "restore", good, "--data-dir", tmp_path / "db", "--node-id", 1,
        "--address", "127.0.0.1:9999",
    )  # fmt: skip
    assert "not empty" in one_sentence(snapshot(*restore), 1)
    assert tree(tmp_path / "db" / "1").keys() >= before.keys()


def test_a_backup_makes_no_directory(cluster: Cluster, tmp_path: Path) -> None:
    """A mistyped path is a mistake of this machine, whether the node runs or not."""
    node = single(cluster)
    fill(node, 3)
    file = tmp_path / "mistyped" / "backup.dsnap"
    assert "no directory" in one_sentence(snapshot("save", file, node=node), 74)
    node.kill()
    at = ("--data-dir", node.directory.parent, "--node-id", 1)
    assert "no directory" in one_sentence(snapshot("save", file, *at), 74)
    assert not file.parent.exists()


def test_a_backup_does_not_fill_the_disk(cluster: Cluster, tmp_path: Path) -> None:
    """It may be the disk of the node: what has no room is refused with what is missing, and leaves
    nothing; with room it goes through."""
    node = single(cluster)
    fill(node, 100)
    place = tmp_path / "small"
    place.mkdir()
    with small_disk(place, "1m"):
        filler = fill_disk(place, 40_000)
        said = one_sentence(snapshot("save", place / "backup.dsnap", node=node), 74)
        assert "more must be free for a snapshot of" in said
        assert sorted(place.iterdir()) == [filler]
        filler.unlink()
        assert snapshot("save", place / "backup.dsnap", node=node).returncode == 0


@pytest.fixture
def good(cluster: Cluster, tmp_path: Path) -> Path:
    node = single(cluster)
    fill(node, 30)
    file = tmp_path / "good.dsnap"
    assert snapshot("save", file, node=node).returncode == 0
    node.kill()
    return file


def test_every_damaged_file_is_refused_and_changes_nothing(
    good: Path, tmp_path: Path, rng: random.Random
) -> None:
    """Cut, flipped, of a newer format, foreign, missing: one sentence, and an exit code."""
    content = good.read_bytes()
    cut = [0, 1, 8, 12, 40, len(content) - 33, len(content) - 1, rng.randrange(len(content))]
    flipped = [0, 8, 12, 20, len(content) - 1, len(content) - 50, rng.randrange(len(content))]
    damaged = {f"cut at {at}": (content[:at], 65) for at in cut}
    damaged |= {
        f"flipped at {at}": (content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :], 65)
        for at in flipped
    }
    damaged["newer"] = (content[:8] + b"\x02\x00" + content[10:], 65)
    damaged["foreign"] = (b"SQLite format 3\x00" * 100, 65)
    damaged["longer"] = (content + b"\x00", 65)
    root = tmp_path / "elsewhere" / "db"
    for name, (data, code) in damaged.items():
        file = tmp_path / "bad.dsnap"
        file.write_bytes(data)
        for command in (
            ("verify", file),
            ("restore", file, "--data-dir", root, "--node-id", 1, "--address", "127.0.0.1:1"),
        ):
            sentence = one_sentence(snapshot(*command), code)
            assert str(file) in sentence, name
        assert not root.parent.exists(), name
        assert file.read_bytes() == data
        assert not list(tmp_path.glob(".dengine-verify*"))
    missing = tmp_path / "missing.dsnap"
    assert "No such file" in one_sentence(snapshot("verify", missing), 74)
    assert dengine("snapshot", "verify").returncode == 2
    nowhere = snapshot("restore", good, "--data-dir", root, "--node-id", 1, "--address", "x")
    assert "must be an address" in one_sentence(nowhere, 2)
    assert dengine("snapshot", "restore", good, "--data-dir", root).returncode == 2


def test_the_installed_client_saves_without_the_packages_of_a_node(
    cluster: Cluster, tmp_path: Path
) -> None:
    """A machine that only takes backups needs neither lmdb nor msgspec, and checks them too."""
    node = single(cluster)
    fill(node, 5)
    absent = ["lmdb", "msgspec", "prometheus_client", "psutil", "uvloop", "xxhash", "zlib_ng"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "from dengine.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    file = tmp_path / "backup.dsnap"
    at = ("--endpoint", f"127.0.0.1:{node.port}")
    for command in (("take",), ("list",), ("save", str(file))):
        done = subprocess.run(
            [sys.executable, "-c", program, "snapshot", *command, *at],
            env=node_environment(), capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done
    assert snapshot("verify", file).returncode == 0


class CuttingProxy:
    """Passes connections on to a node, but cuts each download after `limit` bytes of answer."""

    def __init__(self, node: ServeProcess, limit: int) -> None:
        self.node, self.limit, self.cuts = node, limit, 0
        self.ranges: list[str] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            with client, socket.create_connection(("127.0.0.1", self.node.port)) as upstream:
                request = client.recv(65536)
                upstream.sendall(request)
                is_download = b"Range: bytes=" in request and b"-\r\n" in request
                if is_download:
                    line = request.split(b"Range: ")[1].split(b"\r\n")[0]
                    self.ranges.append(line.decode())
                self._answer(client, upstream, self.limit if is_download else 2**40)

    def _answer(self, client: socket.socket, upstream: socket.socket, left: int) -> None:
        upstream.settimeout(2)
        client.settimeout(2)
        head = b""
        length: int | None = None
        while length is None or length > 0:
            data = upstream.recv(65536)
            if not data:
                return
            if length is None:
                head += data
                if b"\r\n\r\n" not in head:
                    continue
                top, _, body = head.partition(b"\r\n\r\n")
                fields = [f.split(b": ") for f in top.split(b"\r\n")[1:]]
                length = next(int(f[1]) for f in fields if f[0].lower() == b"content-length")
                data, length = head, length - len(body)
            else:
                length -= len(data)
            client.sendall(data[:left])
            left -= len(data)
            if left <= 0:
                self.cuts += 1
                return

    def close(self) -> None:
        self._server.close()


def test_a_download_goes_on_after_each_cut(cluster: Cluster, tmp_path: Path) -> None:
    """A way that breaks again and again costs time, not the backup, and no byte comes twice."""
    node = single(cluster)
    fill(node, 120)
    proxy = CuttingProxy(node, 20_000)
    file = tmp_path / "backup.dsnap"
    done = snapshot("save", file, "--endpoint", f"127.0.0.1:{proxy.port}")
    proxy.close()
    assert done.returncode == 0, done
    assert proxy.cuts >= 2
    starts = [int(r.removeprefix("bytes=").removesuffix("-")) for r in proxy.ranges]
    assert starts == sorted(set(starts)), "each goes on where the one before ended"
    assert snapshot("verify", file).returncode == 0


def test_a_rerun_resumes_what_an_earlier_one_left(cluster: Cluster, tmp_path: Path) -> None:
    """The sound prefix of the same snapshot is kept; anything else is begun anew."""
    node = single(cluster)
    fill(node, 60)
    file, partial = tmp_path / "backup.dsnap", tmp_path / "backup.dsnap.partial"
    taken = json.loads(snapshot("take", "--json", node=node).stdout)
    whole = node.request("GET", f"/v1/snapshots/{taken['sha256']}").body
    partial.write_bytes(whole[: len(whole) - 100])
    fill(node, 3, "later/")
    done = snapshot("save", file, node=node)
    assert done.returncode == 0, done
    assert "resuming after" in done.stderr
    assert file.read_bytes() == whole
    file.unlink()
    for rubbish in (b"", b"no snapshot at all", whole[:50] + b"\x00" * 5000, whole[:-9][::-1]):
        partial.write_bytes(rubbish)
        done = snapshot("save", file, node=node)
        assert done.returncode == 0, done
        assert "resuming" not in done.stderr
        assert scan(file).sha256 in done.stdout
        assert not partial.exists()
        file.unlink()
