"""The log without its beginning: purged little by little, or begun anew behind a snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from dengine.errors import DataCorruption, InvariantBroken
from dengine.raft.membership import Membership
from dengine.raft.types import Entry, EntryKind, HardState, LogId, MemberId
from dengine.storage.log_store import LogStore
from tests.storage.states import config, membership, put

FIRST, SECOND = membership(MemberId(1, 1)), membership(MemberId(1, 1), MemberId(2, 2))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def store(path: Path) -> Iterator[LogStore]:
    opened = LogStore(path)
    yield opened
    opened.close()


def filled(store: LogStore, last: int, second_at: int = 6) -> None:
    """Two memberships, at 1 and `second_at`; term 2 from entry 5 on."""
    entries = [config(1, FIRST)]
    for index in range(2, last + 1):
        term = 1 if index < 5 else 2
        is_config = index == second_at
        entries.append(config(index, SECOND, term) if is_config else put(index, term))
    store.save(HardState(2, MemberId(1, 1), last), entries)


def described(
    store: LogStore,
) -> tuple[int, int, int, HardState, list[tuple[int, Membership]], list[Entry]]:
    first, last = store.first_index(), store.last_index()
    entries = list(store.entries(first, last + 1, 2**30)) if last >= first else []
    hard_state, memberships = store.load()
    return first, last, store.term(first - 1), hard_state, memberships, entries


def unchanged_by_reopening(store: LogStore, path: Path) -> LogStore:
    before = described(store)
    store.close()
    again = LogStore(path)
    assert described(again) == before
    return again


@pytest.mark.parametrize(
    ("to", "memberships"),
    [
        (1, [(1, FIRST), (6, SECOND)]),
        (3, [(1, FIRST), (6, SECOND)]),
        (5, [(1, FIRST), (6, SECOND)]),
        (6, [(6, SECOND)]),
        (9, [(6, SECOND)]),
        (10, [(6, SECOND)]),
        (99, [(6, SECOND)]),
    ],
)
def test_what_is_left_after_a_purge(
    store: LogStore, path: Path, to: int, memberships: list[tuple[int, Membership]]
) -> None:
    """First index, terms, the membership that was in force there, and all the rest stay true."""
    filled(store, 10)
    whole = list(store.entries(1, 11, 2**30))
    store.purge_to = to
    assert store.purge_pending
    store.purge_step()
    end = min(to, 10)
    assert not store.purge_pending or to > 10
    assert store.first_index() == end + 1
    assert store.last_index() == 10
    assert store.term(end) == whole[end - 1].term
    with pytest.raises(InvariantBroken):
        store.term(end - 1)
    with pytest.raises(InvariantBroken):
        store.entries(end, 11, 100)
    assert store.load()[1] == memberships
    assert described(store)[5] == whole[end:]
    again = unchanged_by_reopening(store, path)
    again.save(None, [put(11, 2)])
    assert unchanged_by_reopening(again, path).last_index() == 11


def test_a_purge_takes_many_small_steps(store: LogStore, path: Path) -> None:
    """No single transaction is long, and a stop between two steps is no matter."""
    store.save(None, [config(1, FIRST), *(put(index) for index in range(2, 1001))])
    store.purge_to = 900
    steps = 0
    while store.purge_pending:
        store.purge_step()
        steps += 1
        if steps == 2:
            store = unchanged_by_reopening(store, path)
            assert 1 < store.first_index() < 901
            store.purge_to = 900
    assert steps > 2
    assert store.first_index() == 901
    unchanged_by_reopening(store, path).close()


def test_every_save_takes_a_few_old_entries_along(store: LogStore, path: Path) -> None:
    """A log under full load shrinks although nobody finds time for a step of its own."""
    filled(store, 100)
    store.purge_to = 90
    first = store.first_index()
    store.save(None, [put(101, 2)])
    assert first < store.first_index() <= 91
    for index in range(102, 140):
        store.save(None, [put(index, 2)])
    assert store.first_index() == 91
    assert store.load()[1] == [(6, SECOND)]
    unchanged_by_reopening(store, path).close()


def test_a_conflict_behind_the_purge_is_overwritten(store: LogStore, path: Path) -> None:
    """A new leader's entries replace those that were not purged, CONFIG entries too."""
    filled(store, 10, second_at=8)
    store.purge_to = 5
    store.purge_step()
    with pytest.raises(InvariantBroken):
        store.save(None, [put(5, 3)])
    store.save(HardState(3), [put(7, 3)])
    assert store.last_index() == 7
    assert store.load() == (HardState(3), [(1, FIRST)])
    unchanged_by_reopening(store, path).close()


