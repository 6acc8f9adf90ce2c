"""Streams between nodes, over real sockets on loopback."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import socket
import sys
from contextlib import closing
from pathlib import Path

import pytest
from aiohttp import web

from dengine.node.wire import Ping, Refused, decode, encode
from dengine.raft.types import MemberId
from tests.node.hosts import (
    STRANGER,
    Host,
    Proxy,
    joined,
    local_address,
    note,
    on_loop,
    stranger,
    stranger_hello,
    until,
)


def test_an_acceptor_refuses_with_a_reason() -> None:
    """A foreign cluster's node is told why, its status says so, and no stream is ever in use."""

    async def scenario() -> None:
        async with Host(1) as one, Host(2, cluster="other") as two:
            one.dials(two)
            await until(lambda: one.refused, "the refusal")
            assert one.refused[0] == (2, Refused("foreign_cluster", "this is other, not c"))
            await until(lambda: one.error(2) == "foreign cluster", "the reason in status()")
            assert not one.connected
            assert not two.connected

    on_loop(scenario)


def test_a_dialler_refuses_with_a_reason() -> None:
    """The acceptor, which would have taken the stream, hears why and never puts it in use."""

    async def scenario() -> None:
        async with Host(1) as one, Host(2) as two:
            one.cluster = "other"
            two.admit = lambda theirs, host: None  # lets all in
            one.dials(two)
            await until(lambda: two.refused, "the refusal")
            assert two.refused[0] == (1, Refused("foreign_cluster", "this is other, not c"))
            await until(lambda: one.error(2) == "foreign cluster", "the reason in status()")
            assert not one.connected
            assert not two.connected

    on_loop(scenario)


def test_both_ends_dialling_at_once_settle_on_one_stream() -> None:
    """Whatever the timing of two crossing dials, one TCP connection survives, and works."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")

    async def round_of(rng: random.Random) -> None:
        one, two = Host(1), Host(2)
        async with (
            one,
            two,
            Proxy(one, lag_s=0.02, rng=rng) as to_one,
            Proxy(two, lag_s=0.02, rng=rng) as to_two,
        ):
            one.peers.set_targets({2: [to_two.address]})
            await asyncio.sleep(rng.choice([0, rng.uniform(0, 0.05)]))
            two.peers.set_targets({1: [to_one.address]})
            for _ in range(3):
                await talk(one, two)
                here, there = rng.choice([(one, two), (two, one)])
                here.peers.disconnect(there.member.id, Refused("again", "shake hands again"))
            await talk(one, two)

    async def talk(one: Host, two: Host) -> None:
        """Both get a frame, sent again while the ends still settle; then one connection is left."""
        one.frames.clear()
        two.frames.clear()

        def heard() -> bool:
            one.peers.send(two.member, note(1))
            two.peers.send(one.member, note(1))
            return bool(one.frames and two.frames)

        await until(heard, "a frame each way")
        await joined(one, two)

    async def scenario() -> None:
        await asyncio.gather(*(round_of(random.Random(seed + n)) for n in range(20)))

    on_loop(scenario)


def test_a_lost_stream_is_redialled_within_a_second() -> None:
    """A node that comes back on its port is found again without dialling itself."""

    async def scenario() -> None:
        async with Host(1) as one:
            async with Host(2) as two:
                one.dials(two)
                await joined(one, two)
            await until(lambda: one.error(2) == "refused", "the port to be closed")
            assert one.disconnected == [two.member]
            async with Host(2, port=two.port, boot=2) as again:
                assert await joined(one, again) < 1.2

    on_loop(scenario)


def test_redials_are_spread() -> None:
    """Dials start at intervals of half a second to a second, none like the other."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        dials: list[float] = []

        def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            dials.append(loop.time())
            writer.close()

        listener = await asyncio.start_server(count, "127.0.0.1", 0)
        with closing(listener):
            async with Host(1) as one:
                one.peers.set_targets({2: [local_address(listener.sockets[0])]})
                await until(lambda: len(dials) == 5, "five dials")
        gaps = [later - earlier for earlier, later in itertools.pairwise(dials)]
        assert all(0.45 < gap < 1.2 for gap in gaps), gaps
        assert max(gaps) - min(gaps) > 0.001

    on_loop(scenario)


def test_a_new_boot_replaces_a_dead_stream_at_once() -> None:
    """A host that lost power cannot close its streams: its next process does not wait for that."""

    async def scenario() -> None:
        async with Host(1) as one, Host(2) as two, Proxy(two) as line:
            one.peers.set_targets({2: [line.address]})
            await until(lambda: one.has(two), "the first stream")
            line.swallow = True
            async with Host(2, boot=2) as again:
                again.dials(one)
                assert await until(lambda: one.has(again), "the new process") < 0.5
                assert one.disconnected == [two.member]
                assert one.peers.send(again.member, note(1))
                await until(lambda: again.frames, "a frame to the new process")

    on_loop(scenario)


