"""The log: what was saved is there, whatever happens; what was damaged is found."""

from __future__ import annotations

import random
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from dengine.errors import DataCorruption, InvariantBroken
from dengine.raft.membership import Member, Membership, Settings, found
from dengine.raft.types import Entry, EntryKind, HardState, MemberId
from dengine.storage.log_store import LogStore


def normal(index: int, term: int, data: bytes = b"") -> Entry:
    return Entry(index, term, EntryKind.NORMAL, data)


def membership(port: int) -> Membership:
    return found("c", [Member(MemberId(1, 1), f"127.0.0.1:{port}")], Settings())


def config(index: int, term: int, port: int) -> Entry:
    return Entry(index, term, EntryKind.CONFIG, membership(port).encode())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def store(path: Path) -> Iterator[LogStore]:
    opened = LogStore(path)
    yield opened
    opened.close()


def reopened(store: LogStore, path: Path) -> LogStore:
    store.close()
    return LogStore(path)


def test_a_new_log_is_empty(store: LogStore) -> None:
    """A node without a past starts at index 0, term 1, without a vote."""
    assert (store.first_index(), store.last_index(), store.term(0)) == (1, 0, 0)
    assert store.load() == (HardState(1, None, 0), [])


def test_files_are_for_the_owner_only(store: LogStore, path: Path) -> None:
    """No other user of the machine reads what is replicated."""
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}


def test_what_was_saved_is_there_after_reopening(store: LogStore, path: Path) -> None:
    """Entries, kinds, data, terms, vote and commit index survive a restart unchanged."""
    entries = [
        Entry(1, 1, EntryKind.NOOP, b""),
        config(2, 1, 1),
        normal(3, 4, b"x" * 100_000),
        normal(4, 4, bytes(range(256))),
    ]
    hard_state = HardState(4, MemberId(2**32 - 1, 2**63 - 1), 3)
    store.save(hard_state, entries)
    again = reopened(store, path)
    assert list(again.entries(1, 5, 2**40)) == entries
    assert [again.term(index) for index in range(5)] == [0, 1, 1, 4, 4]
    assert again.load() == (hard_state, [(2, membership(1))])
    again.close()


def test_hard_state_and_entries_are_saved_independently(store: LogStore, path: Path) -> None:
    """A vote without entries keeps the entries; entries without a hard state keep the vote."""
    vote = HardState(3, MemberId(2, 9), 0)
    store.save(vote, ())
    store.save(None, [normal(1, 3)])
    store.save(None, ())
    again = reopened(store, path)
    assert again.load()[0] == vote
    assert again.last_index() == 1
    again.close()


def test_a_vote_before_the_first_entry_survives(store: LogStore, path: Path) -> None:
    """A new node that has only voted remembers its vote."""
    store.save(HardState(5, MemberId(2, 9), 0), ())
    again = reopened(store, path)
    assert again.load() == (HardState(5, MemberId(2, 9), 0), [])
    assert again.last_index() == 0
    again.close()


def test_overwriting_truncates_everything_behind(store: LogStore, path: Path) -> None:
    """A new leader's entries replace a conflicting tail, its CONFIG entries included (5.3)."""
    store.save(
        None, [config(1, 1, 1), normal(2, 1), config(3, 1, 3), normal(4, 2), config(5, 2, 5)]
    )
    store.save(HardState(7), [normal(3, 6, b"new"), config(4, 7, 4)])
    for log in (store, again := reopened(store, path)):
        assert log.last_index() == 4
        assert [log.term(index) for index in range(1, 5)] == [1, 1, 6, 7]
        assert log.load() == (HardState(7), [(1, membership(1)), (4, membership(4))])
    assert again.entries(3, 9, 2**40)[0].data == b"new"
    with pytest.raises(InvariantBroken, match="1 to 4"):
        again.term(5)
    again.close()


def test_a_gap_or_a_falling_term_is_refused_and_changes_nothing(store: LogStore) -> None:
    """A mistake of the caller stops the node before it reaches the disk."""
    store.save(None, [normal(1, 2), normal(2, 2)])
    for entries in ([normal(4, 2)], [normal(0, 2)], [normal(3, 1)], [normal(3, 2), normal(5, 2)]):
        with pytest.raises(InvariantBroken):
            store.save(HardState(99), entries)
    assert store.last_index() == 2
    assert store.load()[0] == HardState()
    store.save(None, [normal(3, 2)])


def test_reads_are_cut_after_max_bytes_but_never_empty(store: LogStore) -> None:
    """A message to a follower stays small, yet an entry larger than the limit gets through."""
    store.save(None, [normal(index, 1, b"x" * 100) for index in range(1, 11)])

    def indexes(low: int, high: int, max_bytes: int) -> list[int]:
        return [entry.index for entry in store.entries(low, high, max_bytes)]

    assert indexes(1, 11, 300) == [1, 2, 3]
    assert indexes(4, 11, 1) == [4]
    assert indexes(9, 99, 10_000) == [9, 10]
    with pytest.raises(InvariantBroken):
        store.entries(11, 12, 100)


def test_a_reader_never_waits_for_a_writer_and_sees_no_half_save(store: LogStore) -> None:
    """The event loop reads while the writer thread truncates and appends behind it."""
    store.save(None, [normal(index, 1, b"base") for index in range(1, 101)])
    failures: list[BaseException] = []

    def write() -> None:
        try:
            for term in range(2, 200):
                store.save(HardState(term), [normal(index, term) for index in range(101, 106)])
        except BaseException as error:
            failures.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        assert [entry.data for entry in store.entries(1, 101, 2**40)] == [b"base"] * 100
        assert store.last_index() in (100, 105)
        assert store.term(100) == 1
    writer.join(60)
    assert not failures
    assert [store.term(index) for index in range(101, 106)] == [199] * 5


