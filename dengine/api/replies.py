"""The JSON of answers whose fields may be null, left out, or one of several: as OpenAPI has it.

Nothing is encoded with these, for a dict is faster. Answers without such fields are described by
their example alone.
"""

from __future__ import annotations

from typing import Literal

import msgspec

UNSET = msgspec.UNSET
Unset = msgspec.UnsetType


# --- keys -----------------------------------------------------------------------------------------


class ItemReply(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A key: in base64 what is no UTF-8, and without its value where only keys were asked for."""

    key: str | Unset = UNSET
    key_base64: str | Unset = UNSET
    value: str | Unset = UNSET
    value_base64: str | Unset = UNSET
    mod_revision: int
    create_revision: int
    version: int
    ttl: int | None
    lease: str | None


class PageReply(msgspec.Struct, forbid_unknown_fields=True):
    revision: int
    items: list[ItemReply]
    count: int
    next: str | None


class KeyBase64(msgspec.Struct, forbid_unknown_fields=True):
    """A key that is no UTF-8."""

    key_base64: str


class LeaseReply(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    ttl: int
    remaining: int
    keys: list[str | KeyBase64]


# --- transactions ---------------------------------------------------------------------------------


class PutReply(msgspec.Struct, forbid_unknown_fields=True, tag_field="op", tag="put"):
    created: bool


class GetReply(msgspec.Struct, forbid_unknown_fields=True, tag_field="op", tag="get"):
    item: ItemReply | None


class DeleteReply(msgspec.Struct, forbid_unknown_fields=True, tag_field="op", tag="delete"):
    deleted: int


class DeleteRangeReply(
    msgspec.Struct, forbid_unknown_fields=True, tag_field="op", tag="delete_range"
):
    deleted: int


class TxnReply(msgspec.Struct, forbid_unknown_fields=True):
    revision: int
    succeeded: bool
    results: list[PutReply | GetReply | DeleteReply | DeleteRangeReply]


# --- the cluster and its nodes --------------------------------------------------------------------


class NodeReply(msgspec.Struct, forbid_unknown_fields=True):
    id: int
    address: str


class JoinReply(msgspec.Struct, forbid_unknown_fields=True):
    cluster_id: str
    leader: NodeReply | None
    members: list[NodeReply]


class TransferReply(msgspec.Struct, forbid_unknown_fields=True):
    """A snapshot on its way to a member."""

    index: int
    percent: int
    sent_bytes: int
    size_bytes: int
    bytes_per_s: int


class MemberReply(msgspec.Struct, forbid_unknown_fields=True):
    """A member; null is what only a leader knows, or nobody."""

    id: int
    address: str
    zone: str
    role: str
    status: str
    incarnation: str
    match: int | None
    lag: int | None
    ready: bool | None
    reason: str | None
    transfer: TransferReply | None


class SettingsReply(msgspec.Struct, forbid_unknown_fields=True):
    promotion: Literal["immediate", "odd"]
    history_revisions: int
    history_bytes: int
    idempotency_window_s: int


class ClusterReply(msgspec.Struct, forbid_unknown_fields=True):
    cluster_id: str
    leader: NodeReply | None
    term: int
    commit_index: int
    applied_index: int
    revision: int
    settings: SettingsReply
    members: list[MemberReply]
    joint: bool
    fault_tolerance: int | None
    advice: str


class ReadyReply(msgspec.Struct, forbid_unknown_fields=True):
    """`checks`: where asked for."""

    status: str
    checks: dict[str, bool] | Unset = UNSET


class StatusReply(msgspec.Struct, forbid_unknown_fields=True):
    node_id: int
    incarnation: str
    cluster_id: str
    version: str
    role: str
    term: int
    leader: NodeReply | None
    commit_index: int
    last_applied: int
    last_index: int
    first_index: int
    revision: int
    compact_revision: int
    log_time_ms: int
    leases: int
    voters: list[int]
    learners: list[int]
    proposals: int
    pending_writes: int
    watchers: int
    uptime_s: float


class SnapshotReply(msgspec.Struct, forbid_unknown_fields=True):
    index: int
    term: int
    sha256: str
    size_bytes: int
    taken_at_s: int
    file: str


class SnapshotsReply(msgspec.Struct, forbid_unknown_fields=True):
    """`job`: what is being done about snapshots now."""

    snapshots: list[SnapshotReply]
    job: str | None
    taken: int
    failures: int
    last_error: str | None
    purged_index: int
