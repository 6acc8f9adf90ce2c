"""The whole state on disk against a twin of dicts and lists: any sequence of commands, ticks,
restarts and snapshots gives the same answers, events and hash.

The twin knows nothing of the machine's tables. It keeps what a reader of the documentation would
keep: keys with the time at which they go, leases, the first result of each request, and a list of
all that ever happened.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory

import lmdb
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dengine.kv.commands import (
    Command,
    Compare,
    Condition,
    Delete,
    DeleteRange,
    DeleteResult,
    Effect,
    ExpiringPut,
    Get,
    GetResult,
    LeaseGrant,
    LeaseKeepAlive,
    LeaseResult,
    LeaseRevoke,
    LeaseRevoked,
    Mismatch,
    NoLease,
    Once,
    Operation,
    OperationResult,
    Put,
    PutResult,
    Result,
    Txn,
    TxnResult,
    encode_batch,
    encode_command,
)
from dengine.kv.store import Event, Record
from dengine.raft.membership import Membership, Settings
from dengine.raft.types import Entry, EntryKind, LogId, MemberId
from dengine.storage.snapshots import unpack
from dengine.storage.state_reader import check_state
from dengine.storage.state_records import DATABASES, REQUIRED
from dengine.storage.state_store import StateStore
from tests.storage.states import config, membership, snapshot_of

WINDOW_S = 20
KEPT = 12
KEYS = [b"a", b"a/1", b"b", b"x" * 511]


def content() -> Membership:
    rules = Settings(history_revisions=KEPT, idempotency_window_s=WINDOW_S)
    made = membership(MemberId(1, 1))
    return Membership(made.cluster_id, made.voters, members=made.members, settings=rules)


class Twin:
    """Every rule as it is told, none as it is carried out."""

    def __init__(self) -> None:
        self.now = 0
        self.revision = 0
        self.records: dict[bytes, Record] = {}
        self.leases: dict[str, tuple[int, int]] = {}  # TTL in s, the time of its end
        self.first: dict[tuple[str, int | None], tuple[bytes, Result]] = {}
        self.until: dict[str, int] = {}  # how long a client, or an opaque key, is remembered
        self.history: list[tuple[int, list[Event]]] = []

    def entry(self, index: int, now: int, commands: Sequence[Command]) -> list[Result]:
        self.now = max(self.now, now)
        self._expire()
        return [self._one(index, n, command) for n, command in enumerate(commands)]

    def _expire(self) -> None:
        ended = {lease for lease, (_, end) in self.leases.items() if end < self.now}
        gone: dict[bytes, Record] = {}
        for key, record in self.records.items():
            if record.lease in ended or 0 < record.expires_ms <= self.now:
                gone[key] = record
        for lease in ended:
            del self.leases[lease]
        if gone:
            self._change([Event(2, key, None, record) for key, record in gone.items()])
        for name in [name for name, end in self.until.items() if end < self.now]:
            del self.until[name]
            self.first = {k: v for k, v in self.first.items() if k[0] != name}

    def _change(self, events: list[Event]) -> None:
        self.revision += 1
        for event in events:
            if event.record is None:
                del self.records[event.key]
            else:
                self.records[event.key] = event.record
        self.history.append((self.revision, events))

    def _one(self, index: int, position: int, command: Command) -> Result:
        if not isinstance(command, Once):
            return self._do(index, position, command)
        known = self.first.get((command.key, command.number))
        if known is not None:
            if command.number is not None:
                self.until[command.key] = self.now + WINDOW_S * 1000
            return known[1] if known[0] == command.fingerprint else Mismatch()
        result = self._do(index, position, command.command)
        self.first[command.key, command.number] = (command.fingerprint, result)
        self.until[command.key] = self.now + WINDOW_S * 1000
        return result

    def _do(self, index: int, position: int, command: Effect) -> Result:
        match command:
            case LeaseGrant(ttl_s):
                lease = f"{index:x}-{position:x}-{content().cluster_id[:12]}"
                self.leases[lease] = (ttl_s, self.now + ttl_s * 1000)
                return LeaseResult(lease, ttl_s)
            case LeaseKeepAlive(lease):
                if lease not in self.leases:
                    return NoLease(lease)
                ttl_s, _ = self.leases[lease]
                self.leases[lease] = (ttl_s, self.now + ttl_s * 1000)
                return LeaseResult(lease, ttl_s)
            case LeaseRevoke(lease):
                if lease not in self.leases:
                    return NoLease(lease)
                del self.leases[lease]
                held = {k: r for k, r in sorted(self.records.items()) if r.lease == lease}
                if held:
                    self._change([Event(1, key, None, record) for key, record in held.items()])
                return LeaseRevoked(self.revision, len(held), False)
            case Txn():
                return self._txn(command)
            case Put() | ExpiringPut():
                lease = command.lease if isinstance(command, ExpiringPut) else ""
                if lease and lease not in self.leases:
                    return NoLease(lease)
                event = self._made(command, self.records.get(command.key))
                self._change([event])
                return PutResult(self.revision, event.prev is None)
            case Delete(key):
                gone = [key] if key in self.records else []
            case DeleteRange(start, end):
                gone = sorted(k for k in self.records if k >= start and (end is None or k < end))
        if gone:
            self._change([Event(1, key, None, self.records[key]) for key in gone])
        return self._deleted(len(gone))

    def _txn(self, txn: Txn) -> Result:
        """Each operation sees what those before it have done; all of it is one revision."""
        succeeded = all(self._holds(compare) for compare in txn.compare)
        view, changed = dict(self.records), False
        results: list[OperationResult] = []
        for operation in txn.success if succeeded else txn.failure:
            match operation:
                case Get(key):
                    found = view.get(key)
                    results.append(GetResult() if found is None else _shown(found))
                    continue
                case Put() | ExpiringPut():
                    lease = operation.lease if isinstance(operation, ExpiringPut) else ""
                    if lease and lease not in self.leases:
                        return NoLease(lease)
                    event = self._made(operation, view.get(operation.key))
                    assert event.record is not None
                    view[operation.key] = event.record
                    results.append(PutResult(self.revision + 1, event.prev is None))
                    changed = True
                    continue
                case Delete(key):
                    gone = [key] if key in view else []
                case DeleteRange(start, end):
                    gone = sorted(k for k in view if k >= start and (end is None or k < end))
            for key in gone:
                del view[key]
            results.append(DeleteResult(self.revision + bool(gone), len(gone)))
            changed |= bool(gone)
        if changed:
            before = self.records.copy()
            self._change(
                [
                    Event(0 if key in view else 1, key, view.get(key), before.get(key))
                    for key in sorted(before.keys() | view.keys())
                    if before.get(key) != view.get(key)
                ]
            )
        return TxnResult(self.revision, succeeded, tuple(results))

    def _holds(self, compare: Compare) -> bool:
        record = self.records.get(compare.key)
        match compare.target:
            case "exists":
                found: int | bool = record is not None
            case "version":
                found = 0 if record is None else record.version
            case _:
                found = 0 if record is None else record.mod_revision
        assert not isinstance(compare.operand, bytes)
        return {"=": found == compare.operand, ">": found > compare.operand}[compare.relation]

    def _deleted(self, count: int) -> Result:
        return DeleteResult(self.revision, count)

    def _made(self, put: Put | ExpiringPut, old: Record | None) -> Event:
        at, lease = self.revision + 1, ""
        ends = 0
        if isinstance(put, ExpiringPut):
            lease, ends = put.lease, 0 if put.lease else self.now + put.ttl_s * 1000 + 1
        created, version = (at, 1) if old is None else (old.create_revision, old.version + 1)
        return Event(0, put.key, Record(created, at, version, put.value, ends, lease), old)


def _shown(record: Record) -> GetResult:
    return GetResult(
        record.mod_revision,
        record.create_revision,
        record.version,
        record.value,
        record.expires_ms,
        record.lease,
    )


keys = st.sampled_from(KEYS)
values = st.binary(max_size=3)
ttls = st.integers(1, 15)
operations = st.one_of(
    st.builds(Put, keys, values),
    st.builds(ExpiringPut, keys, values, st.none(), ttls | st.just(0)),  # 0: by a lease
    st.builds(Delete, keys),
    st.builds(DeleteRange, keys, st.none() | st.just(b"b"), st.just(100)),
    st.builds(Get, keys),
)
compares = st.builds(
    Compare,
    keys,
    st.sampled_from(["version", "mod_revision"]),
    st.sampled_from("=>"),
    st.integers(0, 9),
) | st.builds(Compare, keys, st.just("exists"), st.just("="), st.booleans())
numbers = st.sampled_from([("c1", 1), ("c1", 2), ("c2", 1), ("some-key", None), ("other", None)])
pauses = st.sampled_from([0, 1, 700, 5_000, 5_001, 30_000])


class StateModel(RuleBasedStateMachine):
    """One state that applies entry by entry and is restarted and copied on the way, and one that
    gets the same entries in larger pieces; the twin beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.root = TemporaryDirectory()
        self.path = Path(self.root.name)
        self.copies = 0
        self.store = StateStore(self.path / "state")
        self.store.keep_changes = True
        self.behind = StateStore(self.path / "behind")
        self.twin = Twin()
        first = config(1, content())
        self.store.apply([first])
        self.waiting = [first]
        self.index, self.clock_ms = 1, 1000
        self.granted: list[str] = ["none"]

    def teardown(self) -> None:
        self.store.close()
        self.behind.close()
        self.root.cleanup()

    def _apply(self, pause_ms: int, *commands: Command) -> None:
        self.clock_ms += pause_ms
        self.index += 1
        data = encode_batch([encode_command(command) for command in commands], self.clock_ms)
        entry = Entry(self.index, 1, EntryKind.NORMAL, data)
        (results,) = self.store.apply([entry])
        self.waiting.append(entry)
        before = len(self.twin.history)
        assert results == self.twin.entry(self.index, self.clock_ms, commands)
        happened = [(r, _as_set(e)) for r, e in self.twin.history[before:]]
        assert [(r, _as_set(e)) for r, e in self.store.take_changes()] == happened
        self.granted += [r.lease for r in results if isinstance(r, LeaseResult)]

    def _lease(self, data: st.DataObject) -> str:
        lease: str = data.draw(st.sampled_from(self.granted[-3:]), "lease")
        return lease

    @rule(pause_ms=pauses, key=keys, value=values, ttl_s=ttls | st.just(0))
    def put(self, pause_ms: int, key: bytes, value: bytes, ttl_s: int) -> None:
        made = ExpiringPut(key, value, None, ttl_s) if ttl_s else Put(key, value)
        self._apply(pause_ms, made)

    @rule(pause_ms=pauses, key=keys, data=st.data())
    def attach(self, pause_ms: int, key: bytes, data: st.DataObject) -> None:
        self._apply(pause_ms, ExpiringPut(key, b"l", None, 0, self._lease(data)))

    @rule(pause_ms=pauses, key=keys)
    def delete(self, pause_ms: int, key: bytes) -> None:
        self._apply(pause_ms, Delete(key), Delete(key))

    @rule(pause_ms=pauses, start=keys)
    def delete_range(self, pause_ms: int, start: bytes) -> None:
        self._apply(pause_ms, DeleteRange(start, None, 100))

    @rule(
        pause_ms=pauses,
        compare=st.lists(compares, max_size=2),
        branches=st.tuples(*2 * [st.lists(operations, max_size=5)]),
        data=st.data(),
    )
    def txn(
        self,
        pause_ms: int,
        compare: list[Compare],
        branches: tuple[list[Operation], list[Operation]],
        data: st.DataObject,
    ) -> None:
        def attached(operation: Operation) -> Operation:
            if isinstance(operation, ExpiringPut) and not operation.ttl_s:
                return ExpiringPut(operation.key, operation.value, None, 0, self._lease(data))
            return operation

        success, failure = (tuple(map(attached, branch)) for branch in branches)
        self._apply(pause_ms, Txn(tuple(compare), success, failure))

    @rule(pause_ms=pauses, ttl_s=ttls)
    def grant(self, pause_ms: int, ttl_s: int) -> None:
        self._apply(pause_ms, LeaseGrant(ttl_s), LeaseGrant(ttl_s))

    @rule(pause_ms=pauses, data=st.data(), revoke=st.booleans())
    def keep_or_revoke(self, pause_ms: int, data: st.DataObject, revoke: bool) -> None:
        lease = self._lease(data)
        self._apply(pause_ms, LeaseRevoke(lease) if revoke else LeaseKeepAlive(lease))

    @rule(pause_ms=pauses, name=numbers, key=keys, value=values)
    def repeat(self, pause_ms: int, name: tuple[str, int | None], key: bytes, value: bytes) -> None:
        command = Put(key, value)
        digest = blake2b(encode_command(command), digest_size=16).digest()
        once = Once(*name, digest, command)
        self._apply(pause_ms, once, once)

    @rule(pause_ms=pauses)
    def tick(self, pause_ms: int) -> None:
        self._apply(pause_ms)

    @rule()
    def restart(self) -> None:
        before = (self.store.digest, self.store.totals, self.store.next_due_ms)
        self.store.close()
        self.store = StateStore(self.store.path)
        self.store.keep_changes = True
        assert (self.store.digest, self.store.totals, self.store.next_due_ms) == before

    @rule()
    def go_on_from_a_snapshot(self) -> None:
        """Taken, verified, unpacked: all that is known survives, exactly-once and leases too."""
        digest, old = self.store.digest, self.store.path
        self.store.close()  # one process opens an environment once
        self.copies += 1
        info = snapshot_of(old, self.path / "snapshots")
        target = self.path / f"state-{self.copies}"
        unpack(info.path, target, lambda done, total: None)
        self.store = StateStore(target)
        self.store.keep_changes = True
        assert self.store.digest == digest

    @rule()
    def catch_up(self) -> None:
        """Another member applies the same entries all at once and has the same state."""
        self.behind.apply(self.waiting)
        self.waiting = []
        assert self.behind.digest == self.store.digest

    @invariant()
    def holds_what_the_twin_holds(self) -> None:
        store, twin = self.store, self.twin
        assert store.revision == twin.revision
        assert dict(store.page(b"", None, 100, False).items) == twin.records
        # The changes of an entry go together: so some more are kept than are asked for.
        kept = [(r, _as_set(e)) for r, e in store.history(0, 1000, 2**20)[0]]
        happened = [(r, _as_set(e)) for r, e in twin.history]
        assert kept == happened[len(happened) - len(kept) :]
        assert min(KEPT, len(happened)) <= len(kept) <= KEPT + 2
        assert store.totals is None or store.totals.history_first == twin.revision + 1 - len(kept)
        for lease in self.granted:
            found = store.lease(lease)
            assert (found is not None) == (lease in twin.leases)
            held = sorted(k for k, record in twin.records.items() if record.lease == lease)
            assert sorted(store.attached(lease, 100)) == held
        dues = [r.expires_ms for r in twin.records.values() if r.expires_ms]
        dues += [end + 1 for _, end in twin.leases.values()]
        if dues:
            assert store.next_due_ms is not None
            assert store.next_due_ms <= min(dues)

    @invariant()
    def adds_up(self) -> None:
        if self.index % 5 == 0:
            digest, path = self.store.digest, self.store.path
            self.store.close()
            assert check_state(path).digest == digest
            self.store = StateStore(path)
            self.store.keep_changes = True


