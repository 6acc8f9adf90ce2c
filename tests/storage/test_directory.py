"""The data directory: one owner, one identity, and a state that is trusted only with reason."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dengine.errors import DataCorruption, IdentityError, StorageIO, TryAgain
from dengine.kv.commands import Put, encode_batch, encode_command
from dengine.raft.types import Entry, EntryKind, HardState
from dengine.storage.directory import DataDirectory
from dengine.storage.identity import read_identity
from dengine.storage.log_store import LogStore
from dengine.storage.recovery import open_stores
from dengine.storage.restore import building
from dengine.storage.state_store import StateStore
from tests.storage.test_crash import CHILD, DEADLINE_S, ENVIRONMENT


def entry(index: int) -> Entry:
    data = encode_batch([encode_command(Put(b"k%d" % index, b"v"))])
    return Entry(index, 1, EntryKind.NORMAL, data)


def run(directory: DataDirectory, count: int) -> None:
    """What a node does: mark, write the log, apply, and then die without a clean stop."""
    directory.mark_running()
    log, state = LogStore(directory.log_path), StateStore(directory.state_path())
    for _ in range(count):
        index = log.last_index() + 1
        log.save(None, [entry(index)])
        state.apply([entry(index)])
    state.close()
    log.close()


def other_boot(directory: DataDirectory) -> None:
    """As after a reboot: the RUN mark carries another boot id."""
    mark = directory.path / "RUN"
    _, rest = mark.read_text().split(" ", 1)
    mark.write_text(f"00000000-0000-0000-0000-000000000000 {rest}")


def test_a_new_directory_gets_an_identity_for_good(tmp_path: Path) -> None:
    """The incarnation is made once and kept; the boot number is new at each start."""
    first = DataDirectory.open(tmp_path / "db", 7)
    assert first.path == tmp_path / "db" / "7"
    assert (first.identity.node_id, first.identity.cluster_id) == (7, "")
    assert 0 < first.identity.incarnation < 2**63
    first.close()
    second = DataDirectory.open(tmp_path / "db", 7)
    assert second.identity == first.identity
    assert 0 < second.boot < 2**63
    assert second.boot != first.boot
    second.close()
    other = DataDirectory.open(tmp_path / "elsewhere", 7)
    assert other.identity.incarnation != first.identity.incarnation
    other.close()


def test_nothing_is_readable_for_others(tmp_path: Path) -> None:
    """Directories 0700, files 0600, all the way down."""
    directory = DataDirectory.open(tmp_path, 1)
    run(directory, 1)
    directory.mark_clean()
    for path in [directory.path, *directory.path.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    directory.close()


def test_what_is_noted_in_the_identity_is_durable(tmp_path: Path) -> None:
    """Cluster, address and removal are there after a restart; numbers survive JSON readers."""
    directory = DataDirectory.open(tmp_path, 1)
    directory.set_cluster_id("c-1")
    directory.set_cluster_id("c-1")
    directory.set_address("10.0.0.1:9081")
    directory.set_removed("removed by an operator")
    with pytest.raises(IdentityError, match="belongs to cluster c-1, not to c-2"):
        directory.set_cluster_id("c-2")
    noted = directory.identity
    directory.close()
    written = json.loads((tmp_path / "1" / "identity.json").read_text())
    assert written["incarnation"] == f"{noted.incarnation:016x}"
    again = DataDirectory.open(tmp_path, 1)
    assert again.identity == noted
    assert (noted.cluster_id, noted.address) == ("c-1", "10.0.0.1:9081")
    assert noted.removed == "removed by an operator"
    again.close()


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    """Two processes never write one directory; the refusal names the other and exits 75."""
    child = subprocess.Popen(
        [sys.executable, str(CHILD), "lock", str(tmp_path), "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(TryAgain) as caught:
        DataDirectory.open(tmp_path, 1)
    assert f"in use by process {child.pid}" in caught.value.message
    assert caught.value.exit_code == 75
    child.kill()
    child.communicate(timeout=DEADLINE_S)
    DataDirectory.open(tmp_path, 1).close()


def test_a_refused_opener_leaves_the_owner_alone(tmp_path: Path) -> None:
    """The same holds within one process, and a failed attempt does not free the lock."""
    owner = DataDirectory.open(tmp_path, 1)
    for _ in range(2):
        with pytest.raises(TryAgain):
            DataDirectory.open(tmp_path, 1)
    owner.close()


def test_the_directory_of_another_node_is_refused(tmp_path: Path) -> None:
    """A directory renamed or copied to another id cannot give this node a foreign past."""
    DataDirectory.open(tmp_path, 1).close()
    (tmp_path / "1").rename(tmp_path / "2")
    with pytest.raises(IdentityError, match="holds the data of node 1, but node_id is 2"):
        DataDirectory.open(tmp_path, 2)


@pytest.mark.parametrize(
    "text", ["", "{", '{"format": 1}', "[]", '{"format": 1, "incarnation": 5}']
)
def test_a_damaged_identity_is_not_replaced(tmp_path: Path, text: str) -> None:
    """A node that no longer knows who it is stops instead of becoming someone new."""
    DataDirectory.open(tmp_path, 1).close()
    (tmp_path / "1" / "identity.json").write_text(text)
    for _ in range(2):
        with pytest.raises(DataCorruption, match=r"identity\.json is damaged"):
            DataDirectory.open(tmp_path, 1)


def test_no_flipped_bit_makes_another_identity(tmp_path: Path) -> None:
    """Of none of them: a node with another cluster, name or promise than its own would run on, and
    be refused by all others for ever, or break what it has promised."""
    directory = DataDirectory.open(tmp_path, 1)
    directory.set_cluster_id("c" * 32)
    directory.set_address("10.0.0.1:9081")
    noted = directory.identity
    directory.close()
    file = tmp_path / "1" / "identity.json"
    sound = file.read_bytes()
    for bit in range(8 * len(sound)):
        rotten = bytearray(sound)
        rotten[bit // 8] ^= 1 << bit % 8
        file.write_bytes(rotten)
        with contextlib.suppress(DataCorruption, IdentityError):
            assert read_identity(file) == noted, f"bit {bit}"  # in white space


def test_an_identity_from_before_there_were_checksums_is_read(tmp_path: Path) -> None:
    """And has one as soon as anything is noted in it."""
    DataDirectory.open(tmp_path, 1).close()
    file = tmp_path / "1" / "identity.json"
    fields = json.loads(file.read_text())
    assert len(fields.pop("checksum")) == 8
    file.write_text(json.dumps(fields))
    directory = DataDirectory.open(tmp_path, 1)
    directory.set_address("10.0.0.1:9081")
    directory.close()
    assert len(json.loads(file.read_text())["checksum"]) == 8


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    """An old program does not touch what a newer one wrote."""
    DataDirectory.open(tmp_path, 1).close()
    file = tmp_path / "1" / "identity.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(IdentityError, match="format 2"):
        DataDirectory.open(tmp_path, 1)


def test_a_lost_identity_beside_a_used_log_is_damage(tmp_path: Path) -> None:
    """Votes and entries in the log belong to an incarnation; without it they cannot be used."""
    directory = DataDirectory.open(tmp_path, 1)
    run(directory, 1)
    directory.close()
    (directory.path / "identity.json").unlink()
    with pytest.raises(DataCorruption, match=r"identity\.json is missing"):
        DataDirectory.open(tmp_path, 1)


@pytest.mark.parametrize("how", ["directory", "file", "emptied"])
def test_a_lost_log_is_damage_and_no_new_beginning(tmp_path: Path, how: str) -> None:
    """A voter that lost its log would vote twice in one term. With nothing to go on from it stops,
    each time, and no start makes another log; not even one that expects to die over it."""
    directory = DataDirectory.open(tmp_path, 1)
    log = LogStore(directory.log_path)
    log.save(HardState(9), ())
    log.close()
    directory.close()
    if how == "directory":
        shutil.rmtree(directory.log_path)
    elif how == "file":
        (directory.log_path / "data.mdb").unlink()
    else:
        (directory.log_path / "data.mdb").write_bytes(b"")
    (directory.path / "OPENING").touch()
    for _ in range(2):
        directory = DataDirectory.open(tmp_path, 1)
        with pytest.raises(DataCorruption, match="is missing or empty") as caught:
            open_stores(directory)
        assert caught.value.exit_code == 65
        assert not any(file.stat().st_size for file in directory.log_path.glob("data.mdb"))
        directory.close()


@pytest.mark.parametrize("left", ["nothing", "log directory", "empty log", "log", "tmp"])
def test_a_start_that_died_while_making_the_directory_is_finished(
    tmp_path: Path, left: str
) -> None:
    """Whatever a killed first start left behind, the next start makes a whole directory."""
    (tmp_path / "1").mkdir(mode=0o700)
    if left in ("log directory", "empty log"):
        (tmp_path / "1" / "log").mkdir(mode=0o700)
    if left == "empty log":
        (tmp_path / "1" / "log" / "data.mdb").touch(mode=0o600)
    if left == "log":
        LogStore(tmp_path / "1" / "log").close()
    if left == "tmp":
        (tmp_path / "1" / "identity.json.tmp").write_text('{"form')
    directory = DataDirectory.open(tmp_path, 1)
    assert directory.identity.node_id == 1
    assert directory.trusted_state()
    stores = open_stores(directory)
    stores.state.close()
    stores.log.close()
    directory.close()


def test_a_state_is_trusted_after_a_kill_but_not_after_a_reboot(tmp_path: Path) -> None:
    """A killed process leaves its pages with the kernel; a power loss does not."""
    directory = DataDirectory.open(tmp_path, 1)
    run(directory, 3)
    directory.close()
    directory = DataDirectory.open(tmp_path, 1)
    assert directory.trusted_state()
    other_boot(directory)
    assert not directory.trusted_state()
    (directory.path / "RUN").unlink()
    assert not directory.trusted_state()
    directory.close()


def test_a_state_found_damaged_is_not_trusted_again(tmp_path: Path) -> None:
    """A restart is enough to repair a damaged state: it is discarded and rebuilt from the log."""
    directory = DataDirectory.open(tmp_path, 1)
    run(directory, 1)
    file = directory.state_path() / "data.mdb"
    file.write_bytes(file.read_bytes().replace(b"k1", b"k9"))
    state = StateStore(directory.state_path())
    with pytest.raises(DataCorruption, match="rebuilds its state"):
        state.get(b"k9")
    state.close()
    assert not directory.trusted_state()
    directory.mark_clean()
    assert not directory.trusted_state()
    directory.discard_state()
    assert directory.trusted_state()
    directory.close()


def test_a_state_that_cannot_be_opened_is_not_trusted_again(tmp_path: Path) -> None:
    """The same when the damage is in LMDB's own pages."""
    directory = DataDirectory.open(tmp_path, 1)
    run(directory, 1)
    file = directory.state_path() / "data.mdb"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(DataCorruption, match="rebuilds its state"):
        StateStore(directory.state_path())
    assert not directory.trusted_state()
    directory.close()


