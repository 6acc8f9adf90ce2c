"""What long runs have in common: a summary for programs beside the text for people."""

from __future__ import annotations

import os
from typing import TextIO

STOPPED = 130  # exit code of what Ctrl-C has ended


def stdout_apart() -> TextIO:
    """The standard output. All that is printed from now on, by children too, goes to stderr."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return output
