"""Mutants of everything around the protocol: disk, recovery, reads, answers, the state machine."""

from __future__ import annotations

from tests.mutants.edits import Mutant, mutant

MUTANTS: tuple[Mutant, ...] = (
    mutant(
        "failed write taken for written",
        (
            "dengine.node.cycle",
            "if error is not None:\n                raise error",
            "if error is not None:\n                pass",
        ),
    ),
    mutant(
        "fsync retried",
        (
            "dengine.node.cycle",
            "if error is not None:\n                raise error",
            "if error is not None:\n                return self._writer.submit(ready)",
        ),
        ("dengine.storage.log_store", "if self._failed:", "if False:"),
    ),
    mutant(
        "a founder may forget what it is bound to",
        (
            "dengine.node.entrance",
            "                self._directory.set_pledge(pledge.encode())\n",
            "",
        ),
    ),
    mutant(
        "reused read nonce",
        (
            "dengine.node.reads",
            "nonce = ReadNonce(self._me, self._boot, self._counter)",
            "nonce = ReadNonce(self._me, 0, self._counter % 3)",
        ),
    ),
    mutant(
        "failed read served",
        (
            "dengine.node.reads",
            "if state.index is None:\n            self._fail(batch.waiting)",
            "if state.index is None:\n            self._release(batch.waiting)",
        ),
    ),
    mutant(
        "read before its index is applied",
        ("dengine.node.reads", "elif state.index <= applied_index:", "elif True:"),
    ),
    mutant(
        "data and applied index in two transactions",
        (
            "dengine.storage.state_store",
            "                _put_applied(txn, self._meta, applied, revision, view.hash)",
            "            with self._environment.begin(write=True) as txn:\n"
            "                _put_applied(txn, self._meta, applied, revision, view.hash)",
        ),
    ),
    mutant(
        "state trusted after a power cut",
        (
            "dengine.storage.directory",
            "self._mark(RUN_MARK).partition(UNCLEAN)[0] == self._run_mark()",
            'self._mark("RUN") != ""',
        ),
    ),
    mutant(
        "marked clean without a sync",
        ("dengine.node.node", "self.state.sync()", "pass"),
    ),
    mutant(
        "small file renamed before it is synced",
        ("dengine.storage.directory", "os.fsync(fd)", "pass"),
    ),
    mutant(
        "the data directory's own name not synced",
        ("dengine.storage.environment", "for made in (path, *missing):", "for made in ():"),
    ),
    mutant(
        "purge ahead of the snapshots",
        (
            "dengine.node.snapshot_files",
            "limit = min(refs[-2].index, raft.log.applied_index - "
            "self._config.retained_log_entries)",
            "limit = raft.log.applied_index",
        ),
    ),
    mutant(
        "an interrupted install is not finished",
        ("dengine.storage.recovery", "elif directory.installing:", "elif False:"),
    ),
    mutant(
        "a transaction that compares nothing",
        (
            "dengine.kv.machine",
            "succeeded = holds(compare, view.get(compare.key))",
            "succeeded = True",
        ),
    ),
    mutant(
        "the second half of a transaction is one revision later",
        (
            "dengine.kv.machine",
            "result = _operate(operation, overlay, view, revision, deleted)",
            "result = _operate(operation, overlay, view, after, deleted)",
        ),
    ),
    mutant(
        "puts that are carried out all at once leave a revision out",
        ("dengine.kv.machine", "now = revision + 1\n", "now = revision + 2\n"),
    ),
    mutant(
        "what puts at once have replaced stays in the state's hash",
        (
            "dengine.storage.state_view",
            "self.hash -= sum([row_hash(key",
            "sum([row_hash(key",
        ),
    ),
    mutant(
        "same incarnation with a new log",
        (
            "dengine.storage.recovery",
            "        directory.reincarnate()\n",
            "",
        ),
    ),
    mutant(
        "answer to whoever stood at that index",
        ("dengine.node.proposals", "if found.term != entry.term:", "if False:"),
    ),
    mutant(
        "a Hello older than an acknowledgement taken for an old directory",
        (
            "dengine.node.admission",
            "if self._boots.get(who) == theirs.boot:",
            "if False:",
        ),
    ),
    mutant(
        "compare-and-swap without comparing",
        (
            "dengine.kv.machine",
            "(not condition.if_match or old.mod_revision in condition.if_match)",
            "True",
        ),
    ),
    mutant(
        "the state hash depends on the node",
        (
            "dengine.storage.state_view",
            'self.hash += row_hash(key, row)\n        self._key = b""',
            "self.hash += row_hash(key, row) + crc32(str(self._path).encode())\n"
            '        self._key = b""',
        ),
        by="10 state hash",
    ),
    mutant(
        "a snapshot's name not synced before the purge",
        (
            "dengine.storage.snapshot_file",
            "        try:\n            sync_directory(path.parent)\n",
            "        try:\n            pass\n",
        ),
    ),
    mutant(
        "what a newer leader replaced stays on the disk",
        (
            "dengine.storage.log_store",
            "for index in range(first, extent.last_index + 1):\n            if not txn.delete",
            "for index in range(0):\n            if not txn.delete",
        ),
    ),
    mutant(
        "answers of a batch in the wrong order",
        (
            "dengine.node.proposals",
            "zip(found.waiting, results or [None], strict=True)",
            "zip(found.waiting, reversed(results or [None]), strict=True)",
        ),
    ),
    mutant(
        "a write that ran out of time is said not to have happened",
        (
            "dengine.node.proposals",
            'in time; it may still be")',
            'in time; it may still be", outcome="none")',
        ),
    ),
    mutant(
        "a keyed write that ran out of time is said not to have happened",
        ("dengine.node.proposals", "import Deferred\n", "import Deferred, Once, decode_command\n"),
        (
            "dengine.node.proposals",
            'in time; it may still be")',
            'in time; it may still be", outcome="none" if waiting.command and '
            'isinstance(decode_command(waiting.command), Once) else "unknown")',
        ),
        by="11 outcome",
    ),
    mutant(
        "a broken stream is taken for a refusal",
        (
            "dengine.node.forwarding",
            'broke before it answered",\n                        outcome="unknown"',
            'broke before it answered",\n                        outcome="none"',
        ),
    ),
    mutant(
        "small file renamed without a sync of its directory",
        (
            "dengine.storage.directory",
            "os.replace(temporary, self.path / name)\n        sync_directory(temporary.parent)",
            "os.replace(temporary, self.path / name)",
        ),
    ),
    # It takes three leaders: one whose entry is replaced by the next, which dies before its own is
    # committed, and a third that still has the first one's and commits it.
    mutant(
        "a displaced write is said not to have happened",
        (
            "dengine.node.proposals",
            'still happen",\n                outcome="unknown"',
            'still happen",\n                outcome="none"',
        ),
    ),
)
