"""Requests on their way to the leader over the peer stream, and the answers on their way back.

One hop at most: a node that gets a forwarded request and does not lead answers "not leader".
Nothing in here sends twice; when the stream breaks before the answer, the outcome is unknown. Only
`Node` asks again, and only what was answered with outcome none (ARCHITECTURE.md, "Decisions").
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import orjson

from dengine.errors import (
    ClusterUnavailable,
    DengineError,
    LeaderChanged,
    RequestTimeout,
    from_dict,
)
from dengine.node.wire import ForwardReply, ForwardRequest, Frame
from dengine.raft.types import MemberId

Send = Callable[[MemberId, Frame], bool]


class _Asked(NamedTuple):
    to: MemberId
    future: asyncio.Future[bytes]
    deadline: float


class Forwarding:
    """Questions this node has sent to the leader, by id.

    Args:
        send: puts a frame on the stream to a member; False when there is none.
        boot: of this process. Ids count from there: the answer to a question of the process before
            may come late, on a stream of ours, and must not be taken for one to a question of ours.
    """

    def __init__(self, send: Send, boot: int) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._next_id = boot
        self._asked: dict[int, _Asked] = {}

    async def ask(self, to: MemberId, op: str, body: bytes, deadline: float) -> bytes:
        """Have `to` carry out `op` and return its answer.

        Raises:
            ClusterUnavailable: there is no stream to `to`; nothing was sent.
            LeaderChanged, RequestTimeout: no answer came; the outcome is unknown.
            DengineError: whatever `to` answered.
        """
        self._next_id += 1
        timeout_ms = max(1, int((deadline - self._loop.time()) * 1000))
        if not self._send(to, ForwardRequest(self._next_id, op, body, timeout_ms)):
            raise ClusterUnavailable(f"there is no connection to the leader, node {to.id}")
        future: asyncio.Future[bytes] = self._loop.create_future()
        asked_id = self._next_id
        self._asked[asked_id] = _Asked(to, future, deadline)
        try:
            return await future
        finally:
            self._asked.pop(asked_id, None)

    def replied(self, reply: ForwardReply) -> None:
        asked = self._asked.pop(reply.id, None)
        if asked is None or asked.future.done():
            return
        if reply.ok:
            asked.future.set_result(reply.body)
        else:
            asked.future.set_exception(from_dict(orjson.loads(reply.body)))

    def disconnected(self, member: MemberId) -> None:
        """The stream to `member` broke: what it was asked may or may not have happened."""
        for asked in self._asked.values():
            if asked.to == member and not asked.future.done():
                asked.future.set_exception(
                    LeaderChanged(
                        f"the connection to the leader, node {member.id}, broke before it answered",
                        outcome="unknown",
                    )
                )

    def expire(self, now: float) -> None:
        for asked in self._asked.values():
            if asked.deadline <= now and not asked.future.done():
                asked.future.set_exception(
                    RequestTimeout(f"the leader, node {asked.to.id}, did not answer in time")
                )


def refusal(request_id: int, error: DengineError) -> ForwardReply:
    """`error` as the answer to a forwarded request."""
    return ForwardReply(request_id, False, orjson.dumps(error.to_dict()))
