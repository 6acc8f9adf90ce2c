"""Requests that go from a follower to the leader."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest

from dengine.config import read
from dengine.node.addresses import AddressBook
from dengine.node.exchange import Exchange
from dengine.node.founding import Founding
from dengine.node.wire import ForwardReply, ForwardRequest, Frame
from dengine.raft.messages import HeartbeatRequest
from dengine.raft.types import MemberId
from dengine.storage.directory import DataDirectory
from tests.cluster import config_text
from tests.node.hosts import on_loop
from tests.node.test_bounds import cycle_of
from tests.raft.harness import A, B, C, membership, server


@pytest.mark.parametrize("op", ["write", "promote"])
def test_a_request_is_passed_on_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    """A follower that is taken for the leader says that it is none, though it knows the leader:
    two that think so of each other would send it to and fro."""
    file = tmp_path / "n1.toml"
    file.write_text(config_text(1, {1: 9081}, 2, 2), encoding="utf-8")
    config = read(file, {})
    sent: list[tuple[MemberId, Frame]] = []

    async def check() -> None:
        node = server(A, membership(A, B, C))
        node.step(HeartbeatRequest(B, A, 1, 0, 0, 0))
        assert node.raft.leader == B
        directory = DataDirectory.open(tmp_path / "db", 1)
        directory.set_cluster_id("test")
        exchange = Exchange(
            config,
            directory,
            cycle_of(node.raft),
            AddressBook(config),
            Founding(config, A, boot=1),
            cast(Any, SimpleNamespace()),  # nothing is carried out
            cast(Any, None),
            None,
        )
        monkeypatch.setattr(exchange.peers, "send", lambda to, frame: sent.append((to, frame)))
        exchange._on_frame(C, ForwardRequest(7, op, b"{}", 5000))
        await asyncio.gather(*exchange._tasks)
        await exchange.close()
        directory.close()

    on_loop(check)
    [(to, reply)] = sent
    assert to == C
    assert isinstance(reply, ForwardReply)
    assert (reply.id, reply.ok) == (7, False)
    assert orjson.loads(reply.body)["error"] == "not_leader"
