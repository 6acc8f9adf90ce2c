"""A new cluster from a snapshot, and what repair keeps: the directories, without any node."""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from dengine.errors import Conflict, DataCorruption, IdentityError, NotFound, StorageIO, TryAgain
from dengine.raft.types import HardState, MemberId
from dengine.storage import repair as repair_module
from dengine.storage import restore as restore_module
from dengine.storage.directory import DataDirectory
from dengine.storage.log_store import LogStore
from dengine.storage.recovery import open_stores
from dengine.storage.repair import repairing
from dengine.storage.restore import REVISION_STEP, building, restore
from dengine.storage.snapshot_file import SnapshotWriter, verify
from dengine.storage.snapshots import list_files
from dengine.storage.state_reader import check_state
from tests.storage.states import (
    OTHER,
    everything,
    lived,
    purge,
    snapshot_at,
    snapshot_of,
)
from tests.storage.test_recovery import lose_power, rot

ADDRESS = "10.9.9.9:9081"

YEAR_2025 = 1_735_689_600 * 1_000_000  # no cluster has used as many revisions


def quiet(done: int, total: int) -> None:
    """Nobody looks on."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A backup of a cluster of two, taken at entry 20."""
    directory = lived(tmp_path / "old", 20, others=[OTHER])
    found = snapshot_of(directory.state_path(), tmp_path, "backup.dsnap").path
    directory.close()
    return found


def check_founded(root: Path, node_id: int, old: Path, kept: int) -> None:
    """The directory begins a cluster of its own, with everything of the state in `old`."""
    _, revision, before, records = everything(old)
    assert before is not None
    directory = DataDirectory.open(root, node_id)
    log, state = open_stores(directory)
    with closing(log), closing(state):
        me = MemberId(node_id, directory.identity.incarnation)
        now = state.membership
        assert now is not None
        assert now.is_sole_voter(me)
        assert [m.id for m in now.members] == [me]
        assert now.tombstones == ()
        assert now.settings == before.settings
        assert now.cluster_id == directory.identity.cluster_id != before.cluster_id
        assert me not in before.all_voters
        assert state.revision > max(revision + REVISION_STEP, YEAR_2025)
        assert [(k, r) for k, r in state.page(b"", None, 1000, False).items] == records
        assert (log.first_index(), log.last_index()) == (kept + 1, kept)
        hard_state, memberships = log.load()
        assert memberships == [(kept, now)]
        assert (hard_state.voted_for, hard_state.commit_index) == (None, kept)
    check_state(directory.state_path())
    (snapshot,) = list_files(directory.snapshots_path)
    header = verify(snapshot).header
    assert (header.index, header.membership, header.cluster_id) == (kept, now, now.cluster_id)
    directory.close()


