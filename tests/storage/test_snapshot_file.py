"""The `.dsnap` file: what goes in comes out, and whatever else it is, is found out."""

from __future__ import annotations

import os
import stat
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dengine.errors import Conflict, DataCorruption, StorageIO
from dengine.kv.commands import DeleteRange, Put
from dengine.raft.types import LogId, MemberId
from dengine.storage.environment import DATA_FILE
from dengine.storage.snapshot_file import (
    SnapshotHeader,
    SnapshotInfo,
    SnapshotWriter,
    parse_name,
    publish,
    read_header,
    snapshot_name,
    verify,
)
from dengine.storage.snapshot_frames import PARTIAL_SUFFIX, sound_prefix
from dengine.storage.snapshots import remove_partial, take, unpack
from dengine.storage.state_store import StateStore
from tests.limits import descriptors_left
from tests.storage.states import (
    commands,
    config,
    lived,
    membership,
    signed_anew,
    snapshot_at,
    snapshot_of,
)

HEADER = SnapshotHeader(
    cluster_id="c-1",
    node_id=3,
    index=12,
    term=4,
    revision=9,
    state_hash=bytes(range(16)),
    membership=membership(MemberId(1, 11)),
    records=5,
    taken_at_s=1_700_000_000,
)


def written(path: Path, pieces: list[bytes], chunk_bytes: int) -> SnapshotInfo:
    writer = SnapshotWriter(path, HEADER, chunk_bytes)
    for piece in pieces:
        writer.write(piece)
    return writer.finish()


