"""Backups on this machine: whose they are, how they arrive, and what a kill leaves."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.ansible.load import request
from tests.ansible.local import PLAYBOOK, ROOT, Local, local
from tests.ansible.test_snapshot_module import snapshot_file
from tests.cluster import wait_for

MB = 1024 * 1024
# Runs a command and prints the most memory in KB that any process of it had.
PEAK = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print("PEAK", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
pytestmark = pytest.mark.timeout(600)


def fetch(directory: Path, source: Path, said: dict[str, Any]) -> dict[str, Any]:
    """Run `dengine_fetch` alone, as ansible does, and return its result."""
    play = [{
        "hosts": "localhost",
        "gather_facts": False,
        "tasks": [
            {
                "dengine.core.dengine_fetch": {
                    "src": str(source),
                    "dest": str(directory / "copy.dsnap"),
                    "sha256": said["sha256"],
                    "size_bytes": said["size_bytes"],
                },
                "register": "fetched",
                "ignore_errors": True,
            },
            {
                "ansible.builtin.copy": {
                    "content": "{{ fetched | to_json }}",
                    "dest": str(directory / "result.json"),
                }
            },
        ],
    }]  # fmt: skip
    (directory / "play.yml").write_text(json.dumps(play))
    command = [sys.executable, "-c", PEAK, str(PLAYBOOK), "-i", "localhost,", "-c", "local"]
    done = subprocess.run(
        [
            *command,
            "-e",
            f"ansible_python_interpreter={sys.executable}",
            str(directory / "play.yml"),
        ],
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "ansible" / "collections"),
            "ANSIBLE_HOME": str(directory / "ansible"),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return {**result, "peak_bytes": 1024 * int(done.stdout.rpartition("PEAK")[2])}


def test_a_file_is_fetched_in_pieces_and_gone_on_with(tmp_path: Path) -> None:
    """What is cut off has not the final name; the next run keeps what is there already."""
    file, said = snapshot_file(20 * MB + 12345)
    source, copy = tmp_path / "it's a source.dsnap", tmp_path / "copy.dsnap"
    part = tmp_path / "copy.dsnap.part"
    source.write_bytes(file[: 9 * MB])
    cut = fetch(tmp_path, source, said)
    assert "ends at" in cut["msg"]
    assert part.stat().st_size == 9 * MB
    assert not copy.exists()
    source.write_bytes(file)
    result = fetch(tmp_path, source, said)
    assert result["changed"]
    assert result["resumed_at"] == 9 * MB
    assert copy.read_bytes() == file
    assert copy.stat().st_mode & 0o777 == 0o600
    assert not part.exists()
    assert not fetch(tmp_path, source, said)["changed"]


def test_a_file_that_arrives_damaged_never_gets_its_name(tmp_path: Path) -> None:
    file, said = snapshot_file(MB)
    source = tmp_path / "source.dsnap"
    source.write_bytes(bytes([file[0] ^ 1]) + file[1:])
    assert "did not arrive as it is" in fetch(tmp_path, source, said)["msg"]
    assert not list(tmp_path.glob("copy*"))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """No process on either side is as large as the file."""
    source, digest, piece = tmp_path / "source.dsnap", hashlib.sha256(), os.urandom(MB)
    with source.open("wb") as file:
        for _ in range(300):
            file.write(piece)
            digest.update(piece)
        file.write(digest.digest())
    said = {"sha256": digest.hexdigest(), "size_bytes": source.stat().st_size}
    result = fetch(tmp_path, source, said)
    assert result["changed"]
    assert result["peak_bytes"] < 200 * MB


@pytest.mark.playbooks
def test_two_clusters_share_a_destination(tmp_path: Path) -> None:
    """Each keeps as many backups as it was told to, whatever the other one does there."""
    shared = tmp_path / "backups"
    with contextlib.ExitStack() as both:
        sites = []
        for name in "ab":
            site = both.enter_context(local(tmp_path / name, 1))
            site.set_group(dengine_backup_dest=str(shared), dengine_backup_keep=2)
            site.play("site").ok()
            sites.append(site)
        one, other = sites
        for site in (one, other, one, one):
            backup(site)
        kept = sorted(path.name for path in shared.iterdir())
        owners = [name.split("-")[2] for name in kept]
        ids = [site.get("n1", "/v1/cluster")["cluster_id"][:8] for site in (one, other)]
        assert sorted(owners) == sorted([ids[0], ids[0], ids[1]]), kept


@pytest.mark.playbooks
def test_a_stopped_cluster_grows_only_with_a_backup(site: Local) -> None:
    """Its only voter answers nothing while it is stopped; it is started, and then backed up before
    the others join. For what a run itself founded there is nothing to keep."""
    site.play("site").ok()
    assert site.report("site")["facts"]["backup"] == "none needed"
    os.kill(site.pid("n1"), signal.SIGTERM)
    wait_for(lambda: not site.node_pids(), "node 1 to stop")
    site.play("expand").ok()
    assert site.voters() == [1, 2, 3]
    (copy,) = (site.state / "backups").glob("*.dsnap")
    assert Path(site.report()["facts"]["backup"]).name == copy.name
    site.play("expand").ok()
    assert site.report()["facts"]["backup"] == "none: nobody joined"


def backup(site: Local) -> None:
    """One more, with something new in it."""
    token = site.secrets["token"]
    status, _ = request(site.endpoint("n1"), "PUT", "/v1/kv/k", token, os.urandom(8))
    assert status == 200
    site.play("backup").ok()
