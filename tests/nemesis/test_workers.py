"""Clients of the nemesis against a node that does what a test wants: it dies with half an answer,
loses some, and has forgotten its history.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from tests.cluster import free_port
from tests.linearizability.checker import FOREVER, Operation
from tests.nemesis import client
from tests.nemesis.client import Caller, Message, Refused, Tally, Unanswered, follow
from tests.nemesis.locks import FENCED, GUARDED, HELD, WRITE, Holder, Holds, Note
from tests.nemesis.nodes import holds_within
from tests.nemesis.watchers import Event, Gap, Told, Watched, Watcher, behind
from tests.nemesis.workers import (
    COUNTED,
    Increment,
    KeyedClient,
    Passing,
    TtlClient,
    TtlLook,
    TtlPut,
)
from tests.nemesis.workload import Records

DEADLINE_S = 30.0
NODES = [1, 2]  # both are the same
Handler = Callable[[str, dict[str, str]], Iterator[bytes]]


@asynccontextmanager
async def node(monkeypatch: pytest.MonkeyPatch, answer: Handler) -> AsyncIterator[None]:
    """A node that hangs up after each answer, which comes in the pieces that `answer` yields.

    Args:
        answer: told the first line of a request and its headers.
    """

    serving: list[tuple[asyncio.Task[None], asyncio.StreamWriter]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = dict(field.split(": ", 1) for field in fields)
        await reader.readexactly(int(headers.get("Content-Length", "0")))
        for piece in answer(line, headers):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append((asyncio.create_task(serve(reader, writer)), writer))

    port = free_port()
    monkeypatch.setattr(client, "host", lambda node_id: "127.0.0.1")
    monkeypatch.setattr(client, "PORT", port)
    async with await asyncio.start_server(accept, "127.0.0.1", port):
        try:
            yield
        finally:
            for task, writer in serving:  # a client that has its answer may go before its server
                task.cancel()
                writer.transport.abort()
            await asyncio.gather(*(task for task, _ in serving), return_exceptions=True)


def answered(status: int, body: str) -> bytes:
    """A whole answer."""
    head = f"HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(text: str) -> bytes:
    return f"{len(text):x}\r\n{text}\r\n".encode()


def change(revision: int, key: str) -> str:
    event = f'{{"type":"put","key":"{key}","value":"v","created":true}}'
    data = f'{{"revision":{revision},"events":[{event}]}}'
    return f"event: change\nid: {revision}\ndata: {data}\n\n"


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(DEADLINE_S):
            return await work()

    return asyncio.run(limited())


def test_a_stream_is_read_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into chunks and packets; comments say nothing, and the end is an end."""
    progress = 'event: progress\ndata: {"revision":0}\n\n'
    text = progress + change(1, "a") + ":\n\n" + change(2, "b")

    def answer(line: str, headers: dict[str, str]) -> Iterator[bytes]:
        yield STREAM[:20]
        yield STREAM[20:]
        for start in range(0, len(text), 7):
            whole = chunk(text[start : start + 7])
            yield whole[:3]
            yield whole[3:]
        yield END

    async def read() -> list[Message]:
        async with node(monkeypatch, answer), aclosing(follow(1, "/v1/watch", {}, 5.0)) as stream:
            return [message async for message in stream]

    found = run(read)
    assert [(message.event, message.id) for message in found] == [
        ("progress", None),
        ("change", 1),
        ("change", 2),
    ]
    assert found[2].data["events"][0]["key"] == "b"


