#!/usr/bin/python
"""Documentation of the action plugin of the same name: nothing of it runs on a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: dengine_fetch
short_description: Fetch a snapshot from a host, however large it is
description:
  - Copies a snapshot to the controller in pieces, with memory for one piece on either side, also
    where privileges are escalated. What an interrupted run left is gone on with.
  - The file has its name only when it is complete, durable, and has the digest; its mode is 0600.
options:
  src:
    description: The file on the host.
    type: path
    required: true
  dest:
    description: The file on the controller, in a directory that exists.
    type: path
    required: true
  sha256:
    description: The SHA-256 that names the snapshot, as dengine_snapshot returns it.
    type: str
    required: true
  size_bytes:
    description: The size of the file.
    type: int
    required: true
"""
EXAMPLES = r"""
- name: Fetch a backup
  dengine.core.dengine_fetch:
    src: "{{ copy.file }}"
    dest: "/srv/backups/{{ copy.file | basename }}"
    sha256: "{{ copy.snapshot.sha256 }}"
    size_bytes: "{{ copy.snapshot.size_bytes }}"
"""
RETURN = r"""
file:
  description: The file on the controller.
  type: str
  returned: always
resumed_at:
  description: Bytes that an earlier run had left.
  type: int
  returned: when it was fetched
"""
