"""Whoever writes a snapshot is hit, and nobody else."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster import wait_for
from tests.nemesis.on_processes import writers_of
from tests.nemesis.test_faults import carry_out, faults_of

PARENT = """
import subprocess, sys, time
sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]
writer = subprocess.Popen([*sleeps, "dengine.snapshot_writer"])
other = subprocess.Popen(sleeps)
print(writer.pid, other.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("name", ["kill writer", "stop writer"])
def test_a_snapshot_writer_is_hit_and_nobody_else(tmp_path: Path, name: str) -> None:
    """One that was only stopped goes on afterwards."""
    with faults_of(tmp_path) as faults:
        carry_out(faults, name, "all")
        assert (faults.drawn[name], faults.effective[name]) == (1, 0)
        node = faults.nodes.all[1]
        process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
        node.serve.process = process
        node.book.begin(time.monotonic())
        assert process.stdout is not None
        writer, other = map(psutil.Process, map(int, process.stdout.readline().split()))
        try:
            wait_for(lambda: writers_of(process.pid) == [writer], "it to be started")
            carry_out(faults, name, "all", 0.3)
            assert faults.effective[name] == 1
            assert node.up
            assert other.status() != psutil.STATUS_STOPPED
            left = [psutil.STATUS_ZOMBIE] if name == "kill writer" else [psutil.STATUS_SLEEPING]
            wait_for(lambda: writer.status() in left, "what a signal leaves of it")
        finally:
            for child in (writer, other):
                child.kill()
            process.stdout.close()
