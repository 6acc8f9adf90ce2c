"""Snapshots whose every part is what was written, and whose state is unsound all the same; and what
fetches that came to nothing leave behind.

The subprocess, the state and the files are real; Raft and the leader say what the test wants.
"""

from __future__ import annotations

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dengine.errors import DataCorruption, TryAgain
from dengine.node import snapshots as snapshots_module
from dengine.raft.types import MemberId, SnapshotRef
from dengine.storage.snapshot_file import SnapshotInfo
from dengine.storage.snapshot_jobs import Fetch, Job, Unpack, Verify
from dengine.storage.snapshots import fetched_path
from tests.node import test_snapshots as stages
from tests.node.hosts import on_loop, until
from tests.node.test_snapshots import ENTRIES, SENDER, Lost, Spoiler, Stage
from tests.storage.states import signed_anew
from tests.storage.test_recovery import keys_page, make_deadly

MANY = 120  # entries of that size make a tree of several pages


def wrong(file: Path) -> None:
    """A value is not what was written."""
    content = file.read_bytes()
    assert b"v7v7v7" in content
    file.write_bytes(content.replace(b"v7v7v7", b"v7v7v8"))


def deadly(file: Path) -> None:
    """LMDB aborts whoever reads it."""
    make_deadly(file, keys_page(file.parent))


SPOILS = [wrong, deadly]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots_module, "RETRY_S_MIN", 0.05)


def rotten(stage: Stage, spoil: Any) -> SnapshotInfo:
    """The stage has a file of all that is applied, which has rotted before it was copied."""
    for _ in range(MANY):
        stage.apply(1000)
    return signed_anew(stage.snapshot().path, spoil)


# --- whoever sends ----------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", SPOILS)
def test_what_no_member_can_use_is_put_aside(tmp_path: Path, spoil: Any) -> None:
    """Reading the file finds nothing wrong with it, so it counts after a start. When a member could
    not use it the state in it is looked at, and it is not offered any more."""
    stage = Stage(tmp_path)
    info = rotten(stage, spoil)
    told: list[list[SnapshotRef]] = []
    stage.raft.snapshots_changed = lambda refs: told.append(list(refs))

    async def test() -> None:
        async with stage.running() as snapshots:
            await until(lambda: snapshots.files.refs == [info.ref], "the file to be verified")
            snapshots.suspect(info.ref)
            await until(lambda: snapshots.files.refs == [], "it to be given up")
            assert told[-1] == []
            assert f"{info.path.name}.damaged" in stage.files
            assert snapshots.last_error is not None
            assert "put aside" in snapshots.last_error
            assert not stage.directory.scratch_path.exists()

    on_loop(test)


def test_a_sound_suspect_stays_and_is_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receiver is to blame. However often it asks again, its sender only reads the file."""
    spoiler = Spoiler(monkeypatch, Unpack, None)
    stage = Stage(tmp_path)
    info = stage.snapshot()

    def looks() -> list[type[Job]]:
        return [kind for kind in spoiler.begun if kind in (Unpack, Verify)]

    async def test() -> None:
        async with stage.running() as snapshots:
            await until(lambda: snapshots.files.refs, "the file to be verified")
            assert Unpack not in spoiler.begun, "after a start it is only read"
            for number in (2, 3, 4):
                snapshots.suspect(info.ref)
                await until(lambda n=number: len(looks()) == n, "it to be looked at")
                await until(lambda: not snapshots.job.startswith("verifying"), "the end of that")
            assert looks() == [Verify, Unpack, Verify, Verify]
            assert snapshots.files.refs == [info.ref]
            assert not stage.directory.scratch_path.exists()

    on_loop(test)


def test_without_room_a_suspect_is_only_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log needs what is left. A file that has rotted where it lies is found all the same."""
    spoiler = Spoiler(monkeypatch, Unpack, None)
    stage = Stage(tmp_path)
    info = stage.snapshot()
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1000, f_frsize=1))

    async def test() -> None:
        async with stage.running() as snapshots:
            await until(lambda: snapshots.files.refs, "the file to be verified")
            info.path.write_bytes(info.path.read_bytes()[:-1])
            snapshots.suspect(info.ref)
            await until(lambda: not snapshots.files.refs, "it to be given up")
            assert Unpack not in spoiler.begun

    on_loop(test)


def test_a_node_alone_whose_file_ends_its_reader_says_so(tmp_path: Path) -> None:
    """Its state is lost, and the only file of it can never be unpacked: that is an end, and no
    further attempt."""
    stage = Stage(tmp_path)
    info = rotten(stage, deadly)
    lost = Lost(stage)

    async def test() -> None:
        async with stage.running() as snapshots:
            lost.snapshots = snapshots
            await until(lambda: snapshots.files.refs, "the file to be verified")
            snapshots.distrust("it is damaged", files_too=False)
            await until(lambda: stage.failed, "the node to be ended")
            assert isinstance(stage.failed.pop(), DataCorruption)
            assert stage.files == [f"{info.path.name}.damaged"]
        stage.failed.clear()

    on_loop(test)


# --- whoever fetches --------------------------------------------------------------------------


