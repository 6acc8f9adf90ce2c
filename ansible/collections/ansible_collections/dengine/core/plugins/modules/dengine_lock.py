#!/usr/bin/python
"""Ansible module: one operator at a time."""

from __future__ import annotations

DOCUMENTATION = r"""
module: dengine_lock
short_description: Let only one run at a time change a cluster
description:
  - A small file on one host says who is at work. An action plugin of the same name adds who runs
    this playbook. It takes the lock from a run of this very controller that has ended, and from one
    elsewhere that has not refreshed it for as long as that run said it would at most; never from
    a run of this controller that goes on.
options:
  path:
    description: The file.
    type: path
    required: true
  state:
    description: Take (or refresh) it, or let it go.
    type: str
    choices: [held, released]
    default: held
  owner:
    description: Who asks; the action plugin fills it in.
    type: dict
    default: {}
  take_from:
    description: Nonce of a holder that has ended, or that was not heard of for too long.
    type: str
    default: ''
  force:
    description: Take it whoever has it.
    type: bool
    default: false
  ttl:
    description: Seconds for which the one who asks may be silent. It stands in the lock.
    type: float
    default: 900.0
"""
EXAMPLES = r"""
- name: Nobody else changes this cluster now
  dengine.core.dengine_lock:
    path: /run/dengine-deploy.json
"""
RETURN = r"""
held:
  description: Whether the one who asks has it, or in check mode could have it.
  type: bool
  returned: always
stale:
  description: Whether the holder before this was silent for longer than it said.
  type: bool
  returned: always
ttl:
  description: Seconds for which the holder may be silent.
  type: float
  returned: always
holder:
  description: Who has it.
  type: dict
  returned: always
"""

import fcntl
import json
import os
import time

from ansible.module_utils.basic import AnsibleModule


def read(file):
    file.seek(0)
    try:
        found = json.loads(file.read() or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def write(file, holder):
    file.seek(0)
    file.truncate()
    file.write(json.dumps(holder))
    file.flush()
    os.fsync(file.fileno())


def decide(holder, params):
    """Who holds the lock after this, and whether that is the one who asks."""
    mine = holder.get("nonce") == params["owner"].get("nonce")
    if params["state"] == "released":
        return ({} if mine else holder), mine or not holder
    taken = params["take_from"] and holder.get("nonce") == params["take_from"]
    if not holder or mine or taken or params["force"]:
        return {**params["owner"], "refreshed": time.time(), "ttl": params["ttl"]}, True
    return holder, False


def open_file(module, path):
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except PermissionError as error:
        module.fail_json(msg=f"{path}: {error.strerror}: set ansible_become: true for the group")
    except OSError as error:
        module.fail_json(msg=f"{path}: {error.strerror}")


def main():
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "state": {"type": "str", "default": "held", "choices": ["held", "released"]},
            "owner": {"type": "dict", "default": {}},
            "take_from": {"type": "str", "default": ""},
            "force": {"type": "bool", "default": False},
            "ttl": {"type": "float", "default": 900.0},
        },
        supports_check_mode=True,
    )
    params = module.params
    path, here = params["path"], os.path.exists(params["path"])
    if not here and (module.check_mode or params["state"] == "released"):
        module.exit_json(changed=False, held=True, holder={}, stale=False, ttl=params["ttl"])
    with os.fdopen(open_file(module, path), "r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = read(file)
        holder, held = decide(before, params)
        if holder != before and not module.check_mode:
            write(file, holder)
    ttl = float(before.get("ttl", params["ttl"]))
    stale = time.time() - before.get("refreshed", 0) > ttl
    module.exit_json(changed=False, held=held, holder=holder, stale=stale, ttl=ttl)


if __name__ == "__main__":
    main()
