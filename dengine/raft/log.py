"""The log: a tail in memory over durable storage.

    purged | durable (storage)            | tail kept in memory
    -------+------------------------------+--------------------------
        base first_index   applied  commit  stable         last_index

Invariant: base.index <= applied_index <= commit_index <= last_index, and
applied_index <= stable_index: what is applied here is durable here. Only when the state is lost is
applied_index 0 and below base: then the log alone cannot rebuild it (paper 7).

Purging is a matter of this object alone: storage may hold the entries up to base for as long as
it likes, or drop them at any moment, for they are never read again.
"""

from __future__ import annotations

from collections.abc import Sequence

from dengine.errors import InvariantBroken
from dengine.raft.storage import LogReader
from dengine.raft.types import Entry, LogId

TAIL_BYTES_KEPT = 8 * 1024 * 1024  # durable entries kept in memory for followers that are close
TAIL_ENTRIES_KEPT = 4096
APPLY_BYTES_MAX = 8 * 1024 * 1024


class RaftLog:
    """Entries by index, and how far they are durable, committed and applied.

    Args:
        storage: reads of the durable log.
        commit_index: as recorded in the hard state, which may lag.
        applied_index: what the state machine has durably or visibly applied. A state that ends
            before the log begins is worth nothing: it counts as lost.
    """

    def __init__(self, storage: LogReader, commit_index: int, applied_index: int) -> None:
        self._storage = storage
        base_index = storage.first_index() - 1
        self.base = LogId(base_index, storage.term(base_index))  # the last entry that is purged
        self._tail: list[Entry] = []  # contiguous, up to last_index; _tail[0].index = _offset
        self._offset = storage.last_index() + 1
        self._tail_bytes = 0
        self.stable_index = storage.last_index()
        self.last_index = self.stable_index
        self.last_term = storage.term(self.last_index)
        if applied_index > self.last_index:
            raise InvariantBroken(
                f"the state has applied entry {applied_index} but the log ends at {self.last_index}"
            )
        # What was purged was applied, and what was applied was committed.
        self.commit_index = min(max(commit_index, applied_index, base_index), self.last_index)
        self.applied_index = applied_index if applied_index >= base_index else 0

    @property
    def first_index(self) -> int:
        return self.base.index + 1

    @property
    def state_lost(self) -> bool:
        """Entries that the state lacks are purged: only a snapshot helps."""
        return self.applied_index < self.base.index

    def check(self) -> None:
        """The invariant above."""
        applied_low = 0 if self.state_lost else self.base.index
        applied_high = 0 if self.state_lost else min(self.commit_index, self.stable_index)
        if not (
            applied_low <= self.applied_index <= applied_high
            and self.base.index <= self.commit_index <= self.last_index
            and self.base.index <= self.stable_index <= self.last_index
        ):
            raise InvariantBroken(
                f"the log is out of order: purged {self.base.index}, applied "
                f"{self.applied_index}, commit {self.commit_index}, durable {self.stable_index}, "
                f"last {self.last_index}"
            )

    @property
    def last_id(self) -> LogId:
        return LogId(self.last_index, self.last_term)

    def term(self, index: int) -> int | None:
        """Term of the entry at `index`; None when it was purged or does not exist yet.

        That of the last purged entry stays known: the first one that is left follows it (paper 7).
        """
        if index <= self.base.index:
            return self.base.term if index == self.base.index else None
        if index >= self._offset:
            position = index - self._offset
            return self._tail[position].term if position < len(self._tail) else None
        if index == self.last_index:
            return self.last_term
        return self._storage.term(index)

    def matches(self, log_id: LogId) -> bool:
        return self.term(log_id.index) == log_id.term

    def is_up_to_date(self, last: LogId) -> bool:
        """May a candidate with this last entry have our vote (5.4.1)?"""
        return (last.term, last.index) >= (self.last_term, self.last_index)

    def entries(self, low: int, high: int, max_bytes: int) -> Sequence[Entry]:
        """Entries with `low <= index < high`, cut after `max_bytes` of data but never empty."""
        if low <= self.base.index:
            raise InvariantBroken(f"entry {low} is purged: the log begins at {self.first_index}")
        if low < self._offset:
            return self._storage.entries(low, min(high, self._offset), max_bytes)
        start, stop = low - self._offset, min(high - self._offset, len(self._tail))
        size = 0
        for position in range(start, stop):
            size += len(self._tail[position].data)
            if size > max_bytes and position > start:
                return self._tail[start:position]
        return self._tail[start:stop]

    def append(self, entry: Entry) -> None:
        """Add one entry at the end: a leader's own proposal, or what `merge` found to be new."""
        if entry.index != self.last_index + 1 or entry.term < self.last_term:
            raise InvariantBroken(f"entry {entry.log_id} cannot follow {self.last_id}")
        self._tail.append(entry)
        self._tail_bytes += len(entry.data)
        self.last_index, self.last_term = entry.index, entry.term

    def merge(self, entries: Sequence[Entry]) -> int | None:
        """Take over a leader's entries whose predecessor matches (5.3).

        Entries already present are skipped; only a real conflict truncates, so a late or
        duplicated message can never remove what came after it.

        Returns:
            The index from which the log was truncated, or None.
        """
        truncated = None
        for entry in entries:
            if entry.index <= self.last_index:
                if self.term(entry.index) == entry.term:
                    continue
                self._truncate(entry.index)
                truncated = entry.index
            self.append(entry)
        return truncated

    def _truncate(self, index: int) -> None:
        if index <= self.commit_index:
            raise InvariantBroken(
                f"a leader wants to replace committed entry {index} (commit {self.commit_index})"
            )
        term = self.term(index - 1)  # known: nothing below the commit index is ever truncated
        if index <= self._offset:
            self._tail.clear()
            self._offset = index
        else:
            del self._tail[index - self._offset :]
        self._tail_bytes = sum(len(entry.data) for entry in self._tail)
        self.stable_index = min(self.stable_index, index - 1)
        self.last_index, self.last_term = index - 1, term or 0

    def unstable(self) -> Sequence[Entry]:
        """What still has to become durable."""
        return self._tail[self.stable_index + 1 - self._offset :]

    def stable_to(self, log_id: LogId) -> None:
        """A write that ended with `log_id` is durable.

        Ignored when that entry was replaced meanwhile: index alone proves nothing (append ABA).
        """
        if log_id.index > self.stable_index and self.matches(log_id):
            self.stable_index = log_id.index
            self._trim()

    def commit_to(self, index: int) -> None:
        if index > self.last_index:
            raise InvariantBroken(f"commit {index} is beyond the last entry {self.last_index}")
        self.commit_index = max(self.commit_index, index)

    @property
    def may_apply(self) -> bool:
        """Is an entry committed AND locally durable, and not applied yet?

        Of a lost state nothing can be continued.
        """
        high = min(self.commit_index, self.stable_index)
        return self.applied_index < high and not self.state_lost

    def to_apply(self) -> Sequence[Entry]:
        """All such entries, bounded in size; those that have left the tail come from storage."""
        if not self.may_apply:
            return ()
        high = min(self.commit_index, self.stable_index)
        return self.entries(self.applied_index + 1, high + 1, APPLY_BYTES_MAX)

    def applied_to(self, index: int) -> None:
        highest = min(self.commit_index, self.stable_index)
        if self.state_lost or not self.applied_index <= index <= highest:
            raise InvariantBroken(
                f"applied {self.applied_index} -> {index} with commit {self.commit_index}, "
                f"durable {self.stable_index}"
            )
        self.applied_index = index

    # --- snapshots (7) ----------------------------------------------------------------------

    def purge(self, index: int) -> None:
        """Forget the entries up to `index`: the state covers them.

        Tails that have been purged leave memory with `_trim`, and storage whenever its owner likes.
        """
        if index <= self.base.index:
            return
        if self.state_lost or index > self.applied_index:
            raise InvariantBroken(
                f"entry {index} cannot be purged: applied {self.applied_index}, "
                f"purged {self.base.index}"
            )
        self.base = LogId(index, self.term(index) or 0)

    def reset(self, log_id: LogId) -> None:
        """Begin anew after `log_id`, the last entry of a snapshot whose write is being started.

        Not durable yet, nor applied: `restored` says when. Storage is not read meanwhile.
        """
        if log_id.index <= self.commit_index:
            raise InvariantBroken(
                f"a snapshot up to {log_id} contradicts what is committed here up to "
                f"{self.commit_index}"
            )
        self.base = log_id
        self._tail.clear()
        self._tail_bytes = 0
        self._offset = log_id.index + 1
        self.last_index, self.last_term = log_id.index, log_id.term
        self.stable_index = min(self.stable_index, log_id.index)
        self.commit_index = log_id.index

    def restored(self, log_id: LogId) -> None:
        """A snapshot up to `log_id` is now the state, durably, and the log holds what follows."""
        if self.applied_index > log_id.index:
            raise InvariantBroken(f"a snapshot would take back applied {self.applied_index}")
        self.stable_index = max(self.stable_index, log_id.index)
        self.applied_index = log_id.index
        self.check()

    def forget_state(self) -> None:
        """Nothing is applied any more."""
        self.applied_index = 0

    def last_not_above(self, index: int, term: int) -> LogId | None:
        """Largest position at or below `index` whose term is at most `term`; None when that lies
        in what is purged.

        Terms never fall along a log, so one answer skips whole terms (5.3, fast back-up) and a
        binary search finds it.
        """
        low, high = self.base.index, min(index, self.last_index)
        if high < low or self.base.term > term:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            if (self.term(middle) or 0) <= term:
                low = middle
            else:
                high = middle - 1
        return LogId(low, self.term(low) or 0)

    def _trim(self) -> None:
        """Let go of the oldest durable entries once the tail is large.

        Applied or not: a node without its state goes on appending, and must not fill its memory.
        """
        if self._tail_bytes <= TAIL_BYTES_KEPT and len(self._tail) <= TAIL_ENTRIES_KEPT:
            return
        done = self.stable_index + 1 - self._offset
        excess = max(self._tail_bytes - TAIL_BYTES_KEPT // 2, 0)
        count = max(len(self._tail) - TAIL_ENTRIES_KEPT // 2, 0)
        cut = size = 0
        while cut < done and (cut < count or size < excess):
            size += len(self._tail[cut].data)
            cut += 1
        del self._tail[:cut]
        self._offset += cut
        self._tail_bytes -= size
