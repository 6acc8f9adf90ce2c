#!/usr/bin/python
"""Ansible module: take a snapshot and keep a verified copy."""

from __future__ import annotations

DOCUMENTATION = r"""
module: dengine_snapshot
short_description: Take, download and check snapshots of a dengine node
description:
  - V(taken) has the node write a snapshot. V(saved) also downloads it to O(dest), resuming what an
    earlier run left of the same one, compares it with the SHA-256 that the node names, and only
    then gives it its name. V(pruned) deletes the oldest copies of that name, and what is left of
    downloads of them that nobody has gone on with for an hour.
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

import hashlib
import http.client
import os
import re
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
SUFFIX = ".dsnap"
LEFTOVER_S = 3600  # a download that nobody wrote to for so long has ended


def take(client, timeout):
    """A new snapshot of the node; waits for one that takes longer than a request."""
    endpoint = client.endpoints[0]
    reply = client.call("POST", "/v1/snapshots", b"")
    deadline = time.monotonic() + timeout
    while reply.json()["state"] != "done":
        if time.monotonic() >= deadline:
            raise ApiError(f"{endpoint}: the snapshot is not finished after {timeout:g} s")
        time.sleep(POLL_S)
        listing = client.get("/v1/snapshots")
        if not listing["job"]:
            if listing["last_error"]:
                raise ApiError("{}: {}".format(endpoint, listing["last_error"]))
            return listing["snapshots"][-1]
    return reply.json()["snapshot"]


def newest_complete(client):
    """The newest snapshot, if nothing was applied since; else None."""
    snapshots = client.get("/v1/snapshots")["snapshots"]
    applied = client.get("/v1/status")["last_applied"]
    return snapshots[-1] if snapshots and snapshots[-1]["index"] == applied else None


def download(client, snapshot, path, timeout):
    """`path` with exactly that snapshot, durable before it has its name."""
    partial = path + "." + snapshot["sha256"][:16] + ".part"
    deadline = time.monotonic() + timeout
    while size(partial) < snapshot["size_bytes"]:
        before, reason = size(partial), "the node sends nothing more"
        try:
            _fetch(client, snapshot, partial, deadline)
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        have = size(partial)
        if have < snapshot["size_bytes"] and time.monotonic() >= deadline:
            raise ApiError(
                "the download has {} of {} bytes after {:g} s: {}".format(
                    have, snapshot["size_bytes"], timeout, reason
                )
            )
        if have == before:
            time.sleep(POLL_S)
    if sha256(partial) != snapshot["sha256"]:
        os.unlink(partial)
        raise ApiError("the downloaded snapshot does not have the SHA-256 that the node names")
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.rename(partial, path)
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def size(path):
    """Bytes of a file; 0 where there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def _fetch(client, snapshot, partial, deadline):
    """Append what is missing; a node that lost the file in the meantime is an ApiError."""
    have = size(partial)
    endpoint = client.endpoints[0]
    headers = {"Range": f"bytes={have}-"} if have else {}
    connection, response = client.open(
        endpoint, "GET", "/v1/snapshots/" + snapshot["sha256"], headers=headers
    )
    try:
        if response.status not in (200, 206):
            raise ApiError(f"{endpoint}: the download was refused ({response.status})")
        mode = "ab" if response.status == 206 else "wb"
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if mode == "ab" else os.O_TRUNC)
        with os.fdopen(os.open(partial, flags, 0o600), mode) as file:
            while time.monotonic() < deadline:
                piece = response.read(PIECE)
                if not piece:
                    break
                file.write(piece)
    finally:
        connection.close()


def sha256(path):
    """The SHA-256 that names a snapshot: of all but its last 32 bytes, which repeat it.

    "" for a file that does not end with its own.
    """
    left = os.path.getsize(path) - DIGEST_BYTES
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while left > 0:
            piece = file.read(min(PIECE, left))
            digest.update(piece)
            left -= len(piece)
        return digest.hexdigest() if file.read() == digest.digest() else ""


def surplus(dest, name, keep):
    """Copies of that name beyond the newest `keep`, oldest first, then leftovers of downloads.

    What begins with the name and goes on otherwise is somebody else's: of another cluster, perhaps.
    """
    own = re.compile(rf"{re.escape(name)}-(\d+)(-[0-9a-f]+)?{re.escape(SUFFIX)}(.*\.part)?")
    copies, leftovers = [], []
    for match in filter(None, map(own.fullmatch, os.listdir(dest))):
        file = os.path.join(dest, match.group())
        written = os.path.getmtime(file)
        if not match[3]:
            copies.append((int(match[1]), written, file))
        elif written < time.time() - LEFTOVER_S:
            leftovers.append(file)
    old = sorted(copies)[: max(0, len(copies) - keep)]
    return [file for _, _, file in old] + sorted(leftovers)


def save(module, client):
    params = module.params
    os.makedirs(params["dest"], mode=0o700, exist_ok=True)
    snapshot = None if params["fresh"] else newest_complete(client)
    snapshot = snapshot or take(client, params["timeout"])
    file = os.path.join(
        params["dest"],
        "{}-{:012d}-{}{}".format(
            params["name"], snapshot["index"], snapshot["sha256"][:16], SUFFIX
        ),
    )
    have = os.path.exists(file) and sha256(file) == snapshot["sha256"]
    if not have:
        download(client, snapshot, file, params["timeout"])
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
            module.exit_json(changed=True, snapshot=take(client, params["timeout"]))
        module.exit_json(**save(module, client))
    except ApiError as error:
        module.fail_json(msg=error.message, outcome=error.outcome, error=error.name)
    except OSError as error:
        module.fail_json(msg=f"{error.filename or params['dest']}: {error.strerror}")


if __name__ == "__main__":
    main()
