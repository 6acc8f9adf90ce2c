"""Mutants that break no promise by themselves: they cost leaders, terms and time, or take away what
another line makes up for.

The simulator's faults take leaders away all the time, so one that is lost for no reason does not
show there. What these lines are for is said by the tests, which must fail. The last few break a
promise that hardly a seed ever asks for: the tests do.
"""

from __future__ import annotations

from tests.mutants.edits import Mutant, mutant

RAFT = "dengine.raft.raft"
COMMITMENT = "tests/raft/test_commitment.py"
DISRUPTION = "tests/raft/test_disruption.py"
ELECTIONS = "tests/raft/test_elections.py"
FOUND = "tests/simulation/test_found.py"
INSTALLS = "tests/raft/test_snapshot_installs.py"
MEMBERSHIP = "tests/raft/test_membership.py"
SNAPSHOTS = "tests/raft/test_snapshots.py"
TRANSFER = "tests/raft/test_transfer.py"
WRITER = "tests/node/test_snapshot_writer.py"

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
            "m.term > self.term\n            and not self._is_sticky()",
            "not self._is_sticky()",
        ),
        tests=DISRUPTION,
    ),
    mutant(
        "pre-vote against a leader that is heard",
        (RAFT, "and not self._is_sticky()\n            and self.log", "and self.log"),
        tests=DISRUPTION,
    ),
    mutant(
        "a leader that is heard is deposed by whoever asks",
        (RAFT, "case VoteRequest(transfer=False) if self._is_sticky():", "case _ if False:"),
        tests=DISRUPTION,
    ),
    # A lease rests on it. For a read to be stale, a voter has to start, vote and write within the
    # lease, which is half a timeout at most: hardly a seed is so quick.
    mutant(
        "votes right after a start",
        (RAFT, "            since = self._started_ms\n", "            return False\n"),
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
        "requests for votes outlive the candidacy",
        (
            RAFT,
            "self._out.after_sync = [m for m in self._out.after_sync if not "
            "isinstance(m, VoteRequest)]",
            "pass",
        ),
        tests=ELECTIONS,
    ),
    mutant(
        "a removed leader leads on",
        (
            RAFT,
            "elif self.me not in membership.voters:\n            self._leave",
            "elif False:\n            self._leave",
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
            "if self.state_lost or self.state_wrong or self._restore is not None:\n"
            "            return False",
            "if False:\n            return False",
        ),
        tests=SNAPSHOTS,
    ),
    # A leader sends no entries to whom it has offered a snapshot, so there is hardly ever one that
    # waits to be acknowledged when the log is dropped.
    mutant(
        "acknowledgements of what a snapshot drops",
        (
            RAFT,
            "            self._drop_waiting_acknowledgements()\n        elif",
            "            pass\n        elif",
        ),
        tests=INSTALLS,
    ),
    # It takes a member that sleeps while others join and one of them begins to lead. Hardly a seed
    # has that, so there is a scenario of its own.
    mutant(
        "addresses from the log alone",
        (
            "dengine.node.node",
            "if not self._known_addresses(member):  # perhaps",
            "if False:  # perhaps",
        ),
        tests=f"{FOUND}::test_a_snapshot_is_fetched_from_a_leader_newer_than_our_log",
    ),
    # A start that does not find the file keeps the old log, which still has all that was promised.
    mutant(
        "received snapshot's name not synced",
        ("dengine.snapshot_writer", "sync_directory(directory)  # the log", "pass  # the log"),
        tests=WRITER,
    ),
    # These two are no matter of progress: they are rare. No seed of 500 has the first one, an entry
    # behind what a message covers that differs from the committed one and is looked at just then;
    # nor the second, an answer that is on its way over a restart.
    mutant(
        "commit beyond what was compared",
        (
            RAFT,
            "self._commit_to(min(m.commit_index, last.index))",
            "self._commit_to(min(m.commit_index, self.log.last_index))",
        ),
        tests="tests/raft/test_replication.py",
    ),
    mutant(
        "answers to the process before taken for ours",
        ("dengine.node.forwarding", "self._next_id = boot", "self._next_id = 0"),
        tests=f"{FOUND}::test_an_answer_to_the_process_before_is_not_ours",
    ),
)