def _as_set(events: Sequence[Event]) -> list[Event]:
    """Keys that go at the same moment go in some order, which the twin does not know."""
    return sorted(events, key=lambda event: event.key)


TestStateModel = StateModel.TestCase
TestStateModel.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)

_PROGRAM = """
import sys
from pathlib import Path
from tests.storage.test_state_model import scripted
print(scripted(Path(sys.argv[1]), int(sys.argv[2])))
"""


def scripted(path: Path, seed: int) -> str:
    """The hash after each of 150 entries of everything, as a text."""
    rng = random.Random(seed)
    store, clock_ms = StateStore(path), 1000
    store.apply([config(1, content())])
    leases, hashes = ["none"], []
    for index in range(2, 152):
        clock_ms += rng.choice([0, 10, 3000])
        commands = [_random_command(rng, leases) for _ in range(rng.randint(0, 6))]
        data = encode_batch([encode_command(command) for command in commands], clock_ms)
        (results,) = store.apply([Entry(index, 1, EntryKind.NORMAL, data)])
        leases += [r.lease for r in results if isinstance(r, LeaseResult)]
        hashes.append(store.digest.state_hash.hex())
    store.close()
    return " ".join(hashes)


def _random_command(rng: random.Random, leases: list[str]) -> Command:
    key = rng.choice(KEYS) + bytes([rng.randrange(5)]) if rng.random() < 0.5 else b"k"
    key = key[-511:]
    lease = rng.choice(leases[-3:])
    effect: Effect = rng.choice(
        [
            Put(key, rng.randbytes(4)),
            ExpiringPut(key, b"", None, rng.randint(1, 20)),
            ExpiringPut(key, b"", None, 0, lease),
            Delete(key),
            DeleteRange(key, None, 100),
            Txn((), (Put(key, b"1"), ExpiringPut(key, b"2", None, 5)), ()),
            Txn(
                (Compare(key, "exists", "=", True),),
                (Get(key), DeleteRange(key, None, 100), ExpiringPut(key, b"3", None, 0, lease)),
                (ExpiringPut(key, b"4", None, 9), Delete(b"k"), Put(b"k", b"5")),
            ),
            Put(key, b"", Condition((3,))),
            LeaseGrant(rng.randint(1, 20)),
            LeaseKeepAlive(lease),
            LeaseRevoke(lease),
        ]
    )
    if rng.random() < 0.4:
        client = rng.choice(["c1", "c2", ""])
        number = rng.randint(1, 9)
        name = (client, number) if client else (f"opaque-{number}", None)
        return Once(*name, b"f" * 16, effect)
    return effect


