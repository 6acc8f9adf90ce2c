#!/usr/bin/python
"""Ansible module: who leads."""

from __future__ import annotations

DOCUMENTATION = r"""
module: dengine_leader
short_description: Move the leadership of a dengine cluster
description:
  - Hands leadership to O(node_id), or away from O(not_node_id) to the living voter that lags least.
  - Nothing happens when that is so already.
  - Nothing can be written while leadership moves, until an election timeout is over if it does not.
    So a node that is far behind is refused, and no more than two attempts are made.
extends_documentation_fragment: dengine.core.api
options:
  node_id:
    description: Who is to lead.
    type: int
  not_node_id:
    description: Who is not to lead.
    type: int
  max_lag:
    description: Most entries that who takes over may be behind.
    type: int
    default: 1000
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
ATTEMPTS = 2
FOR_GOOD = (400, 401, 403, 404, 409)


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


def require_close(view, target, max_lag):
    """Refuse who could not take over within an election timeout. Raises ApiError."""
    lag = max((m["lag"] or 0 for m in view["members"] if m["id"] == target), default=0)
    if lag > max_lag:
        raise ApiError(
            f"node {target} is {lag} entries behind, and may be {max_lag}: while leadership moves "
            "to it, nothing can be written. Wait until it has caught up, see `dengine members`"
        )


def transfer(client, target):
    """Ask until `target` leads, or has failed to take over for the second time."""
    deadline = time.monotonic() + client.patience
    attempts = 0
    while True:
        error = _ask(client, target)
        # Whatever was answered, or was not: what counts is who leads.
        leader = _leader(client, deadline)
        if leader == target:
            return
        attempts += error is None or _was_tried(error)
        if attempts >= ATTEMPTS or time.monotonic() >= deadline:
            raise error or ApiError(f"node {target} did not take over", outcome="unknown")
        time.sleep(POLL_S)


def _ask(client, target):
    """One attempt, through the first endpoint that passes it on; returns the error, if any."""
    error = ApiError("no endpoint is given")
    for endpoint in client.endpoints:
        try:
            client.only(endpoint).call("POST", "/v1/cluster/leader", {"id": target})
        except ApiError as failure:
            if failure.status in FOR_GOOD:
                raise
            error = failure
            if not _was_tried(error):
                continue
            return error
        return None
    return error


def _was_tried(error):
    return error.outcome != "none" or error.name == "propose_failed"


def _leader(client, deadline):
    """Id of who leads; waits while nobody does."""
    while True:
        leader = client.get("/v1/cluster").get("leader") or {}
        if leader or time.monotonic() >= deadline:
            return leader.get("id")
        time.sleep(POLL_S)


def main():
    module = AnsibleModule(
        argument_spec={
            **API_SPEC,
            "node_id": {"type": "int"},
            "not_node_id": {"type": "int"},
            "max_lag": {"type": "int", "default": 1000},
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
        if changed:
            require_close(view, target, module.params["max_lag"])
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