@settings(max_examples=40)
@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(1, 200))
def test_what_was_written_is_read(pieces: list[bytes], chunk_bytes: int) -> None:
    """Header and data come back whatever pieces and chunks they went in by."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "s.dsnap"
        info = written(path, pieces, chunk_bytes)
        data = bytearray()
        assert verify(path, data.extend) == info
        assert bytes(data) == b"".join(pieces)
        assert info.header == read_header(path) == HEADER
        assert info.size_bytes == path.stat().st_size
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert list(Path(directory).iterdir()) == [path]


@pytest.fixture(scope="module")
def sound() -> bytes:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "s.dsnap"
        written(path, [bytes(range(256)) * 4], 100)
        return path.read_bytes()


def is_refused(data: bytes) -> DataCorruption:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "s.dsnap"
        path.write_bytes(data)
        with pytest.raises(DataCorruption) as caught:
            verify(path)
        assert str(path) in caught.value.message
        assert path.read_bytes() == data
        return caught.value


@settings(max_examples=150)
@given(st.data())
def test_any_flipped_byte_is_found(sound: bytes, data: st.DataObject) -> None:
    """No single byte of a file can change without being noticed."""
    at = data.draw(st.integers(0, len(sound) - 1))
    mask = data.draw(st.integers(1, 255))
    is_refused(sound[:at] + bytes([sound[at] ^ mask]) + sound[at + 1 :])


@settings(max_examples=100)
@given(st.data())
def test_any_truncation_is_found(sound: bytes, data: st.DataObject) -> None:
    """A file that was cut off anywhere is no snapshot; what is kept of it is sound."""
    cut = sound[: data.draw(st.integers(0, len(sound) - 1))]
    is_refused(cut)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "s.partial"
        path.write_bytes(cut)
        kept = sound_prefix(path)
        assert kept <= len(cut)
        path.write_bytes(sound[:kept])
        assert sound_prefix(path) == kept


@settings(max_examples=60)
@given(st.data())
def test_only_the_sound_beginning_of_a_partial_file_is_kept(
    sound: bytes, data: st.DataObject
) -> None:
    """After a transfer that went wrong, everything up to the damage is used again."""
    at = data.draw(st.integers(0, len(sound) - 1))
    with TemporaryDirectory() as directory:
        path = Path(directory) / "s.partial"
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        kept = sound_prefix(path)
        assert sound[:kept] == path.read_bytes()[:kept]
        # The trailer is no chunk: it is checked by `verify` only.
        assert kept <= at or at >= len(sound) - 56


def test_other_files_are_named_for_what_they_are(sound: bytes, tmp_path: Path) -> None:
    """A newer format, a foreign file, one that goes on, one that is not there."""
    assert "format 2" in is_refused(sound[:8] + b"\x02\x00" + sound[10:]).message
    assert "not a dengine snapshot" in is_refused(b"").message
    assert "not a dengine snapshot" in is_refused(b"PK\x03\x04" * 99).message
    assert "goes on after its end" in is_refused(sound + b"x").message
    assert "not a dengine snapshot" in is_refused(b"x" + sound).message
    with pytest.raises(StorageIO, match="No such file"):
        verify(tmp_path / "absent")
    with pytest.raises(StorageIO, match="Is a directory"):
        read_header(tmp_path)


def test_a_file_is_published_only_as_what_it_should_be(sound: bytes, tmp_path: Path) -> None:
    """A sound file with another SHA-256 never takes the name of the one that was asked for."""
    partial, path = tmp_path / "p.partial", tmp_path / snapshot_name(LogId(12, 4))
    partial.write_bytes(sound)
    with pytest.raises(DataCorruption, match="not the file it should be"):
        publish(partial, path, "0" * 64)
    assert list(tmp_path.iterdir()) == []
    assert parse_name(path.name) == LogId(12, 4)
    assert parse_name("snapshot-4-12.dsnap.partial") is None


def test_an_abandoned_file_is_gone(tmp_path: Path) -> None:
    """Nothing is left of a snapshot that was given up."""
    writer = SnapshotWriter(tmp_path / "s.dsnap", HEADER, 10)
    writer.write(b"x" * 25)
    assert writer.data_bytes == 25
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_what_is_used_not_what_is_free(tmp_path: Path) -> None:
    """Of a file that is mostly free pages only what is in use is copied, and progress goes to its
    end: what paces by it would wait for bytes that never come."""
    value = b"x" * 2000
    state = StateStore(tmp_path / "state")
    for index in range(1, 600):
        state.apply([commands(index, Put(b"%d" % index, value))])
    state.apply([config(600, membership(MemberId(1, 1)))])
    state.apply([commands(601, DeleteRange(b"", b"4", 1000))])
    size = state.data_bytes()
    state.close()
    seen: list[tuple[int, int]] = []
    info = take(
        tmp_path / "state",
        tmp_path / "snapshots",
        node_id=1,
        chunk_bytes=4096,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert info.data_bytes < size / 2
    done, total = seen[-1]
    assert 0.9 * total <= done <= 1.01 * total  # the chunks have heads
    assert all(before <= after for (before, _), (after, _) in pairwise(seen))


def test_what_an_earlier_attempt_left_is_not_written_to(tmp_path: Path) -> None:
    """A partial file that others can read, or that is a link to another place, is replaced."""
    path, elsewhere = tmp_path / "s.dsnap", tmp_path / "elsewhere"
    partial = tmp_path / f"s.dsnap{PARTIAL_SUFFIX}"
    partial.write_text("open to everybody")
    partial.chmod(0o666)
    with partial.open("rb") as reader:
        info = written(path, [b"secret"], 100)
        assert reader.read() == b"open to everybody"
    assert stat.S_IMODE(info.path.stat().st_mode) == 0o600
    path.unlink()
    elsewhere.write_text("precious")
    partial.symlink_to(elsewhere)
    written(path, [b"secret"], 100)
    assert not path.is_symlink()
    assert elsewhere.read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == [elsewhere, path]


def test_two_writers_of_one_file_never_mix(tmp_path: Path) -> None:
    """Whoever comes second is refused; the first goes on."""
    path = tmp_path / "s.dsnap"
    first = SnapshotWriter(path, HEADER, 100)
    with pytest.raises(Conflict, match="being written by another process"):
        SnapshotWriter(path, HEADER, 100)
    first.write(b"mine")
    assert first.finish() == verify(path)


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_made_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    """A new file takes its name only if nobody has it, also where there are no hard links."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "s.dsnap"
    writer = SnapshotWriter(path, HEADER, 100, replace=False)
    path.write_text("precious")
    with pytest.raises(Conflict, match="never overwritten"):
        writer.finish()
    writer.abandon()
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()
    assert SnapshotWriter(path, HEADER, 100, replace=False).finish() == verify(path)
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_file_descriptor_the_remains_of_a_failed_one_stay(tmp_path: Path) -> None:
    """Nobody ends over a file that nobody needs: it goes when there are descriptors again."""
    partial = tmp_path / (snapshot_name(LogId(1, 1)) + PARTIAL_SUFFIX)
    partial.touch()
    with descriptors_left(0):
        remove_partial(tmp_path)
    assert partial.exists()
    remove_partial(tmp_path)
    assert not partial.exists()


def rot(file: Path) -> None:
    """A value is not what was written."""
    content = file.read_bytes()
    assert b"v7v7v7" in content
    file.write_bytes(content.replace(b"v7v7v7", b"v7v7v8"))


def test_what_has_rotted_in_a_state_is_never_signed(tmp_path: Path) -> None:
    """The CRCs of a file are made when it is written: they would say that all is well."""
    directory = lived(tmp_path, 30)
    rot(directory.state_path() / DATA_FILE)
    with pytest.raises(DataCorruption):
        snapshot_of(directory.state_path(), directory.snapshots_path)
    assert not list(directory.snapshots_path.glob("*"))
    directory.close()


def test_a_state_that_rotted_before_it_was_signed_is_not_unpacked(tmp_path: Path) -> None:
    """Between the check and the copy it can."""
    directory = lived(tmp_path, 30)
    file = signed_anew(snapshot_at(directory, 25).path, rot).path
    verify(file)
    with pytest.raises(DataCorruption, match="the state in it is unsound"):
        unpack(file, tmp_path / "unpacked", lambda done, total: None)
    assert not (tmp_path / "unpacked").exists()
    directory.close()
