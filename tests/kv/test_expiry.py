"""TTLs and leases on log time: never early, in bounded pieces, the same on every member."""

from __future__ import annotations

import pytest

from dengine.kv.commands import (
    TTL_S_MAX,
    Delete,
    DeleteResult,
    ExpiringPut,
    Invalid,
    LeaseGrant,
    LeaseKeepAlive,
    LeaseResult,
    LeaseRevoke,
    LeaseRevoked,
    NoLease,
    Put,
    PutResult,
    Txn,
    encode_batch,
    encode_command,
)
from dengine.kv.expiry import BYTES_MAX, KEYS_MAX
from dengine.kv.machine import apply_batch
from tests.kv.twin import DictView
from tests.kv.world import World


@pytest.fixture
def world() -> World:
    return World()


def _lease(world: World, ttl_s: int = 10) -> str:
    result = world.one(LeaseGrant(ttl_s))
    assert isinstance(result, LeaseResult)
    assert result.ttl_s == ttl_s
    return result.lease


# --- TTL ------------------------------------------------------------------------------------------


def test_a_key_goes_when_its_time_is_over_and_not_a_millisecond_before(world: World) -> None:
    """The clock shows whole milliseconds, rounded down: one more is waited for."""
    world.one(ExpiringPut(b"k", b"v", None, 10))
    world.entry(after_ms=10_000)
    assert world.keys == [b"k"]
    world.entry(after_ms=1)
    assert world.keys == []
    assert world.revision == 2
    assert world.events() == [(1, [("put", b"k")]), (2, [("expire", b"k")])]


@pytest.mark.parametrize(
    "again",
    [
        Put(b"k", b"v"),
        Txn((), (Put(b"k", b"v"),), ()),
        ExpiringPut(b"k", b"v", None, 100),
    ],
)
def test_a_later_put_decides(world: World, again: Put) -> None:
    """A plain PUT clears an earlier TTL, another TTL takes its place."""
    world.one(ExpiringPut(b"k", b"v", None, 10))
    world.one(again, after_ms=5_000)
    world.entry(after_ms=20_000)
    assert world.keys == [b"k"]


def test_a_deleted_key_that_is_made_again_has_no_ttl(world: World) -> None:
    world.one(ExpiringPut(b"k", b"v", None, 10))
    world.entry(Delete(b"k"), Put(b"k", b"v"))
    world.entry(after_ms=20_000)
    assert world.keys == [b"k"]
    assert world.view.tables["due"] == {}


def test_what_is_due_goes_before_the_commands_of_the_entry(world: World) -> None:
    """A command never sees a key whose time is over: this one makes it anew."""
    world.one(ExpiringPut(b"k", b"v", None, 10))
    assert world.one(Put(b"k", b"w"), after_ms=11_000) == PutResult(3, True)


def test_all_keys_that_expire_with_an_entry_are_one_revision(world: World) -> None:
    """And they go in the order in which they were due."""
    world.entry(ExpiringPut(b"late", b"", None, 3), ExpiringPut(b"soon", b"", None, 2))
    world.events()
    world.entry(after_ms=60_000)
    assert world.events() == [(3, [("expire", b"soon"), ("expire", b"late")])]


def test_mass_expiry_is_spread_over_entries(world: World) -> None:
    """At most 1000 keys with one entry; the others follow, each time in one revision."""
    many = KEYS_MAX + 500
    for first in range(0, many, 500):
        world.entry(*(ExpiringPut(b"%05d" % n, b"", None, 5) for n in range(first, first + 500)))
    world.entry(after_ms=10_000)
    assert len(world.keys) == 500
    world.entry()
    assert world.keys == []
    assert world.revision == many + 2


def test_large_values_expire_in_smaller_numbers(world: World) -> None:
    """At most about 4 MiB of values with one entry."""
    size = BYTES_MAX // 4
    for n in range(10):
        world.one(ExpiringPut(b"%d" % n, b"x" * size, None, 5))
    world.entry(after_ms=10_000)
    assert len(world.keys) == 6


def test_log_time_never_goes_back(world: World) -> None:
    """An entry of a leader whose clock is behind neither resets nor shortens anything."""
    world.one(ExpiringPut(b"k", b"v", None, 10))
    world.entry(after_ms=8_000)
    world.clock_ms -= 7_000
    world.one(ExpiringPut(b"l", b"v", None, 1))  # at the log time of the entry before
    world.clock_ms += 7_000
    world.entry(after_ms=1_000)
    assert world.keys == [b"k", b"l"]
    world.entry(after_ms=1)
    assert world.keys == [b"k"]


def test_a_ttl_has_limits(world: World) -> None:
    for ttl_s in (-1, 0, TTL_S_MAX + 1):
        assert isinstance(world.one(ExpiringPut(b"k", b"v", None, ttl_s)), Invalid)
        assert isinstance(world.one(LeaseGrant(ttl_s)), Invalid)
    assert world.one(ExpiringPut(b"k", b"v", None, TTL_S_MAX)) == PutResult(1, True)


def test_long_keys_expire_too(world: World) -> None:
    """511 bytes are a key like any other, also two that differ only at their end."""
    keys = [b"x" * 510 + end for end in (b"a", b"b")]
    world.entry(*(ExpiringPut(key, b"", None, 5) for key in keys))
    world.entry(after_ms=5_001)
    assert world.keys == []


# --- leases ---------------------------------------------------------------------------------------


