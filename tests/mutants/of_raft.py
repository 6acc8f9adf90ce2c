"""Mutants of the protocol: elections, replication, membership, reads (dengine/raft)."""

from __future__ import annotations

from tests.mutants.edits import Mutant, mutant

RAFT = "dengine.raft.raft"
LOG = "dengine.raft.log"

MUTANTS: tuple[Mutant, ...] = (
    mutant(
        "vote not synced",
        (RAFT, "self._send_after_sync(VoteResponse(", "self._send(VoteResponse("),
    ),
    mutant(
        "two votes in a term",
        (RAFT, "can_vote = self.voted_for in (None, m.sender) and", "can_vote = True and"),
    ),
    mutant(
        "candidate before its own vote is durable",
        (
            RAFT,
            "self._send_after_sync(\n                VoteRequest(",
            "self._send(\n                VoteRequest(",
        ),
    ),
    mutant(
        "vote for an outdated log",
        (
            RAFT,
            "and (m.transfer or not self._is_sticky())\n            and self.log.is_up_to_date(",
            "and (m.transfer or not self._is_sticky())\n            and bool(",
        ),
        (  # the pre-vote alone would prevent it
            RAFT,
            "granted = may_grant and self.log.is_up_to_date(",
            "granted = may_grant and bool(",
        ),
    ),
    mutant(
        "ack before sync",
        (
            RAFT,
            "if last.index <= self.log.stable_index and self._term_and_vote_durable():",
            "if last.index <= self.log.last_index:",
        ),
    ),
    mutant(
        "leader counts itself before its own sync",
        (
            RAFT,
            "self.progress[self.me].acknowledged(self.log.stable_index)\n            self._advance",
            "self.progress[self.me].acknowledged(self.log.last_index)\n            self._advance",
        ),
    ),
    mutant(
        "old-term commit",
        (
            RAFT,
            "if index <= self.log.commit_index or self.log.term(index) != self.term:",
            "if index <= self.log.commit_index:",
        ),
    ),
    mutant(
        "no no-op",
        (
            RAFT,
            'self._noop_index = self._append(EntryKind.NOOP, b"").index',
            "self._noop_index = self.log.commit_index",
        ),
    ),
    mutant(
        "previous entry not compared",
        (
            RAFT,
            "elif not self.log.matches(prev):",
            "elif prev.index > self.log.last_index:",
        ),
    ),
    mutant(
        "a heartbeat's commit index believed without comparing terms",
        (
            RAFT,
            "min(progress.match_index, self.log.commit_index) if progress is not None else 0",
            "self.log.commit_index",
        ),
        (RAFT, "if self.log.matches(commit):", "if commit.index <= self.log.last_index:"),
        (RAFT, "self.saw_lost_entries = True  # acknowledged", "pass  # acknowledged"),
    ),
    mutant(
        "a write of a replaced entry counts as durable",
        (
            LOG,
            "if log_id.index > self.stable_index and self.matches(log_id):",
            "if self.last_index >= log_id.index > self.stable_index:",
        ),
    ),
    mutant(
        "non-joint 1->3",
        (
            "dengine.raft.membership",
            "return tuple(old) if len(set(old) ^ set(new)) > 1 else ()",
            "return ()",
        ),
    ),
    mutant(
        "joint by the new half only",
        (
            "dengine.raft.quorum",
            "return min(majority_value(voters, values), majority_value(outgoing, values))",
            "return majority_value(voters, values)",
        ),
    ),
    mutant(
        "learner counted",
        (
            RAFT,
            "index = joint_value(membership.voters, membership.outgoing, matches)",
            "counted = (*membership.voters, *membership.learners)\n"
            "        index = joint_value(counted, membership.outgoing, matches)",
        ),
    ),
    mutant(
        "membership of a truncated entry stays",
        (RAFT, "self._drop_memberships(truncated)", "pass"),
    ),
    mutant(
        "membership change before an entry of the own term",
        (
            RAFT,
            "if not self.committed_in_term:  # Ongaro",
            "if False:  # Ongaro",
        ),
        (
            "dengine.node.members",
            "not raft.committed_in_term\n        or raft.membership.joint",
            "raft.membership.joint",
        ),
        (
            "dengine.node.members",
            "if not raft.committed_in_term:\n            return\n",
            "if False:\n            return\n",
        ),
    ),
    mutant(
        "second membership change while one is uncommitted",
        (
            RAFT,
            "if self.membership_index > self.log.commit_index:\n            raise Conflict",
            "if False:\n            raise Conflict",
        ),
        (
            "dengine.node.members",
            "or raft.membership_index > raft.log.commit_index\n",
            "",
        ),
    ),
    mutant(
        "reused read round",
        (
            "dengine.raft.read_index",
            "self.last_round += 1",
            "self.last_round += not (self.arrived and self.last_round)",
        ),
    ),
    mutant(
        "reads before the leader has committed in its term",
        (
            RAFT,
            "self._rounds.start(commit if self.committed_in_term else None, self._now_ms)",
            "self._rounds.start(commit, self._now_ms)",
        ),
        (
            RAFT,
            "rounds.arrived and not rounds.outstanding and self.committed_in_term",
            "rounds.arrived and not rounds.outstanding",
        ),
    ),
    mutant(
        "lease from ack time",
        (
            RAFT,
            "max(progress.acked_sent_ms, self._rounds.sent_ms(m.round))",
            "self._now_ms",
        ),
    ),
    mutant(
        "lease longer than stickiness",
        (
            RAFT,
            "window_ms = min(self.config.lease_ms, min(timeouts, default=2**31) // 2)",
            "window_ms = 4 * self.config.timeout_ms_min",
        ),
    ),
    mutant(
        "lease kept while handing over",
        (RAFT, "self._lease_given_up = True", "self._lease_given_up = False"),
    ),
    mutant(
        "membership of a snapshot ignored",
        (
            RAFT,
            "self._memberships = [(restore.log_id.index, restore.membership)]",
            "self._memberships = self._memberships[:1]",
        ),
    ),
    mutant(
        "vote for a shorter log",
        (
            LOG,
            "return (last.term, last.index) >= (self.last_term, self.last_index)",
            "return last.term >= self.last_term",
        ),
    ),
    mutant(
        "vote for a longer log of an older term",
        (
            LOG,
            "return (last.term, last.index) >= (self.last_term, self.last_index)",
            "return last.index >= self.last_index",
        ),
    ),
    mutant(
        "what has not been written counts as written",
        (
            RAFT,
            "self._durable = ready.hard_state\n        if ready.entries:",
            "self._durable = self.hard_state\n        if ready.entries:",
        ),
    ),
    mutant(
        "heartbeat answered in a term that may be forgotten",
        (
            RAFT,
            "if self._term_and_vote_durable():\n            self._send(response)  # says",
            "if True:\n            self._send(response)  # says",
        ),
    ),
    mutant(
        "messages of an older term believed",
        (
            RAFT,
            "            self._answer_stale(m)\n            return\n",
            "            self._answer_stale(m)\n",
        ),
    ),
    mutant(
        "learners campaign",
        (
            RAFT,
            "        if self._counted_as_voter:\n            return True\n",
            "        if True:\n            return True\n",
        ),
    ),
    mutant(
        "a late append removes what follows it",
        (
            LOG,
            "if self.term(entry.index) == entry.term:\n                    continue",
            "if False:\n                    continue",
        ),
    ),
    mutant(
        "a conflicting tail is kept",
        (
            LOG,
            "if self.term(entry.index) == entry.term:\n                    continue",
            "if True:\n                    continue",
        ),
    ),
    mutant(
        "membership in force only once it is committed",
        (RAFT, "return self._memberships[-1][1]", "return self._memberships[0][1]"),
    ),
    mutant(
        "a joint state is never left",
        (RAFT, "if membership.joint:  # whoever leads", "if False:  # whoever leads"),
    ),
    mutant(
        "reads confirmed by the leader alone",
        (
            RAFT,
            "confirmed = joint_value(membership.voters, membership.outgoing, acked)",
            "confirmed = max(acked.values())",
        ),
    ),
    mutant(
        "reads that wait are served when leadership ends",
        (
            RAFT,
            "for read in self._rounds.drain():\n            self._answer_read(read, None)",
            "for read in self._rounds.drain():\n"
            "            self._answer_read(read, self.log.commit_index)",
        ),
    ),
    mutant(
        "an old snapshot takes the place of a newer state",
        (RAFT, "        return log_id.index > self.log.commit_index\n", "        return True\n"),
    ),
)
