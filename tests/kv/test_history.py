"""The history of changes, and what one entry may do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dengine.kv import recorder
from dengine.kv.commands import (
    Compare,
    Deferred,
    Delete,
    DeleteRange,
    DeleteResult,
    Put,
    PutResult,
    TooMany,
    TooMuch,
    Txn,
    TxnResult,
)
from dengine.kv.store import Event, Record, Rules, decode_changes
from tests.kv.twin import DictView
from tests.kv.world import World

MIB = 1024 * 1024
TOO_MUCH = TooMuch(recorder.WORK_BYTES_MAX, recorder.COMMAND_KEYS_MAX)


def history(world: World) -> dict[int, list[Event]]:
    rows = world.view.tables["history"]
    return {revision: events for key in rows for revision, events in decode_changes(rows[key])}


def test_each_revision_has_its_events_with_what_was_before() -> None:
    world = World()
    world.entry(Put(b"a", b"1"), Put(b"a", b"2"), Delete(b"a"))
    one, two = Record(1, 1, 1, b"1"), Record(1, 2, 2, b"2")
    assert history(world) == {
        1: [Event(0, b"a", one, None)],
        2: [Event(0, b"a", two, one)],
        3: [Event(1, b"a", None, two)],
    }
    assert dict(world.view.changes) == history(world)


def test_whether_a_put_made_its_key() -> None:
    """Also where the transaction has put it twice, or has deleted it before: it is another one."""
    world = World()
    world.one(Txn((), (Put(b"k", b"1"), Put(b"k", b"2")), ()))
    world.entry(Put(b"k", b"3"), Delete(b"k"), Put(b"k", b"4"))
    world.one(Txn((), (Delete(b"k"), Put(b"k", b"5")), ()))
    created = [event.created for events in history(world).values() for event in events]
    assert created == [True, False, False, True, True]


def test_a_transaction_is_one_revision_of_the_history() -> None:
    """Also one whose operations undo each other: it has a revision, and so a record, which is
    empty."""
    world = World()
    world.one(Txn((), (Put(b"a", b""), Put(b"b", b"")), ()))
    world.one(Txn((), (Put(b"x", b""), Delete(b"x")), ()))
    assert [(r, [e.key for e in events]) for r, events in history(world).items()] == [
        (1, [b"a", b"b"]),
        (2, []),
    ]


@pytest.mark.parametrize("rules", [Rules(history_revisions=3), Rules(history_bytes=60)])
def test_it_is_pruned_by_number_and_by_size(rules: Rules) -> None:
    """Oldest first, with the entry that adds; and the totals say what is left."""
    world = World(rules)
    for n in range(10):
        world.one(Put(b"k%d" % n, b"v"))
    kept, totals = history(world), world.view.totals
    assert totals is not None
    assert totals.history_first == min(kept)
    assert list(kept) == list(range(min(kept), 11))
    assert totals.history_bytes == sum(len(d) for d in world.view.tables["history"].values())
    assert len(kept) == 3 or totals.history_bytes <= 60 < totals.history_bytes * 2


def test_no_history_at_all_is_possible() -> None:
    world = World(Rules(history_revisions=0))
    world.one(Put(b"k", b"v"))
    assert history(world) == {}
    assert [revision for revision, _ in world.view.changes] == [1]  # watchers hear of it still


def test_a_smaller_history_is_reached_little_by_little() -> None:
    """Someone lowers the setting: no entry deletes everything at once."""
    world = World()
    for _ in range(600):
        world.one(Put(b"k", b"v"))
    world.rules = Rules(history_revisions=1)
    world.entry()
    assert len(history(world)) == 600 - recorder.PRUNED_MAX
    for _ in range(2):
        world.entry()
    assert len(history(world)) == 1


def test_a_smaller_history_of_large_values_is_reached_little_by_little() -> None:
    """256 records may be gigabytes. But no more is added with an entry than goes with it."""
    world = World()
    for n in range(40):
        world.one(Put(b"%d" % n, b"v" * MIB))
    world.rules = Rules(history_revisions=1)
    world.entry()
    assert len(history(world)) == 40 - recorder.PRUNED_BYTES_MAX // MIB
    world.entry(*(Put(b"new%d" % n, b"v" * MIB) for n in range(4)))
    assert len(world.view.tables["history"]) == 40 - 16 - 20 + 1
    world.entry()
    assert list(history(world)) == [41, 42, 43, 44]


def test_the_changes_of_an_entry_are_kept_and_go_together() -> None:
    """One record for each entry; so up to an entry's changes more are kept than are asked for."""
    world = World(Rules(history_revisions=5))
    for _ in range(6):
        world.entry(*(Put(b"k", b"v") for _ in range(4)))
    assert list(history(world)) == list(range(17, 25))
    assert len(world.view.tables["history"]) == 2
    assert world.view.totals is not None
    assert world.view.totals.history_first == 17


