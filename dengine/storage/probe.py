"""Reads a state or a log in a process of its own: `python -m dengine.storage.probe KIND DIRECTORY`.

LMDB believes its pages. One that a power loss has filled with something else can end the process
that reads it, which must then not be the one that decides what to do about it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dengine.errors import DataCorruption, FatalError, StorageIO, TryAgain
from dengine.storage.environment import DATA_FILE, LMDB_SIGNALS, damaged
from dengine.storage.log_store import REMEDY, LogStore
from dengine.storage.state_reader import check_state
from dengine.storage.state_store import StateStore


def probe_state(path: Path) -> None:
    """Check all of the state in directory `path`, which is a copy and may be changed.

    Raises:
        DataCorruption, StorageIO: as `check_state`.
        TryAgain: the reader was killed.
    """
    _probe("state", path, "")


def probe_log(path: Path) -> None:
    """Open and verify the log in directory `path` as a node would.

    Raises:
        DataCorruption, StorageIO: as `LogStore`.
        TryAgain: the reader was killed.
    """
    _probe("log", path, REMEDY)


def _probe(kind: str, path: Path, remedy: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dengine.storage.probe", kind, str(path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode == StorageIO.exit_code:
        raise StorageIO(done.stdout.strip())
    if done.returncode == DataCorruption.exit_code:
        raise DataCorruption(done.stdout.strip(), file=str(path / DATA_FILE))
    if -done.returncode in LMDB_SIGNALS:
        raise damaged(path / DATA_FILE, "LMDB cannot read it", remedy)
    if done.returncode:  # killed, or short of something: that says nothing about the data
        raise TryAgain(f"{path} could not be read (exit code {done.returncode}): try again")


def _main(kind: str, path: Path) -> int:
    try:
        if kind == "log":
            LogStore(path).close()
        else:
            StateStore(path).close()  # its file gets all the pages it should have
            check_state(path)
    except FatalError as error:
        print(error.message)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], Path(sys.argv[2])))
