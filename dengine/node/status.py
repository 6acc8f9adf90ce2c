"""What a node says of itself without asking anybody: status, readiness, why there is no leader."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dengine import __version__
from dengine.node.proposals import Proposals
from dengine.raft.raft import Raft
from dengine.storage.state_store import StateStore


@dataclass(frozen=True, slots=True)
class Readiness:
    ready: bool
    reasons: list[str]
    checks: dict[str, bool]


class Status:
    """Reads of the parts it is made of; it keeps nothing but the time of its making.

    Args:
        peer_errors: says for node ids why each cannot be reached, "" when all can.
    """

    def __init__(
        self,
        raft: Raft,
        state: StateStore,
        proposals: Proposals,
        peer_errors: Callable[[list[int]], str],
    ) -> None:
        self._raft = raft
        self._state = state
        self._proposals = proposals
        self._peer_errors = peer_errors
        self._started = time.monotonic()

    @property
    def leader(self) -> tuple[int, str] | None:
        """Id and announced address of the leader as far as known."""
        leader = self._raft.leader
        if leader is None:
            return None
        member = self._raft.membership.get(leader)
        return leader.id, member.address if member is not None else ""

    @property
    def lag(self) -> int | None:
        """Entries known to be committed and not applied here; None while no leader is heard."""
        if self._raft.leader is None:
            return None
        return self._raft.log.commit_index - self._raft.log.applied_index

    def readiness(self, *, running: bool) -> Readiness:
        """Can this node answer reads and writes now?"""
        raft = self._raft
        checks = {
            "member": raft.committed_membership.get(raft.me) is not None,
            "leader": raft.leader is not None and (not raft.is_leader or raft.committed_in_term),
            "state": not (raft.state_lost or raft.state_wrong),
            "running": running,
        }
        reasons = []
        if not checks["member"]:
            reasons.append("not a member of a cluster yet")
        elif not checks["leader"]:
            reasons.append(self.no_leader())
        if raft.state_wrong:
            reasons.append("its state is wrong and is being replaced")
        elif raft.state_lost and checks["member"]:
            reasons.append("its state is lost and waits for a snapshot from the leader")
        if not running:
            reasons.append("stopping")
        return Readiness(not reasons, reasons, checks)

    def local(self) -> dict[str, Any]:
        """The body of GET /v1/status."""
        raft, membership = self._raft, self._raft.committed_membership
        is_learner = raft.me not in membership.all_voters
        leader, totals = self.leader, self._state.totals
        return {
            "node_id": raft.me.id,
            "incarnation": f"{raft.me.incarnation:016x}",
            "cluster_id": membership.cluster_id,
            "version": __version__,
            "role": "learner" if is_learner else str(raft.role),
            "term": raft.term,
            "leader": None if leader is None else {"id": leader[0], "address": leader[1]},
            "commit_index": raft.log.commit_index,
            "last_applied": raft.log.applied_index,
            "last_index": raft.log.last_index,
            "first_index": raft.log.first_index,
            "revision": self._state.revision,
            "compact_revision": totals.history_first - 1 if totals else self._state.revision,
            "log_time_ms": raft.clock_ms,
            "leases": totals.leases if totals else 0,
            "voters": [v.id for v in membership.voters],
            "learners": [m.id for m in membership.learners],
            "proposals": self._proposals.total,
            "pending_writes": self._proposals.count,
            "uptime_s": round(time.monotonic() - self._started, 3),
        }

    def no_leader(self) -> str:
        """Why nothing can be answered: which voters are missing, and why each."""
        membership = self._raft.membership
        if not membership.voters:
            return "this node does not belong to a cluster yet"
        others = sorted({v.id for v in membership.all_voters} - {self._raft.me.id})
        missing = self._peer_errors(others)
        if self._raft.state_lost:  # it votes, but its own log may be too new for those it votes for
            missing = "; ".join(filter(None, [missing, "the state of this node is lost"]))
        if not missing:
            return "no leader is elected yet; try again in a moment"
        if len(membership.voters) == 2:
            missing += (
                "; two voters need each other: bring it back, or, if its data directory is lost, "
                "see what `dengine repair --config FILE` could keep"
            )
        return f"no leader; {missing}"
