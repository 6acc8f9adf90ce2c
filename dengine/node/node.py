"""One node: the data directory, the cycle, the streams to its peers, and what the API calls.

The life of a node: `open` (lock and load) -> the server binds the port -> `run` (found or join a
cluster, then serve) -> `stop` (hand leadership over, drain, sync).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import orjson

from dengine.config import Config
from dengine.errors import (
    ClusterUnavailable,
    DataCorruption,
    DengineError,
    FatalError,
    IdentityError,
    LeaderChanged,
)
from dengine.kv.commands import Effect, Result
from dengine.node import announcing
from dengine.node.addresses import AddressBook
from dengine.node.agreement import Agreement
from dengine.node.cycle import Cycle, boottime_ms
from dengine.node.entrance import Entrance
from dengine.node.exchange import Exchange
from dengine.node.founding import Founding
from dengine.node.leading import AtLeader
from dengine.node.lifetimes import Lifetimes
from dengine.node.members import Members
from dengine.node.metrics import NodeMetrics
from dengine.node.opening import last_clock, opening, raft_config
from dengine.node.proposals import Proposals
from dengine.node.reads import Reads
from dengine.node.snapshots import Snapshots
from dengine.node.status import Readiness, Status
from dengine.node.view import ClusterView
from dengine.node.watch_hub import Selection, Watch, WatchHub
from dengine.node.watchers import MembershipWatchers
from dengine.node.wire import Refused
from dengine.node.writes import OnceKey, Writes
from dengine.raft.membership import Membership
from dengine.raft.messages import Message
from dengine.raft.raft import Raft, Ready, Restore, Transition
from dengine.raft.types import Entry, MemberId, SnapshotRef
from dengine.security import Secrets
from dengine.storage.marks import forget_run
from dengine.storage.recovery import after_damage

log = logging.getLogger("dengine.node")

SWEEP_MS = 100
DISK_CHECK_MS = 1000
REPORT_MS = 10_000
HANDOVER_S = 3.0
DISK_STOP_S = 10.0
FAREWELL_S = 0.5  # lets the last answers leave before a removed node is cut off


class Node:
    """A member of a cluster, or about to become one.

    Args:
        config: validated configuration.

    Raises:
        ConfigError: a file of [security] is not acceptable.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.secrets = Secrets.read(config.security, config.source)
        self._loop = asyncio.get_running_loop()
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._sweep_due_ms = self._disk_due_ms = 0
        self._report_due_ms = boottime_ms() + REPORT_MS
        self._watchers = MembershipWatchers()
        self._leaders = MembershipWatchers()

    # --- life ---------------------------------------------------------------------------------

    async def open(self) -> None:
        """Lock the data directory and load what is in it. Nothing is served or sent yet.

        Raises:
            FatalError: locked by another process, removed from its cluster, damaged, ...
        """
        with opening(self.config) as (self._directory, self._log_store, self.state):
            identity = self._directory.identity  # another incarnation, if the log was replaced
            self.raft = self._load_raft(MemberId(identity.node_id, identity.incarnation))
            self._announce_above = self.raft.log.commit_index
            self.raft.learn_clock(*last_clock(self._log_store, self.state))
            if not identity.cluster_id and self.raft.log.last_index:  # founding was interrupted
                self._directory.set_cluster_id(self.raft.membership.cluster_id)
            announcing.membership_loaded(self.raft.membership, self.config.cluster.initial_cluster)
            self._build()

    def _load_raft(self, me: MemberId) -> Raft:
        hard_state, memberships = self._log_store.load()
        return Raft(
            raft_config(self.config, self._directory, me),
            self._log_store,
            hard_state,
            memberships,
            self.state.applied.index,
            random.Random(os.urandom(16)),
            boottime_ms(),
        )

    def _build(self) -> None:
        """Put the parts together: streams -> cycle -> state, and what answers beside them."""
        config, limits, raft = self.config, self.config.limits, self.raft
        self._proposals = Proposals(limits.pending_writes, limits.pending_bytes)
        self._reads = Reads(raft.me, self._directory.boot, config.election.timeout_ms_max / 1000)
        self._cycle = Cycle(
            raft, self._log_store, self.state, self, proposals=self._proposals, reads=self._reads
        )
        self._book = AddressBook(config)
        self._founding = Founding(config, raft.me, self._directory.boot, self._directory.pledge)
        self.snapshots = Snapshots(
            config,
            self._directory,
            self._cycle,
            self._log_store,
            self.state,
            lead=self._lead,
            source=self._addresses,
            secrets=self.secrets,
            distrusted=lambda: self.hub.distrusted(),
        )
        self._agreement = Agreement(
            raft,
            self.state,
            grace_ms=2 * config.election.timeout_ms_max,
            send=lambda to, frame: self.peers.send(to, frame),
            distrust=lambda why, at: self.snapshots.distrust(why, files_too=True, index=at),
            fail=self.fail,
            halt=lambda error: self._exchange.halt(error),
            propose_time=self._cycle.propose_time,
        )
        self._exchange = Exchange(
            config,
            self._directory,
            self._cycle,
            self._book,
            self._founding,
            self,
            self._agreement,
            self.secrets.peer,
        )
        self.peers = self._exchange.peers
        self._members = Members(config, self._cycle, self._exchange.admission.outdated)
        self._entrance = Entrance(
            config,
            self._directory,
            self._cycle,
            self._founding,
            self._book,
            self.secrets,
            peer_errors=self._exchange.errors,
            tell_pledge=self._exchange.tell_pledge,
            belongs=self._exchange.set_targets,
        )
        self._status = Status(raft, self.state, self._proposals, self._exchange.errors)
        self._view = ClusterView(
            raft, self._status, lambda: self._members.promotion, self.snapshots.files.transfers
        )
        self._at_leader = AtLeader(raft, self._status)
        self.writes = Writes(
            limits, self._cycle, self._at_leader, self._exchange.forwarding, self.snapshots.room
        )
        self.lifetimes = Lifetimes(raft, self.state)
        self.hub = WatchHub(self.state, limits.watchers, self.fail)
        self._metrics = NodeMetrics(self.local_status, raft, self.snapshots)
        self.metrics = self._metrics.registry
        self.metrics_observe_request = self._metrics.observe_request

    async def run(self) -> None:
        """Found or join a cluster, then serve until `stop`.

        Raises:
            FatalError: the process must end with its exit code.
        """
        self._cycle.start()
        self._exchange.set_targets()
        self.snapshots.start()
        self._exchange.keep_promise()
        entering = self._loop.create_task(self._entrance.enter(), name="enter the cluster")
        ends: set[asyncio.Future[Any]] = {self._cycle.failed, self.peers.failed, self._stopped}
        ends.add(entering)
        try:
            while not self._stopped.done():
                done, ends = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for ended in done:
                    ended.result()
        except DataCorruption as error:
            await self._close(clean=False)
            raise after_damage(error, self._directory, self.raft.membership) from error
        except BaseException:
            await self._close(clean=False)
            raise
        finally:
            entering.cancel()

    async def stop(self) -> None:
        """Hand leadership over, end the cycle, and leave a state that the next start trusts."""
        if self.raft.is_leader and len(self.raft.membership.voters) > 1:
            await self._members.hand_over(self._loop.time() + HANDOVER_S)
        await self._cycle.keep_time(HANDOVER_S)
        await self._close(clean=True)

    def fail(self, error: FatalError) -> None:
        """End the process: something outside of the cycle found what must not be."""
        self._cycle.fail(error)

    async def _close(self, *, clean: bool) -> None:
        if self._stopped.done():
            return
        self._stopped.set_result(None)
        self._watchers.close()
        self._leaders.close()
        await self.hub.close()
        await self.snapshots.stop()
        clean = clean and not self.snapshots.distrusts_state
        written = self._cycle.stop(DISK_STOP_S)
        await self._exchange.close()
        if written and clean:
            forget_run(self.state.path)
            self.state.sync()
        self.state.close()
        if written:
            self._log_store.close()
            if clean:
                self._directory.mark_clean()
            self._directory.close()
        # Else the last write may still reach the disk: the lock ends with the process, not before.

    # --- requests -----------------------------------------------------------------------------

    async def write(self, command: Effect, deadline: float, once: OnceKey | None = None) -> Result:
        """Commit `command` through the leader; see `Writes.write`."""
        return await self.writes.write(command, deadline, once)

    def write_here(self, data: bytes, deadline: float) -> asyncio.Future[Result]:
        """Queue an encoded command on this node, which leads or is about to be refused."""
        return self.writes.write_here(data, deadline)

    async def watch(
        self, selection: Selection, first: int | None, *, prev: bool, deadline: float
    ) -> Watch:
        """Follow the changes of some keys.

        Args:
            first: the first revision that is wanted; None: what comes from now on.
            prev: with what was there before.

        Raises:
            Compacted, WatchOverflow, ClusterUnavailable: refused.
        """
        await self.writes.version_2_applied("a watch", deadline)
        if first is None or first > self.state.revision:
            await self.read_barrier("linearizable", deadline)
        self.snapshots.require_trusted()
        return self.hub.open(selection, first, prev=prev)

    async def read_barrier(self, consistency: str, deadline: float) -> None:
        """Return once a local read of `state` is as fresh as `consistency` asks for.

        Args:
            consistency: "linearizable", "lease" or "eventual".
        """
        self.snapshots.require_trusted()
        rebuilt_at = max(1, self._announce_above, self.snapshots.installer.forgotten_at)
        if consistency == "eventual" and self.raft.log.applied_index >= rebuilt_at:
            return  # a state that is being rebuilt would take readers back in time
        while True:
            if self.raft.leader is not None:
                future: asyncio.Future[None] = self._loop.create_future()
                self._reads.add(future, deadline, lease=consistency == "lease")
                self._cycle.wake()
                try:
                    await future
                    if self.raft.log.applied_index >= self.snapshots.installer.forgotten_at:
                        return self.snapshots.require_trusted()  # still, and nobody replaced it
                except LeaderChanged:
                    await self._at_leader.pause(deadline)
            await self._at_leader.known(deadline)

    async def lead_here(self, op: str, args: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Carry out an operation of the leader on this node, which leads."""
        if op == "snapshot_turn":
            return self.snapshots.grant_turn(args)
        if op == "view":
            return self._view.now()
        return await self._members.handle(op, args, deadline)

    async def _lead(self, op: str, args: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Have the leader carry out a membership operation."""

        async def forward(leader: MemberId) -> dict[str, Any]:
            answer = await self._exchange.forwarding.ask(leader, op, orjson.dumps(args), deadline)
            decoded: dict[str, Any] = orjson.loads(answer)
            return decoded

        return await self._at_leader.do(
            lambda: self.lead_here(op, args, deadline), forward, deadline
        )

    async def cluster_view(self, deadline: float) -> dict[str, Any]:
        """GET /v1/cluster: as the leader sees it, or as this node does while there is none.

        Raises:
            ClusterUnavailable: this node does not belong to a cluster yet.
        """
        if self.raft.leader is None:
            return self.view_here(self._status.no_leader())
        try:
            view = await self._lead("view", {}, deadline)
        except ClusterUnavailable as error:
            return self.view_here(error.message)
        return {**view, "revision": self.state.revision}

    async def join(
        self, body: dict[str, Any], observed_host: str | None, deadline: float
    ) -> dict[str, Any]:
        return await self._lead("join", {**body, "observed_host": observed_host}, deadline)

    async def remove_member(self, node_id: int, deadline: float) -> dict[str, Any]:
        return await self._lead("remove", {"id": node_id}, deadline)

    async def update_member(
        self, node_id: int, body: dict[str, Any], deadline: float
    ) -> dict[str, Any]:
        return await self._lead("update", {**body, "id": node_id}, deadline)

    async def promote(self, ids: list[int], deadline: float) -> dict[str, Any]:
        return await self._lead("promote", {"ids": ids}, deadline)

    async def transfer_leader(self, node_id: int, deadline: float) -> dict[str, Any]:
        return await self._lead("transfer", {"id": node_id}, deadline)

    async def change_settings(self, body: dict[str, Any], deadline: float) -> dict[str, Any]:
        return await self._lead("settings", body, deadline)

    def membership_events(self) -> AsyncIterator[dict[str, Any]]:
        """The membership now, then after every committed change."""
        return self._watchers.follow(self.view_here())

    def leadership_events(self) -> AsyncIterator[dict[str, Any]]:
        """`leader` (an id or None) and `is_leader` now, then whenever the leader is another one."""
        return self._leaders.follow(self._leadership())

    def _leadership(self) -> dict[str, Any]:
        leader = self.raft.leader
        return {"leader": leader.id if leader else None, "is_leader": self.raft.is_leader}

    def view_here(self, problem: str = "") -> dict[str, Any]:
        """The cluster without asking its leader, and why not. Raises as `cluster_view`."""
        return {**self._view.now(problem), "revision": self.state.revision}

    # --- what others see ----------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return not (self._stopped.done() or self._cycle.failed.done())

    @property
    def is_leader(self) -> bool:
        return self.raft.is_leader and self.running

    @property
    def turns(self) -> int:
        """Turns of the cycle so far; a node whose number stands still is stuck."""
        return self._cycle.turns

    @property
    def leader(self) -> tuple[int, str] | None:
        """Id and announced address of the leader as far as known."""
        return self._status.leader

    @property
    def lag(self) -> int | None:
        """Entries known to be committed and not applied here; None while no leader is heard."""
        return self._status.lag

    def readiness(self) -> Readiness:
        """Can this node answer reads and writes now?"""
        return self._status.readiness(running=self.running)

    def local_status(self) -> dict[str, Any]:
        """GET /v1/status: this node alone, without asking anybody."""
        return {**self._status.local(), "watchers": self.hub.count}

    # --- what the cycle reports ---------------------------------------------------------------

    def send(self, to: MemberId, messages: list[Message]) -> bool:
        return self._exchange.send(to, messages)

    def role_changed(self, transition: Transition) -> None:
        announcing.role_changed(self.raft.me, transition)
        if self.raft.is_leader:
            self._members.leadership_began()
            self._agreement.leadership_began()

    def leader_changed(self) -> None:
        if self.raft.leader is not None:
            self._report_due_ms = boottime_ms() + REPORT_MS
            self._at_leader.found()
        self._leaders.publish(self._leadership())

    def membership_committed(self, index: int, old: Membership, new: Membership) -> None:
        me = self.raft.me
        buried = set(new.tombstones) - set(old.tombstones)
        # Whoever goes is cut off a moment later, so that the last answers still arrive.
        self._loop.call_later(FAREWELL_S if buried else 0.0, self._exchange.set_targets)
        if index > self._announce_above:
            announcing.membership_committed(me, old, new, self.raft.term)
        self._watchers.publish(self.view_here())
        own = new.get(me)
        if own is not None and own.address == self._book.own:
            self._directory.set_address(own.address)
            self._exchange.admission.announcing = False
        for member in buried - {me}:
            if new.was_removed(member.id):
                message = f"node {member.id} was removed from cluster {new.cluster_id}"
                farewell = Refused("removed", message, membership_version=new.version)
                self._loop.call_later(FAREWELL_S, self.peers.disconnect, member.id, farewell)
        if me in buried:
            message = f"node {me.id} was removed from cluster {new.cluster_id}"
            self._directory.set_removed(message)
            error = IdentityError(f"{message}; it will not start again")
            self._loop.call_later(FAREWELL_S, self._cycle.fail, error)

    def ticked(self, now_ms: int) -> None:
        """A few times per heartbeat: the leader's duties, deadlines, the disk, the report."""
        if self.raft.is_leader:
            self._members.ticked(now_ms)
        if now_ms < self._sweep_due_ms:
            return
        self._sweep_due_ms = now_ms + SWEEP_MS
        now = self._loop.time()
        self._proposals.expire(now)
        self._reads.expire(now)
        self._exchange.forwarding.expire(now)
        self.snapshots.ticked()
        self._agreement.ticked(now_ms)
        if now_ms >= self._disk_due_ms:
            self._disk_due_ms = now_ms + DISK_CHECK_MS
            self.writes.look_at_disk()
        if now_ms >= self._report_due_ms:
            self._report_due_ms = now_ms + REPORT_MS
            if self.raft.leader is None and self.raft.membership.voters:
                log.warning("%s", self._status.no_leader())

    def wrote(self, seconds: float, entries: int) -> None:
        self._metrics.log_write_seconds.observe(seconds)
        self._metrics.entries_written.inc(entries)

    def applied(self, entries: Sequence[Entry]) -> None:
        self.hub.applied()
        self.snapshots.applied(entries)
        self._agreement.applied(boottime_ms())

    def snapshot_offered(self, sender: MemberId, ref: SnapshotRef) -> None:
        self.snapshots.offered(sender, ref)

    def persist_restore(self, ready: Ready) -> None:
        self.snapshots.persist_restore(ready)

    def restored(self, restore: Restore) -> None:
        self.snapshots.restored(restore)
        self.hub.applied()

    async def _addresses(self, member: MemberId) -> list[str]:
        """Where `member` can be dialled, best first; empty when it is not a known one."""
        if not self._known_addresses(member):  # perhaps it joined after our log ended
            with suppress(DengineError):
                view = await self._lead("view", {}, self._loop.time() + 1)
                self._book.told({m["id"]: m["address"] for m in view["members"]})
        return self._known_addresses(member)

    def _known_addresses(self, member: MemberId) -> list[str]:
        known = self.raft.membership.get(member)
        return self._book.source(member.id, known.address if known is not None else None)

    def rolled_back(self) -> None:
        raise self._exchange.quarantine(
            "the leader counts on entries that this log does not have: it is an old copy"
        )
