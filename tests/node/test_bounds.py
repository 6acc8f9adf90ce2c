"""What peers can make this node keep or say is bounded, however often they ask."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from dengine.config import Config, read
from dengine.kv.commands import COMMAND_VERSION
from dengine.node.addresses import AddressBook
from dengine.node.admission import STRANGERS_MAX
from dengine.node.cycle import Cycle
from dengine.node.exchange import SERVED_MAX, Exchange
from dengine.node.founding import Founding
from dengine.node.members import CORRECT_EVERY_MS, REPEAT_REFUSAL_MS, Members
from dengine.node.wire import PROTOCOL_VERSION, ForwardRequest, Hello
from dengine.raft.types import MemberId
from dengine.storage.directory import DataDirectory
from tests.cluster import config_text
from tests.node.hosts import admission_of, on_loop
from tests.raft.harness import A, B, C, leader, member, membership


def cycle_of(raft: Any) -> Cycle:
    """The part of a cycle that is needed where no turn is taken."""
    return cast(Cycle, SimpleNamespace(raft=raft, wake=lambda: None, fail=None))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    file = tmp_path / "n1.toml"
    file.write_text(config_text(1, {1: 9081}, 2, 2), encoding="utf-8")
    return read(file, {})


def hello(who: MemberId, boot: int = 1) -> Hello:
    return Hello(PROTOCOL_VERSION, COMMAND_VERSION, "test", who, boot, "127.0.0.1:9", 1000, 0)


def test_strangers_are_forgotten_before_members(config: Config, tmp_path: Path) -> None:
    """Thousands of senders that no membership names cost a bounded memory, and the member that
    was heard before them is still known: its old Hello is not taken for an old directory."""
    raft = leader(A, membership(A, B)).raft
    directory = DataDirectory.open(tmp_path / "db", 1)
    directory.set_cluster_id("test")
    admission = admission_of(config, directory, raft, lambda _: None)
    newest = msgspec.structs.replace(hello(B), last_index=raft.log.last_index)
    assert admission.admit(newest, "10.0.0.2") is None
    for number in range(3 * STRANGERS_MAX):
        assert (
            admission.admit(
                hello(MemberId(1000 + number, 1)), f"10.0.{number // 250}.{number % 250}"
            )
            is None
        )
    assert len(admission._boots) == len(admission._announced) <= STRANGERS_MAX + 1
    # A second Hello of the same boot that was on its way before B's acknowledgements.
    assert admission.admit(msgspec.structs.replace(newest, last_index=0), "10.0.0.2") is None
    directory.close()


def test_a_founders_hello_that_was_on_its_way_is_no_old_directory(
    config: Config, tmp_path: Path
) -> None:
    """It was made before the cluster was founded, and arrives after its sender has acknowledged
    entries on an older stream: the boot is known from before the founding."""
    raft = leader(A, membership(A, B)).raft
    directory = DataDirectory.open(tmp_path / "db", 1)
    admission = admission_of(config, directory, raft, lambda _: None)
    unfounded = msgspec.structs.replace(hello(B), cluster_id="")
    assert admission.admit(unfounded, "10.0.0.2") is None
    directory.set_cluster_id("test")
    raft.progress[B].match_index = raft.log.last_index
    assert admission.admit(hello(B), "10.0.0.2") is None
    refused = admission.admit(hello(B, boot=2), "10.0.0.2")
    assert refused is not None
    assert refused.reason == "rolled_back", "another process of B, and nothing in its log"
    directory.close()


@pytest.mark.parametrize(
    "garbled", [{"address": "nowhere"}, {"dialled": "1.2.3.4:x"}, {"zone": "z" * 65}]
)
def test_a_garbled_hello_is_refused(
    config: Config, tmp_path: Path, garbled: dict[str, str]
) -> None:
    """What would end the process later, or travel to every log, is not let in."""
    directory = DataDirectory.open(tmp_path / "db", 1)
    directory.set_cluster_id("test")
    admission = admission_of(config, directory, leader(A, membership(A, B)).raft, lambda _: None)
    refused = admission.admit(msgspec.structs.replace(hello(B), **garbled), "10.0.0.2")
    assert refused is not None
    assert refused.reason == "protocol"
    directory.close()


def test_a_correction_that_is_refused_is_said_once_and_blocks_no_other(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """Node 2 says it is where node 3 is: one line, and one more after a minute. What node 3 says
    of itself is committed all the same."""

    async def check() -> None:
        node = leader(A, membership(A, B, C))
        at_c = msgspec.structs.replace(node.raft.membership.get(B), address=member(C).address)
        corrections = [at_c]
        members = Members(config, cycle_of(node.raft), lambda *_: corrections)
        refused_over_ms = REPEAT_REFUSAL_MS + 5 * CORRECT_EVERY_MS
        with caplog.at_level(logging.INFO, "dengine.members"):
            for _ in range(0, refused_over_ms, CORRECT_EVERY_MS):
                node.now_ms += CORRECT_EVERY_MS
                members.ticked(node.now_ms)
        assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2
        assert "already belongs to node 3" in caplog.text
        known = node.raft.membership.get(C)
        corrections.append(msgspec.structs.replace(known, zone="az-c"))
        members.ticked(node.now_ms + CORRECT_EVERY_MS)
        moved = node.raft.membership.get(C)
        assert moved is not None
        assert moved.zone == "az-c"

    on_loop(check)


def test_forwarded_requests_under_way_are_bounded(config: Config, tmp_path: Path) -> None:
    """A member that asks and asks is refused, not obeyed without end."""

    async def check() -> None:
        raft = leader(A, membership(A, B)).raft
        directory = DataDirectory.open(tmp_path / "db", 1)
        directory.set_cluster_id("test")
        taken: list[str] = []

        async def lead_here(op: str, args: dict[str, Any], deadline: float) -> dict[str, Any]:
            taken.append(op)
            await asyncio.Event().wait()
            return {}

        services = cast(Any, SimpleNamespace(lead_here=lead_here))
        no_agreement = cast(Any, None)
        founding = Founding(config, A, boot=1)
        exchange = Exchange(
            config,
            directory,
            cycle_of(raft),
            AddressBook(config),
            founding,
            services,
            no_agreement,
            None,
        )
        for number in range(SERVED_MAX + 100):
            exchange._on_frame(B, ForwardRequest(number, "promote", b"{}", 5000))
        await asyncio.sleep(0)  # every task that was made takes its first step
        assert len(taken) == SERVED_MAX
        await exchange.close()
        directory.close()

    on_loop(check)
