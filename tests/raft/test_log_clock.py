"""The log's time: it never shrinks a TTL, and stretches none by more than the leaderless time."""

from __future__ import annotations

import random

import pytest

from dengine.raft.log_clock import LogClock
from dengine.raft.messages import HeartbeatRequest
from tests.raft.cluster import Cluster
from tests.raft.harness import A, B, C, Server, leader, membership, server

ABC = membership(A, B, C)


def test_it_stands_still_until_somebody_knows_the_time() -> None:
    clock = LogClock()
    clock.learn(3, 0, 5_000)
    assert clock.at(9_000) == 0
    clock.start(0, 9_000)
    assert clock.at(9_000) == 1
    clock.start(0, 9_500)
    assert clock.at(9_500) == 500


def test_a_leader_is_never_behind_what_is_committed() -> None:
    """Its register may be: it heard from a leader that knew less. Time would stand still until it
    had caught up with the entries before."""
    clock = LogClock()
    clock.learn(2, 5_000, 0)
    clock.start(60_000, 100)
    assert clock.at(150) == 60_049
    clock.start(60_000, 200)
    assert clock.at(200) == 60_099


def test_within_a_term_the_newest_word_counts() -> None:
    clock = LogClock()
    clock.learn(1, 300, 1_000)
    assert clock.at(1_251) == 550
    clock.learn(1, 200, 1_251)  # overtaken by the one before
    assert clock.at(1_251) == 550
    clock.learn(1, 1_000, 1_251)
    assert clock.at(1_251) == 1_000
    assert clock.at(1_253) == 1_001


def test_a_faster_clock_does_not_get_ahead_of_the_leader() -> None:
    """It would begin there when it leads, and end early what was written just before."""
    clock = LogClock()
    for second in range(1, 86_400):  # a clock that gains 1 ms in each second
        clock.learn(1, second * 1000, second * 1001)
    assert clock.at(second * 1001) == second * 1000


def test_a_later_term_has_the_word_and_an_earlier_one_has_not() -> None:
    """What was written under a leader that knew less counts from what that leader knew: a member
    that went on from an older leader's time would end it early."""
    clock = LogClock()
    clock.learn(1, 3_600_000, 0)
    clock.learn(2, 5_000, 0)
    assert clock.at(10) == 5_009
    clock.learn(1, 9_000_000, 10)
    assert clock.at(10) == 5_009


@pytest.mark.parametrize("seed", range(30))
def test_nothing_is_ended_early(seed: int) -> None:
    """Leaders come and go, members sleep, hear some heartbeats and not others, and have clocks that
    begin anywhere, also within a millisecond, of which they show whole ones. An entry is written by
    each leader; whoever leads later has it in its log, and never shows more than its time, what has
    truly passed since, and the one millisecond that the entry may have been rounded down by."""
    rng = random.Random(seed)
    offsets = [rng.uniform(0, 10**6) for _ in range(4)]
    clocks = [LogClock() for _ in range(4)]
    logs: list[list[tuple[int, int]]] = [[] for _ in range(4)]
    true_ms, written = 0.0, []

    def reading(member: int) -> int:
        return int(true_ms + offsets[member])

    for term in range(1, 40):
        true_ms += rng.choice([0.3, 1, 900, 50_000])
        # The longest log wins, as a quorum's votes would have it.
        leader = max(range(4), key=lambda m: (logs[m][-1:], rng.random()))
        for _ in range(rng.randint(1, 4)):
            true_ms += rng.choice([0, 0.1, 0.7, 3, 700, 20_000])
            now_ms = reading(leader)
            clocks[leader].start(0, now_ms)
            shown = clocks[leader].at(now_ms)
            for at_ms, clock_ms in written:
                assert shown < clock_ms + true_ms - at_ms + 1.001, f"seed {seed}"
            if rng.random() < 0.6:
                written.append((true_ms, shown))
                logs[leader].append((term, shown))
                for other in rng.sample([m for m in range(4) if m != leader], 2):
                    logs[other] = list(logs[leader])
                    clocks[other].learn(term, shown, reading(other))
            for other in range(4):
                if other != leader and rng.random() < 0.3:
                    clocks[other].learn(term, shown, reading(other))
        if rng.random() < 0.3:  # a restart forgets what was heard, but not the log
            gone = rng.randrange(4)
            clocks[gone] = LogClock()
            if logs[gone]:
                clocks[gone].learn(*logs[gone][-1], reading(gone))


def test_heartbeats_carry_it() -> None:
    """A follower's register is the leader's, less the way; what an older term says is not heard."""
    node = leader(A, ABC)
    node.raft.learn_clock(1, 500)
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
