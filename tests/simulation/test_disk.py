"""The simulated disk loses what a real one may lose, and nothing that it has promised."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.simulation.disk import Disk, SimOs, SimPath, rmtree, sync_directory
from tests.simulation.loop import Crash

ROOT = SimPath("/test")
FILE = ROOT / "file"


@pytest.fixture
def disk() -> Iterator[Disk]:
    made = SimPath.disks["test"] = Disk("test", random.Random(1))
    yield made
    del SimPath.disks["test"]


def save(disk: Disk, content: bytes) -> None:
    """As a program that means it: written anew and synced."""
    system = SimOs(lambda: disk, random.randbytes)
    fd = system.open(FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    with system.fdopen(fd, "wb") as stream:
        stream.write(content)
        system.fsync(fd)


def test_a_synced_file_is_durable_once_its_name_is(disk: Disk) -> None:
    save(disk, b"content")
    assert disk.durable(("file",)) is None
    sync_directory(ROOT)
    node = disk.durable(("file",))
    assert node is not None
    assert node.synced == b"content"


def test_a_change_of_a_durable_name_is_not_durable_by_itself(disk: Disk) -> None:
    save(disk, b"content")
    sync_directory(ROOT)
    FILE.rename(ROOT / "other")
    assert disk.durable(("file",)) is None
    assert disk.durable(("other",)) is None


def test_after_an_fsync_that_failed_a_later_one_saves_nothing(disk: Disk) -> None:
    save(disk, b"old")
    sync_directory(ROOT)
    disk.eio, disk.eio_kind = 0, "file sync"
    with pytest.raises(OSError, match="Input/output"):
        save(disk, b"new")
    system = SimOs(lambda: disk, random.randbytes)
    system.fsync(system.open(FILE, os.O_WRONLY))
    assert FILE.read_bytes() == b"new"
    disk.lose_power()
    assert FILE.read_bytes() == b"old"


def test_a_file_that_is_written_anew_after_that_is_saved(disk: Disk) -> None:
    disk.eio, disk.eio_kind = 0, "file sync"
    with pytest.raises(OSError, match="Input/output"):
        save(disk, b"first")
    save(disk, b"second")
    sync_directory(ROOT)
    disk.lose_power()
    assert FILE.read_bytes() == b"second"


def test_a_directory_can_be_synced_after_a_sync_that_failed(disk: Disk) -> None:
    save(disk, b"content")
    disk.eio, disk.eio_kind = 0, "directory sync"
    with pytest.raises(OSError, match="Input/output"):
        sync_directory(ROOT)
    assert disk.durable(("file",)) is None
    sync_directory(ROOT)
    assert disk.durable(("file",)) is not None


def test_a_full_disk_takes_nothing_new_and_lets_go_of_what_is_there(disk: Disk) -> None:
    save(disk, b"content")
    disk.room = 0
    with pytest.raises(OSError, match="No space"):
        (ROOT / "other").touch()
    FILE.unlink()
    assert not FILE.exists()
    assert disk.refusals == 1


def test_a_disk_may_fill_in_the_midst_of_a_file(disk: Disk) -> None:
    disk.room = 5
    with pytest.raises(OSError, match="No space"):
        save(disk, b"content")
    assert FILE.read_bytes() == b"cont"
    assert disk.free_bytes() == 0
    disk.room = None
    save(disk, b"content")
    assert FILE.read_bytes() == b"content"


def test_a_crash_leaves_a_part_of_what_is_being_removed(disk: Disk) -> None:
    directory = ROOT / "directory"
    directory.mkdir()
    for name in ("a", "b"):
        (directory / name).touch()
    disk.fuse = 1
    with pytest.raises(Crash):
        rmtree(directory)
    assert [path.name for path in directory.glob("*")] == ["b"]
