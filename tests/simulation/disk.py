"""A disk that can lose power: files, directories and LMDB environments, and what was synced.

Every file has its content and the content at its last fsync; every directory its names, those at
its last fsync, and the changes since. `lose_power` keeps any of those changes, and of each unsynced
file the old content, the new one, one that ends early or has a sector of zeros, or none. What a
killed process has written stays: the kernel has it.

Any operation that changes something may fail for want of room or with an input/output error. After
an fsync of a file that has failed, its pages count as clean: a later fsync finds nothing wrong and
saves nothing of what there was, and a later process may read the old content or the new.

`SimPath`, `SimOs` and the functions below stand for pathlib, os and shutil in dengine.storage.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any, Final

from tests.simulation.environment import Environment
from tests.simulation.loop import Crash, WriterDied

FREE_BYTES: Final = 1 << 40
NEEDS_ROOM: Final = {"commit": 1, "new name": 1, "file write": 0}  # bytes, beside what is written
SECTOR_BYTES: Final = 512
KEPT: Final = 0.6  # of the changes of a directory, when the power goes
OPERATIONS: Final = (
    "commit",  # of LMDB, with or without an fsync
    "sync",  # of an LMDB file whose commits had none
    "file write",
    "file sync",
    "new name",
    "rename",
    "removal",
    "directory sync",
)


class Inode:
    """A file, an LMDB file (`environment`) or a directory (`names`)."""

    __slots__ = (
        "content",
        "environment",
        "journal",
        "lies",
        "names",
        "number",
        "synced",
        "synced_names",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.content = b""
        self.synced: bytes | None = None
        self.lies = False  # an fsync has failed, and no later one saves what it should have
        self.environment: Environment | None = None
        self.names: dict[str, Inode] | None = None
        self.synced_names: dict[str, Inode] = {}
        self.journal: list[dict[str, Inode | None]] = []  # changes since the last fsync


class Disk:
    """One machine's disk.

    Attributes:
        fuse: after so many more effects the process that uses it crashes; None: never.
        room: so many bytes are left, and what is removed makes none; None: enough.
        eio: after so many more operations one fails; None: never.
        eio_kind: only those of this kind count, and fail; empty: all.
        eio_times: so many fail in a row, the others of any kind.
        refusals: operations that have failed so far.
        burnt: called when the fuse has burnt.
        hit: told what rare thing took place.
    """

    def __init__(self, name: str, rng: random.Random) -> None:
        self.name = name
        self.rng = rng
        self.fuse: int | None = None
        self.writer_fuse: int | None = None  # of the snapshot writer alone
        self.room: int | None = None
        self.eio: int | None = None
        self.eio_kind = ""
        self.eio_times = 1
        self.refusals = 0
        self.dead = False
        self.burnt: Callable[[], None] = lambda: None
        self.hit: Callable[[str], None] = lambda what: None
        self._numbers = itertools.count(1)
        self._files: dict[int, Inode] = {}
        self._fds = itertools.count(1000)
        self.root = self._directory()

    def effect(self) -> None:
        """Something is about to change what others can see. Raises Crash, WriterDied."""
        if self.dead:
            raise Crash
        if self.writer_fuse is not None:  # burnt, it stays so: nothing that it leaves is tidied up
            self.writer_fuse -= 1
            if self.writer_fuse < 0:
                raise WriterDied
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.fuse, self.dead = None, True
                self.burnt()
                raise Crash

    def operation(self, kind: str, written: int = 0) -> None:
        """An effect on this disk, by which a file grows by so many bytes. Raises Crash, OSError."""
        self.effect()
        needs = NEEDS_ROOM.get(kind, 0) + written
        if self.room is not None and needs:
            if needs > self.room:
                self._refuse(kind, errno.ENOSPC)
            self.room -= needs
        if self.eio is not None and self.eio_kind in ("", kind):
            self.eio -= 1
            if self.eio < 0:
                self.eio_times -= 1
                self.eio, self.eio_kind = (0, "") if self.eio_times > 0 else (None, "")
                self._refuse(kind, errno.EIO)

    def _refuse(self, kind: str, number: int) -> None:
        self.refusals += 1
        self.hit(f"{errno.errorcode[number]} at a {kind}")
        raise OSError(number, os.strerror(number))

    def free_bytes(self) -> int:
        return FREE_BYTES if self.room is None else self.room

    # --- names ------------------------------------------------------------------------------------

    def find(self, parts: tuple[str, ...]) -> Inode | None:
        node: Inode | None = self.root
        for part in parts:
            if node is None or node.names is None:
                return None
            node = node.names.get(part)
        return node

    def durable(self, parts: tuple[str, ...]) -> Inode | None:
        """What is there now and after a power cut, whichever unsynced changes that keeps."""
        node: Inode | None = self.root
        for part in parts:
            if node is None or node.names is None or any(part in c for c in node.journal):
                return None
            node = node.synced_names.get(part)
        return node

    def need(self, path: SimPath) -> Inode:
        node = self.find(path.inside)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return node

    def change(self, path: SimPath, changes: dict[str, Inode | None]) -> None:
        """Change names in the directory `path`, as one operation."""
        removes, adds = None in changes.values(), any(changes.values())
        self.operation("rename" if removes and adds else "new name" if adds else "removal")
        directory = self.need(path)
        assert directory.names is not None
        for name, node in changes.items():
            if node is None:
                directory.names.pop(name, None)
            else:
                directory.names[name] = node
        directory.journal.append(changes)

    def make(self, path: SimPath, *, directory: bool = False) -> Inode:
        node = self._directory() if directory else Inode(next(self._numbers))
        self.change(path.parent, {path.name: node})
        return node

    def _directory(self) -> Inode:
        node = Inode(next(self._numbers))
        node.names = {}
        return node

    # --- content ----------------------------------------------------------------------------------

    def open(self, node: Inode) -> int:
        fd = next(self._fds)
        self._files[fd] = node
        return fd

    def by_fd(self, fd: int) -> Inode:
        return self._files[fd]

    def close(self, fd: int) -> None:
        self._files.pop(fd, None)

    def write(self, node: Inode, content: bytes) -> None:
        old = len(node.content)
        try:
            self.operation("file write", max(0, len(content) - old))
        except OSError as error:
            if error.errno == errno.ENOSPC and self.room:  # as much as there is room for
                node.content, self.room = content[: old + self.room], 0
            raise
        if not content:
            node.lies = False  # all of its pages are new ones from here on
        node.content = content

    def sync(self, node: Inode) -> None:
        try:
            self.operation("directory sync" if node.names is not None else "file sync")
        except OSError:
            node.lies = node.names is None
            raise
        if node.names is not None:
            node.synced_names = dict(node.names)
            node.journal.clear()
        elif node.lies:
            self.hit("fsync that lied")
        else:
            node.synced = node.content

    # --- what may happen to a disk ----------------------------------------------------------------

    def process_ended(self) -> None:
        """What the kernel could not write may leave its memory before the next process reads it."""
        if self.refusals:
            self._forget(self.root)

    def _forget(self, node: Inode) -> None:
        if node.names is not None:
            for name in sorted(node.names):
                self._forget(node.names[name])
        elif node.environment is not None:
            if not node.environment.process_ended(self.rng):
                self.hit("pages dropped")
        elif node.lies and self.rng.random() < 0.7:
            node.content, node.lies = node.synced or b"", False
            self.hit("pages dropped")

    def lose_power(self) -> None:
        """Only what was synced is sure to be there."""
        self._lose(self.root)
        self._files.clear()

    def _lose(self, node: Inode) -> None:
        if node.names is not None:
            kept = dict(node.synced_names)
            for changes in node.journal:
                if self.rng.random() >= KEPT:
                    continue
                for name, inode in changes.items():
                    if inode is None:
                        kept.pop(name, None)
                    else:
                        kept[name] = inode
            node.names, node.synced_names, node.journal = kept, dict(kept), []
            for name in sorted(kept):
                self._lose(kept[name])
        elif node.environment is not None:
            if not node.environment.lose_power(self.rng):
                self.hit("state torn")
        elif node.synced != node.content:
            self.hit("file torn")
            at = self.rng.randint(0, len(node.content))
            torn = node.content[:at]
            if self.rng.random() < 0.5:
                sector = min(SECTOR_BYTES, len(node.content) - at)
                torn += bytes(sector) + node.content[at + sector :]
            left = [node.synced or b""] if node.lies else [node.synced or b"", node.content, torn]
            node.content = self.rng.choice(left)
            node.synced, node.lies = node.content, False


class SimPath(PurePosixPath):
    """A path on a simulated disk: /NAME/... is on the disk of that name."""

    __slots__ = ()
    disks: dict[str, Disk] = {}  # noqa: RUF012 - filled anew by every simulation

    @property
    def disk(self) -> Disk:
        return self.disks[self.parts[1]]

    @property
    def inside(self) -> tuple[str, ...]:
        return self.parts[2:]

    def _find(self) -> Inode | None:
        return self.disk.find(self.parts[2:])

    def exists(self) -> bool:
        return len(self.parts) < 2 or self._find() is not None

    def is_file(self) -> bool:
        node = self._find()
        return node is not None and node.names is None

    def is_symlink(self) -> bool:
        return False

    def stat(self) -> SimpleNamespace:
        node = self.disk.need(self)
        size = len(node.content) if node.environment is None else node.environment.size_bytes()
        return SimpleNamespace(st_size=size, st_dev=1, st_ino=node.number)

    def read_bytes(self) -> bytes:
        return self.disk.need(self).content

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if self.exists():
            if not exist_ok:
                raise FileExistsError(errno.EEXIST, "File exists", str(self))
            return
        if parents and len(self.inside) > 1:
            self.parent.mkdir(parents=True, exist_ok=True)
        self.disk.make(self, directory=True)

    def touch(self, mode: int = 0o666) -> None:
        if not self.exists():
            self.disk.make(self)

    def unlink(self, missing_ok: bool = False) -> None:
        if not self.exists():
            if missing_ok:
                return
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))
        self.disk.change(self.parent, {self.name: None})

    def rename(self, target: SimPath) -> None:
        node = self.disk.need(self)
        assert target.parent == self.parent
        self.disk.change(self.parent, {self.name: None, target.name: node})

    def glob(self, pattern: str) -> Iterator[SimPath]:
        node = self._find()
        names = () if node is None or node.names is None else sorted(node.names)
        return iter([self / name for name in names if fnmatchcase(name, pattern)])


class Stream:
    """An open file, as `open` and os.fdopen give it; without a buffer."""

    def __init__(self, disk: Disk, fd: int, *, text: bool = False) -> None:
        self._disk = disk
        self._fd = fd
        self._node = disk.by_fd(fd)
        self._text = text
        self._place = 0

    def read(self, size: int = -1) -> bytes:
        end = len(self._node.content) if size < 0 else self._place + size
        data = self._node.content[self._place : end]
        self._place += len(data)
        return data

    def write(self, data: Any) -> None:
        raw: bytes = data.encode() if self._text else bytes(data)
        old, end = self._node.content, self._place + len(raw)
        self._disk.write(self._node, old[: self._place] + raw + old[end:])
        self._place = end

    def truncate(self, size: int) -> None:
        if size < len(self._node.content):
            self._disk.write(self._node, self._node.content[:size])

    def seek(self, place: int) -> None:
        self._place = place

    def tell(self) -> int:
        return self._place

    def flush(self) -> None:
        pass

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        self._disk.close(self._fd)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_file(path: SimPath, mode: str) -> Stream:
    """As `open`, for reading bytes."""
    assert mode == "rb"
    node = path.disk.need(path)
    return Stream(path.disk, path.disk.open(node))


class SimOs:
    """The part of `os` that dengine.storage and dengine.node use; a constant is the real one."""

    def __init__(self, disk: Callable[[], Disk], urandom: Callable[[int], bytes]) -> None:
        self._disk = disk
        self.urandom = urandom

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("O_", "POSIX_")):
            return getattr(os, name)
        raise AttributeError(f"the simulation has no os.{name}")

    def open(self, path: SimPath, flags: int, mode: int = 0o777) -> int:
        node = path._find()
        if node is None:
            node = path.disk.make(path)
        elif flags & os.O_EXCL:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        elif flags & os.O_TRUNC:
            path.disk.write(node, b"")
        return path.disk.open(node)

    def fdopen(self, fd: int, mode: str, encoding: str = "") -> Stream:
        return Stream(self._disk(), fd, text="b" not in mode)

    def fsync(self, fd: int) -> None:
        self._disk().sync(self._disk().by_fd(fd))

    fdatasync = fsync

    def posix_fadvise(self, fd: int, offset: int, length: int, advice: int) -> None:
        """The cache of a simulated disk is asked for nothing."""

    def close(self, fd: int) -> None:
        self._disk().close(fd)

    def rename(self, old: SimPath, new: SimPath) -> None:
        old.rename(new)

    replace = rename

    def truncate(self, path: SimPath, size: int) -> None:
        path.disk.write(path.disk.need(path), path.read_bytes()[:size])

    def statvfs(self, path: SimPath) -> SimpleNamespace:
        return SimpleNamespace(f_bavail=path.disk.free_bytes(), f_frsize=1)


def sync_directory(path: SimPath) -> None:
    path.disk.sync(path.disk.need(path))


def rmtree(path: SimPath, ignore_errors: bool = False) -> None:
    """As shutil.rmtree: name by name, so that a crash leaves a part."""
    node = path._find()
    if node is None and not ignore_errors:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
    if node is None:
        return
    for name in sorted(node.names or ()):
        rmtree(path / name, ignore_errors)
    try:
        if node.names:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        path.unlink()
    except OSError:
        if not ignore_errors:
            raise
