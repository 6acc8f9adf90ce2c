"""Which verified snapshots a node keeps, and how far its log may go."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from dengine.config import Snapshot
from dengine.node.snapshot_files import SnapshotFiles
from dengine.raft.raft import Raft
from dengine.raft.types import MemberId, SnapshotRef

PEER = MemberId(2, 22)


class Shelf:
    """`SnapshotFiles` with a Raft that says what the test wants, and real files."""

    def __init__(self, path: Path, **config: int) -> None:
        self.path = path
        self.offered: dict[MemberId, SnapshotRef] = {}
        self.helped: dict[MemberId, tuple[SnapshotRef, int]] = {}
        self.told: list[Sequence[SnapshotRef]] = []
        self.raft: Any = SimpleNamespace(
            log=SimpleNamespace(applied_index=1000),
            state_lost=False,
            offered_snapshots=lambda: self.offered,
            helped_by_snapshots=lambda: self.helped,
            snapshots_changed=self.told.append,
        )
        settings = {"retained_log_entries": 0, "keep": 3, "hold_bytes": 1000, **config}
        self.files = SnapshotFiles(Snapshot(**settings), cast(Raft, self.raft))

    def add(self, index: int, sha256: str = "", applied_bytes: int = 0) -> SnapshotRef:
        ref = SnapshotRef(index, 1, sha256 or f"{index:064}", 10)
        file = self.path / f"snapshot-1-{index}.dsnap"
        file.write_bytes(b"0123456789")
        asyncio.run(self.files.add(ref, file, 1_700_000_000, applied_bytes))
        return ref

    @property
    def on_disk(self) -> list[int]:
        return sorted(int(file.stem.split("-")[2]) for file in self.path.iterdir())


def test_exactly_so_many_are_kept(tmp_path: Path) -> None:
    """The oldest go, from the disk too, in whatever order they came; Raft knows what is there."""
    shelf = Shelf(tmp_path, keep=3)
    for index in (30, 10, 20):
        shelf.add(index)
    assert shelf.on_disk == [10, 20, 30]
    shelf.add(40)
    assert shelf.on_disk == [20, 30, 40]
    assert [ref.index for ref in shelf.told[-1]] == [20, 30, 40]
    assert shelf.files.newest == shelf.files.refs[-1]


def test_what_is_being_sent_is_kept_as_long(tmp_path: Path) -> None:
    """A file on its way, or offered, is not taken from under a receiver; afterwards it goes."""
    shelf = Shelf(tmp_path, keep=2)
    sent, offered = shelf.add(10), shelf.add(20)
    shelf.files.transfers.began(7, sent, 0)
    shelf.offered[PEER] = offered
    for index in (30, 40):
        shelf.add(index)
    assert shelf.on_disk == [10, 20, 30, 40]
    shelf.offered.clear()
    shelf.add(50)
    assert shelf.on_disk == [10, 40, 50]
    shelf.files.transfers.began(7, offered, 0)  # the receiver has turned to another file
    shelf.add(60)
    assert shelf.on_disk == [50, 60]


def test_a_file_that_was_written_anew_counts_once(tmp_path: Path) -> None:
    """Another content under the same name takes the place of what was known of it."""
    shelf = Shelf(tmp_path)
    shelf.add(10, "a" * 64)
    new = shelf.add(10, "b" * 64)
    assert shelf.files.refs == [new]
    assert shelf.on_disk == [10]


def test_the_log_goes_behind_the_second_newest(tmp_path: Path) -> None:
    """One snapshot alone frees nothing, for it may prove unreadable."""
    shelf = Shelf(tmp_path)
    assert shelf.files.purge_limit() == 0
    shelf.add(100)
    assert shelf.files.purge_limit() == 0
    shelf.add(200)
    assert shelf.files.purge_limit() == 100
    shelf.add(300)
    assert shelf.files.purge_limit() == 200
    shelf.raft.state_lost = True
    assert shelf.files.purge_limit() == 0


def test_followers_that_are_a_little_behind_find_their_entries(tmp_path: Path) -> None:
    """So many entries before the last applied one stay, whatever the snapshots allow."""
    shelf = Shelf(tmp_path, retained_log_entries=850)
    for index in (100, 200, 300):
        shelf.add(index)
    assert shelf.files.purge_limit() == 1000 - 850
    shelf.raft.log.applied_index = 2000
    assert shelf.files.purge_limit() == 200


def test_a_transfer_holds_the_log_that_follows_it(tmp_path: Path) -> None:
    """As long as that is not more than `hold_bytes`: then the receiver needs a newer one."""
    shelf = Shelf(tmp_path, hold_bytes=1000)
    shelf.files.applied_bytes = 500
    shelf.offered[PEER] = shelf.add(100, applied_bytes=500)
    for index in (200, 300):
        shelf.add(index)
    assert shelf.files.purge_limit() == 100
    shelf.files.applied_bytes = 1500
    assert shelf.files.purge_limit() == 100
    shelf.files.applied_bytes = 1501
    assert shelf.files.purge_limit() == 200


def test_a_receiver_finds_the_log_that_follows_its_snapshot(tmp_path: Path) -> None:
    """From the moment it has installed it until it has come as far as the others, within the same
    bound; also once the file itself is gone."""
    shelf = Shelf(tmp_path, keep=2, hold_bytes=1000)
    shelf.files.applied_bytes = 500
    sent = shelf.add(100, applied_bytes=500)
    shelf.offered[PEER] = sent
    for index in (200, 300):
        shelf.add(index, applied_bytes=600)
    assert shelf.files.purge_limit() == 100
    shelf.offered.clear()
    shelf.helped[PEER] = sent, 100
    assert shelf.files.purge_limit() == 100, "it has just acknowledged the snapshot"
    shelf.helped[PEER] = sent, 150
    assert shelf.files.purge_limit() == 150
    shelf.add(400, applied_bytes=700)
    assert shelf.on_disk == [300, 400]
    shelf.files.applied_bytes = 1500
    assert shelf.files.purge_limit() == 150
    shelf.helped[PEER] = sent, 350
    assert shelf.files.purge_limit() == 300, "it has got there"
    shelf.helped[PEER] = sent, 150
    shelf.files.applied_bytes = 1501
    assert shelf.files.purge_limit() == 300, "that is too much: it needs a newer one"
