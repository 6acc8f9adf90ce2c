"""The state: the machine's twin on disk, read by page, count and key."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dengine.errors import ConfigError, DataCorruption, InvariantBroken
from dengine.kv.commands import (
    COMMAND_VERSION,
    Command,
    Condition,
    Delete,
    DeleteRange,
    DeleteResult,
    Invalid,
    Put,
    PutResult,
    batch_version,
    encode_batch,
    encode_command,
)
from dengine.kv.machine import Record
from dengine.kv.tables import number_key
from dengine.raft.membership import Member, found
from dengine.raft.membership import Settings as ClusterSettings
from dengine.raft.types import Entry, EntryKind, LogId, MemberId
from dengine.storage.marks import DAMAGED_MARK
from dengine.storage.state_store import PAGE_BYTES_MAX, StateStore
from tests.kv.twin import Twin

keys = st.sampled_from([b"a", b"a/", b"a/1", b"\x00", b"\xff", b"", b"x" * 511, b"x" * 512])
conditions = st.none() | st.builds(
    Condition,
    if_match=st.none() | st.lists(st.integers(0, 12), max_size=3).map(tuple),
    if_none_match=st.booleans(),
)
commands = st.one_of(
    st.builds(Put, key=keys, value=st.binary(max_size=4), condition=conditions),
    st.builds(Delete, key=keys, condition=conditions),
    st.builds(DeleteRange, start=keys, end=st.none() | keys, limit=st.integers(-1, 4)),
)


def entry(index: int, *made: Command) -> Entry:
    data = encode_batch([encode_command(command) for command in made])
    return Entry(index, 1, EntryKind.NORMAL, data)


def puts(count: int, size: int = 0) -> Sequence[Command]:
    return [Put(b"k%05d" % n, b"v" * size) for n in range(count)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state-1"


@pytest.fixture
def store(path: Path) -> Iterator[StateStore]:
    opened = StateStore(path)
    yield opened
    opened.close()


def rotted(file: Path, sound: bytes, beginning: bytes) -> None:
    """Wherever `sound` stands in the file, old pages too, it begins otherwise now."""
    content = file.read_bytes()
    with open(file, "r+b") as stream:
        for match in re.finditer(re.escape(sound), content):
            stream.seek(match.start())
            stream.write(beginning)


def reopened(store: StateStore, path: Path) -> StateStore:
    store.close()
    return StateStore(path)


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.lists(commands, max_size=4), max_size=3), max_size=5),
    st.lists(st.tuples(keys, st.none() | keys, st.integers(1, 3), st.booleans()), max_size=4),
)
def test_the_store_is_its_twin(
    applies: list[list[list[Command]]], scans: list[tuple[bytes, bytes | None, int, bool]]
) -> None:
    """Results, records, pages and counts are those of a dict, also after reopening."""
    with TemporaryDirectory() as directory:
        store, twin, index = StateStore(Path(directory) / "state"), Twin(), 0
        for batch in applies:
            entries = [entry(index + n, *made) for n, made in enumerate(batch, 1)]
            index += len(batch)
            expected = [[twin.apply(command) for command in made] for made in batch]
            assert store.apply(entries) == expected
            compare(store, twin, index, scans)
        store.close()
        store = StateStore(Path(directory) / "state")
        compare(store, twin, index, scans)
        store.close()


def compare(
    store: StateStore,
    twin: Twin,
    index: int,
    scans: list[tuple[bytes, bytes | None, int, bool]],
) -> None:
    assert (store.applied.index, store.revision) == (index, twin.revision)
    for key in (b"a", b"a/", b"a/1", b"\x00", b"\xff", b"", b"x" * 511, b"x" * 512):
        assert store.get(key) == twin.records.get(key)
    for start, end, limit, keys_only in [(b"", None, 100, False), *scans]:
        rows = [
            (key, Record(r.create_revision, r.mod_revision, r.version, b"") if keys_only else r)
            for key, r in sorted(twin.records.items())
            if key >= start and (end is None or key < end)
        ]
        page = store.page(start, end, limit, keys_only)
        assert page.items == rows[:limit]
        assert page.next == (rows[limit][0] if len(rows) > limit else None)
        assert page.revision == twin.revision
        assert list(store.count(start, end))[-1] == len(rows)


@settings(max_examples=60)
@given(
    st.lists(
        st.binary(max_size=60).filter(lambda data: batch_version(data) <= COMMAND_VERSION)
        | st.binary(max_size=60).map(lambda data: b"\x01" + data)
        | st.binary(max_size=60).map(lambda data: b"\x02" + data)
    )
)
def test_any_bytes_apply_and_give_the_same_twice(datas: list[bytes]) -> None:
    """No committed entry, whatever is in it, can stop a node or tell two nodes apart."""
    entries = [Entry(n, 1, EntryKind.NORMAL, data) for n, data in enumerate(datas, 1)]
    outcomes = []
    for _ in range(2):
        with TemporaryDirectory() as directory:
            store = StateStore(Path(directory) / "state")
            results = store.apply(entries)
            outcomes.append((results, store.revision, store.page(b"", None, 1000, False)))
            assert store.applied.index == len(datas)
            store.close()
    assert outcomes[0] == outcomes[1]


def test_every_entry_has_its_own_results(store: StateStore) -> None:
    """The node can answer each request of each entry; NOOP and CONFIG have no one to answer."""
    membership = found("c", [Member(MemberId(1, 1), "127.0.0.1:1")], ClusterSettings())
    results = store.apply(
        [
            Entry(1, 1, EntryKind.NOOP, b""),
            entry(2, Put(b"k", b"1"), Put(b"", b"")),
            Entry(3, 1, EntryKind.CONFIG, membership.encode()),
            Entry(4, 2, EntryKind.NORMAL, encode_batch([encode_command(Delete(b"k"))])),
        ]
    )
    assert results[0] == results[2] == []
    assert results[1][0] == PutResult(1, True)
    assert isinstance(results[1][1], Invalid)
    assert results[3] == [DeleteResult(2, 1)]
    assert (store.applied, store.revision, store.membership) == (LogId(4, 2), 2, membership)


def test_position_revision_and_membership_survive_reopening(store: StateStore, path: Path) -> None:
    """A restarted node goes on right after the last entry it applied."""
    membership = found("c", [Member(MemberId(1, 1), "127.0.0.1:1")], ClusterSettings())
    store.apply([entry(1, Put(b"k", b"v")), Entry(2, 1, EntryKind.CONFIG, membership.encode())])
    again = reopened(store, path)
    assert (again.applied, again.revision, again.membership) == (LogId(2, 1), 1, membership)
    assert again.get(b"k") == Record(1, 1, 1, b"v")
    again.close()


@pytest.mark.parametrize("entries", [[3], [1], [2, 4], [2, 3, 3]])
def test_entries_out_of_order_are_refused_as_a_whole(store: StateStore, entries: list[int]) -> None:
    """No entry is skipped or applied twice, and a refused call changes nothing at all."""
    store.apply([entry(1, Put(b"k", b"1"))])
    with pytest.raises(InvariantBroken):
        store.apply([entry(index, Put(b"k", b"2")) for index in entries])
    assert (store.applied, store.revision) == (LogId(1, 1), 1)
    assert store.get(b"k") == Record(1, 1, 1, b"1")
    store.apply([entry(2, Put(b"k", b"2"))])
    assert store.revision == 2


def test_a_page_ends_before_it_stalls_the_node(store: StateStore) -> None:
    """A page of large values is short, names where it goes on, and pages together are all."""
    store.apply([entry(1, *puts(12, size=1024 * 1024))])
    seen, start, pages = [], b"", 0
    while True:
        page = store.page(start, None, 1000, False)
        assert sum(len(record.value) for _, record in page.items) <= PAGE_BYTES_MAX
        seen += [key for key, _ in page.items]
        pages += 1
        if page.next is None:
            break
        start = page.next
    assert seen == [b"k%05d" % n for n in range(12)]
    assert pages > 2
    assert len(store.page(b"", None, 1000, True).items) == 12


def test_a_long_count_pauses_and_keeps_its_snapshot(store: StateStore) -> None:
    """Counting many keys lets other work in between, which does not change the count."""
    store.apply([entry(1, *puts(2500))])
    counted = []
    for total in store.count(b"k", None):
        counted.append(total)
        store.apply([entry(store.applied.index + 1, Put(b"l%d" % total, b""))])
    assert counted == [1000, 2000, 2500]
    assert list(store.count(b"", None)) == [2503]


@pytest.mark.parametrize("size", [10, 20_000])
def test_damage_in_a_record_is_found_on_read(store: StateStore, path: Path, size: int) -> None:
    """A value with a flipped bit is never served; the error names the file and the key."""
    rng = random.Random(size)
    value = rng.randbytes(size)
    store.apply([entry(1, Put(b"good", b"1"), Put(b"rotten", value))])
    file = path / "data.mdb"
    content = file.read_bytes()
    with open(file, "r+b") as stream:
        stream.seek(content.find(value) + rng.randrange(size))
        (byte,) = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 0x20]))
    assert store.get(b"good") == Record(1, 1, 1, b"1")
    for read in (
        lambda: store.get(b"rotten"),
        lambda: store.page(b"", None, 10, False),
        lambda: store.page(b"", None, 10, True),
        lambda: store.apply([entry(2, Put(b"other", b""), Put(b"rotten", b""))]),
        lambda: store.apply([entry(2, Put(b"other", b""), DeleteRange(b"r", b"s", 10))]),
    ):
        with pytest.raises(DataCorruption) as caught:
            read()
        assert caught.value.details == {"file": str(file), "key": "rotten"}
    assert store.applied.index == 1
    assert store.get(b"other") is None


def test_history_goes_on_behind_no_key_that_has_rotted(store: StateStore, path: Path) -> None:
    """A flipped bit makes the newest revision one of the far future: what comes next is not put
    before it, and it is the state that is damaged, which a restart builds again."""
    data = encode_batch([encode_command(Put(b"k", b"v"))], 1000)
    store.apply([Entry(index, 1, EntryKind.NORMAL, data) for index in range(1, 301)])
    store.sync()
    newest = number_key(store.revision)
    rotted(path / "data.mdb", newest, b"\x40")
    with pytest.raises(DataCorruption, match="does not come after all others of history"):
        store.apply([Entry(301, 1, EntryKind.NORMAL, data)])
    assert (path / DAMAGED_MARK).exists()
    assert (store.applied.index, store.revision) == (300, 300)


def test_a_membership_that_has_rotted_does_not_go_out_of_the_state_hash(
    store: StateStore, path: Path
) -> None:
    """With its damage: a state that is sound again would be found not to be what was applied."""
    membership = found("c" * 32, [Member(MemberId(1, 1), "127.0.0.1:1")], ClusterSettings())
    store.apply([Entry(1, 1, EntryKind.CONFIG, membership.encode())])
    store.sync()
    rotted(path / "data.mdb", b"c" * 32, b"C")
    with pytest.raises(DataCorruption, match="b'membership' fails its CRC"):
        store.apply([Entry(2, 1, EntryKind.CONFIG, membership.encode())])
    assert (path / DAMAGED_MARK).exists()
    assert store.applied.index == 1


def test_what_was_synced_is_in_the_file(store: StateStore, path: Path) -> None:
    """`sync` and `close` leave all that was applied."""
    store.apply([entry(1, *puts(100, size=300))])
    store.sync()
    again = reopened(store, path)
    assert len(again.page(b"", None, 1000, False).items) == 100
    again.close()


def test_an_entry_of_a_newer_release_stops_the_node_before_it(store: StateStore) -> None:
    """A node too old for an entry must not apply a part of it: it says what to do and applies
    nothing, neither that entry nor any other of its transaction."""
    store.apply([entry(1, Put(b"k", b"1"))])
    newer = Entry(3, 1, EntryKind.NORMAL, bytes([COMMAND_VERSION + 1]) + b"whatever")
    with pytest.raises(ConfigError, match="entry 3 is of command version 3") as caught:
        store.apply([entry(2, Put(b"k", b"2")), newer])
    assert caught.value.exit_code == 78
    assert store.applied == LogId(1, 1)
    assert store.get(b"k") == Record(1, 1, 1, b"1")


def test_what_is_applied_in_one_go_can_be_bounded(store: StateStore) -> None:
    """The loop has other things to do: whoever calls says after each entry whether to go on."""
    asked = iter([True, False])
    entries = [entry(index, Put(b"k", b"%d" % index)) for index in range(1, 5)]
    assert len(store.apply(entries, lambda: next(asked))) == 2
    assert store.applied == LogId(2, 1)
    store.apply(entries[2:])
    assert store.get(b"k") == Record(1, 4, 4, b"4")
