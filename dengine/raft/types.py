"""The nouns of the core: ids, entries and the durable record.

Names are those of the Raft paper (figure 2) and of Ongaro's thesis. Times are milliseconds on a
clock that the caller chooses and that never goes back.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import msgspec


class MemberId(NamedTuple):
    """Who counts in a quorum: a node id AND the incarnation of its data directory.

    A node whose directory was wiped is another member under the same id: it has forgotten its
    vote and its acknowledgements, so neither may be counted for it again.
    """

    id: int
    incarnation: int

    def __str__(self) -> str:
        return f"{self.id}/{self.incarnation:016x}"


class LogId(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Position of an entry. An index alone does not name an entry; index and term do."""

    index: int
    term: int


class SnapshotRef(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A verified snapshot file: the last entry it includes (paper 7), and which file it is.

    Two members make two different files of the same state, so a file is named by its content:
    chunks of two files are never mixed.
    """

    index: int
    term: int
    sha256: str  # hex
    size_bytes: int

    @property
    def log_id(self) -> LogId:
        return LogId(self.index, self.term)


class EntryKind(enum.IntEnum):
    NORMAL = 0  # a batch of commands for the state machine, opaque here
    NOOP = 1  # the first entry of a leader's term (paper 8: commits what came before)
    CONFIG = 2  # an encoded Membership, in force from the moment it is appended


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    index: int
    term: int
    kind: EntryKind
    data: bytes

    @property
    def log_id(self) -> LogId:
        return LogId(self.index, self.term)


class HardState(msgspec.Struct, frozen=True, array_like=True):
    """What must be durable before any reply depends on it (paper figure 2, "persistent state").

    One record, so that a crash can never keep the term and lose the vote. `commit_index` rides
    along when something else is written anyway; it is never the reason for a write.
    """

    term: int = 1
    voted_for: MemberId | None = None
    commit_index: int = 0


class ReadNonce(NamedTuple):
    """Names one batch of waiting reads. Never reused, not even after a restart (`boot`)."""

    member: MemberId
    boot: int
    counter: int


class ReadState(msgspec.Struct, frozen=True, gc=False):
    """The reads filed under `nonce` may be served once `index` is applied; None: they failed."""

    nonce: ReadNonce
    index: int | None


class Role(enum.StrEnum):
    FOLLOWER = "follower"
    CANDIDATE = "candidate"  # also while it only asks for pre-votes
    LEADER = "leader"
    LEARNER = "learner"
