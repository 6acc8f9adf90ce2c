"""A disk without a free byte, below the reserve that normally keeps a node from getting there."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import UNREACHABLE, Cluster, config_text, free_port, wait_for
from tests.small_disk import small_disk

STORAGE_IO = 74  # the exit code for "the disk refused; a restart recovers"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path, "6m") as path:
        yield path


def test_a_full_disk_ends_the_node_and_loses_nothing_acknowledged(disk: Path) -> None:
    """The write that meets ENOSPC is not acknowledged, the process exits with 74 although that
    request is still open, and a start with room again holds every acknowledged key."""
    port = free_port()
    limits = "founding_wait_ms = 100\n[limits]\nreserve_bytes = 1\n"
    with Cluster(disk) as cluster:
        node = cluster.node(1, config_text(1, {1: port}, 2, 2, limits), port).start()
        wait_for(node.ready, "the node to be ready")
        acknowledged = 0
        try:
            while node.put(f"key{acknowledged}", "x" * 200_000).ok:
                acknowledged += 1
        except UNREACHABLE:
            pass  # cut off without an answer: the outcome is unknown
        assert node.wait_exit() == STORAGE_IO
        assert acknowledged
        assert "the disk is full: make room" in node.output()
        remount = ["mount", "-o", "remount,size=64m", str(disk)]
        subprocess.run(remount, check=True)
        node.start()
        wait_for(node.ready, "the node to be ready again")
        for number in range(acknowledged):
            assert node.get(f"key{number}").ok
