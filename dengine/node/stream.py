"""One WebSocket between two nodes: frames in order, a bounded send buffer, signs of life.

`send` never waits. A frame goes straight to the transport, whose own buffer is the queue: there is
no writer task to wake. The first frame of a turn of the loop is in the kernel when `send` returns;
those that follow in the same turn leave together with one system call.
"""

from __future__ import annotations

import asyncio
import errno
from typing import Protocol, cast

import aiohttp
import msgspec
from aiohttp import web

from dengine.errors import InvariantBroken
from dengine.node.wire import MAX_FRAME_BYTES, Frame, Hello, Ping, Refused, decode, encode
from dengine.raft.types import MemberId

MAX_QUEUED_BYTES = MAX_FRAME_BYTES  # a fuller buffer refuses frames
CLOSE_TIMEOUT_S = 1.0
BEAT_S = 0.25  # a stream that sent nothing for one to two beats pings
SILENT_BEATS = 12  # 3 s without a byte from the other side: the link is dead

WebSocket = web.WebSocketResponse[bool] | aiohttp.ClientWebSocketResponse[bool]

_REASONS = {
    errno.ECONNREFUSED: "refused",
    errno.EHOSTUNREACH: "no route",
    errno.ENETUNREACH: "no route",
    errno.ETIMEDOUT: "timed out",
    errno.ECONNRESET: "reset",
}


class StreamEnded(Exception):
    """The stream is over; `str()` is the short reason, `garbled` that the other side broke it."""

    def __init__(self, reason: str, *, garbled: bool = False) -> None:
        super().__init__(reason)
        self.garbled = garbled


class Sealing(Protocol):
    """Protects what travels (see authentication.py)."""

    def close(self, frame: bytes) -> bytes: ...
    def open(self, data: bytes) -> memoryview: ...


