"""A disk on which a state does not fit twice: the one that cannot be used has to make room."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dengine.errors import DataCorruption, StorageIO
from dengine.storage import recovery
from dengine.storage.directory import DataDirectory
from dengine.storage.recovery import Stores, open_stores
from dengine.storage.snapshots import list_files, unpack
from tests.small_disk import fill, small_disk
from tests.storage.states import everything, keys_of, lived, purge, snapshot_at
from tests.storage.test_recovery import (
    Crash,
    ends_at_step,
    flip_body,
    has,
    lose_power,
    opened,
    restarted,
    rot,
)

PAGES = 4 * os.sysconf("SC_PAGE_SIZE")  # fewer than any state has


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path, "8m") as path:
        yield path


def crowded(disk: Path, *, how: str = "power lost", leave: int = 0) -> DataDirectory:
    """The directory of a sole voter with 30 entries, the last 10 of them still in its log, and
    snapshots of 22 and 25. Its state is of no use, and the disk has only `leave` bytes left."""
    directory = lived(disk, 30)
    for index in (22, 25):
        snapshot_at(directory, index)
        shutil.rmtree(disk / f"scratch-{index}")
    purge(directory, 20)
    state = directory.state_path()
    if how == "power lost":
        lose_power(directory)
    elif how == "damaged":
        (state / "DAMAGED").touch()
    else:  # while it was installed
        (state / "UNPACKED").touch()
        rot(state / "data.mdb")
    fill(disk, leave)
    return restarted(directory)


def rebuilt(directory: DataDirectory, applied: int = 25) -> None:
    """It starts with what the snapshot has; with room again it applies the rest of the log."""

    def check(stores: Stores) -> None:
        assert stores.state.applied.index == applied
        assert keys_of(stores.state) == [b"k%03d" % n for n in range(2, applied + 1)]

    opened(directory, check)
    assert states(directory) == [directory.state_path()]
    (directory.path.parent / "filler").unlink()
    opened(directory, has(applied, 30, first=21))
    opened(directory, has(30, 30, first=21))


def states(directory: DataDirectory) -> list[Path]:
    return list(directory.path.glob("state-*"))


HOWS = ("power lost", "damaged", "damaged while unpacked")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("leave", [0, PAGES])
def test_a_state_of_no_use_makes_room(
    disk: Path, caplog: pytest.LogCaptureFixture, how: str, leave: int
) -> None:
    """It took the room that its successor needs, so no start ever got further. It goes once the
    snapshot is known to be sound, and the log says so."""
    directory = crowded(disk, how=how, leave=leave)
    with caplog.at_level(logging.INFO, "dengine.recovery"):
        rebuilt(directory)
    (said,) = (m for m in caplog.messages if "that one is deleted first" in m)
    assert "snapshot-1-25.dsnap was verified, and there is no room" in said
    directory.close()


def test_what_nobody_uses_makes_room_first(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The node died while it unpacked a snapshot only to look at it: with that out of the way the
    old state can stay until the new one is in use."""
    directory = crowded(disk)
    (disk / "filler").unlink()
    directory.scratch_path.mkdir()
    (directory.scratch_path / "data.mdb").write_bytes(bytes(3 * 2**20))
    fill(disk, 0)
    with caplog.at_level(logging.INFO, "dengine.recovery"):
        rebuilt(directory)
    assert not any("that one is deleted first" in said for said in caplog.messages)
    assert not directory.scratch_path.exists()
    directory.close()


def test_room_for_just_the_state_is_not_enough(disk: Path) -> None:
    """It would be unpacked, and then not one byte of CURRENT could be written."""
    directory = crowded(disk)
    (newest,) = list_files(directory.snapshots_path)[1:]
    (disk / "filler").unlink()
    fill(disk, newest.stat().st_size)
    rebuilt(directory)
    directory.close()


def test_where_there_is_room_the_old_state_stays_until_the_new_one_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(file: Path, state: Path, progress: object) -> object:
        seen.append((directory.path / "state-1" / "data.mdb").exists())
        return unpack(file, state, lambda done, total: None)

    directory = lived(tmp_path, 30)
    snapshot_at(directory, 25)
    lose_power(directory)
    directory = restarted(directory)
    monkeypatch.setattr(recovery, "unpack", watched)
    opened(directory, has(25, 30))
    assert seen == [True]
    assert [path.name for path in states(directory)] == ["state-2"]
    directory.close()


def test_an_unsound_snapshot_deletes_nothing(disk: Path) -> None:
    """Nobody else has the data, so a person may need the very state that is not to be trusted."""
    directory = crowded(disk)
    state = directory.state_path()
    before = everything(state)
    for file in list_files(directory.snapshots_path):
        flip_body(file)
    for _ in range(3):
        with pytest.raises(DataCorruption, match="dengine repair --accept-data-loss"):
            open_stores(directory)
        assert everything(state) == before
        directory = restarted(directory)
    directory.close()


def test_an_older_snapshot_that_is_sound_is_used(disk: Path) -> None:
    """The newest is not: it is put aside, and the state goes for the one before it."""
    directory = crowded(disk)
    flip_body(list_files(directory.snapshots_path)[-1])
    rebuilt(directory, 22)
    directory.close()


@pytest.mark.parametrize(
    ("how", "end"),
    [
        ("power lost", Crash()),
        ("damaged while unpacked", Crash()),
        ("damaged", OSError(errno.EIO, "Input/output error")),
    ],
)
def test_every_step_of_making_room_may_be_the_last(
    disk: Path, how: str, end: BaseException
) -> None:
    """Whatever step the start dies at or fails at, the next one gets there."""
    for number in itertools.count(1):
        directory = crowded(disk, how=how)
        with ends_at_step(number, end) as reached, suppress(type(end), StorageIO):
            opened(directory, lambda stores: None)
        if len(reached) >= number:
            directory = restarted(directory)
            rebuilt(directory)
            left = {path.name for path in directory.path.iterdir()}
            known = {"LOCK", "identity.json", "CURRENT", "RUN", "log", "snapshots"}
            assert left == known | {directory.state_path().name}, reached[-1]
        directory.close()
        shutil.rmtree(directory.path)
        (disk / "filler").unlink(missing_ok=True)
        if len(reached) < number:
            break
    assert number > 20