def test_a_log_that_was_reset_goes_on_behind_its_base(store: LogStore, path: Path) -> None:
    """After an install: no entries, the snapshot's end as base, its membership in force there."""
    filled(store, 10)
    hard_state = HardState(7, None, 500)
    store.reset(hard_state, LogId(500, 6), SECOND)
    assert described(store) == (501, 500, 6, hard_state, [(500, SECOND)], [])
    again = unchanged_by_reopening(store, path)
    with pytest.raises(InvariantBroken):
        again.save(None, [put(500, 7)])
    with pytest.raises(InvariantBroken):
        again.save(None, [put(501, 5)])
    again.save(None, [put(501, 7), config(502, FIRST, 7)])
    assert again.load()[1] == [(500, SECOND), (502, FIRST)]
    again.purge_to = 502
    again.purge_step()
    assert again.load()[1] == [(502, FIRST)]
    again = unchanged_by_reopening(again, path)
    again.reset(HardState(8, None, 600), LogId(600, 8), FIRST)
    again.reset(HardState(9, None, 700), LogId(700, 9), SECOND)
    assert described(unchanged_by_reopening(again, path))[:3] == (701, 700, 9)


@pytest.mark.parametrize("how", ["missing", "changed", "later"])
def test_damage_of_the_base_is_found(store: LogStore, path: Path, how: str) -> None:
    """A log without its first membership must not vote: it does not know with whom."""
    filled(store, 10)
    store.purge_to = 7
    store.purge_step()
    if how == "later":
        store.reset(HardState(9), LogId(20, 2), FIRST)
    store.close()
    # The head names the newest transaction, so the copy of a file is changed page by page.
    with lmdb.open(str(path), readonly=True, lock=False) as environment, environment.begin() as txn:
        base = txn.get(b"c")
        assert base is not None
    content = (path / "data.mdb").read_bytes()
    wrong = {
        "missing": b"\x00" * len(base),
        "changed": base[:-1] + bytes([base[-1] ^ 1]),
        "later": (21).to_bytes(8, "little") + base[8:],
    }[how]
    (path / "data.mdb").write_bytes(content.replace(base, wrong))
    with pytest.raises(DataCorruption, match="membership at its beginning"):
        LogStore(path)


def test_purging_nothing_changes_nothing(store: LogStore, path: Path) -> None:
    """A target behind the beginning, or none at all."""
    store.purge_step()
    assert (store.first_index(), store.last_index()) == (1, 0)
    filled(store, 10)
    assert not store.purge_pending
    store.purge_to = 4
    store.purge_step()
    store.purge_to = 2
    assert not store.purge_pending
    store.purge_step()
    assert store.first_index() == 5
    assert unchanged_by_reopening(store, path).first_index() == 5


def test_kinds_survive_the_purge(store: LogStore, path: Path) -> None:
    """What is left is what was written, byte for byte."""
    kept = Entry(3, 2, EntryKind.NOOP, b"")
    store.save(None, [config(1, FIRST), put(2), kept])
    store.purge_to = 2
    store.purge_step()
    again = unchanged_by_reopening(store, path)
    assert list(again.entries(3, 4, 100)) == [kept]
    again.close()
