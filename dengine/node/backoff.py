"""When something that has failed is tried again."""

from __future__ import annotations

import time
from dataclasses import dataclass

RETRY_S_MIN, RETRY_S_MAX = 1.0, 60.0


@dataclass(slots=True)
class Backoff:
    """When the next attempt is due; the pause doubles with each failure."""

    pause_s: float = RETRY_S_MIN
    due_s: float = 0.0

    def failed(self) -> None:
        self.due_s = time.monotonic() + self.pause_s
        self.pause_s = min(2 * self.pause_s, RETRY_S_MAX)

    def succeeded(self) -> None:
        self.pause_s, self.due_s = RETRY_S_MIN, 0.0

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self.due_s
