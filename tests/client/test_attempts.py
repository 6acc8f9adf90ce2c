"""What is certain after several attempts, for all three that make them; and how late one may be."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

from dengine.cli.remote import Remote
from dengine.client import Client, attempts, stopwatch
from dengine.client.attempts import REPEAT_FOR_S, SINGLE_KEYS, Attempts, IdempotencyKeys, Key
from dengine.config import IDEMPOTENCY_WINDOW_MIN_S
from dengine.embedded.calls import Calls
from dengine.errors import (
    DengineError,
    NotLeader,
    PreconditionFailed,
    RateLimited,
    RequestTimeout,
    StaleRequest,
)
from dengine.kv.commands import Put, PutResult
from tests.client.fake_server import fake_cluster
from tests.client.fake_state import Asked
from tests.client.virtual import run

LONGEST_REQUEST_S = 60.0  # Dengine-Timeout-Ms


def test_the_outcome_is_that_of_all_attempts_together() -> None:
    tried = Attempts("write")
    tried.sent(1, 0.0)
    tried.refused(1, NotLeader("another one leads", outcome="none"))
    assert tried.outcome == "none"
    refusal = RateLimited("later")
    assert tried.certain(refusal) is refusal
    tried.sent(2, 1.0)
    tried.sent(3, 2.0)
    tried.did_nothing(3)
    assert tried.outcome == "unknown"
    certain = tried.certain(refusal)
    assert (certain.outcome, refusal.outcome) == ("unknown", "none")
    assert "earlier attempt" in str(certain)
    verdict = PreconditionFailed("it is at revision 7")
    assert tried.certain(verdict).outcome == "none", "under this key it is the first result"


def test_a_read_did_nothing() -> None:
    tried = Attempts("read")
    tried.sent(1, 0.0)
    assert tried.may_send(10 * REPEAT_FOR_S)
    assert tried.certain(RequestTimeout("late", outcome="unknown")).outcome == "none"


def test_what_is_not_remembered_any_more_is_unknown() -> None:
    tried = Attempts("write")
    assert tried.certain(StaleRequest("long ago", outcome="none")).outcome == "unknown"


def test_the_age_counts_from_the_first_attempt_that_may_have_happened() -> None:
    tried = Attempts("write")
    tried.sent(1, 0.0)
    tried.did_nothing(1)
    tried.sent(2, 100.0)
    tried.sent(3, 200.0)
    assert tried.may_send(99.0 + REPEAT_FOR_S)
    assert not tried.may_send(100.0 + REPEAT_FOR_S)


def test_the_shortest_window_is_longer_than_a_write_is_repeated() -> None:
    assert REPEAT_FOR_S + LONGEST_REQUEST_S <= IDEMPOTENCY_WINDOW_MIN_S


def test_a_key_changes_its_kind_only_while_nothing_can_have_happened() -> None:
    keys = IdempotencyKeys()
    key = keys.take()
    single = key.text
    tried = Attempts("write", key)
    tried.sent(1, 0.0)
    tried.sent(2, 0.0)
    tried.refused(1, RateLimited("no more can be remembered", full="keys"))
    assert key.text == single
    tried.refused(2, RateLimited("no more can be remembered", full="keys"))
    client_id, number = key.text.split(":")
    assert number == "1"
    tried.sent(3, 0.0)
    tried.refused(3, RateLimited("again", full="keys"))
    assert key.text == f"{client_id}:1"
    given = Key("mine")
    Attempts("write", given).refused(1, RateLimited("no more can be remembered", full="keys"))
    assert given.text == "mine"


# --- the client


def test_no_write_is_repeated_after_its_result_may_be_forgotten() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        sent: list[float] = []

        def note(asked: Asked) -> DengineError | None:
            if asked.method == "PUT":
                sent.append(loop.time())
            return None

        async with fake_cluster(3) as cluster, Client(cluster.endpoints) as client:
            for node in cluster.nodes:
                node.refuse, node.drop_replies = note, 1_000_000
            with pytest.raises(RequestTimeout) as told:
                await client.put("k", b"v", timeout_s=5000)
            assert told.value.outcome == "unknown"
            assert sent[-1] - sent[0] <= REPEAT_FOR_S
            assert loop.time() - sent[0] <= REPEAT_FOR_S + 60
            assert len(sent) > 100

    run(scenario(), limit_s=6000)


def test_renewals_leave_nothing_to_remember() -> None:
    """Else those who keep leases alive would fill the table, and writes get 429."""

    async def scenario() -> None:
        async with fake_cluster(3) as cluster, Client(cluster.endpoints) as client:
            async with client.lease(10) as lease:
                cluster.nodes[0].drop_replies = 1
                await asyncio.sleep(60)
                assert not lease.lost.is_set()
            renewed = [a for a in cluster.asked if "keepalive" in a.target]
            assert len(renewed) > 10
            assert not any("Idempotency-Key" in a.headers for a in renewed)

    run(scenario())


def test_a_full_table_of_single_keys_keeps_no_write_waiting() -> None:
    async def scenario() -> None:
        def full(asked: Asked) -> DengineError | None:
            key = asked.headers.get("Idempotency-Key", "")
            return RateLimited("no more", full="keys") if key.startswith("once-") else None

        async with fake_cluster(3) as cluster, Client(cluster.endpoints) as client:
            for node in cluster.nodes:
                node.refuse = full
            for number in range(SINGLE_KEYS):
                await client.put(f"k/{number}", b"")
            assert len(cluster.state.keys) == SINGLE_KEYS

    run(scenario())


# --- an app on its own node


class _Silent:
    """A node whose writes end without a word of what became of them."""

    def __init__(self) -> None:
        self.sent: list[tuple[float, str]] = []

    async def write(self, command: object, deadline: float, once: Any) -> object:
        self.sent.append((asyncio.get_running_loop().time(), once and once.key))
        raise RequestTimeout("no answer", outcome="unknown")


def test_an_app_repeats_no_write_too_late() -> None:
    async def scenario() -> None:
        node = _Silent()
        calls = Calls(cast(Any, node), 10.0)
        with pytest.raises(RequestTimeout) as told:
            await calls.write(Put(b"k", b"v", None), PutResult, None, 5000.0)
        assert told.value.outcome == "unknown"
        assert len({key for _, key in node.sent}) == 1
        assert 250 < node.sent[-1][0] - node.sent[0][0] <= REPEAT_FOR_S

    run(scenario(), limit_s=6000)


# --- the command line


@contextmanager
def answering(answer: Callable[[bytes], bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers each request with what `answer` makes of it, b"": hangs up."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    data = connection.recv(65536)
                    if not data:
                        return
                    asked.append(data)
                    connection.sendall(answer(data))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}", asked
        finally:
            with socket.create_connection(listening.getsockname()):
                pass  # the end of `serve`
            thread.join(10)


_REFUSED = (
    b"HTTP/1.1 429 Too Many Requests\r\nConnection: close\r\n\r\n"
    b'{"error":"rate_limited","code":4004,"message":"full","retryable":true,"outcome":"none","full":"keys"}'
)
_DONE = b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"ok":true}'


@pytest.mark.parametrize(("limit_s", "times"), [(300.0, 2), (0.0, 1)])
def test_the_command_line_repeats_no_write_too_late(
    limit_s: float, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "REPEAT_FOR_S", limit_s)
    with answering(lambda data: b"") as (endpoint, asked):
        with pytest.raises(RequestTimeout) as told:
            Remote([endpoint], 30.0).call("PUT", "/v1/kv/k", b"v", key=Key("mine"))
        assert told.value.outcome == "unknown"
        assert "--idempotency-key mine" in str(told.value)
        assert len(asked) == times


def test_the_command_line_takes_another_key_where_the_table_is_full() -> None:
    def full(data: bytes) -> bytes:
        return _REFUSED if b"Idempotency-Key: once-" in data else _DONE

    with answering(full) as (endpoint, asked):
        reply = Remote([endpoint], 30.0).call("PUT", "/v1/kv/k", b"", key=IdempotencyKeys().take())
        assert reply.json() == {"ok": True}
        assert len(asked) == 2


def test_the_command_line_repeats_a_renewal_without_a_key() -> None:
    answers = iter((b"", _DONE))
    with answering(lambda data: next(answers)) as (endpoint, asked):
        Remote([endpoint], 30.0).call("POST", "/v1/leases/1/keepalive", kind="renewal")
        assert len(asked) == 2
        assert not any(b"Idempotency-Key" in data for data in asked)


def test_what_a_machine_has_slept_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clocks of loops stand still meanwhile, and the cluster forgets results."""
    slept = 0.0
    monkeypatch.setattr(stopwatch, "boot_time", lambda: slept)
    awake, tried = stopwatch.Stopwatch(lambda: 7.0), Attempts("write")
    tried.sent(1, awake.elapsed_s())
    slept = REPEAT_FOR_S - 1
    assert tried.may_send(awake.elapsed_s())
    slept = REPEAT_FOR_S
    assert not tried.may_send(awake.elapsed_s())