# Of the script with seed 7. Members of two releases apply the same entries: what differs needs a
# new COMMAND_VERSION, also where it is only a sentence that exactly-once remembers.
HASH = "2c79a898d4dbaed45247d84aa1be2c78"


def test_replicas_with_other_hash_seeds_agree_at_every_index(tmp_path: Path) -> None:
    """Nothing rests on the order of a set or a dict of hashes: processes that hash differently
    have the same state after each entry."""
    hashes = set()
    for seed in ("0", "1", "4711"):
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(tmp_path / seed), "7"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).resolve().parents[2],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        )
        hashes.add(done.stdout)
    assert len(hashes) == 1
    found = next(iter(hashes)).split()
    assert len(found) == 150
    assert found[-1] == HASH, "what entries of this version do has changed: members would differ"


# --- from the release before ----------------------------------------------------------------------


def _old_state(path: Path) -> str:
    """A state as the release before made it: two databases. Returns its hash."""
    store = StateStore(path)
    store.apply([config(1, content())])
    data = encode_batch([encode_command(Put(b"k%d" % n, b"v")) for n in range(20)])
    store.apply([Entry(2, 1, EntryKind.NORMAL, data)])
    store.sync()
    state_hash = store.digest.state_hash.hex()
    store.close()
    with lmdb.open(str(path), max_dbs=16, map_size=1 << 30) as environment:
        for name in DATABASES:
            if name not in REQUIRED:
                database = environment.open_db(name)
                with environment.begin(write=True) as txn:
                    txn.drop(database)
    return state_hash


