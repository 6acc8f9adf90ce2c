"""Damage for good never gets beyond a minority of the voters, whatever the schedule draws."""

from __future__ import annotations

import random

import pytest

from tests.nemesis.budget import Budget


@pytest.mark.parametrize(("voters", "most"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)])
def test_at_most_a_minority_is_damaged(voters: int, most: int) -> None:
    """One node alone, and one of two, have nobody who could repair them."""
    ids = range(1, voters + 1)
    assert len(Budget().targets(ids, list(ids))) == most


def test_damage_that_nobody_has_met_yet_counts() -> None:
    """A bit in the log of node 1 is flipped. As long as that is there, no other node's disk may be
    lost; node 1 may be damaged again."""
    budget = Budget()
    budget.spoil(1, lambda: False)
    assert budget.targets({1, 2, 3}, [2, 3]) == []
    assert budget.targets({1, 2, 3}, [2, 1]) == [1]
    assert budget.targets({1, 2, 3, 4, 5}, [2, 3, 1]) == [2, 1]


def test_a_repaired_node_makes_room() -> None:
    budget, repaired = Budget(), [False]
    budget.spoil(1, lambda: repaired[0])
    assert budget.targets({1, 2, 3}, [2]) == []
    repaired[0] = True
    assert budget.targets({1, 2, 3}, [2]) == [2]
    assert budget.damaged() == set()


def test_a_node_with_two_damages_needs_two_repairs() -> None:
    budget = Budget()
    budget.spoil(1, lambda: True)
    budget.spoil(1, lambda: False)
    assert budget.damaged() == {1}
    budget.forget(1)
    assert budget.damaged() == set()


def test_a_sound_voter_is_not_removed_beside_a_damaged_one() -> None:
    """Of three, one with a damaged log: without a sound one, two are left that need each other."""
    budget = Budget()
    budget.spoil(1, lambda: False)
    assert not budget.may_remove({1, 2, 3}, 2)
    assert budget.may_remove({1, 2, 3}, 1)
    assert budget.may_remove({1, 2, 3, 4, 5}, 2)


def test_a_damaged_node_that_is_no_voter_does_not_count() -> None:
    budget = Budget()
    budget.spoil(9, lambda: False)
    assert budget.targets({1, 2, 3}, [2]) == [2]


def test_no_row_of_faults_damages_more_than_a_minority() -> None:
    """Whatever is drawn: flips that stay or are repaired, lost disks, removals and growth."""
    for seed in range(300):
        rng, budget, voters, left = random.Random(seed), Budget(), {1, 2, 3}, [10, 11]
        for _ in range(30):
            wished = rng.sample(sorted(voters), rng.randint(1, len(voters)))
            match rng.randrange(4):
                case 0:
                    for node_id in budget.targets(voters, wished):
                        budget.spoil(node_id, lambda: False)
                case 1:
                    budget.forget(rng.choice(sorted(voters)))
                case 2 if left and budget.may_remove(voters, wished[0]):
                    voters = voters - {wished[0]} | {left.pop()}
                    budget.forget(wished[0])
                case 3:
                    voters = voters | {4, 5}
            assert len(budget.damaged() & voters) <= (len(voters) - 1) // 2, f"seed {seed}"
