"""Counting: the one place that knows what a majority is.

Commit index, read rounds, leases and CheckQuorum all ask the same question: "up to which value
has a majority come?" So they all ask `joint_value`.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping

from dengine.raft.types import MemberId

UNBOUNDED = 2**63 - 1  # what an empty half "has reached": it never holds the other half back


class VoteResult(enum.Enum):
    WON = "won"
    PENDING = "pending"
    LOST = "lost"


def majority_value(voters: Collection[MemberId], values: Mapping[MemberId, int]) -> int:
    """Largest value that a majority of `voters` has reached; a missing value counts as 0."""
    if not voters:
        return UNBOUNDED
    reached = sorted((values.get(voter, 0) for voter in voters), reverse=True)
    return reached[len(voters) // 2]


def joint_value(
    voters: Collection[MemberId], outgoing: Collection[MemberId], values: Mapping[MemberId, int]
) -> int:
    """As `majority_value`, by both halves of a joint membership (thesis 4.3)."""
    if not outgoing:
        return majority_value(voters, values)
    return min(majority_value(voters, values), majority_value(outgoing, values))


def majority_vote(voters: Collection[MemberId], votes: Mapping[MemberId, bool]) -> VoteResult:
    """Outcome of an election among `voters`; who has not answered may still do so."""
    if not voters:
        return VoteResult.WON
    granted = sum(votes.get(voter) is True for voter in voters)
    refused = sum(votes.get(voter) is False for voter in voters)
    quorum = len(voters) // 2 + 1
    if granted >= quorum:
        return VoteResult.WON
    return VoteResult.LOST if len(voters) - refused < quorum else VoteResult.PENDING


def joint_vote(
    voters: Collection[MemberId], outgoing: Collection[MemberId], votes: Mapping[MemberId, bool]
) -> VoteResult:
    """As `majority_vote`; both halves must agree to win, either can lose it (thesis 4.3)."""
    results = {majority_vote(voters, votes), majority_vote(outgoing, votes)}
    if VoteResult.LOST in results:
        return VoteResult.LOST
    return VoteResult.PENDING if VoteResult.PENDING in results else VoteResult.WON
