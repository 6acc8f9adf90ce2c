"""What has to be done about the snapshots and the state of a node."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from dengine.raft.types import MemberId, SnapshotRef


@dataclass(frozen=True, slots=True)
class Distrust:
    reason: str
    files_too: bool
    state: Path  # the one that is wrong


@dataclass(slots=True)
class Wanted:
    """What the task has to do next, most urgent first."""

    check: bool = True  # the state, once: what an earlier process left may have rotted since
    distrust: Distrust | None = None  # until the state is gone
    fetch: tuple[MemberId, SnapshotRef] | None = None
    unverified: list[Path] = field(default_factory=list)  # newest last
    takers: list[asyncio.Future[SnapshotRef]] = field(default_factory=list)
