"""When a learner may vote: it has what the leader has, keeps up with it, and that lasts."""

from __future__ import annotations

from dengine.node.promotion import Promotion, PromotionRules
from tests.raft.harness import A, B, Server, leader, membership

RULES = PromotionRules(catchup_entries=10, stable_ms=500, heartbeat_ms=100, timeout_ms_min=1000)


class Watched:
    """A leader alone, and what it thinks of its one learner."""

    def __init__(self) -> None:
        self.node: Server = leader(A, membership(A, learners=[B]))
        self.promotion = Promotion(RULES)
        self.look()

    def write(self, count: int) -> None:
        for _ in range(count):
            self.node.raft.propose(b"x")
        self.node.settle()

    def look(self, elapsed_ms: int = 0) -> str:
        """What keeps it from voting, so much later."""
        self.node.tick(elapsed_ms)
        self.promotion.observe(self.node.raft, self.node.now_ms)
        return self.promotion.reason(self.node.raft.membership, B, self.node.now_ms)

    def answer(self, lag: int = 0, elapsed_ms: int = 50) -> str:
        """It acknowledges all but the last `lag` entries, so much later."""
        self.node.tick(elapsed_ms)
        self.node.acknowledge(B, index=self.node.raft.log.last_index - lag)
        return self.look()

    @property
    def chosen(self) -> bool:
        return bool(self.promotion.choose(self.node.raft.membership, self.node.now_ms))


def test_a_learner_far_behind_is_not_ready_however_small_its_part_is() -> None:
    """A hundred of ten thousand are one per cent, and still more than a quorum should wait for."""
    watched = Watched()
    watched.write(10_000)
    assert watched.answer(lag=100) == "it is 100 entries behind (at most 10 allowed)"
    watched.look(RULES.stable_ms + 1)
    assert not watched.chosen


def test_a_learner_that_keeps_up_votes_once_that_has_lasted() -> None:
    watched = Watched()
    watched.write(20)
    assert watched.look() == "it is 20 entries behind (at most 10 allowed)"
    assert watched.answer().startswith("caught up; waiting")
    for _ in range(RULES.stable_ms // 50 - 1):
        watched.write(1)
        assert watched.answer().startswith("caught up; waiting")
        assert not watched.chosen
    assert watched.answer() == "ready; being promoted"
    assert watched.chosen


def test_a_moment_behind_begins_the_wait_anew() -> None:
    watched = Watched()
    watched.answer()
    watched.write(50)
    assert watched.answer(lag=11, elapsed_ms=RULES.stable_ms).startswith("it is 11 entries behind")
    assert watched.answer().startswith("caught up; waiting")
    assert not watched.chosen


def test_a_round_that_takes_an_election_timeout_is_too_slow() -> None:
    """4.2.1: whoever needs that long for what was new would cost the leader its leadership."""
    watched = Watched()
    watched.write(5)
    watched.answer(elapsed_ms=0)  # the round ends, and the next one has these entries to get
    watched.write(5)
    watched.answer(lag=5, elapsed_ms=RULES.timeout_ms_min // 2)
    slow = watched.answer(lag=0, elapsed_ms=RULES.timeout_ms_min)
    assert slow.endswith("too slow to keep up")
    assert not watched.chosen


def test_a_learner_that_is_silent_or_waits_for_a_snapshot_is_not_ready() -> None:
    watched = Watched()
    watched.answer()
    silent = watched.look(2 * RULES.heartbeat_ms + 1)
    assert silent.startswith("it has not answered for")
    watched = Watched()
    watched.node.raft.progress[B].needs_snapshot = 1
    assert watched.answer() == "it waits for a snapshot"
    assert not watched.chosen
