"""Whose turn it is to take a snapshot."""

from __future__ import annotations

from dengine.node.snapshot_turn import WAITING_MS, SnapshotTurn


def test_one_at_a_time() -> None:
    """While one has the turn nobody else gets it; it may prolong it, and ends it."""
    turn = SnapshotTurn()
    assert turn.grant(1, 0, 100)
    assert not turn.grant(2, 50, 100)
    assert turn.grant(1, 90, 100)
    assert not turn.grant(2, 150, 100)
    assert turn.grant(1, 160, 0)
    assert turn.grant(2, 161, 100)


def test_a_turn_that_is_never_ended_runs_out() -> None:
    turn = SnapshotTurn()
    assert turn.grant(1, 0, 100)
    assert turn.grant(2, 100, 100)


def test_a_member_that_is_always_due_does_not_keep_the_turn() -> None:
    """Three that always want one take turns, although the first asks again at once."""
    turn = SnapshotTurn()
    order = []
    now = 0
    for _ in range(6):
        granted = [n for n in (1, 2, 3) if turn.grant(n, now, 1000)]
        assert len(granted) == 1
        order += granted
        now += 500
        assert turn.grant(granted[0], now, 0)
    assert order == [1, 2, 3, 1, 2, 3]


def test_who_has_stopped_asking_holds_nobody_up() -> None:
    turn = SnapshotTurn()
    assert turn.grant(1, 0, 100)
    assert not turn.grant(2, 10, 100)
    assert not turn.grant(1, 200, 100)
    assert turn.grant(1, 200 + WAITING_MS, 100)
