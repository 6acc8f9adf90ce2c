"""`/v1/cluster*` on one node: its view, its event stream, and what it refuses."""

from __future__ import annotations

import concurrent.futures
import contextlib
from pathlib import Path

import pytest

from dengine.kv.commands import COMMAND_VERSION
from dengine.node.peers import MAX_UNSETTLED
from tests.api.conftest import start_node
from tests.api.raw import Wire, assert_error, wire
from tests.cluster import Cluster, EventStream, ServeProcess, wait_for

INCARNATION = "1f3a5c7e9b2d4f60"


def test_the_cluster_view(client: Wire, node: ServeProcess) -> None:
    answer = client.request("GET", "/v1/cluster")
    view = answer.json()
    assert answer.status == 200
    assert {"cluster_id", "leader", "term", "revision", "settings", "members", "joint"} <= set(view)
    assert {"fault_tolerance", "advice"} <= set(view)
    (member,) = view["members"]
    fields = {"id", "address", "zone", "role", "status", "incarnation", "match", "lag", "ready"}
    assert fields | {"reason"} <= set(member)
    assert (member["id"], member["role"], member["status"]) == (1, "leader", "active")
    assert (view["joint"], view["fault_tolerance"]) == (False, 0)
    assert client.request("HEAD", "/v1/cluster").status == 200


def test_watching_the_cluster(client: Wire, node: ServeProcess) -> None:
    """The stream tells the membership at once and again when something changes in it."""
    stream = EventStream(node, "/v1/cluster/watch").start()
    wait_for(lambda: len(stream.events) >= 1, "the first event")
    changed = client.json("PUT", "/v1/cluster/settings", {"promotion": "odd"})
    assert changed.status == 200, changed
    wait_for(lambda: len(stream.events) >= 2, "the change")
    assert client.request("GET", "/v1/cluster").json()["settings"]["promotion"] == "odd"
    assert client.json("PUT", "/v1/cluster/settings", {"promotion": "immediate"}).status == 200


def test_a_stream_has_no_head_and_no_query(client: Wire) -> None:
    assert_405 = client.request("HEAD", "/v1/cluster/watch")
    assert assert_405.status == 405
    assert_error(client.request("GET", "/v1/cluster/watch?from=1"), 400, "invalid_request")


def test_watchers_that_leave_do_not_harm_the_node(node: ServeProcess) -> None:
    for _ in range(50):
        with wire(node) as watcher:
            watcher.send(b"GET /v1/cluster/watch HTTP/1.1\r\nHost: t\r\n\r\n")
            assert watcher.sock.recv(12) == b"HTTP/1.1 200"


def test_too_many_watchers_are_refused(small_node: ServeProcess) -> None:
    with wire(small_node) as first, wire(small_node) as second, wire(small_node) as third:
        for watcher in (first, second):
            watcher.send(b"GET /v1/cluster/watch HTTP/1.1\r\nHost: t\r\n\r\n")
            assert watcher.sock.recv(12) == b"HTTP/1.1 200"
        refused = third.request("GET", "/v1/cluster/watch")
        assert assert_error(refused, 429, "watch_overflow")["retryable"] is True
        assert refused.headers["retry-after"] == "1"


