"""What nodes have on disk as their state: read by another process, also while they run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from dengine.kv.store import decode_totals
from dengine.storage.state_reader import StateReader
from dengine.storage.state_records import TOTALS_KEY
from dengine.storage.state_view import sound_data
from tests.nemesis.damage import file_of


def read_through(directory: Path) -> None:
    """The state in a node's data directory is sound. Raises FatalError."""
    with StateReader(_path(directory)) as state:
        state.check()


def at_one_moment(directories: Mapping[int, Path]) -> dict[int, str] | None:
    """Hash and revision of each state, which is read through; None while their log times differ:
    an entry that only carries the time may have come to some nodes and not to the others.

    Args:
        directories: of data, by node.

    Raises:
        FatalError: one is not sound.
    """
    with contextlib.ExitStack() as stack:
        states = {
            node_id: stack.enter_context(StateReader(_path(directory)))
            for node_id, directory in directories.items()
        }
        if len({_clock_ms(state) for state in states.values()}) > 1:
            return None
        for state in states.values():
            state.check()
        digests = {node_id: state.digest for node_id, state in states.items()}
    return {
        node_id: f"{digest.state_hash.hex()} at revision {digest.revision}"
        for node_id, digest in digests.items()
    }


def _path(directory: Path) -> Path:
    file = file_of(directory, "state")
    assert file is not None, f"there is no state in {directory}"
    return file.parent


def _clock_ms(state: StateReader) -> int:
    raw = state._txn.get(TOTALS_KEY, db=state._databases[b"meta"])
    totals = decode_totals(sound_data(TOTALS_KEY, raw, state._path)) if raw else None
    return totals.clock_ms if totals is not None else 0
