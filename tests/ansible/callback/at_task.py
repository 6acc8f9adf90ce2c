"""Callback for the tests: writes down every task that starts, and kills the run at one of them.

TASKS_FILE takes one line per started task: number, seconds since the start, name, and "acts" when
it ran anything on a host: it was not skipped there, and its action is none of those that leave
nothing, being the controller's, or only looking at a file.
KILL_AT is the number, or the name, at whose start the process kills itself with SIGKILL, as a power
cut of the operator's machine would; KILL_AFTER_S lets so much of the task happen first.
"""

from __future__ import annotations

import os
import signal
import threading
import time

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: at_task
type: aggregate
short_description: writes tasks down and kills the run at one of them
description: For the tests of this repository.
"""

# What decides, remembers or looks, and leaves nothing behind when it is killed.
LEAVE_NOTHING = frozenset(
    {"add_host", "assert", "debug", "fail", "group_by", "include_role", "include_tasks"}
    | {"include_vars", "meta", "set_fact", "set_stats", "stat"}
    | {"validate_argument_spec"}
)


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "at_task"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._count = 0
        self._began = time.monotonic()
        self._task = None
        self._acts = False
        self._kill_at = os.environ.get("KILL_AT", "")
        self._kill_after_s = float(os.environ.get("KILL_AFTER_S", "0"))

    def _started(self, task):
        self._note()
        self._count += 1
        self._task, self._acts = (time.monotonic() - self._began, task.get_name()), False
        if self._kill_at in (str(self._count), task.get_name()):
            if self._kill_after_s:
                timer = threading.Timer(self._kill_after_s, _die)
                timer.daemon = True
                timer.start()
            else:
                _die()

    def v2_playbook_on_task_start(self, task, is_conditional):
        self._started(task)

    def v2_playbook_on_handler_task_start(self, task):
        self._started(task)

    def v2_runner_on_failed(self, result, ignore_errors=False):
        self.v2_runner_on_ok(result)

    def v2_runner_on_ok(self, result):
        self._acts |= result.task.action.removeprefix("ansible.builtin.") not in LEAVE_NOTHING

    def v2_playbook_on_stats(self, stats):
        self._note()

    def _note(self):
        """Write the line of the task that has just ended."""
        path = os.environ.get("TASKS_FILE")
        if path and self._task:
            seconds, name = self._task
            with open(path, "a", encoding="utf-8") as file:
                acts = "acts" if self._acts else ""
                file.write(f"{self._count}\t{seconds:.2f}\t{name}\t{acts}\n")


def _die():
    os.kill(os.getpid(), signal.SIGKILL)
