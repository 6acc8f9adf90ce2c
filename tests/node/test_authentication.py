"""Peers with a secret: who does not know it gets nothing, whatever is sent or sent again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from dengine.node.authentication import Complaints, NotAuthenticated, Seal
from dengine.node.wire import (
    Challenge,
    Hello,
    Ping,
    RaftFrame,
    Refused,
    decode,
    encode,
)
from dengine.security import PeerSecret
from tests.node.hosts import Host, joined, note, on_loop, stranger, stranger_hello, until

SECRET = b"a secret that only nodes know"
OTHER = b"another secret, as long as it"
REFUSAL = encode(Refused("not_authenticated", "not authenticated"))
NONCE = b"n" * 32

Answer = Callable[[web.WebSocketResponse], Awaitable[None]]


async def received(ws: Any) -> list[bytes]:
    """Every message until the other side closes."""
    return [m.data async for m in ws if m.type is aiohttp.WSMsgType.BINARY]


@asynccontextmanager
async def impostor(answer: Answer) -> AsyncIterator[str]:
    """Somebody else at a member's address; "host:port"."""

    async def serve(request: web.BaseRequest) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await answer(socket)
        return socket

    server = web.Server(serve)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    host, port = listener.sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        listener.close()
        await server.shutdown(0.1)


def gives_nothing_away(messages: list[bytes]) -> bool:
    """Random numbers and the one refusal, and nothing that names anybody."""
    for data in messages:
        if data != REFUSAL:
            frame = decode(data)
            assert type(frame) is Challenge, frame
            assert len(frame.nonce) == 32
    return True


def test_nodes_with_the_same_secret_talk(caplog: pytest.LogCaptureFixture) -> None:
    """Both directions, many frames, either end dialling; the secret itself is never sent."""

    async def scenario() -> None:
        one, two = Host(1, secret=SECRET), Host(2, secret=SECRET)
        async with one, two:
            one.dials(two)
            two.dials(one)
            await joined(one, two)
            for number in range(500):
                assert one.peers.send(two.member, note(number))
                assert two.peers.send(one.member, note(number, b"x" * 1000))
            await until(lambda: len(one.frames) == len(two.frames) == 500, "all frames")
            assert two.frames == [(one.member, note(n)) for n in range(500)]
            one.peers.disconnect(2, Refused("removed", "node 2 was removed"))
            await until(lambda: two.refused, "the reason")
            assert two.refused == [(1, Refused("removed", "node 2 was removed"))]

    caplog.set_level(logging.DEBUG, "dengine")
    on_loop(scenario)
    assert SECRET.decode() not in caplog.text


