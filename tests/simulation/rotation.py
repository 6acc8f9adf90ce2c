"""Which part of the endless supply of seeds a test run takes: another one for each commit."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SEEDS_PER_COMMIT = 100_000


def commit() -> str:
    """What is checked out; "" outside of a repository."""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() if found.returncode == 0 else ""


def commit_number() -> int:
    """A number that every commit has another of; 0 outside of a repository."""
    wish = os.environ.get("DENGINE_SIM_ROTATION")
    if wish:
        return int(wish)
    return int(commit()[:8] or "0", 16)


def first_seed() -> int:
    return commit_number() % 10_000 * SEEDS_PER_COMMIT
