"""When a learner may become a voter, and which learners become voters together.

Runs on the leader only and holds no state that matters: a new leader starts to watch afresh.
Thesis 4.2.1 says why a learner must have caught up first; the other rules are in
ARCHITECTURE.md, "Identity and membership".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from dengine.raft.membership import Membership, Status
from dengine.raft.progress import Progress
from dengine.raft.raft import Raft
from dengine.raft.types import MemberId


@dataclass(slots=True)
class _CatchUp:
    """One learner's catch-up rounds: each ends when it has what the log held at its start."""

    round_target: int
    round_started_ms: int
    last_round_ms: int | None = None
    ready_since_ms: int | None = None
    reason: str = "not observed yet"


@dataclass(frozen=True, slots=True)
class PromotionRules:
    catchup_entries: int
    stable_ms: int
    heartbeat_ms: int
    timeout_ms_min: int


@dataclass(slots=True)
class Promotion:
    """Watches the learners of one leadership."""

    rules: PromotionRules
    _learners: dict[MemberId, _CatchUp] = field(default_factory=dict)

    def observe(self, raft: Raft, now_ms: int) -> None:
        """Look at every learner again; call it on each tick of the leader."""
        learners = raft.membership.learners
        for gone in [m for m in self._learners if m not in learners]:
            del self._learners[gone]
        for learner in learners:
            progress = raft.progress[learner]
            state = self._learners.get(learner)
            if state is None:
                state = self._learners[learner] = _CatchUp(raft.log.last_index, now_ms)
            if progress.match_index >= state.round_target:
                state.last_round_ms = now_ms - state.round_started_ms
                state.round_target, state.round_started_ms = raft.log.last_index, now_ms
            obstacle = self._obstacle(raft, learner, progress, state, now_ms)
            if obstacle is not None:
                state.ready_since_ms = None
                state.reason = obstacle
            elif state.ready_since_ms is None:
                state.ready_since_ms = now_ms
                state.reason = f"caught up; waiting until that held for {self.rules.stable_ms} ms"

    def _obstacle(
        self, raft: Raft, learner: MemberId, progress: Progress, state: _CatchUp, now_ms: int
    ) -> str | None:
        """Why this learner could not be a voter at this moment."""
        rules = self.rules
        lag = raft.log.commit_index - progress.match_index
        if not raft.heard_within(learner, 2 * rules.heartbeat_ms):
            return f"it has not answered for {now_ms - progress.heard_ms} ms"
        if progress.wants_snapshot:
            return "it waits for a snapshot"
        if lag > rules.catchup_entries:
            return f"it is {lag} entries behind (at most {rules.catchup_entries} allowed)"
        if state.last_round_ms is None:
            return "its first catch-up round is not finished"
        if state.last_round_ms >= rules.timeout_ms_min:
            return f"its last catch-up round took {state.last_round_ms} ms, too slow to keep up"
        return None

    def is_ready(self, learner: MemberId, now_ms: int) -> bool:
        state = self._learners.get(learner)
        return (
            state is not None
            and state.ready_since_ms is not None
            and now_ms - state.ready_since_ms >= self.rules.stable_ms
        )

    def choose(self, membership: Membership, now_ms: int) -> tuple[MemberId, ...]:
        """The learners to promote now, all in one change; empty when none."""
        if membership.joint:
            return ()
        swaps, newcomers = self._ready(membership, now_ms)
        if membership.settings.promotion == "odd":
            newcomers = _odd_prefix(len(membership.voters), newcomers)
        return tuple(chain(swaps, newcomers))

    def _ready(self, membership: Membership, now_ms: int) -> tuple[list[MemberId], list[MemberId]]:
        """Ready learners, lowest id first: those that replace their older self, and new ones."""
        voter_ids = {v.id for v in membership.voters}
        ready = [
            learner
            for learner in membership.learners
            if self._promotable(membership, learner) and self.is_ready(learner, now_ms)
        ]
        return (
            [m for m in ready if m.id in voter_ids],
            [m for m in ready if m.id not in voter_ids],
        )

    @staticmethod
    def _promotable(membership: Membership, learner: MemberId) -> bool:
        member = membership.get(learner)
        return member is not None and member.status is Status.PROMOTABLE

    def reason(self, membership: Membership, learner: MemberId, now_ms: int) -> str:
        """Why `learner` is not a voter yet, for a person."""
        if not self._promotable(membership, learner):
            return "read_only: it is never promoted"
        state = self._learners.get(learner)
        if state is None or not self.is_ready(learner, now_ms):
            return state.reason if state is not None else "the leader has just begun to watch it"
        if membership.joint:
            return "ready; another membership change is under way"
        if learner not in self.choose(membership, now_ms):
            voters = len(membership.voters)
            return (
                f"waiting for one more learner: {voters + 1} voters would tolerate no "
                f"{'failure' if voters < 2 else 'more failures than ' + str(voters)}"
            )
        return "ready; being promoted"


def _odd_prefix(voters: int, newcomers: Sequence[MemberId]) -> list[MemberId]:
    """The longest prefix that leaves an odd number of voters; empty when there is none."""
    for count in range(len(newcomers), 0, -1):
        if (voters + count) % 2 == 1:
            return list(newcomers[:count])
    return []
