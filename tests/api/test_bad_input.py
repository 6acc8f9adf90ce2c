"""Broken, slow and oversized requests: always a JSON error or a closed connection, never harm."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time

import pytest

from dengine.api.protocol import Server
from tests.api.raw import Answer, Wire, assert_error, wire
from tests.cluster import ServeProcess, wait_for

HEAD = b"GET /livez HTTP/1.1\r\nHost: t\r\n"


def _send(node: ServeProcess, data: bytes, timeout_s: float = 5.0) -> Answer:
    with wire(node, timeout_s) as connection:
        connection.send(data)
        return connection.answer()


@pytest.mark.parametrize(
    ("data", "status", "name"),
    [
        (b"hello\r\n\r\n", 400, "invalid_request"),
        (b"GET /livez HTTP/9.9\r\nHost: t\r\n\r\n", 400, "invalid_request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "invalid_request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "invalid_request"),
        (b"GET /livez HTTP/1.1\r\n\r\n", 400, "invalid_request"),  # no Host
        (HEAD + b"Bad Header: x\r\n\r\n", 400, "invalid_request"),
        (HEAD + b"X: a\x00b\r\n\r\n", 400, "invalid_request"),
        (HEAD + b"Content-Length: x\r\n\r\n", 400, "invalid_request"),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400, "invalid_request"),
        (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "invalid_request"),
        (HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "invalid_request"),
        (HEAD + b"Content-Length: +1\r\n\r\n", 400, "invalid_request"),
        (HEAD + b"Content-Length : 1\r\n\r\n", 400, "invalid_request"),
        (HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n", 400, "invalid_request"),
        (HEAD + b"X: a\rContent-Length: 1\r\n\r\n", 400, "invalid_request"),
        (HEAD + b"X: a\nContent-Length: 1\r\n\r\n", 400, "invalid_request"),
        (HEAD + b"X: a\r\n Content-Length: 1\r\n\r\n", 400, "invalid_request"),
        (b"GET nowhere HTTP/1.1\r\nHost: t\r\n\r\n", 400, "invalid_request"),
        (b"BREW /v1/kv/a HTTP/1.1\r\nHost: t\r\n\r\n", 405, "method_not_allowed"),
        (b"CONNECT h:80 HTTP/1.1\r\nHost: h:80\r\n\r\n", 404, "not_found"),
        (b"GET /v1/kv/" + b"k" * 9000 + b" HTTP/1.1\r\nHost: t\r\n\r\n", 414, "uri_too_long"),
        (b"GET /" + b"k" * 500_000 + b" HTTP/1.1\r\nHost: t\r\n\r\n", 414, "uri_too_long"),
        (HEAD + b"X: " + b"a" * 9000 + b"\r\n\r\n", 431, "headers_too_large"),
        (HEAD + b"X: a\r\n" * 64 + b"\r\n", 431, "headers_too_large"),
        (HEAD + (b"X: " + b"a" * 300 + b"\r\n") * 30 + b"\r\n", 431, "headers_too_large"),
    ],
)
def test_what_is_no_request_is_a_json_error(
    node: ServeProcess, data: bytes, status: int, name: str
) -> None:
    answer = _send(node, data)
    assert_error(answer, status, name)


@pytest.mark.parametrize(
    ("method", "target", "allow"),
    [
        ("BREW", "/v1/kv/a?ttl=1", "PUT, GET, HEAD, DELETE, OPTIONS"),
        ("get", "/v1/kv/it's", "PUT, GET, HEAD, DELETE, OPTIONS"),
        ("GETS", "http://proxied/v1/txn", "POST, OPTIONS"),
        ("BREW", "/v1/leases/x/keepalive", "POST, OPTIONS"),
        ("BREW", "*", "GET, HEAD, PUT, POST, DELETE, OPTIONS"),
        ("BREW", "/nowhere", "GET, HEAD, PUT, POST, DELETE, OPTIONS"),
        ("TRACE", "/v1/txn", "POST, OPTIONS"),
    ],
)
def test_a_405_says_what_its_path_takes(
    node: ServeProcess, method: str, target: str, allow: str
) -> None:
    """In its header and its body, also where the parser knows no such method."""
    answer = _send(node, f"{method} {target} HTTP/1.1\r\nHost: t\r\n\r\n".encode())
    refused = assert_error(answer, 405, "method_not_allowed")
    assert (answer.headers["allow"], refused["allow"]) == (allow, allow)
    assert refused["message"].endswith(f"use one of {allow}")


def test_63_header_fields_are_fine(node: ServeProcess) -> None:
    assert _send(node, HEAD + b"X: a\r\n" * 63 + b"\r\n").status == 200


@pytest.mark.parametrize("value", ["0", "99", "60001", "-5", "1.5", "soon", "", "9" * 30])
def test_a_bad_timeout_is_refused(client: Wire, value: str) -> None:
    answer = client.request("PUT", "/v1/kv/t", b"x", f"Dengine-Timeout-Ms: {value}\r\n")
    assert_error(answer, 400, "invalid_request")
    assert client.request("GET", "/v1/kv/t", head="Dengine-Timeout-Ms: 100\r\n").status == 404


def test_other_expectations_are_refused(client: Wire) -> None:
    answer = client.request("PUT", "/v1/kv/t", b"x", "Expect: miracles\r\n")
    assert_error(answer, 400, "invalid_request")


def test_half_a_header_is_closed_after_5_s(node: ServeProcess) -> None:
    """Whether it stops at once or trickles in, and also on a connection that was used before."""
    with wire(node, 9) as silent, wire(node, 9) as used, wire(node, 9) as trickle:
        began = time.monotonic()
        silent.send(b"GET /livez HT")
        assert used.request("GET", "/livez").status == 200
        used.send(b"PUT /v1/kv/half HTTP/1.1\r\nHost: t\r\n")
        for byte in b"GET /livez HTTP/1.1\r\nX: a":
            trickle.send(bytes([byte]))
        for connection in (silent, used, trickle):
            assert_error(connection.answer(), 400, "invalid_request")
            assert connection.closed()
        assert 4.5 < time.monotonic() - began < 8


def test_the_last_bytes_of_a_body_are_no_half_header(node: ServeProcess) -> None:
    """However a body arrives, the connection may rest afterwards and be used again."""
    head = b"PUT /v1/kv/pieces HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\n"
    with wire(node, 9) as client:
        client.send(head + b"x" * 4)
        time.sleep(0.2)  # not in the same segment
        client.send(b"x" * 6)
        assert client.answer().status == 200
        client.sock.settimeout(6.5)  # HEADER_TIMEOUT_S is 5
        with pytest.raises(TimeoutError):
            client.sock.recv(1)
    large = b"x" * 500_000
    with wire(node, 9) as client:
        assert client.request("PUT", "/v1/kv/pieces", large).status == 200
        time.sleep(6)
        assert client.request("GET", "/v1/kv/pieces").body == large


def test_a_slow_body_is_closed_after_10_s(node: ServeProcess) -> None:
    """Silent, or slower than 1 KiB/s; the value is not stored, not even in part."""
    head = b"PUT /v1/kv/slow HTTP/1.1\r\nHost: t\r\nContent-Length: 20000\r\n\r\n"
    with wire(node, 14) as silent, wire(node, 0.25) as trickle:
        began = time.monotonic()
        silent.send(head + b"x" * 5000)
        trickle.send(head)
        answer = None
        while answer is None and time.monotonic() - began < 13:
            trickle.send(b"x" * 100)  # 400 bytes/s, paced by the timeout of the read below
            try:
                answer = trickle.answer()
            except TimeoutError:
                trickle = Wire(trickle.sock)  # a buffered reader is of no use after a timeout
        assert answer is not None
        assert_error(answer, 400, "invalid_request")
        assert 9.5 < time.monotonic() - began < 13
        assert_error(silent.answer(), 400, "invalid_request")
        assert silent.closed()
    assert node.request("GET", "/v1/kv/slow").status == 404


def test_a_body_that_keeps_pace_is_taken(node: ServeProcess) -> None:
    """A body that arrives in many pieces is stored whole."""
    with wire(node) as client:
        client.send(b"PUT /v1/kv/pieces HTTP/1.1\r\nHost: t\r\nContent-Length: 30000\r\n\r\n")
        for _ in range(300):
            client.send(b"x" * 100)
        assert client.answer().status == 200
        assert client.request("GET", "/v1/kv/pieces").body == b"x" * 30000


def test_clients_that_leave_in_the_middle(node: ServeProcess) -> None:
    head = b"PUT /v1/kv/left HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n\r\n"
    for cut in (1, len(head) // 2, len(head), len(head) + 4):
        with wire(node) as client:
            client.send((head + b"x" * 9)[:cut])
    assert node.request("GET", "/v1/kv/left").status == 404


def test_who_hangs_up_has_written_all_the_same(node: ServeProcess) -> None:
    """Once a request is there it is carried out, though nobody waits for the answer."""
    puts = [{"op": "put", "key": f"hung-{part}", "value": "x"} for part in range(2)]
    body = json.dumps({"success": puts}).encode()
    head = (
        "POST /v1/txn HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
        f"Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    for _ in range(20):
        assert node.request("DELETE", "/v1/kv?prefix=hung-").ok
        with wire(node) as client:
            client.send(head.encode())
            assert client.answer().status == 100, "it is at the body now"
            client.send(body)
        wait_for(lambda: node.request("GET", "/v1/kv/hung-0").ok, "the write", 5.0)
        assert node.request("GET", "/v1/kv/hung-1").ok
    assert "Traceback" not in node.output()


def test_pipelined_requests_are_answered_in_order(client: Wire) -> None:
    count = 100
    client.send(
        b"".join(
            b"PUT /v1/kv/pipe/%d HTTP/1.1\r\nHost: t\r\nContent-Length: 1\r\n\r\nx" % number
            for number in range(count)
        )
    )
    revisions = [client.answer().json()["revision"] for _ in range(count)]
    assert revisions == sorted(set(revisions))


def test_connection_headers_are_honoured(node: ServeProcess) -> None:
    """HTTP/1.1 keeps the connection unless asked not to, HTTP/1.0 closes it unless asked to."""
    with wire(node) as client:
        closing = client.request("GET", "/livez", head="Connection: close\r\n")
        assert closing.headers["connection"] == "close"
        assert client.closed()
    with wire(node) as client:
        client.send(b"GET /livez HTTP/1.0\r\n\r\n")
        assert client.answer().status == 200
        assert client.closed()
    with wire(node) as client:
        for _ in range(2):
            client.send(b"GET /livez HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert client.answer().headers["connection"] == "keep-alive"


def test_a_call_without_a_body_needs_no_length(node: ServeProcess) -> None:
    """As curl -X POST sends it; a body whose length is not announced is refused as ever."""
    with wire(node) as client:
        bare = client.request("POST", "/v1/snapshots", head="Dengine-Timeout-Ms: 100\r\n")
        assert bare.status in (200, 202), bare
    with wire(node) as client:
        chunked = client.request("POST", "/v1/snapshots", head="Transfer-Encoding: chunked\r\n")
        assert_error(chunked, 411, "length_required")
    with wire(node) as client:
        assert_error(client.request("POST", "/v1/snapshots", b"x"), 413, "too_large")


def test_random_bytes_never_harm_the_node(node: ServeProcess) -> None:
    """Requests with random damage: each is answered below 500 or the connection is closed."""
    seed = int(os.environ.get("DENGINE_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"DENGINE_TEST_SEED={seed}")
    rng = random.Random(seed)
    good = (
        b'PUT /v1/kv/fuzz%2f?x=1 HTTP/1.1\r\nHost: t\r\nIf-Match: "1", W/"2"\r\n'
        b"Content-Type: application/json\r\nDengine-Timeout-Ms: 500\r\nContent-Length: 3\r\n\r\nabc"
    )
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with wire(node) as client:
            client.send(bytes(data) + b"\r\n\r\n")
            client.sock.shutdown(1)
            try:
                status = client.answer().status
            except (ConnectionError, ValueError, IndexError):
                continue
            assert status < 500, (status, bytes(data))


def test_a_full_table_of_connections_says_when_to_come_again() -> None:
    async def scenario() -> bytes:
        server = Server(None, lambda error: None, lambda target: "")
        server.max_connections = 0
        listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
        async with listener:
            reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
            try:
                async with asyncio.timeout(5):
                    return await reader.read()
            finally:
                writer.close()

    head, _, body = asyncio.run(scenario()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 429 ")
    assert b"\r\nRetry-After: 1\r\n" in head + b"\r\n"
    assert json.loads(body)["error"] == "rate_limited"
