"""One client connection: aiohttp's HTTP/1.1 parser and keep-alive loop, with our limits around it.

aiohttp's `web.Server` parses and keeps the connection; what it would do next costs more than a
whole PUT (a full `web.Request` and `web.Response` are half of its time, and it starts a task for
every request). So a request here is five slots over the parsed message, all requests of a
connection run in its one task, and a response is bytes that were put together once.

Every limit (docs/reference.md) that a slow or oversized *sender* can hit is enforced in this file
(parsing.py has those that the parser knows); all refusals are the JSON of `DengineError.to_dict`.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

import orjson
from aiohttp import web
from aiohttp.http import StreamWriter
from aiohttp.web_protocol import ERROR, _ErrInfo

from dengine.api.head import STATUS_LINES, date_line
from dengine.api.parsing import (
    MAX_HEADER_BYTES,
    MAX_HEADER_FIELDS,
    MAX_URI_BYTES,
    is_oversized,
    parser_error,
)
from dengine.errors import DengineError, InvalidRequest, MethodNotAllowed, RateLimited

if TYPE_CHECKING:
    from aiohttp.http_parser import RawRequestMessage
    from aiohttp.streams import StreamReader

    from dengine.security import Answer

log = logging.getLogger("dengine.api")

HEADER_TIMEOUT_S = 5.0
IDLE_TIMEOUT_S = 75.0
LINGER_S = 2.0  # how long the rest of a refused request is read, so that the refusal arrives
WRITE_STALL_S = 30.0  # for a client to take
SLICE_BYTES = 64 * 1024  # so much of its response
MAX_CONNECTIONS = 16_384
SPARE_FILES = 128  # descriptors kept for the disk and for peers when the limit is lower


class Request:
    """A parsed request: what a handler needs and aiohttp's loop touches, and nothing else.

    The route table fills in `tail`, the raw rest of the path behind a route's prefix, and
    `params`, the decoded query, before a handler is called.
    """

    __slots__ = ("lost", "message", "params", "payload", "proof", "protocol", "tail")

    tail: str
    params: dict[str, bytes]

    def __init__(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: Connection,
    ) -> None:
        self.message = message
        self.payload = payload
        self.protocol = protocol
        self.lost: asyncio.Future[None] | None = None  # see `until_left`
        self.proof: Answer | None = None  # of the node that sent it, once that is certain

    @property
    def remote(self) -> str | None:
        """The host this request came from, None when the connection is gone."""
        peer = self.protocol.peername
        return str(peer[0]) if isinstance(peer, tuple) else None

    def until_left(self) -> asyncio.Future[None]:
        """What ends when the client leaves. An answer without an end begins with this, for whoever
        sends no more may wait for an answer, but has left a stream.

        Raises:
            ConnectionResetError: it has left already.
        """
        if self.protocol.half_closed:
            raise ConnectionResetError("the client has left")
        self.lost = asyncio.get_running_loop().create_future()
        return self.lost

    def as_aiohttp(self) -> web.BaseRequest:
        """The same request as aiohttp knows it, for WebSockets and event streams."""
        loop = asyncio.get_running_loop()
        return web.BaseRequest(
            self.message,
            self.payload,
            self.protocol,
            StreamWriter(self.protocol, loop),
            cast("asyncio.Task[None]", asyncio.current_task()),
            loop,
        )

    def _finish(self) -> None:
        """aiohttp calls this when the handler is done; there is nothing to release."""

    def _cancel(self, error: BaseException) -> None:
        """aiohttp calls this when the connection is lost: whoever reads the body wakes up."""
        self.payload.set_exception(error)
        if self.lost is not None and not self.lost.done():
            self.lost.set_result(None)


class Response:
    """A complete response: status line, headers and body in as few copies as possible.

    Args:
        headers: further header lines, each ended by CRLF, in bytes.
        close: end the connection after this response.
    """

    __slots__ = ("body", "close", "headers", "keep_alive", "status")

    def __init__(
        self, status: int, body: bytes = b"", headers: bytes = b"", *, close: bool = False
    ) -> None:
        self.status = status
        self.body = body
        self.headers = headers
        self.close = close
        self.keep_alive = True

    async def prepare(self, request: Request) -> None:
        """Write everything to the transport (aiohttp's hook; called once).

        Raises:
            ConnectionResetError: the client has gone; aiohttp's loop ends the connection.
        """
        protocol = request.protocol
        transport = protocol.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client closed the connection")
        # A body nobody will read ends the connection: a client must not take it for reusable.
        hang_up = self.close or not request.payload.is_eof()
        last = hang_up or protocol.ending or request.message.should_close
        data = self._encode(request, last)
        if hang_up or len(data) <= SLICE_BYTES:
            transport.write(data)
        else:
            await _write_slices(protocol, transport, data)
        if hang_up:
            protocol.hang_up()
        elif protocol.writing_paused:
            await taken(protocol, _drain(protocol))

    async def write_eof(self) -> None:
        """aiohttp's second hook; `prepare` has written all there is."""

    def _encode(self, request: Request, last: bool) -> bytes:
        message, body, status = request.message, self.body, self.status
        connection = b""
        if last:
            self.keep_alive = False
            connection = b"Connection: close\r\n"
        elif message.version.minor == 0:
            connection = b"Connection: keep-alive\r\n"
        # RFC 9110 8.6: neither of these two carries a Content-Length.
        length = b"" if status in (204, 304) else b"Content-Length: %d\r\n" % len(body)
        if message.method == "HEAD":
            body = b""
        return b"%b%b%b%b%b\r\n%b" % (
            STATUS_LINES[status],
            date_line(),
            length,
            connection,
            self.headers,
            body,
        )


async def taken(protocol: Connection, write: Awaitable[object]) -> None:
    """Await one write of at most SLICE_BYTES, give or take, in WRITE_STALL_S.

    A client that reads nothing is cut off: a connection that is only closed waits, for ever, until
    the last byte has been taken.

    Raises:
        ConnectionResetError: it has been cut off, or has gone.
    """
    try:
        async with asyncio.timeout(WRITE_STALL_S):
            await write
    except TimeoutError:
        protocol.abort()
        raise ConnectionResetError("the client stopped reading its response") from None


async def _drain(protocol: Connection) -> None:
    await StreamWriter(protocol, asyncio.get_running_loop()).drain()


async def _write_slices(
    protocol: Connection, transport: asyncio.WriteTransport, data: bytes
) -> None:
    view = memoryview(data)
    for start in range(0, len(data), SLICE_BYTES):
        if transport.is_closing():
            raise ConnectionResetError("the client closed the connection")
        transport.write(view[start : start + SLICE_BYTES])
        if protocol.writing_paused:
            await taken(protocol, _drain(protocol))


_JSON = b"Content-Type: application/json\r\n"


def json_response(body: Any, status: int = 200, headers: bytes = b"") -> Response:
    """`body` (anything orjson encodes) as a JSON response."""
    return Response(status, orjson.dumps(body), _JSON + headers)


def error_response(error: DengineError, *, close: bool = False, headers: bytes = b"") -> Response:
    """The JSON for `error`, with Retry-After where a later attempt makes sense, and Allow."""
    if error.status in (429, 503):
        headers += b"Retry-After: 1\r\n"
    elif isinstance(error, MethodNotAllowed):
        headers += b"Allow: %b\r\n" % error.details["allow"].encode()
    return Response(error.status, orjson.dumps(error.to_dict()), _JSON + headers, close=close)


class Server(web.Server):
    """aiohttp's server with `Connection` as the protocol of every accepted socket.

    Args:
        name_leader: fills in the `leader` of an error, where one is known.
        allowed: the methods that a request target takes; it raises NotFound.
    """

    def __init__(
        self,
        handler: Any,
        name_leader: Callable[[DengineError], None],
        allowed: Callable[[str], str],
    ) -> None:
        super().__init__(handler)
        self.name_leader = name_leader
        self.allowed = allowed
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.max_connections = max(1, min(MAX_CONNECTIONS, files - SPARE_FILES))

    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop)

    @property
    def full(self) -> bool:
        return len(self._connections) >= self.max_connections


