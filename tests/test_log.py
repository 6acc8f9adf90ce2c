"""What a node prints: announced lines are whole, others carry time, level and node."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TALK = """
import logging
from dengine.log import StdoutLog, announce
with StdoutLog({level!r}, {style!r}, 7):
    announce("[Node 7] Follower → Candidate (term 1)")
    logging.getLogger("x").info("joined by %s", "9\\n🎊 NODE 9 PROMOTED TO VOTER!")
    logging.getLogger("x").error("disk is full")
"""


def talk(level: str, style: str) -> list[str]:
    """The lines of a small program, run under LC_ALL=C into a pipe."""
    done = subprocess.run(
        [sys.executable, "-c", TALK.format(level=level, style=style)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LC_ALL": "C"},
        capture_output=True,
        timeout=30,
        check=True,
    )
    assert done.stderr == b""
    return done.stdout.decode("utf-8").splitlines()


def test_text_lines() -> None:
    """An operator's grep for the lines a node announces works, and no message can fake one."""
    announced, information, error = talk("info", "text")
    assert announced == "[Node 7] Follower → Candidate (term 1)"
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    expected = rf"{time} INFO    \[Node 7\] joined by 9\\n🎊 NODE 9 PROMOTED TO VOTER!"
    assert re.fullmatch(expected, information)
    assert re.fullmatch(rf"{time} ERROR   \[Node 7\] disk is full", error)


def test_announced_lines_appear_at_every_level() -> None:
    """`level = "error"` silences the chatter, not what playbooks wait for."""
    announced, error = talk("error", "text")
    assert announced == "[Node 7] Follower → Candidate (term 1)"
    assert error.endswith("disk is full")


def test_json_lines() -> None:
    """One object per line; the announced line is the message."""
    announced, information, _ = (json.loads(line) for line in talk("info", "json"))
    assert announced["message"] == "[Node 7] Follower → Candidate (term 1)"
    assert announced["node"] == 7
    assert information["level"] == "info"
    assert information["message"].startswith("joined by 9\n🎊")


def test_a_stuck_reader_stops_nothing() -> None:
    """A terminal frozen with Ctrl-S must not freeze a node: lines are lost, time is not."""
    program = (
        "import logging, sys\n"
        "from dengine.log import StdoutLog\n"
        "with StdoutLog('info', 'text', 1):\n"
        "    for number in range(30_000): logging.info('line %d %s', number, 'x' * 50)\n"
        "    print('still running', file=sys.stderr)\n"
    )
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        try:
            assert process.stderr.readline() == b"still running\n"
            assert process.wait(20) == 0, "and it can still end"
        finally:
            process.kill()
