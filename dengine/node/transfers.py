"""Snapshots on their way between members: how far they are, for people and for holding files."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from dengine.raft.types import SnapshotRef

log = logging.getLogger("dengine.snapshots")

LOG_EVERY_PERCENT = 10
FORGET_S = 10.0  # after the last byte; the receiver may come back for more
RECEIVERS_MAX = 64  # of which is remembered what they have had, far more than there are members


@dataclass(slots=True)
class Transfer:
    """One file on its way to one member. `first` is where this connection began."""

    ref: SnapshotRef
    first: int
    sent: int
    started_s: float
    touched_s: float
    due_percent: int = 0

    @property
    def percent(self) -> int:
        return percent(self.sent, self.ref.size_bytes)

    @property
    def bytes_per_s(self) -> int:
        return int((self.sent - self.first) / max(self.touched_s - self.started_s, 0.001))


class Transfers:
    """The transfers under way, by receiving node id."""

    def __init__(self) -> None:
        self._by_receiver: dict[int, Transfer] = {}
        self._had: dict[int, SnapshotRef] = {}  # to its end; oldest first

    @property
    def refs(self) -> set[SnapshotRef]:
        """The files that are being sent."""
        self._forget()
        return {transfer.ref for transfer in self._by_receiver.values()}

    def get(self, receiver: int) -> Transfer | None:
        self._forget()
        return self._by_receiver.get(receiver)

    def items(self) -> list[tuple[int, Transfer]]:
        self._forget()
        return sorted(self._by_receiver.items())

    def began(self, receiver: int, ref: SnapshotRef, offset: int) -> bool:
        """True when `receiver` has had the very same file to its end, and could not use it: however
        long ago, for to find that out of a large one takes long."""
        now = time.monotonic()
        self._by_receiver[receiver] = Transfer(ref, offset, offset, now, now)
        return self._had.pop(receiver, None) == ref

    def sent(self, receiver: int, count: int) -> None:
        """`count` more bytes have left for `receiver`."""
        transfer = self._by_receiver.get(receiver)
        if transfer is None:
            return
        transfer.sent += count
        transfer.touched_s = time.monotonic()
        if transfer.sent >= transfer.ref.size_bytes:
            self._had[receiver] = transfer.ref
            if len(self._had) > RECEIVERS_MAX:
                del self._had[next(iter(self._had))]
        if transfer.percent >= transfer.due_percent:
            reached = transfer.percent
            transfer.due_percent = reached - reached % LOG_EVERY_PERCENT + LOG_EVERY_PERCENT
            log.info(
                "sending snapshot %d-%d to node %d: %d %%, %s/s",
                transfer.ref.term,
                transfer.ref.index,
                receiver,
                transfer.percent,
                format_bytes(transfer.bytes_per_s),
            )

    def _forget(self) -> None:
        now = time.monotonic()
        for receiver in [r for r, t in self._by_receiver.items() if now - t.touched_s > FORGET_S]:
            del self._by_receiver[receiver]


class Report:
    """Logs how far a transfer to this node is, every ten percent."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = time.monotonic()
        self._first = self._done = self._due = 0

    def __call__(self, done: int, total: int) -> None:
        if not self._done:
            self._first = done  # of an earlier attempt, which was read before
        self._done = max(self._done, done)  # unpacking what has come begins at 0 again
        if (reached := percent(done, total)) >= self._due:
            self._due = reached - reached % LOG_EVERY_PERCENT + LOG_EVERY_PERCENT
            log.info("%s: %d %%, %s/s", self._what, reached, format_bytes(self._rate()))

    def finished(self) -> None:
        log.info("%s: done, %s/s", self._what, format_bytes(self._rate()))

    def _rate(self) -> int:
        return int((self._done - self._first) / max(time.monotonic() - self._started, 0.001))


def percent(done: int, total: int) -> int:
    return min(100, done * 100 // max(total, 1))


def format_bytes(count: int) -> str:
    """1536 -> "1.5 KB": decimal units, as networks and disks are measured."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return ""
