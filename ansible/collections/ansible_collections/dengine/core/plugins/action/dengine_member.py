"""Runs `dengine_member` in slices, shows progress, and notices when it stands still."""

from __future__ import annotations

import time

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

display = Display()


class ActionModule(ActionBase):
    """See the module of the same name."""

    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        args = dict(self._task.args)
        timeout = float(args.get("timeout", 3600))
        stall_timeout = float(args.get("stall_timeout", 60))
        began = moved = time.monotonic()
        mark, before, shown = None, None, None
        while True:
            result = self._execute_module(
                module_name="dengine.core.dengine_member", module_args=args, task_vars=task_vars
            )
            if result.get("failed") or "mark" not in result:
                return result
            before = before or result["before"]
            if result["progress"] != shown:
                shown = result["progress"]
                display.display("    " + " · ".join(shown))
            if result["done"]:
                break
            now = time.monotonic()
            if result["mark"] != mark:
                mark, moved = result["mark"], now
            stalled = now - moved >= stall_timeout
            if stalled or now - began >= timeout:
                what = f"nothing moved for {now - moved:.0f} s" if stalled else "it took too long"
                result["failed"] = True
                result["msg"] = f"{what}, after {now - began:.0f} s in all: " + "; ".join(
                    result["progress"]
                )
                return result
        result["before"] = before
        result["diff"] = {"before": before, "after": result["after"]}
        result["changed"] = before != result["after"]
        result["seconds"] = round(time.monotonic() - began, 1)
        return result
