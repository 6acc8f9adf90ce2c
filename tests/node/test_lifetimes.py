"""What is read of leases and TTLs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dengine.errors import NotFound
from dengine.kv.commands import (
    Command,
    ExpiringPut,
    LeaseGrant,
    LeaseResult,
    Result,
    encode_batch,
    encode_command,
)
from dengine.kv.expiry import KEYS_MAX
from dengine.node.lifetimes import Lifetimes
from dengine.raft.types import Entry, EntryKind, MemberId
from dengine.storage.state_store import StateStore
from tests.storage.states import config, membership


def test_a_lease_that_is_due_has_ended(tmp_path: Path) -> None:
    """Also while keys of others that are due go first: it cannot be used, so it is not shown."""
    state = StateStore(tmp_path / "state")
    state.apply([config(1, membership(MemberId(1, 1)))])

    def apply(clock_ms: int, *commands: Command) -> list[Result]:
        data = encode_batch([encode_command(command) for command in commands], clock_ms)
        entry = Entry(state.applied.index + 1, 1, EntryKind.NORMAL, data)
        return state.apply([entry])[0]

    (granted,) = apply(1_000, LeaseGrant(5))
    assert isinstance(granted, LeaseResult)
    apply(1_000, ExpiringPut(b"leased", b"", None, 0, granted.lease))
    apply(1_000, *(ExpiringPut(b"%d" % n, b"", None, 4) for n in range(KEYS_MAX)))
    raft: Any = SimpleNamespace(clock_ms=5_999)
    lifetimes = Lifetimes(raft, state)
    record = state.get(b"leased")
    assert record is not None
    assert (lifetimes.lease(granted.lease).keys, lifetimes.remaining_s(record)) == ([b"leased"], 1)
    apply(6_001)
    assert state.get(b"leased") == record
    with pytest.raises(NotFound) as ended:
        lifetimes.lease(granted.lease)
    assert ended.value.details == {"going": True}, "its key is still there"
    assert lifetimes.remaining_s(record) == 0
    apply(6_001)
    assert state.get(b"leased") is None
    with pytest.raises(NotFound) as gone:
        lifetimes.lease(granted.lease)
    assert gone.value.details == {}
    state.close()