def test_small_puts_over_large_values_share_an_entry_only_up_to_a_point() -> None:
    """What they replace goes into the history: 32 of them would be 32 MiB. The rest is deferred,
    which the node that proposed them proposes again."""
    world = World()
    for n in range(32):
        world.one(Put(b"%02d" % n, b"x" * MIB))
    results = world.entry(*(Put(b"%02d" % n, b"y") for n in range(32)))
    done = recorder.WORK_BYTES_MAX // MIB
    assert [type(result) for result in results] == [PutResult] * done + [Deferred] * (32 - done)
    assert world.revision == 32 + done
    assert all(
        len(world.view.records[b"%02d" % n].value) == (1 if n < done else MIB) for n in range(32)
    )


def test_one_command_may_not_meet_more_than_an_entry() -> None:
    """Refused, with nothing changed: it would be refused for ever, so it is not deferred."""
    world = World()
    for n in range(20):
        world.one(Put(b"%02d" % n, b"x" * MIB))
    txn = Txn((), tuple(Put(b"%02d" % n, b"") for n in range(20)), ())
    for command in (DeleteRange(b"", None, 100), txn):
        assert world.one(command) == TOO_MUCH
    assert len(world.keys) == 20
    assert world.revision == 20
    assert world.one(DeleteRange(b"", b"16", 100)) == DeleteResult(21, 16)


def test_one_command_may_not_look_at_keys_for_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A range of as many keys as may be deleted at once fits, and what a transaction does besides;
    but not the same ones again and again. Comparisons count too, by their keys and their bytes."""
    count = recorder.WORK_KEYS_MAX
    world = World()
    for first in range(0, count, 1000):
        world.entry(*(Put(b"%05d" % n, b"") for n in range(first, first + 1000)))
    seen: list[bytes] = []
    scan = DictView.scan

    def counted(view: DictView, start: bytes, end: bytes | None) -> Iterator[bytes]:
        for key in scan(view, start, end):
            seen.append(key)
            yield key

    monkeypatch.setattr(DictView, "scan", counted)
    all_of_it = DeleteRange(b"", None, count)
    assert world.one(Txn((), (all_of_it,) * 128, ())) == TOO_MUCH
    assert len(seen) < 2 * count
    assert len(world.keys) == count
    compares = tuple(Compare(b"%05d" % n, "exists", "=", True) for n in range(1000))
    puts = tuple(Put(b"new%d" % n, b"") for n in range(1000))
    result = world.one(Txn(compares, (all_of_it, *puts), ()))
    assert isinstance(result, TxnResult)
    assert result.results[0] == DeleteResult(count + 1, count)

    for n in range(20):
        world.one(Put(b"%02d" % n, b"x" * MIB))
    large = tuple(Compare(b"%02d" % n, "version", "=", 1) for n in range(20))
    assert world.one(Txn(large, (), ())) == TOO_MUCH
    assert isinstance(world.one(Txn(large[:16], (), ())), TxnResult)


def test_keys_looked_through_count_as_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "WORK_KEYS_MAX", 50)
    world = World()
    for n in range(60):
        world.one(Put(b"%02d" % n, b""))
    look = DeleteRange(b"", None, 40)
    assert world.entry(look, look, look) == [TooMany(40), TooMany(40), Deferred()]
    assert world.one(DeleteRange(b"", None, 1000)) == TooMany(50)
    txn = Txn((), (DeleteRange(b"", b"05", 1000), DeleteRange(b"05", b"10", 1000)), ())
    result = world.one(txn)
    assert isinstance(result, TxnResult)
    assert [r.deleted for r in result.results if isinstance(r, DeleteResult)] == [5, 5]