@pytest.mark.parametrize("dialler", [1, 2])
@pytest.mark.parametrize("theirs", [None, OTHER], ids=["no secret", "another secret"])
def test_nodes_without_the_same_secret_never_talk(
    theirs: bytes | None, dialler: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither hears the other's Hello, both say so once in their log, and `status` shows it."""

    async def scenario() -> None:
        one, two = Host(1, secret=SECRET), Host(2, secret=theirs)
        async with one, two:
            calling, called = (one, two) if dialler == 1 else (two, one)
            calling.dials(called)
            error = calling.peers.status
            await until(
                lambda: error()[called.member.id].error == "not authenticated", "the reason"
            )
            first = len(caplog.records)
            await until(lambda: len(caplog.records) >= first, "the log")
            assert not one.connected
            assert not two.connected
            assert one.expected == []  # no Hello was even judged
            assert two.expected == []
            assert one.refused == two.refused == []

    caplog.set_level(logging.WARNING, "dengine")
    on_loop(scenario)
    assert "security.peer_secret_file" in caplog.text
    assert "127.0.0.1" in caplog.text
    assert SECRET.decode() not in caplog.text
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(set(messages)) == 2, messages  # one line for each node


@pytest.mark.parametrize(
    "frames",
    [
        ["hello"],
        ["hello", "ping"],
        ["ping"],
        ["challenge", "ping"],
        ["challenge", "hello", "ping"],
        ["short challenge"],
        ["challenge", "nothing"],
        ["garbage"],
        ["long", "long"],
        ["challenge", "long", "long"],
        ["text"],
        ["raft"],
        ["refused"],
    ],
    ids=" ".join,
)
def test_a_stranger_gets_nothing(frames: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Whatever one sends who does not know the secret, nothing that comes back tells anything."""

    async def scenario() -> None:
        async with Host(1, cluster="the-cluster-id", secret=SECRET) as one:
            said = {
                "hello": stranger_hello(one),
                "ping": Ping(),
                "challenge": Challenge(NONCE),
                "short challenge": Challenge(b""),
                "nothing": b"",
                "garbage": b"\xff\xff",
                "text": "text",
                "long": RaftFrame((b"x" * 1_000_000,)),  # type: ignore[arg-type]
                "raft": RaftFrame(()),
                "refused": Refused("removed", "node 1 was removed"),
            }
            async with stranger(one, *(said[frame] for frame in frames)) as ws:
                assert gives_nothing_away(await received(ws))
            assert not one.connected
            assert not one.refused
            assert one.expected == []
            await until(lambda: one.connections == 0, "the end of the connection")

    on_loop(scenario)


def test_a_handshake_that_stops_half_way_ends(caplog: pytest.LogCaptureFixture) -> None:
    """Cut off after any message of its own, the other side is left with nothing open."""

    async def scenario() -> None:
        async with Host(1, secret=SECRET) as one:
            for frames in ([], [Challenge(NONCE)]):
                async with stranger(one, *frames) as ws:
                    assert gives_nothing_away(await asyncio.wait_for(received(ws), 5))
            await until(lambda: one.connections == 0, "no connection to be left")
            assert not one.connected

    on_loop(scenario)


def test_what_was_recorded_is_worth_nothing_later() -> None:
    """A dialler that repeats, byte for byte, what a node once sent is not let in."""

    async def scenario() -> None:
        async with Host(1, secret=SECRET) as one, Host(2, secret=SECRET) as two:
            heard: list[bytes] = []
            async with recorder(one, heard) as address:
                two.peers.set_targets({1: [address]})
                await until(lambda: two.has(one) and one.has(two), "a stream to record")
                two.peers.send(one.member, note(1))
                await until(lambda: one.frames, "a frame")
                two.peers.set_targets({})
                await until(lambda: one.disconnected, "its end")
            one.connected.clear()
            one.frames.clear()
            async with stranger(one, *heard) as ws:
                assert gives_nothing_away(await received(ws))
            assert not one.connected
            assert not one.frames

    on_loop(scenario)


@asynccontextmanager
async def recorder(
    target: Host,
    heard: list[bytes],
    change: Callable[[int, bytes], list[bytes]] = lambda number, data: [data],
) -> AsyncIterator[str]:
    """Sits between a dialler and `target`, and may `change` what the dialler sends."""

    async def serve(socket: web.WebSocketResponse) -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"http://{target.address}/v1/peer", max_msg_size=0) as there,
        ):

            async def back() -> None:
                async for message in there:
                    await socket.send_bytes(message.data)
                await socket.close()

            backwards = asyncio.create_task(back())
            try:
                async for message in socket:
                    heard.append(message.data)
                    for data in change(len(heard), message.data):
                        await there.send_bytes(data)
            finally:
                await there.close()
                await asyncio.gather(backwards, return_exceptions=True)

    async with impostor(serve) as address:
        yield address


def test_an_answer_sent_back_to_its_sender_proves_nothing() -> None:
    """One who knows nothing and mirrors every message, its random number included."""

    async def scenario() -> None:
        async def mirror(socket: web.WebSocketResponse) -> None:
            async for message in socket:
                await socket.send_bytes(message.data)

        async with Host(1, secret=SECRET) as one, impostor(mirror) as address:
            one.peers.set_targets({2: [address]})
            await until(lambda: one.error(2) == "not authenticated", "the refusal")
            assert not one.connected
            assert one.expected == []

    on_loop(scenario)


@pytest.mark.parametrize("reason", ["removed", "wiped", "rolled_back", "duplicate"])
def test_an_impostor_cannot_talk_a_node_out_of_its_life(reason: Any) -> None:
    """ "You were removed" ends a node for good: from a stranger at a member's address it does not
    count, and the stranger learns nothing from the dialler either."""

    async def scenario() -> None:
        seen: list[bytes] = []

        async def lie(socket: web.WebSocketResponse) -> None:
            await socket.send_bytes(encode(Refused(reason, "it is over")))
            seen.extend(await received(socket))

        async with Host(1, cluster="the-cluster-id", secret=SECRET) as one:
            async with impostor(lie) as address:
                one.peers.set_targets({2: [address]})
                await until(lambda: one.error(2) == "not authenticated" and seen, "the refusal")
            assert not one.refused
            assert gives_nothing_away(seen)

    on_loop(scenario)


def test_an_impostor_that_is_challenged_learns_no_name() -> None:
    """The dialler's proof comes before anything that says who it is or what cluster this is."""

    async def scenario() -> None:
        seen: list[bytes] = []

        async def listen(socket: web.WebSocketResponse) -> None:
            await socket.send_bytes(encode(Challenge(NONCE)))
            await socket.send_bytes(bytes(32) + encode(Ping()))
            seen.extend(await received(socket))

        async with Host(1, cluster="the-cluster-id", secret=SECRET) as one:
            async with impostor(listen) as address:
                one.peers.set_targets({2: [address]})
                await until(lambda: one.error(2) == "not authenticated" and len(seen) == 3, "it")
            assert type(decode(seen[0])) is Challenge
            assert seen[1][32:] == encode(Ping())
            assert seen[2] == REFUSAL

    on_loop(scenario)


@pytest.mark.parametrize("what", ["changed", "repeated", "left out", "added"])
def test_nobody_in_between_can_change_what_nodes_say(what: str) -> None:
    """After the handshake each frame is sealed: what was tampered with ends the stream, unread."""

    async def scenario() -> None:
        async with Host(1, secret=SECRET) as one, Host(2, secret=SECRET) as two:
            heard: list[bytes] = []

            def change(number: int, data: bytes) -> list[bytes]:
                if b"tamper" not in data:
                    return [data]
                return {
                    "changed": [data.replace(b"tamper", b"TAMPER")],
                    "repeated": [data, data],
                    "left out": [],
                    "added": [encode(note(7, b"evil")), data],
                }[what]

            async with recorder(one, heard, change) as address:
                two.peers.set_targets({1: [address]})
                await until(lambda: two.has(one) and one.has(two), "a stream")
                two.peers.send(one.member, note(1, b"fine"))
                two.peers.send(one.member, note(2, b"tamper"))
                two.peers.send(one.member, note(3, b"after it"))
                await until(lambda: one.disconnected, "the end of the stream")
                two.peers.set_targets({})
            expected = [note(1, b"fine")] + ([note(2, b"tamper")] if what == "repeated" else [])
            assert [frame for _, frame in one.frames] == expected

    on_loop(scenario)


def test_a_hello_of_another_stream_is_not_taken() -> None:
    """One who knows the secret of nothing swaps the Hello for that of an earlier stream."""

    async def scenario() -> None:
        async with Host(1, secret=SECRET) as one, Host(2, secret=SECRET) as two:
            earlier: list[bytes] = []
            async with recorder(one, earlier) as address:
                two.peers.set_targets({1: [address]})
                await until(lambda: two.has(one) and one.has(two), "a stream to record")
                two.peers.set_targets({})
                await until(lambda: one.disconnected, "its end")
            assert type(decode(memoryview(earlier[2])[32:])) is Hello
            one.connected.clear()

            def swap(number: int, data: bytes) -> list[bytes]:
                return [earlier[2] if number == 3 else data]

            heard: list[bytes] = []
            async with recorder(one, heard, swap) as address:
                two.peers.set_targets({1: [address]})
                await until(lambda: len(heard) >= 3 and two.error(1), "the refusal")
                two.peers.set_targets({})
            assert not one.connected

    on_loop(scenario)


def test_seals_belong_to_one_direction_of_one_stream() -> None:
    secret = PeerSecret(SECRET)

    def pair(dialler: bytes = b"d" * 32, acceptor: bytes = b"a" * 32) -> tuple[Seal, Seal]:
        return (
            Seal(secret, dialler, acceptor, dials=True),
            Seal(secret, dialler, acceptor, dials=False),
        )

    dialler, acceptor = pair()
    sealed = [dialler.close(b"one"), dialler.close(b"two")]
    assert [bytes(acceptor.open(data)) for data in sealed] == [b"one", b"two"]
    for data, seal in (
        (pair()[0].close(b"one"), pair()[0]),  # sent back
        (pair(b"D" * 32)[0].close(b"one"), pair()[1]),  # from another stream
        (pair(b"d" * 32, b"A" * 32)[0].close(b"one"), pair()[1]),
        (sealed[1], pair()[1]),  # out of turn
        (sealed[0][:-1], pair()[1]),
        (b"", pair()[1]),
    ):
        with pytest.raises(NotAuthenticated):
            seal.open(data)


def test_a_stranger_cannot_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """One line a minute for an address, and a bounded number of addresses is remembered."""
    complaints = Complaints()
    for _ in range(100):
        complaints.about("10.0.0.1", "10.0.0.1 is 100 % strange")
    assert [r.getMessage() for r in caplog.records] == ["10.0.0.1 is 100 % strange"]
    for number in range(1000):
        complaints.about(f"10.0.1.{number}", "somebody")
    assert len(complaints._said) <= 256
