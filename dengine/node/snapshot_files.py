"""The verified snapshots of this node: which there are, which may go, and how far the log may.

Only files that were read in full and found sound are in here; `snapshots/` may hold others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dengine.config import Snapshot
from dengine.errors import NotFound
from dengine.node.transfers import Transfers
from dengine.raft.raft import Raft
from dengine.raft.types import SnapshotRef
from dengine.storage.snapshots import put_aside

log = logging.getLogger("dengine.snapshots")


class _Kept(NamedTuple):
    path: Path
    taken_at_s: int  # Unix time


class SnapshotFiles:
    """Oldest first. Raft is told of every change.

    Attributes:
        transfers: what is being sent from here.
        applied_bytes: of log data, since the start of the process.
    """

    def __init__(self, config: Snapshot, raft: Raft) -> None:
        self._config = config
        self._raft = raft
        self._files: dict[SnapshotRef, _Kept] = {}
        self._taken_after: dict[SnapshotRef, int] = {}  # `applied_bytes` then; also of some gone
        self._distrusted: set[SnapshotRef] = set()
        self.applied_bytes = 0
        self.transfers = Transfers()

    def __iter__(self) -> Iterator[tuple[SnapshotRef, Path]]:
        return iter([(ref, kept.path) for ref, kept in self._files.items()])

    @property
    def refs(self) -> list[SnapshotRef]:
        return list(self._files)

    @property
    def newest(self) -> SnapshotRef | None:
        return next(reversed(self._files), None)

    def get(self, ref: SnapshotRef) -> Path | None:
        kept = self._files.get(ref)
        return None if kept is None else kept.path

    def find(self, name: str) -> tuple[Path, SnapshotRef]:
        """A file by its SHA-256, or the newest as "latest". Raises NotFound."""
        for ref in reversed(self._files):
            if name in ("latest", ref.sha256):
                return self._files[ref].path, ref
        raise NotFound("this node has no such snapshot; POST /v1/snapshots takes one")

    def bytes_since(self, ref: SnapshotRef | None) -> int:
        """Bytes of log applied after `ref`; what came before our start does not count."""
        return self.applied_bytes - (0 if ref is None else self._taken_after.get(ref, 0))

    async def add(
        self, ref: SnapshotRef, file: Path, taken_at_s: int, applied_bytes: int = 0
    ) -> None:
        """One more; those that are too many are deleted, but for what is being sent."""
        others = {r: k for r, k in self._files.items() if k.path != file}  # it was written anew
        kept = {**others, ref: _Kept(file, taken_at_s)}
        self._taken_after[ref] = applied_bytes
        self._distrusted.discard(ref)
        self._files = dict(sorted(kept.items(), key=lambda f: f[0].index))
        in_use = set(self._raft.offered_snapshots().values()) | self.transfers.refs
        spare = [ref for ref in self.refs[: -self._config.keep] if ref not in in_use]
        gone = [self._forget(ref) for ref in spare]
        needed = {*self.refs, *(ref for ref, _ in self._raft.helped_by_snapshots().values())}
        self._taken_after = {r: n for r, n in self._taken_after.items() if r in needed}
        self._raft.snapshots_changed(self.refs)
        for path in gone:  # a large file takes its time
            await asyncio.get_running_loop().run_in_executor(None, _unlink, path)

    def drop(self, file: Path) -> None:
        """Rely on `file` no longer, if anybody did."""
        for ref in [ref for ref, kept in self._files.items() if kept.path == file]:
            self._forget(ref)
        self._raft.snapshots_changed(self.refs)

    def distrust(self, spare: Path | None = None) -> None:
        """Rely on none but `spare` any longer; whoever is being sent another gets no more of it."""
        self._distrusted |= {ref for ref, kept in self._files.items() if kept.path != spare}
        self._files = {ref: kept for ref, kept in self._files.items() if kept.path == spare}
        self._raft.snapshots_changed(self.refs)

    def is_distrusted(self, ref: SnapshotRef) -> bool:
        """May it be wrong? One that only became too many is sent to its end."""
        return ref in self._distrusted

    def put_aside(self, ref: SnapshotRef) -> None:
        """It turned out to be damaged; where we rely on it no longer, nothing is done."""
        if ref in self._files:
            self._distrusted.add(ref)
            put_aside(self._forget(ref))
            self._raft.snapshots_changed(self.refs)

    def view(self) -> list[dict[str, int | str]]:
        return [
            {
                "index": ref.index,
                "term": ref.term,
                "sha256": ref.sha256,
                "size_bytes": ref.size_bytes,
                "taken_at_s": kept.taken_at_s,
                "file": kept.path.name,
            }
            for ref, kept in self._files.items()
        ]

    def purge_limit(self) -> int:
        """Up to where the log may go: the second-newest snapshot, for should the newest prove
        unreadable, the one before still continues in the log. What a transfer needs stays, within
        `hold_bytes`, and then what its receiver has not got of the log after it: that would need
        the next file at once. So do `retained_log_entries` for followers that are a little behind.
        """
        refs, raft = self.refs, self._raft
        if len(refs) < 2 or raft.state_lost:
            return 0
        limit = min(refs[-2].index, raft.log.applied_index - self._config.retained_log_entries)
        for held in raft.offered_snapshots().values():
            if self.bytes_since(held) <= self._config.hold_bytes:
                limit = min(limit, held.index)
        for held, match_index in raft.helped_by_snapshots().values():
            if self.bytes_since(held) <= self._config.hold_bytes:
                limit = min(limit, match_index)
        return limit

    def _forget(self, ref: SnapshotRef) -> Path:
        return self._files.pop(ref).path


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # the next start finds it and tries again
        log.warning("cannot remove %s, which is not needed any more: %s", path, error.strerror)
