"""What a majority is: against a dumb twin that tries every subset, and against etcd's tables."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dengine.raft.quorum import (
    UNBOUNDED,
    VoteResult,
    joint_value,
    joint_vote,
    majority_value,
    majority_vote,
)
from dengine.raft.types import MemberId

TABLES = Path(__file__).parents[3] / "shared" / "conformance" / "etcd-raft-quorum"

members = st.builds(MemberId, st.integers(1, 9), st.just(0))
voters = st.frozensets(members, max_size=7).map(lambda found: tuple(sorted(found)))
values = st.dictionaries(members, st.integers(0, 12))
votes = st.dictionaries(members, st.booleans())


def majorities(of: tuple[MemberId, ...]) -> Iterator[tuple[MemberId, ...]]:
    """Every subset that is more than half; of nobody, the empty one."""
    for size in range(len(of) // 2 + 1 if of else 0, len(of) + 1):
        yield from itertools.combinations(of, size)


def dumb_value(of: tuple[MemberId, ...], reached: Mapping[MemberId, int]) -> int:
    """The best that the slowest member of any majority has reached."""
    return max(min((reached.get(m, 0) for m in q), default=UNBOUNDED) for q in majorities(of))


def dumb_vote(of: tuple[MemberId, ...], cast: Mapping[MemberId, bool]) -> VoteResult:
    """Won: a majority said yes. Lost: none can any more."""
    if any(all(cast.get(m) is True for m in q) for q in majorities(of)):
        return VoteResult.WON
    if any(all(cast.get(m) is not False for m in q) for q in majorities(of)):
        return VoteResult.PENDING
    return VoteResult.LOST


@given(voters, values)
def test_a_majority_value_is_what_some_majority_has_reached(
    of: tuple[MemberId, ...], reached: dict[MemberId, int]
) -> None:
    """Paper 5.3: an entry is committed when a majority of the servers has it."""
    assert majority_value(of, reached) == dumb_value(of, reached)


@given(voters, voters, values)
def test_a_joint_value_is_what_majorities_of_both_halves_have_reached(
    new: tuple[MemberId, ...], old: tuple[MemberId, ...], reached: dict[MemberId, int]
) -> None:
    """Thesis 4.3: agreement requires majorities of both the old and the new configuration."""
    wanted = min(dumb_value(new, reached), dumb_value(old, reached))
    assert joint_value(new, old, reached) == wanted


@given(voters, votes)
def test_an_election_is_decided_as_soon_as_it_can_be(
    of: tuple[MemberId, ...], cast: dict[MemberId, bool]
) -> None:
    """Paper 5.2: won by a majority, lost when no majority is left."""
    assert majority_vote(of, cast) is dumb_vote(of, cast)


@given(voters, voters, votes)
def test_a_joint_election_needs_both_halves(
    new: tuple[MemberId, ...], old: tuple[MemberId, ...], cast: dict[MemberId, bool]
) -> None:
    """Thesis 4.3: either half can lose it, both must win it."""
    results = (dumb_vote(new, cast), dumb_vote(old, cast))
    if VoteResult.LOST in results:
        wanted = VoteResult.LOST
    elif VoteResult.PENDING in results:
        wanted = VoteResult.PENDING
    else:
        wanted = VoteResult.WON
    assert joint_vote(new, old, cast) is wanted


@given(voters, voters, st.data())
def test_majorities_of_consecutive_memberships_share_a_member(
    old: tuple[MemberId, ...], new: tuple[MemberId, ...], data: st.DataObject
) -> None:
    """Thesis 4.1, 4.3: what wins an election in a joint membership meets every majority of both
    its halves, so two leaders of one term are impossible while the membership changes.
    """
    cast = data.draw(st.dictionaries(st.sampled_from([*old, *new]), st.just(True))) if old else {}
    if old and new and joint_vote(new, old, cast) is VoteResult.WON:
        for half in (old, new):
            assert all(set(q) & set(cast) for q in majorities(half))


# --- etcd's tables -------------------------------------------------------------------------------

CASE = re.compile(
    r"^(?P<command>committed|vote)(?P<arguments>.*)\n----\n(?P<result>(?:.+\n)*)", re.M
)
VOTES = {"y": True, "n": False}
RESULTS = {
    "VoteWon": VoteResult.WON,
    "VotePending": VoteResult.PENDING,
    "VoteLost": VoteResult.LOST,
}


def table(name: str) -> list[re.Match[str]]:
    text = (TABLES / name).read_text(encoding="utf-8")
    return list(CASE.finditer(text if text.endswith("\n") else text + "\n"))


def argument(case: re.Match[str], name: str) -> list[str]:
    found = re.search(rf"\b{name}=\(([^)]*)\)", case["arguments"])
    return [word.strip() for word in found[1].split(",") if word.strip()] if found else []


def parse(
    case: re.Match[str], values: str
) -> tuple[tuple[MemberId, ...], tuple[MemberId, ...], dict[MemberId, str]]:
    """New voters, old voters, and what each member says; "_" says nothing.

    Values are listed for the distinct members in the order in which they first appear.
    """
    new, old = ([MemberId(int(i), 0) for i in argument(case, key)] for key in ("cfg", "cfgj"))
    everybody = list(dict.fromkeys([*new, *old]))
    said = argument(case, values)
    assert len(said) == len(everybody), case[0]
    known = {m: word for m, word in zip(everybody, said, strict=True) if word != "_"}
    return tuple(new), tuple(old), known


@pytest.mark.recorded(TABLES)
@pytest.mark.parametrize("name", ["majority_commit.txt", "joint_commit.txt"])
def test_etcd_agrees_on_committed_indexes(name: str) -> None:
    """Every case of etcd-io/raft's quorum tests, which nobody here wrote."""
    cases = table(name)
    assert len(cases) > 15
    for case in cases:
        new, old, known = parse(case, "idx")
        last = case["result"].split()[-1]
        wanted = UNBOUNDED if "∞" in last else int(last)
        reached = {m: int(word) for m, word in known.items()}
        assert joint_value(new, old, reached) == wanted, case[0]
        if not old:
            assert majority_value(new, reached) == wanted, case[0]


@pytest.mark.recorded(TABLES)
@pytest.mark.parametrize("name", ["majority_vote.txt", "joint_vote.txt"])
def test_etcd_agrees_on_votes(name: str) -> None:
    """Every case of etcd-io/raft's quorum tests, which nobody here wrote."""
    cases = table(name)
    assert len(cases) > 15
    for case in cases:
        new, old, known = parse(case, "votes")
        cast = {m: VOTES[word] for m, word in known.items()}
        assert joint_vote(new, old, cast) is RESULTS[case["result"].strip()], case[0]
