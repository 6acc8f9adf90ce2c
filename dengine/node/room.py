"""How much may be written to the disk beside the log."""

from __future__ import annotations

import os
from pathlib import Path

from dengine.errors import TryAgain
from dengine.node.transfers import format_bytes


class Room:
    """What is free where `path` lies: nothing but the log may take the last `reserve_bytes`."""

    def __init__(self, path: Path, reserve_bytes: int) -> None:
        self._path = path
        self._reserve_bytes = reserve_bytes

    @property
    def path(self) -> Path:
        return self._path

    def has_half(self) -> bool:
        """Is half of the reserve still there? So far goes what makes room: deletions, and all that
        concerns leases, which would otherwise end all together for want of space."""
        return self._free() >= self._reserve_bytes // 2

    def has(self, size: int) -> bool:
        """Would `reserve_bytes` be left beside `size` more bytes?"""
        return self._free() >= size + self._reserve_bytes

    def require(self, size: int) -> None:
        """A snapshot must not take the room that the log needs to go on.

        Raises:
            TryAgain: less than `size` bytes are free above `limits.reserve_bytes`.
        """
        if not self.has(size):
            raise TryAgain(
                f"{format_bytes(self._free())} are free under {self._path}: not enough for "
                f"{format_bytes(size)} and limits.reserve_bytes"
            )

    def _free(self) -> int:
        disk = os.statvfs(self._path)
        return disk.f_bavail * disk.f_frsize
