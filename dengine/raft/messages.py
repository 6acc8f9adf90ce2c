"""What members say to each other. Every message names sender, receiver and the sender's term.

Two pairs differ from the paper: heartbeats are messages of their own (they carry no log position,
so that an acknowledgement can leave before any disk write), and pre-votes (thesis 9.6).
"""

from __future__ import annotations

import msgspec

from dengine.raft.types import Entry, MemberId, ReadNonce, SnapshotRef


class _Header(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    sender: MemberId
    to: MemberId
    term: int


class PreVoteRequest(_Header, frozen=True, array_like=True, tag=True):
    """ "Would you vote for me in `term`?" `term` is the next one; nobody's term changes (9.6)."""

    last_index: int
    last_term: int


class PreVoteResponse(_Header, frozen=True, array_like=True, tag=True):
    """`term` echoes the request's when granted, and is the responder's own when refused."""

    granted: bool


class VoteRequest(_Header, frozen=True, array_like=True, tag=True):
    last_index: int
    last_term: int
    transfer: bool  # the leader asked for this election (3.10): stickiness does not apply


class VoteResponse(_Header, frozen=True, array_like=True, tag=True):
    granted: bool


class AppendRequest(_Header, frozen=True, array_like=True, tag=True):
    prev_index: int
    prev_term: int
    entries: tuple[Entry, ...]
    commit_index: int


class AppendResponse(_Header, frozen=True, array_like=True, tag=True):
    """Acknowledges, durably, everything up to `index` with `index_term`; or refuses `index`.

    On refusal `index` echoes the request's prev_index, and (`hint_index`, `hint_term`) is the
    largest position of the responder's log that can still agree with the leader's (5.3, fast
    back-up by terms).
    """

    granted: bool
    index: int
    index_term: int
    hint_index: int
    hint_term: int


class HeartbeatRequest(_Header, frozen=True, array_like=True, tag=True):
    """`round` grows with every broadcast of this leader in this term; acks echo it (6.4).

    Round 0 only spreads the commit index and wants no answer. `commit_term` is the term of the
    entry there: a log that was rolled back may have another one at that index. `clock_ms` is the
    leader's log time (log_clock.py); 0 from a release that knew none.
    """

    round: int
    commit_index: int
    commit_term: int
    clock_ms: int = 0


class HeartbeatResponse(_Header, frozen=True, array_like=True, tag=True):
    """`timeout_ms_min` bounds how long the leader may trust this voter's stickiness (6.4.1).

    `needs_snapshot` is None unless the sender has lost its state (not its log): then only a
    snapshot whose last included index is at least this one continues in its log.
    """

    round: int
    timeout_ms_min: int
    needs_snapshot: int | None = None


class InstallSnapshotRequest(_Header, frozen=True, array_like=True, tag=True):
    """An offer: "what you need next is purged here, fetch this file from me" (paper 7).

    The file travels outside of Raft. The offer is repeated with every periodic heartbeat until
    an AppendResponse acknowledges what the snapshot includes.
    """

    snapshot: SnapshotRef


class ReadIndexRequest(_Header, frozen=True, array_like=True, tag=True):
    nonce: ReadNonce
    lease: bool


class ReadIndexResponse(_Header, frozen=True, array_like=True, tag=True):
    """`index` None: the leader could not confirm. The commit saves waiting for a heartbeat."""

    nonce: ReadNonce
    index: int | None
    commit_index: int
    commit_term: int


class TimeoutNow(_Header, frozen=True, array_like=True, tag=True):
    """The leader hands over: campaign at once, without a pre-vote (3.10)."""


Message = (
    PreVoteRequest
    | PreVoteResponse
    | VoteRequest
    | VoteResponse
    | AppendRequest
    | AppendResponse
    | HeartbeatRequest
    | HeartbeatResponse
    | InstallSnapshotRequest
    | ReadIndexRequest
    | ReadIndexResponse
    | TimeoutNow
)
