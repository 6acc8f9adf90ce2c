#!/usr/bin/python
"""Ansible module: do all nodes agree?"""

from __future__ import annotations

DOCUMENTATION = r"""
module: dengine_verify
short_description: Check that all nodes of a dengine cluster agree, under load as well
description:
  - Compares every node's view, its members and zones, writes one canary key through each node and
    reads it from all others, and compares the keys that the nodes hold.
  - The canaries are the only thing that it writes; they always hold the same value and are left
    alone when they do already.
extends_documentation_fragment: dengine.core.api
options:
  voters:
    description: Node ids that must be the voters.
    type: list
    elements: int
    required: true
  zones:
    description:
      - Zone by node id, as the inventory has them. With them it is also judged whether the voters
        are spread so that losing one zone leaves a majority; three voters need three zones.
    type: dict
    default: {}
  shared_zones:
    description: Losing one zone may stop the cluster.
    type: bool
    default: false
  ids:
    description: Node id by endpoint, as the inventory has them. Each endpoint must be that node.
    type: dict
    default: {}
  max_keys:
    description: Most keys to compare on each node; 0 compares none.
    type: int
    default: 20000
  canary_prefix:
    description: Keys of the canaries begin with this. Empty writes none.
    type: str
    default: .dengine/canary/
"""
EXAMPLES = r"""
- name: All three agree
  dengine.core.dengine_verify:
    endpoints: [10.0.0.1:9081, 10.0.0.2:9082, 10.0.0.3:9083]
    voters: [1, 2, 3]
"""
RETURN = r"""
problems:
  description: One sentence for each thing that is not as it must be.
  type: list
  elements: str
  returned: always
compared_keys:
  description: How many keys were compared on each node.
  type: int
  returned: always
cluster:
  description: The view of the first node.
  type: dict
  returned: always
"""

import base64
import http.client
import urllib.parse

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.dengine.core.plugins.module_utils.client import (
    API_SPEC,
    ApiError,
    Client,
    key_path,
)
from ansible_collections.dengine.core.plugins.module_utils.view import voters

PAGE = 1000
VALUE = b"dengine"


def view_problems(views, wanted):
    """What is wrong with the membership, as every endpoint sees it."""
    problems = []
    first = next(iter(views.values()))
    for endpoint, view in views.items():
        if view["cluster_id"] != first["cluster_id"]:
            problems.append(
                "{} belongs to cluster {}, not {}".format(
                    endpoint, view["cluster_id"], first["cluster_id"]
                )
            )
        if voters(view) != sorted(wanted):
            problems.append(f"{endpoint} sees the voters {voters(view)}, not {sorted(wanted)}")
        if view["joint"]:
            problems.append(f"{endpoint} sees a change of members under way")
    for member in first["members"]:
        if member["status"] == "active" and member["ready"] is False:
            problems.append("node {}: {}".format(member["id"], member["reason"]))
    tolerance = (len(wanted) - 1) // 2
    if first["fault_tolerance"] < tolerance:
        problems.append(
            "only {} more voters may fail, not {}".format(first["fault_tolerance"], tolerance)
        )
    count = len(voters(first))
    if count % 2 == 0:
        problems.append(f"{count} voters: an even number tolerates no more failures than one less")
    return problems


def identity_problems(client, ids):
    """Endpoints at which another node answers than the inventory says."""
    problems = []
    for endpoint in client.endpoints:
        if endpoint in ids:
            said = client.only(endpoint, client.patience).get("/v1/status").get("node_id")
            if said != int(ids[endpoint]):
                problems.append(
                    f"{endpoint} is node {said}, the inventory says {ids[endpoint]}: swapped "
                    "addresses?"
                )
    return problems


