#!/usr/bin/python
"""Ansible module: bring members to a state, and say how far they are."""

from __future__ import annotations

DOCUMENTATION = r"""
module: dengine_member
short_description: Wait for, promote, change or remove members of a dengine cluster
description:
  - Nodes join by themselves as learners. This module follows them until they are what O(state)
    says, promotes them when all are ready and the cluster's own policy has not done so, and removes
    members for good.
  - An action plugin of the same name runs the module again and again, shows a line of progress in
    between, and fails when nothing moves for O(stall_timeout) seconds. A node that has a whole
    snapshot is given the time to verify and unpack it, a second for each 10 MB. One on whose port
    nobody listens any more is given up after 20 seconds.
extends_documentation_fragment: dengine.core.api
options:
  ids:
    description: Node ids.
    type: list
    elements: int
    required: true
  state:
    description:
      - V(learner) is a member of any kind, V(ready) a learner that has caught up, or a voter.
      - V(voter) is a voter of a membership that is not in the middle of a change. Where the
        cluster's own policy does not promote, this module does, to an odd number of voters only.
      - V(absent) was removed; its id never returns.
      - V(present) changes address, zone or status of a member that is there.
    type: str
    choices: [learner, ready, voter, absent, present]
    default: voter
  expect_cluster_id:
    description: Refuse to deal with any other cluster.
    type: str
    default: ''
  address:
    description: For O(state=present), the address that the others dial.
    type: str
  zone:
    description: For O(state=present), the availability zone.
    type: str
  nodes:
    description:
      - Endpoint by node id, to ask nodes themselves that are no members yet. Members are asked
        where the cluster says that they are.
    type: dict
    default: {}
  slice:
    description: Seconds of waiting in one execution; the action plugin repeats executions.
    type: float
    default: 5.0
  timeout:
    description: Seconds of waiting in all.
    type: float
    default: 3600.0
  stall_timeout:
    description: Seconds without any progress, or of refused promotions, after which to give up.
    type: float
    default: 60.0
  lock:
    description:
      - File of the run lock on this host, which the action plugin keeps fresh while it waits, see
        M(dengine.core.dengine_lock). Without it none is touched.
    type: path
    default: ''
"""
EXAMPLES = r"""
- name: Nodes 2 and 3 vote
  dengine.core.dengine_member:
    endpoints: [10.0.0.1:9081]
    ids: [2, 3]
    state: voter

- name: Node 3 is gone for good
  dengine.core.dengine_member:
    endpoints: [10.0.0.1:9081]
    ids: [3]
    state: absent
"""
RETURN = r"""
before:
  description: Voters and learners as they were.
  type: dict
  returned: always
after:
  description: Voters and learners as they are, or in check mode as they would be.
  type: dict
  returned: always
done:
  description: Whether O(state) is reached.
  type: bool
  returned: always
refusal:
  description: Why the cluster refused to promote the nodes, when it did.
  type: str
  returned: when O(state) is not V(present)
ended:
  description: A sentence for each node on whose port nobody listens.
  type: list
  elements: str
  returned: when O(state) is not V(present)
unpacking_bytes:
  description: Size of the largest snapshot that a node verifies and unpacks now, or 0.
  type: int
  returned: when O(state) is not V(present)
progress:
  description: One line for each id.
  type: list
  elements: str
  returned: always
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.dengine.core.plugins.module_utils.client import (
    API_SPEC,
    REFUSED,
    ApiError,
    Client,
)
from ansible_collections.dengine.core.plugins.module_utils.view import (
    is_on_its_way,
    newest,
    progress_line,
    progress_mark,
    sets,
    unpacks,
)

POLL_S = 0.2
SELF_PROMOTION_S = 3.0  # so long the cluster's own policy goes first


def reached(view, ids, state):
    """Is every id what `state` says?"""
    if state == "voter" and view["joint"]:
        return False
    for node_id in ids:
        member = newest(view, node_id)
        if state == "absent":
            if member is not None:
                return False
        elif (
            member is None
            or (state == "voter" and member["status"] != "active")
            or (state == "ready" and not (member["status"] == "active" or member["ready"]))
        ):
            return False
    return True


def predicted(view, ids, state):
    """The member sets as they would be."""
    found = sets(view)
    if state == "absent":
        return {kind: [i for i in found[kind] if i not in ids] for kind in found}
    if state == "voter":
        return {
            "voters": sorted({*found["voters"], *ids}),
            "learners": [i for i in found["learners"] if i not in ids],
        }
    new = [i for i in ids if i not in found["voters"]]
    return {"voters": found["voters"], "learners": sorted({*found["learners"], *new})}


def follow(client, view, ids, state, seconds):
    """Wait until `state` is reached or `seconds` are over.

    Returns the last view, and why the cluster refused to promote, if it did.
    """
    deadline = time.monotonic() + seconds
    ready_since, refusal = None, ""
    while not reached(view, ids, state) and time.monotonic() < deadline:
        now = time.monotonic()
        if state == "voter" and not view["joint"] and reached(view, ids, "ready"):
            ready_since = ready_since or now
            if now - ready_since >= SELF_PROMOTION_S:
                ready_since = None
                refusal = _promote(client, view, ids)
        else:
            ready_since = None
        time.sleep(POLL_S)
        view = client.get("/v1/cluster")
    return view, refusal


def _promote(client, view, ids):
    """Promote those of `ids` that do not vote yet; returns why it was refused, or ""."""
    after = predicted(view, ids, "voter")["voters"]
    if len(after) % 2 == 0:
        raise ApiError(
            f"to promote {ids} would make {len(after)} voters, {after}: an even number tolerates "
            "no more failures than one less. Name one more learner, or one less"
        )
    waiting = [i for i in ids if newest(view, i)["status"] != "active"]
    try:
        client.call("POST", "/v1/cluster/promote", {"ids": waiting})
    except ApiError as error:
        if error.status != 409 and error.outcome != "unknown":
            raise
        return error.message  # not ready any more, or the policy was faster; or it stays like that
    return ""


def remove(client, view, ids):
    """Remove those of `ids` that are members; returns the view afterwards."""
    for node_id in ids:
        if newest(view, node_id) is not None:
            client.change(
                "DELETE",
                f"/v1/cluster/members/{node_id}",
                None,
                lambda now, gone=node_id: newest(now, gone) is None,
            )
    return client.get("/v1/cluster")


def own_words(client, view, ids, nodes):
    """What nodes that are not ready tell of themselves, by id: `job`, or `error`.

    The cluster sees nothing of a node that unpacks a snapshot, and nothing of one that has ended.
    """
    said = {}
    for node_id in ids:
        member = newest(view, node_id) or {"address": nodes.get(str(node_id))}
        if reached(view, [node_id], "ready") or not member["address"] or is_on_its_way(member):
            continue
        try:
            job = client.only(member["address"]).get("/v1/snapshots").get("job")
            said[node_id] = {"job": job or ""}
        except ApiError as error:
            said[node_id] = {"error": error.message, "ended": error.name == REFUSED}
    return said


def unpacking_bytes(client, view, said):
    """Size of what is unpacked; it is known as long as the transfer is remembered, or nearly so."""
    busy = [m for i, own in said.items() for m in [newest(view, i)] if m and unpacks(m, own)]
    sizes = [m["transfer"]["size_bytes"] for m in busy if m.get("transfer")]
    if busy and not sizes:
        sizes = [s["size_bytes"] for s in client.get("/v1/snapshots")["snapshots"]]
    return max(sizes, default=0)


def wrong_fields(view, params):
    """What of address and zone differs, by node id. A missing member is an error."""
    wanted = {k: params[k] for k in ("address", "zone") if params[k] is not None}
    differing = {}
    for node_id in params["ids"]:
        member = newest(view, node_id)
        if member is None:
            raise ApiError(f"node {node_id} is not a member of this cluster")
        change = {k: v for k, v in wanted.items() if member[k] != v}
        if change:
            differing[node_id] = change
    return differing


def apply_fields(client, differing):
    for node_id, change in differing.items():
        client.change(
            "PUT",
            f"/v1/cluster/members/{node_id}",
            change,
            lambda now, of=node_id, new=change: new.items() <= (newest(now, of) or {}).items(),
        )
    return client.get("/v1/cluster")


def run(module, client):
    params = module.params
    ids, state = params["ids"], params["state"]
    view = client.get("/v1/cluster")
    expected = params["expect_cluster_id"]
    if expected and view["cluster_id"] != expected:
        module.fail_json(
            msg="this is cluster {}, not {}: correct the endpoints".format(
                view["cluster_id"], expected
            )
        )
    before, refusal = sets(view), ""
    if state == "present":
        differing = wrong_fields(view, params)
        fields = ("address", "zone")
        old = {i: {k: newest(view, i)[k] for k in fields} for i in differing}
        new = {i: {**old[i], **change} for i, change in differing.items()}
        if differing and not module.check_mode:
            view = apply_fields(client, differing)
        return {
            "changed": bool(differing),
            "before": before,
            "after": sets(view),
            "done": True,
            "diff": {"before": old, "after": new},
        }
    said = {}
    if module.check_mode:
        after = predicted(view, ids, state)
        changed = after != before
        done = True
    else:
        if state == "absent":
            view = remove(client, view, ids)
        else:
            view, refusal = follow(client, view, ids, state, params["slice"])
        after = sets(view)
        changed = after != before
        done = reached(view, ids, state)
        if not done and state != "absent":
            said = own_words(client, view, ids, params["nodes"])
    return {
        "changed": changed,
        "before": before,
        "after": after,
        "done": done,
        "diff": {"before": before, "after": after},
        "refusal": "" if done else refusal,
        "ended": [
            f"node {i} does not run: {o['error']}" for i, o in said.items() if o.get("ended")
        ],
        "unpacking_bytes": unpacking_bytes(client, view, said),
        "progress": [progress_line(view, i, said.get(i)) for i in ids],
        "mark": progress_mark(view, ids),
        "cluster": view,
    }


def main():
    module = AnsibleModule(
        argument_spec={
            **API_SPEC,
            "ids": {"type": "list", "elements": "int", "required": True},
            "state": {
                "type": "str",
                "default": "voter",
                "choices": ["learner", "ready", "voter", "absent", "present"],
            },
            "expect_cluster_id": {"type": "str", "default": ""},
            "address": {"type": "str"},
            "zone": {"type": "str"},
            "nodes": {"type": "dict", "default": {}},
            "slice": {"type": "float", "default": 5.0},
            "timeout": {"type": "float", "default": 3600.0},
            "stall_timeout": {"type": "float", "default": 60.0},
            "lock": {"type": "path", "default": ""},
        },
        supports_check_mode=True,
    )
    try:
        result = run(module, Client.of(module.params))
    except ApiError as error:
        module.fail_json(msg=error.message, outcome=error.outcome, error=error.name)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
