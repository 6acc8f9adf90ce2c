#!/usr/bin/python
"""Ansible module: what the cluster, and each asked node, say now."""

from __future__ import annotations

DOCUMENTATION = r"""
module: dengine_cluster_info
short_description: What a dengine cluster says about itself now
description:
  - Reads the cluster's view and each endpoint's own status. Never changes anything.
  - With O(wait) it repeats until the cluster has a leader, no change of members is under way and,
    where O(voters) is given, exactly these nodes vote and are reachable.
extends_documentation_fragment: dengine.core.api
options:
  voters:
    description: Node ids that must be the voters, all of them alive.
    type: list
    elements: int
  max_lag:
    description: Most entries that a voter may be behind, and every endpoint must be ready.
    type: int
  wait:
    description: Seconds to wait for that. 0 looks once.
    type: float
    default: 0.0
  required:
    description: Fail when nobody answers, or when what is waited for does not come.
    type: bool
    default: true
"""
EXAMPLES = r"""
- name: Wait until three nodes vote
  dengine.core.dengine_cluster_info:
    endpoints: [10.0.0.1:9081, 10.0.0.2:9082, 10.0.0.3:9083]
    voters: [1, 2, 3]
    wait: 30
"""
RETURN = r"""
answered:
  description: Whether the cluster's view could be had.
  type: bool
  returned: always
cluster:
  description: The body of GET /v1/cluster, or an empty dictionary.
  type: dict
  returned: always
voters:
  description: Ids of the voters.
  type: list
  elements: int
  returned: always
learners:
  description: Ids of the learners.
  type: list
  elements: int
  returned: always
nodes:
  description: For each endpoint its GET /v1/status as C(status), C(ready) and C(reason).
  type: dict
  returned: always
message:
  description: What is missing, in one sentence. Empty when nothing is.
  type: str
  returned: always
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.dengine.core.plugins.module_utils.client import (
    API_SPEC,
    ApiError,
    Client,
)
from ansible_collections.dengine.core.plugins.module_utils.view import sets, voters

POLL_S = 0.3


def look(client, wanted, max_lag):
    """Everything as it is now, with what is missing as `message`."""
    nodes = {}
    for endpoint in client.endpoints:
        one = client.only(endpoint)
        try:
            status = one.get("/v1/status")
            reply = one.call("GET", "/readyz", accept=(503,))
            reason = "" if reply.status == 200 else reply.json().get("message", "not ready")
            nodes[endpoint] = {"status": status, "ready": reply.status == 200, "reason": reason}
        except ApiError as error:
            nodes[endpoint] = {"status": {}, "ready": False, "reason": error.message}
    try:
        view = client.get("/v1/cluster")
        message = missing(view, wanted) or behind(view, nodes, max_lag)
    except ApiError as error:
        view, message = {}, error.message
    return {
        "answered": bool(view), "cluster": view, "nodes": nodes, "message": message, **sets(view)
    }  # fmt: skip


def missing(view, wanted):
    """Why this is not yet what is waited for; "" when it is."""
    if not view.get("leader"):
        return "there is no leader"
    if view["joint"]:
        return "a change of members is under way"
    if wanted is not None:
        if voters(view) != sorted(wanted):
            return f"the voters are {voters(view)}, not {sorted(wanted)}"
        silent = [m for m in view["members"] if m["status"] == "active" and m["ready"] is False]
        if silent:
            return "; ".join("node {}: {}".format(m["id"], m["reason"]) for m in silent)
    return ""


def behind(view, nodes, max_lag):
    """Who has not caught up; "" when all have, or when nobody asked."""
    if max_lag is None:
        return ""
    late = [m for m in view["members"] if (m["lag"] or 0) > max_lag]
    said = ["node {} is {} entries behind".format(m["id"], m["lag"]) for m in late]
    said += [f"{e}: {node['reason']}" for e, node in nodes.items() if not node["ready"]]
    return "; ".join(said)


def main():
    module = AnsibleModule(
        argument_spec={
            **API_SPEC,
            "voters": {"type": "list", "elements": "int"},
            "max_lag": {"type": "int"},
            "wait": {"type": "float", "default": 0.0},
            "required": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    params = module.params
    client = Client.of(params)
    client.patience = min(client.patience, params["wait"])
    deadline = time.monotonic() + params["wait"]
    while True:
        seen = look(client, params["voters"], params["max_lag"])
        if not seen["message"] or time.monotonic() + POLL_S >= deadline:
            break
        time.sleep(POLL_S)
    if params["required"] and (not seen["answered"] or (params["wait"] and seen["message"])):
        module.fail_json(msg="the cluster: " + seen["message"], **seen)
    module.exit_json(changed=False, **seen)


if __name__ == "__main__":
    main()
