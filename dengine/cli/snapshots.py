"""`dengine snapshot take`, `list` and `save` on a node that runs. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dengine.cli.commands import print_json, print_table
from dengine.cli.progress import ProgressBar, format_bytes
from dengine.cli.remote import Remote, Reply
from dengine.errors import (
    ClusterUnavailable,
    Conflict,
    DataCorruption,
    FatalError,
    NotFound,
    RequestTimeout,
    StorageIO,
)
from dengine.storage.snapshot_frames import (
    PARTIAL_SUFFIX,
    existing,
    lock_partial,
    name_new,
    scan,
    sound_prefix,
    sync_file,
)

POLL_S = 0.2
POST_S = 1.0  # a small snapshot is finished by then, and the answer to the request is the result
ATTEMPTS = 3  # at a file that arrives damaged
REQUEST_S = 10.0  # for one of the small requests
SILENCE_S = 10.0  # without a byte, a connection counts as cut
STALL_S = 30.0  # without a byte on any connection, a download is given up
RETRY_S_MIN, RETRY_S_MAX = 0.1, 5.0
LEFT_FREE_BYTES = 512 * 1024 * 1024  # of a disk that may hold a node's data too, and at most 5 %
RESUME_S = 3600.0  # an older partial file is begun anew: its snapshot would be too old
PIECE_BYTES = 256 * 1024


def take(args: Namespace, remote: Remote) -> int:
    """Have one node take a snapshot, and wait for it."""
    with ProgressBar("snapshot") as bar:
        _, taken = _take(remote, args.timeout, bar)
    if args.json:
        print_json(taken)
    else:
        size = format_bytes(taken["size_bytes"])
        print(f"snapshot up to entry {taken['index']} of term {taken['term']}: {size}")
        print(f"sha256 {taken['sha256']}")
    return 0


def list_all(args: Namespace, remote: Remote) -> int:
    """The verified snapshots of one node, oldest first."""
    reply = remote.call("GET", "/v1/snapshots")
    view = reply.json()
    if args.json:
        print_json({**view, "endpoint": reply.endpoint})
        return 0
    rows = [
        (
            s["index"],
            s["term"],
            format_bytes(s["size_bytes"]),
            _time(s.get("taken_at_s")),
            s["file"],
        )
        for s in view["snapshots"]
    ]
    print_table(("INDEX", "TERM", "SIZE", "TAKEN", "FILE"), rows)
    for name in ("job", "last_error"):
        if view.get(name):
            print(f"{name.replace('_', ' ')}: {view[name]}")
    return 0


def save(args: Namespace, remote: Remote) -> int:
    """Take a snapshot on one node and bring it here, checked in full."""
    file: Path = args.file
    with _here(file):
        require_new(file)
    with _Partial(file) as partial, ProgressBar("snapshot") as bar:
        node, wanted = _resumable(remote, partial)
        if wanted is None:
            partial.keep(0)
            node, wanted = _take(remote, args.timeout, bar)
        else:
            note = f"resuming after {format_bytes(partial.size)}"
            print(f"{note}: the snapshot up to entry {wanted['index']}", file=sys.stderr)
        bar.clear()
        partial.require_room(wanted["size_bytes"])
        for attempt in range(ATTEMPTS):
            _Download(node, wanted, partial, args.timeout).run()
            if partial.is_sound(wanted["sha256"], last=attempt == ATTEMPTS - 1):
                break
        partial.publish()
    size = format_bytes(wanted["size_bytes"])
    print(f"{file}: everything up to entry {wanted['index']} of term {wanted['term']}, {size}")
    print(f"sha256 {wanted['sha256']}")
    return 0


def require_new(file: Path) -> None:
    """Can `file` be made where nothing is yet? A backup replaces nothing and makes no directory.

    Raises:
        Conflict: there is something of that name.
        StorageIO: there is no directory to put it in.
    """
    if not file.absolute().parent.is_dir():
        raise StorageIO(f"{file}: there is no directory {file.parent} to put it in")
    if os.path.lexists(file):
        raise existing(file)


def _take(remote: Remote, timeout_s: float, bar: ProgressBar) -> tuple[Remote, dict[str, Any]]:
    """A snapshot of everything that is applied now on the first node that answers, and that node.

    Raises:
        RequestTimeout: it is not finished after `timeout_s`, and goes on.
    """
    deadline = time.monotonic() + timeout_s
    status = remote.within(min(timeout_s, REQUEST_S)).call("GET", "/v1/status")
    node = remote.only(status.endpoint)
    applied, before = status.json()["last_applied"], _view(node)
    bar.say("asking for one")
    answer: Reply = node.within(min(timeout_s, POST_S)).call("POST", "/v1/snapshots")
    described = answer.json()
    while described.get("state") != "done":
        view = _view(node)
        newest = view["snapshots"][-1] if view["snapshots"] else None
        if newest is not None and newest["index"] >= applied:
            return node, newest
        if view["failures"] > before["failures"] and not view["job"]:
            raise ClusterUnavailable(f"{status.endpoint} took no snapshot: {view['last_error']}")
        if time.monotonic() >= deadline:
            raise RequestTimeout(
                f"{status.endpoint} has not finished the snapshot in {timeout_s:g} s; it goes on, "
                "and `dengine snapshot list` shows it"
            )
        bar.say(view["job"] or "waiting")
        time.sleep(POLL_S)
    snapshot: dict[str, Any] = described["snapshot"]
    return node, snapshot


def _view(node: Remote) -> dict[str, Any]:
    view: dict[str, Any] = node.within(REQUEST_S).json("GET", "/v1/snapshots")
    return view


def _time(seconds: int | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


class _Partial:
    """FILE.partial, which becomes FILE only when it is complete and sound. One process has it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.path = file.with_name(file.name + PARTIAL_SUFFIX)

    def __enter__(self) -> _Partial:
        with _here(self.path):
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            self.stream: BinaryIO = os.fdopen(fd, "r+b")
            try:
                lock_partial(self.path, fd)
            except Conflict:
                self.stream.close()
                raise
            os.fchmod(fd, 0o600)
            self.is_fresh = time.time() - os.fstat(fd).st_mtime < RESUME_S
            self.keep(sound_prefix(self.path))
        return self

    def __exit__(self, *_: object) -> None:
        if not self.stream.closed:
            if not self.size:
                with contextlib.suppress(OSError):
                    self.path.unlink(missing_ok=True)  # nothing worth resuming
            with contextlib.suppress(OSError):
                self.stream.close()

    @property
    def size(self) -> int:
        return os.fstat(self.stream.fileno()).st_size

    def keep(self, length: int) -> None:
        """Only the first `length` bytes; the next ones follow them."""
        self.stream.flush()
        self.stream.truncate(length)
        self.stream.seek(length)

    def require_room(self, length: int) -> None:
        """Can it grow to `length` bytes and leave the disk some? A full one stops nodes and others.

        Raises:
            FailedHere: how much is missing.
        """
        with _here(self.path):
            found = os.fstatvfs(self.stream.fileno())
            left = min(found.f_blocks * found.f_frsize // 20, LEFT_FREE_BYTES)
            missing = length - self.size + left - found.f_bavail * found.f_frsize
            if missing > 0:
                raise StorageIO(
                    f"{self.path.parent}: {format_bytes(missing)} more must be free for a snapshot "
                    f"of {format_bytes(length)}; remove older ones, or save to another disk"
                )

    def beginning(self, length: int) -> bytes:
        return os.pread(self.stream.fileno(), length, 0)

    @contextlib.contextmanager
    def gone_when_full(self) -> Iterator[None]:
        """A disk that became full meanwhile gets back what this file holds of it."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                with contextlib.suppress(OSError):
                    os.ftruncate(self.stream.fileno(), 0)
            raise

    def is_sound(self, sha256: str, *, last: bool) -> bool:
        """Read all of it back; what is wrong with it is cut off, and a failure if it is the `last`
        attempt.
        """
        with _here(self.path):
            sync_file(self.stream)
            try:
                if scan(self.path).sha256 == sha256:
                    return True
                self.keep(0)  # sound, but another file
                raise DataCorruption(f"{self.path} is not the snapshot that was asked for")
            except DataCorruption:
                self.keep(sound_prefix(self.path))
                if last:
                    raise
        return False

    def publish(self) -> None:
        """Give it its name, durably and without replacing anything."""
        with _here(self._file):
            name_new(self.path, self._file)
            directory = os.open(self._file.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        self.stream.close()


def _resumable(remote: Remote, partial: _Partial) -> tuple[Remote, dict[str, Any] | None]:
    """The snapshot whose beginning `partial` is, if the first node that answers still has it.

    A header names node, entry, time and state hash, so no two files begin alike; the SHA-256 at
    the end decides in any case.
    """
    if not partial.size or not partial.is_fresh:
        return remote, None
    reply = remote.within(REQUEST_S).call("GET", "/v1/snapshots")
    node = remote.only(reply.endpoint)
    length = min(partial.size, 64 * 1024)
    for snapshot in reversed(reply.json()["snapshots"]):
        if snapshot["size_bytes"] < partial.size:
            continue
        with contextlib.suppress(NotFound):
            begins = node.within(REQUEST_S).call(
                "GET",
                f"/v1/snapshots/{snapshot['sha256']}",
                headers={"Range": f"bytes=0-{length - 1}"},
            )
            if begins.body == partial.beginning(length):
                return node, snapshot
    return node, None


class _Download:
    """One snapshot from one node: cut connections are resumed until nothing comes any more."""

    def __init__(
        self, node: Remote, snapshot: dict[str, Any], partial: _Partial, timeout_s: float
    ) -> None:
        self._node = node
        self._sha256: str = snapshot["sha256"]
        self._size: int = snapshot["size_bytes"]
        self._partial = partial
        self._stall_s = min(STALL_S, timeout_s)

    def run(self) -> None:
        """Fill the partial file. Raises ClusterUnavailable, NotFound, StorageIO."""
        pause_s, last = RETRY_S_MIN, time.monotonic()
        with ProgressBar("download") as bar:
            while self._partial.size < self._size:
                have = self._partial.size
                problem = self._attempt(bar)
                if self._partial.size > have:
                    pause_s, last = RETRY_S_MIN, time.monotonic()
                if self._partial.size >= self._size:
                    break
                if time.monotonic() - last > self._stall_s:
                    raise ClusterUnavailable(
                        f"{problem}; {format_bytes(self._partial.size)} are kept in "
                        f"{self._partial.path}, and the same command goes on from there"
                    )
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_S_MAX)

    def _attempt(self, bar: ProgressBar) -> str:
        """Append what comes; why it ended."""
        endpoint = self._node.endpoints[0]
        connection = http.client.HTTPConnection(endpoint, timeout=SILENCE_S)
        try:
            self._receive(connection, bar)
        except (OSError, http.client.HTTPException) as error:
            return f"{endpoint}: {getattr(error, 'strerror', None) or error or 'cut off'}"
        finally:
            connection.close()
            with contextlib.suppress(OSError):
                self._partial.stream.flush()
        return f"{endpoint} ended the transfer early"

    def _receive(self, connection: http.client.HTTPConnection, bar: ProgressBar) -> None:
        have = self._partial.size
        path = f"/v1/snapshots/{self._sha256}"
        headers = {"Range": f"bytes={have}-", **self._node.authorization}
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        if response.status == 404:
            raise NotFound(
                "the node has removed this snapshot meanwhile, for newer ones took its place: "
                "run the same command again"
            )
        if response.status not in (200, 206) or response.getheader("ETag") != f'"{self._sha256}"':
            raise http.client.HTTPException(f"it answered {response.status} {response.reason}")
        if response.status == 200:
            have = 0
            self._partial.keep(0)
        while data := response.read1(PIECE_BYTES):
            if have + len(data) > self._size:
                raise http.client.HTTPException("it sent more than the snapshot")
            with _here(self._partial.path), self._partial.gone_when_full():
                self._partial.stream.write(data)
                self._partial.stream.flush()
            have += len(data)
            bar.update(have, self._size)


class FailedHere(Exception):
    """The disk of this machine, not a node, is the reason; it ends the command as it would a node.

    Args:
        error: what happened, with its exit code.
    """

    def __init__(self, error: FatalError) -> None:
        super().__init__(error.message)
        self.error = error


@contextlib.contextmanager
def _here(path: Path) -> Iterator[None]:
    try:
        yield
    except FatalError as error:
        raise FailedHere(error) from error
    except OSError as error:
        raise FailedHere(StorageIO(f"{path}: {error.strerror or error}")) from error
