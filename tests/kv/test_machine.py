"""The state machine against its twin, and its totality."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dengine.kv.commands import (
    Command,
    Compare,
    Condition,
    ConditionFailed,
    Delete,
    DeleteRange,
    DeleteResult,
    Get,
    GetResult,
    Invalid,
    Operation,
    Put,
    PutResult,
    Result,
    TooMany,
    Txn,
    TxnResult,
    encode_batch,
    encode_command,
)
from dengine.kv.machine import KEY_BYTES_MAX, VALUE_BYTES_MAX, Record, apply_batch
from dengine.kv.transaction import OPERATIONS_MAX
from tests.kv.twin import DictView, Twin

# Few keys and small revisions, so that conditions, overwrites and ranges meet.
keys = st.sampled_from([b"a", b"a/", b"a/1", b"a/2", b"b", b"\x00", b"\xff", b"", b"x" * 512])
conditions = st.none() | st.builds(
    Condition,
    if_match=st.none() | st.lists(st.integers(0, 12), max_size=3).map(tuple),
    if_none_match=st.booleans(),
)
ranges = st.builds(DeleteRange, start=keys, end=st.none() | keys, limit=st.integers(-1, 4))
values = st.sampled_from([b"", b"0", b"1", b"12"])
# Mostly what a client would send: a flaw costs the whole transaction.
known = st.sampled_from([b"a", b"a/", b"a/1", b"a/2", b"b", b"\x00", b"\xff"])
some_keys = st.one_of(*[known] * 9, keys)
RELATIONS = ["=", "!=", "<", "<=", ">", ">="]
compares = st.one_of(
    st.builds(
        Compare,
        some_keys,
        st.sampled_from(["mod_revision", "version"]),
        st.sampled_from(RELATIONS),
        st.integers(0, 4),
    ),
    st.builds(Compare, some_keys, st.just("value"), st.sampled_from(RELATIONS), values),
    st.builds(
        Compare, some_keys, st.just("exists"), st.sampled_from(["=", "!=", "<"]), st.booleans()
    ),
    st.builds(Compare, known, st.just("version"), st.just("="), values | st.booleans()),
)
operations = st.one_of(
    st.builds(Put, key=some_keys, value=values),
    st.builds(Get, key=some_keys),
    st.builds(Delete, key=some_keys),
    st.builds(DeleteRange, start=known, end=st.none() | known, limit=st.integers(2, 9)),
    st.builds(Put, key=known, value=values, condition=conditions),
)
branches = st.lists(operations, max_size=6).map(tuple)
txns = st.builds(
    Txn, compare=st.lists(compares, max_size=2).map(tuple), success=branches, failure=branches
)
commands = st.one_of(
    st.builds(Put, key=keys, value=st.binary(max_size=4), condition=conditions),
    st.builds(Delete, key=keys, condition=conditions),
    ranges,
    txns,
)


def batch(*items: Command) -> bytes:
    return encode_batch([encode_command(command) for command in items])


def _known(result: Result) -> object:
    """The words of a refusal are nobody's business here."""
    return Invalid if isinstance(result, Invalid) else result


@settings(max_examples=1000)
@given(st.lists(st.lists(commands, max_size=5), max_size=8))
def test_the_machine_does_what_its_twin_does(entries: list[list[Command]]) -> None:
    """Results, revisions and every field of every record are those of a plain dict."""
    view, twin, revision = DictView(), Twin(), 0
    for entry in entries:
        revision, results = apply_batch(batch(*entry), view, revision)
        wanted = [twin.apply(command) for command in entry]
        assert [_known(r) for r in results] == [_known(r) for r in wanted]
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
    if data[:1] not in (b"\x01", b"\x02"):
        assert apply_batch(data, view, 5) == (5, [Invalid("the batch is of no known version")])


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


# --- transactions ---------------------------------------------------------------------------------


def txn(
    *success: Operation,
    compare: tuple[Compare, ...] = (),
    failure: tuple[Operation, ...] = (),
) -> Txn:
    return Txn(compare, success, failure)


