#!/usr/bin/python
"""Ansible module: one host before, and while, it carries a node."""

from __future__ import annotations

DOCUMENTATION = r"""
module: dengine_probe
short_description: Look at a host that carries, or is to carry, a dengine node
description:
  - V(facts) says what runs and what lies in the data directory. V(checks) judges the host.
    V(listen) has a stand-in answer on the node's port for a while, V(connect) measures the way to
    others, V(hush) ends the stand-in.
  - Never changes what dengine uses; the stand-in ends by itself.
options:
  action:
    description: What to do.
    type: str
    choices: [facts, checks, listen, connect, hush]
    required: true
  config:
    description: The node's configuration file.
    type: path
    default: /etc/dengine/dengine.toml
  data_dir:
    description: The node's own data directory, C(<db_root_dir>/<node_id>).
    type: path
    default: /var/lib/dengine
  current:
    description: The link to the release in use.
    type: path
    default: /opt/dengine/current
  listen_address:
    description: Where the node listens, as C(host:port).
    type: str
    default: 127.0.0.1:9081
  secrets_dir:
    description: Directory of the files peer_secret and token. Only looked at, never read.
    type: path
    default: /etc/dengine/secrets
  backend:
    description: What runs the node.
    type: str
    choices: [systemd, process]
    default: systemd
  checks:
    description: Names of the checks for O(action=checks).
    type: list
    elements: str
    default: []
  data_bytes:
    description:
      - What the data of the largest member take, for check C(disk_space); a host that joins has
        none of its own to go by.
    type: int
    default: 0
  limits:
    description: Limits by name; those that are not named have the collection's defaults.
    type: dict
    default: {}
  targets:
    description: Endpoints for O(action=connect).
    type: list
    elements: str
    default: []
  seconds:
    description: Life of the stand-in.
    type: float
    default: 60.0
"""
EXAMPLES = r"""
- name: Is this host good enough?
  dengine.core.dengine_probe:
    action: checks
    checks: [python, memory, disk_space, fsync]
    data_dir: /var/lib/dengine/2
"""
RETURN = r"""
rows:
  description: One row per check with C(check), C(status), C(measured), C(limit) and C(hint).
  type: list
  elements: dict
  returned: when O(action=checks)
facts:
  description: Process, identity of the data directory, versions, files, traces of a cluster.
  type: dict
  returned: when O(action=facts)
ways:
  description: For each target error, rtt_ms, rtt_p99_ms and offset_ms.
  type: dict
  returned: when O(action=connect)
"""

import os
import platform
import sys

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.dengine.core.plugins.module_utils import checks, host, network
from ansible_collections.dengine.core.plugins.module_utils.client import ApiError

PROBES_PER_WAY = 20


def facts(params):
    data_dir = params["data_dir"]
    release = os.path.realpath(params["current"]) if os.path.islink(params["current"]) else ""
    point = host.nearest(data_dir)
    secrets_dir = params["secrets_dir"]
    unit = host.ENABLED_UNIT if params["backend"] == "systemd" else ""
    process = host.find_process(params["config"])
    return {
        "data_dir": data_dir,
        "secrets_dir": secrets_dir,
        "secrets": host.has_secrets(secrets_dir),
        "trace": host.trace(secrets_dir, unit),
        "process": process,
        "security": host.has_security(params["config"]),
        "verified": host.verified(secrets_dir),
        "marker": os.path.join(secrets_dir, host.MARKER),
        "identity": host.read_identity(data_dir),
        "halted": host.halted(data_dir),
        "data_bytes": host.data_bytes(data_dir),
        "data_empty": host.is_empty(data_dir),
        "config_sha256": host.digest(params["config"]),
        "config_dir_exists": os.path.isdir(os.path.dirname(params["config"])),
        "unit_exists": os.path.exists(host.UNIT),
        "release": release,
        "executable": sys.executable,
        "python": ".".join(map(str, sys.version_info[:2])),
        "arch": platform.machine(),
        "machine": host.machine_id(),
        "data_device": os.stat(point).st_dev,
        "uid": os.getuid(),
    }


def look(module):
    """What the action asks for."""
    params = module.params
    action = params["action"]
    if action == "facts":
        return {"facts": facts(params)}
    if action == "checks":
        unknown = sorted(set(params["checks"]) - set(checks.CHECKS))
        if unknown:
            raise ApiError(f"no such checks: {unknown}; there are {sorted(checks.CHECKS)}")
        return {"rows": checks.run(params, module.run_command)}
    if action == "listen":
        return {"listening": network.listen(params["listen_address"], params["seconds"])}
    if action == "hush":
        return {"ended": network.hush(params["listen_address"])}
    return {"ways": {t: network.measure(t, PROBES_PER_WAY) for t in params["targets"]}}


def main():
    module = AnsibleModule(
        argument_spec={
            "action": {
                "type": "str",
                "required": True,
                "choices": ["facts", "checks", "listen", "connect", "hush"],
            },
            "config": {"type": "path", "default": "/etc/dengine/dengine.toml"},
            "data_dir": {"type": "path", "default": "/var/lib/dengine"},
            "current": {"type": "path", "default": "/opt/dengine/current"},
            "listen_address": {"type": "str", "default": "127.0.0.1:9081"},
            "secrets_dir": {"type": "path", "default": "/etc/dengine/secrets", "no_log": False},
            "backend": {
                "type": "str",
                "default": "systemd",
                "choices": ["systemd", "process"],
            },
            "checks": {"type": "list", "elements": "str", "default": []},
            "data_bytes": {"type": "int", "default": 0},
            "limits": {"type": "dict", "default": {}},
            "targets": {"type": "list", "elements": "str", "default": []},
            "seconds": {"type": "float", "default": 60.0},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(changed=False, **look(module))
    except ApiError as error:
        module.fail_json(msg=error.message)


if __name__ == "__main__":
    main()
