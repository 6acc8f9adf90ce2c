"""Action plugin: a large file from a host, piece by piece.

Where it has to become somebody else, `fetch` holds the whole file in memory on both sides, and it
writes under the final name. This one asks for a piece at a time, with any connection and any way to
become, and gives the file its name when it is complete and has the right digest.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shlex

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

PIECE = 8 * 1024 * 1024
BLOCK = 1024 * 1024
DIGEST_BYTES = 32


class ActionModule(ActionBase):
    """See the module of the same name."""

    TRANSFERS_FILES = False
    _requires_connection = True

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        _, args = self.validate_argument_spec(
            argument_spec={
                "src": {"type": "path", "required": True},
                "dest": {"type": "path", "required": True},
                "sha256": {"type": "str", "required": True},
                "size_bytes": {"type": "int", "required": True},
            }
        )
        dest, size, wanted = args["dest"], args["size_bytes"], args["sha256"]
        result.update(changed=False, file=dest)
        if _is(dest, size, wanted):
            return result
        result["changed"] = True
        if self._task.check_mode:
            return result
        partial = dest + ".part"
        result["resumed_at"] = self._fill(args["src"], partial, size)
        if not _is(partial, size, wanted):
            os.unlink(partial)
            raise AnsibleActionFail(f"{args['src']} did not arrive as it is: run this again")
        os.rename(partial, dest)
        _sync(os.path.dirname(dest))
        return result

    def _fill(self, source, partial, size):
        """Append what `partial` lacks; returns how much an earlier run had left."""
        with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            begin = min(file.seek(0, os.SEEK_END), size) // BLOCK * BLOCK
            file.truncate(begin)
            file.seek(begin)
            have = begin
            while have < size:
                piece = self._piece(source, have)
                if not piece:
                    raise AnsibleActionFail(f"{source} ends at {have} of {size} bytes")
                file.write(piece)
                have += len(piece)
            file.flush()
            os.fsync(file.fileno())
        return begin

    def _piece(self, source, begin):
        """Whole blocks from `begin` on, which is where a block begins."""
        command = (
            f"dd if={shlex.quote(source)} bs={BLOCK} skip={begin // BLOCK} count={PIECE // BLOCK} "
            "status=none | base64 -w0"
        )
        said = self._low_level_execute_command(command)
        if said["rc"] != 0 or (said["stderr"].strip() and not said["stdout"].strip()):
            raise AnsibleActionFail(f"{source}: {said['stderr'].strip() or said['stdout'].strip()}")
        return base64.b64decode(said["stdout"].strip(), validate=True)


def _is(path, size, wanted):
    """Is that the file? The SHA-256 of a snapshot is of all but its end, which repeats it."""
    if not os.path.exists(path) or os.path.getsize(path) != size:
        return False
    digest, left = hashlib.sha256(), size - DIGEST_BYTES
    with open(path, "rb") as file:
        while left > 0:
            piece = file.read(min(BLOCK, left))
            digest.update(piece)
            left -= len(piece)
        return digest.hexdigest() == wanted and file.read() == digest.digest()


def _sync(directory):
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
