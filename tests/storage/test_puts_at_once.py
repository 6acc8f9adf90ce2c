"""A transaction that only puts is carried out all at once; nobody can tell but by a clock."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dengine.errors import DataCorruption
from dengine.kv import recorder
from dengine.kv.commands import (
    Command,
    Deferred,
    ExpiringPut,
    Get,
    GetResult,
    LeaseGrant,
    LeaseResult,
    Put,
    Result,
    TooMuch,
    Txn,
    TxnResult,
    encode_batch,
    encode_command,
)
from dengine.kv.store import Change
from dengine.raft.types import Entry, EntryKind, MemberId
from dengine.storage.state_reader import check_state
from dengine.storage.state_store import StateStore
from tests.storage.states import config, membership

FIRST = config(1, membership(MemberId(1, 1)))
KEYS = [b"a", b"a/1", b"b", b"c", b"x" * 511]
puts = st.lists(st.builds(Put, st.sampled_from(KEYS), st.binary(max_size=9)), max_size=6)
lives = st.sampled_from(["stays", "expires", "leased"])


def entry(index: int, *commands: Command) -> Entry:
    data = encode_batch([encode_command(c) for c in commands], 1_000 + index)
    return Entry(index, 1, EntryKind.NORMAL, data)


def lived(path: Path, before: list[tuple[bytes, str]], txns: list[Txn]) -> tuple[object, ...]:
    """Put `before`, each for its kind of life, then carry out `txns`, two to an entry."""
    with closing(StateStore(path)) as state:
        state.keep_changes = True
        _, (granted,) = state.apply([FIRST, entry(2, LeaseGrant(60))])
        assert isinstance(granted, LeaseResult)
        options = {"stays": (0, ""), "expires": (9, ""), "leased": (0, granted.lease)}
        for key, life in before:
            ttl_s, lease = options[life]
            first = ExpiringPut(key, b"old", None, ttl_s, lease) if ttl_s or lease else None
            state.apply([entry(state.applied.index + 1, first or Put(key, b"old"))])
        results: list[Result] = []
        for n in range(0, len(txns), 2):
            results += state.apply([entry(state.applied.index + 1, *txns[n : n + 2])])[0]
        changes: list[Change] = state.take_changes()
        held, due_ms = state.attached(granted.lease, 100), state.next_due_ms
        digest, totals = state.digest, state.totals
    assert check_state(path).digest == digest
    return [_puts_of(r) for r in results], changes, held, due_ms, digest, totals


def _puts_of(result: Result) -> object:
    """Without what the reads have come to."""
    if not isinstance(result, TxnResult):
        return result
    return result.revision, [r for r in result.results if not isinstance(r, GetResult)]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KEYS), lives), max_size=5), st.lists(puts, max_size=4))
def test_it_comes_to_what_its_puts_come_to_one_by_one(
    before: list[tuple[bytes, str]], branches: list[list[Put]]
) -> None:
    """One by one is how they are carried out beside an operation that reads."""
    alone = [Txn((), tuple(branch), ()) for branch in branches]
    beside = [Txn((), (*branch, Get(b"none")), ()) for branch in branches]
    with TemporaryDirectory() as directory:
        one, other = Path(directory) / "one", Path(directory) / "other"
        assert lived(one, before, alone) == lived(other, before, beside)


def test_old_values_that_are_too_many_bytes_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the commands that follow in the entry still have their turn, or have it later."""
    monkeypatch.setattr(recorder, "WORK_BYTES_MAX", 30)
    with closing(StateStore(tmp_path)) as state:
        state.apply([entry(1, *(Put(key, b"v" * 16) for key in KEYS))])
        both = [Txn((), tuple(Put(k, b"new") for k in KEYS[:n]), ()) for n in (2, 1)]
        results = state.apply([entry(2, both[0], Put(b"z", b""))])[0]
        assert [type(r) for r in results] == [TooMuch, Deferred]
        (done,) = state.apply([entry(3, both[1])])[0]
        assert isinstance(done, TxnResult)
        found = [state.get(key) for key in KEYS[:2]]
        assert [r and r.value for r in found] == [b"new", b"v" * 16]


def test_rot_under_one_of_its_keys_is_found(tmp_path: Path) -> None:
    with closing(StateStore(tmp_path)) as state:
        state.apply([entry(1, Put(b"a", b"old"), Put(b"b", b"old"))])
    with closing(lmdb.open(str(tmp_path), max_dbs=16)) as environment:
        keys = environment.open_db(b"keys")
        with environment.begin(keys, write=True) as txn:
            raw = txn.get(b"b")
            assert raw is not None
            txn.put(b"b", raw[:-1] + bytes([raw[-1] ^ 1]))
    with closing(StateStore(tmp_path)) as state:
        both = Txn((), (Put(b"a", b"new"), Put(b"b", b"new")), ())
        with pytest.raises(DataCorruption, match="fails its CRC"):
            state.apply([entry(2, both)])
