"""What the tests of backup and repair share: the command line, and directories compared."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cluster import Cluster, ServeProcess, config_text, free_port, node_environment

Done = subprocess.CompletedProcess[str]


def dengine(*args: object, cwd: Path | None = None) -> Done:
    """Run one command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "dengine", *map(str, args)],
        cwd=cwd,
        env=node_environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


def snapshot(*args: object, node: ServeProcess | None = None, cwd: Path | None = None) -> Done:
    at = ("--endpoint", f"127.0.0.1:{node.port}") if node is not None else ()
    return dengine("snapshot", *args, *at, cwd=cwd)


def single(cluster: Cluster, node_id: int = 1) -> ServeProcess:
    """A cluster of one that has a leader."""
    port = free_port()
    text = config_text(node_id, {node_id: port}, 2, 2)
    node = cluster.node(node_id, text, port).start()
    cluster.wait_leader()
    return node


def fill(node: ServeProcess, count: int, prefix: str = "k/") -> dict[str, str]:
    """Write keys, some of them twice and some of them large; what is there afterwards."""
    written = {f"{prefix}{n:04d}": f"value {n} " * (1 + n % 50) for n in range(count)}
    for key, value in written.items():
        assert node.put(key, value).ok
    return written


def records(node: ServeProcess) -> list[dict[str, Any]]:
    """Every key with its value and all of its revisions."""
    reply = node.call("GET", "/v1/kv?limit=1000")
    assert reply.ok, reply
    items: list[dict[str, Any]] = reply.json()["items"]
    return items


def tree(path: Path) -> dict[str, str]:
    """Names and content of all files below a directory, but for locks."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in ("LOCK", "lock.mdb")
    }


def one_sentence(done: Done, exit_code: int) -> str:
    """The command failed with this code and one line that says why."""
    assert done.returncode == exit_code, done
    assert done.stdout == "", done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done
    assert lines[0].startswith("dengine: ")
    return lines[0]
