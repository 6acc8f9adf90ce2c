"""What travels on a peer stream: one msgpack-encoded frame per WebSocket message.

The first frame each way is a `Hello` (or a `Refused`, after which the stream is closed); Raft
messages, forwarded requests and pings follow. Where there is a peer secret, a `Challenge` and a
proof come before it. Nothing is ever unpickled, and a frame larger than
`MAX_FRAME_BYTES` closes the stream.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from dengine.raft.messages import Message
from dengine.raft.types import MemberId
from dengine.storage.state_records import StateDigest

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 8 * 1024 * 1024


class Hello(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Who speaks. `cluster_id` is "" while the sender has neither founded nor joined a cluster.

    `expects` is the member the dialler wants to reach (None from the acceptor): an unfounded node
    that is expected by an existing cluster learns from it that its directory was wiped.
    `dialled` is where the sender reaches, or would dial, the receiver: that tells a node which
    listens on a wildcard its own address.
    `list_digest` names the static list of a founder that waits ("" for everyone else).
    `founders` are the members of the sender's cluster: a founder that does not find itself among
    them, though they have its id, was wiped.
    `is_sole_voter`: it goes by a membership in which nobody else votes, and which is of this
    `membership_version`.
    `term` tells a leader that was deposed without knowing it that its view of the sender is old.
    `address` is "" unless the sender was configured anew and wants the cluster to know.
    """

    protocol_version: int
    command_version: int
    cluster_id: str
    member: MemberId
    boot: int
    address: str
    timeout_ms_min: int
    last_index: int
    expects: int | None = None
    dialled: str = ""
    list_digest: str = ""
    founders: tuple[MemberId, ...] = ()
    zone: str = ""
    term: int = 0
    is_sole_voter: bool = False
    membership_version: int = 0


class Refused(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Why the stream is not wanted.

    "different_lists": two founders were started with different ones.
    "removed", "wiped" (an empty directory that must not found), "rolled_back", "empty" (a voter
    without a log; it may have one by now), "sole_voter" (it takes itself for the only one, and
    others vote by now, or it lacks the entry `committed`) and "duplicate" concern the receiver's
    own identity; `membership_version` is that of the sender's committed membership;
    "again" asks for a fresh handshake; "this_node_itself" says that an address leads back to its
    dialler; "not_authenticated" is all that who does not know the peer secret is told.
    """

    reason: Literal[
        "foreign_cluster",
        "different_lists",
        "removed",
        "wiped",
        "rolled_back",
        "empty",
        "sole_voter",
        "protocol",
        "duplicate",
        "again",
        "this_node_itself",
        "not_authenticated",
    ]
    message: str
    committed: int = 0
    membership_version: int = 0


class Challenge(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The first frame each way between nodes that have a peer secret (see authentication.py)."""

    nonce: bytes


class RaftFrame(msgspec.Struct, frozen=True, tag=True, array_like=True):
    messages: tuple[Message, ...]


class ForwardRequest(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A request on its way to the leader; answered by a `ForwardReply` with the same id."""

    id: int
    op: str
    body: bytes
    timeout_ms: int


class ForwardReply(msgspec.Struct, frozen=True, tag=True, array_like=True):
    id: int
    ok: bool
    body: bytes


class Pledge(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """From a founder of a static list: it is bound to the cluster of this id, whose first members
    are these (see founding.py)."""

    cluster_id: str
    founders: tuple[MemberId, ...]


class StateReport(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """To the leader: what the sender's state was after some entries (see agreement.py)."""

    digests: tuple[StateDigest, ...]


class StateVerdict(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """From the leader: the receiver's state after `index` is wrong; `split`: nobody knows whose,
    and `final`: nobody will.
    """

    index: int
    split: bool
    final: bool = False


class Ping(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Keeps an idle stream provably alive; any frame counts as a sign of life."""


Frame = (
    Challenge
    | Hello
    | Refused
    | RaftFrame
    | ForwardRequest
    | ForwardReply
    | Pledge
    | StateReport
    | StateVerdict
    | Ping
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def encode(frame: Frame) -> bytes:
    """One frame as bytes; the caller keeps its size under `MAX_FRAME_BYTES`."""
    return _encoder.encode(frame)


def decode(data: bytes | memoryview) -> Frame:
    """Inverse of `encode`; raises `msgspec.MsgspecError` on anything that is not a frame."""
    return _decoder.decode(data)
