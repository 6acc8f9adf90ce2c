#!/usr/bin/python
"""Ansible module: take a snapshot and keep a verified copy."""

from __future__ import annotations

DOCUMENTATION = r"""
module: dengine_snapshot
short_description: Take, download and check snapshots of a dengine node
description:
  - V(taken) has the node write a snapshot. V(saved) also downloads it to O(dest), if there is room
    for all of it, resuming what an earlier run left of the same one, compares it with the SHA-256
    that the node names, and only then gives it its name. V(pruned) deletes the oldest copies of
    that name, and what is left of downloads of them that nobody has gone on with for an hour.
extends_documentation_fragment: dengine.core.api
options:
  state:
    description: What to do.
    type: str
    choices: [taken, saved, pruned]
    default: saved
  dest:
    description: Directory for the copy. Required with O(state=saved) and O(state=pruned).
    type: path
  name:
    description:
      - Beginning of the file's name; index and a part of the SHA-256 follow. Clusters that share a
        directory need names of their own, for V(pruned) goes by the name.
    type: str
    default: backup
  keep:
    description: So many copies stay.
    type: int
    default: 7
  fresh:
    description: Take a new snapshot even when the newest has everything that is applied.
    type: bool
    default: false
  timeout:
    description: Seconds for the node to write it, and again for the download.
    type: float
    default: 3600.0
  stall_timeout:
    description: Seconds without a byte after which a download is given up.
    type: float
    default: 30.0
"""
EXAMPLES = r"""
- name: Keep a verified copy
  dengine.core.dengine_snapshot:
    endpoints: [127.0.0.1:9082]
    dest: /var/backups/dengine
"""
RETURN = r"""
snapshot:
  description: Index, term, sha256 and size_bytes.
  type: dict
  returned: when O(state) is V(taken) or V(saved)
file:
  description: The copy.
  type: str
  returned: when O(state=saved)
removed:
  description: Files that were, or in check mode would be, deleted.
  type: list
  elements: str
  returned: when O(state=pruned)
"""

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import stat
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.dengine.core.plugins.module_utils.client import (
    API_SPEC,
    ApiError,
    Client,
)

PIECE = 1024 * 1024
DIGEST_BYTES = 32
POLL_S = 0.2
RESERVE_BYTES = 64 * 1024 * 1024  # stays free beside a copy: others write to that disk as well
SUFFIX = ".dsnap"
LEFTOVER_S = 3600  # a download that nobody wrote to for so long has ended


class DiskError(ApiError):
    """The file here is the reason, not the way to it: no repetition helps, and it goes."""


def one_node(client):
    """A client of the first node that answers: a snapshot is one node's, from end to end."""
    return client.only(client.call("GET", "/v1/status").endpoint, client.patience)


def take(node, timeout):
    """A snapshot of everything that is applied now.

    One that takes longer than a request, or waits for the members' turn, is waited for: while it
    waits there is no job, so only its index, or a failure more than before, says how it ended.
    """
    (endpoint,) = node.endpoints
    deadline = time.monotonic() + timeout
    applied = node.get("/v1/status")["last_applied"]
    failures = node.get("/v1/snapshots").get("failures", 0)
    answer = {}
    try:
        answer = node.call("POST", "/v1/snapshots", b"").json()
    except ApiError as error:
        if error.outcome != "unknown":
            raise  # else it may have begun, and the listing tells
    while answer.get("state") != "done":
        listing = node.get("/v1/snapshots")
        newest = listing["snapshots"][-1] if listing["snapshots"] else None
        if newest is not None and newest["index"] >= applied:
            return newest
        if listing.get("failures", 0) > failures and not listing.get("job"):
            raise ApiError("{} took no snapshot: {}".format(endpoint, listing.get("last_error")))
        if time.monotonic() >= deadline:
            raise ApiError(
                f"{endpoint}: the snapshot is not finished after {timeout:g} s, and goes on: run "
                "this again later",
                outcome="unknown",
            )
        time.sleep(POLL_S)
    return answer["snapshot"]


def newest_complete(node):
    """The newest snapshot, if nothing was applied since; else None."""
    snapshots = node.get("/v1/snapshots")["snapshots"]
    applied = node.get("/v1/status")["last_applied"]
    return snapshots[-1] if snapshots and snapshots[-1]["index"] == applied else None


