"""The state hash: equal for equal content, and a changed record is always noticed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from zlib import crc32

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dengine.errors import DataCorruption
from dengine.kv.commands import Command, Delete, DeleteRange, Put
from dengine.raft.types import Entry, MemberId
from dengine.storage.environment import pack_crc
from dengine.storage.state_reader import check_state
from dengine.storage.state_records import sum_bytes
from dengine.storage.state_store import DIGEST_EVERY, StateStore
from tests.storage.states import commands, config, membership, put

FIRST = config(1, membership(MemberId(1, 1)))
keys = st.sampled_from([b"a", b"aa", b"b", b"\x00", b"x" * 511])
operations = st.one_of(
    st.builds(Put, key=keys, value=st.binary(max_size=5)),
    st.builds(Delete, key=keys),
    st.builds(DeleteRange, start=keys, end=st.none() | keys, limit=st.just(100)),
)


@contextmanager
def applied(path: Path, batches: Sequence[Sequence[Entry]]) -> Iterator[StateStore]:
    with closing(StateStore(path)) as state:
        for batch in batches:
            state.apply(batch)
        yield state


@settings(max_examples=60)
@given(st.lists(operations, max_size=12), st.integers(1, 5))
def test_it_is_that_of_the_records_however_they_were_applied(
    made: list[Command], size: int
) -> None:
    """Two members with equal logs agree, in whatever batches they applied; so does a recount."""
    entries = [FIRST, *(commands(index, each) for index, each in enumerate(made, 2))]
    batches = [entries[n : n + size] for n in range(0, len(entries), size)]
    with (
        TemporaryDirectory() as directory,
        applied(Path(directory) / "one", [entries]) as one,
        applied(Path(directory) / "other", batches) as other,
    ):
        digest = one.digest
        assert digest == other.digest
        one.close()
        reader = check_state(Path(directory) / "one")
        assert reader.digest == digest
        with closing(StateStore(Path(directory) / "one")) as again:
            assert again.digest == digest


@settings(max_examples=40)
@given(st.permutations([b"a", b"b", b"c"]), st.permutations([b"a", b"b", b"c"]))
def test_the_order_of_records_does_not_count(one: list[bytes], other: list[bytes]) -> None:
    """It is a sum: only which records there are matters, and taking them away gives it back."""
    sums = []
    for order in (one, other):
        with TemporaryDirectory() as directory, applied(Path(directory), [[FIRST]]) as state:
            empty = state.digest.state_hash
            state.apply([commands(2, *(Put(key, b"v") for key in one))])
            state.apply([commands(3, *(Delete(key) for key in order))])
            assert state.digest.state_hash == empty
            state.apply([commands(4, *(Put(key, b"v") for key in one))])
            sums.append(state.digest.state_hash)
            assert sums[-1] != empty
    assert sums[0] == sums[1]
    assert sum_bytes(-1) == b"\xff" * 16
    assert sum_bytes(2**128 + 5) == (5).to_bytes(16, "big")


def test_a_digest_is_kept_every_so_often(tmp_path: Path) -> None:
    """Members compare at the same entries, whatever their batches."""
    last = 2 * DIGEST_EVERY + 3
    entries = [FIRST, *(put(index) for index in range(2, last + 1))]
    with (
        applied(tmp_path / "one", [entries]) as one,
        applied(tmp_path / "other", [[entry] for entry in entries]) as other,
    ):
        digests = one.take_digests()
        assert [d.index for d in digests] == [DIGEST_EVERY, 2 * DIGEST_EVERY]
        assert other.take_digests() == digests
        assert one.take_digests() == []


@pytest.mark.parametrize("what", ["changed", "gone", "more"])
def test_a_record_that_was_not_applied_is_noticed(tmp_path: Path, what: str) -> None:
    """Records whose CRCs are right, and that are not what was applied, make no snapshot."""
    with applied(tmp_path / "s", [[FIRST, put(2), put(3)]]):
        pass
    with lmdb.open(str(tmp_path / "s"), max_dbs=4, map_size=1 << 30) as environment:
        keys = environment.open_db(b"keys", create=False)
        with environment.begin(keys, write=True) as txn:
            record = txn.get(b"k003")
            assert record is not None
            if what == "gone":
                txn.delete(b"k003")
            else:
                key = b"k003" if what == "changed" else b"k004"
                body = record[:-4].replace(b"v3", b"v4") if what == "changed" else record[:-4]
                txn.put(key, body + pack_crc(crc32(body, crc32(key))))
    with pytest.raises(DataCorruption, match="do not add up"):
        check_state(tmp_path / "s")
