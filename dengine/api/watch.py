"""Watches: `GET /v1/watch`, every change of some keys as server-sent events."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import orjson
from multidict import istr

from dengine.api import params
from dengine.api.kv import text_or_base64
from dengine.api.protocol import Request, Response
from dengine.api.routes import Body, Parameter, Route
from dengine.api.sse import EventText, stream
from dengine.errors import InvalidRequest, TooLarge
from dengine.kv.store import KINDS, Event
from dengine.node.watch_hub import Cancelled, Changes, Progress, Selection, Watch
from dengine.node.watch_messages import Part, Reading

if TYPE_CHECKING:
    from dengine.config import Config
    from dengine.node.node import Node

REVISION_MAX = 2**63 - 2
LAST_EVENT_ID = istr("Last-Event-ID")
_DECIMAL = re.compile(r"[0-9]{1,19}")


class WatchCalls:
    """The handler of `/v1/watch` on one node.

    Args:
        closing: resolved when the server stops, which ends all streams.
    """

    def __init__(self, node: Node, config: Config, closing: asyncio.Future[None]) -> None:
        self._node = node
        self._limits = config.limits
        self._closing = closing
        self._loop = asyncio.get_running_loop()

    async def watch(self, request: Request) -> Response:
        selection = self._selection(request.params)
        first = _first(request)
        prev = params.flag(request.params, "prev")
        deadline = self._loop.time() + params.timeout_s(request)
        watch = await self._node.watch(selection, first, prev=prev, deadline=deadline)
        following = Following(watch)
        self._closing.add_done_callback(following.stop)
        try:
            return await stream(request, following.next, watch.close)
        finally:
            self._closing.remove_done_callback(following.stop)
            watch.close()

    def _selection(self, query: dict[str, bytes]) -> Selection:
        if ("key" in query) == ("prefix" in query):
            raise InvalidRequest("watch either a key or a prefix: /v1/watch?prefix=config/")
        is_prefix = "prefix" in query
        key = query["prefix"] if is_prefix else query["key"]
        if not key and not is_prefix:
            raise InvalidRequest("the key is empty: prefix= watches all keys")
        if len(key) > self._limits.key_bytes:
            raise TooLarge(f"it has {len(key)} bytes; a key has at most {self._limits.key_bytes}")
        return Selection(key, is_prefix)


def _first(request: Request) -> int | None:
    """The first revision that is wanted; None: what comes from now on."""
    asked = params.integer(request.params, "from_revision", 0, 1, REVISION_MAX)
    last = request.message.headers.get(LAST_EVENT_ID, "").strip()
    if last:  # a browser sends it when it connects again, behind the query of the first time
        if not _DECIMAL.fullmatch(last) or int(last) > REVISION_MAX:
            raise InvalidRequest("header Last-Event-ID must be the id of an event: a revision")
        return int(last) + 1
    return asked or None


class Following:
    """What a watch says as server-sent events."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._reading: Reading[bytes] | None = None

    async def next(self) -> EventText:
        """The next event. Nothing is lost where this is cancelled and called again.

        Raises:
            StopAsyncIteration: that was all.
        """
        self._reading = None
        message = await anext(self._watch)
        if not isinstance(message, Changes):
            return _word(message, self._watch)
        if not message.is_large:
            return message.whole(_text)
        self._reading = Reading(self._watch, message, _text)
        return _parts(self._reading)

    def stop(self, _: asyncio.Future[None]) -> None:
        """This node is stopping. Within an event that cannot be said, so it is cut off: to make the
        rest of it, for many clients, takes longer than they are given.
        """
        if self._reading is not None and self._reading.in_midst:
            self._watch.close()
        elif not self._watch.over:
            self._watch.cancel("this node is stopping: resume at another one")


async def _parts(reading: Reading[bytes]) -> AsyncGenerator[bytes, None]:
    while (text := await reading.next()) is not None:
        yield text
    if reading.in_midst:
        raise ConnectionResetError("the client has gone, or this node stops, within an event")


def _text(part: Part) -> bytes:
    """The text of an event, as far as it is about `part`."""
    head, end = b",", b""
    if part.is_first:
        number = part.revision
        head = b'event: change\nid: %d\ndata: {"revision":%d,"events":[' % (number, number)
    if part.is_last:
        end = b"]}\n\n"
    shown = orjson.dumps([_shown(event) for event in part.events])
    return b"".join((head, memoryview(shown)[1:-1], end))


def _word(message: Progress | Cancelled, watch: Watch) -> bytes:
    match message:
        case Progress(revision):
            # One that names less than the client has asked for is no place to resume from.
            bookmark = b"id: %d\n" % revision if revision >= watch.first - 1 else b""
            return b'event: progress\n%bdata: {"revision":%d}\n\n' % (bookmark, revision)
        case Cancelled(reason, compact_revision):
            told: dict[str, Any] = {"reason": reason}
            if compact_revision is not None:
                told["compact_revision"] = compact_revision
            return b"event: cancelled\ndata: %b\n\n" % orjson.dumps(told)


def _shown(event: Event) -> dict[str, Any]:
    shown: dict[str, Any] = {"type": KINDS[event.kind], **text_or_base64("key", event.key)}
    if event.record is not None:
        shown |= text_or_base64("value", event.record.value)
        shown["created"] = event.created
    if event.prev is not None:
        shown |= text_or_base64("prev", event.prev.value)
    return shown


_STREAM = Body(
    "server-sent events: `change`, one for each revision; `progress` at first and then at "
    "intervals, with the revision up to which all is applied and delivered; `cancelled`, the last",
    'event: progress\nid: 6\ndata: {"revision":6}\n\n'
    'event: change\nid: 7\ndata: {"revision":7,"events":[{"type":"put","key":"config/color",'
    '"value":"blue","created":false,"prev":"red"}]}\n\n',
    "text/event-stream",
)


def routes(calls: WatchCalls) -> list[Route]:
    """The call that follows keys."""
    return [
        Route(
            "GET",
            "/v1/watch",
            calls.watch,
            "Follow changes of keys",
            {200: _STREAM},
            (
                Parameter("key", "this key", "config/color"),
                Parameter("prefix", "or all keys that begin with this; empty: all", "config/"),
                Parameter(
                    "from_revision",
                    "the first revision that is wanted; else from now on",
                    7,
                    minimum=1,
                    maximum=REVISION_MAX,
                ),
                Parameter("prev", "with the values that were there before", True),
                Parameter(
                    "Last-Event-ID",
                    "the id of the last event that arrived: go on behind it; comes before "
                    "from_revision",
                    "6",
                    place="header",
                ),
            ),
            errors=(410, 413, 429, 503, 504),
            streams=True,
        )
    ]
