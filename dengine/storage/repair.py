"""What `dengine repair` does: go on with what is left, once a person has accepted what is lost.

Two kinds of damage have no other way out: the only copy of a log is damaged, and the majority of a
cluster's directories is gone. Both end in a new cluster of this node alone (see restore.py), with
everything its directory still holds: the state or the snapshot from which, with the sound entries
after it, one gets furthest. Entries count whether committed or not, for who could say: what was
acknowledged here is never left out, and what was not may come to pass.

The old directory is only read, and kept as a whole under another name.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dengine.errors import (
    Conflict,
    DataCorruption,
    DengineError,
    IdentityError,
    NotFound,
    StorageIO,
)
from dengine.raft.membership import Member, Membership
from dengine.raft.types import Entry, LogId
from dengine.storage.directory import DataDirectory, distrusted_log, lock_directory
from dengine.storage.environment import DATA_FILE, sync_directory
from dengine.storage.identity import Identity, read_identity
from dengine.storage.probe import probe_state
from dengine.storage.restore import Founded, building, found_cluster, give_to
from dengine.storage.salvage import SalvagedLog
from dengine.storage.snapshot_file import read_header
from dengine.storage.snapshots import Progress, list_files, unpack
from dengine.storage.state_reader import StateReader
from dengine.storage.state_store import StateStore

APPLY_ENTRIES: Final = 256
APPLY_BYTES: Final = 8 * 1024 * 1024
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


@dataclass
class Survey:
    """What a directory still holds, and what is lost.

    Attributes:
        damage: one phrase for each damaged part; may be empty.
        is_fatal: a node cannot mend that by itself, not even with others.
        source: what the kept state begins with.
        kept: the last entry that is kept.
        last_index: the newest entry the log claims; None when that cannot be told.
        others: voters whose directories a new cluster does without.
    """

    path: Path
    node_id: int
    cluster_id: str
    damage: list[str]
    is_fatal: bool
    source: str
    kept: LogId
    revision: int
    last_index: int | None
    member: Member | None
    others: list[Member]

    @property
    def is_needed(self) -> bool:
        return self.is_fatal or bool(self.others)


class Repair:
    """One attempt; `survey` is there at once, and `carry_out` makes it true."""

    def __init__(self, path: Path, directory: DataDirectory, state: Path, survey: Survey) -> None:
        self.survey = survey
        self._path = path
        self._directory = directory
        self._state = state

    def carry_out(self, address: str, progress: Progress) -> tuple[Founded, Path]:
        """Found the new cluster in place of the old directory, in one step.

        Returns:
            The cluster, and where the old directory is now.

        Raises:
            StorageIO: the disk refused; the old directory is where it was.
        """
        zone = self.survey.member.zone if self.survey.member is not None else ""
        founded = found_cluster(self._directory, self._state, address, zone, progress)
        try:
            give_to(self._directory.path, self._path)
            aside = _unused_name(self._path)
            # A crash between the two renames leaves the new directory where nobody looks.
            os.rename(self._directory.path, aside)
            try:
                _exchange(self._path, aside)
            except OSError:
                shutil.rmtree(aside, ignore_errors=True)
                raise
            sync_directory(self._path.parent)
        except OSError as error:
            raise StorageIO(f"cannot replace {self._path}: {error.strerror}") from error
        return founded._replace(path=self._path), aside


@contextmanager
def repairing(root: Path, node_id: int, progress: Progress) -> Iterator[Repair]:
    """Lock `<root>/<node_id>`, find out what can be kept, and build that beside it.

    The old directory is not changed, and unless `carry_out` is called nothing else is either.

    Raises:
        NotFound: there is no such directory.
        TryAgain: a node runs in it.
        IdentityError: it belongs to another node, or was removed from its cluster.
        DataCorruption: nothing at all can be kept.
        StorageIO: the disk refused.
    """
    path = root / str(node_id)
    if not (path / "log").exists() and not (path / "identity.json").exists():
        raise NotFound(f"{path} is not the data directory of a node")
    try:
        lock = lock_directory(path)
    except OSError as error:
        raise StorageIO(f"cannot lock {path}: {error.strerror}") from error
    try:
        damage: list[str] = []
        identity = _identity(path, node_id, damage)
        with building(root, node_id) as directory:
            log = _copy_of_log(path, directory.path.parent / "log")
            try:
                if log.damage is not None:
                    damage.append(f"the log: {log.damage}")
                state, survey = _Builder(path, directory, identity, log, progress).build(damage)
            finally:
                log.close()
                shutil.rmtree(directory.path.parent / "log", ignore_errors=True)
            yield Repair(path, directory, state, survey)
    finally:
        os.close(lock)


def _identity(path: Path, node_id: int, damage: list[str]) -> Identity | None:
    file = path / "identity.json"
    try:
        identity = read_identity(file)
    except (DataCorruption, StorageIO):
        damage.append("identity.json cannot be read" if file.exists() else "identity.json is lost")
        return None
    if identity.node_id != node_id:
        raise IdentityError(f"{path} holds the data of node {identity.node_id}")
    if identity.removed:
        raise IdentityError(
            f"{identity.removed}: what {path} holds is old, and the cluster goes on without it"
        )
    return identity


def _copy_of_log(path: Path, to: Path) -> SalvagedLog:
    """The log, read from a copy: reading a damaged one may have to change it."""
    try:
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir(mode=0o700)
        file = path / "log" / DATA_FILE
        if file.exists() and file.stat().st_size:
            shutil.copyfile(file, to / DATA_FILE)
    except OSError as error:
        raise StorageIO(f"cannot copy {path / 'log'}: {error.strerror}") from error
    return SalvagedLog(to, distrusted_log(path / "log"))


@dataclass
class _Candidate:
    """A beginning: a snapshot, the applied state, or nothing at all."""

    applied: LogId
    name: str
    snapshot: Path | None = None
    state: Path | None = None
    end: int = 0  # how far one gets from here with the log


class _Builder:
    """Builds the best state that the old directory `path` allows in the new `directory`."""

    def __init__(
        self,
        path: Path,
        directory: DataDirectory,
        identity: Identity | None,
        log: SalvagedLog,
        progress: Progress,
    ) -> None:
        self._path = path
        self._directory = directory
        self._identity = identity
        self._log = log
        self._progress = progress
        self._rolled_back = False

    def build(self, damage: list[str]) -> tuple[Path, Survey]:
        """The state, closed, and what became of everything. `damage` is added to."""
        cluster_id = self._identity.cluster_id if self._identity is not None else ""
        candidates = self._candidates(cluster_id, damage)
        for candidate in candidates:
            if self._log.lacks(candidate.applied):
                self._rolled_back = True
                what = f"it lacks entry {candidate.applied.index} of {candidate.name}"
                damage.append(f"the log was rolled back: {what}")
                break
        for candidate in candidates:
            state = self._make(candidate, damage)
            if state is None:
                continue
            try:
                self._apply(state)
                last = self._log.last_index
                if self._log.damage is None and last is not None and state.applied.index < last:
                    damage.append(f"no sound state or snapshot reaches entry {self._begin}")
                return state.path, self._survey(state, candidate, cluster_id, damage)
            finally:
                state.close()
        raise DataCorruption(
            f"nothing in {self._path} can be kept ({'; '.join(damage) or 'it is empty'}): "
            "restore a backup with `dengine snapshot restore`"
        )

    @property
    def _begin(self) -> int:
        return self._log.base.index if self._log.base is not None else 0

    def _candidates(self, cluster_id: str, damage: list[str]) -> list[_Candidate]:
        """Those from which one gets furthest first; the state before an equal snapshot."""
        found = []
        for number, state in enumerate(sorted(self._path.glob("state-*"), reverse=True)):
            candidate = self._copied_state(state, number, damage)
            if candidate is not None:
                found.append(candidate)
        for file in reversed(list_files(self._path / "snapshots")):
            try:
                header = read_header(file)
            except (DataCorruption, StorageIO) as error:
                damage.append(_phrase(error))
                continue
            if cluster_id in ("", header.cluster_id):
                found.append(_Candidate(header.log_id, file.name, snapshot=file))
        found.append(_Candidate(LogId(0, 0), "an empty state"))
        for candidate in found:
            candidate.end = candidate.applied.index
            for entry in self._log.after(candidate.applied):
                candidate.end = entry.index
        found = [candidate for candidate in found if candidate.end]
        return sorted(found, key=lambda c: (-c.end, -c.applied.index))

    def _copied_state(self, path: Path, number: int, damage: list[str]) -> _Candidate | None:
        """A state whose records add up to its hash is what was applied, trusted or not."""
        if not (path / DATA_FILE).exists():
            return None
        copy = self._directory.path.parent / f"state-{number}"
        try:
            copy.mkdir(mode=0o700)
            shutil.copyfile(path / DATA_FILE, copy / DATA_FILE)
            probe_state(copy)
            with StateReader(copy) as reader:
                applied = reader.applied
        except DataCorruption as error:
            what = error.message.split(" is damaged: ", 1)[-1].split("; ")[0]
            if "does not say what it has applied" not in what:  # a new one is merely empty
                damage.append(f"{path / DATA_FILE}: {what}")
            shutil.rmtree(copy, ignore_errors=True)
            return None
        except OSError as error:
            raise StorageIO(f"cannot copy {path}: {error.strerror}") from error
        return _Candidate(applied, f"the applied state ({path.name})", state=copy)

    def _make(self, candidate: _Candidate, damage: list[str]) -> StateStore | None:
        """The candidate as the next state of the new directory; None when it is damaged."""
        path = self._directory.next_state_path()
        shutil.rmtree(path, ignore_errors=True)
        if candidate.state is not None:
            os.rename(candidate.state, path)
        elif candidate.snapshot is not None:
            try:
                unpack(candidate.snapshot, path, self._progress)
            except DataCorruption as error:
                damage.append(_phrase(error))
                return None
        return StateStore(path)

    def _apply(self, state: StateStore) -> None:
        batch: list[Entry] = []
        size = 0
        for entry in self._log.after(state.applied):
            batch.append(entry)
            size += len(entry.data)
            if len(batch) >= APPLY_ENTRIES or size >= APPLY_BYTES:
                state.apply(batch)
                batch, size = [], 0
        state.apply(batch)

    def _survey(
        self, state: StateStore, candidate: _Candidate, cluster_id: str, damage: list[str]
    ) -> Survey:
        membership = state.membership or Membership()
        node_id = self._directory.identity.node_id
        mine = [m for m in membership.members if m.id.id == node_id]
        others = [
            m for m in membership.members if m.id in membership.all_voters and m.id.id != node_id
        ]
        return Survey(
            path=self._path,
            node_id=node_id,
            cluster_id=cluster_id or membership.cluster_id,
            damage=damage,
            is_fatal=(
                self._log.damage is not None
                or self._rolled_back
                or self._identity is None
                or state.applied.index < (self._log.last_index or 0)
            ),
            source=candidate.name,
            kept=state.applied,
            revision=state.revision,
            last_index=self._log.last_index,
            member=mine[-1] if mine else None,
            others=others,
        )


def _phrase(error: DengineError) -> str:
    return error.message.split("; ")[0]


def not_needed(survey: Survey) -> Conflict:
    """Nothing is damaged, and nobody else is missing."""
    return Conflict(
        f"{survey.path} needs no repair: it is sound, and node {survey.node_id} is the only voter "
        "of its cluster; start it"
    )


def _unused_name(path: Path) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    name = f"{path.name}.before-repair-{stamp}"
    found, number = path.with_name(name), 1
    while os.path.lexists(found):
        number += 1
        found = path.with_name(f"{name}-{number}")
    return found


def _exchange(one: Path, other: Path) -> None:
    """Let two directories swap names in one step (renameat2(2)). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
    )
    if done:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one))
