"""Watches: every change once and in order, whoever is slow, however the state is replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dengine.errors import Compacted, FatalError, WatchOverflow
from dengine.kv.commands import Command, Delete, Put, Txn, encode_batch, encode_command
from dengine.kv.store import Change
from dengine.node import watch_hub
from dengine.node.watch_hub import Cancelled, Changes, Message, Progress, Selection, Watch, WatchHub
from dengine.node.watch_index import Bucket, WatchIndex
from dengine.raft.membership import Membership, Settings
from dengine.raft.types import Entry, EntryKind, MemberId
from dengine.storage.state_store import StateStore
from tests.node.hosts import on_loop, until
from tests.node.hubs import bare_hub, told
from tests.storage.states import config, membership

ALL = Selection(b"", True)


def content(kept: int) -> Membership:
    made = membership(MemberId(1, 1))
    rules = Settings(history_revisions=kept)
    return Membership(made.cluster_id, made.voters, members=made.members, settings=rules)


class Stage:
    """A state, its hub, and entries that are applied to both."""

    def __init__(self, path: Path, *, kept: int = 1000, watchers: int = 100) -> None:
        self.state = StateStore(path)
        self.state.apply([config(1, content(kept))])
        self.failed: list[FatalError] = []
        self.watchers = watchers
        self.index = 1

    def open(self) -> WatchHub:
        self.hub = WatchHub(self.state, self.watchers, self.failed.append)
        return self.hub

    def apply(self, *commands: Command) -> None:
        apply(self.state, self.index + 1, commands)
        self.index += 1
        self.hub.applied()


def apply(state: StateStore, index: int, commands: Sequence[Command]) -> None:
    data = encode_batch([encode_command(command) for command in commands], index * 10)
    state.apply([Entry(index, 1, EntryKind.NORMAL, data)])


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path / "state")
    yield made
    made.state.close()
    assert made.failed == []


async def read(watch: Watch, count: int) -> list[Message]:
    async with asyncio.timeout(10):
        return [await anext(watch) for _ in range(count)]


def seen(messages: Sequence[Message]) -> list[tuple[int, list[bytes]]]:
    return [(m.revision, [e.key for e in m.events]) for m in messages if isinstance(m, Changes)]


def test_a_live_watch_hears_each_revision_once(stage: Stage) -> None:
    """Whole transactions in one message, and nothing of other keys."""

    async def check() -> None:
        hub = stage.open()
        stage.apply(Put(b"a/1", b""))
        watch = hub.open(Selection(b"a/", True), None)
        stage.apply(Put(b"a/1", b""), Put(b"b", b""), Put(b"a/2", b""))
        stage.apply(Txn((), (Put(b"a/3", b""), Put(b"b", b""), Delete(b"a/1")), ()))
        first, *rest = await read(watch, 4)
        assert first == Progress(1)
        assert seen(rest) == [(2, [b"a/1"]), (4, [b"a/2"]), (5, [b"a/3", b"a/1"])]
        watch.close()
        assert hub.count == 0
        assert stage.state.keep_changes is False
        await hub.close()

    on_loop(check)


def test_nothing_is_kept_where_nobody_watches(stage: Stage) -> None:
    async def check() -> None:
        stage.open()
        stage.apply(Put(b"a", b""))
        assert stage.state.take_changes() == []
        await stage.hub.close()

    on_loop(check)


def test_what_was_before_and_whether_it_is_new(stage: Stage) -> None:
    async def check() -> None:
        watch = stage.open().open(Selection(b"k", False), None, prev=True)
        stage.apply(Put(b"k", b"1"), Put(b"k", b"2"), Delete(b"k"), Put(b"kk", b""))
        _, one, two, three = await read(watch, 4)
        assert isinstance(one, Changes)
        assert isinstance(two, Changes)
        assert isinstance(three, Changes)
        told = [m.events[0] for m in (one, two, three)]
        assert [e.record and e.record.version for e in told] == [1, 2, None]
        assert [e.prev and e.prev.value for e in told] == [None, b"1", b"2"]
        await stage.hub.close()

    on_loop(check)


def test_resuming_misses_nothing_and_repeats_nothing(stage: Stage) -> None:
    """From any revision, while writes go on: history first, then live, with no gap between."""

    async def check() -> None:
        hub = stage.open()
        for n in range(300):
            stage.apply(Put(b"k%d" % (n % 3), b"%d" % n))
        watches = [hub.open(ALL, first) for first in (1, 150, 300, 301)]
        for n in range(300, 350):
            stage.apply(Put(b"k%d" % (n % 3), b"%d" % n))
            await asyncio.sleep(0)
        for watch, first in zip(watches, (1, 150, 300, 301), strict=True):
            progress, *rest = await read(watch, 1 + 350 - first + 1)
            assert progress == Progress(first - 1)
            assert [m.revision for m in rest] == list(range(first, 351))
        await hub.close()

    on_loop(check)


def test_progress_names_only_what_is_applied_and_delivered(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first, and then at intervals. One who asks for the future, perhaps of a node that lags,
    is told of the present, and gets nothing from before what it has asked for."""
    monkeypatch.setattr(watch_hub, "PROGRESS_S", 0.01)

    async def check() -> None:
        hub = stage.open()
        stage.apply(Put(b"a", b""))
        future, other = hub.open(ALL, 4), hub.open(Selection(b"zzz", False), None)
        assert await read(future, 2) == [Progress(1), Progress(1)]
        stage.apply(Put(b"a", b""))
        assert await read(other, 2) == [Progress(1), Progress(2)]
        while (await read(future, 1)) != [Progress(2)]:
            pass
        stage.apply(Put(b"a", b""))
        stage.apply(Put(b"b", b""))
        messages: list[Message] = []
        while not seen(messages):
            messages += await read(future, 1)
        assert seen(messages) == [(4, [b"b"])]
        await hub.close()

    on_loop(check)


