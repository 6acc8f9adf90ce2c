"""More writes at once than the node may hold: some are refused, none is lost, nothing breaks."""

from __future__ import annotations

import contextlib
import json
import resource
import selectors
import socket
import time
from collections import Counter
from collections.abc import Iterator

from tests.cluster import ServeProcess

DEADLINE_S = 60.0
SPARE_FILES = 200
WATCHERS = 1000  # limits.watchers, by default


@contextlib.contextmanager
def _many(node: ServeProcess, count: int) -> Iterator[list[socket.socket]]:
    """`count` open connections to the node."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + SPARE_FILES), hard))
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection((node.host, node.port), 10))
            for _ in range(count)
        ]


def _write_at_once(node: ServeProcess, name: str, count: int) -> dict[int, bytes]:
    """One PUT on each of `count` connections, all sent before any answer is read."""
    answers: dict[int, bytes] = {}
    with _many(node, count) as connections, selectors.DefaultSelector() as selector:
        for number, connection in enumerate(connections):
            selector.register(connection, selectors.EVENT_READ, number)
        for number, connection in enumerate(connections):
            connection.sendall(
                f"PUT /v1/kv/{name}/{number:05d} HTTP/1.1\r\nHost: t\r\n"
                f"Dengine-Timeout-Ms: 30000\r\nContent-Length: 5\r\n\r\n{number:05d}".encode()
            )
        end = time.monotonic() + DEADLINE_S
        while len(answers) < count:
            assert time.monotonic() < end, f"{count - len(answers)} writes were never answered"
            for key, _ in selector.select(1):
                assert isinstance(key.fileobj, socket.socket)
                answers[key.data] = key.fileobj.recv(4096)
                selector.unregister(key.fileobj)
    return answers


def _statuses(answers: dict[int, bytes]) -> Counter[int]:
    """How often each status came; a refusal must be a 429 with all that belongs to it."""
    found: Counter[int] = Counter()
    for answer in answers.values():
        status = int(answer.split()[1])
        found[status] += 1
        if status == 429:
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"Retry-After: " in head
            assert json.loads(body)["error"] == "rate_limited"
            assert json.loads(body)["outcome"] == "none"
    return found


def _assert_exactly_the_acknowledged(
    node: ServeProcess, name: str, answers: dict[int, bytes]
) -> None:
    acknowledged = {n for n, answer in answers.items() if answer.startswith(b"HTTP/1.1 200")}
    assert node.items(f"{name}/") == {f"{name}/{n:05d}": f"{n:05d}" for n in acknowledged}


def test_10_000_writes_at_once(node: ServeProcess) -> None:
    """Each is acknowledged and there afterwards, or refused with 429 and not there."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(10_000, hard - SPARE_FILES)
    answers = _write_at_once(node, "burst", count)
    statuses = _statuses(answers)
    assert set(statuses) <= {200, 429}, statuses
    assert statuses[200] > 0
    _assert_exactly_the_acknowledged(node, "burst", answers)


def test_beyond_the_pending_limit_writes_are_refused(small_node: ServeProcess) -> None:
    """With room for 8 writes, 500 at once get 200 or 429, and the node serves on."""
    answers = _write_at_once(small_node, "crowd", 500)
    statuses = _statuses(answers)
    assert set(statuses) == {200, 429}, statuses
    _assert_exactly_the_acknowledged(small_node, "crowd", answers)
    assert small_node.put("crowd-after", "x").ok


def test_as_many_watchers_as_there_may_be_are_all_told(node: ServeProcess) -> None:
    """A thousand follow everything: writes go on, and each of them sees each write."""
    term, writes = node.status()["term"], [f"seen/{number:02d}" for number in range(20)]
    with _many(node, WATCHERS) as streams, selectors.DefaultSelector() as selector:
        for stream in streams:
            stream.sendall(b"GET /v1/watch?prefix=seen/ HTTP/1.1\r\nHost: t\r\n\r\n")
        for stream in streams:
            assert stream.recv(4096).startswith(b"HTTP/1.1 200"), "one more is refused"
            selector.register(stream, selectors.EVENT_READ, bytearray())
        for key in writes:
            assert node.put(key, "x").ok
        end = time.monotonic() + DEADLINE_S
        while selector.get_map():
            assert time.monotonic() < end, f"{len(selector.get_map())} were not told all"
            for ready, _ in selector.select(1):
                assert isinstance(ready.fileobj, socket.socket)
                ready.data.extend(ready.fileobj.recv(65_536))
                if writes[-1].encode() in ready.data:
                    selector.unregister(ready.fileobj)
                    assert all(ready.data.count(key.encode()) == 1 for key in writes)
    assert node.status()["term"] == term
