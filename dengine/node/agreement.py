"""Do all members hold the same state? Each reports after every 256th entry; the leader compares.

Equal entries must give equal states. A member whose digest differs from that of a majority of the
voters is wrong, be it by a flipped bit or by a bug: it throws its state away and gets another. The
leader is no exception, and steps down first. Where no majority agrees nobody knows who is right, so
all stop: no answer is better than a wrong one. When every voter has been heard, they do not start
again before a person has decided.
Reports and verdicts may be lost: a report is repeated, and what it shows is judged once more. Who
was started since has nothing to repeat: where its word is missing the leader brings the next
comparison about.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

from dengine.errors import DataCorruption
from dengine.node.wire import Frame, StateReport, StateVerdict
from dengine.raft.membership import Membership
from dengine.raft.quorum import VoteResult, joint_vote
from dengine.raft.raft import Raft
from dengine.raft.types import MemberId
from dengine.storage.state_records import StateDigest
from dengine.storage.state_store import StateStore

log = logging.getLogger("dengine.agreement")

# A voter that is connected and behind, as after a restart, may yet decide; not for ever.
PATIENCE = 10  # times the grace
COMPARED_MAX = 64  # indexes that wait for more reports; who lags further is not compared
REPEAT_MS = 5000  # after that long what was said last is said once more

NOTHING = StateDigest(0, 0, b"")


@dataclass(frozen=True, slots=True)
class Verdict:
    """`wrong` disagree with a majority at `index`; `split`: they disagree, and none has one.
    `final`: nor will one have it, for every voter has been heard.
    """

    index: int
    wrong: tuple[MemberId, ...]
    split: bool = False
    final: bool = False


@dataclass(slots=True)
class Tally:
    """The reports of one leadership, by index. Pure: time comes in from outside.

    Args:
        grace_ms: how long a disagreement without a majority may wait for further reports, if
            those that have not come are from voters that are gone.
    """

    grace_ms: int
    _reports: dict[int, dict[MemberId, StateDigest]] = field(default_factory=dict)
    _disputed_since_ms: dict[int, int] = field(default_factory=dict)
    # The last decision. Nothing up to it is disputed anew, without those who decided.
    _right: StateDigest = NOTHING
    _still_wrong: set[MemberId] = field(default_factory=set)  # their verdict was lost

    def report(self, member: MemberId, digest: StateDigest, now_ms: int) -> None:
        if digest.index <= self._right.index:
            if digest.index == self._right.index and digest != self._right:
                self._still_wrong.add(member)
            return
        reports = self._reports.setdefault(digest.index, {})
        reports[member] = digest
        if len(set(reports.values())) > 1:
            self._disputed_since_ms.setdefault(digest.index, now_ms)
        while len(self._reports) > COMPARED_MAX:
            self._drop(min(self._reports))

    def judge(self, membership: Membership, live: Set[MemberId], now_ms: int) -> list[Verdict]:
        """What can be decided now. Each index is judged once, and again when more reports come.

        Args:
            live: members that answer.
        """
        verdicts = []
        if self._still_wrong:
            verdicts.append(Verdict(self._right.index, tuple(sorted(self._still_wrong))))
            self._still_wrong.clear()
        for index in sorted(self._disputed_since_ms, reverse=True):
            if index not in self._reports:
                continue  # decided by a newer one
            reports = self._reports[index]
            right = self._majority(membership, reports)
            if right is not None:
                wrong = tuple(sorted(m for m, digest in reports.items() if digest != right))
                verdicts.append(Verdict(index, wrong))
                self._right = right
                for older in [i for i in self._reports if i <= index]:
                    self._drop(older)
                continue
            missing = membership.all_voters - reports.keys()
            patience_ms = self.grace_ms * (PATIENCE if missing & live else 1)
            if not missing or now_ms - self._disputed_since_ms[index] >= patience_ms:
                verdicts.append(Verdict(index, (), split=True, final=not missing))
                self._drop(index)
        return verdicts

    @property
    def disputed(self) -> int:
        """The newest index that is compared, if no majority agrees yet; else 0."""
        newest = max(self._reports, default=0) if self._disputed_since_ms else 0
        return newest if newest in self._disputed_since_ms else 0

    def silent(self, membership: Membership) -> Set[MemberId]:
        """The voters that have said nothing of the newest index."""
        return membership.all_voters - self._reports[max(self._reports)].keys()

    @staticmethod
    def _majority(
        membership: Membership, reports: dict[MemberId, StateDigest]
    ) -> StateDigest | None:
        for digest in set(reports.values()):
            agree = {m: True for m, other in reports.items() if other == digest}
            if joint_vote(membership.voters, membership.outgoing, agree) is VoteResult.WON:
                return digest
        return None

    def _drop(self, index: int) -> None:
        del self._reports[index]
        self._disputed_since_ms.pop(index, None)


class Agreement:
    """Reports this node's digests to the leader, judges as the leader, obeys the verdict.

    Args:
        send: one frame to a member; it may be lost.
        distrust: throws the applied state away, and our snapshots of it; told why, and after which
            entry it was wrong.
        fail: ends the process.
        halt: and every later one that would use the directory.
        propose_time: some more entries, for the next comparison.
    """

    def __init__(
        self,
        raft: Raft,
        state: StateStore,
        *,
        grace_ms: int,
        send: Callable[[MemberId, Frame], object],
        distrust: Callable[[str, int], None],
        fail: Callable[[DataCorruption], None],
        halt: Callable[[DataCorruption], None],
        propose_time: Callable[[], None],
    ) -> None:
        self._raft = raft
        self._state = state
        self._grace_ms = grace_ms
        self._send = send
        self._distrust = distrust
        self._fail = fail
        self._halt = halt
        self._propose_time = propose_time
        self._tally = Tally(grace_ms)
        self._last: tuple[StateDigest, ...] = ()  # what this node has said last
        self._last_of = state.path
        self._repeat_due_ms = 0
        self._sought = 0  # a decision on this index was, by the comparison after it
        self._seek_due_ms = 0

    def leadership_began(self) -> None:
        self._tally = Tally(self._grace_ms)
        self._repeat_due_ms = self._seek_due_ms = 0

    def applied(self, now_ms: int) -> None:
        """Entries were applied: report, or compare."""
        digests = self._state.take_digests()
        if digests:
            before = self._last if self._last_of == self._state.path else ()
            self._last = (*before, *digests)[-COMPARED_MAX:]
            self._last_of = self._state.path
            self._say_last(now_ms)
        self._seek_decision(now_ms)

    def _seek_decision(self, now_ms: int) -> None:
        """A voter that has the disputed entry and says nothing of it was started since, or got its
        state from elsewhere. Of an entry to come it will speak: bring that about, for a cluster may
        be quiet, but now and then only, since it may not have a state.
        """
        index = self._tally.disputed
        if not (index and self._raft.is_leader):
            return
        membership, live = self._voters()
        silent = self._tally.silent(membership) & live
        if not any(self._raft.stored_by(voter) >= index for voter in silent):
            return
        if index != self._sought:
            if now_ms < self._seek_due_ms:
                return
            self._sought, self._seek_due_ms = index, now_ms + REPEAT_MS
        self._propose_time()

    def _say_last(self, now_ms: int) -> None:
        self._repeat_due_ms = now_ms + REPEAT_MS
        if self._last_of != self._state.path:
            self._last = ()  # another state has taken the place of that one
        elif self._raft.is_leader:
            self.reported(self._raft.me, self._last, now_ms)
        elif self._raft.leader is not None:
            self._send(self._raft.leader, StateReport(self._last))

    def reported(self, sender: MemberId, digests: Sequence[StateDigest], now_ms: int) -> None:
        """A member has applied up to these. Leader only; from an older one's view it is ignored."""
        if not self._raft.is_leader:
            return
        for digest in digests:
            self._tally.report(sender, digest, now_ms)
        self._judge(now_ms)

    def ticked(self, now_ms: int) -> None:
        """Say again what may have been lost; as the leader, act on what can be decided."""
        if self._last and now_ms >= self._repeat_due_ms:
            self._say_last(now_ms)
        elif self._raft.is_leader:
            self._judge(now_ms)
        self._seek_decision(now_ms)

    def _judge(self, now_ms: int) -> None:
        membership, live = self._voters()
        for verdict in self._tally.judge(membership, live, now_ms):
            self._carry_out(verdict)

    def _voters(self) -> tuple[Membership, set[MemberId]]:
        """And those of them that answer."""
        membership = self._raft.committed_membership
        return membership, {v for v in membership.all_voters if self._raft.is_live(v)}

    def judged(self, sender: MemberId, verdict: StateVerdict) -> None:
        """The leader compared our digest with the others'."""
        if sender == self._raft.leader:
            self._obey(verdict)

    def _carry_out(self, verdict: Verdict) -> None:
        """Tell whom it concerns; this node last, since a wrong leader steps down."""
        me = self._raft.me
        message = StateVerdict(verdict.index, verdict.split, verdict.final)
        everyone = tuple(m.id for m in self._raft.membership.members)
        concerned = everyone if verdict.split else verdict.wrong
        log.error(
            "after entry %d %s",
            verdict.index,
            "the members hold different states and no majority agrees: all stop"
            if verdict.split
            else "another state than the majority's is held by node "
            + ", ".join(str(m.id) for m in verdict.wrong),
        )
        for member in concerned:
            if member != me:
                self._send(member, message)
        if me in concerned:
            self._obey(message)

    def _obey(self, verdict: StateVerdict) -> None:
        if verdict.split:
            end = self._halt if verdict.final else self._fail
            end(
                DataCorruption(
                    f"after entry {verdict.index} the members hold different states and no "
                    "majority agrees: compare them with `dengine snapshot save` and "
                    "`dengine snapshot verify`, and restore the right one"
                )
            )
        else:
            self._last = ()  # of the state that is thrown away
            reason = f"after entry {verdict.index} it differs from that of the majority"
            self._distrust(reason, verdict.index)
