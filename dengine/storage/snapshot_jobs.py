"""What a node and its snapshot writer say to each other, as JSON: a job in, events out."""

from __future__ import annotations

import msgspec

from dengine.raft.types import SnapshotRef
from dengine.security import Secrets


class Credentials(msgspec.Struct, frozen=True):
    """What a member that is asked for a file may want to be shown. Only ever written to stdin:
    arguments and environment of a process can be read by others.
    """

    peer_secret: bytes | None = None
    token: str | None = None

    @staticmethod
    def of(secrets: Secrets) -> Credentials:
        peer = secrets.peer
        return Credentials(None if peer is None else peer.reveal(), secrets.token)

    def __repr__(self) -> str:
        return "Credentials(...)"


class Take(msgspec.Struct, frozen=True, tag=True):
    """Write the state in `state`, which a node may be using, to a file in `directory`."""

    state: str
    directory: str
    node_id: int
    chunk_bytes: int
    max_bytes_per_s: int


class Verify(msgspec.Struct, frozen=True, tag=True):
    """Read a whole file and check every part of it."""

    file: str
    max_bytes_per_s: int


class Check(msgspec.Struct, frozen=True, tag=True):
    """Read all of the state in `state`, which a node may be using, and check every record."""

    state: str


class Unpack(msgspec.Struct, frozen=True, tag=True):
    """Check a file and unpack it into the new directory `state`."""

    file: str
    state: str
    max_bytes_per_s: int | None = None  # as fast as it can, where a node waits for it


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Get a file from another member, or go on with it, and unpack it into `state`."""

    address: str  # host:port
    ref: SnapshotRef
    receiver: int  # node id, so that the sender can say who is served
    cluster_id: str
    directory: str
    state: str
    credentials: Credentials = Credentials()


class Progress(msgspec.Struct, frozen=True, tag=True):
    done_bytes: int
    total_bytes: int


class Done(msgspec.Struct, frozen=True, tag=True):
    """Of a `Check`: the state, and what it has applied, without a SHA-256."""

    file: str
    ref: SnapshotRef
    taken_at_s: int  # Unix time, as the file says


class Failed(msgspec.Struct, frozen=True, tag=True):
    exit_code: int  # of the class of the error, see dengine/errors.py
    message: str


Job = Take | Verify | Check | Unpack | Fetch
Event = Progress | Done | Failed
_jobs: msgspec.json.Decoder[Job] = msgspec.json.Decoder(Job)
_events: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
decode_job = _jobs.decode
decode_event = _events.decode
encode_job = encode_event = msgspec.json.encode