def test_a_stream_that_breaks_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came whole was told; half an event is none. A refusal is told as it is."""

    def answer(line: str, headers: dict[str, str]) -> Iterator[bytes]:
        if "gone" in line:
            yield answered(410, '{"compact_revision":7}')
            return
        yield STREAM + chunk(change(1, "a") + change(2, "b")[:-5])

    async def read() -> None:
        async with node(monkeypatch, answer):
            async with aclosing(follow(1, "/v1/watch", {}, 5.0)) as stream:
                assert (await anext(stream)).id == 1
                with pytest.raises(Unanswered):
                    await anext(stream)
            with pytest.raises(Refused) as refused:
                await anext(follow(1, "/v1/watch?gone", {}, 5.0))
            assert refused.value.reply.json() == {"compact_revision": 7}

    run(read)


def test_a_watcher_goes_on_behind_what_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """At another node, after a stream that broke; and behind a listing, where the history begins
    later."""
    monkeypatch.setattr("tests.nemesis.watchers.STAYS_S", 1e9)
    asked: list[int] = []

    def answer(line: str, headers: dict[str, str]) -> Iterator[bytes]:
        if line.startswith("GET /v1/kv?"):
            yield answered(200, '{"revision":9,"items":[],"next":null}')
            return
        last = headers.get("Last-Event-ID")
        first = int(last) + 1 if last else int(line.split("from_revision=")[1].split()[0])
        asked.append(first)
        if len(asked) == 1:
            yield STREAM + chunk(change(1, "a") + change(3, "b") + change(4, "c")[:-2])
        elif len(asked) == 2:
            yield STREAM + chunk('event: progress\nid: 5\ndata: {"revision":5}\n\n') + END
        elif len(asked) == 3:
            yield answered(410, '{"compact_revision":8}')
        else:
            yield STREAM + chunk(change(10, "d")) + END

    async def watch() -> Watched:
        watched = Watched(0, "")
        caller = Caller(random.Random(1), Tally(), lambda node_id: False)
        async with node(monkeypatch, answer):
            task = asyncio.create_task(Watcher(caller, watched, 1, lambda: NODES).run())

            async def told() -> bool:
                return watched.position == 11

            await holds_within(told, DEADLINE_S)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return watched

    watched: Watched = run(watch)
    assert asked[:4] == [1, 4, 6, 10]
    assert [told.revision for told in watched.told][:4] == [1, 3, 5, 10]
    assert watched.told[1].events == (Event("put", "b", "v"),)
    assert watched.gaps == [Gap(6, 8, 9)]
    assert watched.resumed >= 3
    assert {told.node_id for told in watched.told} == set(NODES)


def test_a_watcher_goes_elsewhere_though_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a message it may leave; what else had come is told again where it goes on."""
    monkeypatch.setattr("tests.nemesis.watchers.STAYS_S", 1e-9)
    monkeypatch.setattr("tests.nemesis.watchers.PAUSE_S", 0.0)

    def answer(line: str, headers: dict[str, str]) -> Iterator[bytes]:
        last = headers.get("Last-Event-ID")
        first = int(last) + 1 if last else int(line.split("from_revision=")[1].split()[0])
        yield STREAM + chunk("".join(change(revision, "a") for revision in range(first, 6))) + END

    async def watch() -> Watched:
        watched = Watched(0, "")
        caller = Caller(random.Random(1), Tally(), lambda node_id: False)
        async with node(monkeypatch, answer):
            task = asyncio.create_task(Watcher(caller, watched, 1, lambda: NODES).run())

            async def told() -> bool:
                return watched.position == 6

            await holds_within(told, DEADLINE_S)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return watched

    watched: Watched = run(watch)
    assert [told.revision for told in watched.told] == [1, 2, 3, 4, 5]
    assert watched.resumed >= 4
    assert {told.node_id for told in watched.told} == set(NODES)


def test_who_follows_a_part_has_caught_up_with_the_last_change_of_it() -> None:
    """And before anybody knows what that is, those count who follow everything."""
    whole, part = Watched(0, ""), Watched(1, "r/")
    whole.told = [
        Told(1.0, 1, 3, (Event("put", "r/0", "a"),)),
        Told(1.0, 1, 5, (Event("put", "s/0", "b"),)),
    ]
    whole.position = 5
    assert behind([whole, part], 5) == [whole]
    whole.position = 6
    assert behind([whole, part], 5) == [part]
    part.position = 4
    assert behind([whole, part], 5) == []


def test_what_was_refused_is_forgotten_and_what_was_not_answered_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the puts for a time; and what is read is kept, also that there is nothing."""
    puts: list[str] = []
    answers = [answered(200, '{"revision":7}'), answered(503, '{"outcome":"none"}'), b""]

    def answer(line: str, headers: dict[str, str]) -> Iterator[bytes]:
        if line.startswith("GET"):
            yield answered(404, "{}")
            return
        puts.append(line)
        yield answers[len(puts) % 3]

    passing = Passing()
    caller = Caller(random.Random(1), Tally(), lambda node_id: False)
    ttl = TtlClient(caller, 100, passing)

    async def ask() -> None:
        async with node(monkeypatch, answer):
            for _ in range(60):
                await ttl.once(1)
        ttl.close()

    run(ask)
    assert len(puts) >= 6
    known = [put for put in passing.puts if put.returned < FOREVER]
    assert len(known) == len(puts) // 3
    assert all(put.revision == 7 for put in known)
    assert len(passing.puts) - len(known) == (len(puts) + 1) // 3
    assert {look.value for look in passing.looks} == {None}


def test_an_increment_is_repeated_under_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is answered, and once more after that; it is one operation, from the first request
    to the first answer."""
    keys: list[str] = []

    def answer(line: str, headers: dict[str, str]) -> Iterator[bytes]:
        keys.append(headers["Idempotency-Key"])
        if len(keys) == 2:
            yield answered(503, '{"outcome":"none"}')
        elif len(keys) > 2:
            yield answered(200, f'{{"revision":{len(keys)},"created":true}}')

    monkeypatch.setattr("tests.nemesis.workers.LOST", 0.0)
    monkeypatch.setattr("tests.nemesis.workers.AGAIN", 1.0)
    monkeypatch.setattr("tests.nemesis.workers.COUNTED", COUNTED[1:] * 2)
    increments: list[Increment] = []
    history: dict[str, list[Operation]] = {}
    caller = Caller(random.Random(1), Tally(), lambda node_id: False)
    keyed = KeyedClient(caller, 7, lambda: NODES, increments, history)

    async def count() -> None:
        async with node(monkeypatch, answer):
            assert await keyed.once(1)
        keyed.close()

    run(count)
    assert len(keys) == 4
    assert len(set(keys)) == 1
    (increment,) = increments
    assert (increment.done, increment.repeated) == (True, 3)
    assert increment.answers == [(200, 3), (200, 4)]
    ((op,),) = history.values()
    assert (op.name, op.result) == ("write", 3)
    assert op.called < op.returned < FOREVER