def test_a_clean_stop_is_trusted_after_a_reboot_until_the_next_start(tmp_path: Path) -> None:
    """CLEAN vouches for one stop only: it is gone before anything is applied again."""
    directory = DataDirectory.open(tmp_path, 1)
    run(directory, 3)
    state = StateStore(directory.state_path())
    state.sync()
    state.close()
    directory.mark_clean()
    other_boot(directory)
    assert directory.trusted_state()
    directory.mark_running()
    assert directory.trusted_state()
    other_boot(directory)
    assert not directory.trusted_state()
    directory.close()


def test_a_copy_of_a_running_directory_is_not_trusted(tmp_path: Path) -> None:
    """`cp -a` of a living node copies its pages one by one while they change."""
    directory = DataDirectory.open(tmp_path / "one", 1)
    run(directory, 3)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    copy = DataDirectory.open(tmp_path / "two", 1)
    assert directory.trusted_state()
    assert not copy.trusted_state()
    directory.close()
    copy.close()


def test_a_discarded_state_is_rebuilt_from_the_log(tmp_path: Path) -> None:
    """After a power loss the log gives back every key that was ever acknowledged."""
    directory = DataDirectory.open(tmp_path, 1)
    run(directory, 5)
    other_boot(directory)
    old = directory.state_path()
    new = directory.discard_state()
    assert new == directory.state_path() != old
    assert not old.exists()
    assert directory.trusted_state()
    directory.mark_running()
    log, state = LogStore(directory.log_path), StateStore(new)
    assert state.applied.index == 0
    state.apply(log.entries(1, log.last_index() + 1, 2**40))
    assert [key for key, _ in state.page(b"", None, 10, False).items] == [
        b"k%d" % n for n in range(1, 6)
    ]
    state.close()
    log.close()
    directory.close()


