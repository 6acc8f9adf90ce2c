"""The log's time: it never shrinks a TTL, and stretches none by more than the leaderless time."""

from __future__ import annotations

import random

import pytest

from dengine.raft.log_clock import LogClock
from dengine.raft.messages import HeartbeatRequest
from tests.raft.cluster import Cluster
from tests.raft.harness import A, B, C, leader, membership, server

ABC = membership(A, B, C)


def test_it_stands_still_until_somebody_knows_the_time() -> None:
    clock = LogClock()
    assert clock.at(5_000) == 0
    clock.learn(0, 5_000)
    assert clock.at(9_000) == 0
    clock.learn(1, 9_000)
    assert clock.at(9_000) == 1


def test_it_runs_on_by_itself_and_only_ever_jumps_ahead() -> None:
    clock = LogClock()
    clock.learn(100, 1_000)
    assert clock.at(1_250) == 350
    clock.learn(300, 1_250)  # late news
    assert clock.at(1_250) == 350
    clock.learn(1_000, 1_250)
    assert clock.at(1_251) == 1_001


@pytest.mark.parametrize("seed", range(20))
def test_nobody_is_ahead_of_the_time_that_has_passed(seed: int) -> None:
    """However late and in whatever order members hear of one another: each adds only what its own
    clock has counted, and those clocks show the same seconds from different beginnings."""
    rng = random.Random(seed)
    offsets = [rng.randrange(10**6) for _ in range(3)]
    clocks = [LogClock() for _ in range(3)]
    clocks[0].learn(1, offsets[0])
    under_way: list[tuple[int, int]] = []
    true_ms = 0
    for _ in range(300):
        true_ms += rng.choice([0, 1, 7, 500])
        who = rng.randrange(3)
        shown = [clock.at(true_ms + offset) for clock, offset in zip(clocks, offsets, strict=True)]
        assert all(time <= true_ms + 1 for time in shown), f"seed {seed}"
        assert shown[0] == true_ms + 1, f"seed {seed}: the one that began has lost nothing"
        if rng.random() < 0.5:
            under_way.append((rng.randrange(3), shown[who]))
        elif under_way:
            to, clock_ms = under_way.pop(rng.randrange(len(under_way)))
            clocks[to].learn(clock_ms, true_ms + offsets[to])


def test_heartbeats_carry_it() -> None:
    """A follower's register is the leader's, less the way; what an older term says is not heard."""
    node = leader(A, ABC)
    node.raft.learn_clock(500)
    node.tick(node.config.heartbeat_ms)
    beats = [m for m in node.take().messages if isinstance(m, HeartbeatRequest)]
    assert {m.clock_ms for m in beats} == {500 + node.config.heartbeat_ms}

    follower = server(B, ABC, [1, 2])
    follower.step(HeartbeatRequest(A, B, 2, 1, 1, 1, 9_000))
    assert follower.raft.clock_ms == 9_000
    follower.tick(250)
    assert follower.raft.clock_ms == 9_250
    follower.step(HeartbeatRequest(A, B, 1, 2, 1, 1, 99_000))
    assert follower.raft.clock_ms == 9_250


def test_ten_leader_changes_cost_only_the_time_without_a_leader() -> None:
    """Each new leader begins at what it heard last plus what has passed since; hours between the
    changes cost nothing at all."""
    cluster = Cluster(ABC)
    began_ms = cluster.now_ms
    cluster.elect().raft.learn_clock(1)
    leaderless_ms = cluster.now_ms - began_ms
    started_ms = cluster.now_ms
    for change in range(10):
        old = cluster.leader()
        assert old is not None
        cluster.run(3_000 if change % 2 else 20_000)
        cluster.isolate(old.me)
        lost_ms = cluster.now_ms
        cluster.elect()
        leaderless_ms += cluster.now_ms - lost_ms
        cluster.heal()
        cluster.run(500)
    new = cluster.leader()
    assert new is not None
    passed_ms = cluster.now_ms - started_ms
    assert passed_ms - leaderless_ms <= new.raft.clock_ms <= passed_ms + 1
