"""Server-sent events: a response that goes on until one of the two ends leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import cast

from aiohttp import web

from dengine.api.protocol import SLICE_BYTES, Request, Response, taken

COMMENT_INTERVAL_S = 15.0  # keeps proxies and clients sure that an idle stream is alive
_COMMENT = b":\n\n"
_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # a proxy that collects events would keep them from their reader
}

EventText = bytes | AsyncGenerator[bytes, None]  # or its parts, each made when it is wanted
Next = Callable[[], Awaitable[EventText]]


async def stream(request: Request, following: Next, end: Callable[[], None]) -> Response:
    """Write what `following` returns, one event after the other.

    Args:
        following: waits for the next event; it is cancelled and called again when there was
            nothing to say for a while. StopAsyncIteration: that was all. Between the parts of an
            event nothing is written, so none of them may take long.
        end: called when the client leaves: nothing is kept for it, and `following` ends.

    Raises:
        ConnectionResetError: it has been cut off, or has gone; parts may end with it, too.
    """
    response = web.StreamResponse(headers=_HEADERS)
    lost = request.until_left()
    lost.add_done_callback(lambda _: end())
    try:
        await taken(request.protocol, response.prepare(request.as_aiohttp()))
        while not lost.done():
            try:
                async with asyncio.timeout(COMMENT_INTERVAL_S):
                    event = await following()
            except TimeoutError:
                event = _COMMENT
            except StopAsyncIteration:
                break
            if isinstance(event, bytes):
                await _write(request, response, event)
                continue
            async with aclosing(event):
                async for part in event:
                    await _write(request, response, part)
        if not lost.done():
            await taken(request.protocol, response.write_eof())
    finally:
        end()
    return cast(Response, response)


async def _write(request: Request, response: web.StreamResponse, data: bytes) -> None:
    for start in range(0, len(data), SLICE_BYTES):
        await taken(request.protocol, response.write(data[start : start + SLICE_BYTES]))
