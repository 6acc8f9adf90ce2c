"""Writes that wait: when their failure may be called certain."""

from __future__ import annotations

import asyncio

import pytest

from dengine.errors import LeaderChanged
from dengine.kv.commands import PutResult, Result
from dengine.node.proposals import Proposals
from dengine.raft.types import Entry, EntryKind, LogId
from tests.node.hosts import on_loop


def _in_log(proposals: Proposals, log_id: LogId) -> asyncio.Future[Result]:
    future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
    proposals.add(b"command", future, deadline=1e9)
    proposals.appended(log_id, proposals.take_batch())
    return future


def test_a_write_behind_another_committed_entry_did_not_happen() -> None:
    """Another term's entry is committed at its index: outcome "none", safe to send again."""

    async def check() -> None:
        proposals = Proposals(10, 1000)
        future = _in_log(proposals, LogId(7, 2))
        proposals.applied(Entry(7, 3, EntryKind.NORMAL, b""), [PutResult(1, True)])
        with pytest.raises(LeaderChanged) as caught:
            await future
        assert caught.value.outcome == "none"
        assert (proposals.count, proposals.bytes) == (0, 0)

    on_loop(check)


def test_a_write_that_only_left_this_log_may_still_happen() -> None:
    """Another entry stands at its index, not committed: a member that still holds the write can
    be elected over it and commit it (Raft, figure 8), so the outcome is unknown."""

    async def check() -> None:
        proposals = Proposals(10, 1000)
        old = _in_log(proposals, LogId(8, 2))
        new = _in_log(proposals, LogId(8, 5))
        with pytest.raises(LeaderChanged) as caught:
            await old
        assert caught.value.outcome == "unknown"
        result = PutResult(1, True)
        proposals.applied(Entry(8, 5, EntryKind.NORMAL, b""), [result])
        assert await new == result
        assert (proposals.count, proposals.bytes) == (0, 0)

    on_loop(check)


def test_a_wrong_state_tells_nobody_a_result() -> None:
    """The entry may well be committed, so it is not certain that it did not happen; what still
    waits in the queue is refused by whoever finds that this node does not lead."""

    async def check() -> None:
        proposals = Proposals(10, 1000)
        future = _in_log(proposals, LogId(7, 2))
        proposals.distrusted()
        with pytest.raises(LeaderChanged) as caught:
            await future
        assert caught.value.outcome == "unknown"
        assert (proposals.count, proposals.bytes) == (0, 0)
        proposals.applied(Entry(7, 2, EntryKind.NORMAL, b""), [PutResult(1, True)])

    on_loop(check)


def test_a_write_that_a_snapshot_covers_may_have_happened() -> None:
    """Nobody here saw it applied, nor what took its place."""

    async def check() -> None:
        proposals = Proposals(10, 1000)
        future = _in_log(proposals, LogId(7, 1))
        proposals.restored(6)
        assert not future.done()
        proposals.restored(9)
        with pytest.raises(LeaderChanged) as caught:
            await future
        assert caught.value.outcome == "unknown"

    on_loop(check)


def test_a_write_that_no_later_leader_can_have_did_not_happen() -> None:
    """The entry of a later term that was committed lies before it, and nobody writes any more: it
    had to wait for its deadline, and knew nothing then."""

    async def check() -> None:
        proposals = Proposals(10, 1000)
        future, same = _in_log(proposals, LogId(9, 2)), _in_log(proposals, LogId(10, 3))
        proposals.applied(Entry(7, 2, EntryKind.NORMAL, b""), [])
        assert not future.done()
        proposals.applied(Entry(7, 3, EntryKind.NOOP, b""), [])
        with pytest.raises(LeaderChanged) as caught:
            await future
        assert caught.value.outcome == "none"
        assert not same.done()

    on_loop(check)