class Sender(ThreadingHTTPServer):
    """Sends one file from where it is asked for.

    Attributes:
        asked: these places, in order.
    """

    def __init__(self, info: SnapshotInfo) -> None:
        super().__init__(("127.0.0.1", 0), SenderCalls)
        self.content, self.sha256 = info.path.read_bytes(), info.sha256
        self.asked: list[int] = []

    async def addresses(self, member: MemberId) -> list[str]:
        return [f"127.0.0.1:{self.server_port}"]

    def __enter__(self) -> Sender:
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class SenderCalls(BaseHTTPRequestHandler):
    server: Sender

    def do_GET(self) -> None:
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.server.asked.append(start)
        self.send_response(206)
        self.send_header("ETag", f'"{self.server.sha256}"')
        self.end_headers()
        self.wfile.write(self.server.content[start:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("spoil", SPOILS)
def test_nothing_is_kept_of_a_fetched_file_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any
) -> None:
    """All of it has come, and was interrupted before it was unpacked: the next attempts go on with
    that, until it has turned out to be of no use. Then the file is asked for from its beginning."""
    stage = Stage(tmp_path)
    info = rotten(stage, spoil)
    partial = fetched_path(info.path.parent, info.sha256)
    stage.raft.log.applied_index = ENTRIES  # as far as one can tell, it is of use

    async def test() -> None:
        with Sender(info) as sender:
            info.path.rename(partial)
            monkeypatch.setattr(stages, "addresses_of", sender.addresses)
            async with stage.running() as snapshots:

                def from_the_beginning() -> bool:
                    snapshots.offered(SENDER, info.ref)
                    return 0 in sender.asked

                await until(from_the_beginning, "it to be given up")
                assert len(sender.asked) == (2 if spoil is wrong else 3), "one death is forgiven"
                assert sender.asked[0] > info.size_bytes // 2

    on_loop(test)


def test_a_file_of_ours_that_is_offered_and_cannot_be_used_is_put_aside(tmp_path: Path) -> None:
    """It is taken for what was to be fetched; without it the next attempt gets it from there."""
    stage = Stage(tmp_path)
    info = rotten(stage, wrong)

    async def test() -> None:
        async with stage.running() as snapshots:
            await until(lambda: snapshots.files.refs, "the file to be verified")
            snapshots.offered(SENDER, info.ref)
            await until(lambda: not snapshots.files.refs, "it to be given up")
            assert f"{info.path.name}.damaged" in stage.files

    on_loop(test)


@pytest.mark.parametrize("left_by", ["a leader that is gone", "this one"])
def test_what_has_come_in_part_never_keeps_a_fetch_from_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_by: str
) -> None:
    """There is room for one file and the state in it, no more. What a leader that is gone has sent
    of its own goes when another one is offered; what is here of this one needs no more room."""
    spoiler = Spoiler(monkeypatch, Fetch, TryAgain("the leader is gone"))
    stage = Stage(tmp_path)
    stage.apply()
    made = stage.snapshot()
    stage.raft.log.applied_index = ENTRIES
    size, folder = made.size_bytes, made.path.parent
    sha256 = "b" * 64 if left_by == "a leader that is gone" else made.sha256
    partial = fetched_path(folder, sha256)
    partial.write_bytes(made.path.read_bytes()[: size * 9 // 10])
    made.path.unlink()
    in_all = 2 * size + stage.config.limits.reserve_bytes

    def statvfs(path: Path) -> SimpleNamespace:
        used = sum(file.stat().st_size for file in folder.iterdir())
        return SimpleNamespace(f_bavail=in_all - used, f_frsize=1)

    monkeypatch.setattr(os, "statvfs", statvfs)

    async def test() -> None:
        async with stage.running() as snapshots:
            snapshots.offered(SENDER, made.ref)
            await until(lambda: Fetch in spoiler.begun, "the fetch to begin")
            assert partial.exists() == (left_by == "this one")

    on_loop(test)


def test_a_fetch_without_room_for_the_rest_of_it_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte less than the rest of the file and the state would take."""
    spoiler = Spoiler(monkeypatch, Fetch, TryAgain("the leader is gone"))
    stage = Stage(tmp_path)
    stage.apply()
    made = stage.snapshot()
    stage.raft.log.applied_index = ENTRIES
    partial = fetched_path(made.path.parent, made.sha256)
    partial.write_bytes(made.path.read_bytes()[:2000])
    made.path.unlink()
    free = 2 * made.size_bytes - 2000 + stage.config.limits.reserve_bytes - 1
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=free, f_frsize=1))

    async def test() -> None:
        nonlocal free
        async with stage.running() as snapshots:
            snapshots.offered(SENDER, made.ref)
            await until(lambda: snapshots.last_error, "it to be refused")
            assert snapshots.last_error is not None
            assert "reserve_bytes" in snapshots.last_error
            assert Fetch not in spoiler.begun
            free += 1

            def begun() -> bool:
                snapshots.offered(SENDER, made.ref)
                return Fetch in spoiler.begun

            await until(begun, "the fetch to begin")

    on_loop(test)
