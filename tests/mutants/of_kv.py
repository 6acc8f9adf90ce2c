"""Mutants of what the log's time ends, of leases, of exactly-once, of watches, of transactions and
ranges, and of lists."""

from __future__ import annotations

from tests.mutants.edits import Mutant, mutant

MUTANTS: tuple[Mutant, ...] = (
    # --- the log's time ---------------------------------------------------------------------------
    mutant(
        "the leader's own clock for the log's time",
        (
            "dengine.node.cycle",
            "self.raft.proposal_clock_ms(self._state.clock_ms) if new",
            "boottime_ms() if new",
        ),
    ),
    mutant(
        "a register that runs ahead of its leader stays there",
        (
            "dengine.raft.log_clock",
            "(term, clock_ms) > self._heard",
            "(term > self._heard[0] or clock_ms > self.at(now_ms))",
        ),
        ("dengine.raft.log_clock", "if (log_id.term, clock_ms) >= self._heard:", "if False:"),
    ),
    mutant(
        "each register that takes over adds a millisecond",
        ("dengine.raft.log_clock", "clock_ms, now_ms + 1", "clock_ms, now_ms"),
    ),
    mutant(
        "nobody says that the time has come",
        ("dengine.node.cycle", "return now_ms >= due_ms or now_ms", "return now_ms"),
    ),
    # --- what ends --------------------------------------------------------------------------------
    mutant(
        "a millisecond early",
        ("dengine.kv.leases", "ttl_s * 1000 + 1", "ttl_s * 1000"),
    ),
    mutant(
        "what is nearly due is ended, too",
        (
            "dengine.kv.expiry",
            "if due.at_ms > now_ms:\n            break\n        start",
            "if due.at_ms > now_ms + 50:\n            break\n        start",
        ),
    ),
    mutant(
        "a new value goes with the time of the old one",
        (
            "dengine.kv.recorder",
            "self._let_go(key, old)\n        if record.expires_ms:",
            "pass\n        if record.expires_ms:",
        ),
    ),
    mutant(
        "new values that are put at once go with the time of the old ones",
        (
            "dengine.kv.recorder",
            "self._let_go(key, old)\n            made",
            "pass\n            made",
        ),
    ),
    mutant(
        "what time ends is told as a deletion",
        (
            "dengine.kv.recorder",
            "Event(EXPIRE if self.expiring else DELETE, key",
            "Event(DELETE, key",
        ),
    ),
    # --- leases -----------------------------------------------------------------------------------
    mutant(
        "a key that was there before hangs on no lease",
        (
            "dengine.kv.recorder",
            "elif record.lease:",
            "elif record.lease and old is None:",
        ),
    ),
    mutant(
        "a key that was taken from a lease goes with it",
        ("dengine.kv.recorder", "if old.lease:\n", "if False:\n"),
    ),
    mutant(
        "a lease that ends takes only one key with it",
        (
            "dengine.kv.expiry",
            "deleted += _delete(recorder, key, allowance)\n    view, totals",
            "deleted += not deleted and _delete(recorder, key, allowance)\n    view, totals",
        ),
    ),
    mutant(
        "a lease that was kept alive ends all the same",
        (
            "dengine.kv.leases",
            "    _forget_due(recorder, command.lease, lease)\n"
            "    _store(recorder, command.lease, Lease(lease.ttl_s, expires_ms(",
            "    _store(recorder, command.lease, Lease(lease.ttl_s, expires_ms(",
        ),
    ),
    # --- exactly once -----------------------------------------------------------------------------
    mutant(
        "a numbered request is carried out again",
        (
            "dengine.kv.once",
            "    if known is not None:\n        _store_client",
            "    if False:\n        _store_client",
        ),
    ),
    mutant(
        "a request under any other key is carried out again",
        ("dengine.kv.once", 'known = view.read("opaque", name)', "known = None"),
    ),
    mutant(
        "one result less is remembered",
        ("dengine.kv.once", "if client.kept >= RESULTS_MAX:", "if client.kept >= RESULTS_MAX - 1:"),
    ),
    mutant(
        "a client that goes on working is forgotten",
        ("dengine.kv.once", "if over_ms > recorder.clock_ms:", "if False:"),
    ),
    mutant(
        "results are left out of an installed snapshot",
        (
            "dengine.storage.state_store",
            "        self.close()\n        self._open(path)\n",
            "        self.close()\n        self._open(path)\n"
            "        with self._environment.begin(write=True) as txn:\n"
            '            txn.drop(self._tables["results"], delete=False)\n',
        ),
    ),
    mutant(
        "a command that was put off is answered",
        ("dengine.node.proposals", "if type(result) is Deferred and", "if False and"),
    ),
    # --- watches ----------------------------------------------------------------------------------
    mutant(
        "a watch resumes one revision late",
        (
            "dengine.node.watch_hub",
            "applied + 1 if first is None else first, prev",
            "applied + 1 if first is None else first + 1, prev",
        ),
    ),
    mutant(
        "a watch is live one revision early",
        (
            "dengine.node.watch_hub",
            "if watch.position > self._state.revision:",
            "if watch.position >= self._state.revision:",
        ),
    ),
    mutant(
        "what finds no room is lost",
        (
            "dengine.node.watch_hub",
            "                    watch.position = revision\n",
            "                    watch.position = revision + 1\n",
        ),
    ),
    mutant(
        "progress beyond what was delivered",
        (
            "dengine.node.watch_hub",
            "Progress(min(applied, watch.position - 1))",
            "Progress(applied)",
        ),
    ),
    mutant(
        "watches go on behind an installed snapshot",
        (
            "dengine.node.watch_hub",
            "watch.position = max(watch.position, self._revision + 1)",
            "watch.position = self._state.revision + 1",
        ),
    ),
    mutant(
        "a watch shows a neighbour of its prefix",
        (
            "dengine.node.watch_index",
            "return key.startswith(self.key) if self.is_prefix",
            "return key >= self.key if self.is_prefix",
        ),
    ),
    # --- transactions and ranges ------------------------------------------------------------------
    mutant(
        "a range within a transaction does not see what it has put",
        (
            "dengine.kv.transaction",
            "own = sorted(k for k in self._made if",
            "own = sorted(k for k in () if",
        ),
    ),
    mutant(
        "a range within a transaction sees what it has deleted",
        (
            "dengine.kv.transaction",
            "if key != last and self._changes.get(key, True) is not None:",
            "if key != last:",
        ),
    ),
    mutant(
        "a range counts what a transaction has put anew twice",
        ("dengine.kv.transaction", "if key != last and self", "if self"),
    ),
    mutant(
        "a deletion within a transaction only takes back what it has put",
        ("dengine.kv.transaction", "self._changes[key] = None", "self._changes.pop(key, None)"),
    ),
    mutant(
        "what a transaction has deleted is there for the rest of it",
        ("dengine.kv.transaction", "if key in self._changes:", "if self._changes.get(key):"),
    ),
    mutant(
        "a read within a transaction shows what was there before it",
        ("dengine.kv.machine", "found = overlay.get(key)", "found = recorder.get(key)"),
    ),
    mutant(
        "a deletion deletes nothing",
        (
            "dengine.kv.machine",
            "    view.delete(key)\n    return DeleteResult(revision + 1, 1)",
            "    return DeleteResult(revision + 1, 1)",
        ),
    ),
    mutant(
        "a deletion asks for no condition",
        (
            "dengine.kv.machine",
            "command.condition is not None and not _holds(command.condition, old):\n"
            "        return ConditionFailed(old.mod_revision if old else None)\n"
            "    if old is None:\n        return DeleteResult",
            "False:\n        return ConditionFailed(None)\n"
            "    if old is None:\n        return DeleteResult",
        ),
    ),
    mutant(
        "a transaction's ranges each have the whole limit",
        (
            "dengine.kv.machine",
            "recorder.keys_limit(limit) - deleted)",
            "recorder.keys_limit(limit))",
        ),
    ),
    mutant(
        "a transaction has the revision of its last operation",
        ("dengine.kv.machine", "after = max(after, result.revision)", "after = result.revision"),
    ),
    mutant(
        "a key that is made anew counts its versions on",
        (
            "dengine.kv.machine",
            "        view.put(key, Record(revision, revision, 1, value, expires_ms, lease))",
            "        view.put(key, Record(revision, revision, 2, value, expires_ms, lease))",
        ),
    ),
    mutant(
        "at most is less than",
        ("dengine.kv.transaction", '"<=": operator.le', '"<=": operator.lt'),
    ),
    mutant(
        "what is not there has any value",
        (
            "dengine.kv.transaction",
            "if record is None:\n            return False",
            "if record is None:\n            return True",
        ),
    ),
    mutant(
        "a version is compared as a revision",
        ("dengine.kv.transaction", 'if compare.target == "version"', "if False"),
    ),
    mutant(
        "the last comparison decides",
        ("dengine.kv.machine", "        if not succeeded:\n            break\n", ""),
    ),
    # --- lists ------------------------------------------------------------------------------------
    mutant(
        "a list shows its end, too",
        (
            "dengine.storage.state_store",
            "if end is not None and key >= end:",
            "if end is not None and key > end:",
        ),
    ),
    mutant(
        "a page does not say where the next one begins",
        (
            "dengine.storage.state_store",
            "return Page(items, key, self.revision)",
            "return Page(items, None, self.revision)",
        ),
    ),
    mutant(
        "a list leaves out keys with a time",
        (
            "dengine.storage.state_store",
            "items.append((key, sound_record(key, raw, self._path, keys_only)))",
            "record = sound_record(key, raw, self._path, keys_only)\n"
            "                    items += [] if record.expires_ms else [(key, record)]",
        ),
    ),
)
