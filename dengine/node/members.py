"""Changes of the membership that people and newcomers ask for: join, promote, remove, move.

Everything here runs on the leader; `Node` brings requests here, forwarded if need be. What Raft
allows is decided in raft/membership.py and raft/raft.py; what is wise is decided here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec

from dengine.config import Config, is_loopback, is_wildcard, parse_address
from dengine.errors import (
    Conflict,
    DengineError,
    FatalError,
    InvalidRequest,
    JoinError,
    LeaderChanged,
    NotFound,
    NotLeader,
    ProposeFailed,
    RequestTimeout,
)
from dengine.node.addresses import join_host_port
from dengine.node.cycle import Cycle, boottime_ms
from dengine.node.promotion import Promotion, PromotionRules
from dengine.node.view import leader_of
from dengine.raft.membership import (
    AddLearner,
    Change,
    Member,
    Membership,
    Promote,
    Remove,
    Settings,
    Status,
    UpdateMember,
    UpdateSettings,
)
from dengine.raft.raft import Raft
from dengine.raft.types import MemberId

log = logging.getLogger("dengine.members")

RETRY_S = 0.02  # while another change is being committed

CORRECT_EVERY_MS = 500
REPEAT_REFUSAL_MS = 60_000  # so long an unchanged refusal is not said again

C = TypeVar("C", bound=Change)
Correct = Callable[[MemberId, tuple[Member, ...]], Iterable[Member]]


class Members:
    """The leader's dealings with the membership.

    Args:
        correct: names the members whose committed address, zone or version is out of date.
    """

    def __init__(self, config: Config, cycle: Cycle, correct: Correct) -> None:
        self._config = config
        self._cycle = cycle
        self._correct = correct
        self._loop = asyncio.get_running_loop()
        self.promotion = self._fresh_promotion()
        self._correct_due_ms = 0
        self._refusal = ""
        self._repeat_refusal_ms = 0

    def _fresh_promotion(self) -> Promotion:
        election, membership = self._config.election, self._config.membership
        return Promotion(
            PromotionRules(
                catchup_entries=membership.catchup_entries,
                stable_ms=membership.stable_ms,
                heartbeat_ms=election.heartbeat_ms,
                timeout_ms_min=election.timeout_ms_min,
            )
        )

    # --- the leader's own initiative ----------------------------------------------------------

    def leadership_began(self) -> None:
        """What an earlier leadership observed says nothing about now."""
        self.promotion = self._fresh_promotion()

    def ticked(self, now_ms: int) -> None:
        """On each tick of the leader: promote who is ready, correct what is out of date."""
        raft = self._cycle.raft
        if not raft.committed_in_term:
            return
        self.promotion.observe(raft, now_ms)
        if not raft.may_propose or _change_under_way(raft):
            return
        ready = self.promotion.choose(raft.membership, now_ms)
        if ready:
            names = ", ".join(str(m.id) for m in ready)
            self._try({f"promoting to voter: {names}": Promote(ready)}, now_ms)
        elif now_ms >= self._correct_due_ms:
            self._correct_due_ms = now_ms + CORRECT_EVERY_MS
            outdated = self._correct(raft.me, raft.membership.members)
            corrections: dict[str, Change] = {
                f"member {m.id.id} is at {m.address} now and understands commands up to version "
                f"{m.command_version}": UpdateMember(m)
                for m in outdated
            }
            self._try(corrections, now_ms)

    def _try(self, changes: dict[str, Change], now_ms: int) -> None:
        """Propose, on own initiative, the first change that is not refused, and say its name.

        What is refused is tried again on a later tick, and named once and then once a minute.
        """
        refusals = []
        for name, change in changes.items():
            try:
                self._cycle.raft.propose_membership(change)
            except FatalError:
                raise
            except DengineError as error:
                refusals.append(f"{name}: not yet: {error.message}")
                continue
            log.info("%s", name)
            return
        refusal = "; ".join(refusals)
        if refusal and (refusal != self._refusal or now_ms >= self._repeat_refusal_ms):
            log.warning("%s", refusal)
            self._refusal, self._repeat_refusal_ms = refusal, now_ms + REPEAT_REFUSAL_MS

    # --- requests --------------------------------------------------------------------------------

    async def handle(self, op: str, args: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Carry out one request on this leader.

        Args:
            op: "join", "remove", "update", "promote", "transfer" or "settings".
            args: its arguments, validated in shape by the API.
        """
        match op:
            case "join":
                return await self._join(args, deadline)
            case "remove":
                return await self._remove(args["id"], deadline)
            case "update":
                return await self._update(args, deadline)
            case "promote":
                return await self._promote(args["ids"], deadline)
            case "transfer":
                return await self._transfer(args["id"], deadline)
            case "settings":
                return await self._settings(args, deadline)
        raise InvalidRequest(f"no such operation: {op}")

    async def _join(self, args: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Idempotent: a member that asks again is told that it is one.

        A directory that belongs to another cluster is refused before anything is changed.
        """
        member_id = MemberId(args["id"], int(args["incarnation"], 16))
        address = _reachable(args["address"], args.get("observed_host"))
        status = Status[args.get("status", "promotable").upper()]
        member = Member(
            member_id, address, args.get("zone", ""), status, args.get("command_version", 1)
        )
        raft = self._cycle.raft
        ours, theirs = raft.membership.cluster_id, args.get("cluster_id", "")
        if theirs not in ("", ours):
            raise JoinError(
                f"foreign cluster: the directory of node {member_id.id} belongs to cluster "
                f"{theirs}, this is cluster {ours}: correct initial_cluster or db_root_dir"
            )
        in_use = self._cycle.command_version
        if member.command_version < in_use:
            raise JoinError(
                f"node {member_id.id} understands commands up to version "
                f"{member.command_version}, the cluster uses {in_use}: upgrade it first"
            )

        def added(membership: Membership) -> Change:
            if membership.get(member_id) is None:
                self._require_silent_twin(raft, member_id)
            return AddLearner(member)

        known = raft.membership.get(member_id)
        # One that has moved did so before it learned that it is a member.
        if known is None or _has_moved(known.address, address):
            await self.change(added, deadline)
        membership = raft.committed_membership
        return {
            "cluster_id": membership.cluster_id,
            "leader": leader_of(raft),
            "members": [{"id": m.id.id, "address": m.address} for m in membership.members],
        }

    def _require_silent_twin(self, raft: Raft, newcomer: MemberId) -> None:
        """A copied file or directory must not evict a living node of the same id."""
        silence_ms = 2 * self._config.election.timeout_ms_max
        for twin in raft.membership.find(newcomer.id):
            if raft.heard_within(twin.id, silence_ms):
                raise JoinError(
                    f"node {newcomer.id} is alive at {twin.address} with another data directory: "
                    "give the newcomer an id of its own, or stop the other one and wait "
                    f"{silence_ms / 1000:g} s"
                )

    async def _remove(self, node_id: int, deadline: float) -> dict[str, Any]:
        raft = self._cycle.raft
        if not raft.membership.find(node_id):
            await self._settled(deadline)
        if not raft.membership.find(node_id):
            if raft.membership.was_removed(node_id):
                return {"id": node_id, "removed": True}
            raise NotFound(f"node {node_id} is not a member of this cluster")
        await self.change(lambda _: Remove(node_id), deadline)
        return {"id": node_id, "removed": True}

    async def _update(self, args: dict[str, Any], deadline: float) -> dict[str, Any]:
        def updated(membership: Membership) -> UpdateMember:
            known = membership.find(args["id"])
            if not known:
                raise NotFound(f"node {args['id']} is not a member of this cluster")
            member = max(known, key=lambda m: m.id in membership.learners)  # newest incarnation
            status = Status[args["status"].upper()] if "status" in args else member.status
            return UpdateMember(
                msgspec.structs.replace(
                    member,
                    address=args.get("address", member.address),
                    zone=args.get("zone", member.zone),
                    status=status,
                )
            )

        member = (await self.change(updated, deadline)).member
        return {
            "id": member.id.id,
            "address": member.address,
            "zone": member.zone,
            "status": member.status.name.lower(),
        }

    async def _promote(self, ids: list[int], deadline: float) -> dict[str, Any]:
        """Promote at an operator's word: several at once, and also what `odd` would hold back."""
        raft, now_ms = self._cycle.raft, boottime_ms()
        learners = {m.id: m for m in raft.membership.learners}
        voters = {v.id for v in raft.membership.voters}
        wanted: list[MemberId] = []
        for node_id in ids:
            learner = learners.get(node_id)
            if learner is None:
                if node_id in voters:
                    continue
                raise NotFound(f"node {node_id} is not a member of this cluster")
            if not self.promotion.is_ready(learner, now_ms):
                reason = self.promotion.reason(raft.membership, learner, now_ms)
                raise Conflict(f"node {node_id} is not ready to vote: {reason}")
            wanted.append(learner)
        if wanted:
            await self.change(lambda _: Promote(tuple(wanted)), deadline)
        await self._settled(deadline)
        return {
            "promoted": [m.id for m in wanted],
            "voters": sorted(v.id for v in raft.membership.voters),
        }

    async def _settled(self, deadline: float) -> None:
        """Wait until the membership in force is committed, and no joint one: what it says is done.

        Raises:
            LeaderChanged: this node does not lead any more, and it may not come to be.
            RequestTimeout: not in time.
        """
        raft = self._cycle.raft
        while raft.membership.joint or raft.membership != raft.committed_membership:
            if not raft.is_leader:
                raise LeaderChanged(
                    "leadership changed while the membership did", outcome="unknown"
                )
            self._require_time(deadline)
            await asyncio.sleep(RETRY_S)

    async def _transfer(self, node_id: int, deadline: float) -> dict[str, Any]:
        raft = self._cycle.raft
        target = next((v for v in raft.membership.voters if v.id == node_id), None)
        if target is None:
            if not raft.membership.find(node_id):
                raise NotFound(f"node {node_id} is not a member of this cluster")
            raise Conflict(f"node {node_id} is a learner: promote it before it can lead")
        await self._cycle.act(lambda r: r.transfer_leadership(target))
        while raft.leader != target:
            self._require_time(deadline)
            if raft.may_propose:
                raise ProposeFailed(
                    f"node {node_id} did not take over within one election timeout; "
                    f"node {raft.me.id} leads on",
                    outcome="unknown",  # what it was told may still be on its way
                )
            if not raft.is_leader and raft.leader is not None:
                raise ProposeFailed(f"node {raft.leader.id} was elected instead of {node_id}")
            await asyncio.sleep(RETRY_S)
        return {"leader": node_id}

    async def _settings(self, args: dict[str, Any], deadline: float) -> dict[str, Any]:
        def updated(membership: Membership) -> UpdateSettings:
            now = msgspec.structs.asdict(membership.settings)
            return UpdateSettings(msgspec.convert({**now, **args}, Settings))

        change = await self.change(updated, deadline)
        return {"settings": msgspec.structs.asdict(change.settings)}

    async def hand_over(self, deadline: float) -> None:
        """Leadership goes to the live voter whose log is longest: this node is about to stop.

        What hinders that is said, and no reason not to stop.
        """
        raft = self._cycle.raft
        heirs = [v for v in raft.membership.voters if v != raft.me and raft.is_live(v)]
        if not heirs:
            return  # nobody is there to lead
        heir = max(heirs, key=lambda v: (raft.progress[v].match_index, -v.id))
        try:
            await self._transfer(heir.id, deadline)
        except DengineError as error:
            log.warning("leadership was not handed over: %s", error.message)

    async def change(self, make: Callable[[Membership], C], deadline: float) -> C:
        """Propose a change, behind any other that is under way, and wait until it is applied.

        Args:
            make: the change to the membership that it is given; called in the turn that proposes
                it, so that nothing can come between. Whatever it raises refuses the request.

        Returns:
            The change that was made.

        Raises:
            Conflict, JoinError: refused.
            NotLeader, LeaderChanged: leadership is gone.
            RequestTimeout: not committed in time; the outcome is unknown.
        """

        def propose(raft: Raft) -> C | None:
            if not raft.may_propose:
                raise NotLeader(f"node {raft.me.id} does not lead any more")
            if _change_under_way(raft):
                return None
            change = make(raft.membership)
            log_id = raft.propose_membership(change)
            if log_id is None:
                applied.set_result(None)
            else:
                self._cycle.proposals.watch(log_id, applied, deadline)
            return change

        applied: asyncio.Future[None] = self._loop.create_future()
        while (proposed := await self._cycle.act(propose)) is None:
            self._require_time(deadline, "none")
            await asyncio.sleep(RETRY_S)
        await applied
        return proposed

    def _require_time(self, deadline: float, outcome: Any = "unknown") -> None:
        if self._loop.time() >= deadline:
            raise RequestTimeout(
                "the change was not finished in time; see GET /v1/cluster",
                outcome=outcome,
            )


def _change_under_way(raft: Raft) -> bool:
    return (
        not raft.committed_in_term
        or raft.membership.joint
        or raft.membership_index > raft.log.commit_index
    )


def _has_moved(known: str, asked: str) -> bool:
    """Does a member ask from another address than the committed one? Of a wildcard only the port
    says something: the host was, or will be, put in by the leader.
    """
    if is_wildcard(asked):
        return parse_address(known)[1] != parse_address(asked)[1]
    return known != asked


def _reachable(address: str, observed_host: str | None) -> str:
    """Replace a wildcard by where the request came from, when that was another machine."""
    if observed_host is None or not is_wildcard(address):
        return address
    seen = join_host_port(observed_host, parse_address(address)[1])
    return address if is_loopback(seen) else seen
