"""Exactly once: the first result, for as long as it can be remembered, and never a guess."""

from __future__ import annotations

from hashlib import blake2b

import pytest

from dengine.kv import once
from dengine.kv.commands import (
    Command,
    Condition,
    ConditionFailed,
    Delete,
    Effect,
    ExpiringPut,
    Full,
    Get,
    Invalid,
    LeaseGrant,
    LeaseResult,
    Mismatch,
    Once,
    Put,
    PutResult,
    Stale,
    Txn,
    TxnResult,
    encode_command,
    encode_result,
)
from dengine.kv.store import Totals
from dengine.kv.transaction import OPERATIONS_MAX
from tests.kv.world import RULES, World

WINDOW_MS = RULES.idempotency_window_ms


def numbered(number: int, command: Effect, client: str = "c") -> Once:
    return Once(client, number, fingerprint(command), command)


def opaque(key: str, command: Effect) -> Once:
    return Once(key, None, fingerprint(command), command)


def fingerprint(command: Effect) -> bytes:
    return blake2b(encode_command(command), digest_size=16).digest()


@pytest.fixture
def world() -> World:
    return World()


def totals(world: World) -> Totals:
    assert world.view.totals is not None
    return world.view.totals


@pytest.mark.parametrize("put", [numbered(1, Put(b"k", b"1")), opaque("any", Put(b"k", b"1"))])
def test_a_repetition_gets_the_first_result(world: World, put: Once) -> None:
    """In the same entry, in a later one, and although the world has changed meanwhile."""
    first, second = world.entry(put, put)
    world.one(Put(b"k", b"2"))
    assert first == second == world.one(put) == PutResult(1, True)
    assert world.revision == 2
    assert world.view.records[b"k"].value == b"2"


def test_a_refusal_is_a_result_too(world: World) -> None:
    """412 comes back although the condition would hold by now."""
    put = numbered(1, Put(b"k", b"", Condition(if_match=())))
    assert world.one(put) == ConditionFailed(None)
    world.one(Put(b"k", b""))
    assert world.one(put) == ConditionFailed(None)


def test_a_lease_is_granted_once(world: World) -> None:
    first, again = world.one(numbered(1, LeaseGrant(60))), world.one(numbered(1, LeaseGrant(60)))
    assert isinstance(first, LeaseResult)
    assert first == again
    assert len(world.view.tables["leases"]) == 1


def test_another_request_under_the_same_key_is_a_mismatch(world: World) -> None:
    for make in (lambda c: numbered(1, c), lambda c: opaque("key", c)):
        world.one(make(Put(b"k", b"1")))
        assert world.one(make(Put(b"k", b"3"))) == Mismatch()
    assert world.view.records[b"k"].value == b"1"


def test_the_newest_thousand_results_of_a_client_are_kept(world: World) -> None:
    """In whatever order they came; whose result is not known any more is refused, not repeated."""
    for number in range(2, once.RESULTS_MAX + 3):
        world.one(numbered(number, Put(b"k", b"%d" % number)))
    revision = world.revision
    assert isinstance(world.one(numbered(1, Put(b"k", b"1"))), Stale)
    assert isinstance(world.one(numbered(2, Put(b"k", b"2"))), Stale)
    assert world.one(numbered(3, Put(b"k", b"3"))) == PutResult(2, False)
    assert world.revision == revision
    assert len(world.view.tables["results"]) == once.RESULTS_MAX


def test_numbers_may_arrive_out_of_order(world: World) -> None:
    """Requests that are under way together overtake one another."""
    assert world.one(numbered(7, Put(b"k", b"7"))) == PutResult(1, True)
    assert world.one(numbered(5, Put(b"k", b"5"))) == PutResult(2, False)
    assert world.one(numbered(7, Put(b"k", b"7"))) == PutResult(1, True)


def test_idle_clients_and_opaque_keys_expire_with_log_time(world: World) -> None:
    world.entry(numbered(1, Put(b"a", b"")), opaque("key", Put(b"b", b"")))
    world.one(numbered(2, Put(b"a", b"")), after_ms=WINDOW_MS - 1)
    world.entry(after_ms=2)
    assert (totals(world).clients, totals(world).opaque) == (1, 0)  # the client was not idle
    world.entry(after_ms=WINDOW_MS - 2)
    assert totals(world).clients == 1
    world.entry(after_ms=1)
    assert (totals(world).clients, totals(world).remembered_bytes) == (0, 0)
    for table in ("due", "clients", "results", "opaque"):
        assert world.view.tables[table] == {}  # type: ignore[index]


