"""Who is wrong when the members hold different states."""

from __future__ import annotations

from dengine.node.agreement import COMPARED_MAX, PATIENCE, Tally, Verdict
from dengine.raft.membership import Member, Membership
from dengine.raft.types import MemberId
from dengine.storage.state_records import StateDigest

A, B, C, D = (MemberId(n, n) for n in (1, 2, 3, 4))
GRACE_MS = 4000


def members(*voters: MemberId, learners: tuple[MemberId, ...] = ()) -> Membership:
    known = tuple(Member(v, f"127.0.0.1:{v.id}") for v in (*voters, *learners))
    return Membership("c", voters, (), learners, known)


ABC = members(A, B, C)


def says(index: int, what: int) -> StateDigest:
    return StateDigest(index, index, bytes([what]) * 16)


def tally(*reports: tuple[MemberId, StateDigest]) -> Tally:
    made = Tally(GRACE_MS)
    for member, digest in reports:
        made.report(member, digest, now_ms=0)
    return made


def test_members_that_agree_are_left_alone() -> None:
    assert tally((A, says(256, 1)), (B, says(256, 1))).judge(ABC, set(), 10**9) == []


def test_one_that_differs_from_a_majority_is_wrong() -> None:
    found = tally((A, says(256, 1)), (B, says(256, 2)), (C, says(256, 2)))
    assert found.judge(ABC, set(), 0) == [Verdict(256, (A,))]
    assert found.judge(ABC, set(), 0) == [], "judged once"


def test_a_learner_may_be_wrong_and_has_no_say() -> None:
    with_learner = members(A, B, C, learners=(D,))
    found = tally((A, says(256, 1)), (D, says(256, 2)))
    assert found.judge(with_learner, set(), 0) == []
    found.report(B, says(256, 1), 0)
    assert found.judge(with_learner, set(), 0) == [Verdict(256, (D,))]


def test_with_the_third_gone_nobody_knows_after_a_while() -> None:
    found = tally((A, says(256, 1)), (B, says(256, 2)))
    assert found.judge(ABC, {A, B}, GRACE_MS - 1) == []
    assert found.judge(ABC, {A, B}, GRACE_MS) == [Verdict(256, (), split=True)]


def test_a_third_that_lives_and_is_behind_may_still_decide() -> None:
    """Its report would tell who is right, so all three do not stop for want of it."""
    found = tally((A, says(256, 1)), (B, says(256, 2)))
    assert found.judge(ABC, {A, B, C}, PATIENCE * GRACE_MS - 1) == []
    found.report(C, says(256, 2), PATIENCE * GRACE_MS - 1)
    assert found.judge(ABC, {A, B, C}, PATIENCE * GRACE_MS - 1) == [Verdict(256, (A,))]


def test_nobody_is_waited_for_for_ever() -> None:
    found = tally((A, says(256, 1)), (B, says(256, 2)))
    assert found.judge(ABC, {A, B, C}, PATIENCE * GRACE_MS) == [Verdict(256, (), split=True)]


def test_three_that_all_differ_are_split_at_once() -> None:
    found = tally((A, says(256, 1)), (B, says(256, 2)), (C, says(256, 3)))
    assert found.judge(ABC, {A, B, C}, 0) == [Verdict(256, (), split=True)]


def test_only_so_many_indexes_are_remembered() -> None:
    found = tally(*((A, says(256 * n, 1)) for n in range(1, COMPARED_MAX + 2)))
    found.report(B, says(256, 2), 0)
    assert found.judge(ABC, {A, B}, 10**9) == []
