"""What time ends: keys, leases, and what is remembered for exactly-once.

Time is the log's, so every member ends the same at the same entry. What one entry can end is
bounded; the rest is due still, and the leader proposes the next tick at once.
"""

from __future__ import annotations

from typing import Final

from dengine.kv import once, tables
from dengine.kv.recorder import Recorder
from dengine.kv.tables import EXPIRING, Due, Lease

KEYS_MAX: Final = 1000
BYTES_MAX: Final = 4 * 1024 * 1024  # of the values that go


class Allowance:
    """How much more may go with this entry. The first key always may."""

    def __init__(self) -> None:
        self._keys = KEYS_MAX
        self._bytes = BYTES_MAX

    @property
    def left(self) -> bool:
        return self._keys > 0 and self._bytes > 0

    def spend(self, keys: int, size: int = 0) -> None:
        self._keys -= keys
        self._bytes -= size


def expire(recorder: Recorder) -> None:
    """End what is due at the recorder's log time: all keys that go are one revision.

    Keys and leases come first, however long the rest has been due: somebody waits for those.
    """
    allowance = Allowance()
    recorder.expiring = True
    deleted = _end(recorder, allowance)
    if deleted:
        recorder.close(recorder.revision + 1)
    recorder.expiring = False
    _forget(recorder, allowance)


def _end(recorder: Recorder, allowance: Allowance) -> int:
    """Keys and leases. Returns how many keys went."""
    view, now_ms = recorder.view, recorder.clock_ms
    deleted, start = 0, b""
    while allowance.left and (due := tables.due_at(view, tables.ENDING, start)) is not None:
        if due.at_ms > now_ms:
            break
        start = due.at + b"\0"
        if due.kind == tables.KEY:
            deleted += _delete(recorder, due.name, allowance)
        else:
            deleted += _expire_lease(recorder, due, allowance)
    return deleted


def _forget(recorder: Recorder, allowance: Allowance) -> None:
    """What is remembered for exactly-once."""
    view, now_ms = recorder.view, recorder.clock_ms
    while allowance.left and (due := tables.due_at(view, tables.FORGETTING)) is not None:
        if due.at_ms > now_ms:
            break
        if due.kind == tables.CLIENT:
            allowance.spend(1 + once.expire_client(recorder, due))
        else:
            allowance.spend(1)
            once.expire_opaque(recorder, due)


def end_lease(
    recorder: Recorder, lease_id: str, lease: Lease, allowance: Allowance
) -> tuple[int, bool]:
    """Delete what a lease that is going holds, and the lease itself with the last of it.

    Returns:
        How many keys went, and whether some are left: then the lease stays as it is.
    """
    deleted = 0
    for key in tables.attached(recorder.view, lease_id):
        if not allowance.left:
            return deleted, True
        deleted += _delete(recorder, key, allowance)
    view, totals = recorder.view, recorder.totals
    view.remove("leases", lease_id.encode())
    tables.clear_due(view, lease.expires_ms, tables.LEASE, lease_id.encode())
    if totals is not None:
        totals.leases -= 1
    return deleted, False


def _expire_lease(recorder: Recorder, due: Due, allowance: Allowance) -> int:
    lease_id = due.name.decode()
    lease = tables.lease_of(recorder.view, lease_id)
    allowance.spend(1)
    if lease is None:
        return 0
    recorder.expiring = lease.going in (tables.ALIVE, EXPIRING)
    deleted, more = end_lease(recorder, lease_id, lease, allowance)
    recorder.expiring = True
    if more and lease.going == tables.ALIVE:
        going = tables.encode_lease(lease._replace(going=EXPIRING))
        recorder.view.write("leases", due.name, going)
    return deleted


def _delete(recorder: Recorder, key: bytes, allowance: Allowance) -> int:
    record = recorder.get(key)
    if record is None:
        return 0
    allowance.spend(1, len(record.value))
    recorder.delete(key)
    return 1
