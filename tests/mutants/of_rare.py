"""Mutants that break a promise where hardly a seed of the simulator, or none, ever asks for it.

They were not caught in hundreds of seeds, so it is the tests of the line that must fail.
"""

from __future__ import annotations

from tests.mutants.edits import Mutant, mutant

RAFT = "dengine.raft.raft"
RECOVERY = "dengine.storage.recovery"
QUORUM = "dengine.raft.quorum"
FILES = "tests/storage/test_snapshot_file.py"
FOUND = "tests/simulation/test_found.py"
FOUNDING = "tests/node/test_founding.py"
OLD_COPIES = "tests/simulation/test_old_copies.py"
INSTALLS = "tests/raft/test_snapshot_installs.py"
RECOVERIES = "tests/storage/test_recovery.py"

MUTANTS: tuple[Mutant, ...] = (
    # --- elections, replication, reads ------------------------------------------------------------
    # A lease rests on it. For a read to be stale, a voter has to start, vote and write within the
    # lease, which is half a timeout at most.
    mutant(
        "votes right after a start",
        (RAFT, "return self._now_ms - self._started_ms < promised_ms", "return False"),
        tests="tests/raft/test_disruption.py",
    ),
    # In most memberships majorities share a member all the same, and the log of a wrong candidate
    # has lost: each of these takes another accident in the same election or round.
    mutant(
        "requests for votes outlive the candidacy",
        (
            RAFT,
            "self._out.after_sync = [m for m in self._out.after_sync if not "
            "isinstance(m, VoteRequest)]",
            "pass",
        ),
        tests="tests/raft/test_elections.py",
    ),
    mutant(
        "a learner whose vote is needed does not stand",
        (RAFT, "            self._counted_as_voter = True\n", "            pass\n"),
        tests="tests/raft/test_elections.py",
    ),
    mutant(
        "a learner asked under a leader stands later",
        (RAFT, "        if may_grant and not granted:", "        if not granted:"),
        tests="tests/raft/test_elections.py",
    ),
    mutant(
        "a learner that was needed once stands for ever",
        (RAFT, "self._counted_as_voter = False\n        self._reset", "self._reset"),
        tests="tests/raft/test_elections.py",
    ),
    mutant(
        "a founder that is told of the cluster waits for all others",
        ("dengine.node.founding", "            self._is_founded = True", "            pass"),
        tests=FOUND,
    ),
    mutant(
        "a founder does not wait for the others to be bound",
        ("dengine.node.founding", "if self._is_founded or all(", "if True or all("),
        tests=FOUNDING,
    ),
    mutant(
        "a founder is bound to what contradicts another one",
        ("dengine.node.founding", "        if not self._pledges:\n", "        if True:\n"),
        tests=FOUNDING,
    ),
    mutant(
        "a founder is bound with any directory of another one",
        ("dengine.node.founding", "self.pledge.get(who) is None:", "not self.pledge.find(who.id):"),
        tests=FOUNDING,
    ),
    mutant(
        "an old copy of the only voter is believed",
        ("dengine.node.admission", "if theirs.is_sole_voter:", "if False:"),
        tests=OLD_COPIES,
    ),
    mutant(
        "an old copy of the only voter is known by the length of its log",
        (
            "dengine.node.admission",
            "(theirs.membership_version, theirs.last_index) >= (membership.version, committed)",
            "theirs.last_index >= committed",
        ),
        tests=OLD_COPIES,
    ),
    mutant(
        "the longer log outweighs who votes",
        (
            "dengine.node.admission",
            "(theirs.membership_version, theirs.last_index) >= (membership.version, committed)",
            "theirs.membership_version >= membership.version and theirs.last_index >= committed",
        ),
        (
            "dengine.node.exchange",
            "(raft.membership.version, raft.log.stable_index)\n"
            "            < (refused.membership_version, refused.committed)",
            "raft.log.stable_index < refused.committed",
        ),
        tests=OLD_COPIES,
    ),
    mutant(
        "what an old copy changes alone makes it newer",
        ("dengine.raft.membership", "return new if same else", "return new if False else"),
        tests=OLD_COPIES,
    ),
    mutant(
        "whoever says so has removed us",
        ("dengine.node.exchange", '"removed" if self._concerns(refused)', '"removed"'),
        tests=OLD_COPIES,
    ),
    mutant(
        "what is lost on a long way is not sent again",
        (
            RAFT,
            "progress.asked_round = progress.asked_round or number",
            "progress.asked_round = number",
        ),
        tests="tests/simulation/test_calls.py",
    ),
    mutant(
        "the only voter believes a late refusal",
        (
            "dengine.node.exchange",
            '"sole_voter" if self._lacks_what_is_committed(refused)',
            '"sole_voter"',
        ),
        tests=OLD_COPIES,
    ),
    mutant(
        "an old copy of the only voter may be started again",
        ("dengine.node.exchange", "self._directory.halt(old_copy)", "pass"),
        tests=OLD_COPIES,
    ),
    mutant(
        "the only voter leads at once",
        ("dengine.node.opening", "=config.cluster.founding_wait_ms,", "=0,"),
        tests=OLD_COPIES,
    ),
    mutant(
        "a voter without a log is believed",
        ("dengine.node.admission", "if theirs.cluster_id and not theirs.last_index", "if False"),
        tests=OLD_COPIES,
    ),
    mutant(
        "a voter without its state never stands",
        (
            RAFT,
            "        if self._counted_as_voter:\n",
            "        if self._counted_as_voter and not self._has_no_state:\n",
        ),
        tests=FOUND,
    ),
    mutant(
        "a leader without its state stays",
        (RAFT, "not in membership.voters or self._has_no_state:", "not in membership.voters:"),
        tests=FOUND,
    ),
    mutant(
        "a start forgets what was promised before it",
        (RAFT, "max(config.start_stickiness_ms, ", "max(0, "),
        tests="tests/raft/test_elections.py",
    ),
    mutant(
        "a verdict that got lost is not repeated",
        ("dengine.node.agreement", "if self._last and now_ms >=", "if False and now_ms >="),
        tests="tests/node/test_agreement.py",
    ),
    mutant(
        "what was decided is disputed anew",
        (
            "dengine.node.agreement",
            "if digest.index <= self._right.index:",
            "if digest.index < self._right.index:",
        ),
        tests="tests/node/test_agreement.py",
    ),
    mutant(
        "nobody seeks a decision that a voter cannot give any more",
        ("dengine.node.agreement", "        self._propose_time()\n", "        pass\n"),
        tests="tests/node/test_agreement.py",
    ),
    mutant(
        "a wrong state is marked when there is time",
        (
            "dengine.node.snapshots",
            "        if self.distrusts_state:\n            # At",
            "        if False:\n            # At",
        ),
        tests="tests/node/test_snapshots.py",
    ),
    mutant(
        "messages to an older incarnation believed",
        (RAFT, "if m.to != self.me:", "if m.to.id != self.me.id:"),
        tests="tests/raft/test_elections.py",
    ),
    mutant(
        "elections by the new half only",
        (
            QUORUM,
            "results = {majority_vote(voters, votes), majority_vote(outgoing, votes)}",
            "results = {majority_vote(voters, votes)}",
        ),
        tests="tests/raft/test_quorum.py",
    ),
    mutant(
        "elections by the old half only",
        (
            QUORUM,
            "results = {majority_vote(voters, votes), majority_vote(outgoing, votes)}",
            "results = {majority_vote(outgoing or voters, votes)}",
        ),
        tests="tests/raft/test_quorum.py",
    ),
    mutant(
        "reads confirmed by learners",
        (
            RAFT,
            "confirmed = joint_value(membership.voters, membership.outgoing, acked)",
            "counted = (*membership.voters, *membership.learners)\n"
            "        confirmed = joint_value(counted, membership.outgoing, acked)",
        ),
        tests="tests/raft/test_reads.py::test_learners_and_strangers_confirm_nothing",
    ),
    # It takes an entry behind what a message covers that differs from the committed one and is
    # looked at just then.
    mutant(
        "commit beyond what was compared",
        (
            RAFT,
            "self._commit_to(min(m.commit_index, last.index))",
            "self._commit_to(min(m.commit_index, self.log.last_index))",
        ),
        tests="tests/raft/test_replication.py",
    ),
    # --- snapshots --------------------------------------------------------------------------------
    # A leader sends no entries to whom it has offered a snapshot, so there is hardly ever one that
    # waits for the disk when the file has come.
    mutant(
        "acknowledgements of what a snapshot drops",
        (
            RAFT,
            "            self._drop_waiting_acknowledgements()\n        elif",
            "            pass\n        elif",
        ),
        tests=INSTALLS,
    ),
    mutant(
        "a snapshot within the log does not wait for the log",
        (
            RAFT,
            "elif self.log.unstable():\n            return None",
            "elif False:\n            return None",
        ),
        tests=INSTALLS,
    ),
    mutant(
        "an install that a start finishes forgets the vote",
        (RECOVERY, "voted_for = old.voted_for if old.term == term else None", "voted_for = None"),
        tests=RECOVERIES,
    ),
    mutant(
        "the lease of a joint state needs the new half alone",
        (
            RAFT,
            "joint_value(self.membership.voters, self.membership.outgoing, sent)",
            "joint_value(self.membership.voters, (), sent)",
        ),
        tests="tests/raft/test_reads.py",
    ),
    mutant(
        "a write that a snapshot covers is said not to have happened",
        (
            "dengine.node.proposals",
            'covers the write; it may have happened",\n                outcome="unknown",',
            'covers the write; it may have happened",\n                outcome="none",',
        ),
        tests="tests/node/test_proposals.py",
    ),
    mutant(
        "an eventual read sees a state that is being built again",
        (
            "dengine.node.node",
            "max(1, self._announce_above, self.snapshots.installer.forgotten_at)",
            "max(1, self._announce_above)",
        ),
        tests="tests/node/test_snapshots.py",
    ),
    mutant(
        "a read that has waited sees a state that is being built again",
        (
            "dengine.node.node",
            "if self.raft.log.applied_index >= self.snapshots.installer.forgotten_at:",
            "if True:",
        ),
        tests="tests/node/test_snapshots.py",
    ),
    # It takes a stop while the disk stands still within an install (one seed in some 500).
    mutant(
        "an install is finished without its snapshot's name",
        (RECOVERY, "if not _has_snapshot(directory, state.applied):", "if False:"),
        tests=RECOVERIES,
    ),
    mutant(
        "a stop within an install leaves the received file without a name",
        (
            "dengine.node.installing",
            "self._installed = None\n\n",
            "self._installed = self._fetched = None\n\n",
        ),
        tests="tests/node/test_snapshots.py::"
        "test_a_node_that_stops_within_an_install_names_the_file_all_the_same",
    ),
    # It takes a newest snapshot that has rotted and a state that cannot be used, both at one node
    # alone.
    mutant(
        "the log goes up to the newest snapshot",
        (
            "dengine.node.snapshot_files",
            "limit = min(refs[-2].index,",
            "limit = min(refs[-1].index,",
        ),
        tests="tests/node/test_snapshot_files.py",
    ),
    # --- damage -----------------------------------------------------------------------------------
    # Each is one of several that look at the same records, and where nothing else would have found
    # the rot in time, the next look at a snapshot or a read does.
    mutant(
        "what rots in a state goes into its snapshots",
        (
            "dengine.storage.snapshots",
            "reader.check(lambda read: progress(min(checked, read // CHECK_RATE), total))",
            "pass",
        ),
        tests=f"{FILES}::test_what_has_rotted_in_a_state_is_never_signed",
    ),
    mutant(
        "an unpacked state is not looked at",
        (
            "dengine.storage.snapshots",
            "reader = check_state(state, lambda _: progress(total, total))",
            "with StateReader(state) as reader:\n                pass",
        ),
        tests=f"{FILES}::test_a_state_that_rotted_before_it_was_signed_is_not_unpacked",
    ),
    mutant(
        "a deletion does not look at what it deletes",
        (
            "dengine.storage.state_view",
            "sound_record(key, old, self._path, keys_only=True)",
            "pass",
        ),
        tests="tests/storage/test_state_store.py::test_damage_in_a_record_is_found_on_read",
    ),
    # It takes states that differ and are sound by all their checksums.
    mutant(
        "nobody compares the states of members",
        (
            "dengine.node.agreement",
            "        if digests:\n            before",
            "        if not digests:\n            before",
        ),
        tests="tests/node/test_agreement.py",
    ),
    # It takes a key of the log that has rotted into a later one.
    mutant(
        "refused append taken for written",
        (
            "dengine.storage.log_store",
            "append=True):\n                # LMDB holds",
            "append=True) and False:\n                # LMDB holds",
        ),
        tests="tests/storage/test_log_store.py",
    ),
    # They take an older copy of a disk that is put back, the last two together with a crash or with
    # a state that is older, too.
    mutant(
        "a log older than a snapshot is used",
        (
            RECOVERY,
            "            old = _rolled_back(directory, store)",
            "            old = None",
        ),
        tests=f"{RECOVERIES}::test_a_log_older_than_a_snapshot_is_replaced",
    ),
    mutant(
        "entries that were acknowledged and are gone are not missed",
        (RAFT, "self.saw_lost_entries = True  # acknowledged", "pass  # acknowledged"),
        tests="tests/raft/test_replication.py",
    ),
    mutant(
        "a new log before the incarnation that it belongs to",
        (RECOVERY, "        directory.reincarnate()\n        if not", "        if not"),
        (
            RECOVERY,
            "membership)\n        opened.callback(store.close)\n",
            "membership)\n        opened.callback(store.close)\n        directory.reincarnate()\n",
        ),
        tests=f"{RECOVERIES}::test_a_rolled_back_node_never_comes_back_under_its_old_name",
    ),
    mutant(
        "a state that the log does not continue is used",
        (
            RECOVERY,
            "return store.first_index() - 1 <= index <= store.last_index() and "
            "store.term(index) == term",
            "return True",
        ),
        tests=f"{RECOVERIES}::test_a_state_older_than_the_log_is_built_again",
    ),
    # --- others -----------------------------------------------------------------------------------
    # It takes a member that sleeps while others join and one of them begins to lead; hence a
    # scenario of its own.
    mutant(
        "addresses from the log alone",
        (
            "dengine.node.node",
            "if not self._known_addresses(member):  # perhaps",
            "if False:  # perhaps",
        ),
        tests=f"{FOUND}::test_a_snapshot_is_fetched_from_a_leader_newer_than_our_log",
    ),
    # It takes an answer that is on its way over a restart.
    mutant(
        "answers to the process before taken for ours",
        ("dengine.node.forwarding", "self._next_id = boot", "self._next_id = 0"),
        tests=f"{FOUND}::test_an_answer_to_the_process_before_is_not_ours",
    ),
    # Entries tell the time as well, one a second where anything can end.
    mutant(
        "heartbeats do not tell the time",
        (
            "dengine.raft.raft",
            "self.clock.hear(m.term, m.clock_ms, self.log.last_term, self._now_ms)",
            "pass",
        ),
        tests="tests/raft/test_log_clock.py",
    ),
    # It takes an entry that is not committed under the leader that wrote it, nor lost, and between
    # that leader's two times another one that knew more. Seed 2000673 had it.
    mutant(
        "the time of a leader that lacks what we have",
        ("dengine.raft.log_clock", "clock_ms and term == last_term and", "clock_ms and"),
        ("dengine.raft.log_clock", "if self._heard[0] != last_term:", "if False:"),
        tests="tests/raft/test_log_clock.py",
    ),
    mutant(
        "a time that was heard before an entry was written",
        ("dengine.raft.log_clock", "if (log_id.term, clock_ms) >= self._heard:", "if False:"),
        tests="tests/raft/test_log_clock.py",
    ),
    mutant(
        "the time of an entry that is gone",
        ("dengine.raft.raft", "self.clock.truncated(truncated)", "pass"),
        tests="tests/raft/test_log_clock.py",
    ),
    # What is due ends before the commands of an entry have their turn, unless too much is due at
    # once.
    mutant(
        "a lease is used after its time",
        (
            "dengine.kv.tables",
            "self.going == ALIVE and clock_ms < self.expires_ms",
            "self.going == ALIVE",
        ),
        tests="tests/kv/test_expiry.py::test_a_lease_whose_time_is_over_cannot_be_used",
    ),
    # It takes a kill right between the disk's answer and the note of it.
    mutant(
        "this boot vouches for a state while the disk is asked about it",
        ("dengine.node.node", "            forget_run(self.state.path)\n", ""),
        tests=FOUND,
    ),
    mutant(
        "rot in identity.json is not looked for",
        ("dengine.storage.identity", "if found.checksum and found.checksum != ", "if False and "),
        tests="tests/storage/test_directory.py",
    ),
)