class Connection(web.RequestHandler):
    """aiohttp's protocol plus a deadline for headers, a total header size and JSON errors."""

    __slots__ = ("_header_timer", "_last_payload", "_requests_seen", "half_closed", "oversized")

    def __init__(self, manager: web.Server, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            manager,
            loop=loop,
            keepalive_timeout=IDLE_TIMEOUT_S,
            # None is what switches the access log off, though aiohttp's annotation forbids it.
            access_log=cast(logging.Logger, None),
            logger=log,
            max_line_size=MAX_URI_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            max_headers=MAX_HEADER_FIELDS,
            lingering_time=0,  # `hang_up` does it better
            auto_decompress=False,
        )
        self._header_timer: asyncio.TimerHandle | None = None
        self._last_payload: StreamReader | None = None
        self._requests_seen = 0
        self.half_closed = False  # the client sends no more
        self.oversized = False  # a header larger than allowed as a whole has come in

    @property
    def busy(self) -> bool:
        """True while a request is being answered or waits for its turn."""
        return self._request_in_progress or bool(self._messages)

    @property
    def ending(self) -> bool:
        """True when the connection closes after the response under way."""
        said_all = self.half_closed and not self._messages
        return self._close or self._force_close or said_all

    @property
    def _between(self) -> bool:
        """True when no body is under way."""
        return self._last_payload is None or self._last_payload.is_eof()

    @property
    def upgraded(self) -> bool:
        """True once this connection carries a WebSocket."""
        return self._payload_parser is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        server = cast(Server, self._manager)
        if not server.full:
            super().connection_made(transport)
            return
        self.transport = cast(asyncio.Transport, transport)
        self._refuse(
            RateLimited(f"{server.max_connections} connections are open: close some or try later")
        )

    def connection_lost(self, exc: BaseException | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        between = self._between  # before: these bytes may be the last of a body
        super().data_received(data)
        if self._payload_parser is not None:
            return
        if self._request_count != self._requests_seen:
            self._requests_seen = self._request_count
            if self._messages:
                self._last_payload = self._messages[-1][1]
                if len(data) > MAX_HEADER_BYTES or self._header_timer is not None:
                    self.oversized |= any(is_oversized(message) for message, _ in self._messages)
            self._disarm()
        elif data and self._header_timer is None and not self._force_close and between:
            self._arm()  # bytes that complete no header and belong to no body: half a header

    def eof_received(self) -> bool:  # type: ignore[override]  # aiohttp's ends every connection
        """The client sends no more, and may still listen: True keeps the connection, as long as an
        answer is owed that ends. Each of these has its deadline, so this has one, too.
        """
        self.half_closed = True
        if self._last_payload is not None and not self._last_payload.is_eof():
            self._last_payload.set_exception(ConnectionResetError("the body will not be complete"))
        request = cast("Request | None", self._current_request)
        if request is not None and request.lost is not None:
            return False
        return self._request_in_progress or (bool(self._messages) and not self._force_close)

    async def start(self) -> None:
        """Answer one request after the other: the task of this connection.

        Stands in for aiohttp's, which starts a task for every request so that each has context
        variables of its own: nobody here has any.
        """
        try:
            while not self.ending:
                if not self._messages:
                    await self._next_message()
                if not await self._answer(*self._take_message()):
                    break
        except asyncio.CancelledError:
            self.force_close()
            raise
        except Exception:
            log.exception("a connection died of a bug")
            self.force_close()
        if not self._force_close:
            self._task_handler = None
            if self.transport is not None:
                self.transport.close()
                self._bound_flush(self.transport)

    async def _next_message(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _take_message(self) -> tuple[Any, StreamReader]:
        message, payload = self._messages.popleft()
        if self._parser is not None:
            self._parser.message_consumed()
        if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
            self._resume_reading_if_drained()
        return message, payload

    async def _answer(self, message: Any, payload: StreamReader) -> bool:
        """Have one request answered; False when the connection ends with it."""
        handler: Any = self._request_handler
        if isinstance(message, _ErrInfo):  # what the parser makes of bytes that are no request
            handler, message = self._make_error_handler(message), ERROR
        # aiohttp's annotations name its own request and response, hence Any; it uses of them only
        # what `Request` and `Response` have.
        request: Any = Request(message, payload, self)
        try:
            response, lost = await self._handle_request(request, None, handler)
        except ConnectionError:
            return False
        if lost:
            return False
        if not payload.is_eof() and not self._force_close:
            self.close()
        self._keepalive = bool(response.keep_alive)
        if not self._keepalive or self._close or self._force_close:
            return False
        close_time = self._next_keepalive_close_time = self._loop.time() + IDLE_TIMEOUT_S
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(close_time, self._process_keepalive)
        return True

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What aiohttp's loop asks for when the parser gave up, as JSON and without a traceback.

        Raises:
            ConnectionError: the client has gone and there is nobody to answer.
        """
        if isinstance(exc, ConnectionError):
            raise exc
        server = cast(Server, self._manager)
        error = parser_error(exc, server.allowed)
        server.name_leader(error)
        return cast(web.StreamResponse, error_response(error, close=True))

    async def finish(self, limit_s: float) -> None:
        """Have the request under way answered, then end; no race as in aiohttp's `shutdown`."""
        self._force_close = True
        if (task := self._task_handler) is not None:
            await asyncio.wait({task}, timeout=limit_s)
            task.cancel()
        self.force_close()

    def hang_up(self) -> None:
        """End the connection so that what was written still arrives.

        Closing while input is unread would reset the connection and could cost the client its
        response. So: half-close, ignore what still comes (`_force_close` makes aiohttp do that),
        and close for good LINGER_S later unless the client does so first.
        """
        self._force_close = True
        transport = self.transport
        if transport is not None and not transport.is_closing():
            transport.write_eof()
            self._resume_transport_reading()  # a half-read body may have paused it
            self._loop.call_later(LINGER_S, transport.abort)

    def force_close(self) -> None:
        """aiohttp's, which would wait for ever until everything written is taken."""
        transport = self.transport
        super().force_close()
        if transport is not None:
            self._bound_flush(transport)

    def _bound_flush(self, closed: asyncio.Transport) -> None:
        if closed.get_write_buffer_size():
            self._loop.call_later(WRITE_STALL_S, closed.abort)

    def abort(self) -> None:
        """Drop the connection without waiting for what is still buffered."""
        if self.transport is not None:
            self.transport.abort()

    def _arm(self) -> None:
        self._header_timer = self._loop.call_later(HEADER_TIMEOUT_S, self._header_is_late)

    def _disarm(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _header_is_late(self) -> None:
        self._header_timer = None
        if self.busy:  # an earlier, pipelined request still owes its answer
            self._arm()
            return
        seconds = f"{HEADER_TIMEOUT_S:g}"
        self._refuse(InvalidRequest(f"the request header was not complete after {seconds} s"))

    def _refuse(self, error: DengineError) -> None:
        """Answer outside of any request, and hang up."""
        if self.transport is not None:
            cast(Server, self._manager).name_leader(error)
            response = error_response(error)
            head = b"%bContent-Length: %d\r\nConnection: close\r\n\r\n" % (
                response.headers,
                len(response.body),
            )
            self.transport.write(STATUS_LINES[error.status] + date_line() + head + response.body)
            self.hang_up()
