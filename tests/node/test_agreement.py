"""Who is wrong when the members hold different states."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dengine.errors import DataCorruption
from dengine.node.agreement import (
    COMPARED_MAX,
    PATIENCE,
    REPEAT_MS,
    Agreement,
    Tally,
    Verdict,
)
from dengine.node.wire import StateReport, StateVerdict
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
    assert found.judge(ABC, {A, B, C}, 0) == [Verdict(256, (), split=True, final=True)]


def test_only_so_many_indexes_are_remembered() -> None:
    found = tally(*((A, says(256 * n, 1)) for n in range(1, COMPARED_MAX + 2)))
    found.report(B, says(256, 2), 0)
    assert found.judge(ABC, {A, B}, 10**9) == []


class Node:
    """An `Agreement`, and all that it makes its node do; A leads."""

    def __init__(self, me: MemberId) -> None:
        self.did: list[Any] = []
        self.halted: list[DataCorruption] = []
        self.stored = 256  # by each of the members
        self.proposed = 0
        self._digests: list[StateDigest] = []
        raft: Any = SimpleNamespace(
            me=me,
            leader=A,
            is_leader=me == A,
            membership=ABC,
            committed_membership=ABC,
            is_live=lambda member: True,
            stored_by=lambda member: self.stored,
        )
        state: Any = SimpleNamespace(take_digests=lambda: self._digests, path=Path("state-1"))
        self.agreement = Agreement(
            raft,
            state,
            grace_ms=GRACE_MS,
            send=lambda to, frame: self.did.append((to, frame)),
            distrust=lambda why, index: self.did.append(("distrusts its state", index)),
            fail=self.did.append,
            halt=self.halted.append,
            propose_time=self.propose,
        )

    def propose(self) -> None:
        self.proposed += 1

    def applies(self, *digests: StateDigest) -> None:
        self._digests = list(digests)
        self.agreement.applied(0)


def test_a_follower_reports_to_its_leader() -> None:
    follower = Node(B)
    follower.applies(says(256, 1), says(512, 2))
    follower.applies()
    assert follower.did == [(A, StateReport((says(256, 1), says(512, 2))))]


def test_a_leader_tells_who_is_wrong_and_that_one_throws_its_state_away() -> None:
    leader, wrong = Node(A), Node(B)
    leader.applies(says(256, 1))
    leader.agreement.reported(B, [says(256, 2)], 0)
    leader.agreement.reported(C, [says(256, 1)], 0)
    assert leader.did == [(B, StateVerdict(256, False))]
    wrong.agreement.judged(C, StateVerdict(256, False))
    assert wrong.did == [], "C does not lead"
    wrong.agreement.judged(A, StateVerdict(256, False))
    assert wrong.did == [("distrusts its state", 256)]


def test_a_lost_verdict_comes_again_with_the_reports_that_led_to_it() -> None:
    """A stream may break just then, and in a quiet cluster there is no next entry to compare."""
    leader, wrong = Node(A), Node(B)
    leader.applies(says(256, 1))
    wrong.applies(says(256, 2))
    for now_ms in (0, REPEAT_MS):
        leader.did.clear()
        wrong.did.clear()
        leader.agreement.ticked(now_ms)
        wrong.agreement.ticked(now_ms)
        if now_ms:
            assert wrong.did == [(A, StateReport((says(256, 2),)))]
        leader.agreement.reported(B, [says(256, 2)], now_ms)
        leader.agreement.reported(C, [says(256, 1)], now_ms)
        assert leader.did == [(B, StateVerdict(256, False))]
    wrong.agreement.judged(A, StateVerdict(256, False))
    wrong.did.clear()
    wrong.agreement.ticked(2 * REPEAT_MS)
    assert wrong.did == [], "that state is gone"


def test_a_leader_may_be_the_one_that_is_wrong() -> None:
    leader = Node(A)
    leader.applies(says(256, 1))
    for member in (B, C):
        leader.agreement.reported(member, [says(256, 2)], 0)
    assert leader.did == [("distrusts its state", 256)]


def test_where_nobody_knows_who_is_right_all_stop() -> None:
    leader = Node(A)
    leader.applies(says(256, 1))
    leader.agreement.reported(B, [says(256, 2)], 0)
    leader.agreement.reported(C, [says(256, 3)], 0)
    told, (failure,) = leader.did, leader.halted
    assert told == [(B, StateVerdict(256, True, True)), (C, StateVerdict(256, True, True))]
    assert isinstance(failure, DataCorruption)


def test_where_one_has_not_been_heard_all_stop_and_may_start_again() -> None:
    """With the third there may be a majority."""
    leader = Node(A)
    leader.applies(says(256, 1))
    leader.agreement.reported(B, [says(256, 2)], 0)
    leader.agreement.ticked(PATIENCE * GRACE_MS)
    *told, failure = leader.did
    assert told == [(B, StateVerdict(256, True)), (C, StateVerdict(256, True))]
    assert isinstance(failure, DataCorruption)
    assert leader.halted == []


def test_what_is_older_than_a_decision_is_not_disputed_any_more() -> None:
    """The one that could decide it says nothing of it again: it was started anew since, or is far
    ahead. The others repeat what they said, one of them wrongly."""
    found = tally((A, says(256, 1)), (B, says(256, 2)))
    for member, what in ((A, 1), (B, 2), (C, 1)):
        found.report(member, says(512, what), 0)
    assert found.judge(ABC, {A, B, C}, 0) == [Verdict(512, (B,))]
    found.report(A, says(256, 1), 0)
    found.report(B, says(256, 2), 0)
    assert found.judge(ABC, {A, B, C}, 10**9) == []
    found.report(B, says(512, 2), 0)
    found.report(A, says(512, 1), 0)
    assert found.judge(ABC, {A, B}, 0) == [Verdict(512, (B,))], "the verdict was lost"
    assert found.judge(ABC, {A, B}, 10**9) == [], "C is gone by now, and need not say it again"


def test_a_report_is_repeated_with_those_before_it() -> None:
    follower = Node(B)
    follower.applies(says(256, 1))
    follower.applies(says(512, 2))
    assert follower.did[-1] == (A, StateReport((says(256, 1), says(512, 2))))


def test_where_a_voter_that_was_started_anew_has_nothing_to_say_the_next_comparison_decides() -> (
    None
):
    """Else its silence would stop all in the end, though it is there; and in a quiet cluster there
    is no next entry to compare."""
    leader = Node(A)
    leader.stored = 255
    leader.applies(says(256, 1))
    leader.agreement.reported(B, [says(256, 2)], 0)
    leader.agreement.ticked(100)
    assert leader.proposed == 0, "who has not come so far will speak"
    leader.stored = 300
    leader.agreement.ticked(200)
    leader.agreement.ticked(300)
    assert leader.proposed == 2
    leader.applies(says(512, 1))
    leader.agreement.reported(B, [says(512, 2)], 0)
    leader.stored = 600
    leader.agreement.ticked(400)
    assert leader.proposed == 2, "it may have no state: not one entry after the other"
    leader.agreement.ticked(200 + REPEAT_MS)
    assert leader.proposed == 3
    leader.agreement.reported(C, [says(512, 1)], 0)
    assert (B, StateVerdict(512, False)) in leader.did
    leader.agreement.ticked(300 + REPEAT_MS)
    assert leader.proposed == 3
