"""The nine guarantees of a watch, each held against streams recorded from real nodes while
leaders were killed, a node came back by a snapshot, readers slept and the history was cut.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.cluster import Cluster, ServeProcess, static_cluster, wait_for
from tests.integration.retrying import Retrying
from tests.integration.watching import (
    PREFIXES,
    Done,
    Message,
    Recorder,
    Writers,
    changed_key,
)

pytestmark = pytest.mark.timeout(900)
QUICK = "[raft.snapshot]\nentries = 400\nretained_log_entries = 50\n"
INSTALLED = "installed"
MORE_THAN_WAITS = 10 * 2**20  # bytes; what kernels and nodes hold for one who does not read
KEPT = 60  # revisions, once the history is cut
Events = dict[str, dict[str, Any]]  # of one revision, by key


@dataclass
class Recording:
    """What was recorded up to revision `end`, when nothing changed any more."""

    everything: Recorder
    others: dict[Callable[[str], bool], Recorder]  # by what each selects
    done: list[Done]
    slow: Recorder
    slow_behind: int = 0  # revisions, when it began to read again
    end: int = 0
    items: dict[str, str] = field(default_factory=dict)  # at `end`
    resumed: list[Recorder] = field(default_factory=list)  # afterwards, from anywhere
    # After the history was cut, up to `cut_end`.
    stalled: Recorder | None = None  # has read nothing for most of the time
    beyond: Recorder | None = None  # asked for what is gone
    kept: Recorder | None = None  # and for what is not
    cut_end: int = 0

    @property
    def whole(self) -> list[tuple[Callable[[str], bool], Recorder]]:
        """All that have followed from the first revision to the last one."""
        return [
            (lambda _: True, self.everything),
            *self.others.items(),
            (lambda _: True, self.slow),
        ]

    def selected(self, holds: Callable[[str], bool]) -> list[tuple[int, Events]]:
        """The revisions of the reference that change such keys, and what they change of them."""
        changes = ((m.revision, events_of(m)) for m in self.everything.changes)
        chosen = ((r, {k: e for k, e in events.items() if holds(k)}) for r, events in changes)
        return [(revision, events) for revision, events in chosen if events]


def events_of(message: Message) -> Events:
    events = message.data["events"]
    found = {changed_key(event): event for event in events}
    assert len(found) == len(events), f"a key twice in one revision: {message}"
    return found


def without_prev(changes: list[tuple[int, Events]]) -> list[tuple[int, Events]]:
    return [
        (r, {k: {n: v for n, v in e.items() if not n.startswith("prev")} for k, e in ev.items()})
        for r, ev in changes
    ]


def told(recorder: Recorder) -> list[tuple[int, Events]]:
    return [(message.revision, events_of(message)) for message in recorder.changes]


# --- the recording --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    seed = int(os.environ.get("DENGINE_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"DENGINE_TEST_SEED={seed}")
    with Cluster(tmp_path_factory.mktemp("watch")) as cluster:
        try:
            yield record(static_cluster(cluster, 1, 2, 3, extra=QUICK), seed)
        finally:
            print(cluster.describe())


def record(cluster: Cluster, seed: int) -> Recording:
    nodes, rng = list(cluster.nodes.values()), random.Random(seed)

    def follow(query: str, *, small: bool = False) -> Recorder:
        return Recorder(nodes, query, rng.randrange(2**32), small=small).start()

    writers = Writers(nodes, seed)
    made = Recording(
        follow("prefix=&prev=1"),
        {
            (lambda _: True): follow("prefix="),
            (lambda key: key == "a"): follow("key=a&prev=1"),
            (lambda key: key == "a/"): follow("key=a%2F"),
            (lambda key: key == "a/7"): follow("key=a%2F7&prev=1"),
            (lambda key: key.startswith("a/1")): follow("prefix=a%2F1&prev=1"),
            (lambda key: key.startswith("a/")): follow("prefix=a/"),
            (lambda key: key.startswith("ä")): follow("prefix=%C3%A4&prev=1"),
            (lambda key: key == "none"): follow("key=none"),
        },
        writers.done,
        follow("prefix=&prev=1", small=True),
    )
    made.stalled = follow("prefix=a", small=True)
    wait_for(lambda: made.slow.connections and made.stalled.connections, "all to follow")
    for sleeper in (made.slow, made.stalled):
        sleeper.resting.set()
    writers.start()
    writers.more(100)
    disturb(cluster, made, writers, rng)
    writers.more(50)
    wait_for(lambda: writers.written_bytes > MORE_THAN_WAITS, "enough to be written", 120)
    writers.stop()
    made.end, made.items = at_rest(cluster)
    made.slow_behind = made.end - made.slow.position
    made.slow.resting.clear()
    for _, recorder in made.whole:
        recorder.stop_behind(made.end)
    for _, recorder in made.whole:
        recorder.join()
    made.resumed = [resume(node, made.end, rng, n % 2 == 0) for node in nodes for n in range(4)]
    cut_history(cluster, made, rng)
    return made


def disturb(cluster: Cluster, made: Recording, writers: Writers, rng: random.Random) -> None:
    """Leaders are killed, a node is stopped, and one is away until its return needs a snapshot."""
    for _ in range(2):
        leader = cluster.wait_leader()
        leader.kill()
        writers.more(60)
        leader.start()
        cluster.wait_leader()
    stopped = cluster.nodes[made.everything.messages[-1].node_id]
    assert stopped.stop() == 0
    writers.more(30)
    stopped.start()
    leader = cluster.wait_leader()
    away = rng.choice([node for node in cluster.nodes.values() if node is not leader])
    installed, index = away.output().count(INSTALLED), away.status()["last_index"]
    away.kill()

    def purged() -> bool:
        views = [node.call("GET", "/v1/snapshots").json() for node in cluster.running()]
        return all(view["purged_index"] > index for view in views)

    wait_for(purged, "the log to be purged", 180)
    away.start()
    wait_for(lambda: away.output().count(INSTALLED) > installed, "an install", 60)
    cluster.wait_leader().kill()
    writers.more(30)
    for node in cluster.nodes.values():
        if not node.running:
            node.start()
    cluster.wait_leader()


def at_rest(cluster: Cluster) -> tuple[int, dict[str, str]]:
    """The revision at which nothing is left that expires, and all keys then."""

    def settled() -> dict[str, Any]:
        page: dict[str, Any] = cluster.running()[0].call("GET", "/v1/kv?prefix=").json()
        mortal = [item for item in page["items"] if item["ttl"] is not None or item["lease"]]
        return {} if mortal or page["next"] else page

    page = wait_for(settled, "all that expires to be gone", 60)
    return page["revision"], {item["key"]: item["value"] for item in page["items"]}


def resume(node: ServeProcess, end: int, rng: random.Random, by_id: bool) -> Recorder:
    """Follow everything from somewhere on, at this node alone: from a revision, or behind an id."""
    first = rng.randint(1, end)
    seed = rng.randrange(2**32)
    if by_id:
        recorder = Recorder([node], "prefix=&prev=1", seed, last_id=first - 1)
    else:
        recorder = Recorder([node], "prefix=&prev=1", seed, first=first)
    recorder.stop_behind(end)
    recorder.start().join()
    recorder.first = first
    return recorder


def cut_history(cluster: Cluster, made: Recording, rng: random.Random) -> None:
    nodes = list(cluster.nodes.values())
    kept = {"history_revisions": KEPT}
    assert nodes[0].call("PUT", "/v1/cluster/settings", kept).ok
    client = Retrying(nodes, f"cut.{rng.getrandbits(32):08x}", rng)
    for number in range(2 * KEPT):
        reply = client.write("PUT", f"/v1/kv/a/{number % 5}", b"%d" % number)
        assert reply.status == 200, reply
        made.cut_end = reply.json()["revision"]
    client.close()
    cluster.wait_applied()
    made.beyond = Recorder(nodes, "prefix=", 0).start().join()
    assert made.beyond.compact_revision is not None
    made.kept = Recorder(nodes, "prefix=", 0, first=made.beyond.compact_revision + 1)
    made.kept.stop_behind(made.cut_end)
    made.kept.start().join()
    assert made.stalled is not None
    made.stalled.stop_behind(made.cut_end)
    made.stalled.resting.clear()
    made.stalled.join()


# --- what it has to be like -----------------------------------------------------------------------


def test_the_recording_shows_something(recording: Recording) -> None:
    """Streams broke and were told to end, a reader was far behind, and all kinds of events came."""
    recorders = [recorder for _, recorder in recording.whole]
    assert recording.everything.connections > 1
    assert sum(recorder.connections for recorder in recorders) > 1.5 * len(recorders)
    assert any(m.event == "cancelled" for r in recorders for m in r.messages)
    assert recording.slow_behind > recording.end // 2
    kinds = {e["type"] for m in recording.everything.changes for e in m.data["events"]}
    assert kinds == {"put", "delete", "expire"}


def test_ordered(recording: Recording) -> None:
    """Revisions only grow, over all connections of a reader; an id is the revision."""
    for _, recorder in recording.whole:
        revisions = [message.revision for message in recorder.changes]
        assert revisions == sorted(revisions)
        assert all(message.id == message.revision for message in recorder.changes)
        ids = [message.id for message in recorder.messages if message.id is not None]
        assert ids == sorted(ids)


def test_unique(recording: Recording) -> None:
    """No revision comes twice to a reader, and what it was is the same for all of them."""
    seen: dict[int, Events] = dict(told(recording.everything))
    for _, recorder in recording.whole:
        revisions = [message.revision for message in recorder.changes]
        assert len(revisions) == len(set(revisions))
        for revision, events in told(recorder):
            for key, event in events.items():
                assert event.items() <= seen[revision][key].items()


def test_reliable(recording: Recording) -> None:
    """Every acknowledged write is there, as it was written; no revision is missing; and nothing
    else has happened but what time has ended."""
    changes = dict(told(recording.everything))
    assert list(changes) == list(range(1, recording.end + 1))
    written = {done.revision: done for done in recording.done}
    assert len(written) == len(recording.done), "two writes of one revision"
    for revision, events in changes.items():
        done = written.pop(revision, None)
        if done is None:
            assert {event["type"] for event in events.values()} == {"expire"}
            continue
        puts = {k: e["value"] for k, e in events.items() if e["type"] == "put"}
        assert puts == done.puts
        deletes = {k for k, e in events.items() if e["type"] == "delete"}
        assert done.deletes <= deletes
    assert written == {}


def test_atomic(recording: Recording) -> None:
    """All that a transaction, or the deletion of a range, has done comes in one message."""
    changes = dict(told(recording.everything))
    several = [done for done in recording.done if len(done.puts) + done.deleted > 1]
    assert len(several) > 20
    for done in recording.done:
        events = changes[done.revision]
        assert len(events) == len(done.puts) + done.deleted
        if not done.puts and not done.deletes:
            assert any(all(key.startswith(p) for key in events) for p in PREFIXES)


def test_resumable(recording: Recording) -> None:
    """From any revision, at any node, also one that came back by a snapshot: exactly the rest."""
    reference = recording.selected(lambda _: True)
    for recorder in recording.resumed:
        assert told(recorder) == [(r, e) for r, e in reference if r >= recorder.first]


def test_bookmarkable(recording: Recording) -> None:
    """A progress message says: all up to this revision has come. It is a place to resume from."""
    count = 0
    for holds, recorder in recording.whole:
        expected = [revision for revision, _ in recording.selected(holds)]
        came: list[int] = []
        for message in recorder.messages:
            if message.event == "change":
                came.append(message.revision)
            elif message.event == "progress" and message.id is not None:
                assert message.id == message.revision
                assert came == [r for r in expected if r <= message.revision]
                count += 1
    assert count > len(recording.whole)


def test_the_previous_value_is_right(recording: Recording) -> None:
    """It is what was there right before this revision; absent where nothing was, and where nobody
    has asked for it."""
    values: dict[str, str] = {}
    for _, events in told(recording.everything):
        for key, event in events.items():
            assert event.get("prev") == values.get(key)
            if event["type"] == "put":
                values[key] = event["value"]
            else:
                del values[key]
    assert values == recording.items
    for _, recorder in recording.whole:
        if "prev=1" not in recorder.query:
            assert told(recorder) == without_prev(told(recorder))


def test_the_creation_flag_is_right(recording: Recording) -> None:
    """`created` is true for the first put of a key and after it was gone, else false."""
    present: set[str] = set()
    for _, events in told(recording.everything):
        for key, event in events.items():
            if event["type"] == "put":
                assert event["created"] is (key not in present)
                present.add(key)
            else:
                assert "created" not in event
                present.remove(key)


def test_the_filter_is_exact(recording: Recording) -> None:
    """Every change of a selected key, and of no other; also for who sleeps meanwhile."""
    for holds, recorder in recording.whole:
        expected = recording.selected(holds)
        if "prev=1" not in recorder.query:
            expected = without_prev(expected)
        assert told(recorder) == expected, recorder.query


def test_who_sleeps_too_long_is_told(recording: Recording) -> None:
    """Beyond the history: 410 with the newest revision that is gone, and behind that nothing is
    missing. What a reader has got until then has no hole either."""
    beyond, kept, stalled = recording.beyond, recording.kept, recording.stalled
    assert beyond is not None
    assert kept is not None
    assert stalled is not None
    assert beyond.changes == []
    assert beyond.compact_revision == recording.cut_end - KEPT
    revisions = [message.revision for message in kept.changes]
    assert revisions == list(range(beyond.compact_revision + 1, recording.cut_end + 1))
    assert stalled.compact_revision == beyond.compact_revision
    expected = without_prev(recording.selected(lambda key: key.startswith("a")))
    got = told(stalled)
    assert got == expected[: len(got)]
    assert len(got) < len(expected)
