"""`GET /v1/watch`: what `curl -N` and a browser's EventSource see."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from tests.api.raw import Wire, assert_error, wire
from tests.cluster import ServeProcess, wait_for


class Stream:
    """A watch on a connection of its own, message by message."""

    def __init__(self, connection: Wire, query: str, head: str = "") -> None:
        self._connection = connection
        text = f"GET /v1/watch?{query} HTTP/1.1\r\nHost: t\r\n{head}\r\n"
        connection.send(text.encode())
        lines = iter(connection._stream.readline, b"\r\n")
        self.status = int(next(lines).split()[1])
        self.headers = dict(line.decode().strip().lower().split(": ", 1) for line in lines)
        self._rest = b""

    def next(self) -> dict[str, Any]:
        """The next message: `event`, `id` if it has one, `data`."""
        while b"\n\n" not in self._rest:
            size = int(self._connection._stream.readline(), 16)
            self._rest += self._connection._stream.read(size + 2)[:-2]
        text, self._rest = self._rest.split(b"\n\n", 1)
        fields = dict(line.split(": ", 1) for line in text.decode().splitlines())
        return {**fields, "data": json.loads(fields["data"])}


def _put(client: Wire, key: str, value: bytes = b"v", query: str = "") -> int:
    revision: int = client.request("PUT", f"/v1/kv/{key}{query}", value).json()["revision"]
    return revision


def test_a_watch_follows_a_prefix(client: Wire, node: ServeProcess) -> None:
    with wire(node, 20) as connection:
        stream = Stream(connection, "prefix=w/&prev=1")
        assert stream.status == 200
        assert stream.headers["content-type"] == "text/event-stream"
        first = stream.next()
        assert first["event"] == "progress"
        revision = _put(client, "w/a", b"1")
        _put(client, "x", b"1")
        _put(client, "w/a", b"\xff")
        client.request("DELETE", "/v1/kv/w/a")
        made, changed, deleted = (stream.next() for _ in range(3))
        assert made == {
            "event": "change",
            "id": str(revision),
            "data": {
                "revision": revision,
                "events": [{"type": "put", "key": "w/a", "value": "1", "created": True}],
            },
        }
        assert changed["data"]["events"] == [
            {"type": "put", "key": "w/a", "value_base64": "/w==", "created": False, "prev": "1"}
        ]
        assert deleted["data"]["events"] == [
            {"type": "delete", "key": "w/a", "prev_base64": "/w=="}
        ]


def test_a_transaction_is_one_message(client: Wire, node: ServeProcess) -> None:
    with wire(node, 20) as connection:
        stream = Stream(connection, "prefix=wt/")
        stream.next()
        puts = [{"op": "put", "key": f"wt/{n}", "value": ""} for n in (0, 1, 1, 2)]
        client.json("POST", "/v1/txn", {"success": [*puts, {"op": "put", "key": "y", "value": ""}]})
        events = stream.next()["data"]["events"]
        assert [event["key"] for event in events] == ["wt/0", "wt/1", "wt/2"]
        assert all(event["created"] for event in events)  # also the one that was put twice


def test_an_expired_key_is_an_event(client: Wire, node: ServeProcess) -> None:
    with wire(node, 30) as connection:
        stream = Stream(connection, "key=we")
        stream.next()
        _put(client, "we", query="?ttl=1")
        messages = [stream.next() for _ in range(2)]
        assert [m["data"]["events"][0]["type"] for m in messages] == ["put", "expire"]


def test_resuming_by_revision_and_by_the_browsers_header(client: Wire, node: ServeProcess) -> None:
    """from_revision is the first that is wanted; Last-Event-ID the last that was seen, and it
    comes first: a browser repeats the query of the first time."""
    revisions = [_put(client, "wr") for _ in range(5)]
    with wire(node, 20) as connection:
        stream = Stream(connection, f"key=wr&from_revision={revisions[1]}")
        assert stream.next()["data"] == {"revision": revisions[1] - 1}
        assert [stream.next()["data"]["revision"] for _ in range(4)] == revisions[1:]
    with wire(node, 20) as connection:
        head = f"Last-Event-ID: {revisions[2]}\r\n"
        stream = Stream(connection, f"key=wr&from_revision={revisions[0]}", head)
        assert stream.next()["id"] == str(revisions[2])
        assert [stream.next()["data"]["revision"] for _ in range(2)] == revisions[3:]


def test_beyond_the_history(client: Wire, node: ServeProcess) -> None:
    """410, with the newest revision that is gone. What goes with one entry is bounded, so a long
    history is cut in steps."""
    kept = {"history_revisions": 3}
    before = client.request("GET", "/v1/cluster").json()["settings"]["history_revisions"]
    assert client.json("PUT", "/v1/cluster/settings", kept).status == 200
    try:

        def pruned() -> bool:
            revision = _put(client, "wh")
            with wire(node) as other:
                answer = other.request("GET", "/v1/watch?prefix=&from_revision=1")
                if answer.status != 410:
                    return False
                return assert_error(answer, 410, "compacted")["compact_revision"] == revision - 3

        wait_for(pruned, "the history to be cut to three revisions", 30)
    finally:
        client.json("PUT", "/v1/cluster/settings", {"history_revisions": before})


@pytest.mark.parametrize(
    ("query", "head"),
    [
        ("", ""),
        ("key=a&prefix=b", ""),
        ("key=", ""),
        ("key=a&from_revision=0", ""),
        ("key=a&from_revision=x", ""),
        ("key=a&prev=maybe", ""),
        ("key=a&other=1", ""),
        ("key=a", "Last-Event-ID: x\r\n"),
        ("key=a", "Last-Event-ID: -1\r\n"),
        ("key=a&from_revision=banana", "Last-Event-ID: 3\r\n"),
    ],
)
def test_bad_watches_are_refused(client: Wire, query: str, head: str) -> None:
    answer = client.request("GET", f"/v1/watch?{query}", None, head)
    assert_error(answer, 400, "invalid_request")


def test_an_empty_last_event_id_is_none(node: ServeProcess) -> None:
    """As a browser sends it before the first event."""
    with wire(node, 20) as connection:
        stream = Stream(connection, "key=nothing", "Last-Event-ID: \r\n")
        assert stream.next()["event"] == "progress"


def test_a_watcher_that_sends_no_more_has_left(node: ServeProcess) -> None:
    """Its place is free for another one at once, and not only when there is something to send."""
    with wire(node) as follows, wire(node) as leaves_first:
        assert Stream(follows, "prefix=").next()["event"] == "progress"
        follows.sock.shutdown(socket.SHUT_WR)
        assert follows.closed()
        put = b"PUT /v1/kv/left HTTP/1.1\r\nHost: t\r\nContent-Length: 1\r\n\r\nx"
        leaves_first.send(put + b"GET /v1/watch?prefix= HTTP/1.1\r\nHost: t\r\n\r\n")
        leaves_first.sock.shutdown(socket.SHUT_WR)
        assert leaves_first.answer().status == 200
        leaves_first._stream.read()  # to its end, within the time limit of the socket


def test_too_many_watches_are_refused(small_node: ServeProcess) -> None:
    with wire(small_node) as first, wire(small_node) as second, wire(small_node) as third:
        for connection in (first, second):
            assert Stream(connection, "prefix=").status == 200
        refused = third.request("GET", "/v1/watch?prefix=")
        assert assert_error(refused, 429, "watch_overflow")["retryable"] is True
    with wire(small_node) as again:
        wait_for(lambda: again.request("HEAD", "/readyz").status == 200, "the node to go on")


def test_a_watch_has_no_head(client: Wire) -> None:
    assert client.request("HEAD", "/v1/watch?key=a").status == 405
