#!/usr/bin/python
"""Ansible module: the replicated settings of a cluster."""

from __future__ import annotations

DOCUMENTATION = r"""
module: dengine_settings
short_description: Set the replicated settings of a dengine cluster
description: Reads the settings and changes those that differ, through any node.
extends_documentation_fragment: dengine.core.api
options:
  settings:
    description: Names and values, for example C(promotion=odd).
    type: dict
    required: true
"""
EXAMPLES = r"""
- name: Go from one voter to three in one change
  dengine.core.dengine_settings:
    endpoints: [10.0.0.1:9081]
    settings:
      promotion: odd
"""
RETURN = r"""
settings:
  description: All settings as they are, or in check mode as they would be.
  type: dict
  returned: always
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.dengine.core.plugins.module_utils.client import (
    API_SPEC,
    ApiError,
    Client,
)


def main():
    module = AnsibleModule(
        argument_spec={**API_SPEC, "settings": {"type": "dict", "required": True}},
        supports_check_mode=True,
    )
    wanted = module.params["settings"]
    client = Client.of(module.params)
    try:
        before = client.get("/v1/cluster")["settings"]
        change = {k: v for k, v in wanted.items() if before.get(k) != v}
        after = {**before, **change}
        if change and not module.check_mode:
            reply = client.change(
                "PUT",
                "/v1/cluster/settings",
                change,
                lambda view: all(view["settings"].get(k) == v for k, v in change.items()),
            )
            after = reply.json()["settings"] if reply else after
    except ApiError as error:
        module.fail_json(msg=error.message, outcome=error.outcome, error=error.name)
    module.exit_json(changed=bool(change), settings=after, diff={"before": before, "after": after})


if __name__ == "__main__":
    main()
