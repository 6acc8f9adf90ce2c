"""How long keys and leases still have, by the log's time as this node knows it."""

from __future__ import annotations

from typing import Final, NamedTuple

from dengine.errors import NotFound
from dengine.kv.store import Record
from dengine.kv.tables import Lease
from dengine.raft.raft import Raft
from dengine.storage.state_store import StateStore

KEYS_SHOWN: Final = 1000


class LeaseView(NamedTuple):
    """A lease as somebody sees it: some of its keys are left out where it holds very many."""

    lease: str
    ttl_s: int
    remaining_s: int
    keys: list[bytes]


class Lifetimes:
    """What is read of TTLs and leases; whoever needs it fresh waits for a read barrier first."""

    def __init__(self, raft: Raft, state: StateStore) -> None:
        self._raft = raft
        self._state = state

    def remaining_s(self, record: Record) -> int | None:
        """Seconds, rounded up, that the key still has; None: it stays. 0: it is due."""
        if record.expires_ms:
            return self._until(record.expires_ms)
        if not record.lease:
            return None
        lease = self._state.lease(record.lease)
        return 0 if lease is None or self._is_over(lease) else self._until(lease.expires_ms)

    def lease(self, lease_id: str) -> LeaseView:
        """Raises NotFound: there is none, or it has ended; `going`: some of its keys are left."""
        lease = self._state.lease(lease_id)
        if lease is None:
            raise NotFound(f"there is no lease {lease_id[:64]}")
        if self._is_over(lease):
            told = f"lease {lease_id[:64]} has ended, and the last of its keys are being deleted"
            raise NotFound(told, going=True)
        keys = sorted(self._state.attached(lease_id, KEYS_SHOWN))
        return LeaseView(lease_id, lease.ttl_s, self._until(lease.expires_ms), keys)

    def _is_over(self, lease: Lease) -> bool:
        return not lease.is_alive(self._state.clock_ms)

    def _until(self, expires_ms: int) -> int:
        left_ms = expires_ms - 1 - self._raft.clock_ms  # 1: see kv/leases.py
        return max(0, -(-left_ms // 1000))