def test_keys_do_not_wait_for_what_is_to_be_forgotten(world: World) -> None:
    """Thousands of results may have been due for long: a key or a lease goes with the first entry
    that comes at its time, and they are forgotten with what that leaves of what an entry may do."""
    lease = world.one(LeaseGrant(120))
    assert isinstance(lease, LeaseResult)
    world.one(ExpiringPut(b"leased", b"", None, 0, lease.lease))
    world.one(ExpiringPut(b"timed", b"", None, 120))
    for client in ("a", "b", "c"):
        world.entry(*(numbered(n, Put(b"k", b""), client) for n in range(1, 601)))
    world.entry(*(opaque(f"key{n}", Put(b"k", b"")) for n in range(5)))
    world.entry(after_ms=120_001)
    assert world.keys == [b"k"]
    assert (totals(world).clients, totals(world).opaque) == (1, 5)
    world.entry()
    world.entry()
    assert (totals(world).clients, totals(world).opaque) == (0, 0)
    assert world.view.tables["due"] == {}


def test_a_repetition_keeps_a_client_known(world: World) -> None:
    world.one(numbered(1, Put(b"a", b"")))
    for _ in range(4):
        assert world.one(numbered(1, Put(b"a", b"")), after_ms=WINDOW_MS // 2) == PutResult(1, True)


@pytest.mark.parametrize(
    ("what", "limit", "commands"),
    [
        ("clients", "CLIENTS_MAX", [numbered(1, Put(b"k", b""), f"c{n}") for n in range(4)]),
        ("keys", "OPAQUE_MAX", [opaque(f"key{n}", Put(b"k", b"")) for n in range(4)]),
    ],
)
def test_nothing_is_forgotten_early_to_make_room(
    world: World, monkeypatch: pytest.MonkeyPatch, what: str, limit: str, commands: list[Command]
) -> None:
    """When no more can be remembered the command is refused, and not carried out."""
    monkeypatch.setattr(once, limit, 3)
    assert [type(result) for result in world.entry(*commands)] == [PutResult] * 3 + [Full]
    assert world.one(commands[3]) == Full(what)
    assert world.revision == 3
    assert world.one(commands[0]) == PutResult(1, True)
    assert isinstance(world.one(commands[3], after_ms=WINDOW_MS + 1), PutResult)


def test_all_that_is_remembered_is_bounded_in_bytes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(once, "REMEMBERED_BYTES_MAX", once.RESULT_BYTES_MAX + 100)
    world.one(numbered(1, Put(b"k", b"")))
    world.one(numbered(2, Put(b"k", b"")))
    size = sum(len(data) for data in world.view.tables["results"].values())
    assert totals(world).remembered_bytes == size
    results = [world.one(numbered(n, Put(b"k", b""))) for n in range(3, 12)]
    assert results[-1] == Full("bytes")
    assert world.one(numbered(1, Put(b"k", b""))) == PutResult(1, True)


def test_a_result_that_is_too_large_to_keep_is_refused_before_anything_happens(
    world: World,
) -> None:
    """64 KiB: a transaction that reads more needs no key, or fewer reads."""
    world.one(Put(b"k", b"x" * once.RESULT_BYTES_MAX))
    txn = Txn((), (Put(b"other", b""), Get(b"k")), ())
    assert isinstance(world.one(numbered(1, txn)), Invalid)
    assert world.keys == [b"k"]
    assert isinstance(world.one(txn), TxnResult)


def test_what_a_transaction_that_only_puts_comes_to_can_always_be_kept(world: World) -> None:
    """The most puts, at the largest revisions: so nobody has to look how long the result is."""
    world.revision = 2**63
    puts = tuple(Put(b"%d" % n, b"") for n in range(OPERATIONS_MAX))
    result = world.one(numbered(1, Txn((), puts, ())))
    assert isinstance(result, TxnResult)
    assert len(encode_result(result)) < once.RESULT_BYTES_MAX / 4


def test_flawed_keys_are_refused(world: World) -> None:
    delete = Delete(b"k")
    for key in ("", "x" * 129, "two words", "tab\t", "ümlaut", "\x7f"):
        assert isinstance(world.one(Once(key, None, b"f" * 16, delete)), Invalid)
    for number in (0, -1, 2**63):
        assert isinstance(world.one(Once("c", number, b"f" * 16, delete)), Invalid)
    assert isinstance(world.one(Once("c", 1, b"short", delete)), Invalid)