class _Cork:
    """A transport's `write`, at most one system call at once and one for the rest of the turn."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._corked = False
        self._loop = asyncio.get_running_loop()
        self.is_closing = transport.is_closing

    @property
    def unsent_bytes(self) -> int:
        return self._transport.get_write_buffer_size() + self._held_bytes

    def write(self, data: bytes) -> None:
        if self._corked:
            self._held.append(data)
            self._held_bytes += len(data)
        else:
            self._corked = True
            self._loop.call_soon(self.flush)
            self._transport.write(data)

    def flush(self) -> None:
        self._corked = False
        if self._held:
            held, self._held, self._held_bytes = self._held, [], 0
            if not self._transport.is_closing():
                self._transport.writelines(held)


class Stream:
    """A WebSocket, open and not yet trusted until `hello` and `own` are set by the handshake.

    One task owns it: it alone calls `receive`, and it ends with `await finish()`.
    """

    hello: Hello  # the other side's
    own: MemberId  # who we said we are

    def __init__(self, socket: WebSocket, dialled: str | None) -> None:
        """`dialled` is the address we called; None when the other side called us."""
        self._socket = socket
        # aiohttp has no public way from a client's WebSocket to its transport, nor to a writer
        # that does not wait; of its writer we use the transport alone.
        writer = socket._writer
        if writer is None:
            raise InvariantBroken("Stream needs a WebSocket after its handshake: prepare it first")
        self._transport = writer.transport
        self._cork = _Cork(writer.transport)
        writer.transport = cast(asyncio.Transport, self._cork)  # calls write and is_closing only
        # aiohttp must never pause its writer: `send` bounds the buffer and cannot wait.
        self._transport.set_write_buffer_limits(MAX_QUEUED_BYTES + 2 * MAX_FRAME_BYTES)
        peer = self._transport.get_extra_info("peername")
        self.remote_host = str(peer[0]) if isinstance(peer, tuple) else ""
        self.dialled = dialled
        self.seal: Sealing | None = None
        self._sent = True
        self._heard = True
        self._silent_beats = 0
        self._ending: str | None = None
        self._abort_timer: asyncio.TimerHandle | None = None
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def address(self) -> str:
        """Where the other side is: the address that worked, else the best that is known."""
        return self.dialled or self.hello.address or self.remote_host

    @property
    def quiet(self) -> bool:
        """True when pings are overdue: the other side has probably dropped this stream."""
        return self._silent_beats > 3

    def send(self, frame: Frame) -> bool:
        """Hand `frame` to the kernel, at the latest when the loop next turns.

        False: it was dropped.

        Raises:
            InvariantBroken: the frame is larger than `MAX_FRAME_BYTES`.
        """
        if self._ending or self._cork.unsent_bytes > MAX_QUEUED_BYTES:
            return False
        data = encode(frame)
        if len(data) > MAX_FRAME_BYTES:
            raise InvariantBroken(
                f"a {type(frame).__name__} of {len(data)} bytes was sent to a peer, the limit is "
                f"{MAX_FRAME_BYTES}: whoever makes it must split it"
            )
        if self.seal is not None:
            data = self.seal.close(data)
        # Uncompressed, aiohttp writes the frame before its first await, which would only wait
        # for a paused writer. So one step of the coroutine is the whole write, without a task.
        writing = self._socket.send_bytes(data)
        try:
            writing.send(None)
        except StopIteration:
            self._sent = True
        except ConnectionError:
            return False
        else:
            writing.close()
        return True

    async def receive(self) -> Frame:
        """The next frame.

        Raises:
            StreamEnded: the stream is closed, lost, or carried something that is no frame, or
                none of the other side's.
        """
        message = await self._socket.receive()
        if message.type is not aiohttp.WSMsgType.BINARY:
            raise self._ended(message.type, message.data)
        self._heard = True
        data = message.data if self.seal is None else self.seal.open(message.data)
        try:
            return decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise StreamEnded(f"sent what is no frame: {error}", garbled=True) from None

    def beat(self) -> None:
        """Called every BEAT_S: pings when idle, aborts when the other side fell silent.

        Beats are counted rather than seconds, so that a pause of our own process, in which the
        other side's bytes wait in the kernel, is one beat and not a dead link.
        """
        self._silent_beats = 0 if self._heard else self._silent_beats + 1
        if self._silent_beats >= SILENT_BEATS:
            self.abort(f"silent for {SILENT_BEATS * BEAT_S:.0f} s")
        elif not self._sent:
            self.send(Ping())
        self._heard = self._sent = False

    def refuse(self, refused: Refused) -> None:
        """Say why, then leave it to the other side to close within CLOSE_TIMEOUT_S.

        Closing first could reset the connection before the reason is read.
        """
        self.send(refused)
        self._end_within_timeout(refused.reason.replace("_", " "))

    def close(self, reason: str) -> None:
        """Flush what was sent and close, within CLOSE_TIMEOUT_S."""
        self._end_within_timeout(reason)
        self._cork.flush()
        self._transport.close()

    def abort(self, reason: str) -> None:
        """Close at once, dropping what was not yet sent."""
        self._ending = self._ending or reason
        self._transport.abort()

    async def finish(self) -> None:
        """Release everything; the owner's last call. Does not wait for the other side."""
        if self._abort_timer is not None:
            self._abort_timer.cancel()
        self.abort("closed")
        await self._socket.close()
        if not self.finished.done():
            self.finished.set_result(None)

    def _end_within_timeout(self, reason: str) -> None:
        self._ending = self._ending or reason
        if self._abort_timer is None:
            loop = asyncio.get_running_loop()
            self._abort_timer = loop.call_later(CLOSE_TIMEOUT_S, self._transport.abort)

    def _ended(self, kind: aiohttp.WSMsgType, data: object) -> StreamEnded:
        """Why a message, which is no binary one, ends the stream."""
        if self._ending:
            return StreamEnded(self._ending)
        if isinstance(data, aiohttp.WebSocketError):
            return StreamEnded(f"broke the WebSocket protocol: {data}", garbled=True)
        if kind is aiohttp.WSMsgType.TEXT:
            return StreamEnded("sent what is no frame: text", garbled=True)
        if isinstance(data, Exception):
            return StreamEnded(explain(data))
        return StreamEnded("closed by the other side")


def explain(error: Exception) -> str:
    """A network error in a word or two, for `status()` and the log."""
    if isinstance(error, (aiohttp.ClientConnectorDNSError, UnicodeError)):
        return "unresolvable"
    if isinstance(error, aiohttp.WSServerHandshakeError):
        return f"not a node (HTTP {error.status})"
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "closed by the other side"
    if isinstance(error, OSError) and error.errno in _REASONS:
        return _REASONS[error.errno]
    return str(error) or type(error).__name__
