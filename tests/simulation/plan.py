"""What one seed draws before anything happens: shape, timing, limits, and which faults are on."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, field

from dengine.config import Election, Membership, Snapshot

SHAPES = ("1", "3", "3", "5", "1->3", "1->3", "3->5", "replace")

# Each is on in about half of the seeds, or more rarely.
FAULTS: dict[str, float] = {
    "loss": 0.5,
    "repeat": 0.5,
    "reorder": 0.5,
    "tail": 0.4,
    "one-way cut": 0.4,
    "isolate": 0.5,
    "mesh": 0.3,
    "kill": 0.6,
    "power": 0.5,
    "blackout": 0.25,
    "fuse": 0.6,
    "stop": 0.3,
    "pause": 0.4,
    "suspend": 0.3,
    "skew": 0.5,
    "stall": 0.4,
    "eio": 0.4,
    "full": 0.25,
    "rot": 0.4,
    "wipe": 0.3,
    "transfer": 0.5,
    "churn": 0.5,
    "lag": 0.4,
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
    limits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = random.Random(f"{self.seed} plan")
        self.shape = rng.choice(SHAPES)
        first, _, last = self.shape.partition("->")
        self.founders = 3 if self.shape == "replace" else int(first)
        self.joiners = 1 if self.shape == "replace" else int(last or first) - self.founders
        drawn = [(name, rng.random() < odds) for name, odds in FAULTS.items()]
        calm = rng.random() < 0.1
        self.faults = tuple(
            name for name, on in drawn if on and not calm and name not in self.without
        )
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
        self.fsync_us = rng.choice((100, 300, 2000))
        self.clients = rng.choice((2, 3, 4, 6))
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

    @property
    def skewed_clocks(self) -> bool:
        return "skew" in self.faults

    def describe(self) -> str:
        return (
            f"shape {self.shape}, timeout {self.election.timeout_ms_min} ms, "
            f"snapshot every {self.snapshot.entries}, limits {self.limits}, "
            f"faults: {', '.join(self.faults) or 'none'}"
        )