@pytest.mark.parametrize("step", ["before", "after"])
def test_a_switch_that_died_half_way_is_finished_at_the_next_start(
    tmp_path: Path, step: str
) -> None:
    """There is always exactly one state in use; the other is cleared away."""
    directory = DataDirectory.open(tmp_path, 1)
    run(directory, 1)
    (directory.path / "state-2").mkdir()
    if step == "after":
        (directory.path / "CURRENT").write_text("state-2")
    directory.close()
    directory = DataDirectory.open(tmp_path, 1)
    directory.tidy()
    kept = directory.path / ("state-1" if step == "before" else "state-2")
    assert directory.state_path() == kept
    assert list(directory.path.glob("state-*")) == [kept]
    directory.close()


@pytest.mark.parametrize("text", ["", "../../etc", "state-x", "state-1/../.."])
def test_a_damaged_current_is_named(tmp_path: Path, text: str) -> None:
    """CURRENT never leads outside the directory; the message says what to do."""
    DataDirectory.open(tmp_path, 1).close()
    (tmp_path / "1" / "CURRENT").write_text(text)
    with pytest.raises(DataCorruption, match="CURRENT is damaged"):
        DataDirectory.open(tmp_path, 1)


def test_an_unusable_root_is_one_sentence(tmp_path: Path) -> None:
    """What the system refuses is said with the path in it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageIO, match="cannot use the data directory"):
        DataDirectory.open(tmp_path / "file", 1)


@pytest.mark.parametrize("make", ["open", "building"])
def test_every_directory_on_the_way_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: str
) -> None:
    """A power loss must not take a directory away because one above it was never synced."""
    synced: list[Path] = []
    fsync = os.fsync

    def record(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record)
    root = tmp_path / "a" / "b" / "db"
    if make == "open":
        DataDirectory.open(root, 7).close()
    else:
        with building(root, 7):
            pass
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= set(synced)
