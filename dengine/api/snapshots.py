"""Snapshots over HTTP: take one, list them, download one (also how members fetch from each other).

A download is paced, so that it leaves room for everything else, and can be resumed by Range. Its
ETag is the file's SHA-256: a client that names it never mixes two files.
"""

from __future__ import annotations

import asyncio
import os
import re
from typing import TYPE_CHECKING, cast

from aiohttp import web

from dengine.api import params
from dengine.api.params import BodyReader
from dengine.api.protocol import Request, Response, json_response, taken
from dengine.api.replies import SnapshotsReply
from dengine.api.routes import Body, Parameter, Route
from dengine.errors import (
    ClusterUnavailable,
    NotFound,
    RangeNotSatisfiable,
    RequestTimeout,
)
from dengine.raft.types import SnapshotRef

if TYPE_CHECKING:
    from dengine.config import Config
    from dengine.node.node import Node

PIECE_BYTES = 256 * 1024
_RANGE = re.compile(r"bytes=([0-9]{1,19})-([0-9]{0,19})")
_RECEIVER = re.compile(r"[0-9]{1,10}")


class SnapshotCalls:
    """The handlers of `/v1/snapshots*` on one node."""

    def __init__(self, node: Node, config: Config, bodies: BodyReader) -> None:
        self._node = node
        self._bodies = bodies
        self._max_bytes_per_s = config.snapshot.max_bytes_per_s
        self._loop = asyncio.get_running_loop()

    async def take(self, request: Request) -> Response:
        """Take one now: 200 with it, or 202 when it is not finished in time and goes on."""
        if params.announces_body(request):
            await self._bodies.read(request, 0)  # it takes none, so any is too large
        deadline = self._loop.time() + params.timeout_s(request)
        try:
            ref = await self._node.snapshots.take(deadline)
        except RequestTimeout:
            return json_response({"state": "running"}, 202)
        return json_response({"state": "done", "snapshot": _described(ref)})

    async def list_all(self, request: Request) -> Response:
        return json_response(self._node.snapshots.view())

    async def download(self, request: Request) -> Response:
        """One file, whole or from an offset."""
        file, ref = self._node.snapshots.files.find(request.tail)
        etag = f'"{ref.sha256}"'
        first, last = _range(request, ref.size_bytes, etag)
        response = web.StreamResponse(
            status=200 if first is None else 206,
            headers={
                "Content-Type": "application/octet-stream",
                "ETag": etag,
                "Accept-Ranges": "bytes",
                "Content-Disposition": f'attachment; filename="{file.name}"',
            },
        )
        start = first or 0
        if first is not None:
            response.headers["Content-Range"] = f"bytes {start}-{last}/{ref.size_bytes}"
        response.content_length = last + 1 - start
        try:
            fd = os.open(file, os.O_RDONLY)
        except OSError as error:
            self._node.snapshots.suspect(ref)
            if isinstance(error, FileNotFoundError):
                raise NotFound(f"{file.name} has been removed: try another one") from None
            raise ClusterUnavailable(
                f"this node cannot open {file.name} now: {error.strerror}; ask another one"
            ) from error
        try:
            await taken(request.protocol, response.prepare(request.as_aiohttp()))
            if request.message.method == "GET":
                await self._send(request, response, fd, ref, start, last + 1)
            await taken(request.protocol, response.write_eof())
        finally:
            os.close(fd)
        return cast(Response, response)

    async def _send(
        self,
        request: Request,
        response: web.StreamResponse,
        fd: int,
        ref: SnapshotRef,
        start: int,
        stop: int,
    ) -> None:
        """Bytes `start` to `stop` at `max_bytes_per_s`; a member's transfer is watched."""
        receiver = _receiver(request)
        snapshots = self._node.snapshots
        transfers = snapshots.files.transfers
        if receiver and transfers.began(receiver, ref, start):
            snapshots.suspect(ref)
        began, position = self._loop.time(), start
        while position < stop:
            if snapshots.files.is_distrusted(ref):
                raise ConnectionResetError("the snapshot may be wrong")
            size = min(PIECE_BYTES, stop - position)
            try:
                piece = await self._loop.run_in_executor(None, os.pread, fd, size, position)
            except OSError as error:
                snapshots.suspect(ref)
                raise ConnectionResetError("the snapshot file cannot be read") from error
            if not piece:
                snapshots.suspect(ref)
                raise ConnectionResetError("the snapshot file is shorter than it was")
            await taken(request.protocol, response.write(piece))
            position += len(piece)
            if receiver:
                transfers.sent(receiver, len(piece))
            ahead_s = (position - start) / self._max_bytes_per_s - (self._loop.time() - began)
            await asyncio.sleep(max(0.0, ahead_s))


def _range(request: Request, size: int, etag: str) -> tuple[int | None, int]:
    """First and last byte asked for; None when the whole file is (RFC 9110 14.2, 13.1.5)."""
    headers = request.message.headers
    found = _RANGE.fullmatch(headers.get("Range", ""))
    if found is None or headers.get("If-Range", etag) != etag:
        return None, size - 1
    first, last = int(found[1]), min(int(found[2] or size), size - 1)
    if first > last:
        raise RangeNotSatisfiable(f"the file has {size} bytes", size_bytes=size)
    return first, last


def _receiver(request: Request) -> int:
    """The member that fetches; 0 for everybody else."""
    text = request.message.headers.get("Dengine-Receiver", "")
    return int(text) if _RECEIVER.fullmatch(text) else 0


def _described(ref: SnapshotRef) -> dict[str, int | str]:
    return {
        "index": ref.index,
        "term": ref.term,
        "sha256": ref.sha256,
        "size_bytes": ref.size_bytes,
    }


_EXAMPLE = {
    "index": 120_034,
    "term": 3,
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "size_bytes": 73_400_320,
}
_LIST = {
    "snapshots": [
        {**_EXAMPLE, "file": "snapshot-3-120034.dsnap", "taken_at_s": 1_790_000_000},
    ],
    "job": None,
    "taken": 1,
    "failures": 0,
    "last_error": None,
    "purged_index": 20_011,
}


def routes(calls: SnapshotCalls) -> list[Route]:
    """The calls on snapshots."""
    name = Parameter("name", '"latest", or the SHA-256 of one', "latest", True, "path")
    file = Body("the file", "DENGSNAP", "application/octet-stream", ("ETag", "Accept-Ranges"))
    part = Body("a part of it", "GSNAP", "application/octet-stream", ("ETag", "Content-Range"))
    taken = Body("taken", {"state": "done", "snapshot": _EXAMPLE})
    every = Body("all", _LIST, shape=SnapshotsReply)
    running = Body("not finished yet; it goes on", {"state": "running"})
    return [
        Route(
            "POST",
            "/v1/snapshots",
            calls.take,
            "Take a snapshot",
            {200: taken, 202: running},
            errors=(411, 413, 415, 503),
        ),
        Route("GET", "/v1/snapshots", calls.list_all, "List snapshots", {200: every}),
        Route(
            "GET",
            "/v1/snapshots/{name}",
            calls.download,
            "Download a snapshot",
            {200: file, 206: part},
            (name, Parameter("Range", "resume from a byte", "bytes=5-", place="header")),
            errors=(416, 503),
            streams=True,
            access="fetch",
        ),
    ]
