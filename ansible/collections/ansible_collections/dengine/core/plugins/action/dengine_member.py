"""Runs `dengine_member` in slices, shows progress, and notices when it stands still."""

from __future__ import annotations

import os
import time

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.dengine.core.plugins.plugin_utils import run_lock

display = Display()
REFRESH_S = 60.0  # the run lock is told so often that this run still goes on
UNPACK_BYTES_PER_S = 10e6  # a slow disk and a busy machine verify and unpack a snapshot so fast
ENDED_S = 20.0  # a node that is started again after a failure is back by then


class ActionModule(ActionBase):
    """See the module of the same name."""

    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        args = dict(self._task.args)
        patience = _Patience(float(args.get("timeout", 3600)), float(args.get("stall_timeout", 60)))
        before, shown, refreshed = None, None, float("-inf")
        while True:
            if time.monotonic() - refreshed >= REFRESH_S:
                refreshed = time.monotonic()
                lost = self._refresh(args.get("lock"), task_vars)
                if lost:
                    return {"failed": True, "msg": lost}
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
            end = patience.ends(result)
            if end:
                return {**result, "failed": True, "msg": f"{end}: {'; '.join(result['progress'])}"}
        result["before"] = before
        result["diff"] = {"before": before, "after": result["after"]}
        result["changed"] = before != result["after"]
        result["seconds"] = round(patience.seconds, 1)
        return result

    def _refresh(self, path, task_vars):
        """Keep the run lock at `path`, if any; returns why that is not possible, or ""."""
        if not path or self._task.check_mode:
            return ""
        result = self._execute_module(
            module_name="dengine.core.dengine_lock",
            module_args={"path": path, "owner": run_lock.owner(os.getppid())},
            task_vars=task_vars,
        )
        if result.get("held"):
            return ""
        holder = result.get("holder") or {}
        return "the run lock is not with this run any more, but with {} on {}: {}".format(
            holder.get("user"), holder.get("controller"), result.get("msg", "it was taken")
        )


class _Patience:
    """How long to go on: in all, without progress, without the node itself, and with promotions
    that are refused.
    """

    def __init__(self, timeout, stall_timeout):
        self._timeout = timeout
        self._stall_timeout = stall_timeout
        self._began = self._moved = time.monotonic()
        self._mark = self._refused = self._ended = None

    @property
    def seconds(self):
        return time.monotonic() - self._began

    def ends(self, result):
        """Why it ends now, or ""."""
        now = time.monotonic()
        if result["mark"] != self._mark:
            self._mark, self._moved = result["mark"], now
        # A refusal that stays is a fault even while the log moves on under load.
        refusal = result.get("refusal", "")
        self._refused = (self._refused or now) if refusal else None
        ended = "; ".join(result.get("ended", ()))
        self._ended = (self._ended or now) if ended else None
        said = f"; the cluster refuses to promote: {refusal}" if refusal else ""
        still = now - self._moved
        what = ""
        if ended and min(still, now - self._ended) >= min(ENDED_S, self._stall_timeout):
            what = f"{ended}, for {now - self._ended:.0f} s. Its log says why"
        elif still >= self._stall_timeout + self._unpacking_s(result):
            what = f"nothing moved for {still:.0f} s"
        elif refusal and now - self._refused >= self._stall_timeout:
            what = f"no promotion for {now - self._refused:.0f} s"
        elif self.seconds >= self._timeout:
            what = "it took too long"
        return f"{what}, after {self.seconds:.0f} s in all{said}" if what else ""

    def _unpacking_s(self, result):
        """Nothing can be seen of a node that verifies and unpacks a snapshot."""
        return result.get("unpacking_bytes", 0) / UNPACK_BYTES_PER_S
