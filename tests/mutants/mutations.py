"""Defects that were put in on purpose: each a change of a line or two that somebody could make.

The simulator must find every one of them (see run.py). `MutantLoader` compiles the changed source
at import time; nothing on disk is touched.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import CodeType
from typing import NamedTuple


class Edit(NamedTuple):
    """In the source of `module`, `old` (which stands there once) becomes `new`."""

    module: str
    old: str
    new: str


class Mutant(NamedTuple):
    name: str
    edits: tuple[Edit, ...]


def _mutant(name: str, *edits: tuple[str, str, str]) -> Mutant:
    return Mutant(name, tuple(Edit(*edit) for edit in edits))


RAFT = "dengine.raft.raft"
LOG = "dengine.raft.log"

MUTANTS: tuple[Mutant, ...] = (
    _mutant(
        "vote not synced",
        (RAFT, "self._send_after_sync(VoteResponse(", "self._send(VoteResponse("),
    ),
    _mutant(
        "two votes in a term",
        (RAFT, "can_vote = self.voted_for in (None, m.sender) and", "can_vote = True and"),
    ),
    _mutant(
        "candidate before its own vote is durable",
        (
            RAFT,
            "self._send_after_sync(\n                VoteRequest(",
            "self._send(\n                VoteRequest(",
        ),
    ),
    _mutant(
        "vote for an outdated log",
        (
            RAFT,
            "and (m.transfer or not self._is_sticky())\n            and self.log.is_up_to_date(",
            "and (m.transfer or not self._is_sticky())\n            and bool(",
        ),
        (  # the pre-vote alone would prevent it
            RAFT,
            "and not self._is_sticky()\n            and self.log.is_up_to_date(",
            "and not self._is_sticky()\n            and bool(",
        ),
    ),
    _mutant(
        "ack before sync",
        (
            RAFT,
            "if last.index <= self.log.stable_index and self._term_and_vote_durable():",
            "if last.index <= self.log.last_index:",
        ),
    ),
    _mutant(
        "failed write taken for written",
        (
            "dengine.node.cycle",
            "if error is not None:\n                raise error",
            "if error is not None:\n                pass",
        ),
    ),
    _mutant(
        "fsync retried",
        (
            "dengine.node.cycle",
            "if error is not None:\n                raise error",
            "if error is not None:\n                return self._writer.submit(ready)",
        ),
        ("dengine.storage.log_store", "if self._failed:", "if False:"),
    ),
    _mutant(
        "leader counts itself before its own sync",
        (
            RAFT,
            "self.progress[self.me].acknowledged(self.log.stable_index)\n            self._advance",
            "self.progress[self.me].acknowledged(self.log.last_index)\n            self._advance",
        ),
    ),
    _mutant(
        "old-term commit",
        (
            RAFT,
            "if index <= self.log.commit_index or self.log.term(index) != self.term:",
            "if index <= self.log.commit_index:",
        ),
    ),
    _mutant(
        "no no-op",
        (
            RAFT,
            'self._noop_index = self._append(EntryKind.NOOP, b"").index',
            "self._noop_index = self.log.commit_index",
        ),
    ),
    _mutant(
        "previous entry not compared",
        (
            RAFT,
            "elif not self.log.matches(prev):",
            "elif prev.index > self.log.last_index:",
        ),
    ),
    _mutant(
        "a heartbeat's commit index believed without comparing terms",
        (
            RAFT,
            "min(progress.match_index, self.log.commit_index) if progress is not None else 0",
            "self.log.commit_index",
        ),
        (RAFT, "if self.log.matches(commit):", "if commit.index <= self.log.last_index:"),
        (RAFT, "self.saw_lost_entries = True  # acknowledged", "pass  # acknowledged"),
    ),
    _mutant(
        "a write of a replaced entry counts as durable",
        (
            LOG,
            "if log_id.index > self.stable_index and self.matches(log_id):",
            "if self.last_index >= log_id.index > self.stable_index:",
        ),
    ),
    _mutant(
        "non-joint 1->3",
        (
            "dengine.raft.membership",
            "return tuple(old) if len(set(old) ^ set(new)) > 1 else ()",
            "return ()",
        ),
    ),
    _mutant(
        "joint by the new half only",
        (
            "dengine.raft.quorum",
            "return min(majority_value(voters, values), majority_value(outgoing, values))",
            "return majority_value(voters, values)",
        ),
    ),
    _mutant(
        "learner counted",
        (
            RAFT,
            "index = joint_value(membership.voters, membership.outgoing, matches)",
            "counted = (*membership.voters, *membership.learners)\n"
            "        index = joint_value(counted, membership.outgoing, matches)",
        ),
    ),
    _mutant(
        "membership of a truncated entry stays",
        (RAFT, "self._drop_memberships(truncated)", "pass"),
    ),
    _mutant(
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
    _mutant(
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
    _mutant(
        "reused read round",
        (
            "dengine.raft.read_index",
            "self.last_round += 1",
            "self.last_round += not (self.arrived and self.last_round)",
        ),
    ),
    _mutant(
        "reused read nonce",
        (
            "dengine.node.reads",
            "nonce = ReadNonce(self._me, self._boot, self._counter)",
            "nonce = ReadNonce(self._me, 0, self._counter % 3)",
        ),
    ),
    _mutant(
        "failed read served",
        (
            "dengine.node.reads",
            "if state.index is None:\n            self._fail(batch.waiting)",
            "if state.index is None:\n            self._release(batch.waiting)",
        ),
    ),
    _mutant(
        "read before its index is applied",
        ("dengine.node.reads", "elif state.index <= applied_index:", "elif True:"),
    ),
    _mutant(
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
    _mutant(
        "lease from ack time",
        (
            RAFT,
            "max(progress.acked_sent_ms, self._rounds.sent_ms(m.round))",
            "self._now_ms",
        ),
    ),
    _mutant(
        "lease longer than stickiness",
        (
            RAFT,
            "window_ms = min(self.config.lease_ms, min(timeouts, default=2**31) // 2)",
            "window_ms = 4 * self.config.timeout_ms_min",
        ),
    ),
    _mutant(
        "lease kept while handing over",
        (RAFT, "self._lease_given_up = True", "self._lease_given_up = False"),
    ),
    _mutant(
        "data and applied index in two transactions",
        (
            "dengine.storage.state_store",
            "                _put_applied(txn, self._meta, applied, revision, view.hash)",
            "            with self._environment.begin(write=True) as txn:\n"
            "                _put_applied(txn, self._meta, applied, revision, view.hash)",
        ),
    ),
    _mutant(
        "state trusted after a power cut",
        (
            "dengine.storage.directory",
            "self._mark(RUN_MARK).partition(UNCLEAN)[0] == self._run_mark()",
            'self._mark("RUN") != ""',
        ),
    ),
    _mutant(
        "marked clean without a sync",
        ("dengine.node.node", "self.state.sync()", "pass"),
    ),
    _mutant(
        "small file renamed before it is synced",
        ("dengine.storage.directory", "os.fsync(fd)", "pass"),
    ),
    _mutant(
        "the data directory's own name not synced",
        ("dengine.storage.environment", "for made in (path, *missing):", "for made in ():"),
    ),
    _mutant(
        "purge ahead of the snapshots",
        (
            "dengine.node.snapshot_files",
            "limit = min(refs[-2].index, raft.log.applied_index - "
            "self._config.retained_log_entries)",
            "limit = raft.log.applied_index",
        ),
    ),
    _mutant(
        "an interrupted install is not finished",
        ("dengine.storage.recovery", "elif directory.installing:", "elif False:"),
    ),
    _mutant(
        "membership of a snapshot ignored",
        (
            RAFT,
            "self._memberships = [(restore.log_id.index, restore.membership)]",
            "self._memberships = self._memberships[:1]",
        ),
    ),
    _mutant(
        "a transaction that compares nothing",
        (
            "dengine.kv.machine",
            "succeeded = all(holds(compare, view.get(compare.key)) for compare in txn.compare)",
            "succeeded = True",
        ),
    ),
    _mutant(
        "the second half of a transaction is one revision later",
        (
            "dengine.kv.machine",
            "result = _operate(operation, overlay, view, revision, deleted)",
            "result = _operate(operation, overlay, view, after, deleted)",
        ),
    ),
    _mutant(
        "same incarnation with a new log",
        (
            "dengine.storage.recovery",
            "        directory.reincarnate()\n",
            "",
        ),
    ),
    _mutant(
        "answer to whoever stood at that index",
        ("dengine.node.proposals", "if found.term != entry.term:", "if False:"),
    ),
    _mutant(
        "answers to the process before taken for ours",
        ("dengine.node.forwarding", "self._next_id = boot", "self._next_id = 0"),
    ),
    _mutant(
        "a Hello older than an acknowledgement taken for an old directory",
        (
            "dengine.node.admission",
            "restarted = self._boots.get(who) != theirs.boot",
            "restarted = True",
        ),
    ),
    _mutant(
        "a deletion does not look at what it deletes",
        (
            "dengine.storage.state_view",
            "sound_record(key, old, self._path, keys_only=True)",
            "pass",
        ),
    ),
    _mutant(
        "compare-and-swap without comparing",
        (
            "dengine.kv.machine",
            "(not condition.if_match or old.mod_revision in condition.if_match)",
            "True",
        ),
    ),
    _mutant(
        "the state hash depends on the node",
        (
            "dengine.kv.machine",
            "version = old.version + 1",
            "version = 1 + id(view) % 7",
        ),
    ),
)

# Not found, and so no proof of anything: hundreds of seeds pass. `make mutants` leaves them out.
NOT_CAUGHT: tuple[Mutant, ...] = (
    # What the lost name leads to, a state that is missing or old, the next start builds again from
    # the snapshot behind which the log begins; and a new log syncs the directory by itself.
    _mutant(
        "small file renamed without a sync of its directory",
        (
            "dengine.storage.directory",
            "os.replace(temporary, self.path / name)\n        sync_directory(temporary.parent)",
            "os.replace(temporary, self.path / name)",
        ),
    ),
    # It takes three leaders: one whose entry is replaced by the next, which dies before its own is
    # committed, and a third that still has the first one's and commits it. 500 seeds had none.
    _mutant(
        "a displaced write is said not to have happened",
        (
            "dengine.node.proposals",
            'still happen",\n                outcome="unknown"',
            'still happen",\n                outcome="none"',
        ),
    ),
)

BY_NAME = {mutant.name: mutant for mutant in (*MUTANTS, *NOT_CAUGHT)}


class MutantLoader(importlib.machinery.SourceFileLoader):
    """Compiles a module from its source with the edits applied; no byte code is used or left."""

    def __init__(self, name: str, path: str, edits: Sequence[Edit]) -> None:
        super().__init__(name, path)
        self._edits = edits

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path).decode()
        return compile(mutated(source, self._edits), self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(self, fullname: str, path: object, target: object = None) -> object:  # type: ignore[override]
        edits = [edit for edit in self._mutant.edits if edit.module == fullname]
        if not edits:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)  # type: ignore[arg-type]
        assert spec is not None
        assert spec.origin is not None
        spec.loader = MutantLoader(fullname, spec.origin, edits)
        return spec


def mutated(source: str, edits: Sequence[Edit]) -> str:
    """The source after all edits. Raises ValueError when one does not fit any more."""
    for edit in edits:
        if source.count(edit.old) != 1:
            raise ValueError(f"{edit.module} has {source.count(edit.old)} times {edit.old!r}")
        source = source.replace(edit.old, edit.new)
    return source


def infect(mutant: Mutant) -> None:
    """This process imports the mutant's code. Nothing of dengine may be imported yet."""
    loaded = [name for name in sys.modules if name.partition(".")[0] == "dengine"]
    assert not loaded, f"too late: {loaded}"
    sys.meta_path.insert(0, _Finder(mutant))
