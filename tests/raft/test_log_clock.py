"""The log's time: it never shrinks a TTL, and stretches none by more than the leaderless time."""

from __future__ import annotations

import random

import pytest

from dengine.raft.log_clock import LogClock
from dengine.raft.messages import AppendRequest, HeartbeatRequest
from dengine.raft.types import Entry, EntryKind, LogId
from tests.raft.cluster import Cluster
from tests.raft.harness import A, B, C, Server, leader, membership, server

ABC = membership(A, B, C)
FASTEST = 1.1  # of all clocks


def test_it_stands_still_until_somebody_knows_the_time() -> None:
    clock = LogClock()
    clock.hear(3, 0, 3, 5_000)
    clock.learn(LogId(7, 3), 0, 5_000)
    assert clock.at(9_000) == 0
    clock.lead(4, 3, 9_000)
    clock.start(0, 9_000)
    assert clock.at(9_000) == 1
    clock.start(0, 9_500)
    assert clock.at(9_500) == 500


def test_a_leader_is_never_behind_what_is_committed() -> None:
    """Its register may be: it heard from a leader that knew less. Time would stand still until it
    had caught up with the entries before."""
    clock = LogClock()
    clock.hear(2, 5_000, 2, 0)
    clock.lead(3, 2, 50)
    clock.start(60_000, 100)
    assert clock.at(150) == 60_049
    clock.start(60_000, 200)
    assert clock.at(200) == 60_099


def test_within_a_term_the_newest_word_counts() -> None:
    clock = LogClock()
    clock.hear(1, 300, 1, 1_000)
    assert clock.at(1_251) == 550
    clock.hear(1, 200, 1, 1_251)  # overtaken by the one before
    assert clock.at(1_251) == 550
    clock.hear(1, 1_000, 1, 1_251)
    assert clock.at(1_251) == 1_000
    assert clock.at(1_253) == 1_001


def test_a_faster_clock_does_not_get_ahead_of_the_leader() -> None:
    """It would begin there when it leads, and end early what was written just before."""
    clock = LogClock()
    for second in range(1, 86_400):  # a clock that gains 1 ms in each second
        clock.hear(1, second * 1000, 1, second * 1001)
    assert clock.at(second * 1001) == second * 1000


def test_a_later_term_has_the_word_and_an_earlier_one_has_not() -> None:
    """What was written under a leader that knew less counts from what that leader knew: a member
    that went on from an older leader's time would end it early."""
    clock = LogClock()
    clock.hear(1, 3_600_000, 1, 0)
    clock.hear(2, 5_000, 2, 0)
    assert clock.at(10) == 5_009
    clock.hear(1, 9_000_000, 1, 10)
    assert clock.at(10) == 5_009


def test_a_leader_that_lacks_what_we_have_has_no_word() -> None:
    """What stands here alone may be committed yet, and was written when less was known."""
    clock = LogClock()
    clock.hear(2, 5_000, 2, 0)
    clock.hear(3, 60_000, 2, 10)
    clock.lead(4, 2, 20)
    assert clock.at(20) == 5_019


def test_neither_has_one_whose_log_ours_does_not_end_in_any_more() -> None:
    """Ours is the beginning of another leader's now, in which may stand what that one did not
    have. The last entry with a time still counts."""
    clock = LogClock()
    clock.learn(LogId(7, 2), 4_000, 0)
    clock.hear(2, 60_000, 2, 0)
    clock.lead(4, 3, 20)  # of its leader came an entry, and no word
    assert clock.at(20) == 4_019


def test_who_leads_again_goes_on_from_its_own_time() -> None:
    clock = LogClock()
    clock.lead(3, 2, 0)
    clock.start(5_000, 0)
    clock.lead(5, 3, 1_000)  # the leader between them has sent no entry
    assert clock.at(1_000) == 5_999


def test_the_last_entry_counts_until_it_is_truncated() -> None:
    clock = LogClock()
    clock.learn(LogId(7, 1), 4_000, 0)
    clock.truncated(8)
    assert clock.at(1) == 4_000
    clock.learn(LogId(9, 2), 3_000, 1)  # of a leader that knew less
    assert clock.at(2) == 3_000
    clock.truncated(9)
    clock.lead(4, 3, 2)
    clock.start(2_500, 2)
    assert clock.at(3) == 2_500


def test_an_older_word_does_not_count_beside_an_entry() -> None:
    """By a faster clock it would show more, and end early what the entry has put for a time."""
    clock = LogClock()
    clock.hear(2, 1_000, 2, 0)
    clock.learn(LogId(7, 2), 1_900, 1_000)
    assert clock.at(1_001) == 1_900
    clock.hear(2, 2_000, 2, 1_110)
    clock.learn(LogId(8, 2), 1_950, 1_111)  # from before that word
    assert clock.at(1_111) == 2_000


