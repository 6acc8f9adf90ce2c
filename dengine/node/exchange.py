"""What travels between this node and its peers, and what each frame sets off here.

Raft messages go to the cycle, forwarded requests are carried out, refusals concern our identity.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, Protocol

import orjson

from dengine.config import Config
from dengine.errors import (
    DengineError,
    FatalError,
    IdentityError,
    NotLeader,
    RateLimited,
    StorageIO,
    TryAgain,
)
from dengine.kv.commands import Result, encode_result
from dengine.node.addresses import AddressBook
from dengine.node.admission import Admission
from dengine.node.agreement import Agreement
from dengine.node.cycle import Cycle, boottime_ms
from dengine.node.forwarding import Forwarding, refusal
from dengine.node.founding import Founding, pledge_of
from dengine.node.peers import Peers
from dengine.node.wire import (
    ForwardReply,
    ForwardRequest,
    Frame,
    Hello,
    Pledge,
    RaftFrame,
    Refused,
    StateReport,
    StateVerdict,
)
from dengine.raft.messages import AppendRequest, Message
from dengine.raft.types import MemberId
from dengine.security import PeerSecret
from dengine.storage.directory import DataDirectory

log = logging.getLogger("dengine.exchange")

FRAME_ENTRIES_BYTES = 4 * 1024 * 1024  # of entries per frame; a single larger one travels alone
SERVED_MAX = 1000  # forwarded requests other than writes that are under way here
DUPLICATE_MS = 10_000  # so long may a stale stream of our own hide a restart


class Services(Protocol):
    """What a leader does for the followers that forward requests to it."""

    def write_here(self, data: bytes, deadline: float) -> asyncio.Future[Result]:
        """Queue an encoded command."""
        ...

    def lead_here(
        self, op: str, args: dict[str, Any], deadline: float
    ) -> Awaitable[dict[str, Any]]:
        """Carry out a membership operation."""
        ...


class Exchange:
    """The streams to the peers and everything that arrives on them."""

    def __init__(
        self,
        config: Config,
        directory: DataDirectory,
        cycle: Cycle,
        book: AddressBook,
        founding: Founding,
        services: Services,
        agreement: Agreement,
        secret: PeerSecret | None,
    ) -> None:
        self._directory = directory
        self._cycle = cycle
        self._raft = cycle.raft
        self._book = book
        self._founding = founding
        self._services = services
        self._agreement = agreement
        self._loop = asyncio.get_running_loop()
        self._duplicate_since_ms: int | None = None
        self._promise: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.admission = Admission(
            config,
            directory,
            cycle.raft,
            book,
            founding,
            connected=lambda node_id: self.peers.connected(node_id),
            fail=cycle.fail,
        )
        self.peers = Peers(
            hello=self.admission.hello,
            admit=self.admission.admit,
            on_refused=self._on_refused,
            on_connected=self._on_connected,
            on_frame=self._on_frame,
            on_disconnected=self._on_disconnected,
            secret=secret,
        )
        self.forwarding = Forwarding(self.peers.send, directory.boot)

    async def close(self) -> None:
        if self._promise is not None:
            self._promise.cancel()
        for task in self._tasks:
            task.cancel()
        await self.peers.close()

    # --- out ------------------------------------------------------------------------------------

    def send(self, to: MemberId, messages: list[Message]) -> bool:
        """Raft messages to one member, in frames of bounded size; False when they are lost."""
        frame: list[Message] = []
        size = 0
        for message in messages:
            if isinstance(message, AppendRequest):
                added = sum(len(entry.data) for entry in message.entries)
                if size + added > FRAME_ENTRIES_BYTES and frame:
                    if not self.peers.send(to, RaftFrame(tuple(frame))):
                        return False
                    frame, size = [], 0
                size += added
            frame.append(message)
        return self.peers.send(to, RaftFrame(tuple(frame)))

    def set_targets(self) -> None:
        """Dial everyone the membership names; before there is one, everyone the file names."""
        membership, me = self._raft.membership, self._raft.me
        targets: dict[int, list[str]] = {}
        waits_outside = self._founding.is_joiner and not self._directory.identity.cluster_id
        if not membership.members and not waits_outside:
            targets = dict(self._book.bootstrap(me.id))
        # Of a wiped voter and its new self, a learner, the new one is there to be dialled.
        for member in sorted(membership.members, key=lambda m: m.id in membership.learners):
            if member.id.id != me.id:
                targets[member.id.id] = self._book.dial(member.id.id, member.address)
        self.peers.set_targets(targets)

    def tell_pledge(self) -> None:
        """To all founders that are there, as it is told to those that come later."""
        for node_id in self._founding.others:
            hello = self.peers.connected(node_id)
            if hello is not None:
                self._tell_pledge_to(hello.member)

    def _tell_pledge_to(self, member: MemberId) -> None:
        pledge = self._founding.pledge
        if pledge is not None and not self._directory.identity.cluster_id:
            self.peers.send(member, pledge_of(pledge))

    def errors(self, node_ids: list[int]) -> str:
        """Why each of `node_ids` that has no stream cannot be reached."""
        status = self.peers.status()
        return "; ".join(
            f"node {i} ({status[i].address}) {status[i].error or 'is being dialled'}"
            if i in status
            else f"node {i} has not been heard of"
            for i in node_ids
            if i not in status or not status[i].connected
        )

    # --- in -------------------------------------------------------------------------------------

    def _on_connected(self, hello: Hello) -> None:
        self._duplicate_since_ms = None
        self._tell_pledge_to(hello.member)
        self._cycle.wake()

    def _on_disconnected(self, member: MemberId) -> None:
        self._raft.report_unreachable(member)
        self.forwarding.disconnected(member)

    def _on_frame(self, sender: MemberId, frame: Frame) -> None:
        if isinstance(frame, Pledge):
            self._founding.pledged(sender, frame)
            return
        if not self._directory.identity.cluster_id:
            # It has founded the cluster already: a new handshake will tell us so.
            self.peers.disconnect(sender.id, Refused("again", "not part of the cluster yet"))
            return
        match frame:
            case RaftFrame(messages):
                self._cycle.receive(messages)
            case ForwardRequest(op="write"):
                self._serve_write(sender, frame)
            case ForwardRequest() if len(self._tasks) >= SERVED_MAX:
                busy = RateLimited(f"the leader is busy with {SERVED_MAX} such requests already")
                self.peers.send(sender, refusal(frame.id, busy))
            case ForwardRequest():
                task = self._loop.create_task(self._serve(sender, frame))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case ForwardReply():
                self.forwarding.replied(frame)
            case StateReport(digests):
                self._agreement.reported(sender, digests, boottime_ms())
            case StateVerdict():
                self._agreement.judged(sender, frame)

    def _serve_write(self, sender: MemberId, request: ForwardRequest) -> None:
        """A write that a follower forwarded; answered from a callback, without a task."""
        deadline = self._loop.time() + request.timeout_ms / 1000
        try:
            if not self._raft.is_leader:
                raise NotLeader(f"node {self._raft.me.id} does not lead")
            future = self._services.write_here(request.body, deadline)
        except DengineError as error:
            self.peers.send(sender, refusal(request.id, error))
            return

        def answer(done: asyncio.Future[Result]) -> None:
            if done.cancelled():
                return
            error = done.exception()
            if error is None:
                reply = ForwardReply(request.id, True, encode_result(done.result()))
            else:
                reply = refusal(request.id, _as_dengine_error(error))
            self.peers.send(sender, reply)

        future.add_done_callback(answer)

    async def _serve(self, sender: MemberId, request: ForwardRequest) -> None:
        """Any other forwarded request."""
        deadline = self._loop.time() + request.timeout_ms / 1000
        try:
            if not self._raft.is_leader:
                raise NotLeader(f"node {self._raft.me.id} does not lead")
            args = orjson.loads(request.body)
            answer = await self._services.lead_here(request.op, args, deadline)
            reply = ForwardReply(request.id, True, orjson.dumps(answer))
        except Exception as error:
            reply = refusal(request.id, _as_dengine_error(error))
        self.peers.send(sender, reply)

    def _on_refused(self, node_id: int | None, refused: Refused) -> None:
        """A peer does not want us: most reasons concern our own identity and end the process."""
        match refused.reason:
            case "removed" if self._concerns(refused):
                self._directory.set_removed(refused.message)
                self._cycle.fail(IdentityError(f"{refused.message}; it will not start again"))
            case "wiped":
                self._cycle.fail(IdentityError(refused.message))
            case "rolled_back":
                self._cycle.fail(self.quarantine(refused.message))
            case "empty" if not self._raft.log.stable_index:  # else what told us so was late
                self._cycle.fail(self.quarantine(refused.message))
            case "sole_voter" if self._lacks_what_is_committed(refused):
                self._cycle.fail(self.quarantine(refused.message))
            case "duplicate":
                self._suspect_duplicate(refused.message)

    def _concerns(self, refused: Refused) -> bool:
        """Else it is an old copy that has led by itself, and removed us who were not there."""
        return refused.membership_version >= self._raft.committed_membership.version

    def _lacks_what_is_committed(self, refused: Refused) -> bool:
        """Else it was not us who were behind but our Hello."""
        raft = self._raft
        return raft.membership.is_sole_voter(raft.me) and (
            (raft.membership.version, raft.log.stable_index)
            < (refused.membership_version, refused.committed)
        )

    def _suspect_duplicate(self, message: str) -> None:
        """Our own stream from before a restart may linger; another living node does not go away."""
        now_ms = boottime_ms()
        if self._duplicate_since_ms is None:
            self._duplicate_since_ms = now_ms
        elif now_ms - self._duplicate_since_ms > DUPLICATE_MS:
            self._cycle.fail(
                IdentityError(
                    f"{message}: stop this one, or give it an id and directory of its own"
                )
            )

    def keep_promise(self) -> None:
        """From the time on for which what was promised before this start is kept
        (`opening.raft_config`) only what is promised now counts.
        """
        promised_s = self._directory.identity.stickiness_ms / 1000
        self._promise = self._loop.call_later(promised_s, self._promise_less)

    def _promise_less(self) -> None:
        with suppress(StorageIO):  # to keep the longer promise is always right
            self._directory.set_stickiness(self._raft.config.timeout_ms_min)

    def halt(self, error: FatalError) -> None:
        """End the process, and every later one that would use this directory."""
        with suppress(StorageIO):
            self._directory.halt(error)
        self._cycle.fail(error)

    def quarantine(self, reason: str) -> FatalError:
        """An old copy of the directory has broken its promises: continue as a new incarnation."""
        if self._raft.membership.is_sole_voter(self._raft.me):
            # What it has led alone since then is in its log, and contradicts the cluster's. The
            # next start may find nobody who tells it so.
            old_copy = IdentityError(f"{reason}; empty it, and set role = 3 to join")
            with suppress(StorageIO):
                self._directory.halt(old_copy)
            return old_copy
        self._directory.reincarnate()
        return TryAgain(f"{reason}; it was set aside, and the next start joins as a new learner")


def _as_dengine_error(error: BaseException) -> DengineError:
    if isinstance(error, DengineError):
        return error
    log.error("unexpected %s: %s", type(error).__name__, error)
    return DengineError("unexpected error in the leader", outcome="unknown")
