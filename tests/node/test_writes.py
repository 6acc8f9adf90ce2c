"""From a command to its result through a whole node: time, leases, once, watches, limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from dengine.errors import (
    ClusterUnavailable,
    DiskFull,
    InvalidRequest,
    NotFound,
    TooLarge,
)
from dengine.kv import recorder
from dengine.kv.commands import (
    Compare,
    Delete,
    DeleteResult,
    Effect,
    ExpiringPut,
    Get,
    LeaseGrant,
    LeaseKeepAlive,
    LeaseResult,
    LeaseRevoke,
    LeaseRevoked,
    Once,
    Put,
    PutResult,
    Result,
    Txn,
    encode_command,
)
from dengine.kv.store import EXPIRE
from dengine.node import cycle
from dengine.node.node import Node
from dengine.node.watch_hub import Changes, Progress, Selection
from dengine.node.writes import OnceKey, parse_once
from dengine.raft.membership import Membership
from dengine.raft.raft import Raft
from dengine.storage.state_store import StateStore
from tests.node.alone import alone, deadline
from tests.node.hosts import on_loop, until


async def write(node: Node, command: Effect, once: str | None = None) -> Result:
    key = None if once is None else parse_once(once)
    return await node.write(command, deadline(), key)


def test_keys_expire_without_anybody_writing(tmp_path: Path) -> None:
    """The node proposes the tick by itself when the first key is due, and stops when none is."""

    async def check() -> None:
        async with alone(tmp_path) as node:
            await write(node, ExpiringPut(b"k", b"v", None, 1))
            record = node.state.get(b"k")
            assert record is not None
            assert node.lifetimes.remaining_s(record) == 1
            began = node.raft.clock_ms
            await until(lambda: node.state.get(b"k") is None, "the key to expire")
            assert node.raft.clock_ms - began >= 900
            assert node.state.next_due_ms is None
            last = node.raft.log.last_index
            await asyncio.sleep(0.2)
            assert node.raft.log.last_index == last

    on_loop(check)


def test_a_lease_through_the_node(tmp_path: Path) -> None:
    async def check() -> None:
        async with alone(tmp_path) as node:
            granted = await write(node, LeaseGrant(60))
            assert isinstance(granted, LeaseResult)
            await write(node, ExpiringPut(b"k", b"v", None, 0, granted.lease))
            assert await write(node, LeaseKeepAlive(granted.lease)) == granted
            view = node.lifetimes.lease(granted.lease)
            assert (view.ttl_s, view.keys) == (60, [b"k"])
            assert 55 <= view.remaining_s <= 60
            assert await write(node, LeaseRevoke(granted.lease)) == LeaseRevoked(2, 1, False)
            with pytest.raises(NotFound):
                node.lifetimes.lease(granted.lease)

    on_loop(check)


def test_first_results_and_log_time_survive_a_restart(tmp_path: Path) -> None:
    """And what was due while the node was down is due still, not for ever and not anew."""

    async def check() -> None:
        async with alone(tmp_path) as node:
            assert await write(node, Put(b"k", b"1"), "client:1") == PutResult(1, True)
            await write(node, ExpiringPut(b"t", b"", None, 2))
            clock_ms = node.state.clock_ms
        async with alone(tmp_path) as node:
            assert node.raft.clock_ms >= clock_ms > 0
            assert await write(node, Put(b"k", b"1"), "client:1") == PutResult(1, True)
            record = node.state.get(b"k")
            assert record is not None
            assert record.version == 1
            await until(lambda: node.state.get(b"t") is None, "the key to expire")

    on_loop(check)


def test_a_node_alone_loses_little_time_by_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody counts on while it is down: so the log hears of the time more often than among
    others, and of all of it at a clean stop."""

    async def check() -> None:
        monkeypatch.setattr(cycle, "TICK_MS", 100)
        async with alone(tmp_path) as node:
            await write(node, ExpiringPut(b"k", b"", None, 600))
            began = node.state.clock_ms
            await until(lambda: node.state.clock_ms >= began + 200, "ticks")
            monkeypatch.setattr(cycle, "TICK_MS", 10_000)
            before = node.state.clock_ms
            await until(lambda: node.raft.clock_ms > before + 300, "time to pass")
            stopped_ms = node.raft.clock_ms
        async with alone(tmp_path) as node:
            assert node.state.clock_ms >= stopped_ms
            (entry,) = node.config.cluster.initial_cluster
            address = entry.address  # another one than before, which it tells the log
            await until(lambda: node.raft.membership.members[0].address == address, "its address")
            await write(node, Delete(b"k"))
            last = node.raft.log.last_index
        assert node.raft.log.last_index == last  # where nothing can expire, time does not matter

    on_loop(check)


