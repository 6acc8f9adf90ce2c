"""A write of the state that fails at its very last step."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.cluster import ROOT, node_environment
from tests.crash_sweep.strace import Fault, Injection

META = re.compile(r", 120, \d+\) = -1 EIO")  # the size of what changes in a meta page
CHILD = """
import sys
from pathlib import Path
from dengine.kv.commands import Put, encode_batch, encode_command
from dengine.raft.types import Entry, EntryKind
from dengine.storage.state_store import StateStore

state = StateStore(Path(sys.argv[1]))
for line in sys.stdin:
    index = state.applied.index + 1
    data = encode_batch([encode_command(Put(b"key", b"%d" % index))])
    try:
        state.apply([Entry(index, 1, EntryKind.NORMAL, data)])
        print(index, flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


def failing_write(path: Path, log: Path) -> str:
    """What comes of an entry that is applied while the first `pwrite64` to the data file fails."""
    command = [sys.executable, "-c", CHILD, str(path)]
    with subprocess.Popen(
        command, cwd=ROOT, env=node_environment(), stdin=-1, stdout=-1, text=True, bufsize=1
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("next\n")
        assert child.stdout.readline().strip().isdigit()
        fault = Injection(log, "pwrite64", [path / "data.mdb"], Fault.EIO, 1, children=False)
        fault.attach(child.pid)
        child.stdin.write("next\n")
        said = child.stdout.readline()
        fault.detach(child.pid)
        child.stdin.close()
    return said


def test_a_disk_that_refuses_a_page_is_what_is_reported(tmp_path: Path) -> None:
    """Also when it is the last one, the meta page, after which LMDB begins no transaction any more:
    the error that ends the node is that of the disk (74), and the next start goes on."""
    log = tmp_path / "failed"
    # Pages that lie side by side are written by another call; then the meta page's is the first.
    for _ in range(10):
        said = failing_write(tmp_path / "state-1", log)
        assert said.startswith("StorageIO"), said
        assert "Input/output error" in said
        if META.search(log.read_text(encoding="utf-8")):
            return
    raise AssertionError("the meta page was never the one that failed")
