"""Who belongs to the cluster: one record, and the pure function that changes it.

A CONFIG entry carries the whole `Membership`, so a node needs only the newest one. It is in force
from the moment it is appended (thesis 4.1) and falls back when that entry is truncated.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Literal

import msgspec

from dengine.errors import Conflict, JoinError
from dengine.raft.types import MemberId


class Status(enum.IntEnum):
    PROMOTABLE = 0  # a learner that becomes a voter once it has caught up
    READ_ONLY = 1  # a learner for good
    ACTIVE = 2  # a voter


class Member(msgspec.Struct, frozen=True):
    id: MemberId
    address: str  # "host:port" as announced; may be a wildcard, which is good on one machine only
    zone: str = ""
    status: Status = Status.PROMOTABLE
    command_version: int = 1  # newest command format this member understands


class Settings(msgspec.Struct, frozen=True):
    """Replicated settings: what steers promotion and apply must be equal on every node."""

    promotion: Literal["immediate", "odd"] = "immediate"
    history_revisions: int = 100_000
    history_bytes: int = 268_435_456
    idempotency_window_s: int = 600


class Membership(msgspec.Struct, frozen=True):
    """Voters, outgoing voters (only while joint), learners; every tuple sorted by `MemberId`.

    `members` describes everyone named in the three sets. `tombstones` are incarnations that will
    never be let in again; a node id all of whose incarnations are tombstones is used up.
    `version` counts the changes of who votes: of two committed ones it tells which is the newer,
    also where a snapshot hides at which entry they were made. What one voter can change alone does
    not count, for an old copy of it can do so, too.
    """

    cluster_id: str = ""
    voters: tuple[MemberId, ...] = ()
    outgoing: tuple[MemberId, ...] = ()
    learners: tuple[MemberId, ...] = ()
    members: tuple[Member, ...] = ()
    tombstones: tuple[MemberId, ...] = ()
    settings: Settings = Settings()
    version: int = 0

    @property
    def joint(self) -> bool:
        return bool(self.outgoing)

    @property
    def all_voters(self) -> frozenset[MemberId]:
        """Everyone whose vote or acknowledgement can count: both halves of a joint state."""
        return frozenset(self.voters) | frozenset(self.outgoing)

    def is_sole_voter(self, member: MemberId) -> bool:
        return self.voters == (member,) and not self.outgoing

    def get(self, member: MemberId) -> Member | None:
        return next((m for m in self.members if m.id == member), None)

    def find(self, node_id: int) -> tuple[Member, ...]:
        """Every incarnation of `node_id`; two while a wiped voter waits to be swapped back in."""
        return tuple(m for m in self.members if m.id.id == node_id)

    def was_removed(self, node_id: int) -> bool:
        """True when `node_id` was used once and nobody carries it any more."""
        return not self.find(node_id) and any(t.id == node_id for t in self.tombstones)

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)


_decoder = msgspec.msgpack.Decoder(Membership)


def decode_membership(data: bytes) -> Membership:
    """Inverse of `Membership.encode`; raises msgspec.DecodeError on anything else."""
    return _decoder.decode(data)


def found(cluster_id: str, members: Iterable[Member], settings: Settings) -> Membership:
    """The first membership of a cluster: every founder is a voter."""
    founders = tuple(
        sorted(
            (msgspec.structs.replace(m, status=Status.ACTIVE) for m in members),
            key=lambda m: m.id,
        )
    )
    return Membership(
        cluster_id=cluster_id,
        voters=tuple(m.id for m in founders),
        members=founders,
        settings=settings,
    )


class AddLearner(msgspec.Struct, frozen=True, tag=True):
    member: Member


class Promote(msgspec.Struct, frozen=True, tag=True):
    """Learners to voters, all in one change. A promoted incarnation replaces its older self."""

    ids: tuple[MemberId, ...]


class Remove(msgspec.Struct, frozen=True, tag=True):
    """Every incarnation of `node_id` leaves, and the id is used up."""

    node_id: int


class UpdateMember(msgspec.Struct, frozen=True, tag=True):
    """New address, zone, status or command version of a member; its role stays (etcd #21694)."""

    member: Member


class UpdateSettings(msgspec.Struct, frozen=True, tag=True):
    settings: Settings


class LeaveJoint(msgspec.Struct, frozen=True, tag=True):
    """Second half of joint consensus: the outgoing voters go (thesis 4.3)."""


Change = AddLearner | Promote | Remove | UpdateMember | UpdateSettings | LeaveJoint


def apply_change(old: Membership, change: Change) -> Membership:
    """The membership after `change`; equal to `old` when there is nothing to do.

    Raises:
        JoinError: the newcomer may not join.
        Conflict: any other refusal; the message says why and what to do.
    """
    if old.joint and not isinstance(change, LeaveJoint):
        raise Conflict("a membership change is under way (joint); try again when it is done")
    new = _changed(old, change)
    if new == old:
        return old
    same = (new.voters, new.outgoing) == (old.voters, old.outgoing)
    return new if same else msgspec.structs.replace(new, version=old.version + 1)


def _changed(old: Membership, change: Change) -> Membership:
    match change:
        case AddLearner(member):
            return _add_learner(old, member)
        case Promote(ids):
            return _promote(old, ids)
        case Remove(node_id):
            return _remove(old, node_id)
        case UpdateMember(member):
            return _update_member(old, member)
        case UpdateSettings(settings):
            return msgspec.structs.replace(old, settings=settings)
        case LeaveJoint():
            return _rebuild(old, old.voters, old.learners, old.members, ())


def _add_learner(old: Membership, member: Member) -> Membership:
    known = old.get(member.id)
    if known is not None and known.address == member.address:
        return old
    if member.id in old.tombstones or old.was_removed(member.id.id):
        raise JoinError(
            f"node {member.id.id} was removed from this cluster and ids are never reused: "
            "clear its directory and give it a new node_id",
            removed=True,
        )
    taken = next(
        (m for m in old.members if m.address == member.address and m.id.id != member.id.id), None
    )
    if taken is not None:
        raise JoinError(f"address {member.address} already belongs to node {taken.id.id}")
    if known is not None:
        return _update_member(old, msgspec.structs.replace(known, address=member.address))
    if member.status is Status.ACTIVE:
        raise JoinError("a new member joins as a learner: its status is promotable or read_only")
    replaced = {m for m in old.learners if m.id == member.id.id}
    learners = [m for m in old.learners if m not in replaced] + [member.id]
    return _rebuild(old, old.voters, learners, (*old.members, member), ())


def _promote(old: Membership, ids: tuple[MemberId, ...]) -> Membership:
    if not ids:
        raise Conflict("name at least one learner to promote")
    for member_id in ids:
        member = old.get(member_id)
        if member is None or member_id not in old.learners:
            raise Conflict(f"node {member_id.id} is not a learner of this cluster")
        if member.status is Status.READ_ONLY:
            raise Conflict(f"node {member_id.id} is read_only: set it promotable first")
    promoted = {m.id for m in ids}
    voters = [v for v in old.voters if v.id not in promoted] + sorted(set(ids))
    learners = [m for m in old.learners if m not in ids]
    members = [
        msgspec.structs.replace(m, status=Status.ACTIVE) if m.id in ids else m for m in old.members
    ]
    return _rebuild(old, voters, learners, members, _outgoing(old.voters, voters))


def _remove(old: Membership, node_id: int) -> Membership:
    if not old.find(node_id):
        return old
    voters = [v for v in old.voters if v.id != node_id]
    learners = [m for m in old.learners if m.id != node_id]
    if not voters:
        raise Conflict(f"node {node_id} is the last voter: a cluster cannot be without one")
    return _rebuild(old, voters, learners, old.members, _outgoing(old.voters, voters))


def _update_member(old: Membership, member: Member) -> Membership:
    known = old.get(member.id)
    if known is None:
        raise Conflict(f"node {member.id.id} is not a member of this cluster")
    is_voter = member.id in old.voters
    if is_voter != (member.status is Status.ACTIVE):
        raise Conflict(
            f"node {member.id.id} is a {'voter' if is_voter else 'learner'}: "
            "its status cannot be set to that; promote or remove it instead"
        )
    taken = next(
        (m for m in old.members if m.address == member.address and m.id.id != member.id.id), None
    )
    if taken is not None:
        raise Conflict(f"address {member.address} already belongs to node {taken.id.id}")
    members = [member if m.id == member.id else m for m in old.members]
    return msgspec.structs.replace(old, members=tuple(members))


def _outgoing(old: Iterable[MemberId], new: Iterable[MemberId]) -> tuple[MemberId, ...]:
    """Single-server changes overlap by themselves (4.1); any larger one goes through joint (4.3).

    One plain entry from {1} to {1,2,3} would have disjoint majorities, {1} and {2,3}.
    """
    return tuple(old) if len(set(old) ^ set(new)) > 1 else ()


def _rebuild(
    old: Membership,
    voters: Iterable[MemberId],
    learners: Iterable[MemberId],
    members: Iterable[Member],
    outgoing: tuple[MemberId, ...],
) -> Membership:
    """Sort, and bury every incarnation that no longer appears in any of the three sets."""
    named = {*voters, *learners, *outgoing}
    known = sorted(members, key=lambda m: m.id)
    buried = {m.id for m in known if m.id not in named}
    return Membership(
        cluster_id=old.cluster_id,
        voters=tuple(sorted(voters)),
        outgoing=tuple(sorted(outgoing)),
        learners=tuple(sorted(learners)),
        members=tuple(m for m in known if m.id in named),
        tombstones=tuple(sorted({*old.tombstones, *buried})),
        settings=old.settings,
        version=old.version,
    )
