#!/usr/bin/python
"""Ansible module: who leads."""

from __future__ import annotations

DOCUMENTATION = r"""
module: dengine_leader
short_description: Move the leadership of a dengine cluster
description:
  - Hands leadership to O(node_id), or away from O(not_node_id) to the living voter that lags least.
  - Nothing happens when that is so already.
extends_documentation_fragment: dengine.core.api
options:
  node_id:
    description: Who is to lead.
    type: int
  not_node_id:
    description: Who is not to lead.
    type: int
"""
EXAMPLES = r"""
- name: Node 2 leads
  dengine.core.dengine_leader:
    endpoints: [10.0.0.1:9081]
    node_id: 2
"""
RETURN = r"""
leader:
  description: Id of the leader now, or in check mode of the one that would lead.
  type: int
  returned: always
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.dengine.core.plugins.module_utils.client import (
    API_SPEC,
    ApiError,
    Client,
)

POLL_S = 0.1


def successor(view, leaving):
    """The voter that should take over from `leaving`; ApiError when none can."""
    able = [
        m
        for m in view["members"]
        if m["status"] == "active" and m["id"] != leaving and m["ready"] is not False
    ]
    if not able:
        raise ApiError(f"no other voter is alive: leadership cannot leave node {leaving}")
    return min(able, key=lambda m: (m["lag"] or 0, m["id"]))["id"]


def transfer(client, target):
    """Ask until `target` leads; a refusal that may pass is asked again."""
    deadline = time.monotonic() + client.patience
    while True:
        try:
            client.call("POST", "/v1/cluster/leader", {"id": target})
        except ApiError as error:
            if error.status in (400, 404, 409) or time.monotonic() >= deadline:
                raise
        leader = client.get("/v1/cluster").get("leader") or {}
        if leader.get("id") == target:
            return
        if time.monotonic() >= deadline:
            raise ApiError(f"node {target} did not take over in time", outcome="unknown")
        time.sleep(POLL_S)


def main():
    module = AnsibleModule(
        argument_spec={
            **API_SPEC,
            "node_id": {"type": "int"},
            "not_node_id": {"type": "int"},
        },
        required_one_of=[("node_id", "not_node_id")],
        mutually_exclusive=[("node_id", "not_node_id")],
        supports_check_mode=True,
    )
    client = Client.of(module.params)
    try:
        view = client.get("/v1/cluster")
        leader = (view.get("leader") or {}).get("id")
        target, leaving = module.params["node_id"], module.params["not_node_id"]
        if target is None:
            target = successor(view, leaving) if leader == leaving else leader
        changed = leader != target
        if changed and not module.check_mode:
            transfer(client, target)
    except ApiError as error:
        module.fail_json(msg=error.message, outcome=error.outcome, error=error.name)
    module.exit_json(
        changed=changed,
        leader=target,
        diff={"before": {"leader": leader}, "after": {"leader": target}},
    )


if __name__ == "__main__":
    main()
