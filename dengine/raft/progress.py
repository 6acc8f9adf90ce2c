"""The leader's view of one follower.

    PROBE ------ acknowledged ------> REPLICATE
      ^   <----- refused, cut off -----   |
      |                                   |
      +------ needs purged entries -> SNAPSHOT

PROBE sends one message per answer until it is known where the logs agree; REPLICATE sends ahead
of the answers, bounded by `INFLIGHT_MAX`; SNAPSHOT sends no entries until the follower has
acknowledged so much that the log goes on from there.

A follower that has lost its state and kept its log needs a snapshot too (`needs_snapshot`), but
its entries go on in whatever state it is in: only the offer travels beside them.
"""

from __future__ import annotations

import enum
from collections import deque

from dengine.raft.types import SnapshotRef

INFLIGHT_MAX = 16  # unanswered AppendRequests per follower, each at most APPEND_BYTES_MAX
APPEND_BYTES_MAX = 1024 * 1024


class ProgressState(enum.Enum):
    PROBE = "probe"
    REPLICATE = "replicate"
    SNAPSHOT = "snapshot"


class Progress:
    """Invariant: 0 <= match_index < next_index."""

    __slots__ = (
        "acked_round",
        "acked_sent_ms",
        "answered",
        "asked_round",
        "commit_sent",
        "heard_ms",
        "helped_by",
        "inflight",
        "match_index",
        "needs_snapshot",
        "next_index",
        "offered",
        "probe_sent",
        "state",
        "timeout_ms_min",
    )

    def __init__(self, next_index: int, now_ms: int) -> None:
        self.state = ProgressState.PROBE
        self.match_index = 0
        self.next_index = next_index
        self.probe_sent = False
        self.inflight: deque[int] = deque()  # last index of each unanswered AppendRequest
        self.commit_sent = 0  # commit index the follower has been told
        self.heard_ms = now_ms  # when it last answered anything (CheckQuorum); at first: now
        self.answered = False  # has it answered this leader at all?
        self.acked_round = 0  # newest heartbeat round it answered (read index)
        self.asked_round = 0  # oldest periodic one since its answer to one before; 0: none
        self.acked_sent_ms = 0  # when THAT heartbeat was sent (lease)
        self.timeout_ms_min = 0  # as it last announced; 0: never answered a heartbeat
        self.needs_snapshot: int | None = None  # lost its state: the least index that helps it
        self.offered: SnapshotRef | None = None  # the file it has been told to fetch
        self.helped_by: SnapshotRef | None = None  # what it came by, until it has caught up

    @property
    def paused(self) -> bool:
        match self.state:
            case ProgressState.PROBE:
                return self.probe_sent
            case ProgressState.REPLICATE:
                return len(self.inflight) >= INFLIGHT_MAX
            case ProgressState.SNAPSHOT:
                return True

    @property
    def wants_snapshot(self) -> bool:
        return self.state is ProgressState.SNAPSHOT or self.needs_snapshot is not None

    def heard(self, now_ms: int) -> None:
        """The follower has answered something."""
        self.heard_ms = now_ms
        self.answered = True

    def sent(self, last_index: int) -> None:
        """An AppendRequest that ends with `last_index` has left."""
        if self.state is ProgressState.REPLICATE:
            self.next_index = last_index + 1
            self.inflight.append(last_index)
        else:
            self.probe_sent = True

    def acknowledged(self, index: int, first_index: int = 1) -> bool:
        """The follower has everything up to `index` durably. True when that is news.

        SNAPSHOT ends when the next entry is one that the log, which begins at `first_index`, still
        has: because the snapshot was installed, or because it turned out not to be needed.
        """
        while self.inflight and self.inflight[0] <= index:
            self.inflight.popleft()
        news = index > self.match_index
        self.match_index = max(self.match_index, index)
        self.next_index = max(self.next_index, index + 1)
        self.probe_sent = False
        if self.state is ProgressState.SNAPSHOT and self.match_index + 1 < first_index:
            return news  # late, or less than was offered: it still needs what is purged
        if self.state is not ProgressState.REPLICATE and index >= self.match_index:
            self.state = ProgressState.REPLICATE
            self.next_index = self.match_index + 1
            if self.needs_snapshot is None:
                self.withdraw()
        return news

    def refused(self, prev_index: int, retry_at: int) -> bool:
        """The follower has no entry like the one at `prev_index`. False when that is stale."""
        if self.state is ProgressState.SNAPSHOT:
            return False  # answers an AppendRequest from before: entries do not help any more
        if prev_index <= self.match_index:
            return False  # it has acknowledged that one: late, or it lost its log
        if self.state is not ProgressState.REPLICATE and prev_index != self.next_index - 1:
            return False
        self.probe(max(self.match_index + 1, min(retry_at, prev_index)))
        return True

    def probe(self, next_index: int) -> None:
        """Forget what is in flight and feel for the point of agreement again."""
        self.state = ProgressState.PROBE
        self.next_index = next_index
        self.probe_sent = False
        self.inflight.clear()

    def withdraw(self) -> None:
        """It needs no snapshot any more; what was offered it may have installed."""
        if self.offered is not None:
            self.helped_by, self.offered = self.offered, None

    def await_snapshot(self) -> None:
        """Its next entry was purged: only a snapshot helps."""
        self.state = ProgressState.SNAPSHOT
        self.helped_by = None
        self.inflight.clear()