def test_a_lease_takes_its_keys_with_it(world: World) -> None:
    lease = _lease(world)
    world.entry(ExpiringPut(b"a", b"", None, 0, lease), ExpiringPut(b"b", b"", None, 0, lease))
    world.one(Put(b"c", b""))
    world.events()
    world.entry(after_ms=10_001)
    assert world.keys == [b"c"]
    assert world.events() == [(4, [("expire", b"a"), ("expire", b"b")])]
    assert world.one(LeaseKeepAlive(lease)) == NoLease(lease)


def test_a_lease_that_is_kept_alive_lives(world: World) -> None:
    lease = _lease(world)
    world.one(ExpiringPut(b"k", b"", None, 0, lease))
    for _ in range(5):
        assert world.one(LeaseKeepAlive(lease), after_ms=9_000) == LeaseResult(lease, 10)
    assert world.keys == [b"k"]
    world.entry(after_ms=10_001)
    assert world.keys == []


def test_a_lease_whose_time_is_over_cannot_be_used(world: World) -> None:
    """Also while the deletion of other keys is still under way."""
    lease = _lease(world)
    for first in range(0, 1500, 500):
        world.entry(*(ExpiringPut(b"%05d" % n, b"", None, 5) for n in range(first, first + 500)))
    assert world.entry(
        LeaseKeepAlive(lease), ExpiringPut(b"k", b"", None, 0, lease), after_ms=10_001
    ) == [NoLease(lease), NoLease(lease)]
    assert len(world.keys) == 500


def test_revoke_deletes_what_is_attached(world: World) -> None:
    """A key that was overwritten meanwhile is not attached any more."""
    lease = _lease(world)
    for key in (b"a", b"b", b"c"):
        world.one(ExpiringPut(key, b"", None, 0, lease))
    world.one(Put(b"b", b"mine"))
    world.events()
    assert world.one(LeaseRevoke(lease)) == LeaseRevoked(5, 2, False)
    assert world.keys == [b"b"]
    assert world.events() == [(5, [("delete", b"a"), ("delete", b"c")])]
    assert world.one(LeaseRevoke(lease)) == NoLease(lease)
    assert world.view.tables["leases"] == world.view.tables["attached"] == {}
    assert world.view.tables["due"] == {}


def test_a_lease_with_many_keys_goes_in_pieces(world: World) -> None:
    """No entry deletes more than 1000: the lease is going meanwhile, and holds nobody else."""
    lease = _lease(world)
    for first in range(0, 2500, 500):
        world.entry(
            *(ExpiringPut(b"%05d" % n, b"", None, 0, lease) for n in range(first, first + 500))
        )
    assert world.one(LeaseRevoke(lease)) == LeaseRevoked(2501, 1000, True)
    assert world.one(ExpiringPut(b"new", b"", None, 0, lease)) == NoLease(lease)
    assert len(world.keys) == 501  # the lease itself counts as one thing that is due
    world.events()
    world.entry()
    assert world.keys == []
    ((_, events),) = world.events()
    assert {kind for kind, _ in events} == {"delete"}  # as by the first part
    assert world.view.tables["leases"] == {}


def test_revoking_an_empty_lease_changes_no_revision(world: World) -> None:
    assert world.one(LeaseRevoke(_lease(world))) == LeaseRevoked(0, 0, False)
    assert world.revision == 0


def test_a_lease_must_exist_and_excludes_a_ttl(world: World) -> None:
    lease = _lease(world)
    assert world.one(ExpiringPut(b"k", b"", None, 0, "nobody")) == NoLease("nobody")
    assert isinstance(world.one(ExpiringPut(b"k", b"", None, 5, lease)), Invalid)
    put = ExpiringPut(b"k", b"", None, 0, "nobody")
    assert world.one(Txn((), (Put(b"other", b""), put), ())) == NoLease("nobody")
    assert world.keys == []
    for strange in ("", "a\0b", "schlüssel"):
        assert world.one(LeaseKeepAlive(strange)) == NoLease(strange)
    assert world.one(LeaseKeepAlive("x" * 500)) == NoLease("x" * 64)


def test_no_id_is_given_out_twice(world: World) -> None:
    """Not within one entry, not later, and not by a cluster that was made from this state."""
    results = world.entry(LeaseGrant(5), LeaseGrant(5)) + world.entry(LeaseGrant(5))
    other = World(world.rules.__class__(cluster_id="another cluster"))
    results += other.entry(LeaseGrant(5), LeaseGrant(5))
    ids = [result.lease for result in results if isinstance(result, LeaseResult)]
    assert len(set(ids)) == 5


# --- version 1 ------------------------------------------------------------------------------------


def test_entries_of_version_1_leave_no_trace_beside_the_keys() -> None:
    """Members of the release before apply the same entries, and their states must be equal."""
    view = DictView()
    data = encode_batch([encode_command(c) for c in (Put(b"a", b"1"), Delete(b"a"))])
    assert apply_batch(data, view, 0) == (2, [PutResult(1, True), DeleteResult(2, 1)])
    assert view.totals is None
    assert not any(view.tables.values())


def test_version_1_behind_version_2_is_recorded_like_all_else(world: World) -> None:
    """Who knows no version 2 has stopped by then, so nobody differs."""
    world.one(ExpiringPut(b"k", b"v", None, 10))
    data = encode_batch([encode_command(Put(b"k", b"w"))])
    world.revision, _ = apply_batch(data, world.view, world.revision, world.rules, 2)
    world.entry(after_ms=60_000)
    assert world.keys == [b"k"]
    assert [revision for revision, _ in world.events()] == [1, 2]