def test_a_dead_link_is_noticed_in_three_seconds_and_a_quiet_one_stays() -> None:
    """No reset ever comes from a link that swallows everything; an idle link keeps its stream."""

    async def scenario() -> None:
        async with Host(1) as one, Host(2) as two, Host(3) as three, Proxy(two) as line:
            one.peers.set_targets({2: [line.address], 3: [three.address]})
            here = [(one, two), (two, one), (one, three)]  # the dialler has a stream first
            await until(lambda: all(host.has(other) for host, other in here), "both streams")
            line.swallow = True
            took_s = await until(lambda: one.disconnected and two.disconnected, "both to notice")
            assert 2.5 < took_s < 4.5
            assert one.disconnected == [two.member]
            assert one.has(three)
            await until(lambda: one.error(2) == "timed out", "a dial into the dead link")

    on_loop(scenario)


def test_a_stopped_process_is_noticed_and_found_again() -> None:
    """SIGSTOP leaves the kernel answering for the process: only its silence tells."""

    async def scenario() -> None:
        repository = Path(__file__).parents[2]
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.node.test_peers"),
            cwd=repository,
            stdout=asyncio.subprocess.PIPE,
        )
        assert child.stdout is not None
        try:
            port = int(await asyncio.wait_for(child.stdout.readline(), 10))
            async with Host(1) as one:
                one.peers.set_targets({2: [f"127.0.0.1:{port}"]})
                await until(lambda: one.peers.connected(2), "the child's stream")
                os.kill(child.pid, signal.SIGSTOP)
                took_s = await until(lambda: one.disconnected, "the silence")
                assert 2.5 < took_s < 4.5
                await until(lambda: one.error(2) == "timed out", "a dial to the stopped process")
                os.kill(child.pid, signal.SIGCONT)
                await until(lambda: one.peers.connected(2), "its return")
        finally:
            child.kill()
            await child.wait()

    on_loop(scenario)


def test_another_incarnation_is_not_sent_to() -> None:
    """A wiped node of the same id must not get what was meant for the one that remembered."""

    async def scenario() -> None:
        async with Host(1) as one, Host(2) as two:
            one.dials(two)
            await joined(one, two)
            assert not one.peers.send(MemberId(2, 77), note(1))
            assert not one.peers.send(MemberId(3, 1003), note(2))
            assert one.peers.send(two.member, note(3))
            await until(lambda: two.frames, "the frame that was meant for it")
            assert two.frames == [(one.member, note(3))]

    on_loop(scenario)


def test_incarnations_of_one_id_do_not_evict_each_other() -> None:
    """A second node with a copied file leaves the stream of the living one alone."""

    async def scenario() -> None:
        async with Host(1) as one, Host(2) as two, Host(2) as copied:
            copied.member = MemberId(2, 77)
            two.dials(one)
            await until(lambda: one.has(two), "the living node")
            copied.dials(one)
            await until(lambda: one.has(copied), "the other one")
            assert one.peers.send(two.member, note(1))
            assert one.peers.send(copied.member, note(2))
            await until(lambda: two.frames and copied.frames, "one frame each")
            assert (two.frames, copied.frames) == (
                [(one.member, note(1))],
                [(one.member, note(2))],
            )
            assert one.disconnected == []

    on_loop(scenario)


@pytest.mark.parametrize("dialler", [1, 2])
def test_disconnect_tells_the_reason(dialler: int) -> None:
    """What was sent before still arrives, then the reason, whoever dialled."""

    async def scenario() -> None:
        async with Host(1) as one, Host(2) as two:
            (one if dialler == 1 else two).dials(two if dialler == 1 else one)
            await joined(one, two)
            assert one.peers.send(two.member, note(1))
            one.peers.disconnect(2, Refused("removed", "node 2 was removed"))
            assert one.peers.connected(2) is None
            assert not one.peers.send(two.member, note(2))
            await until(lambda: two.refused, "the reason")
            assert two.refused == [(1, Refused("removed", "node 2 was removed"))]
            assert two.frames == [(one.member, note(1))]
            await until(lambda: two.disconnected, "the end")

    on_loop(scenario)


def test_targets_come_and_go() -> None:
    """A node that is no longer a target loses the stream that we dialled, not the one it did."""

    async def scenario() -> None:
        async with Host(1) as one, Host(2) as two, Host(3) as three:
            three.dials(one)
            await joined(one, three)
            one.dials(two, three)
            await until(lambda: one.has(two) and two.has(one), "the second stream")
            one.peers.set_targets({})
            await until(lambda: two.disconnected, "the end of the stream that we dialled")
            assert one.has(three)
            assert set(one.peers.status()) == {3}
            one.peers.set_targets({2: ["127.0.0.1:1"]})
            await until(lambda: one.error(2) == "refused", "the wrong address to fail")
            one.dials(two)
            await until(lambda: one.has(two) and two.has(one), "the stream's return")

    on_loop(scenario)


def test_addresses_are_tried_in_order() -> None:
    async def scenario() -> None:
        async with Host(1) as one, Host(2) as two:
            one.peers.set_targets({2: ["127.0.0.1:1", two.address]})
            await joined(one, two)
            assert one.peers.status()[2].address == two.address

    on_loop(scenario)


