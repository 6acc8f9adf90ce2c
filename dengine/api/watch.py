"""Watches: `GET /v1/watch`, every change of some keys as server-sent events."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson
from multidict import istr

from dengine.api import params
from dengine.api.kv import text_or_base64
from dengine.api.protocol import Request, Response
from dengine.api.routes import Body, Parameter, Route
from dengine.api.sse import stream
from dengine.errors import InvalidRequest, TooLarge
from dengine.kv.store import KINDS, Event
from dengine.node.watch_hub import Cancelled, Changes, Message, Progress, Selection, Watch

if TYPE_CHECKING:
    from dengine.config import Config
    from dengine.node.node import Node

REVISION_MAX = 2**63 - 2
PART_EVENTS = 250  # are written out at once: some 0.2 ms; 10 000 would take 50 ms
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
        self._turn = asyncio.Lock()  # of those who write out a large change

    async def watch(self, request: Request) -> Response:
        selection = self._selection(request.params)
        first = _first(request)
        prev = params.flag(request.params, "prev")
        deadline = self._loop.time() + params.timeout_s(request)
        watch = await self._node.watch(selection, first, prev=prev, deadline=deadline)
        stopping = partial(_stop, watch)
        self._closing.add_done_callback(stopping)
        try:
            return await stream(request, Following(watch, self._turn).next, watch.close)
        finally:
            self._closing.remove_done_callback(stopping)
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
    last = request.message.headers.get(LAST_EVENT_ID, "").strip()
    if last:  # a browser sends it when it connects again, behind the query of the first time
        if not _DECIMAL.fullmatch(last) or int(last) > REVISION_MAX:
            raise InvalidRequest("header Last-Event-ID must be the id of an event: a revision")
        return int(last) + 1
    if "from_revision" not in request.params:
        return None
    return params.integer(request.params, "from_revision", 1, 1, REVISION_MAX)


def _stop(watch: Watch, _: asyncio.Future[None]) -> None:
    if not watch.over:
        watch.cancel("this node is stopping: resume at another one")


class Following:
    """What a watch says as server-sent events, each made once for all who get the same.

    Args:
        turn: shared by all on this event loop, so that it serves others, heartbeats above all,
            after each part of a large change, whoever else has one to write out.
    """

    def __init__(self, watch: Watch, turn: asyncio.Lock) -> None:
        self._watch = watch
        self._turn = turn
        self._message: Message | None = None  # taken from the watch, and not returned yet

    async def next(self) -> bytes:
        """The next event. Nothing is lost where this is cancelled and called again.

        Raises:
            StopAsyncIteration: that was all.
        """
        if self._message is None:
            self._message = await anext(self._watch)
        if isinstance(self._message, Changes):
            event = await self._change(self._message)
        else:
            event = _word(self._message, self._watch)
        self._message = None
        return event

    async def _change(self, changes: Changes) -> bytes:
        if not changes.shown and len(changes.events) > PART_EVENTS:
            async with self._turn:  # another may have made all of it meanwhile, or a part
                while not (changes.shown or _is_complete(changes)):
                    changes.parts.append(_next_part(changes))
                    await asyncio.sleep(0)
        if not changes.shown:
            events = b",".join(changes.parts or [_next_part(changes)])
            data = b'{"revision":%d,"events":[%b]}' % (changes.revision, events)
            changes.shown = b"event: change\nid: %d\ndata: %b\n\n" % (changes.revision, data)
            changes.parts.clear()
        return changes.shown


def _is_complete(changes: Changes) -> bool:
    return len(changes.parts) * PART_EVENTS >= len(changes.events)


def _next_part(changes: Changes) -> bytes:
    start = len(changes.parts) * PART_EVENTS
    shown = [_shown(event) for event in changes.events[start : start + PART_EVENTS]]
    return orjson.dumps(shown)[1:-1]


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
    """The call of DESIGN 8 that follows keys."""
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