def zone_problems(view, zones, shared_zones):
    """Zones that are not as the inventory says, or have too many of the voters."""
    problems, used = [], {}
    for member in view["members"]:
        zone = zones.get(str(member["id"]))
        if zone is not None and member["zone"] != zone:
            problems.append(
                "node {} is in zone {!r}, the inventory says {!r}".format(
                    member["id"], member["zone"], zone
                )
            )
        if member["status"] == "active":
            used.setdefault(member["zone"], set()).add(member["id"])
    count = len(voters(view))
    for zone, ids in sorted(used.items()):
        if zones and not shared_zones and len(ids) > max(1, (count - 1) // 2):
            problems.append(
                f"zone {zone!r} has {len(ids)} of {count} voters ({sorted(ids)}): losing it would "
                "stop the cluster"
            )
    return problems


def canary_problems(client, prefix):
    """A key written through each node is read from all others."""
    problems = []
    for endpoint in client.endpoints:
        path = key_path(prefix + endpoint)
        writer = client.only(endpoint, client.patience)
        if writer.call("GET", path, accept=(404,)).body != VALUE:
            writer.call("PUT", path, VALUE)
        for other in client.endpoints:
            reply = client.only(other, client.patience).call("GET", path, accept=(404,))
            if reply.status != 200 or reply.body != VALUE:
                problems.append(f"what was written through {endpoint} is not there on {other}")
    return problems


def held(node, max_keys):
    """Revision by key of at most `max_keys` keys on one node, and where the listing ended.

    A key is bytes, in whose order they are listed: not every key is text.
    """
    found, after = {}, ""
    while True:
        page = node.get(f"/v1/kv?limit={PAGE}&keys_only=true{after}")
        for item in page["items"]:
            text = item.get("key")
            key = base64.b64decode(item["key_base64"]) if text is None else text.encode("utf-8")
            found[key] = item["mod_revision"]
        if page["next"] is None:
            return found, None
        if len(found) >= max_keys:
            return found, max(found)
        after = "&after=" + page["next"]


def data_problems(client, max_keys):
    """Every node holds the same keys at the same revisions, while clients write.

    Two listings are not of one moment, so a key that differs is looked up again on both nodes, with
    reads that are linearizable: if it still differs without having changed, the nodes differ.
    """
    # One connection for each node: thousands of keys may differ, and ports are not without end.
    nodes = {e: client.only(e, client.patience, keep=True) for e in client.endpoints}
    try:
        listings = {e: held(node, max_keys) for e, node in nodes.items()}
        return _differing(nodes, listings), len(next(iter(listings.values()))[0])
    finally:
        for node in nodes.values():
            node.close()


def _differing(nodes, listings):
    """A sentence for each node that holds something else than the first one."""
    first, (reference, end) = next(iter(listings.items()))
    problems = []
    for endpoint, (found, own_end) in listings.items():
        ends = [x for x in (end, own_end) if x is not None]
        keys = [k for k in {*reference, *found} if not ends or k <= min(ends)]
        for key in sorted(k for k in keys if reference.get(k) != found.get(k)):
            one, other = (_settled(nodes[e], key) for e in (first, endpoint))
            if one != other and _settled(nodes[first], key) == one:
                name = key.decode("utf-8", "backslashreplace")
                problems.append(f"{first} and {endpoint} differ at key {name!r}")
                break
    return problems


def _settled(node, key):
    """The revision of one key, by a linearizable read."""
    try:
        path = key_path(key.decode("utf-8"))
    except UnicodeDecodeError:
        encoded = base64.b64encode(key).decode("ascii")
        path = "/v1/kv?key_base64=" + urllib.parse.quote(encoded, safe="")
    reply = node.call("GET", path, accept=(404,))
    return reply.headers["ETag"] if reply.status == 200 else None


def main():
    module = AnsibleModule(
        argument_spec={
            **API_SPEC,
            "voters": {"type": "list", "elements": "int", "required": True},
            "zones": {"type": "dict", "default": {}},
            "shared_zones": {"type": "bool", "default": False},
            "ids": {"type": "dict", "default": {}},
            "max_keys": {"type": "int", "default": 20000, "no_log": False},
            "canary_prefix": {"type": "str", "default": ".dengine/canary/"},
        },
        supports_check_mode=True,
    )
    params, client = module.params, Client.of(module.params)
    views, problems, compared = {}, [], 0
    for endpoint in client.endpoints:
        try:
            views[endpoint] = client.only(endpoint, client.patience).get("/v1/cluster")
        except ApiError as error:
            problems.append(error.message)
    if views:
        problems += view_problems(views, params["voters"])
        first = next(iter(views.values()))
        problems += zone_problems(first, params["zones"], params["shared_zones"])
        client.endpoints = list(views)  # who does not answer is a problem; the others are compared
        try:
            problems += identity_problems(client, params["ids"])
            if params["canary_prefix"] and not module.check_mode:
                problems += canary_problems(client, params["canary_prefix"])
            if params["max_keys"]:
                differing, compared = data_problems(client, params["max_keys"])
                problems += differing
        except (ApiError, OSError, http.client.HTTPException) as error:
            problems.append(str(error))
    # A canary is no change that an operator cares about: it never is one of their keys.
    module.exit_json(
        changed=False,
        problems=problems,
        compared_keys=compared,
        cluster=next(iter(views.values()), {}),
    )


if __name__ == "__main__":
    main()
