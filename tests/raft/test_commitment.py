"""When an entry is safe: paper 5.4.2; append ABA; a slow disk.

Whole `Ready`s are compared: what is not named must be empty.
"""

from __future__ import annotations

from dengine.raft.messages import (
    AppendRequest,
    AppendResponse,
    VoteRequest,
    VoteResponse,
)
from dengine.raft.raft import AFTER_SYNC_MAX, Transition
from dengine.raft.types import HardState, MemberId, Role
from tests.raft.harness import (
    A,
    B,
    C,
    D,
    E,
    Server,
    expect,
    leader,
    membership,
    noop,
    normal,
    past_grace,
    server,
)

ABC = membership(A, B, C)


def ack(sender: MemberId, to: MemberId, term: int, index: int, index_term: int) -> AppendResponse:
    return AppendResponse(sender, to, term, True, index, index_term, index, index_term)


# --- append ABA ----------------------------------------------------------------------------------


def test_an_acknowledgement_of_another_terms_entry_is_ignored() -> None:
    """The same index, but not the entry the leader holds there."""
    node = leader(A, ABC)
    node.raft.propose(b"x")
    node.settle()
    node.step(ack(B, A, 2, 3, 1), ack(C, A, 2, 3, 1))
    assert node.raft.log.commit_index == 2


def test_a_write_of_entries_that_were_replaced_meanwhile_makes_nothing_durable() -> None:
    """Written as 1, replaced by 2 in memory: only the second write counts."""
    node = server(A, ABC)
    node.step(AppendRequest(B, A, 1, 1, 1, (normal(2, 1), normal(3, 1)), 1))
    node.take()
    node.step(AppendRequest(C, A, 2, 1, 1, (noop(2, 2), normal(3, 2)), 1))
    expect(node.take())
    assert list(node.finish_write()) == [ack(A, B, 1, 3, 1)]  # true on disk; in an old term
    assert node.raft.log.stable_index == 1
    expect(
        node.take(),
        hard_state=HardState(2, None, 1),
        entries=[noop(2, 2), normal(3, 2)],
        messages_after_sync=[ack(A, C, 2, 3, 2)],
    )


def test_entries_that_come_back_while_being_written_are_durable() -> None:
    """Append ABA in full: 1, then 2, then 1 again, within one write of the first."""
    node = server(A, ABC)
    first = (normal(2, 1), normal(3, 1))
    node.step(AppendRequest(B, A, 1, 1, 1, first, 1))
    node.take()
    node.step(AppendRequest(C, A, 2, 1, 1, (noop(2, 2),), 1))
    node.step(AppendRequest(B, A, 3, 1, 1, first, 1))
    node.take()
    node.finish_write()
    assert node.raft.log.stable_index == 3
    assert node.settle() == [ack(A, B, 3, 3, 1)]
    assert node.disk.log[1:] == list(first)


def test_what_was_proposed_during_a_write_is_not_durable_with_it() -> None:
    """10.2.1: the leader counts itself for what that write held, and no more."""
    node = leader(A, ABC)
    node.raft.propose(b"x")
    node.take()
    node.raft.propose(b"y")
    node.take()
    node.finish_write()
    node.step(ack(B, A, 2, 4, 2))
    assert node.raft.log.commit_index == 3
    node.settle()
    assert node.raft.log.commit_index == 4


# --- 5.4.2: committing entries from previous terms -----------------------------------------------


def test_an_entry_of_an_older_term_is_not_committed_by_counting() -> None:
    """5.4.2, figure 8: S1 leads again in term 4 with its entry of term 2 on a majority; S5 could
    still overwrite it, so it is committed only together with an entry of term 4.
    """
    five = membership(A, B, C, D, E)
    s1 = server(A, five, [1, 2], term=3)
    s1.lead()
    assert s1.raft.term == 4
    s1.step(ack(B, A, 4, 3, 2), ack(C, A, 4, 3, 2))
    assert s1.raft.log.commit_index == 1
    s5 = server(E, five, [1, 3], term=3)
    for voter in (B, C, D):  # any of them would still elect S5
        log = [1, 2] if voter is not D else [1]
        node = past_grace(server(voter, five, log, term=4))
        node.step(VoteRequest(E, voter, 5, *_last(s5), False))
        assert node.settle() == [VoteResponse(voter, E, 5, True)]
    s1.step(ack(B, A, 4, 4, 4), ack(C, A, 4, 4, 4))
    assert s1.raft.log.commit_index == 4
    node = past_grace(server(B, five, [1, 2, 4], term=4))
    node.step(VoteRequest(E, B, 5, *_last(s5), False))
    assert node.settle() == [VoteResponse(B, E, 5, False)]


def _last(node: Server) -> tuple[int, int]:
    return node.raft.log.last_index, node.raft.log.last_term


def test_older_entries_are_committed_together_with_one_of_the_own_term() -> None:
    """5.4.2: "then all prior entries are committed indirectly." """
    node = server(A, ABC, [1, 1])
    node.lead()
    node.step(ack(B, A, 2, 4, 2))
    node.settle()
    assert node.applied[1:] == [normal(2, 1), normal(3, 1), noop(4, 2)]


# --- a slow disk ---------------------------------------------------------------------------------


def test_a_leader_whose_disk_hangs_steps_down() -> None:
    """Heartbeats go on and are answered, so only this ends it."""
    node = leader(A, ABC)
    node.raft.propose(b"x")
    node.take()
    for _ in range(5):
        node.tick(100)
        node.answer_heartbeats(node.take().messages, B, C)
    assert node.raft.is_leader
    node.tick(1)
    reason = "the disk has not finished a log write for 500 ms"
    assert node.take().transitions == [Transition(Role.LEADER, Role.FOLLOWER, 2, reason)]


def test_a_server_whose_disk_hangs_does_not_campaign() -> None:
    """Its own vote could not become durable: asking the others would only cost them time."""
    node = server(A, ABC)
    node.step(AppendRequest(B, A, 1, 1, 1, (normal(2, 1),), 1))
    node.take()
    for _ in range(100):
        node.tick(100)
        expect(node.take())
    node.finish_write()
    node.tick(2000)
    assert node.take().messages


def test_a_disk_that_hangs_for_hours_fills_no_memory() -> None:
    """Every queue has a bound. Of the answers that wait, the newest survive."""
    node = server(A, ABC)
    node.step(AppendRequest(B, A, 1, 1, 1, (normal(2, 1),), 1))
    node.take()
    for index in range(2, 2 * AFTER_SYNC_MAX):
        node.step(AppendRequest(B, A, 1, index, 1, (normal(index + 1, 1),), 1))
    node.finish_write()
    ready = node.take()
    assert len(ready.messages_after_sync) == AFTER_SYNC_MAX
    last = 2 * AFTER_SYNC_MAX
    assert ready.messages_after_sync[-1] == ack(A, B, 1, last, 1)