def test_status_says_why_a_node_cannot_be_reached() -> None:
    """What a joiner prints for each address while it waits."""

    async def scenario() -> None:
        async def elsewhere(_: web.BaseRequest) -> web.Response:
            return web.Response(status=404)

        other_service = web.Server(elsewhere)
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(other_service, "127.0.0.1", 0)
        web_address = local_address(listener.sockets[0])
        with closing(listener), socket.create_server(("127.0.0.1", 0)) as silent:
            silent_address = local_address(silent)
            async with Host(1) as one, Host(2) as two, Host(3, cluster="other") as foreign:
                expected = {
                    4: ("127.0.0.1:1", "refused"),
                    5: (silent_address, "timed out"),
                    6: (f"{'a' * 64}.example:9081", "unresolvable"),
                    7: (foreign.address, "foreign cluster"),
                    8: (two.address, "node 2 answers there"),
                    9: (web_address, "not a node (HTTP 404)"),
                }
                foreign.member = MemberId(7, 1007)
                one.peers.set_targets({i: [address] for i, (address, _) in expected.items()})
                await until(lambda: all(one.error(i) for i in expected), "all reasons")
                reasons = {i: one.error(i) for i in expected}
                assert reasons == {i: reason for i, (_, reason) in expected.items()}
                one.peers.set_targets({4: ["127.0.0.1:1", silent_address]})
                both = f"127.0.0.1:1 refused; {silent_address} timed out"
                await until(lambda: one.error(4) == both, "one reason per address")
        await other_service.shutdown(1)

    on_loop(scenario)


def test_a_lost_stream_that_we_accepted_is_the_newest_reason() -> None:
    """Not what our own dial met before the other side came to us."""

    async def scenario() -> None:
        reasons: list[str | None] = []
        async with Host(1) as one, Host(2) as two:
            one.peers.set_targets({2: ["127.0.0.1:1"]})
            await until(lambda: one.error(2) == "refused", "our own dial to fail")
            one.on_disconnected = lambda member: reasons.append(one.error(member.id))
            two.dials(one)
            await joined(one, two)
            two.peers.disconnect(1, Refused("again", "shake hands again"))
            await until(lambda: reasons, "the loss")
        assert reasons[0] == "again"

    on_loop(scenario)


@pytest.mark.parametrize("dialler", [1, 2])
@pytest.mark.parametrize("callback", ["on_frame", "on_connected", "on_disconnected", "admit"])
def test_a_bug_in_a_callback_ends_the_node(
    callback: str, dialler: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A node with a broken callback must not live on as a zombie: `failed` carries the bug."""

    async def scenario() -> None:
        def bug(*_: object) -> None:
            raise OSError("a bug, not the network")

        async with Host(1) as one, Host(2) as two:
            setattr(one, callback, bug)
            (one if dialler == 1 else two).dials(two if dialler == 1 else one)
            if callback in ("on_frame", "on_disconnected"):
                await until(lambda: two.has(one), "the stream")
                two.peers.send(one.member, note(1))
                two.peers.disconnect(1, Refused("again", "x"))
            with pytest.raises(OSError, match="a bug"):
                await asyncio.wait_for(asyncio.shield(one.peers.failed), 5)

    on_loop(scenario)


def test_close_in_the_middle_of_everything() -> None:
    """Dials under way, half-done handshakes and streams: close() ends them all within a second."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as silent:
            async with Host(1) as one, Host(2) as two, stranger(one):
                await two.peers.close()  # twice is harmless
                two_again = Host(3)
                async with two_again, stranger(one, stranger_hello(one)):
                    one.peers.set_targets(
                        {
                            3: [two_again.address],
                            4: [local_address(silent)],
                            5: [two.address],
                        }
                    )
                    await until(lambda: one.has(two_again) and one.error(5), "a stream")
                    assert one.error(5) == "not a node (HTTP 503)"
                    assert one.peers.send(two_again.member, note(1))
                    start = loop.time()
                    await one.peers.close()
                    assert loop.time() - start < 1.5
                    await until(lambda: two_again.frames, "the last frame, sent before close()")
                    assert not one.peers.send(two_again.member, note(2))
                    assert one.disconnected == [two_again.member]

    on_loop(scenario)


def test_the_first_answer_is_a_hello() -> None:
    """What a stranger sees of the handshake: our Hello, then pings."""

    async def scenario() -> None:
        async with Host(1) as one, stranger(one, stranger_hello(one)) as ws:
            assert decode((await ws.receive()).data) == one.hello(None, "")
            assert not one.connected, "a handshake without a confirmation"
            await ws.send_bytes(encode(Ping()))
            assert decode((await ws.receive()).data) == Ping()
            assert [h.member for h in one.connected] == [STRANGER]

    on_loop(scenario)


async def _serve_forever() -> None:
    """The child process: node 2 on a port that it prints."""
    async with Host(2) as two:
        print(two.port, flush=True)
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    asyncio.run(_serve_forever())
