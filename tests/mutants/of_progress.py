"""Mutants that break no promise by themselves: they cost leaders, terms and time, or take away what
another line makes up for.

The simulator's faults take leaders away all the time, so one that is lost for no reason does not
show there. What these lines are for is said by the tests, which must fail.
"""

from __future__ import annotations

from tests.mutants.edits import Mutant, mutant

RAFT = "dengine.raft.raft"
COMMITMENT = "tests/raft/test_commitment.py"
DISRUPTION = "tests/raft/test_disruption.py"
ELECTIONS = "tests/raft/test_elections.py"
MEMBERSHIP = "tests/raft/test_membership.py"
SNAPSHOTS = "tests/raft/test_snapshots.py"
TRANSFER = "tests/raft/test_transfer.py"

MUTANTS: tuple[Mutant, ...] = (
    mutant(
        "no pre-vote",
        (RAFT, "        self._pre_campaign()\n", "        self._campaign(transfer=False)\n"),
        tests=DISRUPTION,
    ),
    mutant(
        "pre-vote for a term that was entered already",
        (
            RAFT,
            "may_grant = m.term > self.term and not self._is_sticky()",
            "may_grant = not self._is_sticky()",
        ),
        tests=DISRUPTION,
    ),
    mutant(
        "pre-vote against a leader that is heard",
        (
            RAFT,
            "may_grant = m.term > self.term and not self._is_sticky()",
            "may_grant = m.term > self.term",
        ),
        tests=DISRUPTION,
    ),
    mutant(
        "a leader that is heard is deposed by whoever asks",
        (RAFT, "case VoteRequest(transfer=False) if self._is_sticky():", "case _ if False:"),
        tests=DISRUPTION,
    ),
    mutant(
        "no CheckQuorum",
        (
            RAFT,
            "if self._now_ms - quorum_heard_ms > timeout_ms:  # CheckQuorum",
            "if False:  # CheckQuorum",
        ),
        tests=DISRUPTION,
    ),
    mutant(
        "a leader whose disk hangs leads on",
        (RAFT, "if self._write_overdue():  # heartbeats", "if False:  # heartbeats"),
        tests=COMMITMENT,
    ),
    # What a leader hears about in its own term it has sent in its own term, and it replaces nothing
    # then: the simulator cannot show it. The line is there for whoever breaks that rule.
    mutant(
        "an acknowledgement of another entry believed",
        (
            RAFT,
            "if not self.log.matches(LogId(m.index, m.index_term)):\n"
            "                return  # speaks",
            "if m.index > self.log.last_index:\n                return  # speaks",
        ),
        tests=COMMITMENT,
    ),
    # They elect nobody in a membership that stays as it is: their candidate's log has lost.
    mutant(
        "votes for an earlier candidacy count",
        (
            RAFT,
            "return self.role is Role.CANDIDATE and self._candidate_term == self.term",
            "return self.role is Role.CANDIDATE",
        ),
        tests=ELECTIONS,
    ),
    mutant(
        "a removed leader leads on",
        (
            RAFT,
            "elif self.me not in membership.voters or self._has_no_state:\n            self._leave",
            "elif self._has_no_state:\n            self._leave",
        ),
        tests=MEMBERSHIP,
    ),
    mutant(
        "leadership handed to a member that lags",
        (
            RAFT,
            "if progress is not None and progress.match_index == self.log.last_index:",
            "if progress is not None:",
        ),
        tests=TRANSFER,
    ),
    mutant(
        "a handover that is never given up",
        (
            RAFT,
            "if self._transfer is not None and self._now_ms >= self._transfer[1]:",
            "if False:",
        ),
        tests=TRANSFER,
    ),
    mutant(
        "an invitation to lead accepted by whoever gets it",
        (
            RAFT,
            "if self.role is not Role.LEADER and self._may_campaign():",
            "if self.role is not Role.LEADER:",
        ),
        tests=TRANSFER,
    ),
    mutant(
        "a member without its state campaigns",
        (
            RAFT,
            "return not self._has_no_state and any(",
            "return any(",
        ),
        tests=SNAPSHOTS,
    ),
    # The name is synced once more before the log is reset, and a start that does not find the file
    # keeps the old log, which still has all that was promised.
    mutant(
        "received snapshot's name not synced",
        ("dengine.snapshot_writer", "sync_directory(directory)  # the log", "pass  # the log"),
        tests="tests/node/test_snapshot_writer.py",
    ),
)
