"""States are compared at one log time, and all of them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from dengine.errors import DataCorruption
from dengine.kv.commands import Put, encode_batch, encode_command
from dengine.raft.types import Entry, EntryKind, MemberId
from dengine.storage.directory import DataDirectory
from dengine.storage.environment import DATA_FILE
from dengine.storage.state_store import StateStore
from tests.nemesis.states import at_one_moment, read_through
from tests.storage.states import config, membership


def timed(index: int, value: bytes, clock_ms: int) -> Entry:
    data = encode_batch([encode_command(Put(b"k", value))], clock_ms)
    return Entry(index, 1, EntryKind.NORMAL, data)


def nodes(tmp_path: Path, *last: Entry) -> dict[int, Path]:
    """The directory of each, which differ in the last entry at most."""
    found = {}
    for node_id, entry in enumerate(last, 1):
        directory = DataDirectory.open(tmp_path / f"n{node_id}", node_id)
        with closing(StateStore(directory.state_path())) as state:
            state.apply([config(1, membership(MemberId(1, 1))), timed(2, b"one", 1000), entry])
            state.sync()
        found[node_id] = directory.path
    return found


def test_states_of_different_times_are_not_compared(tmp_path: Path) -> None:
    """Whoever waits asks again; to compare fewer than all would be to compare nobody in the end."""
    one, other = timed(3, b"two", 2000), timed(3, b"two", 3000)
    assert at_one_moment(nodes(tmp_path, one, one, other)) is None


def test_states_of_one_time_are_equal_or_not(tmp_path: Path) -> None:
    one, other = timed(3, b"two", 2000), timed(3, b"too", 2000)
    texts = at_one_moment(nodes(tmp_path, one, one, other))
    assert texts is not None
    assert texts[1] == texts[2] != texts[3]
    assert texts[3].endswith("at revision 2")


def test_a_state_that_is_not_sound_is_found(tmp_path: Path) -> None:
    (directory,) = nodes(tmp_path, timed(3, b"two", 2000)).values()
    read_through(directory)
    current = (directory / "CURRENT").read_text(encoding="utf-8").strip()
    file = directory / current / DATA_FILE
    file.write_bytes(file.read_bytes().replace(b"two", b"twp"))
    with pytest.raises(DataCorruption):
        read_through(directory)
    with pytest.raises(DataCorruption):
        at_one_moment({1: directory})
