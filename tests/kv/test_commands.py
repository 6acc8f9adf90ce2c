"""The bytes of commands and results."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dengine.kv.commands import (
    COMMAND_VERSION,
    Command,
    Compare,
    Condition,
    ConditionFailed,
    Deferred,
    Delete,
    DeleteRange,
    DeleteResult,
    ExpiringPut,
    Full,
    Get,
    GetResult,
    Invalid,
    LeaseGrant,
    LeaseKeepAlive,
    LeaseResult,
    LeaseRevoke,
    LeaseRevoked,
    Mismatch,
    NoLease,
    Once,
    Put,
    PutResult,
    Result,
    Stale,
    TooMany,
    TooMuch,
    Txn,
    TxnResult,
    batch_clock_ms,
    batch_version,
    decode_batch,
    decode_command,
    decode_result,
    encode_batch,
    encode_command,
    encode_result,
    makes_room,
    needs_version_2,
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
NEW: list[Command] = [  # unknown to version 1
    ExpiringPut(b"k", b"v", None, 60),
    ExpiringPut(b"k", b"v", Condition(if_match=(3,)), 0, "1f-0-abc"),
    LeaseGrant(60),
    LeaseKeepAlive("1f-0-abc"),
    LeaseRevoke("1f-0-abc"),
    Txn((), (ExpiringPut(b"k", b"v", None, 60),), ()),
    Once("client", 7, b"f" * 16, Put(b"k", b"v")),
    Once("anything", None, b"f" * 16, Txn((), (Put(b"k", b"v"),), ())),
]
RESULTS: list[Result] = [
    PutResult(7, True),
    DeleteResult(7, 3),
    ConditionFailed(None),
    ConditionFailed(9),
    TooMany(10),
    Invalid("no"),
    TxnResult(7, False, (PutResult(7, True), GetResult(), GetResult(1, 2, 3, b"v"))),
    LeaseResult("1f-0-abc", 60),
    LeaseRevoked(9, 3, True),
    TooMuch(10, 20),
    NoLease("x"),
    Deferred(),
    Stale(4),
    Mismatch(),
    Full("clients"),
]


def test_commands_come_back_from_a_batch_in_order() -> None:
    """What clients asked for is what every node applies, in the order of the entry."""
    data = encode_batch([encode_command(command) for command in COMMANDS + NEW], 123)
    assert (batch_version(data), batch_clock_ms(data)) == (COMMAND_VERSION, 123)
    assert decode_batch(data) == COMMANDS + NEW


def test_version_1_means_what_it_meant() -> None:
    """An entry that members of the release before apply too: what that release could not read is
    unreadable here as well, or the members' states would differ."""
    data = encode_batch([encode_command(command) for command in COMMANDS + NEW])
    assert (batch_version(data), batch_clock_ms(data)) == (1, None)
    assert decode_batch(data) == COMMANDS + [Invalid("the command cannot be read")] * len(NEW)
    assert [needs_version_2(c) for c in COMMANDS + NEW] == [False] * len(COMMANDS) + [True] * 8


def test_what_version_1_knew_has_the_same_bytes() -> None:
    """A member that runs the release before can pass them on, whoever made them."""
    assert encode_command(Put(b"k", b"v")) == msgspec.msgpack.encode(["p", b"k", b"v", None])
    assert encode_batch([b"x"]) == b"\x01" + msgspec.msgpack.encode([b"x"])


def test_one_command_can_be_looked_at() -> None:
    for command in COMMANDS + NEW:
        assert decode_command(encode_command(command)) == command
    assert decode_command(b"\xc1") is None


def test_what_makes_room_on_a_full_disk() -> None:
    """Deletions and leases; a value stays out, however it comes."""
    stays_out = [c for c in COMMANDS + NEW if not makes_room(c)]
    kinds = [c.command if isinstance(c, Once) else c for c in stays_out]
    assert all(isinstance(c, Put | ExpiringPut | Txn) for c in kinds)
    assert makes_room(Once("c", 1, b"", Delete(b"k")))
    assert makes_room(LeaseKeepAlive("x"))
    assert not makes_room(Txn((), (Delete(b"k"),), (Put(b"k", b""),)))


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
    data = bytes([COMMAND_VERSION]) * versioned + data
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