def test_a_restored_directory_is_complete(file: Path, tmp_path: Path) -> None:
    """Keys, revisions and settings as they were; members, votes and tombstones gone."""
    root = tmp_path / "deep" / "db"
    founded = restore(file, root, 5, ADDRESS, quiet)
    assert founded.path == root / "5"
    assert os.listdir(root) == ["5"]
    old = tmp_path / "old" / "1" / "state-1"
    check_founded(root, 5, old, 20)
    for path in [root / "5", *(root / "5").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    directory = DataDirectory.open(root, 5)
    lose_power(directory)  # the state of a restored node can be built again
    directory.close()
    check_founded(root, 5, old, 20)


def test_two_restores_are_two_clusters(file: Path, tmp_path: Path) -> None:
    """Nobody can mix up members of two clusters that began with the same file."""
    one = restore(file, tmp_path / "a", 1, ADDRESS, quiet)
    other = restore(file, tmp_path / "b", 1, ADDRESS, quiet)
    assert one.membership.cluster_id != other.membership.cluster_id
    assert one.membership.voters != other.membership.voters


def test_what_is_there_is_never_replaced(file: Path, tmp_path: Path) -> None:
    """An empty directory is used; anything else is refused and left alone."""
    root = tmp_path / "db"
    (root / "1").mkdir(parents=True)
    restore(file, root, 1, ADDRESS, quiet)
    before = sorted(p.name for p in (root / "1").iterdir())
    with pytest.raises(Conflict, match="not empty"):
        restore(file, root, 1, ADDRESS, quiet)
    assert sorted(p.name for p in (root / "1").iterdir()) == before
    (root / "2").write_text("a file")
    with pytest.raises(Conflict):
        restore(file, root, 2, ADDRESS, quiet)
    assert sorted(os.listdir(root)) == ["1", "2"]


def test_one_restore_at_a_time(file: Path, tmp_path: Path) -> None:
    """Two that began together would build in the same place."""
    with building(tmp_path / "db", 1), pytest.raises(TryAgain, match="wait"):
        restore(file, tmp_path / "db", 1, ADDRESS, quiet)
    assert not (tmp_path / "db").exists()
    restore(file, tmp_path / "db", 1, ADDRESS, quiet)


def test_a_file_whose_state_is_not_what_it_says_is_refused(file: Path, tmp_path: Path) -> None:
    """Every CRC and the SHA-256 are right, but the header describes another state."""
    data = bytearray()
    info = verify(file, data.extend)
    header = msgspec.structs.replace(info.header, state_hash=b"\x01" * 16)
    writer = SnapshotWriter(tmp_path / "forged.dsnap", header, 4096)
    writer.write(bytes(data))
    forged = writer.finish().path
    verify(forged)
    with pytest.raises(DataCorruption, match=r"forged\.dsnap is damaged: its header"):
        restore(forged, tmp_path / "db", 1, ADDRESS, quiet)
    assert not (tmp_path / "db").exists()


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize(
    "step", ["unpack", "LogStore.reset", "take", "adopt_state", "finish_install", "mark_clean"]
)
def test_a_crash_leaves_nothing_usable(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """After a kill anywhere before the rename no node finds a directory, and a rerun works."""
    root = tmp_path / "db"

    def crash(*args: object, **named: object) -> None:
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", lambda *a, **k: None)  # a killed process cleans nothing up
        patched.setattr(os, "rmdir", lambda *a, **k: None)
        if step in ("unpack", "take"):
            patched.setattr(restore_module, step, crash)
        elif step == "LogStore.reset":
            patched.setattr(LogStore, "reset", crash)
        else:
            patched.setattr(DataDirectory, step, crash)
        with pytest.raises(Crash):
            restore(file, root, 1, ADDRESS, quiet)
    assert os.listdir(root) == [".new-1"]
    restore(file, root, 1, ADDRESS, quiet)
    assert os.listdir(root) == ["1"]
    check_founded(root, 1, tmp_path / "old" / "1" / "state-1", 20)


# --- Repair


def repaired(root: Path) -> tuple[list[str], Path]:
    with repairing(root, 1, quiet) as attempt:
        damage = attempt.survey.damage
        _, aside = attempt.carry_out(ADDRESS, quiet)
    return damage, aside


@pytest.mark.parametrize("trusted", [True, False])
def test_a_sound_state_is_kept_whole(tmp_path: Path, trusted: bool) -> None:
    """The log is gone: all that was applied is there, for its records add up to its hash."""
    directory = lived(tmp_path, 30)
    snapshot_at(directory, 10)
    rot(directory.log_path / "data.mdb")
    if not trusted:
        lose_power(directory)
    directory.close()
    with repairing(tmp_path, 1, quiet) as attempt:
        survey = attempt.survey
        assert (survey.kept.index, survey.others) == (30, [])
        assert survey.is_needed
    assert sorted(os.listdir(tmp_path)) == ["1", "scratch-10"]
    damage, aside = repaired(tmp_path)
    assert any("log" in each for each in damage)
    check_founded(tmp_path, 1, aside / "state-1", 30)


def test_a_snapshot_and_the_log_after_it(tmp_path: Path) -> None:
    """Damage in an entry that a snapshot includes: the log goes on behind it."""
    directory = lived(tmp_path, 30)
    snapshot_at(directory, 20)
    reference = everything(directory.state_path())
    rot(directory.state_path() / "data.mdb")
    damage_entry(directory.log_path, 12)
    directory.close()
    with repairing(tmp_path, 1, quiet) as attempt:
        assert attempt.survey.kept.index == 30
        assert attempt.survey.source == "snapshot-1-20.dsnap"
        assert any("entry 12 fails its CRC" in each for each in attempt.survey.damage)
        attempt.carry_out(ADDRESS, quiet)
    log, state = open_stores(new := DataDirectory.open(tmp_path, 1))
    assert state.revision > max(reference[1] + REVISION_STEP, YEAR_2025)
    assert [(k, r) for k, r in state.page(b"", None, 1000, False).items] == reference[3]
    state.close()
    log.close()
    new.close()


def test_the_sound_beginning_of_a_log(tmp_path: Path) -> None:
    """Nothing but a damaged log: everything before the damage."""
    directory = lived(tmp_path, 30)
    rot(directory.state_path() / "data.mdb")
    damage_entry(directory.log_path, 12)
    directory.close()
    with repairing(tmp_path, 1, quiet) as attempt:
        assert attempt.survey.kept.index == 11
        assert attempt.survey.last_index == 30


def test_what_nobody_committed_is_kept(tmp_path: Path) -> None:
    """The majority is lost: its acknowledgements cannot be asked for, so all entries count."""
    directory = lived(tmp_path, 30, others=[OTHER], applied=20)
    with closing(LogStore(directory.log_path)) as log:
        log.save(HardState(1, None, 20), ())
    directory.close()
    with repairing(tmp_path, 1, quiet) as attempt:
        survey = attempt.survey
        assert survey.kept.index == 30
        assert [m.id for m in survey.others] == [OTHER]
        assert survey.damage == []
        assert survey.is_needed
        assert survey.member is not None
        assert survey.member.address == "10.0.0.1:9081"


def test_a_purged_log_without_a_beginning(tmp_path: Path) -> None:
    """State and snapshots are lost: entries alone are of no use, and that is said."""
    directory = lived(tmp_path, 30)
    purge(directory, 12)
    rot(directory.state_path() / "data.mdb")
    directory.close()
    with pytest.raises(DataCorruption, match="snapshot restore"), repairing(tmp_path, 1, quiet):
        pass
    assert os.listdir(tmp_path) == ["1"]


def test_identity_and_log_lost(tmp_path: Path) -> None:
    """What is left of a directory may be its state alone."""
    directory = lived(tmp_path, 30)
    (directory.path / "identity.json").write_text("{")
    (directory.log_path / "data.mdb").unlink()
    directory.close()
    damage, aside = repaired(tmp_path)
    assert damage[:2] == ["identity.json cannot be read", "the log: the log is missing"]
    check_founded(tmp_path, 1, aside / "state-1", 30)


def test_a_running_node_a_removed_one_and_none(tmp_path: Path) -> None:
    """Repair is for a stopped node that is still wanted."""
    directory = lived(tmp_path, 5)
    with pytest.raises(TryAgain), repairing(tmp_path, 1, quiet):
        pass
    directory.set_removed("node 1 was removed from cluster c-1")
    directory.close()
    with pytest.raises(IdentityError, match="removed"), repairing(tmp_path, 1, quiet):
        pass
    with pytest.raises(NotFound), repairing(tmp_path, 2, quiet):
        pass
    assert os.listdir(tmp_path) == ["1"]


def put_back_an_old_log(directory: DataDirectory, root: Path) -> None:
    shutil.rmtree(directory.log_path)
    lived(root / "old", 20, like=directory).close()
    shutil.move(root / "old" / "1" / "log", directory.log_path)
    shutil.rmtree(root / "old")


def old_log_and_snapshot(directory: DataDirectory, root: Path) -> None:
    snapshot_at(directory, 25)
    put_back_an_old_log(directory, root)
    (directory.path / "RUN").unlink()


STOPS = {
    "a damaged entry": (lambda d, root: damage_entry(d.log_path, 12), 30),
    "a write that failed": (lambda d, root: d.distrust_log("it is damaged: no room"), 30),
    "a log that is gone": (lambda d, root: shutil.rmtree(d.log_path), 30),
    "an empty log": (lambda d, root: os.truncate(d.log_path / "data.mdb", 0), 30),
    "a log older than the state": (put_back_an_old_log, 30),
    "a log older than a snapshot": (old_log_and_snapshot, 30),
}


@pytest.mark.parametrize("cause", STOPS)
def test_repair_accepts_what_a_start_refuses(tmp_path: Path, cause: str) -> None:
    """A single node that stops with 65 names `dengine repair`, which then is a way on."""
    root = tmp_path / "db"
    directory = lived(root, 30)
    fault, kept = STOPS[cause]
    fault(directory, tmp_path)
    directory.close()
    directory = DataDirectory.open(root, 1)
    for _ in range(2):  # refused for good, not once
        with pytest.raises(DataCorruption, match="dengine repair"):
            open_stores(directory)
    directory.close()
    with repairing(root, 1, quiet) as attempt:
        assert attempt.survey.is_needed
        assert attempt.survey.damage
        assert attempt.survey.kept.index == kept
        attempt.carry_out(ADDRESS, quiet)
    log, state = open_stores(new := DataDirectory.open(root, 1))
    state.close()
    log.close()
    new.close()


def test_a_sound_sole_voter_needs_nothing(tmp_path: Path) -> None:
    """A damaged state or snapshot is no reason: a start mends them."""
    directory = lived(tmp_path, 30)
    bad = snapshot_at(directory, 10).path
    bad.write_bytes(bad.read_bytes()[:-5])
    rot(directory.state_path() / "data.mdb")
    directory.close()
    with repairing(tmp_path, 1, quiet) as attempt:
        assert not attempt.survey.is_needed


def test_where_directories_cannot_swap_names_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old directory is where it was, and the new one is gone."""
    directory = lived(tmp_path, 5, others=[OTHER])
    directory.close()
    before = everything(directory.path / "state-1")

    def refuse(one: Path, other: Path) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(repair_module, "_exchange", refuse)
    with pytest.raises(StorageIO, match="Invalid argument"):
        repaired(tmp_path)
    assert os.listdir(tmp_path) == ["1"]
    assert everything(tmp_path / "1" / "state-1") == before


def damage_entry(log: Path, index: int) -> None:
    with closing(LogStore(log)) as store:
        (entry,) = store.entries(index, index + 1, 100)
    content = (log / "data.mdb").read_bytes()
    changed = entry.data[:-1] + bytes([entry.data[-1] ^ 1])
    assert entry.data in content
    (log / "data.mdb").write_bytes(content.replace(entry.data, changed))
