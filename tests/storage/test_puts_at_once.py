"""A transaction that only puts is carried out all at once; nobody can tell but by a clock."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dengine.errors import DataCorruption, InvariantBroken
from dengine.kv import machine, recorder
from dengine.kv.commands import (
    Command,
    Compare,
    Deferred,
    ExpiringPut,
    LeaseGrant,
    LeaseResult,
    Once,
    Put,
    Result,
    TooMuch,
    Txn,
    TxnResult,
    encode_batch,
    encode_command,
)
from dengine.kv.store import Change, Record
from dengine.raft.types import Entry, EntryKind, MemberId
from dengine.storage.state_reader import check_state
from dengine.storage.state_store import StateStore
from dengine.storage.state_view import StateView
from tests.storage.states import config, membership

FIRST = config(1, membership(MemberId(1, 1)))
KEYS = [b"a", b"a/1", b"b", b"c", b"x" * 511]
keys = st.sampled_from(KEYS)
lives = st.sampled_from(["stays", "expires", "leased"])
branches = st.lists(st.builds(Put, keys, st.binary(max_size=9)), max_size=6).map(tuple)
compares = st.builds(Compare, keys, st.just("exists"), st.just("="), st.booleans()) | st.builds(
    Compare, keys, st.just("mod_revision"), st.sampled_from(["<", ">"]), st.integers(0, 9)
)
txns = st.builds(Txn, st.lists(compares, max_size=2).map(tuple), branches, branches)
commands = txns | st.builds(Once, st.just("c"), st.integers(1, 3), st.just(b"f" * 16), txns)


def entry(index: int, *commands: Command) -> Entry:
    data = encode_batch([encode_command(c) for c in commands], 1_000 + index)
    return Entry(index, 1, EntryKind.NORMAL, data)


def lived(
    path: Path, before: list[tuple[bytes, str]], commands: list[Command]
) -> tuple[object, ...]:
    """Put `before`, each for its kind of life, then carry out `commands`, two to an entry."""
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
        for n in range(0, len(commands), 2):
            results += state.apply([entry(state.applied.index + 1, *commands[n : n + 2])])[0]
        changes: list[Change] = state.take_changes()
        held, due_ms = state.attached(granted.lease, 100), state.next_due_ms
        digest, totals = state.digest, state.totals
    assert check_state(path).digest == digest
    return results, changes, held, due_ms, digest, totals


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(keys, lives), max_size=5),
    st.lists(commands, max_size=6),
    st.sampled_from([12, recorder.WORK_BYTES_MAX]),
)
def test_it_comes_to_what_its_puts_come_to_one_by_one(
    before: list[tuple[bytes, str]], commands: list[Command], work_bytes: int
) -> None:
    """To the same results, events and bytes: members may do it in either way."""
    with pytest.MonkeyPatch.context() as patched, TemporaryDirectory() as directory:
        patched.setattr(recorder, "WORK_BYTES_MAX", work_bytes)
        at_once = lived(Path(directory) / "at once", before, commands)
        patched.setattr(machine, "_only_puts", lambda operations: {})
        assert lived(Path(directory) / "one by one", before, commands) == at_once


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


def test_keys_that_were_not_read_just_before_cannot_be_put(tmp_path: Path) -> None:
    """What was there is taken out of the state's hash, so it has to be known."""
    with closing(lmdb.open(str(tmp_path))) as environment, environment.begin(write=True) as txn:
        view = StateView(txn, {}, tmp_path, 0, None)
        view.get_many([b"a"], None)
        with pytest.raises(InvariantBroken, match="not read just before"):
            view.put_many([b"b"], [Record(1, 1, 1, b"new")])


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
