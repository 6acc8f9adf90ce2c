"""What one seed draws before anything happens: shape, timing, limits, and which faults are on."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, field

from dengine.config import Election, Membership, Snapshot

MANY = 1000  # as many as the product allows, and more than a run has
SHAPES = ("1", "3", "3", "3", "3", "5", "1->3", "1->3", "3->5", "replace")

# Each is on in about half of the seeds, or more rarely.
FAULTS: dict[str, float] = {
    "loss": 0.5,
    "repeat": 0.5,
    "reorder": 0.5,
    "tail": 0.4,
    "one-way cut": 0.6,
    "isolate": 0.6,
    "mesh": 0.5,
    "usurp": 1.0,
    "stale leader": 1.0,
    "slow": 0.4,
    "burst": 0.6,
    "kill": 0.7,
    "power": 0.7,
    "blackout": 0.5,
    "fuse": 0.8,
    "stop": 0.5,
    "pause": 0.6,
    "suspend": 0.5,
    "skew": 0.6,
    "jump": 0.5,
    "stall": 0.6,
    "eio": 0.6,
    "full": 0.4,
    "rot": 0.6,
    "wipe": 0.5,
    "transfer": 0.7,
    "churn": 0.7,
    "lag": 0.6,
    "displaced": 1.0,
    "rollback": 0.6,
}


@dataclass(slots=True)
class Plan:
    """One seed's choices.

    Args:
        without: faults that are left out; every other choice stays as it is.
    """

    seed: int
    without: Collection[str] = ()
    shape: str = ""
    faults: tuple[str, ...] = ()
    founders: int = 1
    joiners: int = 0
    election: Election = field(default_factory=Election)
    membership: Membership = field(default_factory=Membership)
    snapshot: Snapshot = field(default_factory=Snapshot)
    lease_ms: int = 100
    fsync_us: int = 300
    clients: int = 4
    keys: int = 2
    seconds: float = 4.0
    calm: float = 1.0  # by how much longer the pauses between faults are
    limits: dict[str, int] = field(default_factory=dict)
    sessions: int = 2
    watchers: int = 2
    history_revisions: int = 100_000
    window_s: int = 600  # for which results are remembered
    calm_start: bool = True  # nothing happens until there was time to found a cluster
    far: bool = False  # an answer takes longer than the time between two heartbeats

    def __post_init__(self) -> None:
        rng = random.Random(f"{self.seed} plan")
        self.shape = rng.choice(SHAPES)
        first, _, last = self.shape.partition("->")
        self.founders = 3 if self.shape == "replace" else int(first)
        self.joiners = 1 if self.shape == "replace" else int(last or first) - self.founders
        density = rng.choice((0.0, 0.3, 0.3, 0.5, 0.5, 0.5, 0.7, 0.7, 1.0))
        drawn = [(name, rng.random() < density * odds) for name, odds in FAULTS.items()]
        self.faults = tuple(name for name, on in drawn if on and name not in self.without)
        self.calm = rng.choice((1.0, 1.0, 1.5, 2.0))
        timeout_ms = rng.choice((150, 150, 300))
        heartbeat_ms = timeout_ms // 3
        self.election = Election(timeout_ms, timeout_ms * 2, heartbeat_ms)
        self.lease_ms = rng.choice((timeout_ms // 2, timeout_ms // 3))
        self.membership = Membership(
            promotion=rng.choice(("odd", "immediate")),
            catchup_entries=rng.choice((0, 5, 50)),
            stable_ms=rng.choice((0, 50, 150)),
        )
        self.snapshot = Snapshot(
            entries=rng.choice((20, 30, 50, 200)),
            retained_log_entries=rng.choice((0, 5, 20)),
            keep=rng.choice((2, 2, 3)),
            hold_bytes=rng.choice((0, 200, 10_000)),
        )
        self.fsync_us = rng.choice((100, 300, 2000, 8000))
        self.clients = rng.choice((3, 4, 6))
        self.keys = rng.choice((1, 2, 3))
        self.seconds = rng.uniform(2.5, 5.0)
        self.limits = {
            "digest_every": rng.choice((4, 8, 16)),
            "batch_commands": rng.choice((1, 2, 1024)),
            "inflight": rng.choice((1, 3, 16)),
            "append_bytes": rng.choice((1, 100, 1 << 20)),
            "tail_entries": rng.choice((4, 16, 4096)),
            "purge_step": rng.choice((1, 7, 256)),
        }
        self.sessions = rng.choice((1, 2, 3))
        self.watchers = rng.choice((1, 2, 3))
        self.history_revisions = rng.choice((5, 40, 100_000))
        self.window_s = rng.choice((1, 600, 600))
        self.limits |= {
            "tick_ms": rng.choice((100, 300, 1000)),
            "expire_keys": rng.choice((2, 3, MANY, MANY)),
            "work_keys": rng.choice((2, 5, 10_000, 10_000)),
            "results": rng.choice((1, 3, MANY)),
            "opaque": rng.choice((3, 100_000)),
            "watch_queue": rng.choice((1, 3, 1000)),
            "watch_step": rng.choice((1, 3, 100)),
        }
        self.calm_start = rng.random() < 0.7
        self.far = rng.random() < 0.05
        if self.far:
            self.election = Election(timeout_ms, timeout_ms * 2, timeout_ms // 15)

    @property
    def skewed_clocks(self) -> bool:
        return "skew" in self.faults

    def describe(self) -> str:
        return (
            f"shape {self.shape}, timeout {self.election.timeout_ms_min} ms, "
            f"snapshot every {self.snapshot.entries}, limits {self.limits}, "
            f"faults: {', '.join(self.faults) or 'none'}"
        )