@pytest.mark.parametrize("outcomes", [("none", "none"), ("none", "unknown", "none")])
def test_an_increment_that_is_always_refused_has_not_happened(
    monkeypatch: pytest.MonkeyPatch, outcomes: tuple[str, ...]
) -> None:
    """Where some attempt may have, nobody can say so, and it is repeated."""
    asked: list[str] = []

    def answer(line: str, headers: dict[str, str]) -> Iterator[bytes]:
        asked.append(headers["Idempotency-Key"])
        if len(asked) > len(outcomes):
            yield answered(200, '{"revision":7,"created":true}')
        else:
            yield answered(503, f'{{"outcome":"{outcomes[len(asked) - 1]}"}}')

    rolls = iter((0.9, 0.9, 0.2))  # it hangs up on nobody, and gives up the second time it could
    rng = random.Random(1)
    monkeypatch.setattr(rng, "random", lambda: next(rolls, 0.9))
    monkeypatch.setattr("tests.nemesis.workers.LOST", 0.0)
    monkeypatch.setattr("tests.nemesis.workers.COUNTED", COUNTED[1:] * 2)
    increments: list[Increment] = []
    history: dict[str, list[Operation]] = {}
    keyed = KeyedClient(
        Caller(rng, Tally(), lambda _: False), 7, lambda: NODES, increments, history
    )

    async def count() -> None:
        async with node(monkeypatch, answer):
            assert await keyed.once(1) == ("unknown" in outcomes)
        keyed.close()

    run(count)
    (increment,) = increments
    assert increment.done is ("unknown" in outcomes)
    assert sum(map(len, history.values())) == ("unknown" in outcomes)


def test_what_became_of_a_write_takes_the_place_of_its_beginning() -> None:
    """One that is never told of again stays of unknown outcome."""
    holds, note = Holds(), Note(1, WRITE, 5, 1.0, key="g/fenced", value="5 1.1")
    other = Note(1, WRITE, 5, 2.0, key="g/fenced", value="5 1.2")
    done = Note(1, WRITE, 5, 1.0, 1.5, "g/fenced", "5 1.1", True, 9)
    for said in (note, other, done):
        holds.add(said)
    assert holds.notes == [done, other]


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is missing: util-linux")
def test_a_holder_that_is_to_end_before_it_has_begun_ends() -> None:
    """The run may be over while its process is made."""
    holder = Holder(0, random.Random(1), ["127.0.0.1:1"], Holds())
    holder.ask_to_end()
    run(holder.run)


def test_what_was_tried_in_vain_is_not_counted() -> None:
    """A workload that has done nothing must not look as if it had."""
    records = Records()
    records.passing.puts = [TtlPut("t/1", "1", 1, 1.0)]
    records.increments = [Increment(COUNTED[0], "c:1"), Increment(COUNTED[0], "c:2", done=False)]
    records.watched = [Watched(0, "", [Told(1.0, 1, 3)])]
    records.holds.notes = [Note(1, WRITE, 5, 1.0, key=GUARDED, value="5 1.1", accepted=False)]
    assert records.besides == {}
    records.passing.puts = [TtlPut("t/1", "1", 1, 1.0, 1.1, 2)]
    records.passing.looks = [TtlLook("t/1", 2.0, 2.1, None)]
    records.increments[1].done = True
    records.watched[0].told.append(Told(1.0, 1, 4, (Event("put", "a", "b"),)))
    records.holds.notes = [
        Note(1, HELD, 5, 1.0),
        Note(1, WRITE, 5, 1.0, key=FENCED, value="5 1.1", accepted=True),
    ]
    assert records.besides == {
        "puts with a TTL": 1,
        "keys with a TTL gone": 1,
        "changes watched": 1,
        "locks held": 1,
        "writes guarded by its token": 1,
        "keyed increments": 1,
    }
