#!/usr/bin/python
"""Ansible module: one key."""

from __future__ import annotations

DOCUMENTATION = r"""
module: dengine_kv
short_description: Set or delete one key of a dengine cluster
description:
  - Compares with a linearizable read first, and writes under the condition that nobody else has
    changed the key in between.
extends_documentation_fragment: dengine.core.api
options:
  key:
    description: The key, 1 to 511 bytes as UTF-8.
    type: str
    required: true
  value:
    description: The value. Required with O(state=present).
    type: str
  state:
    description: Whether the key is to be there.
    type: str
    choices: [present, absent]
    default: present
  secret:
    description: Keep the value out of results and diffs. No value is ever in the host's log.
    type: bool
    default: false
"""
EXAMPLES = r"""
- name: A feature is on
  dengine.core.dengine_kv:
    endpoints: [10.0.0.1:9081]
    key: features/search
    value: "on"
"""
RETURN = r"""
revision:
  description: Revision of the key. 0 when it is not there, and in check mode when it would change.
  type: int
  returned: always
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.dengine.core.plugins.module_utils.client import (
    API_SPEC,
    ApiError,
    Client,
    key_path,
)


def revision_of(reply):
    return int(reply.headers["ETag"].strip('"'))


def shown(value, secret):
    if value is None:
        return ""
    if secret:
        return "(hidden)\n"
    return value.decode("utf-8", "replace") + "\n"


def main():
    module = AnsibleModule(
        argument_spec={
            **API_SPEC,
            "key": {"type": "str", "required": True, "no_log": False},
            # Ansible logs each call on the host before this module can look at O(secret).
            "value": {"type": "str", "no_log": True},
            "state": {"type": "str", "default": "present", "choices": ["present", "absent"]},
            "secret": {"type": "bool", "default": False},
        },
        required_if=[("state", "present", ["value"])],
        supports_check_mode=True,
    )
    params, client = module.params, Client.of(module.params)
    if not params["secret"] and params["value"] != params["token"]:
        module.no_log_values.discard(params["value"])  # results may show it
    path = key_path(params["key"])
    present = params["state"] == "present"
    wanted = params["value"].encode("utf-8") if present else None
    try:
        reply = client.call("GET", path, accept=(404,))
        found = reply.body if reply.status == 200 else None
        revision = revision_of(reply) if found is not None else 0
        changed = found != wanted
        if changed and module.check_mode:
            revision = 0
        elif changed:
            unchanged = {"If-Match": f'"{revision}"'} if revision else {"If-None-Match": "*"}
            method = "PUT" if present else "DELETE"
            reply = client.call(method, path, wanted, unchanged)
            revision = reply.json()["revision"] if present else 0
    except ApiError as error:
        module.fail_json(msg=error.message, outcome=error.outcome, error=error.name)
    module.exit_json(
        changed=changed,
        revision=revision,
        diff={"before": shown(found, params["secret"]), "after": shown(wanted, params["secret"])},
    )


if __name__ == "__main__":
    main()
