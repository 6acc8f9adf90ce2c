"""What one stream carries, refuses and bounds, over real sockets on loopback."""

from __future__ import annotations

import asyncio
import logging
import random

import aiohttp
import pytest

from dengine.errors import InvariantBroken
from dengine.node.wire import MAX_FRAME_BYTES, Ping, Refused, encode
from tests.node.hosts import (
    STRANGER,
    Host,
    joined,
    note,
    on_loop,
    stranger,
    stranger_hello,
    until,
)


def test_frames_travel_both_ways_in_order_over_one_stream() -> None:
    """Either end may dial; both then send, and each frame arrives once and in order."""

    async def scenario() -> None:
        async with Host(1) as one, Host(2) as two:
            one.dials(two)
            await joined(one, two)
            for number in range(1000):
                assert one.peers.send(two.member, note(number))
                assert two.peers.send(one.member, note(number, b"back"))
            await until(lambda: len(one.frames) == len(two.frames) == 1000, "all frames")
            assert two.frames == [(one.member, note(n)) for n in range(1000)]
            assert one.frames == [(two.member, note(n, b"back")) for n in range(1000)]
            assert [h.member for h in two.connected] == [one.member]
            assert (two.expected, one.expected) == ([2], [None])
            status = one.peers.status()[2]
            assert (status.connected, status.member, status.error) == (True, two.member, None)
            assert status.address == two.address

    on_loop(scenario)


def test_a_reader_that_stopped_bounds_the_queue() -> None:
    """send() never waits and never keeps more than two of the largest frames for anyone."""

    async def scenario() -> None:
        async with Host(1) as one, stranger(one, stranger_hello(one), Ping()):
            await until(lambda: one.connected, "the stranger's stream")
            body = bytes(1024 * 1024)
            accepted = 0
            for _ in range(100):
                accepted += one.peers.send(STRANGER, note(1, body))
                await asyncio.sleep(0)
            # The rest is what the kernel and the other process hold.
            assert 8 <= accepted <= 32
            assert not one.peers.send(STRANGER, Ping())

    on_loop(scenario)


def test_the_largest_frame_passes_and_a_larger_one_is_our_own_bug() -> None:
    async def scenario() -> None:
        async with Host(1) as one, Host(2) as two:
            one.dials(two)
            await joined(one, two)
            overhead = len(encode(note(1, bytes(65536)))) - 65536
            largest = note(1, bytes(MAX_FRAME_BYTES - overhead))
            assert len(encode(largest)) == MAX_FRAME_BYTES
            assert one.peers.send(two.member, largest)  # masked
            assert two.peers.send(one.member, largest)
            await until(lambda: one.frames and two.frames, "both frames")
            assert two.frames == [(one.member, largest)]
            with pytest.raises(InvariantBroken, match="must split"):
                one.peers.send(two.member, note(1, bytes(MAX_FRAME_BYTES)))

    on_loop(scenario)


GARBAGE: dict[str, object] = {
    "oversized": bytes(MAX_FRAME_BYTES + 1),
    "random bytes": random.Random(1).randbytes(100),
    "empty": b"",
    "text": "hello",
    "text instead of UTF-8": b"\x93\xa7Refused\xa2\xff\xfe\xa1x",
    "deeply nested": b"\x93\xa4Ping" + b"\x91" * 100_000 + b"\xc0",
    "an unknown frame": b"\x91\xa5Nasty",
    "a truncated frame": encode(note(1, bytes(100)))[:-1],
}


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Without what asyncio says, at any time, of tasks that other tests have left behind."""
    return [record for record in caplog.records if record.name.startswith("dengine")]


@pytest.mark.parametrize("name", GARBAGE)
@pytest.mark.parametrize("shaken", [False, True], ids=["first", "in_use"])
def test_garbage_ends_the_stream_with_one_line(
    name: str, shaken: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever a stranger sends costs it the stream and us one line; nothing else notices."""
    caplog.set_level(logging.WARNING)

    async def scenario() -> None:
        async with Host(1) as one, Host(2) as two:
            one.dials(two)
            await joined(one, two)
            greeting = (stranger_hello(one), Ping()) if shaken else ()
            async with stranger(one, *greeting, GARBAGE[name]) as ws:
                await until(lambda: len(ours(caplog)) == 1, "the line in the log")
                while (await ws.receive()).type is aiohttp.WSMsgType.BINARY:
                    pass  # our own Hello and pings
            assert one.disconnected == ([STRANGER] if shaken else [])
            assert one.has(two)
            assert not one.peers.failed.done()

    on_loop(scenario)
    assert len(ours(caplog)) == 1


def test_random_frames_never_raise_anything_but_the_expected() -> None:
    """Mutated frames of every kind: the stream ends or lives, `failed` stays untouched."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)

    async def scenario() -> None:
        async with Host(1) as one:
            real = [encode(f) for f in (stranger_hello(one), note(1, b"x"), Refused("again", "x"))]
            for _ in range(150):
                data = bytearray(rng.choice(real))
                for _ in range(rng.randrange(1, 4)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
                ended = len(one.disconnected)
                async with stranger(one, stranger_hello(one), Ping(), bytes(data)):
                    pass
                await until(lambda n=ended: len(one.disconnected) > n, "the end of the stream")
            assert not one.peers.failed.done()

    on_loop(scenario)
