"""Action plugin: adds who runs this playbook to `dengine_lock`, and refuses in one sentence."""

from __future__ import annotations

import getpass
import os
import socket
import time

from ansible.plugins.action import ActionBase


def _started(pid: int) -> str:
    """Start time of a process of this machine in clock ticks after boot; "" when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
        return file.read().strip()


def _has_ended(holder: dict, controller: str) -> bool:
    """Was the holder a run on this very machine, and is it over?"""
    if holder.get("controller") != controller:
        return False
    if holder.get("boot") != _boot():
        return True
    return _started(int(holder.get("pid", 0))) != holder.get("started")


class ActionModule(ActionBase):
    """See the module of the same name."""

    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        pid = os.getppid()  # this is a worker of the ansible-playbook process
        controller = socket.gethostname()
        started = _started(pid)
        owner = {
            "controller": controller,
            "boot": _boot(),
            "pid": pid,
            "started": started,
            "user": getpass.getuser(),
            "nonce": f"{controller}/{_boot()}/{pid}/{started}",
        }
        args = {**self._task.args, "owner": owner}
        result = self._execute(args, task_vars)
        holder = result.get("holder") or {}
        if not result.get("held") and _has_ended(holder, controller):
            result = self._execute({**args, "take_from": holder["nonce"]}, task_vars)
        refused = args.get("state", "held") == "held" and not result.get("held")
        if refused and not result.get("failed"):
            age = int(time.time() - holder.get("refreshed", 0))
            result["failed"] = True
            result["msg"] = (
                "{user} on {controller} (process {pid}) is changing this cluster, last seen {age} "
                "s ago. Wait for it to end. If you are sure that it is over: repeat with "
                "-e dengine_take_lock=true".format(
                    user=holder.get("user"),
                    controller=holder.get("controller"),
                    pid=holder.get("pid"),
                    age=age,
                )
            )
        return result

    def _execute(self, args, task_vars):
        return self._execute_module(
            module_name="dengine.core.dengine_lock", module_args=args, task_vars=task_vars
        )