def test_a_transaction_is_one_revision_and_sees_itself() -> None:
    """Money moves from one account to the other, and a later operation reads what an earlier one
    has written; all of it is one change."""
    view = DictView()
    apply_batch(batch(Put(b"a", b"5"), Put(b"b", b"0")), view, 0)
    move = txn(
        Put(b"a", b"3"),
        Put(b"b", b"2"),
        Get(b"a"),
        Delete(b"b"),
        Get(b"b"),
        Put(b"c", b"new"),
        compare=(Compare(b"a", "value", "=", b"5"),),
    )
    revision, (result,) = apply_batch(batch(move), view, 2)
    assert revision == 3
    assert result == TxnResult(
        3,
        True,
        (
            PutResult(3, False),
            PutResult(3, False),
            GetResult(3, 1, 2, b"3"),
            DeleteResult(3, 1),
            GetResult(),
            PutResult(3, True),
        ),
    )
    assert view.records == {b"a": Record(1, 3, 2, b"3"), b"c": Record(3, 3, 1, b"new")}


def test_the_other_branch_is_taken_when_one_comparison_fails() -> None:
    view = DictView()
    apply_batch(batch(Put(b"lock", b"me")), view, 0)
    absent = Compare(b"lock", "exists", "=", False)
    take = txn(Put(b"lock", b"you"), compare=(absent,), failure=(Get(b"lock"),))
    assert apply_batch(batch(take), view, 1) == (
        1,
        [TxnResult(1, False, (GetResult(1, 1, 1, b"me"),))],
    )


@pytest.mark.parametrize(
    "last",
    [
        DeleteRange(b"a", None, 2),  # the range is too large only with what was put before
        Put(b"", b""),
        Put(b"k", b"v" * (VALUE_BYTES_MAX + 1)),
        Put(b"k", b"", Condition(if_none_match=True)),
        Get(b""),
    ],
    ids=repr,
)
def test_a_transaction_that_cannot_end_changes_nothing(last: Operation) -> None:
    view = DictView()
    apply_batch(batch(Put(b"a", b"1"), Put(b"b", b"2")), view, 0)
    before = dict(view.records)
    revision, (result,) = apply_batch(
        batch(txn(Put(b"c", b""), Delete(b"a"), Put(b"a", b""), last)), view, 2
    )
    assert isinstance(result, (Invalid, TooMany))
    assert (revision, view.records) == (2, before)


def test_what_transactions_expand_to_is_bounded() -> None:
    """Comparisons, operations, keys that ranges delete, bytes that are read."""
    view = DictView()
    apply_batch(batch(*(Put(b"%d" % n, b"x" * VALUE_BYTES_MAX) for n in range(5))), view, 0)
    read = tuple(Get(b"%d" % n) for n in range(5))
    for many in (
        txn(*[Get(b"k")] * (OPERATIONS_MAX + 1)),
        txn(failure=(Get(b"k"),) * (OPERATIONS_MAX + 1)),
        txn(compare=(Compare(b"k", "version", "=", 0),) * (OPERATIONS_MAX + 1)),
        txn(*read),
    ):
        revision, (result,) = apply_batch(batch(many), view, 5)
        assert isinstance(result, Invalid)
        assert revision == 5
    ranges = txn(DeleteRange(b"0", b"2", 3), DeleteRange(b"2", b"4", 3))
    assert apply_batch(batch(ranges), view, 5) == (5, [TooMany(3)])
    assert len(view.records) == 5
    _, (result,) = apply_batch(batch(txn(*read[:4])), view, 5)
    assert isinstance(result, TxnResult)


@pytest.mark.parametrize(
    ("compare", "wanted"),
    [
        (Compare(b"k", "mod_revision", "=", 2), True),
        (Compare(b"k", "mod_revision", "<", 2), False),
        (Compare(b"k", "version", ">=", 2), True),
        (Compare(b"none", "version", "=", 0), True),
        (Compare(b"none", "mod_revision", "<=", 0), True),
        (Compare(b"k", "value", ">", b"aa"), True),
        (Compare(b"none", "value", "!=", b"x"), False),
        (Compare(b"k", "exists", "!=", False), True),
        (Compare(b"none", "exists", "=", True), False),
    ],
    ids=repr,
)
def test_comparisons(compare: Compare, wanted: bool) -> None:
    """A key that is not there has revision and version 0, and no value to compare."""
    view = DictView()
    apply_batch(batch(Put(b"k", b"a"), Put(b"k", b"b")), view, 0)
    _, (result,) = apply_batch(batch(txn(compare=(compare,))), view, 2)
    assert isinstance(result, TxnResult)
    assert result.succeeded is wanted
