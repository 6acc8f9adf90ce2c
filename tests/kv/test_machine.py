"""The state machine against its twin, and its totality."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dengine.kv.commands import (
    Command,
    Condition,
    ConditionFailed,
    Delete,
    DeleteRange,
    DeleteResult,
    Invalid,
    Put,
    PutResult,
    TooMany,
    encode_batch,
    encode_command,
)
from dengine.kv.machine import KEY_BYTES_MAX, VALUE_BYTES_MAX, Record, apply_batch
from tests.kv.twin import DictView, Twin

# Few keys and small revisions, so that conditions, overwrites and ranges meet.
keys = st.sampled_from([b"a", b"a/", b"a/1", b"a/2", b"b", b"\x00", b"\xff", b"", b"x" * 512])
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


def batch(*items: Command) -> bytes:
    return encode_batch([encode_command(command) for command in items])


@settings(max_examples=400)
@given(st.lists(st.lists(commands, max_size=5), max_size=8))
def test_the_machine_does_what_its_twin_does(entries: list[list[Command]]) -> None:
    """Results, revisions and every field of every record are those of a plain dict."""
    view, twin, revision = DictView(), Twin(), 0
    for entry in entries:
        revision, results = apply_batch(batch(*entry), view, revision)
        assert results == [twin.apply(command) for command in entry]
        assert (view.records, revision) == (twin.records, twin.revision)


@given(
    st.lists(st.lists(commands, max_size=3).map(lambda entry: batch(*entry)), max_size=4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 200), st.integers(0, 255)), max_size=6),
)
def test_apply_is_total_and_repeatable_under_damage(
    entries: list[bytes], flips: list[tuple[int, int, int]]
) -> None:
    """Entries with any bytes changed never raise, and every node computes the same from them."""
    for number, position, byte in flips:
        if number < len(entries) and position < len(entries[number]):
            data = entries[number]
            entries[number] = data[:position] + bytes([byte]) + data[position + 1 :]
    outcomes = []
    for _ in range(2):
        view, revision, results = DictView(), 0, []
        for data in entries:
            revision, some = apply_batch(data, view, revision)
            results.append(some)
        outcomes.append((revision, results, view.records))
    assert outcomes[0] == outcomes[1]


def test_a_command_whose_tag_is_no_text_is_refused() -> None:
    """One flipped bit in the tag of a command makes that command invalid, not the node stop."""
    data = batch(Put(b"a", b"1"), Put(b"b", b"2"))
    damaged = data.replace(b"\xa1p", b"\xa1\x80", 1)
    revision, results = apply_batch(damaged, DictView(), 0)
    assert [type(result) for result in results] == [Invalid, PutResult]
    assert revision == 1


@given(st.binary(max_size=300))
def test_apply_is_total_for_arbitrary_bytes(data: bytes) -> None:
    """What is no batch is one `Invalid` and changes nothing; it never raises."""
    view = DictView()
    revision, _ = apply_batch(data, view, 5)
    assert revision >= 5
    if data[:1] != b"\x01":
        assert apply_batch(data, view, 5) == (5, [Invalid("the batch is not of version 1")])


def test_revision_grows_only_with_a_change() -> None:
    """A failed condition, a delete of nothing and a refused command leave the revision alone."""
    view = DictView()
    revision, results = apply_batch(
        batch(
            Put(b"k", b"1"),
            Put(b"k", b"2", Condition(if_none_match=True)),
            Delete(b"absent"),
            Delete(b"absent", Condition(if_match=())),
            DeleteRange(b"x", b"y", 10),
            DeleteRange(b"", None, 0),
            Put(b"", b""),
            Put(b"k", b"3", Condition(if_match=(1,))),
        ),
        view,
        0,
    )
    assert revision == 2
    assert results == [
        PutResult(1, True),
        ConditionFailed(1),
        DeleteResult(1, 0),
        ConditionFailed(None),
        DeleteResult(1, 0),
        TooMany(0),
        Invalid("a key has 1 to 511 bytes, this one has 0"),
        PutResult(2, False),
    ]
    assert view.records == {b"k": Record(1, 2, 2, b"3")}


def test_a_range_delete_is_one_revision() -> None:
    """Deleting many keys at once is one change, and either all of them go or none."""
    view = DictView()
    revision, _ = apply_batch(batch(*(Put(b"k%d" % n, b"") for n in range(5))), view, 0)
    assert apply_batch(batch(DeleteRange(b"k", b"l", 4)), view, revision) == (5, [TooMany(4)])
    assert len(view.records) == 5
    assert apply_batch(batch(DeleteRange(b"k1", b"l", 4)), view, revision) == (
        6,
        [DeleteResult(6, 4)],
    )
    assert list(view.records) == [b"k0"]


def test_a_key_made_again_starts_over() -> None:
    """After a delete a key has a new create_revision and version 1."""
    view = DictView()
    apply_batch(batch(Put(b"k", b""), Put(b"k", b""), Delete(b"k"), Put(b"k", b"x")), view, 0)
    assert view.records == {b"k": Record(4, 4, 1, b"x")}


@pytest.mark.parametrize("size", [KEY_BYTES_MAX, KEY_BYTES_MAX + 1])
def test_key_limit_is_checked_in_apply(size: int) -> None:
    """A key that LMDB would refuse becomes a result, not a crash of every node."""
    _, (result,) = apply_batch(batch(Put(b"k" * size, b"")), DictView(), 0)
    assert isinstance(result, Invalid) == (size > KEY_BYTES_MAX)


@pytest.mark.parametrize("size", [VALUE_BYTES_MAX, VALUE_BYTES_MAX + 1])
def test_value_limit_is_checked_in_apply(size: int) -> None:
    """One byte over 1 MiB is refused, 1 MiB is not."""
    _, (result,) = apply_batch(batch(Put(b"k", b"v" * size)), DictView(), 0)
    assert isinstance(result, Invalid) == (size > VALUE_BYTES_MAX)
