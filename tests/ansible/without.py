"""Runs tests of the tree that it stands in, each time in a new process.

What takes long to import is imported once, and nothing of that tree is: so a guard can be taken out
of it between two runs. Reads a line of JSON for each run, {"arguments", "environment"}, and answers
with one: {"code", "raised", "output"}.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

import ansible.plugins.action
import ansible.plugins.filter.core
import ansible.plugins.test.core  # noqa: F401
import jinja2.nativetypes  # noqa: F401
import pytest
import yaml  # noqa: F401


class Watch:
    """Notes what a test raised."""

    def __init__(self) -> None:
        self.raised: list[str] = []

    def pytest_exception_interact(self, call: pytest.CallInfo[Any]) -> None:
        if call.excinfo is not None:
            self.raised.append(call.excinfo.typename)


def child(ask: dict[str, Any], output: int) -> dict[str, Any]:
    with open(os.devnull, encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(ask["environment"])
    watch = Watch()
    code = pytest.main(ask["arguments"], plugins=[watch])
    sys.stdout.flush()
    return {"code": int(code), "raised": watch.raised}


def run(ask: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as told:
        pid = os.fork()
        if not pid:
            try:
                said = child(ask, output.fileno())
                os.write(told.fileno(), json.dumps(said).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        output.seek(0)
        told.seek(0)
        text = output.read().decode(errors="replace")
        said = json.loads(told.read() or b'{"code": -1, "raised": []}')
        return {**said, "output": text[-3000:]}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
