"""The bytes of commands and results."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dengine.kv.commands import (
    BATCH_VERSION,
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
    Put,
    PutResult,
    Result,
    TooMany,
    Txn,
    TxnResult,
    decode_batch,
    decode_result,
    encode_batch,
    encode_command,
    encode_result,
    prefix_end,
)

COMMANDS: list[Command] = [
    Put(b"k", b"v"),
    Put(b"\x00\xff", b"", Condition(if_none_match=True)),
    Delete(b"k", Condition(if_match=())),
    Delete(b"k", Condition(if_match=(1, 2**63))),
    DeleteRange(b"", None, 10),
    DeleteRange(b"a", b"b", 0),
    Txn((), (), ()),
    Txn(
        (
            Compare(b"k", "version", ">=", 2),
            Compare(b"\xff", "value", "=", b"v"),
            Compare(b"k", "exists", "!=", True),
        ),
        (Put(b"k", b"v"), Get(b"k"), Delete(b"k"), DeleteRange(b"a", None, 9)),
        (Get(b"k"),),
    ),
]
RESULTS: list[Result] = [
    PutResult(7, True),
    DeleteResult(7, 3),
    ConditionFailed(None),
    ConditionFailed(9),
    TooMany(10),
    Invalid("no"),
    TxnResult(7, False, (PutResult(7, True), GetResult(), GetResult(1, 2, 3, b"v"))),
]


def test_commands_come_back_from_a_batch_in_order() -> None:
    """What clients asked for is what every node applies, in the order of the entry."""
    data = encode_batch([encode_command(command) for command in COMMANDS])
    assert data[0] == BATCH_VERSION
    assert decode_batch(data) == COMMANDS


@pytest.mark.parametrize("result", RESULTS, ids=repr)
def test_a_result_survives_the_way_between_nodes(result: Result) -> None:
    """A client of a follower gets the very answer that the leader computed."""
    assert decode_result(encode_result(result)) == result


def test_an_unreadable_command_costs_only_itself() -> None:
    """One client's broken command neither stops nor shifts the others of the same entry."""
    good = encode_command(Put(b"k", b"v"))
    for bad in (b"", b"\xc1", good + b"x", good[:-1], b"\x91" * 100_000):
        first, second, third = decode_batch(encode_batch([good, bad, good]))
        assert first == third == Put(b"k", b"v")
        assert isinstance(second, Invalid)


def test_a_field_this_build_does_not_know_is_refused() -> None:
    """A newer command is never applied in part: its unknown field could change what it means."""
    newer = msgspec.msgpack.encode(["p", b"k", b"v", None, 60])
    (command,) = decode_batch(encode_batch([newer]))
    assert isinstance(command, Invalid)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_decode_to_something(data: bytes, versioned: bool) -> None:
    """No entry, however damaged or foreign, can raise in apply."""
    data = bytes([BATCH_VERSION]) * versioned + data
    assert decode_batch(data) == decode_batch(data)


def test_an_absurd_array_header_is_refused_without_allocating() -> None:
    """Five bytes that promise four billion commands are one invalid batch."""
    for header in (b"\xdd\xff\xff\xff\xff", b"\xdc\xff\xff", b"\x9f"):
        assert decode_batch(b"\x01" + header) == [Invalid("the batch cannot be read")]


@given(st.binary(max_size=6), st.binary(max_size=6))
def test_prefix_end_separates_exactly(prefix: bytes, key: bytes) -> None:
    """`prefix <= key < prefix_end(prefix)` holds for the keys with that prefix and for no other."""
    end = prefix_end(prefix)
    assert (prefix <= key and (end is None or key < end)) == key.startswith(prefix)
