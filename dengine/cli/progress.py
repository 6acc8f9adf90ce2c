"""A progress line on standard error, only while a person looks on."""

from __future__ import annotations

import sys
import time
from types import TracebackType

EVERY_S = 0.1
BAR_CHARACTERS = 24


class ProgressBar:
    """Bytes, percent and MB/s of one piece of work, redrawn in place; nothing without a terminal.

    Args:
        what: a word or two before the bar.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._shows = sys.stderr.isatty()
        self._started = time.monotonic()
        self._first: int | None = None  # what an earlier attempt had done does not count as speed
        self._due = 0.0
        self._drawn = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.clear()

    def update(self, done: int, total: int) -> None:
        """`done` of `total` bytes are done."""
        if not self._shows:
            return
        now = time.monotonic()
        if self._first is None or done < self._first:
            self._first, self._started = done, now
        if now < self._due and done < total:
            return
        self._due = now + EVERY_S
        percent = min(100, done * 100 // max(total, 1))
        filled = BAR_CHARACTERS * percent // 100
        speed = (done - self._first) / max(now - self._started, 0.001) / 1e6
        self._draw(
            f"{self._what} [{'#' * filled}{'.' * (BAR_CHARACTERS - filled)}] {percent:3d} %  "
            f"{format_bytes(done)} of {format_bytes(total)}  {speed:.1f} MB/s"
        )

    def say(self, text: str) -> None:
        """A line in the bar's place, until the next."""
        if self._shows:
            self._draw(f"{self._what}: {text}")

    def clear(self) -> None:
        if self._drawn:
            self._draw("")
            self._drawn = 0

    def _draw(self, text: str) -> None:
        print(f"\r{text.ljust(self._drawn)}\r{text}", end="", file=sys.stderr, flush=True)
        self._drawn = len(text)


def format_bytes(count: int) -> str:
    """A size as people read it."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
