"""Leases: granted, kept alive, revoked, and what may hang on them."""

from __future__ import annotations

from dengine.kv import tables
from dengine.kv.commands import (
    TTL_S_MAX,
    Invalid,
    LeaseGrant,
    LeaseKeepAlive,
    LeaseResult,
    LeaseRevoke,
    LeaseRevoked,
    NoLease,
)
from dengine.kv.expiry import Allowance, end_lease
from dengine.kv.recorder import Recorder
from dengine.kv.tables import REVOKED, Lease


def expires_ms(recorder: Recorder, ttl_s: int) -> int:
    """When what begins now is due.

    The clock shows whole milliseconds, rounded down: one more, or what began late in its
    millisecond would end early.
    """
    return recorder.clock_ms + ttl_s * 1000 + 1


def bad_ttl(ttl_s: int) -> Invalid | None:
    if 1 <= ttl_s <= TTL_S_MAX:
        return None
    return Invalid(f"a TTL is 1 to {TTL_S_MAX} seconds, this one is {ttl_s}")


def alive(recorder: Recorder, lease_id: str) -> Lease | None:
    """A lease that somebody may still use."""
    lease = tables.lease_of(recorder.view, lease_id)
    return lease if lease is not None and lease.is_alive(recorder.clock_ms) else None


def missing(lease_id: str) -> NoLease:
    """What comes of using a lease that is not there; short, whatever was asked for."""
    return NoLease(lease_id[:64])


def grant(recorder: Recorder, command: LeaseGrant) -> LeaseResult | Invalid:
    """The id is the command's place in the log of this cluster. A cluster that is made from a
    snapshot or by repair has another cluster_id, so no id is ever given out twice.
    """
    wrong = bad_ttl(command.ttl_s)
    if wrong is not None:
        return wrong
    index, position = recorder.place
    lease_id = f"{index:x}-{position:x}-{recorder.rules.cluster_id[:12]}"
    _store(recorder, lease_id, Lease(command.ttl_s, expires_ms(recorder, command.ttl_s)))
    if recorder.totals is not None:
        recorder.totals.leases += 1
    return LeaseResult(lease_id, command.ttl_s)


def keep_alive(recorder: Recorder, command: LeaseKeepAlive) -> LeaseResult | NoLease:
    lease = alive(recorder, command.lease)
    if lease is None:
        return missing(command.lease)
    _forget_due(recorder, command.lease, lease)
    _store(recorder, command.lease, Lease(lease.ttl_s, expires_ms(recorder, lease.ttl_s)))
    return LeaseResult(command.lease, lease.ttl_s)


def revoke(recorder: Recorder, command: LeaseRevoke) -> LeaseRevoked | NoLease:
    """Of a lease that holds many keys the first go now, and the others with the next entries."""
    lease = alive(recorder, command.lease)
    if lease is None:
        return missing(command.lease)
    deleted, more = end_lease(recorder, command.lease, lease, Allowance())
    if more:
        _forget_due(recorder, command.lease, lease)
        _store(recorder, command.lease, Lease(lease.ttl_s, recorder.clock_ms, REVOKED))
    return LeaseRevoked(recorder.revision + bool(deleted), deleted, more)


def _store(recorder: Recorder, lease_id: str, lease: Lease) -> None:
    name = lease_id.encode()
    recorder.view.write("leases", name, tables.encode_lease(lease))
    tables.set_due(recorder.view, lease.expires_ms, tables.LEASE, name)


def _forget_due(recorder: Recorder, lease_id: str, lease: Lease) -> None:
    tables.clear_due(recorder.view, lease.expires_ms, tables.LEASE, lease_id.encode())
