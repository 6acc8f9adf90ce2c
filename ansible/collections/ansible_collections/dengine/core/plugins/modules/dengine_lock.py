#!/usr/bin/python
"""Ansible module: one operator at a time."""

from __future__ import annotations

DOCUMENTATION = r"""
module: dengine_lock
short_description: Let only one run at a time change a cluster
description:
  - A small file on one host says who is at work. An action plugin of the same name adds who runs
    this playbook, and takes the lock from a run on the same controller that has ended.
  - A lock that was not refreshed for O(ttl) seconds may be taken by anybody.
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
    description: Nonce of a holder that is known to have ended.
    type: str
    default: ''
  force:
    description: Take it whoever has it.
    type: bool
    default: false
  ttl:
    description: Seconds after which an unrefreshed lock counts for nothing.
    type: float
    default: 900.0
"""
EXAMPLES = r"""
- name: Nobody else changes this cluster now
  dengine.core.dengine_lock:
    path: /run/lock/dengine-deploy.json
"""
RETURN = r"""
held:
  description: Whether the one who asks has it, or in check mode could have it.
  type: bool
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
    owner = params["owner"]
    if module.check_mode and not os.path.exists(params["path"]):
        module.exit_json(changed=False, held=True, holder={})
    try:
        os.makedirs(os.path.dirname(params["path"]), mode=0o755, exist_ok=True)
        descriptor = os.open(params["path"], os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        module.fail_json(msg="{}: {}".format(params["path"], error.strerror))
    with os.fdopen(descriptor, "r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        holder = read(file)
        mine = holder.get("nonce") == owner.get("nonce")
        stale = time.time() - holder.get("refreshed", 0) > params["ttl"]
        free = not holder or mine or stale or params["force"]
        free = free or (params["take_from"] and holder.get("nonce") == params["take_from"])
        if params["state"] == "held" and free:
            holder = {**owner, "refreshed": time.time()}
            if not module.check_mode:
                write(file, holder)
        elif params["state"] == "released" and mine and not module.check_mode:
            write(file, {})
            holder = {}
    module.exit_json(changed=False, held=bool(free), holder=holder)


if __name__ == "__main__":
    main()
