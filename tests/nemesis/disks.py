"""Small disks: a file system of its own for a machine, in memory or on a loop device.

In memory a sync costs nothing, and nothing lies between the file and its pages. On a loop device
there is what a real machine has: ext4 with its journal, and syncs that go down to a disk.

Each carries the tag of who made it: a tmpfs as its source, a loop device in the name of its file.
So a device that was attached and not yet mounted when its maker was killed is found as well.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

KINDS = ("tmpfs", "loop")


class NoLoopDevice(Exception):
    """This machine has no loop device to give, or cannot mount it; the message says why."""


def mount_tmpfs(path: Path, size_bytes: int, tag: str) -> None:
    """A file system in memory at the directory `path`."""
    _run("mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0700", tag, str(path))


def mount_loop(path: Path, size_bytes: int, image: Path) -> None:
    """ext4 at the directory `path`, in the new file `image` whose name begins with the tag.

    Raises:
        NoLoopDevice
    """
    with image.open("wb") as file:
        file.truncate(size_bytes)
    _run("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
    device = ""
    try:
        device = _run("losetup", "--find", "--show", str(image)).strip()
        _run("mount", "-t", "ext4", device, str(path))
    except subprocess.CalledProcessError as error:
        if device:
            _detach(device)
        raise NoLoopDevice(error.stderr.strip()) from None


def made(made_by: Callable[[str], bool]) -> list[str]:
    """The mount points and devices of every disk whose tag `made_by` accepts."""
    paths, devices = _found(made_by)
    return [*paths, *devices]


def remove(made_by: Callable[[str], bool]) -> list[str]:
    """Unmount and detach every disk whose tag `made_by` accepts.

    A process that still has a file open there keeps both until it ends; no new one gets there.

    Returns:
        The mount points and devices.
    """
    paths, devices = _found(made_by)
    for path in paths:
        subprocess.run(["umount", "--lazy", path], check=False, capture_output=True)
    for device in devices:
        _detach(device)
    return [*paths, *devices]


def _found(made_by: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    devices = [device for device, image in _attached() if made_by(image)]
    paths = [path for source, path in _mounted() if made_by(source) or source in devices]
    return paths, devices


@contextlib.contextmanager
def filled(path: Path, leave_bytes: int) -> Iterator[None]:
    """Within, so many bytes are left for all others on the disk at `path`."""
    filler = path / "filler"
    try:
        with filler.open("wb") as file:
            _take_all_but(file.fileno(), leave_bytes)
        yield
    finally:
        filler.unlink(missing_ok=True)
        _sync(path)  # ext4 gives freed blocks to nobody before its journal says that they are free


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _take_all_but(fd: int, leave_bytes: int) -> None:
    while True:
        found = os.fstatvfs(fd)
        size = found.f_bavail * found.f_frsize - leave_bytes
        if size <= 0:
            return
        try:
            return os.posix_fallocate(fd, 0, size)
        except OSError as error:  # somebody took some since we looked
            if error.errno != errno.ENOSPC:
                raise


def _attached() -> Iterator[tuple[str, str]]:
    """Every loop device, and the name of the file behind it."""
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # detached meanwhile
            yield f"/dev/{entry.parts[3]}", Path(entry.read_text(encoding="utf-8").strip()).name


def _mounted() -> Iterator[tuple[str, str]]:
    """Source and directory of every mount, which the kernel writes with \\040 for a space."""
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        source, path = line.split()[:2]
        yield source, re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), path)


def _detach(device: str) -> None:
    subprocess.run(["losetup", "--detach", device], check=False, capture_output=True)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