def require_room(directory, missing):
    """Refuse before the first byte, not with a disk that is full. Raises DiskError."""
    free = shutil.disk_usage(directory).free
    short = missing + RESERVE_BYTES - free
    if short > 0:
        raise DiskError(
            f"{directory} has {free / 1e6:.0f} MB free, and {missing / 1e6:.0f} MB are to come, "
            f"with {RESERVE_BYTES / 1e6:.0f} MB to stay free: {short / 1e6:.0f} MB are missing. "
            "Make room, or choose another directory"
        )


class Download:
    """One snapshot on its way to `path`. Its partial file outlives a cut, and no error of the disk.

    The directory may be another user's, and the name can be guessed: nothing but a regular file of
    our own, with this one name, is written to.
    """

    def __init__(self, node, snapshot, path, params):
        self._node = node
        self._sha256 = snapshot["sha256"]
        self._size = snapshot["size_bytes"]
        self._path = path
        self._partial = path + "." + self._sha256[:16] + ".part"
        self._timeout = params["timeout"]
        self._stall = params["stall_timeout"]

    def run(self):
        """The file, durable before it has its name. Raises ApiError."""
        require_room(
            os.path.dirname(self._path), self._size - min(_left(self._partial), self._size)
        )
        try:
            with self._disk():
                self._get()
                os.rename(self._partial, self._path)
        except DiskError:
            self._drop()
            raise
        directory = os.open(os.path.dirname(self._path), os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    def _get(self):
        with self._opened() as self._file:
            self._have = os.fstat(self._file.fileno()).st_size
            if self._have > self._size:
                self._begin_anew()
            self._fill()
            os.fsync(self._file.fileno())
            if sha256(self._file) != self._sha256:
                raise DiskError(
                    "the downloaded snapshot does not have the SHA-256 that the node names"
                )

    def _opened(self):
        if not _ours(self._partial):
            self._drop()
        flags = os.O_RDWR | os.O_NOFOLLOW | (0 if _ours(self._partial) else os.O_CREAT | os.O_EXCL)
        return os.fdopen(os.open(self._partial, flags, 0o600), "r+b", buffering=0)

    def _drop(self):
        if os.path.lexists(self._partial):
            os.unlink(self._partial)

    def _begin_anew(self):
        with self._disk():
            self._file.truncate(0)
        self._have = 0

    @contextlib.contextmanager
    def _disk(self):
        """An error of the file, which is no error of the network."""
        try:
            yield
        except OSError as error:
            raise DiskError(f"{self._partial}: {error.strerror}") from error

    def _fill(self):
        """All that is missing, over as many connections as it takes."""
        began = self._moved = time.monotonic()
        self._deadline = began + self._timeout
        while self._have < self._size:
            before, reason = self._have, "the node sends nothing more"
            try:
                self._receive()
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
            if self._have >= self._size:
                return
            self._require_time(reason)
            if self._have == before:
                time.sleep(POLL_S)

    def _require_time(self, reason):
        now = time.monotonic()
        if now >= self._deadline:
            ended = f"after {self._timeout:g} s"
        elif now - self._moved >= self._stall:
            ended = f"and nothing more has come for {self._stall:g} s"
        else:
            return
        raise ApiError(
            f"{self._node.endpoints[0]}: the download has {self._have} of {self._size} bytes "
            f"{ended}: {reason}. Run this again, and it goes on from there"
        )

    def _receive(self):
        """Append what one connection gives. Raises OSError and HTTPException of the network,
        DiskError, and ApiError where the node lost the file in the meantime.
        """
        (endpoint,) = self._node.endpoints
        headers = {"Range": f"bytes={self._have}-"} if self._have else {}
        connection, response = self._node.open(
            endpoint, "GET", "/v1/snapshots/" + self._sha256, headers=headers
        )
        try:
            if response.status not in (200, 206):
                raise ApiError(f"{endpoint}: the download was refused ({response.status})")
            if response.status == 200:
                self._begin_anew()
            while self._have < self._size and time.monotonic() < self._deadline:
                piece = response.read1(PIECE)
                if not piece:
                    break
                self._append(piece[: self._size - self._have])
        finally:
            connection.close()

    def _append(self, piece):
        self._moved = time.monotonic()
        with self._disk():
            self._file.seek(self._have)
            while piece:
                count = self._file.write(piece)
                self._have += count
                piece = piece[count:]


def _ours(path):
    """Is that a file that we made, under no other name as well?"""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_uid == os.geteuid()


def _left(path):
    """Bytes that an earlier run left."""
    return os.lstat(path).st_size if _ours(path) else 0


def sha256(file):
    """The SHA-256 that names a snapshot: of all but its last 32 bytes, which repeat it.

    "" for a file that does not end with its own.
    """
    left = os.fstat(file.fileno()).st_size - DIGEST_BYTES
    digest = hashlib.sha256()
    file.seek(0)
    while left > 0:
        piece = file.read(min(PIECE, left))
        if not piece:
            return ""
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest() if file.read(DIGEST_BYTES) == digest.digest() else ""


def kept(path):
    """The SHA-256 of the copy at `path`, or "" where there is none, or something else."""
    if not os.path.lexists(path):
        return ""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        return sha256(file)


def surplus(dest, name, keep):
    """Copies of that name beyond the newest `keep`, oldest first, then leftovers of downloads.

    What begins with the name and goes on otherwise is somebody else's: of another cluster, perhaps.
    """
    own = re.compile(rf"{re.escape(name)}-(\d+)(-[0-9a-f]+)?{re.escape(SUFFIX)}(.*\.part)?")
    copies, leftovers = [], []
    for match in filter(None, map(own.fullmatch, os.listdir(dest))):
        file = os.path.join(dest, match.group())
        written = os.lstat(file).st_mtime
        if not match[3]:
            copies.append((int(match[1]), written, file))
        elif written < time.time() - LEFTOVER_S:
            leftovers.append(file)
    old = sorted(copies)[: max(0, len(copies) - keep)]
    return [file for _, _, file in old] + sorted(leftovers)


def save(params, node):
    os.makedirs(params["dest"], mode=0o700, exist_ok=True)
    snapshot = None if params["fresh"] else newest_complete(node)
    snapshot = snapshot or take(node, params["timeout"])
    file = os.path.join(
        params["dest"],
        "{}-{:012d}-{}{}".format(
            params["name"], snapshot["index"], snapshot["sha256"][:16], SUFFIX
        ),
    )
    have = kept(file) == snapshot["sha256"]
    if not have:
        Download(node, snapshot, file, params).run()
    return {"changed": not have, "snapshot": snapshot, "file": file}


def main():
    module = AnsibleModule(
        argument_spec={
            **API_SPEC,
            "state": {
                "type": "str",
                "default": "saved",
                "choices": ["taken", "saved", "pruned"],
            },
            "dest": {"type": "path"},
            "name": {"type": "str", "default": "backup"},
            "keep": {"type": "int", "default": 7},
            "fresh": {"type": "bool", "default": False},
            "timeout": {"type": "float", "default": 3600.0},
            "stall_timeout": {"type": "float", "default": 30.0},
        },
        required_if=[("state", "saved", ["dest"]), ("state", "pruned", ["dest"])],
        supports_check_mode=True,
    )
    params, client = module.params, Client.of(module.params)
    try:
        if params["state"] == "pruned":
            there = os.path.isdir(params["dest"])
            old = surplus(params["dest"], params["name"], params["keep"]) if there else []
            if not module.check_mode:
                for file in old:
                    os.unlink(file)
            module.exit_json(changed=bool(old), removed=old)
        if module.check_mode:
            client.get("/v1/status")  # it could be asked, at least
            module.exit_json(changed=True, snapshot={}, file="")
        if params["state"] == "taken":
            taken = take(one_node(client), params["timeout"])
            module.exit_json(changed=True, snapshot=taken)
        module.exit_json(**save(params, one_node(client)))
    except ApiError as error:
        module.fail_json(msg=error.message, outcome=error.outcome, error=error.name)
    except OSError as error:
        module.fail_json(msg=f"{error.filename or params['dest']}: {error.strerror}")


if __name__ == "__main__":
    main()
