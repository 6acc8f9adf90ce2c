"""Callback for the tests: writes down every task that starts, and kills the run at one of them.

TASKS_FILE takes one line per started task: number, seconds since the start, name.
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


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "at_task"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._count = 0
        self._began = time.monotonic()
        self._kill_at = os.environ.get("KILL_AT", "")
        self._kill_after_s = float(os.environ.get("KILL_AFTER_S", "0"))

    def _started(self, task):
        self._count += 1
        path = os.environ.get("TASKS_FILE")
        if path:
            seconds = time.monotonic() - self._began
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{self._count}\t{seconds:.2f}\t{task.get_name()}\n")
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


def _die():
    os.kill(os.getpid(), signal.SIGKILL)