def test_the_history_has_an_end(tmp_path: Path) -> None:
    """Further back than it goes, a watch is refused, and told from where on it would not be."""
    stage = Stage(tmp_path / "state", kept=5)

    async def check() -> None:
        hub = stage.open()
        for _ in range(20):
            stage.apply(Put(b"a", b""))
        with pytest.raises(Compacted) as caught:
            hub.open(ALL, 15)
        assert caught.value.details == {"compact_revision": 15}
        assert seen(await read(hub.open(ALL, 16), 6))[0] == (16, [b"a"])
        await hub.close()

    on_loop(check)
    stage.state.close()


def test_one_that_is_overtaken_by_the_end_of_the_history_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_hub, "CATCH_UP_REVISIONS", 2)
    stage = Stage(tmp_path / "state", kept=10)

    async def check() -> None:
        hub = stage.open()
        for _ in range(10):
            stage.apply(Put(b"a", b""))
        watch = hub.open(ALL, 1)
        await until(lambda: watch.waiting >= 2, "the first step")
        for _ in range(20):
            stage.apply(Put(b"a", b""))
        messages = await read(watch, 3)
        while not isinstance(messages[-1], Cancelled):
            messages += await read(watch, 1)
        assert messages[-1].compact_revision == 20
        numbers = [revision for revision, _ in seen(messages)]
        assert numbers == list(range(1, len(numbers) + 1))
        with pytest.raises(StopAsyncIteration):
            await anext(watch)
        await hub.close()

    on_loop(check)
    stage.state.close()


