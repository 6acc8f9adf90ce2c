"""Snapshots with sectors that the disk cannot give back: nobody relies on such a file any more."""

from __future__ import annotations

import asyncio
import builtins
import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import pytest

from dengine.api.snapshots import SnapshotCalls
from dengine.errors import DataCorruption, StorageIO
from dengine.raft.types import SnapshotRef
from dengine.storage import snapshot_file, snapshot_frames
from dengine.storage.snapshot_file import SnapshotInfo, read_header, verify
from dengine.storage.snapshot_frames import sound_prefix
from dengine.storage.state_store import StateStore
from tests.storage.states import OTHER, history, membership, snapshot_of


class LostSector:
    """A file that is open for reading and fails where a read goes beyond `good` bytes."""

    def __init__(self, stream: BinaryIO, good: int, code: int) -> None:
        self._stream = stream
        self._good, self._code = good, code

    def read(self, length: int) -> bytes:
        if self.tell() + length > self._good:
            raise OSError(self._code, os.strerror(self._code))
        return self._stream.read(length)

    def tell(self) -> int:
        return self._stream.tell()

    def __enter__(self) -> LostSector:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


@pytest.fixture
def made(tmp_path: Path) -> SnapshotInfo:
    state = StateStore(tmp_path / "state-1")
    state.apply(history(membership(OTHER), 200))
    state.close()
    return snapshot_of(tmp_path / "state-1", tmp_path / "snapshots")


def lose(monkeypatch: pytest.MonkeyPatch, good: int, code: int = errno.EIO) -> None:
    """From byte `good` on, no snapshot can be read."""

    def opened(path: Path, mode: str) -> Any:
        return LostSector(cast(BinaryIO, builtins.open(path, mode)), good, code)

    for module in (snapshot_file, snapshot_frames):
        monkeypatch.setattr(module, "open", opened, raising=False)


def test_a_lost_sector_is_damage(made: SnapshotInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is: no other attempt helps, another snapshot does."""
    for good in (0, 100, made.size_bytes // 2, made.size_bytes - 1):
        lose(monkeypatch, good)
        with pytest.raises(DataCorruption, match="cannot be read") as caught:
            verify(made.path)
        assert caught.value.details["file"] == str(made.path)
    lose(monkeypatch, 0)
    with pytest.raises(DataCorruption, match="cannot be read"):
        read_header(made.path)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.ENOMEM])
def test_what_is_lacking_elsewhere_says_nothing_of_the_file(
    made: SnapshotInfo, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A sound file is not given up for want of a descriptor."""
    lose(monkeypatch, 0, code)
    with pytest.raises(StorageIO):
        verify(made.path)


def test_what_was_received_before_a_lost_sector_is_kept(
    made: SnapshotInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transfer goes on from there."""
    lose(monkeypatch, made.size_bytes // 2)
    kept = sound_prefix(made.path)
    assert made.size_bytes // 4 < kept <= made.size_bytes // 2


def test_a_file_that_cannot_be_sent_is_suspected(tmp_path: Path) -> None:
    """The receiver is cut off, for what it has is not all, and the file is looked at here: else it
    would be offered for ever."""
    suspected: list[SnapshotRef] = []
    ref = SnapshotRef(7, 1, "a" * 64, 1000)
    request: Any = SimpleNamespace(message=SimpleNamespace(headers={}))

    async def test() -> None:
        files = SimpleNamespace(transfers=SimpleNamespace(), is_distrusted=lambda ref: False)
        snapshots = SimpleNamespace(suspect=suspected.append, files=files)
        calls = SnapshotCalls(
            cast(Any, SimpleNamespace(snapshots=snapshots)),
            cast(Any, SimpleNamespace(snapshot=SimpleNamespace(max_bytes_per_s=1))),
            cast(Any, None),
        )
        unreadable = os.open(tmp_path, os.O_RDONLY)  # a directory has no bytes
        try:
            with pytest.raises(ConnectionResetError):
                await calls._send(request, cast(Any, None), unreadable, ref, 0, 1000)
        finally:
            os.close(unreadable)

    asyncio.run(test())
    assert suspected == [ref]
