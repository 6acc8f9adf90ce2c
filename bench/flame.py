"""Where the leader's time goes: py-spy during one round of load, printed as a table."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from load import run_round
from processes import BenchError
from systems import Load, System

SAMPLES_PER_S = 200
TOP = 30


def record(system: System, load: Load, connections: int, seconds: int, raw: Path) -> str:
    """Run `load` with py-spy on the leader; keep its stacks in `raw`, return the top functions.

    `raw` is in py-spy's collapsed format, which flamegraph.pl, inferno and speedscope read.
    """
    beside_python = Path(sys.executable).with_name("py-spy")
    py_spy = str(beside_python) if beside_python.exists() else shutil.which("py-spy")
    if py_spy is None:
        raise BenchError("py-spy missing: pip install py-spy into the environment of this Python")
    argv = [py_spy, "record", "--pid", str(system.leader().process.pid), "--format", "raw"]
    argv += ["--duration", str(seconds), "--rate", str(SAMPLES_PER_S), "--threads"]
    recorder = subprocess.Popen(
        [*argv, "--output", str(raw)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        run_round(system, load, connections, seconds + 1)
        _, complaint = recorder.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        complaint = "still running after 30 s"
    finally:
        if recorder.poll() is None:
            recorder.kill()
            recorder.wait(timeout=10)
    if recorder.returncode != 0:
        raise BenchError(f"{' '.join(argv)} failed (it needs ptrace rights, root): {complaint}")
    return top_functions(raw.read_text("utf-8"))


def top_functions(collapsed: str) -> str:
    """The functions with the most samples of their own, and with what they call, in percent."""
    own: Counter[str] = Counter()
    total: Counter[str] = Counter()
    samples = 0
    for line in collapsed.splitlines():
        stack, _, seen = line.rpartition(" ")
        frames = [_function(frame) for frame in stack.split(";")]
        count = int(seen)
        samples += count
        own[frames[-1]] += count
        for frame in set(frames):
            total[frame] += count
    lines = [f"{samples} samples", f"{'own %':>6} {'total %':>8}  function"]
    for name, count in own.most_common(TOP):
        share, with_callees = 100 * count / samples, 100 * total[name] / samples
        lines.append(f"{share:6.1f} {with_callees:8.1f}  {name}")
    return "\n".join(lines)


def _function(frame: str) -> str:
    """`name (file.py:12)` without the line, so that one function is one row."""
    return frame.rsplit(":", 1)[0] + ")" if frame.endswith(")") and ":" in frame else frame