class _Member:
    """A log of terms and times (None: of an entry without one), each with when it was written, and
    a clock that runs a little fast or slow and begins anywhere, also within a millisecond, of which
    it shows whole ones."""

    def __init__(self, rng: random.Random) -> None:
        self.clock = LogClock()
        self.log: list[tuple[int, int | None, float]] = [(0, None, 0.0)]
        self.offset_ms = rng.uniform(0, 10**6)
        self.rate = rng.uniform(0.9, FASTEST)

    def reading(self, true_ms: float) -> int:
        return int(true_ms * self.rate + self.offset_ms)

    def take(self, log: list[tuple[int, int | None, float]], true_ms: float) -> None:
        """What a leader sends is from its `log`; what contradicts it goes."""
        same = 0
        while same < min(len(log), len(self.log)) and log[same] == self.log[same]:
            same += 1
        if same == len(log):
            return  # a late message truncates nothing
        if same < len(self.log):
            self.clock.truncated(same)
        self.log = list(log)
        self._learn(same, true_ms)

    def restart(self, true_ms: float) -> None:
        """It forgets what it has heard, but not the log."""
        self.clock = LogClock()
        self._learn(0, true_ms)

    def _learn(self, first: int, true_ms: float) -> None:
        for index in range(len(self.log) - 1, first - 1, -1):
            term, clock_ms, _ = self.log[index]
            if clock_ms is not None:
                self.clock.learn(LogId(index, term), clock_ms, self.reading(true_ms))
                return

    def last(self) -> tuple[int, int]:
        return self.log[-1][0], len(self.log)


@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_ended_early(seed: int) -> None:
    """Leaders come and go, write and reach a majority or do not, members sleep, hear some messages
    and not others. Of no entry in its log a leader shows more than its time, what has passed since
    by the fastest clock, and the one millisecond that the entry may have been rounded down by."""
    rng = random.Random(seed)
    members = [_Member(rng) for _ in range(5)]
    true_ms = 0.0
    for term in range(1, 60):
        true_ms += rng.choice([0.3, 1, 900, 50_000])
        # As votes would have it: no log of some majority is better than the leader's (5.4.1).
        majority = rng.sample(members, 3)
        leader = max(majority, key=lambda m: (m.last(), rng.random()))
        clock = leader.clock
        clock.lead(term, leader.log[-1][0], leader.reading(true_ms))
        leader.log.append((term, None, true_ms))
        said: list[int] = []
        for _ in range(rng.randint(0, 5)):
            true_ms += rng.choice([0, 0.1, 0.7, 3, 700, 20_000])
            now_ms = leader.reading(true_ms)
            clock.start(0, now_ms)
            shown = clock.at(now_ms)
            said.append(shown)
            for _, clock_ms, written_ms in leader.log:
                if clock_ms is not None:
                    passed_ms = (true_ms - written_ms) * FASTEST
                    assert shown < clock_ms + passed_ms + 1.001, f"seed {seed}"
            if rng.random() < 0.6:
                leader.log.append((term, shown, true_ms))
            for other in members:
                if other is not leader and rng.random() < 0.3:
                    other.take(leader.log[: rng.randint(1, len(leader.log))], true_ms)
                if other is not leader and rng.random() < 0.4:
                    word_ms = rng.choice(said)  # they are long on their way
                    other.clock.hear(term, word_ms, other.log[-1][0], other.reading(true_ms))
        if rng.random() < 0.3:
            rng.choice(members).restart(true_ms)


def test_heartbeats_carry_it() -> None:
    """A follower's register is the leader's, less the way; what an older term says is not heard."""
    node = leader(A, ABC)
    node.raft.proposal_clock_ms(500)
    node.tick(node.config.heartbeat_ms)
    beats = [m for m in node.take().messages if isinstance(m, HeartbeatRequest)]
    assert {m.clock_ms for m in beats} == {499 + node.config.heartbeat_ms}

    follower = server(B, ABC, [1, 2])
    follower.step(HeartbeatRequest(A, B, 2, 1, 1, 1, 9_000))
    assert follower.raft.clock_ms == 9_000
    follower.tick(250)
    assert follower.raft.clock_ms == 9_249
    follower.step(HeartbeatRequest(A, B, 1, 2, 1, 1, 99_000))
    assert follower.raft.clock_ms == 9_249


def test_a_heartbeat_counts_once_there_is_an_entry_of_its_term() -> None:
    follower = server(B, ABC, [1, 2])
    follower.raft.learn_clock(LogId(3, 2), 5_000)  # the first entry is the membership
    follower.step(HeartbeatRequest(A, B, 3, 1, 1, 1, 9_000))
    assert follower.raft.clock_ms == 5_000
    entry = Entry(4, 3, EntryKind.NOOP, b"")
    follower.step(AppendRequest(A, B, 3, 3, 2, (entry,), 1))
    follower.step(HeartbeatRequest(A, B, 3, 2, 1, 1, 9_050))
    assert follower.raft.clock_ms == 9_050


def test_a_time_goes_with_its_entry() -> None:
    follower = server(B, ABC, [1, 2])
    follower.raft.learn_clock(LogId(3, 2), 5_000)  # the first entry is the membership
    follower.step(AppendRequest(A, B, 3, 2, 1, (Entry(3, 3, EntryKind.NOOP, b""),), 1))
    assert follower.raft.clock_ms == 0


def test_ten_leader_changes_cost_only_the_time_without_a_leader() -> None:
    """Each new leader begins at what it heard last plus what has passed since; hours between the
    changes cost nothing at all."""
    cluster = Cluster(ABC)
    cluster.elect().raft.proposal_clock_ms(0)
    started_ms, leaderless_ms = cluster.now_ms, 0
    for change in range(10):
        old = cluster.elect()
        cluster.run(3_000 if change % 2 else 20_000)
        cluster.isolate(old.me)
        lost_ms = cluster.now_ms

        def is_replaced(old: Server = old) -> bool:
            new = cluster.leader
            return new is not None and new.me != old.me and new.raft.committed_in_term

        assert cluster.run(20_000, is_replaced)
        leaderless_ms += cluster.now_ms - lost_ms
        cluster.heal()
        cluster.run(500)
    new, passed_ms = cluster.elect(), cluster.now_ms - started_ms
    assert passed_ms - leaderless_ms <= new.raft.clock_ms <= passed_ms + 1
