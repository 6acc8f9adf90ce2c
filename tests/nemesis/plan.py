"""What a run will do: its shape, its settings and its schedule all follow from the seed.

What a step hits is said as a role ("leader", "minority") with the dice that settle the rest, since
who leads when the step comes is up to the nodes. The run notes whom it hit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from dataclasses import dataclass, field

from tests.nemesis import disks

SHAPES = {"1": 1, "3": 3, "5": 3, "1->3": 2, "3->5": 2, "replace": 2}  # with their weights
FOUNDERS = {"1": 1, "3": 3, "5": 5, "1->3": 1, "3->5": 3, "replace": 3}
GROWN = {"1->3": (2, 3), "3->5": (4, 5)}
SPARES = 2
OVERLAP = 0.35  # how often two faults come together
REST_S = (0.3, 3.0)
WORKLOADS = ("ttl", "keyed", "watch", "lock")  # beside the one that every run has
HISTORY_REVISIONS = (150, 100_000)


@dataclass(frozen=True, slots=True)
class Kind:
    """A fault that there is.

    Attributes:
        whom: whom it may hit.
        seconds: how long it lasts, at least and at most; drawn evenly on a logarithmic scale.
        nodes: so many it takes at least.
        amount: what it also needs, at least and at most (see faults.py for the meaning).
        alone: it does damage for good. Nothing else happens meanwhile, and it begins when the
            cluster is whole, and only where budget.py allows it: with more than a minority damaged,
            nodes may only stop. So never on one node alone.
        proxied: it is done by the proxies between the nodes.
        traced: it is done by strace, and a process bears only one.
    """

    whom: tuple[str, ...]
    seconds: tuple[float, float]
    nodes: int = 1
    amount: tuple[float, float] = (0.0, 0.0)
    alone: bool = False
    proxied: bool = False
    traced: bool = False


KINDS = {
    "kill": Kind(("any", "leader", "leader", "minority", "majority", "all"), (0.05, 5.0)),
    "restart": Kind(("any", "leader", "minority", "all"), (0.05, 1.0)),
    "pause": Kind(("any", "leader", "leader", "minority", "majority", "all"), (0.1, 10.0)),
    "kill writer": Kind(("any", "leader", "all"), (2.0, 8.0)),
    "stop writer": Kind(("any", "leader", "all"), (2.0, 8.0)),
    "one-way cut": Kind(("from leader", "to leader", "pair"), (1.0, 10.0), 2),
    "two-way cut": Kind(("leader", "pair"), (1.0, 10.0), 2),
    "bridge": Kind(("any", "leader"), (2.0, 10.0), 3),
    "isolate": Kind(("leader", "any", "minority", "leader's minority"), (2.0, 10.0), 2),
    "isolate majority": Kind(("with leader", "without leader"), (2.0, 10.0), 3),
    "slow links": Kind(("all", "leader", "pair"), (2.0, 8.0), 2, (5.0, 250.0), proxied=True),
    "narrow links": Kind(("all", "leader", "pair"), (2.0, 8.0), 2, (8e3, 256e3), proxied=True),
    "stuck links": Kind(("from leader", "to leader", "pair"), (1.0, 8.0), 2, proxied=True),
    "EIO": Kind(("any", "leader"), (2.0, 5.0), traced=True),
    "ENOSPC": Kind(("any", "leader"), (1.0, 4.0), traced=True),
    "slow sync": Kind(("any", "leader"), (6.0, 9.0), 1, (5.0, 5.0), traced=True),
    "small disk": Kind(("small",), (3.0, 8.0), 1, (16e3, 400e3)),
    "few descriptors": Kind(("any", "leader"), (2.0, 6.0), 1, (0.0, 6.0)),
    "transfer": Kind(("any",), (0.1, 1.0), 2),
    "flip in log": Kind(("minority",), (1.0, 1.0), 3, (1.0, 3.0), alone=True),
    "flip in state": Kind(("minority",), (1.0, 1.0), 3, (1.0, 3.0), alone=True),
    "flip in snapshot": Kind(("minority",), (1.0, 1.0), 3, (1.0, 3.0), alone=True),
    "cut short in log": Kind(("minority",), (1.0, 1.0), 3, alone=True),
    "cut short in state": Kind(("minority",), (1.0, 1.0), 3, alone=True),
    "cut short in snapshot": Kind(("minority",), (1.0, 1.0), 3, alone=True),
    "replace": Kind(("any", "leader"), (1.0, 4.0), 3),
    "wipe and join": Kind(("any", "leader"), (1.0, 4.0), 3, alone=True),
}


@dataclass(frozen=True, slots=True)
class Action:
    """One fault in a schedule."""

    name: str
    whom: str
    seconds: float
    amount: float
    dice: int

    def __str__(self) -> str:
        amount = f", {self.amount:.0f}" if self.amount else ""
        return f"{self.name} ({self.whom}{amount}) for {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True)
class Step:
    """Faults that come together, and the time to recover before the next ones."""

    actions: tuple[Action, ...]
    rest_s: float

    def __str__(self) -> str:
        return f"{' + '.join(map(str, self.actions))}, then {self.rest_s:.1f} s"


@dataclass
class Plan:
    """Everything that a run takes from its seed.

    Args:
        seed: of the run.
        seconds: how long its faults last, about.
        only: kinds of faults to take; none: all of them.
    """

    seed: int
    seconds: float
    only: Collection[str] = ()
    shape: str = ""
    proxied: bool = False
    secured: bool = False
    small: int = 0  # id of the node with a disk of its own; 0: none
    disk: str = ""  # what kind of disk that is, of disks.KINDS
    settings: dict[str, dict[str, int | str]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    grows_at: int = 0  # before this step the nodes join that make the shape
    workloads: tuple[str, ...] = ()  # of WORKLOADS

    def __post_init__(self) -> None:
        rng = random.Random(f"nemesis {self.seed}")
        while True:
            self.shape = rng.choices(list(SHAPES), list(SHAPES.values()))[0]
            self.proxied = rng.random() < 0.5
            self.secured = rng.random() < 0.25
            self.small = rng.choice(self.ids) if rng.random() < 0.5 else 0
            if self._possible():  # of `only` there may be nothing
                break
        self.settings = _settings(rng)
        self.steps = self._schedule(random.Random(f"nemesis {self.seed} schedule"))
        self.grows_at = rng.randrange(min(2, len(self.steps)) + 1)
        self.disk = rng.choice(disks.KINDS) if self.small else ""
        rng = random.Random(f"nemesis {self.seed} workloads")
        drawn = rng.sample(WORKLOADS, rng.randint(2, len(WORKLOADS)))
        self.workloads = tuple(name for name in WORKLOADS if name in drawn)
        self.settings["kv"] = {"history_revisions": rng.choice(HISTORY_REVISIONS)}

    @property
    def founders(self) -> range:
        return range(1, FOUNDERS[self.shape] + 1)

    @property
    def joiners(self) -> tuple[int, ...]:
        return GROWN.get(self.shape, ())

    @property
    def ids(self) -> list[int]:
        """Of the nodes that make the shape."""
        return [*self.founders, *self.joiners]

    @property
    def spares(self) -> list[int]:
        """Ids for nodes that take the place of removed ones; an id is never used twice."""
        return [10 + number for number in range(SPARES if len(self.ids) > 2 else 0)]

    def _possible(self) -> list[str]:
        return [
            name
            for name, kind in KINDS.items()
            if kind.nodes <= len(self.ids)
            and (self.proxied or not kind.proxied)
            and (self.small or "small" not in kind.whom)
            and (not self.only or name in self.only)
        ]

    def _schedule(self, rng: random.Random) -> list[Step]:
        """Deals the kinds like cards, so that even a short run meets many of them."""
        steps, left_s, deck = [], self.seconds, list[str]()
        if self.shape == "replace" and not self.only:
            deck = [rng.choice(("wipe and join", "replace"))]
        while left_s > 0 and self._possible():
            actions = [self._deal(deck, rng)]
            if not KINDS[actions[0].name].alone and rng.random() < OVERLAP:
                other = self._deal(deck, rng)
                if _together(KINDS[actions[0].name], KINDS[other.name]):
                    actions.append(other)
                else:
                    deck.append(other.name)
            step = Step(tuple(actions), rng.uniform(*REST_S))
            steps.append(step)
            left_s -= max(action.seconds for action in actions) + step.rest_s
        return steps

    def _deal(self, deck: list[str], rng: random.Random) -> Action:
        if not deck:
            deck += self._possible()
            rng.shuffle(deck)
        name = deck.pop()
        kind = KINDS[name]
        return Action(
            name,
            rng.choice(kind.whom),
            _between(kind.seconds, rng),
            _between(kind.amount, rng),
            rng.randrange(2**31),
        )

    def describe(self) -> str:
        """The whole of it, for people; equal plans have equal descriptions."""
        links = "proxied" if self.proxied else "direct"
        extras = [links, *["secured"] * self.secured]
        if self.small:
            extras.append(f"node {self.small} has a small disk ({self.disk})")
        settings = "; ".join(
            f"{section}: {', '.join(f'{name} {value}' for name, value in values.items())}"
            for section, values in self.settings.items()
        )
        lines = [f"seed {self.seed}: {self.shape}, {', '.join(extras)}", f"  {settings}"]
        lines.append(f"  beside the registers and lists: {', '.join(self.workloads)}")
        for number, step in enumerate(self.steps):
            if number == self.grows_at and self.joiners:
                lines.append(f"  nodes {', '.join(map(str, self.joiners))} join")
            lines.append(f"  {number + 1:2} {step}")
        return "\n".join(lines)


def _together(one: Kind, other: Kind) -> bool:
    return one is not other and not other.alone and not (one.traced and other.traced)


def _between(limits: tuple[float, float], rng: random.Random) -> float:
    low, high = limits
    if low <= 0:
        return rng.uniform(low, high)
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _settings(rng: random.Random) -> dict[str, dict[str, int | str]]:
    """Of the nodes' configurations, by section. An election takes longer than a busy machine makes
    a node wait for its turn, or the runs would be about elections alone."""
    timeout_ms = rng.choice((600, 1000))
    return {
        "raft.election": {
            "timeout_ms_min": timeout_ms,
            "timeout_ms_max": 2 * timeout_ms,
            "heartbeat_ms": timeout_ms // 10,
        },
        "raft.membership": {
            "promotion": rng.choice(("immediate", "odd")),
            "stable_ms": rng.choice((100, 1000)),
        },
        "raft.snapshot": {
            "entries": rng.choice((50, 50, 400)),
            "retained_log_entries": rng.choice((10, 100)),
            "keep": 2,
            "chunk_bytes": rng.choice((4096, 65_536)),
        },
        "read": {"lease_ms": rng.choice((timeout_ms // 4, timeout_ms // 2))},
        "limits": {"reserve_bytes": rng.choice((1, 1_000_000))},
    }
