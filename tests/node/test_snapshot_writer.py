"""The snapshot writer's own work, in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dengine import snapshot_writer
from dengine.errors import TryAgain
from dengine.node.transfers import Report
from dengine.raft.types import SnapshotRef
from dengine.storage.snapshot_file import SnapshotInfo
from dengine.storage.snapshot_jobs import Event, Fetch, Progress, Verify, encode_job
from dengine.storage.snapshots import fetched_path
from dengine.storage.state_store import StateStore
from tests.storage.states import OTHER, history, membership, snapshot_of


@pytest.fixture
def made(tmp_path: Path) -> SnapshotInfo:
    state = StateStore(tmp_path / "state-1")
    state.apply(history(membership(OTHER), 400))
    state.close()
    return snapshot_of(tmp_path / "state-1", tmp_path / "sent")


@pytest.mark.parametrize("came", ["all", "most", "another", "damaged"])
def test_reading_what_is_here_shows_life(
    made: SnapshotInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, came: str
) -> None:
    """Whatever of a large file is read again before or after a transfer takes longer than a process
    that says nothing may live; each piece of it is a sign of life."""
    content = made.path.read_bytes()
    said: list[Event] = []
    monkeypatch.setattr(snapshot_writer, "_say", said.append)
    monkeypatch.setattr(snapshot_writer, "PROGRESS_EVERY_S", 0.0)
    ref = made.ref
    if came == "another":
        ref = SnapshotRef(ref.index, ref.term, "b" * 64, ref.size_bytes)
    partial = tmp_path / "here" / f"fetch-{ref.sha256}.partial"
    partial.parent.mkdir()
    partial.write_bytes(content if came != "most" else content[: len(content) * 3 // 4])
    if came == "damaged":
        flipped = bytearray(content)
        flipped[-100] ^= 1
        partial.write_bytes(flipped)
    job = Fetch("127.0.0.1:1", ref, 3, "c-1", str(partial.parent), str(tmp_path / "new"))
    before: list[int] = []

    def append(job: Fetch, path: Path, have: int) -> None:
        before.append(len(said))
        os.truncate(path, len(content))  # nobody sends anything; zeros take its place

    monkeypatch.setattr(snapshot_writer, "_append", append)
    if came == "all":
        snapshot_writer._download(job, partial)
    else:
        with pytest.raises(TryAgain):
            snapshot_writer._download(job, partial)
    chunks = len(content) // 4096
    after = len(said) - before[0]
    assert before[0] > chunks // 2, "while it was looked for what is here"
    assert after >= chunks, "while it was verified, and what is sound of it looked for"
    assert all(isinstance(event, Progress) and event.done_bytes == 0 for event in said)


@pytest.mark.parametrize("came", ["now", "with an earlier attempt"])
def test_a_received_file_is_durable_with_its_name_before_a_state_comes_of_it(
    made: SnapshotInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, came: str
) -> None:
    """An install makes the log begin behind the file, and a power cut takes away what has a name in
    no synced directory."""
    here = tmp_path / "here"
    partial = fetched_path(here, made.sha256)
    steps: list[str] = []

    def append(job: Fetch, path: Path, have: int) -> None:
        path.write_bytes(made.path.read_bytes())
        steps.append("came")

    def sync(path: Path) -> None:
        if path == here:
            steps.append("name synced")

    def unpack(file: Path, state: Path, progress: object) -> SnapshotInfo:
        assert file == partial
        steps.append("unpacked")
        return made

    monkeypatch.setattr(snapshot_writer, "_append", append)
    monkeypatch.setattr(snapshot_writer, "sync_directory", sync)
    monkeypatch.setattr(snapshot_writer, "unpack", unpack)
    if came != "now":
        here.mkdir()
        partial.write_bytes(made.path.read_bytes())
    job = Fetch("127.0.0.1:1", made.ref, 3, made.header.cluster_id, str(here), str(tmp_path / "n"))
    snapshot_writer._fetch(job)
    assert steps == ["came", "name synced", "unpacked"]


def test_a_file_of_our_own_is_read_with_signs_of_life(
    made: SnapshotInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is offered may be here."""
    said: list[Event] = []
    monkeypatch.setattr(snapshot_writer, "_say", said.append)
    monkeypatch.setattr(snapshot_writer, "PROGRESS_EVERY_S", 0.0)
    assert snapshot_writer._is_here(made.path, made.ref)
    assert len(said) > made.size_bytes // 4096 // 2


def test_what_is_read_again_does_not_count_as_received() -> None:
    """The rate that is reported of a resumed transfer is that of what came."""
    report = Report("receiving")
    for done in (0, 0, 900, 1000):
        report(done, 1000)
    assert report._done - report._first == 100


def test_a_writer_whose_node_is_gone_says_nothing_more(made: SnapshotInfo) -> None:
    """The node was killed just as the writer had something to tell: no trace is left in its log."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "dengine.snapshot_writer", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    os.close(reading)
    _, said = process.communicate(encode_job(Verify(str(made.path), 0)), timeout=30)
    assert (process.returncode, said) == (TryAgain.exit_code, b"")