def flip(file: Path, position: int, mask: int) -> None:
    with open(file, "r+b") as stream:
        stream.seek(position)
        (byte,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ mask]))


@pytest.mark.parametrize("size", [40, 3000, 20_000])
def test_damage_in_any_entry_is_found_at_start_with_its_index(path: Path, size: int) -> None:
    """One flipped bit anywhere in an entry stops the node, which names the file and the index."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    store = LogStore(path)
    entries = [normal(index, 1, rng.randbytes(size)) for index in range(1, 21)]
    for entry in entries:
        store.save(None, [entry])
    store.close()
    file = path / "data.mdb"
    for _ in range(10):
        entry = rng.choice(entries)
        # A page that LMDB has let go may hold an old copy of a small record: damage them all.
        copies, content, position = [], file.read_bytes(), -1
        while (position := content.find(entry.data, position + 1)) >= 0:
            copies.append(position)
        where, mask = rng.randrange(-9, size + 4), 1 << rng.randrange(8)
        for position in copies:
            flip(file, position + where, mask)
        with pytest.raises(DataCorruption) as caught:
            LogStore(path)
        assert caught.value.details == {"file": str(file), "index": entry.index}
        assert str(file) in caught.value.message
        assert f"entry {entry.index} " in caught.value.message
        for position in copies:
            flip(file, position + where, mask)
    LogStore(path).close()


def test_damage_while_running_is_found_on_read(store: LogStore, path: Path) -> None:
    """Bits that rot under a running node are never sent to a follower."""
    data = random.Random(1).randbytes(20_000)
    store.save(None, [normal(1, 1, b"before"), normal(2, 1, data)])
    flip(path / "data.mdb", (path / "data.mdb").read_bytes().find(data) + 10_000, 1)
    assert store.entries(1, 2, 100)[0].data == b"before"
    with pytest.raises(DataCorruption) as caught:
        store.entries(1, 3, 2**40)
    assert caught.value.details["index"] == 2


@pytest.mark.parametrize("replaced", [False, True])
def test_nothing_is_saved_behind_a_key_that_has_rotted(
    store: LogStore, path: Path, replaced: bool
) -> None:
    """LMDB puts nothing before the last key it finds. What it did not take is not acknowledged."""
    store.save(None, [normal(index, 1) for index in range(1, 4)])
    key = b"e" + (3).to_bytes(8, "big")
    for match in re.finditer(key, (path / "data.mdb").read_bytes()):
        flip(path / "data.mdb", match.start() + 1, 0x40)
    index = 3 if replaced else 4
    with pytest.raises(DataCorruption) as caught:
        store.save(None, [normal(index, 2)])
    assert caught.value.details["index"] == index
    assert store.last_index() == 3


@pytest.mark.parametrize(
    "key", [b"a", b"e" + (5).to_bytes(8, "big"), b"e" + (9).to_bytes(8, "big")]
)
def test_a_lost_record_is_damage(path: Path, key: bytes) -> None:
    """A record that is gone is not taken for one that never was, even the last or the head."""
    store = LogStore(path)
    store.save(HardState(3), [normal(index, 1) for index in range(1, 10)])
    store.close()
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as txn:
        txn.delete(key)
    with pytest.raises(DataCorruption):
        LogStore(path)


def test_an_undone_commit_is_damage(path: Path) -> None:
    """A flipped bit in LMDB's newest meta page cannot make a node forget its last vote."""
    store = LogStore(path)
    for term in range(1, 20):
        store.save(HardState(term, MemberId(1, 1), 0), ())
    store.close()
    file = path / "data.mdb"
    transaction_id = 16 + 24 + 2 * 48 + 8
    for page in (0, 1):
        for bit in range(64):
            position = page * 4096 + transaction_id + bit // 8
            flip(file, position, 1 << bit % 8)
            with pytest.raises(DataCorruption):
                LogStore(path)
            flip(file, position, 1 << bit % 8)
    again = LogStore(path)
    assert again.load()[0].term == 19
    again.close()


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.9])
def test_a_cut_off_file_is_damage_and_no_crash(path: Path, keep: float) -> None:
    """A file that lost its tail is refused with a sentence, not with SIGBUS."""
    store = LogStore(path)
    store.save(None, [normal(index, 1, b"x" * 20_000) for index in range(1, 50)])
    store.close()
    file = path / "data.mdb"
    with open(file, "r+b") as stream:
        stream.truncate(max(int(file.stat().st_size * keep), 100))
    with pytest.raises(DataCorruption):
        LogStore(path)


EVERY_PAGE = """
import sys
from pathlib import Path
from dengine.errors import DataCorruption
from dengine.storage.log_store import LogStore

file = Path(sys.argv[1]) / "data.mdb"
sound, found = file.read_bytes(), 0
for start in range(2 * 4096, len(sound), 4096):
    file.write_bytes(sound[:start] + bytes(4096) + sound[start + 4096 :])
    try:
        LogStore(file.parent).close()
    except DataCorruption:
        found += 1
    file.write_bytes(sound)
print(found)
"""


def test_a_page_of_zeros_anywhere_is_damage_and_no_crash(path: Path) -> None:
    """What a cut or a lost write leaves in the middle of the tree ends no process."""
    store = LogStore(path)
    for begin in range(1, 2000, 50):
        store.save(None, [normal(index, 1, b"x" * 100) for index in range(begin, begin + 50)])
    store.close()
    done = subprocess.run(
        [sys.executable, "-c", EVERY_PAGE, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50, "the pages in use"