def test_too_many_handshakes_of_nodes_are_refused(node: ServeProcess) -> None:
    """In words, and with the time to come again; each one ends by itself after two seconds."""
    upgrade = (
        b"GET /v1/peer HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    with contextlib.ExitStack() as open_ones:
        for _ in range(2 * MAX_UNSETTLED):
            caller = open_ones.enter_context(wire(node))
            caller.send(upgrade)
            answer = caller.answer()
            if answer.status != 101:
                break
    error = assert_error(answer, 503, "cluster_unavailable")
    assert "handshakes are under way" in error["message"]
    assert answer.headers["retry-after"] == "1"


JOIN = {
    "id": 2,
    "incarnation": INCARNATION,
    "address": "127.0.0.1:9",
    "zone": "",
    "status": "promotable",
    "command_version": COMMAND_VERSION,
}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/cluster/members", {}),
        ("POST", "/v1/cluster/members", []),
        ("POST", "/v1/cluster/members", b"{"),
        ("POST", "/v1/cluster/members", b""),
        ("POST", "/v1/cluster/members", b"\xff"),
        ("POST", "/v1/cluster/members", b"[" * 60_000),
        ("POST", "/v1/cluster/members", b'{"id":' + b"[" * 60_000),
        ("POST", "/v1/cluster/members", {**JOIN, "id": 0}),
        ("POST", "/v1/cluster/members", {**JOIN, "id": 2**32}),
        ("POST", "/v1/cluster/members", {**JOIN, "id": "2"}),
        ("POST", "/v1/cluster/members", {**JOIN, "id": 2.5}),
        ("POST", "/v1/cluster/members", {**JOIN, "id": True}),
        ("POST", "/v1/cluster/members", {**JOIN, "incarnation": "xyz"}),
        ("POST", "/v1/cluster/members", {**JOIN, "incarnation": 5}),
        ("POST", "/v1/cluster/members", {**JOIN, "address": "nowhere"}),
        ("POST", "/v1/cluster/members", {**JOIN, "address": "h:99999"}),
        ("POST", "/v1/cluster/members", {**JOIN, "status": "boss"}),
        ("POST", "/v1/cluster/members", {**JOIN, "zone": "z" * 65}),
        ("POST", "/v1/cluster/members", {**JOIN, "colour": "blue"}),
        ("PUT", "/v1/cluster/members/1", {}),
        ("PUT", "/v1/cluster/members/1", {"address": ":1"}),
        ("PUT", "/v1/cluster/members/1", {"id": 3}),
        ("PUT", "/v1/cluster/members/x", {"zone": "a"}),
        ("PUT", "/v1/cluster/members/", {"zone": "a"}),
        ("DELETE", "/v1/cluster/members/0", None),
        ("DELETE", "/v1/cluster/members/4294967296", None),
        ("DELETE", "/v1/cluster/members/99999999999999999999999", None),
        ("DELETE", "/v1/cluster/members/-1", None),
        ("DELETE", "/v1/cluster/members/1/2", None),
        ("POST", "/v1/cluster/promote", {"ids": []}),
        ("POST", "/v1/cluster/promote", {"ids": [2, 2]}),
        ("POST", "/v1/cluster/promote", {"ids": 2}),
        ("POST", "/v1/cluster/promote", {"ids": list(range(1, 66))}),
        ("POST", "/v1/cluster/leader", {"id": None}),
        ("PUT", "/v1/cluster/settings", {}),
        ("PUT", "/v1/cluster/settings", {"promotion": "never"}),
        ("PUT", "/v1/cluster/settings", {"history_bytes": -1}),
        ("PUT", "/v1/cluster/settings", {"idempotency_window_s": 86_401}),
        ("PUT", "/v1/cluster/settings", {"idempotency_window_s": 359}),
        ("PUT", "/v1/cluster/settings", {"pace": 1}),
    ],
)
def test_a_bad_body_or_id_is_refused(client: Wire, method: str, path: str, body: object) -> None:
    before = client.request("GET", "/v1/cluster").json()
    answer = client.request(method, path) if body is None else client.json(method, path, body)
    assert_error(answer, 400, "invalid_request")
    after = client.request("GET", "/v1/cluster").json()
    assert (after["members"], after["settings"]) == (before["members"], before["settings"])


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "name"),
    [
        ("DELETE", "/v1/cluster/members/1", None, 409, "conflict"),
        ("PUT", "/v1/cluster/members/1", {"status": "read_only"}, 409, "conflict"),
        ("PUT", "/v1/cluster/members/7", {"zone": "a"}, 404, "not_found"),
        ("POST", "/v1/cluster/promote", {"ids": [7]}, 404, "not_found"),
        ("POST", "/v1/cluster/leader", {"id": 7}, 404, "not_found"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    client: Wire, method: str, path: str, body: object, status: int, name: str
) -> None:
    """The last voter stays one, and a stranger is named as one."""
    answer = client.request(method, path) if body is None else client.json(method, path, body)
    error = assert_error(answer, status, name)
    assert f"node {7 if status == 404 else 1}" in error["message"]
    assert len(client.request("GET", "/v1/cluster").json()["members"]) == 1


def test_json_must_say_that_it_is_json(client: Wire) -> None:
    for head in ("", "Content-Type: text/plain\r\n"):
        answer = client.request("PUT", "/v1/cluster/settings", b'{"promotion":"odd"}', head)
        assert_error(answer, 415, "unsupported_media")
    right = "Content-Type: Application/JSON; charset=utf-8\r\n"
    body = b'{"promotion":"immediate"}'
    assert client.request("PUT", "/v1/cluster/settings", body, right).status == 200


def test_json_bodies_have_a_length_and_a_limit(client: Wire) -> None:
    assert_error(client.request("POST", "/v1/cluster/promote"), 411, "length_required")
    large = client.json("POST", "/v1/cluster/promote", b" " * 65_537)
    assert_error(large, 413, "too_large")


def test_the_peers_entrance_takes_websockets_only(client: Wire, node: ServeProcess) -> None:
    assert_error(client.request("GET", "/v1/peer"), 400, "invalid_request")
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
    half = client.request("GET", "/v1/peer", head=upgrade)
    assert_error(half, 400, "invalid_request")
    assert client.request("GET", "/livez").status == 200


def test_changes_at_the_same_time_do_not_undo_each_other(node: ServeProcess) -> None:
    """Two operators change different settings at the same moment: both changes stand."""
    fields = ("history_revisions", "history_bytes", "idempotency_window_s")
    before = node.cluster()["settings"]
    for value in range(360, 370):  # idempotency_window_s is not less
        with concurrent.futures.ThreadPoolExecutor(len(fields)) as pool:
            replies = pool.map(
                lambda field, value=value: node.call("PUT", "/v1/cluster/settings", {field: value}),
                fields,
            )
            assert all(reply.ok for reply in replies)
        settings = node.cluster()["settings"]
        assert [settings[field] for field in fields] == [value] * len(fields)
    # Others use this node, too, and need a history.
    assert node.call("PUT", "/v1/cluster/settings", {f: before[f] for f in fields}).ok


def test_of_joiners_with_one_id_the_first_stays(tmp_path: Path) -> None:
    """Asking at the same moment, one is let in and the others are refused: they must not bury the
    first, which has been told that it is a member."""
    with Cluster(tmp_path) as cluster:
        node = start_node(cluster)

        def join(number: int) -> int:
            address = f"127.0.0.1:{30_000 + number}"
            body = JOIN | {"incarnation": f"{number}", "address": address}
            return node.call("POST", "/v1/cluster/members", body).status

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(join, range(1, 9)))
        assert sorted(statuses) == [200] + [409] * 7
        assert [m["id"] for m in node.cluster()["members"]] == [1, 2]
