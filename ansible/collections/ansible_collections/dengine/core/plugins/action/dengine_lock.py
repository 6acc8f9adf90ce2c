"""Action plugin: adds who runs this playbook to `dengine_lock`, and refuses in one sentence."""

from __future__ import annotations

import os
import time

from ansible.plugins.action import ActionBase
from ansible_collections.dengine.core.plugins.plugin_utils import run_lock


class ActionModule(ActionBase):
    """See the module of the same name."""

    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        # This is a worker of the ansible-playbook process.
        args = {**self._task.args, "owner": run_lock.owner(os.getppid())}
        result = self._execute(args, task_vars)
        holder = result.get("holder") or {}
        wanted = args.get("state", "held") == "held"
        if wanted and not result.get("held") and holder:
            alive = run_lock.lives(holder)
            if alive is False or (alive is None and result.get("stale")):
                result = self._execute({**args, "take_from": holder["nonce"]}, task_vars)
                holder = result.get("holder") or {}
        if wanted and not result.get("held") and not result.get("failed"):
            result["failed"] = True
            result["msg"] = _refusal(holder, result)
        return result

    def _execute(self, args, task_vars):
        return self._execute_module(
            module_name="dengine.core.dengine_lock", module_args=args, task_vars=task_vars
        )


def _refusal(holder, result):
    lapses = max(0, int(holder.get("refreshed", 0) + result.get("ttl", 0) - time.time()))
    return (
        "{user} on {controller} (process {pid}) is changing this cluster. Wait for its end. If it "
        "is not heard of any more, its lock lapses in {lapses} s. If you are sure that it is over: "
        "repeat with -e dengine_take_lock=true".format(
            user=holder.get("user"),
            controller=holder.get("controller"),
            pid=holder.get("pid"),
            lapses=lapses,
        )
    )