@pytest.mark.parametrize("limit", ["QUEUE_MAX", "QUEUE_BYTES_MAX"])
def test_one_that_falls_behind_goes_on_from_the_history(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """A burst that is larger than what may wait, as of one entry with a thousand commands, costs
    its reader nothing: it gets all of it, in order, and bounded memory holds what waits."""
    monkeypatch.setattr(watch_hub, limit, 5 if limit == "QUEUE_MAX" else 500)

    async def check() -> None:
        hub = stage.open()
        slow, quick = hub.open(ALL, None), hub.open(Selection(b"a", False), None)
        await read(quick, 1)
        got: list[Message] = []
        for _ in range(10):
            stage.apply(Put(b"a", b"x" * 20), Put(b"b", b""))
            got += await read(quick, 1)
            assert slow.waiting <= 8
        assert [revision for revision, _ in seen(got)] == list(range(1, 21, 2))
        assert [revision for revision, _ in seen(await read(slow, 21))] == list(range(1, 21))
        stage.apply(Put(b"a", b""))
        assert seen(await read(slow, 1)) == [(21, [b"a"])]
        await hub.close()

    on_loop(check)


def test_a_reader_that_takes_nothing_is_cancelled_and_keeps_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told why, and can resume behind what it has seen; those that read go on."""
    monkeypatch.setattr(watch_hub, "PROGRESS_S", 0.02)

    async def check() -> None:
        hub = stage.open()
        stalled, reading = hub.open(ALL, None), hub.open(ALL, None)
        taken: list[Message] = []

        async def take() -> None:
            async for message in reading:
                taken.append(message)

        reader = asyncio.create_task(take())
        for _ in range(3):
            stage.apply(Put(b"a", b""))
        await until(lambda: hub.count == 1, "the stalled one to be ended")
        (cancelled,) = await read(stalled, 1)
        assert isinstance(cancelled, Cancelled)
        assert "too slow" in cancelled.reason
        assert [revision for revision, _ in seen(taken)] == [1, 2, 3]
        await hub.close()
        await reader
        assert isinstance(taken[-1], Cancelled)

    on_loop(check)


def test_a_burst_in_one_entry_cancels_nobody(tmp_path: Path) -> None:
    """As long as the history has what found no room."""

    async def check() -> None:
        stage = Stage(tmp_path / "state", kept=10_000)
        watch = stage.open().open(ALL, None)
        stage.apply(*(Put(b"%d" % n, b"") for n in range(1024)))
        stage.apply(*(Put(b"%d" % n, b"") for n in range(1024)))
        messages = await read(watch, 2049)
        assert [revision for revision, _ in seen(messages)] == list(range(1, 2049))
        await stage.hub.close()
        stage.state.close()
        assert stage.failed == []

    on_loop(check)


def test_a_single_large_revision_is_let_through(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_hub, "QUEUE_BYTES_MAX", 100)

    async def check() -> None:
        watch = stage.open().open(ALL, None)
        await read(watch, 1)
        stage.apply(Put(b"a", b"x" * 1000))
        assert seen(await read(watch, 1)) == [(1, [b"a"])]
        await stage.hub.close()

    on_loop(check)


def test_readers_of_the_same_share_one_message(stage: Stage) -> None:
    """A thousand watchers of a key keep one copy of its value, and of its text."""

    async def check() -> None:
        hub = stage.open()
        watches = [hub.open(s, None) for s in (ALL, ALL, Selection(b"a", False))]
        stage.apply(Put(b"a", b""))
        got = [(await read(watch, 2))[1] for watch in watches]
        assert got[0] is got[1] is got[2]
        await hub.close()

    on_loop(check)


def test_a_large_revision_is_looked_at_once_however_many_follow_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told in the very turn that applies it, and heartbeats wait for that."""
    looked_up: list[bytes] = []
    find = WatchIndex.find

    def counted(index: WatchIndex[Watch], key: bytes) -> Iterator[Bucket[Watch]]:
        looked_up.append(key)
        for bucket in find(index, key):
            looked_up.append(key)
            yield bucket

    monkeypatch.setattr(WatchIndex, "find", counted)

    async def check() -> None:
        hub = stage.open()
        watches = [hub.open(Selection(b"a/", True), None) for _ in range(50)]
        watches += [hub.open(Selection(b"a/7", False), None) for _ in range(50)]
        stage.apply(Txn((), tuple(Put(b"a/%d" % n, b"") for n in range(100)), ()))
        got = [(await read(watch, 2))[1] for watch in watches]
        assert len(looked_up) == 201  # not 5050 and more
        assert len(set(map(id, got))) == 2
        assert seen([got[0], got[-1]]) == [
            (1, [b"a/%d" % n for n in range(100)]),
            (1, [b"a/7"]),
        ]
        await hub.close()

    on_loop(check)


def test_all_that_catch_up_share_what_is_read(tmp_path: Path) -> None:
    """Hundreds that resume at once, from here and there, cost little more than one: else those of
    a busy cluster never catch up. What is not selected takes no room, and no time of others."""
    stage = Stage(tmp_path / "state", kept=10_000)
    reads: list[int] = []
    history = stage.state.history

    def counted(revision: int, revisions: int, size: int) -> tuple[list[Change], int]:
        reads.append(revision)
        return history(revision, revisions, size)

    stage.state.history = counted  # type: ignore[method-assign]

    async def check() -> None:
        hub = stage.open()
        for n in range(8):
            stage.apply(*(Put(b"%d/%d" % (k % 5, n), b"") for k in range(500)))
        firsts = [1 + 37 * n for n in range(100)]
        watches = [hub.open(Selection(b"%d/" % (n % 6), True), firsts[n]) for n in range(100)]
        for n, (watch, first) in enumerate(zip(watches, firsts, strict=True)):
            wanted = [r for r in range(first, 4001) if (r - 1) % 5 == n % 6]
            got = await read(watch, 1 + len(wanted))
            assert got[0] == Progress(first - 1)
            assert [revision for revision, _ in seen(got)] == wanted
        assert len(reads) < 40  # it was one for each of them, and for every 100 revisions
        await until(lambda: all(w.position == 4001 for w in watches), "all to be live")
        await hub.close()

    on_loop(check)
    stage.state.close()


def test_one_that_catches_up_is_told_how_far_it_is(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for a rare key has to know from where to resume, or begins at the start again
    after each interruption."""
    monkeypatch.setattr(watch_hub, "PROGRESS_S", 0.01)
    monkeypatch.setattr(watch_hub, "CATCH_UP_S", 0.001)
    monkeypatch.setattr(
        WatchHub, "_sort_in", lambda hub, watch: hub._catching.update({watch: None})
    )

    async def check() -> None:
        hub = stage.open()
        for _ in range(20):
            stage.apply(Put(b"a", b""))
        watch = hub.open(Selection(b"b", False), 5)
        assert await read(watch, 2) == [Progress(4), Progress(4)]
        hub._advance(watch.position, 0.0)
        assert await read(watch, 1) == [Progress(5)]
        await hub.close()

    on_loop(check)


@pytest.mark.parametrize("first", [None, 1])
def test_what_was_before_waits_only_for_those_who_want_it(stage: Stage, first: int | None) -> None:
    """Live, and from the history: it may be as large as what is there now."""

    async def check() -> None:
        hub = stage.open()
        with_prev = hub.open(ALL, first, prev=True)
        without = [hub.open(ALL, first), hub.open(Selection(b"a", False), first)]
        stage.apply(Put(b"a", b"1"))
        stage.apply(Put(b"a", b"2"))
        (told,) = [m for m in await read(with_prev, 3) if m.revision == 2]
        assert isinstance(told, Changes)
        assert told.events[0].prev is not None
        for watch in without:
            (told,) = [m for m in await read(watch, 3) if m.revision == 2]
            assert isinstance(told, Changes)
            assert [(e.key, e.prev) for e in told.events] == [(b"a", None)]
        await hub.close()

    on_loop(check)


def test_what_waits_for_all_of_them_is_bounded(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand slow readers of a thousand keys keep no more than a few do; nobody misses
    anything, and one that reads goes on. What several wait for is there once, and counts once."""
    monkeypatch.setattr(watch_hub, "QUEUES_BYTES_MAX", 20_000)

    async def check() -> None:
        hub = stage.open()
        watches = [hub.open(Selection(b"%d" % (n % 10), False), None) for n in range(20)]
        quick = hub.open(ALL, None)
        got: list[Message] = []
        for turn in range(20):
            for n in range(10):
                stage.apply(Put(b"%d" % n, b"x" * 1000))
                got += await read(quick, 1)
                assert hub._bytes < 24_000
            assert turn or hub._bytes > 10_000
        got += await read(quick, 201 - len(got))
        assert [revision for revision, _ in seen(got)] == list(range(1, 201))
        for n, watch in enumerate(watches):
            wanted = [(r, [b"%d" % (n % 10)]) for r in range(1 + n % 10, 201, 10)]
            assert seen(await read(watch, 21)) == wanted
        for watch in (quick, *watches):
            watch.done()
        assert hub._bytes == 0
        for watch in watches[:10]:
            stage.apply(Put(watch.selection.key, b"x"))
            watch.close()
        watches[11].cancel("")
        await hub.close()
        assert hub._bytes == 0

    on_loop(check)


def test_what_is_being_read_counts(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that is long at a message gets no second one meanwhile where much is kept already:
    its next ones wait in the history."""
    monkeypatch.setattr(watch_hub, "QUEUES_BYTES_MAX", 1000)

    async def check() -> None:
        hub = stage.open()
        watches = [hub.open(Selection(b"%d" % n, False), None) for n in range(10)]
        for watch in watches:
            await read(watch, 1)
            watch.done()
        for _ in range(3):
            stage.apply(*(Put(b"%d" % n, b"x" * 1000) for n in range(10)))
        got = [await read(watch, 1) for watch in watches]
        size = hub._bytes
        assert size > 10 * 1000
        assert not hub._step(), "nobody has room"
        assert hub._bytes == size
        watches[0].done()
        assert hub._bytes == size * 9 // 10
        for n, watch in enumerate(watches):
            got[n] += await read(watch, 2)
            assert [revision for revision, _ in seen(got[n])] == [n + 1, n + 11, n + 21]
        await hub.close()

    on_loop(check)


def test_too_many_are_refused(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "state", watchers=2)

    async def check() -> None:
        hub = stage.open()
        first = hub.open(ALL, None)
        hub.open(ALL, None)
        with pytest.raises(WatchOverflow):
            hub.open(ALL, None)
        await first.aclose()
        hub.open(ALL, None)
        await hub.close()

    on_loop(check)
    stage.state.close()


def test_a_replaced_state_is_gone_on_with(tmp_path: Path) -> None:
    """A snapshot was installed: what lies between is read from the history that came along."""
    stage = Stage(tmp_path / "state")
    newer = StateStore(tmp_path / "newer")
    newer.apply([config(1, content(1000))])
    for index in range(2, 40):
        apply(newer, index, [Put(b"k", b"")])
    newer.close()

    async def check() -> None:
        hub = stage.open()
        for _ in range(5):
            stage.apply(Put(b"k", b""))
        live, behind = hub.open(ALL, None), hub.open(ALL, 2)
        stage.state.replace(tmp_path / "newer")
        hub.applied()
        assert [r for r, _ in seen(await read(live, 34))] == list(range(6, 39))
        assert [r for r, _ in seen(await read(behind, 38))] == list(range(2, 39))
        apply(stage.state, 40, [Put(b"k", b"")])
        hub.applied()
        assert seen(await read(live, 1)) == [(39, [b"k"])]
        await hub.close()

    on_loop(check)
    stage.state.close()


def test_a_state_that_is_built_anew_ends_the_watches(tmp_path: Path) -> None:
    """It goes through old revisions again: who is told of that goes elsewhere meanwhile."""
    stage = Stage(tmp_path / "state")
    StateStore(tmp_path / "empty").close()

    async def check() -> None:
        hub = stage.open()
        stage.apply(Put(b"k", b""))
        watch = hub.open(ALL, None)
        stage.state.replace(tmp_path / "empty")
        stage.state.apply([config(1, content(1000))])
        hub.applied()
        (cancelled,) = await read(watch, 1)
        assert isinstance(cancelled, Cancelled)
        assert hub.count == 0
        await hub.close()

    on_loop(check)
    stage.state.close()


@pytest.mark.parametrize("turns", [0, 10])
def test_a_state_that_was_empty_for_a_moment_skips_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """One that catches up while the state is thrown away, and had again from a snapshot: it goes on
    where it was, or is told to go elsewhere. In between it must not be taken for up to date."""
    monkeypatch.setattr(watch_hub, "CATCH_UP_S", 0.0)
    stage = Stage(tmp_path / "state")
    StateStore(tmp_path / "empty").close()
    newer = StateStore(tmp_path / "newer")
    newer.apply([config(1, content(1000))])
    for index in range(2, 122):
        apply(newer, index, [Put(b"k", b"")])
    newer.close()

    async def check() -> None:
        hub = stage.open()
        for _ in range(50):
            stage.apply(Put(b"k", b""))
        watch = hub.open(ALL, 10)
        stage.state.replace(tmp_path / "empty")
        for _ in range(turns):  # of the loop, before the cycle comes to tell of it
            await asyncio.sleep(0)
        stage.state.replace(tmp_path / "newer")
        hub.applied()
        got = await read(watch, 1)
        while not isinstance(got[-1], Cancelled) and len(got) < 112:
            got += await read(watch, 1)
        assert isinstance(got[-1], Cancelled) == bool(turns)
        revisions = [revision for revision, _ in seen(got)]
        assert revisions == list(range(10, 10 + len(revisions)))
        await hub.close()

    on_loop(check)
    stage.state.close()


def test_closing_ends_them_all(stage: Stage) -> None:
    async def check() -> None:
        hub = stage.open()
        watch = hub.open(ALL, None)
        await read(watch, 1)
        reading = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        await hub.close()
        assert isinstance(await reading, Cancelled)

    on_loop(check)


def found(index: WatchIndex[str], key: bytes) -> list[str]:
    return sorted(name for bucket in index.find(key) for name in bucket.things)


def test_the_index_finds_what_selects_a_key() -> None:
    """Exactly those, whatever came and went before."""
    index = WatchIndex[str]()
    chosen = {
        "all": Selection(b"", True),
        "a": Selection(b"a", True),
        "a again": Selection(b"a", True),
        "abc": Selection(b"abc", True),
        "key ab": Selection(b"ab", False),
    }
    for name, selection in chosen.items():
        index.add(selection, name)
    assert found(index, b"ab") == ["a", "a again", "all", "key ab"]
    assert found(index, b"abcd") == ["a", "a again", "abc", "all"]
    assert found(index, b"b") == ["all"]
    for key in (b"ab", b"abcd", b"", b"b"):
        assert found(index, key) == sorted(n for n, s in chosen.items() if s.holds(key))
    assert len(list(index.find(b"abcd"))) == 3  # those that select the same are found at once
    for name, selection in chosen.items():
        assert index
        index.discard(selection, name)
        index.discard(selection, name)
    assert not index
    assert list(index.find(b"ab")) == []


def test_nobody_goes_on_from_what_a_wrong_state_has_told() -> None:
    """Its revisions may not be those of the others: who resumed from one could miss a change."""

    async def test() -> None:
        hub = bare_hub()
        watches = [told(hub), told(hub)]
        hub._state.revision = 7
        hub.distrusted()
        for watch in watches:
            assert watch.over
            assert isinstance(watch._queue[-1], Cancelled)
            assert watch._queue[-1].compact_revision == 7

    on_loop(test)
