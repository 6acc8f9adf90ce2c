"""The data directory of one node: `<root>/<node_id>/`, owned by one process at a time.

    LOCK            flock of the process that uses the directory
    identity.json   who this node is; written last when the directory is made
    log/            LogStore
    state-N/        StateStore; CURRENT names the one in use
    RUN, CLEAN      whether the state, which is not synced per commit, can be trusted
    OPENING         a start reads the log; left behind when that ended the process
    HALTED          why no start is to use the directory before a person has decided
    snapshots/      verified snapshots, and what is on its way to become one

The state is what the disk says only if the kernel that holds its unwritten pages still runs (RUN
carries its boot id), if everything was synced before the last stop (CLEAN), or if it has just been
unpacked from a snapshot (UNPACKED, inside it: nothing was applied to it yet), and if no damage was
found in it (DAMAGED, inside it). Otherwise the state is discarded and built again. A log can be
DAMAGED as well, or lost: with other voters a new one is begun.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import msgspec

from dengine.errors import (
    DataCorruption,
    FatalError,
    IdentityError,
    InvariantBroken,
    StorageIO,
    TryAgain,
)
from dengine.raft.membership import Membership, decode_membership
from dengine.raft.types import HardState, LogId
from dengine.storage.environment import DATA_FILE, make_directory, sync_directory
from dengine.storage.identity import FORMAT, Identity, identity_text, read_identity
from dengine.storage.log_store import LogStore
from dengine.storage.marks import DAMAGED_MARK, FILES_TOO, RUN_MARK

UNPACKED_MARK = "UNPACKED"
UNCLEAN = " unclean ends before: "  # in RUN
NEW_LOG = "log.new"
HALTED_MARK = "HALTED"
BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")


class DataDirectory:
    """Use `DataDirectory.open`.

    Attributes:
        path: `<root>/<node_id>`.
        identity: who this directory is.
        boot: 63 random bits, never 0; another number each time the directory is opened.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.boot = _random_63_bits()
        self.identity = Identity(FORMAT, 0, 0)
        self._lock = lock

    @classmethod
    def open(cls, root: Path, node_id: int) -> DataDirectory:
        """Lock the directory of `node_id`; make it, and a new identity, where there is none.

        Raises:
            TryAgain: another process uses it.
            IdentityError: it belongs to another node id or was made by a newer dengine.
            DataCorruption: part of it is damaged or missing; the log is not looked at.
            StorageIO: the disk refused.
        """
        path = root / str(node_id)
        try:
            make_directory(root)
            path.mkdir(mode=0o700, exist_ok=True)
            sync_directory(root)
            directory = cls(path, lock_directory(path))
            try:
                directory._load(node_id)
            except BaseException:
                directory.close()
                raise
        except OSError as error:
            raise StorageIO(f"cannot use the data directory {path}: {error.strerror}") from error
        return directory

    @property
    def log_path(self) -> Path:
        return self.path / "log"

    @property
    def snapshots_path(self) -> Path:
        return self.path / "snapshots"

    def set_cluster_id(self, cluster_id: str) -> None:
        """Note durably which cluster this node belongs to. Raises IdentityError, StorageIO."""
        known = self.identity.cluster_id
        if known and known != cluster_id:
            raise IdentityError(
                f"{self.path} belongs to cluster {known}, not to {cluster_id}: "
                "use another db_root_dir"
            )
        if known != cluster_id:
            self._write_identity(
                msgspec.structs.replace(self.identity, cluster_id=cluster_id, pledge=b"")
            )

    @property
    def pledge(self) -> Membership | None:
        """The first membership that this directory is bound to; None where there is none."""
        pledge = self.identity.pledge
        return decode_membership(pledge) if pledge else None

    def set_pledge(self, membership: bytes) -> None:
        """Bind this directory durably to the cluster that begins with `membership`, encoded, and to
        no other one, whether or not it comes to be; unless that is a cluster of this node alone.
        Raises InvariantBroken, StorageIO.
        """
        bound = self.pledge is not None and len(self.pledge.voters) > 1
        if bound or self.identity.cluster_id:
            raise InvariantBroken(f"{self.path} is bound to a cluster already")
        self._write_identity(msgspec.structs.replace(self.identity, pledge=membership))

    def set_address(self, address: str) -> None:
        """Note durably the address this node announces. Raises StorageIO."""
        if self.identity.address != address:
            self._write_identity(msgspec.structs.replace(self.identity, address=address))

    def set_stickiness(self, stickiness_ms: int) -> None:
        """Note durably for how long a leader that was heard keeps this vote. Raises StorageIO."""
        if self.identity.stickiness_ms != stickiness_ms:
            self._write_identity(
                msgspec.structs.replace(self.identity, stickiness_ms=stickiness_ms)
            )

    def set_removed(self, reason: str) -> None:
        """Note durably that the cluster removed this node, and why. Raises StorageIO."""
        self._write_identity(msgspec.structs.replace(self.identity, removed=reason))

    def reincarnate(self) -> None:
        """Go on as another incarnation, durably: this one has broken what it acknowledged.

        Log and state stay. They are a valid past of the cluster; only the promises made under the
        old incarnation (votes, acknowledgements) cannot be counted any more. Raises StorageIO.
        """
        self._write_identity(
            msgspec.structs.replace(self.identity, incarnation=_random_63_bits(), pledge=b"")
        )

    def state_path(self) -> Path:
        """The `state-N` in use. Raises DataCorruption when CURRENT names none."""
        current = self.path / "CURRENT"
        try:
            name = current.read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            raise StorageIO(f"cannot read {current}: {error.strerror}") from error
        if _state_number(name) is None:
            raise DataCorruption(
                f"{current} is damaged: it holds {name[:40]!r} and not the name of a state "
                "directory; remove it, and the state is built again",
                file=str(current),
            )
        return self.path / name

    def trusted_state(self) -> bool:
        """Is the state in `state_path()` sure to be what was applied? An empty one always is.

        Raises StorageIO.
        """
        state = self.state_path()
        if not state.exists() or (state / DAMAGED_MARK).exists():
            return False
        if self.installing or not (state / DATA_FILE).exists() or self._is_clean():
            return True
        return self._ran_in_this_boot()

    def unclean_ends(self) -> int:
        """How many processes in a row have used the trusted state and not closed it."""
        found, _, before = self._mark(RUN_MARK).partition(UNCLEAN)
        if self._is_clean() or found != self._run_mark():
            return 0
        return 1 + (int(before) if before.isdecimal() else 0)

    def mark_running(self, unclean_ends: int = 0) -> None:
        """Before the first commit to the state: from now on only this boot can trust it.

        Call it after `discard_state`, if that is called.
        Raises StorageIO.
        """
        try:  # CLEAN still says the truth until something is committed, and is needed if this fails
            self._write_file(RUN_MARK, f"{self._run_mark()}{UNCLEAN}{unclean_ends}")
            (self.path / "CLEAN").unlink(missing_ok=True)
            sync_directory(self.path)
        except OSError as error:
            raise StorageIO(f"cannot write {self.path / RUN_MARK}: {error.strerror}") from error

    @property
    def installing(self) -> bool:
        """Has the state in use just been unpacked, so that the log may not know of it yet?"""
        return (self.state_path() / UNPACKED_MARK).exists()

    def next_state_path(self) -> Path:
        """Where a state may be unpacked while the one in use goes on. It need not exist."""
        return self.path / f"state-{(_state_number(self.state_path().name) or 0) + 1}"

    @property
    def scratch_path(self) -> Path:
        """Where a state may be unpacked that nobody will use: no `state-N`, for no start and no
        repair should take it for one. It need not exist."""
        return self.path / "scratch"

    def adopt_state(self, path: Path) -> None:
        """Use the unpacked, synced state at `next_state_path()` from now on, durably.

        The old one stays until `finish_install`; until then a start finishes what is missing.
        Raises StorageIO.
        """
        try:
            self._write_file("CURRENT", path.name)
        except OSError as error:
            raise StorageIO(f"cannot adopt {path}: {error.strerror}") from error

    def finish_install(self) -> None:
        """The log agrees with the adopted state: from here on it may change. Raises StorageIO."""
        path = self.state_path()
        self.mark_running()
        try:
            (path / UNPACKED_MARK).unlink(missing_ok=True)
            sync_directory(path)
        except OSError as error:
            raise StorageIO(f"cannot finish {path}: {error.strerror}") from error
        self.tidy()

    @property
    def died_opening(self) -> bool:
        """Did the start before this one end while it read the log?"""
        return (self.path / "OPENING").exists()

    @contextmanager
    def opening(self) -> Iterator[None]:
        """While the log is opened and read: LMDB ends the process over some kinds of damage.

        Raises StorageIO.
        """
        mark = self.path / "OPENING"
        try:
            mark.touch(mode=0o600)
        except OSError as error:
            raise StorageIO(f"cannot write {mark}: {error.strerror}") from error
        try:
            yield
        finally:
            with suppress(OSError):  # one that stays costs the next start a little time
                mark.unlink()

    def distrust_state(self, state: Path, files_too: bool) -> None:
        """Have the next start rebuild `state`, and, with `files_too`, from no snapshot of ours.

        Raises StorageIO: the next start may take it for a sound one.
        """
        try:
            self._write_file(f"{state.name}/{DAMAGED_MARK}", FILES_TOO if files_too else "")
        except OSError as error:
            if state == self.state_path():
                for name in (RUN_MARK, "CLEAN"):  # a full disk still lets go of what vouches for it
                    with suppress(OSError):
                        (self.path / name).unlink(missing_ok=True)
            raise StorageIO(f"cannot write {state / DAMAGED_MARK}: {error.strerror}") from error

    @property
    def halted(self) -> FatalError | None:
        """Why this directory is not to be used before a person has decided; None: it may be."""
        code, _, reason = self._mark(HALTED_MARK).partition(" ")
        if not code:
            return None
        message = f"{reason}; then remove {self.path / HALTED_MARK}"
        if code == str(IdentityError.exit_code):
            return IdentityError(message)
        return DataCorruption(message, file=str(self.path / HALTED_MARK))

    def halt(self, error: FatalError) -> None:
        """Have every start refuse to use it, until somebody removes the mark. Raises StorageIO."""
        try:
            self._write_file(HALTED_MARK, f"{error.exit_code} {error.message}")
        except OSError as error:
            raise StorageIO(f"cannot write {self.path / HALTED_MARK}: {error.strerror}") from error

    @property
    def distrusts_files(self) -> bool:
        """May the snapshots be wrong, as the state in use is known to be? Raises StorageIO."""
        mark = self.state_path() / DAMAGED_MARK
        try:
            return mark.read_text(encoding="utf-8", errors="replace") == FILES_TOO
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StorageIO(f"cannot read {mark}: {error.strerror}") from error

    def distrust_log(self, reason: str) -> None:
        """Have the next start begin a new log, whether or not it can find what is wrong with it."""
        with suppress(OSError):  # a disk that refuses this as well has another error to tell
            self._write_file(f"{self.log_path.name}/{DAMAGED_MARK}", reason)

    def replace_log(self, hard_state: HardState, base: LogId, membership: Membership) -> LogStore:
        """Begin a new log after `base`; the damaged one stays as `log.damaged`, as evidence.

        The promises made with the old one are broken: `reincarnate` first. Raises StorageIO.
        """
        new, aside = self.path / NEW_LOG, self.path / "log.damaged"
        try:
            shutil.rmtree(new, ignore_errors=True)
            if not self.log_path.exists():
                # Where nothing has the name of the log, a start takes a new one for complete.
                self.log_path.mkdir(mode=0o700)
                sync_directory(self.path)
            with closing(LogStore(new)) as log:
                log.reset(hard_state, base, membership)
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(self.log_path, aside)
            self._finish_new_log()
            (self.path / "OPENING").unlink(missing_ok=True)
        except OSError as error:
            raise StorageIO(f"cannot replace {self.log_path}: {error.strerror}") from error
        return LogStore(self.log_path)

    def _finish_new_log(self) -> None:
        new = self.path / NEW_LOG
        if new.exists() and not self.log_path.exists():
            os.rename(new, self.log_path)
            sync_directory(self.path)
        # One that did not get that far must never take the place of a log that is lost later.
        shutil.rmtree(new, ignore_errors=True)

    def mark_clean(self) -> None:
        """After the last commit: the state has been synced and closed. Raises StorageIO."""
        try:
            sync_directory(self.state_path())
            self._write_file("CLEAN", self.state_path().name)
        except OSError as error:
            raise StorageIO(f"cannot write {self.path / 'CLEAN'}: {error.strerror}") from error

    def discard_state(self) -> Path:
        """Switch to a new, empty state directory and delete the old one, which must be closed.

        Returns:
            The new `state_path()`.

        Raises:
            StorageIO: the disk refused; old or new is in use, never half of one.
        """
        old = self.state_path()
        name = f"state-{(_state_number(old.name) or 0) + 1}"
        try:
            self._switch_state(name)
        except OSError as error:
            raise StorageIO(f"cannot replace {old}: {error.strerror}") from error
        self.tidy()
        return self.path / name

    def tidy(self) -> None:
        """Delete every state but the one in use. Call it when that one is known to be sound: until
        then another may be all that is left for a person to go on from."""
        current = self.state_path()
        for path in self.path.glob("state-*"):
            if path != current:
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _load(self, node_id: int) -> None:
        file = self.path / "identity.json"
        if not file.exists():
            self._make_log(file)
            self._write_identity(Identity(FORMAT, node_id, _random_63_bits()))
        self.identity = read_identity(file)
        if self.identity.node_id != node_id:
            raise IdentityError(
                f"{self.path} holds the data of node {self.identity.node_id}, but node_id is "
                f"{node_id}: correct node_id or db_root_dir"
            )
        self._finish_new_log()
        # A lost log is for recovery to judge, for other voters may make up for it. One that this
        # user may not reach is told here, like everything else that is misplaced.
        with suppress(FileNotFoundError):
            (self.log_path / DATA_FILE).stat()
        if not (self.path / "CURRENT").exists():
            known = [_state_number(path.name) or 0 for path in self.path.glob("state-*")]
            self._switch_state(f"state-{max(known, default=0) + 1}")
        self.state_path()  # raises where CURRENT is damaged

    def _make_log(self, identity_file: Path) -> None:
        """The log comes before the identity: so an identity without a log means it was lost."""
        log = LogStore(self.log_path)
        used = log.last_index() > 0 or log.load()[0].voted_for is not None
        log.close()
        if used:
            raise DataCorruption(
                f"{identity_file} is missing although {self.log_path} is in use: restore it, or "
                f"remove {self.path}, and the node joins anew",
                file=str(identity_file),
            )

    def _write_identity(self, identity: Identity) -> None:
        try:
            self._write_file("identity.json", identity_text(identity))
        except OSError as error:
            raise StorageIO(
                f"cannot write {self.path / 'identity.json'}: {error.strerror}"
            ) from error
        self.identity = identity

    def _switch_state(self, name: str) -> None:
        new = self.path / name
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        sync_directory(new)
        self._write_file("CURRENT", name)

    def _is_clean(self) -> bool:
        return self._mark("CLEAN") == self.state_path().name

    def _mark(self, name: str) -> str:
        """Empty where there is no such mark. Raises StorageIO."""
        file = self.path / name
        try:
            return file.read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise StorageIO(f"cannot read {file}: {error.strerror}") from error

    def _ran_in_this_boot(self) -> bool:
        if not self.state_path().exists():
            return False
        return self._mark(RUN_MARK).partition(UNCLEAN)[0] == self._run_mark()

    def _run_mark(self) -> str:
        """This boot, and which directory: a copy of a running one was copied page by page."""
        try:
            boot_id = BOOT_ID_FILE.read_text(encoding="ascii").strip()
        except OSError:
            boot_id = f"unknown-{self.boot}"  # matches no other process, so never trusted
        stat = self.state_path().stat()
        return f"{boot_id} {self.state_path().name} {stat.st_dev}:{stat.st_ino}"

    def _write_file(self, name: str, text: str) -> None:
        """Replace a small file as a whole and make it durable. Raises OSError."""
        temporary = self.path / f"{name}.tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(fd)
        os.replace(temporary, self.path / name)
        sync_directory(temporary.parent)  # `name` may lie in a directory of ours


def distrusted_log(log_path: Path) -> str | None:
    """Why the log in this directory is not to be used again; None where nobody said so."""
    try:
        return (log_path / DAMAGED_MARK).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def lock_directory(path: Path) -> int:
    """Lock the data directory `path` until the returned descriptor is closed. Raises TryAgain."""
    fd = os.open(path / "LOCK", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
        os.close(fd)
        raise TryAgain(
            f"the data directory {path} is in use by process {owner or 'unknown'}: "
            "stop that one first, or use another db_root_dir"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    return fd


def _random_63_bits() -> int:
    return secrets.randbelow(2**63 - 1) + 1


def _state_number(name: str) -> int | None:
    stem, _, number = name.partition("-")
    return int(number) if stem == "state" and number.isascii() and number.isdigit() else None
