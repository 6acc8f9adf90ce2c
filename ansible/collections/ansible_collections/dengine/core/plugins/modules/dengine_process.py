#!/usr/bin/python
"""Ansible module: a dengine node without a service manager."""

from __future__ import annotations

DOCUMENTATION = r"""
module: dengine_process
short_description: Run a dengine node as an ordinary background process
description:
  - For machines without systemd and people without root. Finds the node by its command line, so it
    does not depend on what an earlier run wrote down.
options:
  config:
    description: The node's configuration file; it names the process.
    type: path
    required: true
  command:
    description: Program and arguments before C(serve --config FILE).
    type: list
    elements: str
    default: [dengine]
  log:
    description: File that takes everything the node says. Required with O(state=started).
    type: path
  state:
    description: Whether it is to run. V(restarted) always stops and starts.
    type: str
    choices: [started, stopped, restarted]
    default: started
  timeout:
    description: Seconds for a stop, after which the process is killed.
    type: float
    default: 30.0
"""
EXAMPLES = r"""
- name: Node 2 runs
  dengine.core.dengine_process:
    config: /tmp/n2/dengine.toml
    log: /tmp/n2/dengine.log
"""
RETURN = r"""
process:
  description: pid and start time in clock ticks after boot, or null.
  type: dict
  returned: always
"""

import os
import signal
import subprocess
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.dengine.core.plugins.module_utils.host import find_process

POLL_S = 0.05
SETTLE_S = 1.0  # a wrong configuration shows within this time


def stop(config, timeout):
    """SIGTERM, and SIGKILL for one that does not listen."""
    number, deadline = signal.SIGTERM, time.monotonic() + timeout
    process = find_process(config)
    if process:
        os.kill(process["pid"], number)
    while find_process(config):
        if time.monotonic() >= deadline and number != signal.SIGKILL:
            number = signal.SIGKILL
            os.kill(process["pid"], number)
        time.sleep(POLL_S)


def start(module, config, log):
    """Start it in a session of its own, so that it outlives this run."""
    with open(log, "ab") as output:
        place = output.tell()
        child = subprocess.Popen(  # pylint: disable=consider-using-with
            [*module.params["command"], "serve", "--config", config],
            cwd=os.path.dirname(config),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            close_fds=True,
        )
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            with open(log, encoding="utf-8", errors="replace") as file:
                file.seek(place)
                said = file.read()[-2000:]
            module.fail_json(
                msg=f"the node ended with exit code {child.returncode}: {said.strip()}",
                rc=child.returncode,
            )
        time.sleep(POLL_S)


def main():
    module = AnsibleModule(
        argument_spec={
            "config": {"type": "path", "required": True},
            "command": {"type": "list", "elements": "str", "default": ["dengine"]},
            "log": {"type": "path"},
            "state": {
                "type": "str",
                "default": "started",
                "choices": ["started", "stopped", "restarted"],
            },
            "timeout": {"type": "float", "default": 30.0},
        },
        required_if=[("state", "started", ["log"]), ("state", "restarted", ["log"])],
        supports_check_mode=True,
    )
    params = module.params
    config, state = params["config"], params["state"]
    running = find_process(config)
    changed = state == "restarted" or (state == "started") != bool(running)
    if changed and not module.check_mode:
        if running:
            stop(config, params["timeout"])
        if state != "stopped":
            start(module, config, params["log"])
    after = running if module.check_mode else find_process(config)
    module.exit_json(changed=changed, process=after)


if __name__ == "__main__":
    main()