def test_a_watch_through_the_node(tmp_path: Path) -> None:
    async def check() -> None:
        async with alone(tmp_path) as node:
            await write(node, Put(b"a", b"1"))
            watch = await node.watch(Selection(b"", True), 1, prev=True, deadline=deadline())
            await write(node, Delete(b"a"))
            messages = [await anext(watch) for _ in range(3)]
            assert messages[0] == Progress(0)
            assert [m.revision for m in messages if isinstance(m, Changes)] == [1, 2]
            await watch.aclose()

    on_loop(check)


def test_what_one_entry_cannot_do_is_done_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody sees that an entry had work enough: all writes succeed."""
    monkeypatch.setattr(recorder, "WORK_KEYS_MAX", 3)

    async def check() -> None:
        async with alone(tmp_path) as node:
            results = await asyncio.gather(*(write(node, Put(b"%d" % n, b"")) for n in range(20)))
            assert sorted(r.revision for r in results if isinstance(r, PutResult)) == [
                *range(1, 21)
            ]
            assert node.local_status()["pending_writes"] == 0

    on_loop(check)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (Put(b"", b""), InvalidRequest),
        (Put(b"k" * 512, b""), TooLarge),
        (Put(b"k", b"v" * (2**20 + 1)), TooLarge),
        (ExpiringPut(b"k" * 512, b"", None, 5), TooLarge),
        (Delete(b"k" * 2**23), TooLarge),
        (Txn((Compare(b"k" * 512, "exists", "=", True),), (), ()), TooLarge),
        (Txn((), (Get(b"k" * 512),), ()), TooLarge),
        (Txn((), tuple(Put(b"%d" % n, b"v" * 2**20) for n in range(5)), ()), TooLarge),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, type) else v.__name__,
)
def test_nothing_oversized_gets_into_the_log(
    tmp_path: Path, command: Effect, error: type[Exception]
) -> None:
    """Whoever comes with a command, and not through HTTP, meets the same limits."""

    async def check() -> None:
        async with alone(tmp_path) as node:
            last = node.raft.log.last_index
            with pytest.raises(error):
                await write(node, command)
            assert node.raft.log.last_index == last

    on_loop(check)


def test_a_low_disk_lets_through_what_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deletions and leases down to half of the reserve, or all leases would end together;
    below that nothing, not even ticks."""

    async def check() -> None:
        async with alone(tmp_path) as node:
            await write(node, Put(b"k", b""))
            granted = await write(node, LeaseGrant(60))
            assert isinstance(granted, LeaseResult)
            free = {"has": False, "half": True}
            room = node.snapshots.room
            monkeypatch.setattr(room, "has", lambda size: free["has"])
            monkeypatch.setattr(room, "has_half", lambda: free["half"])
            node.writes.look_at_disk()
            with pytest.raises(DiskFull):
                await write(node, Put(b"k", b""))
            with pytest.raises(DiskFull):
                await write(node, Put(b"k", b""), "c:1")
            assert isinstance(await write(node, LeaseKeepAlive(granted.lease)), LeaseResult)
            assert await write(node, Delete(b"k"), "c:2") == DeleteResult(2, 1)
            free["half"] = False
            node.writes.look_at_disk()
            with pytest.raises(DiskFull):
                await write(node, Delete(b"k"))
            free.update(has=True, half=True)
            node.writes.look_at_disk()
            await write(node, Put(b"k", b""))

    on_loop(check)


def members_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is undone, every node sees members that run the release before."""
    membership = Raft.membership.fget  # type: ignore[attr-defined]

    def older(raft: Raft) -> Membership:
        now: Membership = membership(raft)
        members = tuple(msgspec.structs.replace(m, command_version=1) for m in now.members)
        return msgspec.structs.replace(now, members=members)

    monkeypatch.setattr(Raft, "membership", property(older))


def test_nothing_new_while_a_member_is_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster half way through an upgrade says who is missing, and goes on as it did."""

    async def check() -> None:
        members_are_old(monkeypatch)
        async with alone(tmp_path) as node:
            assert await write(node, Put(b"k", b"v")) == PutResult(1, True)
            assert node.state.totals is None
            for command, once in ((ExpiringPut(b"k", b"", None, 5), None), (Put(b"k", b""), "c:1")):
                with pytest.raises(ClusterUnavailable, match="node 1 has an older one"):
                    await write(node, command, once)
            with pytest.raises(ClusterUnavailable):
                await node.watch(Selection(b"", True), None, prev=False, deadline=deadline())
            monkeypatch.undo()
            assert await write(node, ExpiringPut(b"k", b"", None, 60)) == PutResult(2, False)
            assert node.state.totals is not None

    on_loop(check)


