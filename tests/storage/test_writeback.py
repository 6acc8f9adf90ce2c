"""Dirty pages reach the disk in small steps, and whoever asks learns what the disk refused."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dengine.errors import StorageIO
from dengine.storage import state_store, writeback
from dengine.storage.marks import DAMAGED_MARK
from dengine.storage.state_store import StateStore
from dengine.storage.writeback import STEP_BYTES, write_back

MIB = 2**20


class Disk:
    """An ext4 of its own on a loop device, which counts what is written to it."""

    def __init__(self, directory: Path) -> None:
        self.mounted = directory / "mounted"
        image = directory / "image"
        image.touch()
        os.truncate(image, 128 * MIB)
        self.mounted.mkdir()
        subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(self.mounted)], check=True)
        device = os.stat(self.mounted).st_dev
        self._counts = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")

    def written_bytes(self) -> int:
        return int(self._counts.read_text().split()[6]) * 512

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.mounted)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4")
    made = Disk(tmp_path)
    yield made
    made.unmount()


def test_all_of_a_file_is_written_in_steps(disk: Disk) -> None:
    """Eight MiB that lie in memory are on the disk after eight steps, and not a second time."""
    file = disk.mounted / "file"
    file.write_bytes(os.urandom(8 * MIB))
    os.sync()
    file.write_bytes(b"")
    with file.open("r+b") as stream:
        stream.write(os.urandom(8 * MIB))
    before = disk.written_bytes()
    steps = list(write_back(file))
    assert len(steps) == 8 * MIB // STEP_BYTES
    first = disk.written_bytes() - before
    assert 8 * MIB <= first < 9 * MIB
    list(write_back(file))
    assert disk.written_bytes() - before - first < MIB


def test_a_file_that_is_not_there_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        list(write_back(tmp_path / "missing"))
    assert caught.value.filename == str(tmp_path / "missing")


def refusing(code: int) -> Iterator[float]:
    """What `write_back` of a file on a broken disk is."""
    yield 0.0
    raise OSError(code, os.strerror(code))


def test_a_refused_page_marks_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes a page that it could not write for a clean one: only a rebuild helps."""
    state = StateStore(tmp_path / "state")
    monkeypatch.setattr(state_store, "write_back", lambda _: refusing(errno.EIO))
    with pytest.raises(StorageIO, match="Input/output error"):
        list(state.write_back())
    assert (tmp_path / "state" / DAMAGED_MARK).exists()
    state.close()


def test_a_system_that_cannot_do_this_says_nothing_of_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sandbox that forbids the call, or a kernel that does not know it."""
    state = StateStore(tmp_path / "state")
    monkeypatch.setattr(state_store, "write_back", lambda _: refusing(errno.EPERM))
    with pytest.raises(OSError, match="Operation not permitted"):
        list(state.write_back())
    assert not (tmp_path / "state" / DAMAGED_MARK).exists()
    state.close()


def test_a_state_that_was_replaced_meanwhile_is_nobodys_business(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = StateStore(tmp_path / "old")
    monkeypatch.setattr(state_store, "write_back", lambda _: refusing(errno.EIO))
    steps = state.write_back()
    next(steps)
    state.replace(tmp_path / "new")
    assert list(steps) == []
    assert not (tmp_path / "new" / DAMAGED_MARK).exists()
    state.close()


def test_the_system_call_reports_errors() -> None:
    """On a descriptor that is none; the number of the error is not lost on the way."""
    assert writeback._sync_file_range(-1, 0, 1, 0) == -1
    assert writeback.ctypes.get_errno() == errno.EBADF