# What the release before computed for exactly this content.
OLD_HASH = "94dbc4f6d8e9a9a920db3bad8eb47eb9"


def test_a_state_of_the_release_before_opens_with_the_same_hash(tmp_path: Path) -> None:
    """Members of both releases compare their states while one after the other is upgraded."""
    assert _old_state(tmp_path / "state") == OLD_HASH
    assert check_state(tmp_path / "state").digest.state_hash.hex() == OLD_HASH
    snapshot = snapshot_of(tmp_path / "state", tmp_path / "snapshots")  # of what is still unchanged
    assert snapshot.header.state_hash.hex() == OLD_HASH
    store = StateStore(tmp_path / "state")
    assert store.totals is None
    assert store.digest.state_hash.hex() == OLD_HASH
    data = encode_batch([encode_command(ExpiringPut(b"k1", b"w", None, 5))], 10)
    store.apply([Entry(3, 1, EntryKind.NORMAL, data)])
    assert [revision for revision, _ in store.history(0, 10, 2**20)[0]] == [21]
    assert store.totals is not None
    assert store.totals.history_first == 21  # what came before is not in any history
    digest = store.digest
    store.close()
    assert check_state(tmp_path / "state").digest == digest


def test_databases_that_a_release_before_left_out_are_made_durably(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a state that was installed just now, the mark of the install vouches for what is there."""
    synced: list[Path] = []
    monkeypatch.setattr(StateStore, "sync", lambda store: synced.append(store.path))
    _old_state(tmp_path / "state")
    synced.clear()
    StateStore(tmp_path / "state").close()
    assert synced == [tmp_path / "state"]
    StateStore(tmp_path / "state").close()
    assert synced == [tmp_path / "state"]


def test_a_restored_cluster_begins_with_an_empty_history(tmp_path: Path) -> None:
    """Whoever followed the old cluster further than the snapshot goes has seen changes that were
    never made here: resuming anywhere before the new revision is refused as compacted."""
    store = StateStore(tmp_path / "state")
    store.apply([config(1, content())])
    once = Once("c", 1, b"f" * 16, Put(b"k", b"v"))
    data = encode_batch([encode_command(once), encode_command(LeaseGrant(60))], 500)
    ((_, granted),) = store.apply([Entry(2, 1, EntryKind.NORMAL, data)])
    other = membership(MemberId(1, 9), cluster_id="new cluster")
    store.found_anew(other, 1_000_001)
    assert store.history(0, 10, 2**20) == ([], 0)
    assert store.totals is not None
    assert store.totals.history_first == 1_000_002
    digest = store.digest
    store.close()
    assert check_state(tmp_path / "state").digest == digest
    store = StateStore(tmp_path / "state")
    data = encode_batch([encode_command(once), encode_command(LeaseGrant(60))], 900)
    ((again, new),) = store.apply([Entry(3, 1, EntryKind.NORMAL, data)])
    assert again == PutResult(1, True)
    assert isinstance(granted, LeaseResult)
    assert isinstance(new, LeaseResult)
    assert granted.lease != new.lease
    assert store.lease(granted.lease) is not None
    assert store.applied == LogId(3, 1)
    store.close()