def test_a_leader_refuses_what_others_take_for_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A follower may know of a membership that this leader never gets: in an entry of version 1
    what it forwards could not be read."""

    async def check() -> None:
        members_are_old(monkeypatch)
        async with alone(tmp_path) as node:
            for command in (
                Once("c", 1, b"f" * 16, Put(b"k", b"")),
                ExpiringPut(b"k", b"", None, 5),
            ):
                with pytest.raises(ClusterUnavailable) as caught:
                    await node.write_here(encode_command(command), deadline())
                assert caught.value.outcome == "none"

    on_loop(check)


def test_once_all_members_are_new_the_log_says_so_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has to write for that; and who would watch before it is so waits, or misses what is
    still to be applied of the format that records no changes."""

    async def check() -> None:
        members_are_old(monkeypatch)
        async with alone(tmp_path) as node:
            await write(node, Put(b"k", b"v"))
            node._cycle.may_tick = False
            monkeypatch.undo()
            opening = asyncio.create_task(
                node.watch(Selection(b"", True), None, prev=False, deadline=deadline())
            )
            await node.read_barrier("linearizable", deadline())
            await node.read_barrier("linearizable", deadline())
            assert not opening.done()
            with pytest.raises(ClusterUnavailable, match="try again"):
                await node.watch(Selection(b"", True), None, prev=False, deadline=0)
            node._cycle.may_tick = True
            watch = await opening
            assert node.state.totals is not None
            assert (node.state.revision, await anext(watch)) == (1, Progress(1))

    on_loop(check)


def test_mass_expiry_goes_in_pieces(tmp_path: Path) -> None:
    """The node proposes one tick after the other while more is due, and none does too much."""

    async def check() -> None:
        async with alone(tmp_path) as node:
            watch = await node.watch(Selection(b"", True), None, prev=False, deadline=deadline())
            expired: list[int] = []

            async def follow() -> None:
                while sum(expired) < 5000:
                    message = await anext(watch)
                    if isinstance(message, Changes) and message.events[0].kind == EXPIRE:
                        expired.append(len(message.events))

            following = asyncio.create_task(follow())
            puts = [ExpiringPut(b"%05d" % n, b"", None, 1) for n in range(5000)]
            await asyncio.gather(*(write(node, put) for put in puts))
            async with asyncio.timeout(60):
                await following
            assert max(expired) <= 1000
            assert node.state.page(b"", None, 10, True).items == []
            assert node.state.next_due_ms is None
            await watch.aclose()

    on_loop(check)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("c:1", OnceKey("c", 1)),
        ("a:b:17", OnceKey("a:b", 17)),
        ("c:0", OnceKey("c:0")),
        ("c:01", OnceKey("c:01")),
        ("c:", OnceKey("c:")),
        (":1", OnceKey(":1")),
        ("c:x", OnceKey("c:x")),
        ("plain", OnceKey("plain")),
        (f"c:{2**63}", OnceKey(f"c:{2**63}")),
    ],
)
def test_two_forms_of_keys(text: str, key: OnceKey) -> None:
    """CLIENT:N, where N is a number that may grow; all else stands for itself."""
    assert parse_once(text) == key


@pytest.mark.parametrize("text", ["", "x" * 129, "a b", "ü", "a\n"])
def test_what_is_no_key(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_once(text)


def test_a_turn_applies_for_a_while_and_goes_on_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much is committed, heartbeats are due in between."""
    calls: list[int] = []
    real: Callable[..., list[list[Result]]] = StateStore.apply

    def counted(self: StateStore, entries: object, go_on: Callable[[], bool]) -> object:
        done = real(self, entries, lambda: False)
        calls.append(len(done))
        return done

    async def check() -> None:
        async with alone(tmp_path) as node:
            monkeypatch.setattr(StateStore, "apply", counted)
            for n in range(10):
                await write(node, Put(b"%d" % n, b""))
            assert set(calls) == {1}

    on_loop(check)
