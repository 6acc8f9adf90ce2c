"""How far snapshots on their way to other members are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dengine.node import transfers
from dengine.node.transfers import FORGET_S, RECEIVERS_MAX, Transfers
from dengine.raft.types import SnapshotRef

FILE = SnapshotRef(7, 1, "a" * 64, 1000)
OTHER_FILE = SnapshotRef(8, 1, "b" * 64, 1000)


def test_who_asks_again_for_what_it_has_had_cannot_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """To find that out of a large file takes longer than a transfer is remembered. Whoever was cut
    off, or asks for another file, says nothing of the one before."""
    now = 0.0
    monkeypatch.setattr(transfers, "time", SimpleNamespace(monotonic=lambda: now))
    sending = Transfers()
    assert not sending.began(3, FILE, 0)
    sending.sent(3, 999)
    assert not sending.began(3, FILE, 500), "it was cut off"
    sending.sent(3, 500)
    now += 100 * FORGET_S
    assert not sending.refs, "it is not held for it any longer"
    assert not sending.began(4, FILE, 0), "that is another member"
    assert sending.began(3, FILE, 0)
    sending.sent(3, 1000)
    assert not sending.began(3, OTHER_FILE, 0)
    assert not sending.began(3, FILE, 0)


def test_what_is_remembered_is_bounded() -> None:
    """Whoever may download can name any number of receivers."""
    sending = Transfers()
    for receiver in range(1, RECEIVERS_MAX + 2):
        sending.began(receiver, FILE, 0)
        sending.sent(receiver, FILE.size_bytes)
    assert not sending.began(1, FILE, 0), "the oldest is forgotten"
    assert sending.began(RECEIVERS_MAX + 1, FILE, 0)
