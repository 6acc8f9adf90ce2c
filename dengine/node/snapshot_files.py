"""The verified snapshots of this node: which there are, which may go, and how far the log may.

Only files that were read in full and found sound are in here; `snapshots/` may hold others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

from dengine.config import Snapshot
from dengine.errors import NotFound
from dengine.node.transfers import Transfers
from dengine.raft.raft import Raft
from dengine.raft.types import SnapshotRef
from dengine.storage.snapshots import put_aside

log = logging.getLogger("dengine.snapshots")


class SnapshotFiles:
    """Oldest first. Raft is told of every change.

    Attributes:
        transfers: what is being sent from here.
        applied_bytes: of log data, since the start of the process.
    """

    def __init__(self, config: Snapshot, raft: Raft) -> None:
        self._config = config
        self._raft = raft
        self._files: dict[SnapshotRef, Path] = {}
        self._bytes_at: dict[SnapshotRef, int] = {}  # `applied_bytes` when each was taken
        self.applied_bytes = 0
        self.transfers = Transfers()

    def __iter__(self) -> Iterator[tuple[SnapshotRef, Path]]:
        return iter(list(self._files.items()))

    @property
    def refs(self) -> list[SnapshotRef]:
        return list(self._files)

    @property
    def newest(self) -> SnapshotRef | None:
        return next(reversed(self._files), None)

    def get(self, ref: SnapshotRef) -> Path | None:
        return self._files.get(ref)

    def find(self, name: str) -> tuple[Path, SnapshotRef]:
        """A file by its SHA-256, or the newest as "latest". Raises NotFound."""
        for ref in reversed(self._files):
            if name in ("latest", ref.sha256):
                return self._files[ref], ref
        raise NotFound("this node has no such snapshot; POST /v1/snapshots takes one")

    def bytes_since(self, ref: SnapshotRef | None) -> int:
        """Bytes of log applied after `ref`; what came before our start does not count."""
        return self.applied_bytes - (self._bytes_at.get(ref, 0) if ref is not None else 0)

    async def add(self, ref: SnapshotRef, file: Path, taken_at_bytes: int = 0) -> None:
        """One more; those that are too many are deleted, but for what is being sent."""
        self._bytes_at[ref] = taken_at_bytes
        self._files = dict(sorted({**self._files, ref: file}.items(), key=lambda f: f[0].index))
        in_use = set(self._raft.offered_snapshots().values()) | self.transfers.refs
        spare = [ref for ref in self.refs[: -self._config.keep] if ref not in in_use]
        gone = [self._forget(ref) for ref in spare]
        self._raft.snapshots_changed(self.refs)
        for path in gone:  # a large file takes its time
            await asyncio.get_running_loop().run_in_executor(None, _unlink, path)

    def drop(self, file: Path) -> None:
        """Rely on `file` no longer, if anybody did."""
        for ref in [ref for ref, path in self._files.items() if path == file]:
            self._forget(ref)
        self._raft.snapshots_changed(self.refs)

    def put_aside(self, ref: SnapshotRef) -> None:
        """It turned out to be damaged, or of a state that was wrong."""
        put_aside(self._forget(ref))
        self._raft.snapshots_changed(self.refs)

    def purge_limit(self) -> int:
        """Up to where the log may go: the second-newest snapshot, for should the newest prove
        unreadable, the one before still continues in the log. What a transfer needs stays, within
        `hold_bytes`, and so do `retained_log_entries` for followers that are a little behind.
        """
        refs, raft = self.refs, self._raft
        if len(refs) < 2 or raft.state_lost:
            return 0
        limit = min(refs[-2].index, raft.log.applied_index - self._config.retained_log_entries)
        for held in raft.offered_snapshots().values():
            if self.bytes_since(held) <= self._config.hold_bytes:
                limit = min(limit, held.index)
        return limit

    def _forget(self, ref: SnapshotRef) -> Path:
        self._bytes_at.pop(ref, None)
        return self._files.pop(ref)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # the next start finds it and tries again
        log.warning("cannot remove %s, which is not needed any more: %s", path, error.strerror)
