"""GET /v1/cluster: who is a member, how each is doing, and how many may still fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from dengine.errors import ClusterUnavailable
from dengine.node.cycle import boottime_ms
from dengine.node.promotion import Promotion
from dengine.node.status import Status
from dengine.node.transfers import Transfers, format_bytes
from dengine.raft.membership import Member, Membership
from dengine.raft.membership import Status as MemberStatus
from dengine.raft.raft import Raft
from dengine.raft.types import MemberId


class ClusterView:
    """The committed membership as this node sees it. Who is alive only a leader knows.

    Args:
        promotion: the leader's watch over its learners.
        transfers: snapshots on their way to members.
    """

    def __init__(
        self,
        raft: Raft,
        status: Status,
        promotion: Callable[[], Promotion],
        transfers: Transfers,
    ) -> None:
        self._raft = raft
        self._status = status
        self._promotion = promotion
        self._transfers = transfers

    def now(self, problem: str = "") -> dict[str, Any]:
        """The body of GET /v1/cluster without the revision.

        Args:
            problem: why no leader was asked, although this node may know of one.

        Raises:
            ClusterUnavailable: this node does not belong to a cluster yet.
        """
        raft, now_ms = self._raft, boottime_ms()
        membership = raft.committed_membership
        if not membership.voters:
            raise ClusterUnavailable(self._status.no_leader())
        tolerance, advice = self._prospects(membership, problem)
        return {
            "cluster_id": membership.cluster_id,
            "leader": leader_of(raft),
            "term": raft.term,
            "commit_index": raft.log.commit_index,
            "applied_index": raft.log.applied_index,
            "settings": msgspec.structs.asdict(membership.settings),
            "members": [self._member(membership, m, now_ms) for m in membership.members],
            "joint": membership.joint,
            "fault_tolerance": tolerance,
            "advice": advice,
        }

    def _prospects(self, membership: Membership, problem: str) -> tuple[int | None, str]:
        """How many more voters may fail before nothing can be committed any more (None: only the
        leader knows), and what to do about it.
        """
        raft = self._raft
        if problem or raft.leader is None:
            return 0, problem or self._status.no_leader()
        if not raft.is_leader:
            return None, ""
        tolerance = []
        for half in (membership.voters, membership.outgoing or membership.voters):
            alive = [v for v in half if raft.is_live(v)]
            tolerance.append(max(0, len(alive) - (len(half) // 2 + 1)))
        returning = {m.id for m in membership.learners}  # wiped: their new selves take over
        silent = {v.id for v in membership.all_voters if not raft.is_live(v)} - returning
        return min(tolerance), _advice(membership, sorted(silent))

    def _member(self, membership: Membership, member: Member, now_ms: int) -> dict[str, Any]:
        raft = self._raft
        progress = raft.progress.get(member.id)
        is_learner = member.id in membership.learners
        match = progress.match_index if progress is not None else None
        return {
            "id": member.id.id,
            "address": member.address,
            "zone": member.zone,
            "role": _role(raft, membership, member.id),
            "status": member.status.name.lower(),
            "incarnation": f"{member.id.incarnation:016x}",
            "match": match,
            "lag": None if match is None else max(0, raft.log.commit_index - match),
            "ready": raft.is_leader and self._promotion().is_ready(member.id, now_ms)
            if is_learner
            else self._alive(member.id),
            "reason": self._reason(membership, member.id, now_ms),
            "transfer": self._transfer(member.id),
        }

    def _transfer(self, member: MemberId) -> dict[str, Any] | None:
        """The snapshot on its way to a member, while there is one."""
        transfer = self._transfers.get(member.id)
        if transfer is None:
            return None
        return {
            "index": transfer.ref.index,
            "percent": transfer.percent,
            "sent_bytes": transfer.sent,
            "size_bytes": transfer.ref.size_bytes,
            "bytes_per_s": transfer.bytes_per_s,
        }

    def _alive(self, member: MemberId) -> bool | None:
        """Has the member answered this leader lately? Nobody else knows."""
        return self._raft.is_live(member) if self._raft.is_leader else None

    def _reason(self, membership: Membership, member: MemberId, now_ms: int) -> str | None:
        raft = self._raft
        if not raft.is_leader:
            return None
        transfer = self._transfers.get(member.id)
        if member in raft.offered_snapshots() and transfer is not None:
            size, rate = map(format_bytes, (transfer.ref.size_bytes, transfer.bytes_per_s))
            return f"it gets a snapshot: {transfer.percent} % of {size}, {rate}/s"
        if member in membership.learners:
            return self._promotion().reason(membership, member, now_ms)
        if self._alive(member):
            return None
        newer = any(m.id == member.id and m != member for m in membership.learners)
        if newer:
            return "its data directory was wiped; its new self takes over once it has caught up"
        progress = raft.progress.get(member)
        if progress is None or not progress.answered:
            return "it has not answered this leader yet"
        return f"it has not answered for {now_ms - progress.heard_ms} ms"


def leader_of(raft: Raft) -> dict[str, Any] | None:
    """The leader in the form that answers have."""
    if raft.leader is None:
        return None
    member = raft.membership.get(raft.leader)
    return {"id": raft.leader.id, "address": member.address if member else ""}


def _role(raft: Raft, membership: Membership, member: MemberId) -> str:
    if member == raft.leader:
        return "leader"
    if member in membership.learners:
        return "learner"
    return "candidate" if member == raft.me and raft.role == "candidate" else "follower"


def _advice(membership: Membership, silent: list[int]) -> str:
    voters = len(membership.voters)
    rising = sum(m.status is MemberStatus.PROMOTABLE for m in membership.members)
    if silent:
        names = ", ".join(str(node_id) for node_id in silent)
        return f"bring back what does not answer: node {names}"
    if voters == 1:
        return "one voter tolerates no failure: join two more nodes" if rising < 2 else ""
    if voters % 2 == 0 and not rising:
        return (
            f"{voters} voters tolerate no more failures than {voters - 1}: "
            "join one more node, or remove one"
        )
    return ""
